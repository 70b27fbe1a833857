"""Rotary position embedding with the cosines and sines computed once per batch.

Letters: n packed tokens, h heads, d head size.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turns:
    """Cosines and sines of a batch's angles, ``[n, 1, r]`` each, for ``r`` rotated pairs per head."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Self:
        """Angles ``positions[n] * frequencies[r]`` (radians), taken in float64 and rounded to ``dtype`` once.

        Float64 costs nothing here and makes a token's cosines independent of the batch it stands in: a vector
        unit and its scalar tail may differ in the last bit of a float32 cosine, not after this rounding.
        """
        at = "cpu" if positions.device.type == "mps" else positions.device  # MPS has no float64
        angles = positions.to(at, torch.float64)[:, None] * frequencies.to(at, torch.float64)
        return cls(*(turn.to(positions.device, dtype)[:, None] for turn in (angles.cos(), angles.sin())))


def rotary_half(x: Tensor, turns: Turns) -> Tensor:
    """Rotate channel ``i`` with ``i + d/2``: ``[n, h, d] -> [n, h, d]`` (ESM-2, GPT-NeoX, LLaMA)."""
    first, second = x.chunk(2, dim=-1)
    cos = torch.cat((turns.cos, turns.cos), dim=-1)
    sin = torch.cat((-turns.sin, turns.sin), dim=-1)
    # One new tensor of the size of x, and not three: fresh memory costs more than the arithmetic on it.
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


def rotary_pairs(x: Tensor, turns: Turns) -> Tensor:
    """Rotate channel ``2 i`` with ``2 i + 1`` in the first ``2 r`` channels of each head (GPT-J, ProGen2)."""
    rotated = 2 * turns.cos.shape[-1]
    pairs = x[..., :rotated].unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * turns.cos - odd * turns.sin, odd * turns.cos + even * turns.sin), dim=-1)
    return torch.cat((turned.flatten(-2), x[..., rotated:]), dim=-1)
