"""One attention call on packed sequences, with a backend per kind of machine.

Letters: n packed tokens, b sequences, t tokens, h heads, d head size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from itertools import groupby
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels import backends, reference
from plm_kernels.invariance import batch_invariant, is_batch_invariant
from plm_kernels.reference import RelativeBias

T = TypeVar("T")
LARGEST_HEAD = 256
Rescue = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class How:
    """The arguments of ``attention`` beside its tensors."""

    offsets: Tensor
    key_offsets: Tensor
    scale: float
    causal: bool
    bias: RelativeBias | None
    max_length: int
    max_key_length: int


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
    key_offsets: Tensor | None = None,
    max_key_length: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each packed sequence to itself, or to its partner: q ``[n, h, d]``, k, v ``[m, h, d]`` -> like q.

    Args:
        offsets: ``[b + 1]`` int32, where each sequence starts, and ``n`` at the end.
        scale: factor on ``q k^T``. No default: T5 wants 1, others ``d ** -0.5``.
        causal: a token sees itself and the tokens before it only.
        bias: added to the scaled logits, in float32 at least (the dense backend rounds it to q's dtype).
        max_length: length of the longest sequence, known on the host so that no device is asked for it.
        key_offsets, max_key_length: the same of another packed batch, to whose sequences those of q attend one by one
            (an encoder's, say). Neither causal nor with a bias: positions of two batches have no common zero.
        backend: "auto" (see ``attention_choice``), or one of ``attention_backends()``.

    Raises:
        ValueError: shapes that do not fit each other, an unknown backend, or one that cannot take these tensors.
    """
    shapes = f"got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
    if k.shape != v.shape or q.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q must be [n, h, d], k and v [m, h, d]; {shapes}")
    if key_offsets is None:
        key_offsets, max_key_length = offsets, max_length
        if q.shape != k.shape:
            raise ValueError(f"without key_offsets q, k and v must share one shape [n, h, d]; {shapes}")
    elif causal or bias is not None or max_key_length is None:
        raise ValueError("with key_offsets give max_key_length as well, and neither causal nor a bias")
    if len(offsets) != len(key_offsets):
        raise ValueError(f"{len(offsets) - 1} sequences of q and {len(key_offsets) - 1} of k and v; one each is needed")
    assert max_key_length is not None
    how = How(offsets, key_offsets, scale, causal, bias, max_length, max_key_length)
    if backend == "auto" and q.is_cuda and is_batch_invariant():
        backend = invariant_backend(q, bias)
    elif backend == "auto":
        backend = choose_backend(q, bias)
        if backend == "varlen":
            return _varlen_or_other(q, k, v, how)
        if backend == "triton" and backends.preferred() == "auto":
            return _triton_or_dense(q, k, v, how)
    if backend not in _BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose 'auto' or one of {attention_backends()}")
    return _BACKENDS[backend](q, k, v, how)


def attention_backends() -> tuple[str, ...]:
    """Names that ``attention(backend=...)`` takes."""
    return tuple(_BACKENDS)


def choose_backend(q: Tensor, bias: RelativeBias | None) -> str:
    """What ``backend="auto"`` means for these queries: ``attention_choice``."""
    return attention_choice(q.device.type, q.dtype, q.shape[-1], bias=bias is not None)


def attention_choice(device: str, dtype: torch.dtype, head_size: int, *, bias: bool) -> str:
    """What ``backend="auto"`` means in this process for heads of this size and type, with a bias and without.

    On a CPU segments. On CUDA without a bias varlen, torch's own FlashAttention; with one, or where torch has none, the
    Triton kernel; else, and in float64, dense. What failed before is left out, and ``backends.prefer`` is obeyed.
    """
    fits = dtype in TRITON_TYPES and head_size <= LARGEST_HEAD
    preferred = backends.preferred()
    if preferred == "triton" and fits and not torch.is_grad_enabled():
        return "triton"
    if device == "cpu":
        return "segments"
    if device != "cuda":
        return "dense"
    failed = backends.broken()
    halves = fits and dtype != torch.float32 and head_size % 8 == 0
    if halves and not bias and varlen_available() and "varlen" not in failed:
        return "varlen"
    broken = "attention" in failed or (torch.is_grad_enabled() and "attention backward" in failed)
    return "triton" if fits and preferred != "torch" and backends.triton_available() and not broken else "dense"


def invariant_backend(q: Tensor, bias: RelativeBias | None) -> str:
    """What it means on CUDA in a ``batch_invariant`` scope: varlen if it takes being told not to split keys, else
    triton.

    Raises: ValueError for float64, or where no backend keeps the promise.
    """
    fits = choose_backend(q, bias) == "varlen" and "num_splits" in varlen_parameters() and takes_one_split(q.device)
    if not fits and (q.dtype not in TRITON_TYPES or q.shape[-1] > LARGEST_HEAD):
        raise ValueError(
            f"there is no batch-invariant attention in {q.dtype}{'' if bias is None else ' with a bias'} here: torch's "
            "varlen attention with num_splits (float16, bfloat16), or the Triton kernel (and float32, heads up to "
            f"{LARGEST_HEAD}), would be needed"
        )
    return "varlen" if fits else "triton"


def varlen_available() -> bool:
    """Whether this torch carries FlashAttention for packed sequences, with the arguments that are used here."""
    return {"scale", "window_size"} <= varlen_parameters()


@cache
def takes_one_split(device: torch.device) -> bool:
    """Whether varlen attention runs with ``num_splits=1`` on this device: an argument may be there and be refused.

    One call on a token tells. It is made once, and before anything is recorded, as what is recorded has run before.
    """
    x, offsets = torch.zeros(1, 1, 16, dtype=torch.float16, device=device), torch.tensor([0, 1], dtype=torch.int32)
    here = offsets.to(device)
    try:
        with torch.no_grad(), batch_invariant():
            _varlen(x, x, x, How(here, here, 1.0, False, None, 1, 1))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # libraries fail with errors of many classes
        return False
    return True


@cache
def varlen_parameters() -> frozenset[str]:
    """What torch's varlen attention takes; nothing where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen_attn).parameters)


def runs(lengths: Iterable[T]) -> list[tuple[int, T]]:
    """(count, length) of each run of neighbours of equal length, which one call can take together."""
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def _segments(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Each run of equal lengths through torch's fused attention, on strided views: nothing is padded.

    A relative bias is never written out: see `_hankel`.
    """
    shapes = runs(zip(how.offsets.diff().tolist(), how.key_offsets.diff().tolist(), strict=True))
    # ``split`` rather than slices: its backward is one concatenation, theirs is a full-size addition per slice.
    queries = q.split([count * length for count, (length, _) in shapes])
    keys, values = (x.split([count * length for count, (_, length) in shapes]) for x in (k, v))
    mixed = []
    for (count, (length, key_length)), *pieces in zip(shapes, queries, keys, values, strict=True):
        if length == 0:
            continue
        rows, columns, mix = (
            piece.unflatten(0, (count, each)).transpose(1, 2)  # [count, h, length, d]
            for piece, each in zip(pieces, (length, key_length, key_length), strict=True)
        )
        if how.bias is None:
            out = F.scaled_dot_product_attention(rows, columns, mix, is_causal=how.causal, scale=how.scale)
        else:
            # Bias and softmax stay in float32 (or wider): unscaled logits have no bits to spare.
            band = how.bias.band(length, how.causal, torch.promote_types(q.dtype, torch.float32))
            mask = _hankel(band, length)
            out = F.scaled_dot_product_attention(rows.flip(2), columns, mix, mask, scale=how.scale).flip(2)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    if len(mixed) < 2:
        return mixed[0] if mixed else q.clone()
    return torch.cat(mixed)


def _hankel(band: Tensor, length: int) -> Tensor:
    """A relative bias as ``[1, h, t, t]`` without a copy, for queries in reverse order.

    ``band`` ``[h, 2 t - 1]`` runs over ``key - query``. With the last query first, row ``i`` is the band from ``i`` on:
    a Hankel matrix, which memory of the band's size holds with a stride of one in both directions.
    """
    return band.as_strided((1, len(band), length, length), (0, 2 * length - 1, 1, 1))


def _varlen(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """FlashAttention-2 inside torch, CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    if how.bias is not None:
        raise ValueError("the varlen backend takes no bias; use backend='auto', 'dense' or 'segments'")
    window = (-1, 0) if how.causal else (-1, -1)
    bounds = (how.offsets, how.key_offsets, how.max_length, how.max_key_length)
    # How many parts keys are split into would depend on the longest sequence of the batch.
    split = {"num_splits": 1} if is_batch_invariant() else {}
    attend: Callable[..., object] = varlen_attn  # older signatures know nothing of splits
    mixed = attend(q, k, v, *bounds, scale=how.scale, window_size=window, **split)
    assert isinstance(mixed, Tensor)
    return mixed


def _triton(q: Tensor, k: Tensor, v: Tensor, how: How, rescue: Rescue | None = None) -> Tensor:
    """The kernel with the table inside: nothing of ``t x t`` numbers, batch-invariant, gradients of all inputs."""
    table = None if how.bias is None else how.bias.table
    if q.dtype not in TRITON_TYPES or q.shape[-1] > LARGEST_HEAD or not (q.is_cuda or backends.interpreted()):
        raise ValueError(
            f"the triton backend takes float32, bfloat16 and float16 on CUDA, in heads of up to {LARGEST_HEAD}; got "
            f"{q.dtype} on {q.device} in heads of {q.shape[-1]}. Use backend='auto' or 'dense'"
        )
    from plm_kernels.gpu import attention as gpu

    bounds = {"offsets": how.offsets, "key_offsets": how.key_offsets}
    return gpu.attention(q, k, v, table=table, scale=how.scale, causal=how.causal, **bounds, rescue=rescue)


def _varlen_or_other(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """torch's varlen attention; where it fails (GPUs before Ampere, builds without FlashAttention), a warning, and what
    "auto" means without it from then on."""

    def other() -> Tensor:
        triton = choose_backend(q, how.bias) == "triton"
        return (_triton_or_dense if triton else _dense)(q, k, v, how)

    _check_alike(q, k, v, how)
    told = "torch's varlen attention does not work here, another is used"
    return backends.attempt("varlen", partial(_varlen, q, k, v, how), other, told)


def _triton_or_dense(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """The Triton kernel; where it or its backward pass fails, a warning, and the dense backend from then on."""

    def rescue(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return _dense(q, k, v, replace(how, bias=None if table is None else RelativeBias(table)))

    _check_alike(q, k, v, how)
    return backends.attempt("attention", partial(_triton, q, k, v, how, rescue), partial(_dense, q, k, v, how))


def _check_alike(q: Tensor, k: Tensor, v: Tensor, how: How) -> None:
    """Wrong arguments are no fault of a kernel, and must not look like one."""
    tensors = (q, k, v, how.offsets, how.key_offsets, *([how.bias.table] if how.bias else []))
    if len(places := {x.device for x in tensors}) > 1 or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k and v must share a type, and a device with the offsets and the bias; "
            f"got {q.dtype}, {k.dtype}, {v.dtype} on {', '.join(map(str, places))}"
        )


def _dense(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Pad to ``[b, h, t, d]``, attend under a mask, and take the tokens back out: works everywhere."""
    queries, real = _padded(q, how.offsets, how.max_length)
    keys, seen = _padded(k, how.key_offsets, how.max_key_length)
    values, _ = _padded(v, how.key_offsets, how.max_key_length)
    if (found := int(seen.sum())) != len(k):
        raise ValueError(f"offsets up to {how.max_key_length} per sequence cover {found} keys; k has {len(k)}")
    # Rows of padding see every real key, so that no row is masked whole (that would be 0 / 0); they are dropped below.
    mask = seen[:, None, None, :]
    if how.causal:
        mask = mask & torch.ones(how.max_length, how.max_length, dtype=torch.bool, device=q.device).tril()
    if how.bias is not None:
        mask = torch.where(mask, how.bias.dense(how.max_length).to(q.dtype), -torch.inf)
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, scale=how.scale)
    out = mixed.transpose(1, 2)[real]
    if len(out) != len(q):
        raise ValueError(f"offsets up to {how.max_length} per sequence cover {len(out)} tokens; q has {len(q)}")
    return out


def _padded(x: Tensor, offsets: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """``[n, h, d]`` as ``[b, h, t, d]``, where padding repeats some token, and which of ``[b, t]`` are real."""
    slots = torch.arange(max_length, device=x.device)
    source = (offsets[:-1, None] + slots).clamp(max=len(x) - 1)
    return x[source].transpose(1, 2), slots < offsets.diff()[:, None]


def _reference(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    return reference.attention(
        q, k, v, how.offsets, scale=how.scale, causal=how.causal, bias=how.bias, key_offsets=how.key_offsets
    )


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, How], Tensor]] = {
    "segments": _segments,
    "varlen": _varlen,
    "triton": _triton,
    "dense": _dense,
    "reference": _reference,
}
