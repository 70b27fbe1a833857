"""The tiny published ESM checkpoints that tests read, their configurations, and how tensors are saved and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from plm_weights import KeyMap, TensorSource, open_tensors, read_fair_esm
from plm_weights.esm import key_map

GOLDEN = Path(__file__).parent / "golden" / "esm"
NAMES = ("esm1b_tiny", "esm2_tiny")
PLAIN: dict[str, Any] = {"token_dropout": True, "norm_eps": 1e-5, "lm_head": True, "contact_head": True}
PLAIN |= {"pooler": False, "sequence_labels": None, "token_labels": None}
ESM1B = {"layers": 3, "channels": 24, "heads": 3, "feed_forward": 52, "learned_positions": 1026, "norm_before": True}
ESM2 = {"layers": 4, "channels": 32, "heads": 4, "feed_forward": 128, "learned_positions": None, "norm_before": False}
CONFIGS: dict[str, dict[str, Any]] = {"esm1b_tiny": ESM1B | PLAIN, "esm2_tiny": ESM2 | PLAIN}
# What transformers stores and never reads.
DROPPED = {
    "esm1b_tiny": {"esm.embeddings.position_ids"},
    "esm2_tiny": {"esm.embeddings.position_ids", "esm.embeddings.position_embeddings.weight"},
}
FREQUENCY = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
FIXTURE_IS_CONSTANT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def wanted(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the ESM module, written out independently of the key maps."""
    c, f = config["channels"], config["feed_forward"]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (33, c)}

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    if config["learned_positions"] is None:
        shapes["frequencies"] = (c // config["heads"] // 2,)
    else:
        shapes["positions.weight"] = (config["learned_positions"], c)
    if config["norm_before"]:
        affine("norm_before", c)
    for layer in range(config["layers"]):
        block = f"blocks.{layer}"
        affine(f"{block}.attention_norm", c)
        affine(f"{block}.attention.qkv", 3 * c, c)
        affine(f"{block}.attention.out", c, c)
        affine(f"{block}.feed_forward_norm", c)
        affine(f"{block}.up", f, c)
        affine(f"{block}.down", c, f)
    affine("norm", c)
    if config["lm_head"]:
        affine("lm_head.dense", c, c)
        affine("lm_head.norm", c)
        shapes["lm_head.bias"] = (33,)
    if config["contact_head"]:
        affine("contact_head", 1, config["layers"] * config["heads"])
    if config["pooler"]:
        affine("pooler", c, c)
    if config["sequence_labels"]:
        affine("sequence_classifier.dense", c, c)
        affine("sequence_classifier.out", config["sequence_labels"], c)
    if config["token_labels"]:
        affine("token_classifier", config["token_labels"], c)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def rows_of(name: str, names: Mapping[str, Tensor]) -> KeyMap:
    return key_map(names, rotary=CONFIGS[name]["learned_positions"] is None, contact_head=True)


def hub(name: str) -> TensorSource:
    return open_tensors(GOLDEN / name / "model.safetensors")


def fair(name: str) -> TensorSource:
    return read_fair_esm(GOLDEN / name / f"{name}.pt")


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """The same names, and tensors that are the `same`."""
    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in theirs)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal in dtype, shape and every bit (NaN too, and dtypes that cannot be compared)."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(bits(ours), bits(theirs))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def save(content: object, path: Path, legacy: bool, protocol: int = 2) -> Path:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path
