"""Writes the headers of the T5 and BERT families from transformers' own classes, built on ``meta``.

    python tests/golden/make_headers_t5_bert.py

``{i}`` in a name stands for each layer of the encoder, ``{j}`` for each of the decoder. What differs between today's
classes and the published files is written out in `HEADERS` as the names that a file lacks.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parents[2] / "weights" / "plm_weights" / "headers"

ANKH = {
    "num_layers": 48,
    "num_decoder_layers": 24,
    "d_kv": 64,
    "relative_attention_num_buckets": 64,
    "feed_forward_proj": "gated-gelu",  # gated-silu has the same tensors
}
PROTT5 = {
    "num_layers": 24,
    "num_decoder_layers": 24,
    "d_model": 1024,
    "num_heads": 32,
    "d_kv": 128,
    "d_ff": 16384,
}
BERT = {
    "vocab_size": 30,
    "hidden_size": 1024,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 40000,
}
COPIES = r"(en|de)coder\.embed_tokens\.weight|lm_head\.weight"

# name: dtype, settings, names of the class that the published file lacks (a regular expression).
# Confirmed by the size or hash of a published file: ankh-*, igbert, igt5 (its index) and prott5-xl-half, but for
# whether that names its embedding once or twice. By a listing of names: prott5-xl-u50, prott5-xl-bfd, prostt5. Not
# confirmed: that prostt5-fp16 is like prostt5, and that protbert does not repeat its bias as decoder.bias.
HEADERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ankh-base": ("F32", ANKH | {"d_model": 768, "num_heads": 12, "d_ff": 3072, "vocab_size": 144}, ""),
    "ankh-large": ("F32", ANKH | {"d_model": 1536, "num_heads": 16, "d_ff": 3840, "vocab_size": 144}, ""),
    "ankh3-large": ("F32", ANKH | {"d_model": 1536, "num_heads": 16, "d_ff": 3840, "vocab_size": 256}, ""),
    "ankh3-xl": ("F32", ANKH | {"d_model": 2560, "num_heads": 32, "d_ff": 6720, "vocab_size": 256}, ""),
    "prott5-xl-u50": ("F32", PROTT5 | {"vocab_size": 128}, ""),
    "prott5-xl-bfd": ("F32", PROTT5 | {"vocab_size": 128}, r"lm_head\.weight"),
    "prott5-xl-half": ("F16", PROTT5 | {"vocab_size": 128}, r"decoder\..*|lm_head\.weight"),
    "prostt5": ("F32", PROTT5 | {"vocab_size": 150}, COPIES),
    "prostt5-fp16": ("F16", PROTT5 | {"vocab_size": 150}, COPIES),
    "igt5": ("F32", PROTT5 | {"vocab_size": 128}, COPIES),
    "protbert": ("F32", BERT, r"cls\.predictions\.decoder\.bias"),
    "igbert": ("F32", BERT, r"bert\.pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\..*"),
}


def shapes(settings: dict[str, Any]) -> dict[str, list[int]]:
    """Every tensor of the whole model, copies included. The bias over distances lies in the first layer of a stack."""
    with torch.device("meta"):
        model: torch.nn.Module
        if "d_model" in settings:
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))
        else:
            model = transformers.BertForPreTraining(transformers.BertConfig(**settings))
    found = {}
    for name, tensor in model.state_dict().items():
        if "relative_attention_bias" not in name:
            name = re.sub(r"(encoder\.(?:block|layer))\.\d+\.", r"\1.{i}.", name)
            name = re.sub(r"(decoder\.block)\.\d+\.", r"\1.{j}.", name)
        found[name] = [*tensor.shape]
    return found


def document(name: str) -> str:
    """The text of one header file."""
    dtype, settings, lacking = HEADERS[name]
    stored = {key: shape for key, shape in shapes(settings).items() if not re.fullmatch(lacking, key)}
    depths = {"layers": settings.get("num_layers") or settings["num_hidden_layers"]}
    if any("{j}" in key for key in stored):
        depths["decoder_layers"] = settings["num_decoder_layers"]
    text = json.dumps(depths | {"hub": {dtype: stored}}, separators=(",", ":"))
    return re.sub(r'(?<=[{\]]),?(?=")', lambda comma: f"{comma[0]}\n", text) + "\n"  # one tensor per line


if __name__ == "__main__":
    for name in HEADERS:
        (FOLDER / f"{name}.json").write_text(document(name))
