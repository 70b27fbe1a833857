"""ProteinBERT's local track of one block as one kernel: two convolutions, a dense layer, two norms, all sums between.

A program computes ROWS tokens of one sequence in all their channels, so that the norms see whole rows and nothing
between input and output leaves the chip. In float32 the dense layer is a kernel of its own, because a product without
tensor cores keeps its factors in registers, which hold a part of them at a time only if they come from memory.

A convolution is a sum of matrix products, one per tap, of neighbours ``[rows, i]`` with a tap's filters ``[i, o]``.
What a token gets depends on its place in its sequence alone. How many tokens there are is not specialised: one
compilation serves all lengths.

Prefixes: ``i_`` an index, ``o_`` offsets, ``m_`` a mask, ``b_`` a tile in registers; b sequences, t tokens, c channels.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How much a program computes: tokens, channels of a product's inner sum at once; and with how many threads."""

    rows: int
    depth: int
    fused: bool  # whether the dense layer is in the same kernel
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype) -> Tiles:
    """By dtype alone, so that a sequence has the same bits in any batch.

    Every program reads all filters (590 kB of 16 bits at 128 channels), so tiles are as tall as the registers allow:
    two sums ``[rows, 128]`` of float32 are there at a time, beside which no loop spills (Triton 3.6, sm_90).
    """
    if dtype == torch.float32:
        return Tiles(rows=64, depth=32, fused=False, num_warps=8, num_stages=2)
    return Tiles(rows=128, depth=64, fused=True, num_warps=8, num_stages=3)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _norm(b_x, gain, shift, eps, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Layer norm of rows ``[ROWS, COLUMNS]``, whose columns beyond C are zero."""
    o_c = tl.arange(0, COLUMNS)
    m_c = o_c < C
    b_x -= (tl.sum(b_x, 1) / C)[:, None]
    b_x = tl.where(m_c[None, :], b_x, 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)[:, None]
    b_gain = tl.load(gain + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_shift = tl.load(shift + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_x * b_gain[None, :] + b_shift[None, :]


@triton.jit
def _convolution(
    x, keep, taps, bias, first, t,
    C: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``gelu(bias + sum over taps j of x[first + row + j * DILATION - left] @ taps[j])``: ``[ROWS, COLUMNS]``.

    IN and OUT are the strides of a tap's channels. With one tap this is a dense layer.
    """
    o_row, o_in, o_c = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    m_c = o_c < C
    parts: tl.constexpr = (C + DEPTH - 1) // DEPTH
    left: tl.constexpr = (TAPS - 1) * DILATION // 2
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(TAPS * parts):
        i_tap = i // parts
        o_i = (i % parts) * DEPTH + o_in
        o_t = first + o_row + i_tap * DILATION - left
        m_t = (o_t >= 0) & (o_t < t)
        if MASKED:
            m_t = m_t & (tl.load(keep + o_t, mask=m_t, other=0) != 0)
        m_i = o_i < C
        b_x = tl.load(x + o_t[:, None] * C + o_i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
        b_tap = tl.load(
            taps + i_tap * C * C + o_i[:, None] * IN + o_c[None, :] * OUT, mask=m_i[:, None] & m_c[None, :], other=0.0
        )
        b_sum = tl.dot(b_x, b_tap, b_sum, input_precision="ieee")
    return _gelu(b_sum + tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :])


@triton.jit(do_not_specialize=["t"])
def local_block_kernel(
    x, added, keep, narrow, narrow_bias, wide, wide_bias, gain1, shift1, dense, dense_bias, gain2, shift2, mid, out,
    t, eps1, eps2,
    C: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, DILATION: tl.constexpr, MASKED: tl.constexpr,
    FUSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``plm_kernels.reference.local_block`` for ROWS tokens. Grid: tiles of the first sequence, of the next, ..."""
    tiles = tl.cdiv(t, ROWS)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * ROWS
    x += i_b * t * C
    if MASKED:
        keep += i_b * t
    b_sum = _convolution(x, keep, narrow, narrow_bias, first, t, C, NARROW, 1, C, 1, MASKED, ROWS, COLUMNS, DEPTH)
    b_sum += _convolution(x, keep, wide, wide_bias, first, t, C, WIDE, DILATION, C, 1, MASKED, ROWS, COLUMNS, DEPTH)

    o_t, o_c = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_t, m_c = o_t < t, o_c < C
    o_x = o_t[:, None] * C + o_c[None, :]
    m_x = m_t[:, None] & m_c[None, :]
    m_kept = m_x
    if MASKED:
        m_kept = m_x & (tl.load(keep + o_t, mask=m_t, other=0) != 0)[:, None]
    b_sum += tl.load(x + o_x, mask=m_kept, other=0.0).to(tl.float32)
    b_sum += tl.load(added + i_b * C + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_mid = _norm(b_sum, gain1, shift1, eps1, C, COLUMNS)
    b_rounded = b_mid.to(mid.dtype.element_ty)
    tl.store(mid + i_b * t * C + o_x, b_rounded, mask=m_x)

    if FUSED:
        b_dense = tl.load(dense + o_c[None, :] * C + o_c[:, None], mask=m_c[:, None] & m_c[None, :], other=0.0)
        b_sum = tl.dot(b_rounded, b_dense, input_precision="ieee")
        b_sum = _gelu(b_sum + tl.load(dense_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :])
        b_out = _norm(b_mid + b_sum, gain2, shift2, eps2, C, COLUMNS)
        tl.store(out + i_b * t * C + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["t"])
def dense_block_kernel(
    mid, dense, bias, gain, shift, out, t, eps,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``norm(mid + gelu(dense mid))`` for the same ROWS tokens."""
    tiles = tl.cdiv(t, ROWS)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * ROWS
    mid += i_b * t * C
    b_sum = _convolution(mid, mid, dense, bias, first, t, C, 1, 1, 1, C, False, ROWS, COLUMNS, DEPTH)
    o_t, o_c = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    o_x = o_t[:, None] * C + o_c[None, :]
    m_x = (o_t < t)[:, None] & (o_c < C)[None, :]
    b_sum += tl.load(mid + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_out = _norm(b_sum, gain, shift, eps, C, COLUMNS)
    tl.store(out + i_b * t * C + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


def local_block(x: Tensor, added: Tensor, weights: Any, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``plm_kernels.local_block``, whose inputs were found to fit."""
    b, t, c = x.shape
    plan = tiles(x.dtype)
    x, parts = x.contiguous(), [part.contiguous() for part in weights.tensors]
    mid, out = torch.empty_like(x), torch.empty_like(x)
    columns = max(16, triton.next_power_of_2(c))
    grid = (b * triton.cdiv(t, plan.rows),)
    sizes = {"C": c, "ROWS": plan.rows, "COLUMNS": columns, "DEPTH": min(plan.depth, columns)}
    threads = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    with torch.cuda.device_of(x):  # Triton launches on the current device
        local_block_kernel[grid](
            x, added.contiguous(), x if keep is None else keep.contiguous().view(torch.uint8), *parts, mid, out,
            t, weights.eps1, weights.eps2, NARROW=len(weights.narrow), WIDE=len(weights.wide),
            DILATION=weights.dilation, MASKED=keep is not None, FUSED=plan.fused, **sizes, **threads,
        )  # fmt: skip
        if not plan.fused:
            dense_block_kernel[grid](mid, *parts[6:], out, t, weights.eps2, **sizes, **threads)
    return mid, out
