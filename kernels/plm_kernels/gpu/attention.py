"""Attention of packed sequences with a relative bias inside, in one pass over the keys: FlashAttention in Triton.

A program takes some queries of one head and goes through the keys of their sequence in tiles, with the softmax's
running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). Nothing of ``t x t`` numbers is ever in memory.
The bias is looked up only in tiles that come nearer than its table reaches; elsewhere it is one number per side.

Batch-invariant: what is added, and in which order, follows from the place in the sequence alone, so a sequence has the
same bits alone and in any batch. Letters: n packed tokens, m packed keys, b sequences, h heads, d head size.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from plm_kernels.backends import attempt
from plm_kernels.gpu.attention_backward import gradients
from plm_kernels.gpu.attention_tiles import (
    LOG2E,
    Tiles,
    extent,
    launch,
    logits_of,
    padded,
    place,
    plain_tiles,
    put_tile,
    reach_of,
    tile_of,
    unit,
)

Rescue = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of q, k, v and a table by other means, with its own gradients."""


def tiles(head_size: int, dtype: torch.dtype, bias: bool) -> Tiles:
    """Sizes by what is computed and never by the batch, for which nothing spilled when compiled for an H200.

    Up to 64 channels two programs fit on an SM by their registers (not where causal without a bias), so that one can
    compute while the other waits; with a bias, whose addresses take registers, that needs fewer columns. In 32 bits
    products run on the ordinary units, without tiles that are fetched ahead. No size was chosen by timing.
    """
    width = padded(head_size)
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if width <= 64 else Tiles(16, 16, 8, 1)
    if width > 128:
        return Tiles(64, 32, 8, 2)
    return Tiles(128, 32 if bias else 64, 8, 3 if width <= 64 else 2)


@triton.jit
def absorb(products, factor, shift, v_tile, mixed, top, total):
    """Take a tile of keys into the running softmax. Their logits, times log2(e), are ``products * factor + shift``."""
    peak = tl.maximum(top, tl.max(products, 1) * factor + shift)
    level = tl.where(peak == -float("inf"), 0.0, peak)  # nothing seen yet: no difference of two infinities
    weights = tl.exp2(products * factor + (shift - level)[:, None])
    fade = tl.exp2(top - level)
    mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * fade[:, None], input_precision="ieee")
    return mixed, peak, total * fade + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["sequences", "tokens", "reach"])
def attend(
    q,
    k,
    v,
    out,
    sums,
    table,
    offsets,
    key_offsets,
    sequences,
    tokens,
    reach,
    scale,
    q_step,
    q_head,
    k_step,
    k_head,
    v_step,
    v_head,
    out_step,
    out_head,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out`` [n, h, d] and, if it is there, ``sums`` [h, n]: log2 of the sum over the keys of exp(logit)."""
    head = tl.program_id(1).to(tl.int64)
    sequence, first = place(offsets, sequences, ROWS)
    start, length = extent(offsets, sequence)
    if first >= length:
        return
    key_start, keys = extent(key_offsets, sequence)
    q += head * q_head * UNIT
    k += head * k_head * UNIT
    v += head * v_head * UNIT
    behind, ahead = 0.0, 0.0
    if table is not None:
        table += head * (2 * reach + 1)
        behind, ahead = tl.load(table) * LOG2E, tl.load(table + 2 * reach) * LOG2E

    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    q_tile = tile_of(q, start, first, length, q_step * UNIT, ROWS, HEAD, PADDED)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = total - float("inf")

    # Plain tiles, all of whose keys count and have one bias: ``before`` at the start, and ``after`` from ``beyond`` on.
    last, whole = tl.cdiv(keys, COLUMNS), keys // COLUMNS
    if CAUSAL:
        last, whole = tl.cdiv(tl.minimum(keys, first + ROWS), COLUMNS), (first + 1) // COLUMNS
    before, beyond = plain_tiles(first, reach, whole, CAUSAL or table is not None, ROWS, COLUMNS)
    after = tl.maximum(whole - beyond, 0)
    for i in range(before + after):
        at = tl.where(i < before, i, i - before + beyond) * COLUMNS
        k_tile = tile_of(k, key_start, at, keys, k_step * UNIT, COLUMNS, HEAD, PADDED)
        v_tile = tile_of(v, key_start, at, keys, v_step * UNIT, COLUMNS, HEAD, PADDED)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        shift = tl.where(i < before, behind, ahead)
        mixed, top, total = absorb(products, scale * LOG2E, shift, v_tile, mixed, top, total)
    # The others: those in between, and a last one that keys do not fill.
    for i in range(before, last - after):
        at = tl.where(i < beyond, i, i + after) * COLUMNS
        k_tile = tile_of(k, key_start, at, keys, k_step * UNIT, COLUMNS, HEAD, PADDED)
        v_tile = tile_of(v, key_start, at, keys, v_step * UNIT, COLUMNS, HEAD, PADDED)
        distance = (at + column)[None, :] - row[:, None]
        logits = logits_of(q_tile, k_tile, table, distance, reach, scale)
        seen = (at + column < keys)[None, :]
        if CAUSAL:
            seen = seen & (distance <= 0)
        logits = tl.where(seen, logits, -float("inf"))
        mixed, top, total = absorb(logits, LOG2E, 0.0, v_tile, mixed, top, total)

    total = tl.where(total == 0.0, 1.0, total)  # no key at all: the sum over nothing is zero
    put_tile(
        out + head * out_head * UNIT, mixed / total[:, None], start, first, length, out_step * UNIT, ROWS, HEAD, PADDED
    )
    if sums is not None:
        tl.store(sums + head * tokens + start + row, top + tl.log2(total), mask=row < length)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    offsets: Tensor,
    key_offsets: Tensor,
    scale: float,
    causal: bool,
    keep_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention ``[n, h, d]``, and where they are kept ``log2(sum(exp(logits)))`` ``[h, n]``."""
    n, heads, head_size = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = torch.empty(heads, n, device=q.device, dtype=torch.float32) if keep_sums else None
    size, step = tiles(head_size, q.dtype, table is not None), unit(q, k, v, out)
    programs = (n // size.rows + len(offsets) - 1, heads)
    strides = (stride // step for x in (q, k, v, out) for stride in x.stride()[:2])
    if n > 0:
        launch(
            *(attend, programs, size),
            *(q, k, v, out, sums, table, offsets, key_offsets, len(offsets) - 1, n, reach_of(table), scale, *strides),
            CAUSAL=causal,
            UNIT=step,
            HEAD=head_size,
            PADDED=padded(head_size),
            ROWS=size.rows,
            COLUMNS=size.columns,
        )
    return out, sums


class Attention(torch.autograd.Function):
    """``forward`` with gradients of q, k, v and the table. Everything is summed in one order: they are repeatable."""

    @staticmethod
    def forward(ctx, q, k, v, table, offsets, key_offsets, scale, causal, rescue):
        out, sums = forward(q, k, v, table, offsets, key_offsets, scale, causal, keep_sums=True)
        ctx.save_for_backward(q, k, v, table, out, sums)
        ctx.bounds = offsets, key_offsets  # which may come from inference mode: such tensors cannot be saved there
        ctx.scale, ctx.causal, ctx.rescue = scale, causal, rescue
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, table, out, sums = ctx.saved_tensors

        def kernels():
            wanted, (offsets, key_offsets) = table is not None and ctx.needs_input_grad[3], ctx.bounds
            return gradients(q, k, v, table, offsets, key_offsets, ctx.scale, ctx.causal, out, sums, gradient, wanted)

        def plain():
            with torch.enable_grad():
                leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, table)]
                mixed = ctx.rescue(*leaves)
            found = torch.autograd.grad(mixed, [x for x in leaves if x is not None], gradient)
            return (*found, None)[:4]

        found = kernels() if ctx.rescue is None else attempt("attention backward", kernels, plain)
        return *found, None, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    causal: bool,
    table: Tensor | None,
    key_offsets: Tensor,
    rescue: Rescue | None = None,
) -> Tensor:
    """As ``plm_kernels.attention``, with a bias's table ``[h, 2 D + 1]``: q ``[n, h, d]`` -> ``[n, h, d]``.

    Strided q, k, v are read as they lie. Sequences without tokens, and without keys (what they mix is zero), are fine.
    ``rescue`` takes the backward pass over, with a warning, if its kernels do not work here.
    """
    if scale <= 0:  # the kernels divide by the scale, and take the maximum of what is not scaled yet
        q, scale = (-q, -scale) if scale < 0 else (0 * q, 1.0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    table = None if table is None else table.float().contiguous()
    inputs = (q, k, v, table)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return Attention.apply(*inputs, offsets, key_offsets, scale, causal, rescue)  # type: ignore[no-any-return]
    return forward(*inputs, offsets, key_offsets, scale, causal, keep_sums=False)[0]
