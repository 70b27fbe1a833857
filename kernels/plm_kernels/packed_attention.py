"""One attention call on packed sequences, with a backend per kind of machine.

Letters: n packed tokens, b sequences, t tokens, h heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels import reference
from plm_kernels.reference import RelativeBias


@dataclass(frozen=True)
class How:
    """The arguments of ``attention`` beside its tensors."""

    offsets: Tensor
    scale: float
    causal: bool
    bias: RelativeBias | None
    max_length: int


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: RelativeBias | None = None,
    max_length: int,
    backend: str = "auto",
) -> Tensor:
    """Attention of each packed sequence to itself: q, k, v ``[n, h, d]`` -> ``[n, h, d]``.

    Args:
        offsets: ``[b + 1]`` int32, where each sequence starts, and ``n`` at the end.
        scale: factor on ``q k^T``. No default: T5 wants 1, others ``d ** -0.5``.
        causal: a token sees itself and the tokens before it only.
        bias: added to the scaled logits.
        max_length: length of the longest sequence, known on the host so that no device is asked for it.
        backend: "auto", or one of ``attention_backends()``.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3:
        raise ValueError(f"q, k and v must share one shape [n, h, d]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if backend == "auto":
        backend = choose_backend(q, bias)
    if backend not in _BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose 'auto' or one of {attention_backends()}")
    return _BACKENDS[backend](q, k, v, How(offsets, scale, causal, bias, max_length))


def attention_backends() -> tuple[str, ...]:
    """Names that ``attention(backend=...)`` takes."""
    return tuple(_BACKENDS)


def choose_backend(q: Tensor, bias: RelativeBias | None) -> str:
    """What ``backend="auto"`` means for these queries: segments on a CPU, varlen where it can, else dense."""
    if q.device.type == "cpu":
        return "segments"
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = bias is None and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "varlen" if q.device.type == "cuda" and fits and varlen_available() else "dense"


@cache
def varlen_available() -> bool:
    """Whether this torch carries FlashAttention for packed sequences, with the arguments that are used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= signature(varlen_attn).parameters.keys()


def runs(lengths: list[int]) -> list[tuple[int, int]]:
    """(count, length) of each run of neighbours of equal length, which one call can take together."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def _segments(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Each run of equal lengths through torch's fused attention, on strided views: nothing is padded or copied."""
    shapes = runs(how.offsets.diff().tolist())
    # ``split`` rather than slices: its backward is one concatenation, theirs is a full-size addition per slice.
    sizes = [count * length for count, length in shapes]
    mixed = []
    for shape, *pieces in zip(shapes, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        queries, keys, values = (piece.unflatten(0, shape).transpose(1, 2) for piece in pieces)  # [count, h, length, d]
        mask = None if how.bias is None else how.bias.dense(shape[1])[None].to(q.dtype)
        if mask is not None and how.causal:
            mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -torch.inf)
        alone = how.causal and mask is None
        out = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=alone, scale=how.scale)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    if len(mixed) < 2:
        return mixed[0] if mixed else v
    return torch.cat(mixed)


def _varlen(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """FlashAttention-2 inside torch, CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    if how.bias is not None:
        raise ValueError("the varlen backend takes no bias; use backend='auto', 'dense' or 'segments'")
    window = (-1, 0) if how.causal else (-1, -1)
    bounds = (how.offsets, how.offsets, how.max_length, how.max_length)
    mixed = varlen_attn(q, k, v, *bounds, scale=how.scale, window_size=window)
    assert isinstance(mixed, Tensor)
    return mixed


def _dense(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Pad to ``[b, h, t, d]``, attend under a mask, and take the tokens back out: works everywhere."""
    slots = torch.arange(how.max_length, device=q.device)
    real = slots < how.offsets.diff()[:, None]  # [b, t]
    # Rows of padding see every real key, so that no row is masked whole (that would be 0 / 0); they are dropped below.
    mask = real[:, None, None, :]
    if how.causal:
        mask = mask & (slots[None, :] <= slots[:, None])
    source = (how.offsets[:-1, None] + slots).clamp(max=len(q) - 1)  # [b, t] -> n; padding repeats some token
    queries, keys, values = (x[source].transpose(1, 2) for x in (q, k, v))
    if how.bias is not None:
        mask = torch.where(mask, how.bias.dense(how.max_length).to(q.dtype), -torch.inf)
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, scale=how.scale)
    out = mixed.transpose(1, 2)[real]
    if len(out) != len(q):
        raise ValueError(f"offsets up to {how.max_length} per sequence cover {len(out)} tokens; q has {len(q)}")
    return out


def _reference(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    return reference.attention(q, k, v, how.offsets, scale=how.scale, causal=how.causal, bias=how.bias)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, How], Tensor]] = {
    "segments": _segments,
    "varlen": _varlen,
    "dense": _dense,
    "reference": _reference,
}
