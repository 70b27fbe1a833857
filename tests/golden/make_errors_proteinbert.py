"""Measures how far the original ProteinBERT in float32 is from its own numbers in float64, which are stored here.

    python tests/golden/make_errors_proteinbert.py

Run by hand where the original is installed (protein-bert 1.0.1, TensorFlow 2.15.1, Keras 2.15.0, numpy 1.26.4); no test
needs it. For every stored output of the network, loss and gradient, and for the predictions of fine-tuning heads, it
writes the largest and the root mean square error, which are the noise floors of the tests in float32. Eager, on a CPU.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
del sys.path[0]  # this folder, where another one is called proteinbert

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from proteinbert.conv_and_global_attention_model import create_model  # noqa: E402
from tensorflow import keras  # noqa: E402

FOLDER = Path(__file__).parent / "proteinbert"
GROUPS = {"tiny_2blocks": [""], "padding_3blocks": ["g0.", "g1.", "g2.", "g3."], "finetune_heads": [""]}
DTYPES = {"F64": np.float64, "F32": np.float32, "I32": np.int32, "I64": np.int64}
STEPS = {
    "global_to_local": "global-to-seq-dense",
    "narrow_conv": "narrow-conv",
    "wide_conv": "wide-conv",
    "local_mid": "seq-merge1-norm",
    "local": "seq-merge2-norm",
    "global_dense1": "global-dense1",
    "attention_output": "global-attention",
    "global_mid": "global-merge1-norm",
    "global": "global-merge2-norm",
}
PAD = 25


def read(path):
    """A safetensors file: the length of a JSON header, the header, the numbers."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    return {
        name: np.frombuffer(body[slice(*told["data_offsets"])], DTYPES[told["dtype"]]).reshape(told["shape"])
        for name, told in header.items()
        if name != "__metadata__"
    }


def outputs(model, tokens, annotations, blocks):
    """All that is stored, from one call of a model that gives every layer's output."""
    names = {f"block{b}.{ours}": f"{theirs}-block{b}" for b in range(1, blocks + 1) for ours, theirs in STEPS.items()}
    names |= {"embedding.local": "embedding-seq-input", "embedding.global": "dense-global-input"}
    names |= {"seq_probs": "output-seq", "annotation_probs": "output-annotations"}
    every = keras.Model(model.inputs, {ours: model.get_layer(theirs).output for ours, theirs in names.items()})
    found = every([tokens, annotations], training=False)
    g = found["embedding.global"]
    for b in range(1, blocks + 1):
        layer = model.get_layer(f"global-attention-block{b}")
        maps = layer.calculate_attention([g, found[f"block{b}.local"]])
        found[f"block{b}.attention_weights"] = tf.reshape(maps, (len(tokens), -1, tokens.shape[1]))
        g = found[f"block{b}.global"]
    local, both = [], [found["embedding.global"]]
    for b in range(1, blocks + 1):
        local += [found[f"block{b}.local_mid"], found[f"block{b}.local"]]
        both += [found[f"block{b}.global_mid"], found[f"block{b}.global"]]
    found["local_representations"] = tf.concat([*local, found["seq_probs"]], -1)
    found["global_representations"] = tf.concat([*both, found["annotation_probs"]], -1)
    for ours, theirs, state in (
        ("seq_logits", "output-seq", found[f"block{blocks}.local"]),
        ("annotation_logits", "output-annotations", g),
    ):
        kernel, bias = model.get_layer(theirs).weights
        found[ours] = tf.matmul(state, kernel) + bias
    return found


def losses_and_gradients(model, given):
    """Those of pre-training, with its weights: zero for pads and for proteins without annotations."""
    ids, known = given["target_ids"], given["target_annotations"]
    with tf.GradientTape() as tape:
        letters, annotations = model([given["token_ids"], given["annotations"]], training=True)
        sequence = keras.losses.SparseCategoricalCrossentropy()(ids, letters, (ids != PAD).astype(np.float32))
        of_annotations = keras.losses.BinaryCrossentropy()(known, annotations, known.any(-1).astype(np.float32))
        total = sequence + of_annotations
    gradients = tape.gradient(total, model.trainable_variables)
    found = {"loss.total": total, "loss.sequence": sequence, "loss.annotations": of_annotations}
    return found | {f"grad.{i:03d}": tf.convert_to_tensor(x) for i, x in enumerate(gradients)}


def predictions(found, tasks, heads):
    """Of fine-tuning heads: a dense layer on a concatenation, or on the probabilities of pre-training."""
    told = {}
    for name, task in tasks.items():
        track, plain = ("local", "seq_probs") if task["is_seq"] else ("global", "annotation_probs")
        x = found[f"{track}_representations" if task["uses_concatenated_hidden_layers"] else plain]
        activation = {"binary": "sigmoid", "categorical": "softmax", "numeric": "linear"}[task["type"]]
        layer = keras.layers.Dense(heads[f"{name}.bias"].size, activation=activation)
        layer.build(x.shape)
        layer.set_weights([heads[f"{name}.kernel"], heads[f"{name}.bias"]])
        told[f"{name}.prediction"] = layer(x)
    return told


def errors(found, truth):
    told = {}
    for name, wanted in sorted(truth.items()):
        assert found[name].dtype == tf.float32, name
        error = found[name].numpy().astype(np.float64).reshape(wanted.shape) - wanted
        told[name] = {"max": float(np.abs(error).max()), "rms": float(np.sqrt((error**2).mean()))}
    return told


def main():
    report = {}
    for case, groups in GROUPS.items():
        folder = FOLDER / case
        settings = json.loads((folder / "config.json").read_text())
        given, wanted = read(folder / "inputs.safetensors"), read(folder / "expected.safetensors")
        weights = [x for _, x in sorted(read(folder / "model.safetensors").items())]
        for group in groups:
            inputs, truth = (
                {name[len(group) :]: x for name, x in tensors.items() if name.startswith(group)}
                for tensors in (given, wanted)
            )
            tokens, annotations = inputs["token_ids"], inputs["annotations"]
            kwargs = settings["upstream_create_model_kwargs"]
            model = create_model(tokens.shape[1], settings["vocab_size"], settings["n_annotations"], **kwargs)
            model.set_weights(weights)
            found = outputs(model, tokens, annotations, settings["n_blocks"])
            if "target_ids" in inputs:
                found |= losses_and_gradients(model, inputs)
                truth |= read(folder / "gradients.safetensors")
            if case == "finetune_heads":
                tasks = json.loads((folder / "inputs.json").read_text())["tasks"]
                found = predictions(found, tasks, read(folder / "heads.safetensors"))
                truth = {name: truth[name] for name in found}
            report[f"{case}.{group}".rstrip(".")] = errors(found, truth)
    (FOLDER / "float32_errors.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
