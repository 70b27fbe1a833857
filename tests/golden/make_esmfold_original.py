"""Writes esmfold/original: the golden ``b_v5_layout_multimer`` as its authors would have published it.

    python tests/golden/make_esmfold_original.py      (needs omegaconf, which nothing else here does)

As esmfold_3B_v1.pt, the file holds no language model but a configuration as an object of OmegaConf, and five buffers of
old versions of openfold and fairseq. The language model is a file as fair-esm has it, with a head for masked tokens
and, in a file of its own, a contact regression. Sources: facebookresearch/esm@2b36991 esm/esmfold/v1 and
esm/pretrained.py; which buffers the published file has more than the class is what its users report.
"""

import argparse
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "esmfold"
# transformers' names of sizes of the structure module, and the authors'
SIZES = {
    "sequence_dim": "c_s",
    "pairwise_dim": "c_z",
    "ipa_dim": "c_ipa",
    "resnet_dim": "c_resnet",
    "num_heads_ipa": "no_heads_ipa",
    "num_qk_points": "no_qk_points",
    "num_v_points": "no_v_points",
    "num_blocks": "no_blocks",
    "num_transition_layers": "no_transition_layers",
    "num_resnet_blocks": "no_resnet_blocks",
    "num_angles": "no_angles",
}
# transformers' names in a layer of ESM-2, and fair-esm's
LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}
STEM = "encoder.sentence_encoder."
FREQUENCIES = "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"


def stem_name(name: str) -> str:
    """fair-esm's name of a tensor of the language model."""
    name = name.removeprefix("esm.").replace(".gamma", ".weight").replace(".beta", ".bias")
    if name.startswith("encoder.layer."):
        number, part = name.removeprefix("encoder.layer.").split(".", 1)
        part, kind = part.rsplit(".", 1)
        return f"{STEM}layers.{number}.{LAYER[part]}.{kind}"
    return {
        "embeddings.word_embeddings.weight": f"{STEM}embed_tokens.weight",
        "encoder.emb_layer_norm_after.weight": f"{STEM}emb_layer_norm_after.weight",
        "encoder.emb_layer_norm_after.bias": f"{STEM}emb_layer_norm_after.bias",
    }.get(name, name)


def buffers() -> dict[str, Tensor]:
    """What the class of that time kept and today's computes: shapes are openfold's, numbers do not matter."""
    module = "trunk.structure_module."
    return {
        "positional_encoding._float_tensor": torch.zeros(1),
        f"{module}default_frames": torch.zeros(21, 8, 4, 4),
        f"{module}group_idx": torch.zeros(21, 14, dtype=torch.int64),
        f"{module}atom_mask": torch.zeros(21, 14),
        f"{module}lit_positions": torch.zeros(21, 14, 3),
    }


def write(folder: Path) -> None:
    tensors = load_file(GOLDEN / "b_v5_layout_multimer" / "model.safetensors")
    settings = json.loads((GOLDEN / "b_v5_layout_multimer" / "config.json").read_text())
    folding = settings["esmfold_config"]
    module = folding["trunk"]["structure_module"]
    folding["trunk"]["structure_module"] = {SIZES.get(name, name): value for name, value in module.items()}

    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("esm.")}
    whole = {"cfg": {"model": OmegaConf.create(folding)}, "model": trunk | buffers()}
    torch.save(whole, folder / "esmfold_tiny.pt")

    frequencies = tensors.pop(FREQUENCIES)
    stem = {stem_name(name): tensor for name, tensor in tensors.items() if name.startswith("esm.")}
    contacts = {name: stem.pop(name) for name in list(stem) if name.startswith("contact_head.")}
    for layer in range(settings["num_hidden_layers"]):
        stem[f"{STEM}layers.{layer}.self_attn.rot_emb.inv_freq"] = frequencies.clone()
    words = stem[f"{STEM}embed_tokens.weight"]
    channels = words.shape[1]
    stem |= {"encoder.lm_head.weight": words, "encoder.lm_head.bias": torch.zeros(len(words))}
    for name, shape in (("dense.weight", (channels, channels)), ("dense.bias", (channels,))):
        stem[f"encoder.lm_head.{name}"] = torch.zeros(shape)
    for kind in ("weight", "bias"):
        stem[f"encoder.lm_head.layer_norm.{kind}"] = torch.ones(channels)
    arguments = argparse.Namespace(
        encoder_layers=settings["num_hidden_layers"],
        encoder_embed_dim=channels,
        encoder_attention_heads=settings["num_attention_heads"],
        token_dropout=True,
    )
    torch.save({"cfg": {"model": arguments}, "model": stem}, folder / "esm2_tiny.pt")
    torch.save({"model": contacts}, folder / "esm2_tiny-contact-regression.pt")


if __name__ == "__main__":
    write(GOLDEN / "original")
