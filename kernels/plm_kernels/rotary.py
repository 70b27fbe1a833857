"""Rotary position embedding with the cosines and sines computed once per batch.

Letters: n packed tokens, h heads, d head size, r rotated pairs of a head.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from plm_kernels.backends import Backend, serve


@dataclass(frozen=True)
class Turns:
    """Cosines and sines of a batch's angles, ``[n, 1, r]`` each, for ``r`` rotated pairs per head."""

    cos: Tensor
    sin: Tensor
    _halves: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Self:
        """Angles ``positions[n] * frequencies[r]`` (radians), taken in float64 and rounded to ``dtype`` once.

        Float64 costs nothing here and makes a token's cosines independent of the batch it stands in: a vector
        unit and its scalar tail may differ in the last bit of a float32 cosine, not after this rounding.
        """
        at = "cpu" if positions.device.type == "mps" else positions.device  # MPS has no float64
        angles = positions.to(at, torch.float64)[:, None] * frequencies.to(at, torch.float64)
        cos, sin = (turn.to(positions.device, dtype)[:, None] for turn in (angles.cos(), angles.sin()))
        return cls(cos, sin)

    def halves(self, heads: int) -> tuple[Tensor, Tensor]:
        """``cos ‖ cos`` and ``-sin ‖ sin``, ``[n, 1, 2 r]`` each. Kept, because all layers of a network ask for them.

        Small heads in half precision on a CPU get them written out, ``[n, h, 2 r]``: there torch multiplies head by
        head, and 16 or 24 numbers at a time take 2 to 3 times as long as whole rows.
        """
        if heads not in self._halves:
            both = torch.cat((self.cos, self.cos), dim=-1), torch.cat((-self.sin, self.sin), dim=-1)
            if self.cos.device.type == "cpu" and self.cos.dtype.itemsize == 2 and both[0].shape[-1] < 32:
                both = both[0].repeat(1, heads, 1), both[1].repeat(1, heads, 1)
            self._halves[heads] = both
        return self._halves[heads]


def rotary_half(x: Tensor, turns: Turns) -> Tensor:
    """Rotate channel ``i`` with ``i + d/2``: ``[n, h, d] -> [n, h, d]`` (ESM-2, GPT-NeoX, LLaMA).

    In the dtype of the turns, which may be wider than that of ``x``; then the result is rounded once.
    """
    if x.dtype != turns.cos.dtype:
        return rotary_half(x.to(turns.cos.dtype), turns).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.halves(x.shape[1])
    # One new tensor of the size of x, and not three: fresh memory costs more than the arithmetic on it.
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


def rotary_pairs(x: Tensor, turns: Turns) -> Tensor:
    """Rotate channel ``2 i`` with ``2 i + 1`` in the first ``2 r`` channels of each head (GPT-J, ProGen2).

    In the dtype of the turns, as ``rotary_half``.

    In half precision without gradients on a CPU these pairs are complex numbers: a quarter of the time, and one
    rounding in place of three. Not in float32: a vector unit and its scalar tail round a complex product in two ways,
    and a token's bits would depend on its place in the batch.
    """
    if x.dtype != turns.cos.dtype:
        return rotary_pairs(x.to(turns.cos.dtype), turns).to(x.dtype)
    rotated = 2 * turns.cos.shape[-1]
    pairs = x[..., :rotated].unflatten(-1, (-1, 2))
    if x.dtype.itemsize > 2 or torch.is_grad_enabled() or x.device.type != "cpu":
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * turns.cos - odd * turns.sin, odd * turns.cos + even * turns.sin), dim=-1)
    else:
        angles = torch.complex(turns.cos.float(), turns.sin.float())
        turned = torch.view_as_real(torch.view_as_complex(pairs.float()) * angles).to(x.dtype)
    return torch.cat((turned.flatten(-2), x[..., rotated:]), dim=-1)


def rotate_half_(qk: Tensor, turns: Turns, scale: float, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys ``[n, h, d]`` of qk ``[n, 2, h, d]``, turned as by ``rotary_half``; queries times ``scale``.

    What comes back may lie where ``qk`` lies, so the caller gives ``qk`` away: a Triton kernel, which serves CUDA
    devices without gradients, turns it in place. It computes in float32 and rounds once.
    """

    def plain() -> tuple[Tensor, Tensor]:
        q, k = rotary_half(qk.flatten(1, 2), turns).chunk(2, dim=1)
        return q * scale, k

    def kernel() -> tuple[Tensor, Tensor]:
        from plm_kernels.gpu import rotary

        q, k = qk.unbind(1)
        return rotary.rotate_(q, k, turns.cos, turns.sin, scale=scale, interleaved=False)

    def fits() -> bool:
        return qk.dim() == 4 and qk.shape[1] == 2 and _fits(qk, turns, whole=True)

    return serve("rotary", qk, backend, kernel, plain, fits)


def rotate_pairs_(q: Tensor, k: Tensor, turns: Turns, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys ``[n, h, d]``, turned as by ``rotary_pairs``; where and how as ``rotate_half_``."""

    def plain() -> tuple[Tensor, Tensor]:
        q_turned, k_turned = rotary_pairs(torch.cat((q, k), dim=1), turns).chunk(2, dim=1)
        return q_turned, k_turned

    def kernel() -> tuple[Tensor, Tensor]:
        from plm_kernels.gpu import rotary

        return rotary.rotate_(q, k, turns.cos, turns.sin, scale=1.0, interleaved=True)

    def fits() -> bool:
        alike = q.shape == k.shape and q.dtype == k.dtype and q.device == k.device
        return q.dim() == 3 and alike and _fits(q, turns, whole=False)

    return serve("rotary", q, backend, kernel, plain, fits)


def _fits(x: Tensor, turns: Turns, *, whole: bool) -> bool:
    """Whether the kernel takes x ``[n, ..., d]`` and these turns: one for each token, on its device, and no wider than
    a head, or as wide if heads are turned ``whole``.
    """
    cos, sin, wide = turns.cos, turns.sin, 2 * turns.cos.shape[-1]
    if not x.is_floating_point() or cos.shape[:-1] != (len(x), 1) or sin.shape != cos.shape:
        return False
    return cos.device == sin.device == x.device and (wide == x.shape[-1] if whole else wide <= x.shape[-1])
