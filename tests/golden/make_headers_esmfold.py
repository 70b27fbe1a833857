"""Writes the header of ESMFold from transformers' own class, built on ``meta``.

    python tests/golden/make_headers_esmfold.py

The hub's file was written by transformers 4, which kept frequencies per layer, counted positions, and a table of
positions that a rotary model never reads: the size of the file tells that it is there. Of the language model
everything is in half precision. The authors' file holds the rest under the same names, and five constants of old
versions of openfold and fairseq (see make_esmfold_original.py). ``{i}`` in a name stands for each layer of the language
model, ``{n}`` for each block of the trunk.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parents[2] / "weights" / "plm_weights" / "headers"
POSITIONS = 1026
CONSTANTS = {
    "I64": {"trunk.structure_module.group_idx": [21, 14]},
    "F32": {
        "positional_encoding._float_tensor": [1],
        "trunk.structure_module.default_frames": [21, 8, 4, 4],
        "trunk.structure_module.atom_mask": [21, 14],
        "trunk.structure_module.lit_positions": [21, 14, 3],
    },
}
# The settings of config.json that shapes depend on; all others are the class's defaults.
SETTINGS: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 40,
    "intermediate_size": 10240,
    "max_position_embeddings": POSITIONS,
    "position_embedding_type": "rotary",
    "pad_token_id": 1,
    "mask_token_id": 32,
    "is_folding_model": True,
    "esmfold_config": {"esm_type": "esm2_3B", "trunk": {"num_blocks": 48}},
}
HEADERS = {"esmfold": SETTINGS}


def shapes(settings: dict[str, Any]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Of the language model and of all else, layers and blocks folded into one."""
    with torch.device("meta"):
        model = transformers.EsmForProteinFolding(transformers.EsmConfig(**settings))
    found = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^(esm\.encoder\.layer)\.\d+\.", r"\1.{i}.", name)
        found[re.sub(r"^(trunk\.blocks)\.\d+\.", r"\1.{n}.", name)] = [*tensor.shape]
    frequencies = found.pop("esm.rotary_embeddings.inv_freq")
    found["esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = frequencies
    found["esm.embeddings.position_embeddings.weight"] = [POSITIONS, settings["hidden_size"]]
    stem = {name: shape for name, shape in found.items() if name.startswith("esm.")}
    return stem, {name: shape for name, shape in found.items() if name not in stem}


def document(name: str) -> str:
    """The text of the header file."""
    settings = HEADERS[name]
    stem, trunk = shapes(settings)
    tokens = {"af2_to_esm": trunk.pop("af2_to_esm")}
    forms = {
        "hub": {"F16": stem, "F32": trunk, "I64": {"esm.embeddings.position_ids": [1, POSITIONS]} | tokens},
        "original": {"F32": trunk | CONSTANTS["F32"], "I64": tokens | CONSTANTS["I64"]},
    }
    depths = {"layers": settings["num_hidden_layers"], "blocks": settings["esmfold_config"]["trunk"]["num_blocks"]}
    text = json.dumps(depths | forms, separators=(",", ":"))
    return re.sub(r'(?<=[{\]]),?(?=")', lambda comma: f"{comma[0]}\n", text) + "\n"  # one tensor per line


if __name__ == "__main__":
    for name in HEADERS:
        (FOLDER / f"{name}.json").write_text(document(name))
