"""Gradients of packed attention: one kernel goes by queries, one by keys, and both make the weights once more.

With p the weights and g the gradient of the output (Dao et al. 2022, appendix B)::

    dv = p^T g       ds = p * (g v^T - delta)      delta = sum over channels of g * out
    dq = scale * ds k       dk = scale * ds^T q       dtable[D + clamp(key - query)] += ds

Nothing is added by atomics: each sum has one order, so gradients are repeatable to the last bit, and those of q, k and
v are the same alone and in any batch. Letters: n packed tokens, h heads, d head size, D reach of the bias.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

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


def capability(x: Tensor) -> int:
    """The generation of x's GPU. Without one kernels are interpreted, or compiled for an H200: 9."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def tiles(head_size: int, dtype: torch.dtype, bias: bool, generation: int) -> Tiles:
    """Sizes by head size, type and GPU; square, so that diagonals go on from tile to tile.

    Compiled for an H200, up to 40 bytes per thread spill (``by_keys`` of large heads, and of T5's decoder), and 200 in
    float32 at 256 channels. Other GPUs than Hopper (9) and its data-centre successor (10) keep both factors of a
    product in registers: with a bias, tiles of 64 would spill up to 4,800 bytes of a thread on an A100, those of 32
    spill none. No size was chosen by timing.
    """
    width = padded(head_size)
    if dtype != torch.float32 and width <= 64 and bias and generation not in (9, 10):
        return Tiles(32, 32, 4, 2)
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if width <= 64 else Tiles(16, 16, 8, 1)
    return Tiles(64, 64, 4, 2) if width <= 64 else Tiles(64, 64, 8, 2) if width <= 128 else Tiles(32, 32, 8, 2)


@triton.jit
def diagonals(ds, SIDE: tl.constexpr):
    """Sums along the diagonals of a square: those at ``key - query`` of 0 to ``SIDE - 1``, and those ``SIDE`` lower.

    Row ``i`` is turned by ``i`` places, which brings each diagonal and the one ``SIDE`` below it into one column.
    """
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    turned = tl.gather(ds, (row + column) % SIDE, 1)
    upper = row + column < SIDE
    return tl.sum(tl.where(upper, turned, 0.0), 0), tl.sum(tl.where(upper, 0.0, turned), 0)


@triton.jit(do_not_specialize=["sequences", "tokens", "reach", "around"])
def by_queries(
    q,
    k,
    v,
    out,
    gradient,
    sums,
    deltas,
    table,
    dq,
    near,
    sides,
    offsets,
    key_offsets,
    sequences,
    tokens,
    reach,
    around,
    scale,
    q_step,
    q_head,
    k_step,
    k_head,
    v_step,
    v_head,
    out_step,
    out_head,
    gradient_step,
    gradient_head,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIDE: tl.constexpr,
):
    """``dq``, laid out as ``out``; ``deltas`` [h, n]; and of the table, where it is wanted, for each program and head:
    ``near`` [2 * around + 1, 2, SIDE], the diagonals of tiles near the query's own, and ``sides`` [2], the far ones."""
    head = tl.program_id(1).to(tl.int64)
    sequence, first = place(offsets, sequences, SIDE)
    start, length = extent(offsets, sequence)
    if first >= length:
        return
    key_start, keys = extent(key_offsets, sequence)
    k += head * k_head * UNIT
    v += head * v_head * UNIT
    behind, ahead = 0.0, 0.0
    if table is not None:
        table += head * (2 * reach + 1)
        behind, ahead = tl.load(table) * LOG2E, tl.load(table + 2 * reach) * LOG2E

    row = first + tl.arange(0, SIDE)
    column = tl.arange(0, SIDE)
    q_tile = tile_of(q + head * q_head * UNIT, start, first, length, q_step * UNIT, SIDE, HEAD, PADDED)
    g_tile = tile_of(
        gradient + head * gradient_head * UNIT, start, first, length, gradient_step * UNIT, SIDE, HEAD, PADDED
    )
    out_tile = tile_of(out + head * out_head * UNIT, start, first, length, out_step * UNIT, SIDE, HEAD, PADDED)
    delta = tl.sum(out_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    at_row = head * tokens + start + row
    tl.store(deltas + at_row, delta, mask=row < length)
    level = tl.load(sums + at_row, mask=row < length, other=float("inf"))  # rows beyond the sequence weigh nothing
    moved = tl.zeros([SIDE, PADDED], tl.float32)
    far_behind = tl.zeros([SIDE], tl.float32)
    far_ahead = tl.zeros([SIDE], tl.float32)

    last = tl.cdiv(keys, SIDE)
    if CAUSAL:
        last = tl.cdiv(tl.minimum(keys, first + SIDE), SIDE)
    before, beyond = plain_tiles(first, reach, last, CAUSAL or table is not None, SIDE, SIDE)
    after = tl.maximum(last - beyond, 0)
    for i in range(before + after):
        at = tl.where(i < before, i, i - before + beyond) * SIDE
        k_tile = tile_of(k, key_start, at, keys, k_step * UNIT, SIDE, HEAD, PADDED)
        v_tile = tile_of(v, key_start, at, keys, v_step * UNIT, SIDE, HEAD, PADDED)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        shift = tl.where(i < before, behind, ahead)
        weights = tl.exp2(products * (scale * LOG2E) + (shift - level)[:, None])
        weights = tl.where((at + column < keys)[None, :], weights, 0.0)
        ds = weights * (tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
        moved = tl.dot(ds.to(k_tile.dtype), k_tile, moved, input_precision="ieee")
        if near is not None:
            summed = tl.sum(ds, 1)
            far_behind += tl.where(i < before, summed, 0.0)
            far_ahead += tl.where(i < before, 0.0, summed)
    for i in range(before, last - after):
        at = i * SIDE
        k_tile = tile_of(k, key_start, at, keys, k_step * UNIT, SIDE, HEAD, PADDED)
        v_tile = tile_of(v, key_start, at, keys, v_step * UNIT, SIDE, HEAD, PADDED)
        distance = (at + column)[None, :] - row[:, None]
        weights = tl.exp2(logits_of(q_tile, k_tile, table, distance, reach, scale) * LOG2E - level[:, None])
        seen = (at + column < keys)[None, :]
        if CAUSAL:
            seen = seen & (distance <= 0)
        weights = tl.where(seen, weights, 0.0)
        ds = weights * (tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
        moved = tl.dot(ds.to(k_tile.dtype), k_tile, moved, input_precision="ieee")
        if near is not None:
            upper, lower = diagonals(ds, SIDE)
            slot = (tl.program_id(0) * tl.num_programs(1) + head) * (2 * around + 1) + i - first // SIDE + around
            tl.store(near + slot * 2 * SIDE + column, upper)
            tl.store(near + slot * 2 * SIDE + SIDE + column, lower)

    put_tile(dq + head * out_head * UNIT, moved * scale, start, first, length, out_step * UNIT, SIDE, HEAD, PADDED)
    if near is not None:
        side = sides + (tl.program_id(0) * tl.num_programs(1) + head) * 2
        tl.store(side, tl.sum(far_behind, 0))
        tl.store(side + 1, tl.sum(far_ahead, 0))


@triton.jit(do_not_specialize=["sequences", "tokens", "reach"])
def by_keys(
    q,
    k,
    v,
    gradient,
    sums,
    deltas,
    table,
    dk,
    dv,
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
    gradient_step,
    gradient_head,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIDE: tl.constexpr,
):
    """``dk`` and ``dv``, laid out as ``out``. Here keys are rows and queries columns: all is transposed."""
    head = tl.program_id(1).to(tl.int64)
    sequence, first = place(key_offsets, sequences, SIDE)
    key_start, keys = extent(key_offsets, sequence)
    if first >= keys:
        return
    start, length = extent(offsets, sequence)
    q += head * q_head * UNIT
    gradient += head * gradient_head * UNIT
    behind, ahead = 0.0, 0.0
    if table is not None:
        table += head * (2 * reach + 1)
        behind, ahead = tl.load(table) * LOG2E, tl.load(table + 2 * reach) * LOG2E

    row = first + tl.arange(0, SIDE)
    column = tl.arange(0, SIDE)
    k_tile = tile_of(k + head * k_head * UNIT, key_start, first, keys, k_step * UNIT, SIDE, HEAD, PADDED)
    v_tile = tile_of(v + head * v_head * UNIT, key_start, first, keys, v_step * UNIT, SIDE, HEAD, PADDED)
    moved_k = tl.zeros([SIDE, PADDED], tl.float32)
    moved_v = tl.zeros([SIDE, PADDED], tl.float32)

    last = tl.cdiv(length, SIDE)
    before, beyond = plain_tiles(first, reach, last, CAUSAL or table is not None, SIDE, SIDE)
    after = tl.maximum(last - beyond, 0)
    near = before
    if CAUSAL:  # queries before the key do not see it
        before, near = before * 0, first // SIDE
    for i in range(before + after):
        at = tl.where(i < before, i, i - before + beyond) * SIDE
        q_tile = tile_of(q, start, at, length, q_step * UNIT, SIDE, HEAD, PADDED)
        g_tile = tile_of(gradient, start, at, length, gradient_step * UNIT, SIDE, HEAD, PADDED)
        at_query = head * tokens + start + at + column
        level = tl.load(sums + at_query, mask=at + column < length, other=float("inf"))
        delta = tl.load(deltas + at_query, mask=at + column < length, other=0.0)
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        shift = tl.where(i < before, ahead, behind)
        weights = tl.exp2(products * (scale * LOG2E) + (shift - level)[None, :])
        moved_v = tl.dot(weights.to(g_tile.dtype), g_tile, moved_v, input_precision="ieee")
        ds = weights * (tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee") - delta[None, :])
        moved_k = tl.dot(ds.to(q_tile.dtype), q_tile, moved_k, input_precision="ieee")
    for i in range(near, last - after):
        at = i * SIDE
        q_tile = tile_of(q, start, at, length, q_step * UNIT, SIDE, HEAD, PADDED)
        g_tile = tile_of(gradient, start, at, length, gradient_step * UNIT, SIDE, HEAD, PADDED)
        at_query = head * tokens + start + at + column
        level = tl.load(sums + at_query, mask=at + column < length, other=float("inf"))
        delta = tl.load(deltas + at_query, mask=at + column < length, other=0.0)
        distance = row[:, None] - (at + column)[None, :]
        weights = tl.exp2(logits_of(k_tile, q_tile, table, distance, reach, scale) * LOG2E - level[None, :])
        if CAUSAL:
            weights = tl.where(distance <= 0, weights, 0.0)
        moved_v = tl.dot(weights.to(g_tile.dtype), g_tile, moved_v, input_precision="ieee")
        ds = weights * (tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee") - delta[None, :])
        moved_k = tl.dot(ds.to(q_tile.dtype), q_tile, moved_k, input_precision="ieee")

    put_tile(dv + head * out_head * UNIT, moved_v, key_start, first, keys, out_step * UNIT, SIDE, HEAD, PADDED)
    put_tile(dk + head * out_head * UNIT, moved_k * scale, key_start, first, keys, out_step * UNIT, SIDE, HEAD, PADDED)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    offsets: Tensor,
    key_offsets: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    sums: Tensor,
    gradient: Tensor,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, and ``of_table`` the table's, from that of the output ``[n, h, d]``.

    ``out`` and ``sums`` are what the forward pass gave. For the table's gradient each tile of ``s`` queries keeps at
    most ``4 D + 6 s + 2`` numbers per head, which are added up in the end.
    """
    n, heads, head_size = q.shape
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    deltas = torch.empty_like(sums)
    size = tiles(head_size, q.dtype, table is not None, capability(q))
    step, reach = unit(q, k, v, out, gradient), reach_of(table)
    sequences = len(offsets) - 1
    programs, key_programs = ((len(x) // size.rows + sequences, heads) for x in (q, k))
    around = -(-max(reach - 1, 0) // size.rows)
    near = sides = None
    if of_table:
        near = sums.new_zeros(*programs, 2 * around + 1, 2, size.rows)
        sides = sums.new_zeros(*programs, 2)
    strides = [stride // step for x in (q, k, v, out, gradient) for stride in x.stride()[:2]]
    constants: dict[str, Any] = {
        "CAUSAL": causal,
        "UNIT": step,
        "HEAD": head_size,
        "PADDED": padded(head_size),
        "SIDE": size.rows,
    }
    if n > 0:
        launch(
            *(by_queries, programs, size),
            *(q, k, v, out, gradient, sums, deltas, table, dq, near, sides, offsets, key_offsets),
            *(sequences, n, reach, around, scale, *strides),
            **constants,
        )
    if len(k) > 0:
        launch(
            *(by_keys, key_programs, size),
            *(q, k, v, gradient, sums, deltas, table, dk, dv, offsets, key_offsets),
            *(sequences, n, reach, scale, *strides),
            **constants,
        )
    dtable = None if near is None or sides is None else by_distance(near.sum(0), sides.sum(0), reach)
    return dq, dk, dv, dtable


def by_distance(near: Tensor, sides: Tensor, reach: int) -> Tensor:
    """The table's gradient ``[h, 2 D + 1]``, from diagonals of tiles ``[h, 2 r + 1, 2, s]`` and far sums ``[h, 2]``.

    Tile ``i`` lies ``i - r`` tiles from the query's: its upper diagonals are at distances from ``(i - r) * s`` on, its
    lower ones at ``s`` less, where the upper ones of the tile before it are.
    """
    upper, lower = near.unbind(2)
    band = (F.pad(upper, (0, 0, 1, 0)) + F.pad(lower, (0, 0, 0, 1))).flatten(1)
    if reach == 0:
        return (band.sum(1) + sides.sum(1))[:, None]
    zero = band.shape[1] // 2
    behind = sides[:, 0] + band[:, : zero - reach + 1].sum(1)
    ahead = sides[:, 1] + band[:, zero + reach :].sum(1)
    return torch.cat((behind[:, None], band[:, zero - reach + 1 : zero + reach], ahead[:, None]), 1)
