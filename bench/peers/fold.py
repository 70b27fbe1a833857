"""One block of ESMFold's trunk at its real sizes, in transformers and in plm, with the same random weights.

Ours get them through the key map of the published files. The reference runs as it comes ("default"), and with its own
chunks of 64 rows ("tuned").
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock

from plm.esmfold.config import Config, StructureConfig
from plm.esmfold.trunk import Block
from plm.layers import weights_unchanged
from plm_weights import import_weights
from plm_weights.esmfold import trunk_rows

STRUCTURE = StructureConfig(384, 128, 8, 12, 16, 4, 8, 1, 128, 2)
STEM = {"channels": 2560, "layers": 36, "feed_forward": 10240}
PUBLISHED = Config(STEM, 48, 1024, 128, 32, 32, 32, 4, 128, STRUCTURE)
PAIRS_AT_ONCE = 4096


def flops(length: int) -> float:
    """Of one block as published; ours does a little less (the pairs' linear maps of sums of residues)."""
    return length**2 * (31 * 2 * 128**2 + 8192) + 1536 * length**3 + 27.3e6 * length + 4096 * length**2


def twins(dtype: torch.dtype) -> tuple[Any, Block]:
    torch.manual_seed(0)
    sizes = {"sequence_state_dim": 1024, "pairwise_state_dim": 128, "sequence_head_width": 32}
    theirs = EsmFoldTriangularSelfAttentionBlock(SimpleNamespace(**sizes, pairwise_head_width=32, dropout=0)).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.02 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    ours = Block(PUBLISHED).eval()
    stored = {f"trunk.blocks.0.{name}": weight for name, weight in theirs.state_dict().items()}
    wanted = {f"blocks.0.{name}": weight for name, weight in ours.state_dict().items()}
    state = import_weights(trunk_rows(PUBLISHED.channels // PUBLISHED.head_size), stored, wanted)
    ours.load_state_dict({name.removeprefix("blocks.0."): weight.clone() for name, weight in state.items()})
    return theirs.to(dtype), ours.to(dtype)


def inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(length, 1024, dtype=dtype), torch.randn(length, length, 128, dtype=dtype)


def run_theirs(block: Any, s: Tensor, z: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    mask = torch.ones(1, len(s), dtype=s.dtype)
    found_s, found_z = block(s[None], z[None], mask=mask, chunk_size=chunk)
    return found_s[0], found_z[0]


def run_ours(block: Block, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """On a copy of the pairs, as it overwrites them."""
    with weights_unchanged():
        return block(s, z.clone(), max(1, PAIRS_AT_ONCE // len(s)))  # type: ignore[no-any-return]
