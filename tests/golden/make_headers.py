"""Writes weights/plm_weights/headers/*.json from the reference libraries' own classes, built on ``meta``.

    python tests/golden/make_headers.py

Names and shapes are those of ``transformers.EsmForMaskedLM`` (hub form) and of fair-esm's ``ESM2`` and
``ProteinBertModel`` (original form), with the few differences between today's classes and the published files
written out below. ``{i}`` in a name stands for each layer.
"""

import json
import re
from argparse import Namespace
from pathlib import Path

import esm
import torch
import transformers
from esm.model.esm1 import ProteinBertModel
from esm.model.esm2 import ESM2

HEADERS = Path(__file__).parents[2] / "weights" / "plm_weights" / "headers"
POSITIONS = 1026

# name: layers, channels, heads, generation, dtype of the original file.
# Not confirmed by a published size: float16 of esm2-15b, and that the hub's esm1v have an untrained contact head.
MODELS = {
    "esm1b": (33, 1280, 20, "1b", "F32"),
    "esm1v": (33, 1280, 20, "1v", "F32"),
    "esm2-8m": (6, 320, 20, "2", "F32"),
    "esm2-35m": (12, 480, 20, "2", "F32"),
    "esm2-150m": (30, 640, 20, "2", "F32"),
    "esm2-650m": (33, 1280, 20, "2", "F32"),
    "esm2-3b": (36, 2560, 40, "2", "F16"),
    "esm2-15b": (48, 5120, 40, "2", "F16"),
}

Shapes = dict[str, list[int]]


def hub(layers: int, channels: int, heads: int, generation: str) -> dict[str, Shapes]:
    """Tensors of the hub's files, which transformers 4 wrote."""
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * channels,
        max_position_embeddings=POSITIONS,
        position_embedding_type="rotary" if generation == "2" else "absolute",
        emb_layer_norm_before=generation == "1b",
        token_dropout=True,
        pad_token_id=1,
        mask_token_id=32,
    )
    with torch.device("meta"):
        shapes = templates(transformers.EsmForMaskedLM(config))
    del shapes["lm_head.decoder.weight"]  # tied to the word embeddings
    if generation == "2":  # transformers 4 kept frequencies per layer, and unused positions; 5 has one table and none
        frequencies = shapes.pop("esm.rotary_embeddings.inv_freq")
        shapes["esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = frequencies
        shapes["esm.embeddings.position_embeddings.weight"] = [POSITIONS, channels]
    return {"F32": shapes, "I64": {"esm.embeddings.position_ids": [1, POSITIONS]}}


def original(layers: int, channels: int, heads: int, generation: str, dtype: str) -> dict[str, Shapes]:
    """Tensors of the ``.pt`` file, named as fairseq did, and of its contact regression, which has no prefix."""
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    with torch.device("meta"):
        if generation == "2":
            model: torch.nn.Module = ESM2(layers, channels, heads, alphabet)
        else:
            arguments = Namespace(
                arch="roberta_large",
                layers=layers,
                embed_dim=channels,
                ffn_embed_dim=4 * channels,
                attention_heads=heads,
                max_positions=POSITIONS - 2,
                emb_layer_norm_before=generation == "1b",
                token_dropout=True,
            )
            model = ProteinBertModel(arguments, alphabet)
    shapes = templates(model)
    contacts = {name: shapes.pop(name) for name in list(shapes) if name.startswith("contact_head.")}
    trunk = {
        ("encoder." if name.startswith("lm_head.") else "encoder.sentence_encoder.") + name: shape
        for name, shape in shapes.items()
    }
    if generation == "1v":
        return {dtype: trunk}
    return {dtype: trunk | contacts} if dtype == "F32" else {dtype: trunk, "F32": contacts}


def templates(model: torch.nn.Module) -> Shapes:
    """Shapes by name, the layers folded into one."""
    return {re.sub(r"(layers?)\.\d+\.", r"\1.{i}.", name): [*t.shape] for name, t in model.state_dict().items()}


def document(name: str) -> str:
    """The text of one header file."""
    layers, channels, heads, generation, dtype = MODELS[name]
    forms = {
        "layers": layers,
        "hub": hub(layers, channels, heads, generation),
        "original": original(layers, channels, heads, generation, dtype),
    }
    text = json.dumps(forms, separators=(",", ":"))
    return re.sub(r'(?<=[{\]]),?(?=")', lambda comma: f"{comma[0]}\n", text) + "\n"  # one tensor per line


if __name__ == "__main__":
    for name in MODELS:
        (HEADERS / f"{name}.json").write_text(document(name))
