"""What the forward and the backward kernels of packed attention share: places, tiles, biases, and how large tiles are.

Exponentials are powers of two: ``log2(e)`` is multiplied in, and the logarithms that are kept for the backward pass
have base 2. Letters: n packed tokens, b sequences, h heads, d head size, D reach of the bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys that a step takes together, and what Triton asks of the machine for it."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def place(offsets, sequences, SIZE: tl.constexpr):
    """This program's sequence, and where in it its tile of ``SIZE`` tokens starts.

    The tiles of sequence ``i`` are numbered from ``offsets[i] // SIZE + i``, which leaves room for all tiles before it.
    So ``n // SIZE + b`` programs do whatever the lengths, none of which the host has to know, and at most one program
    per sequence finds nothing to do.
    """
    tile = tl.program_id(0)
    low = tile * 0
    high = low + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = (tl.load(offsets + middle) // SIZE + middle) <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low, (tile - (tl.load(offsets + low) // SIZE).to(tl.int32) - low) * SIZE


@triton.jit
def extent(offsets, sequence):
    """Where a sequence starts (in 64 bits, as addresses are counted from there), and its length."""
    start = tl.load(offsets + sequence)
    return start.to(tl.int64), (tl.load(offsets + sequence + 1) - start).to(tl.int32)


@triton.jit
def plain_tiles(first, reach, tiles, NEAR: tl.constexpr, SIZE: tl.constexpr, OTHER: tl.constexpr):
    """Seen from the tile of ``SIZE`` at ``first``: how many tiles of ``OTHER`` before it, and from which one on all
    behind it, are at least ``reach`` away in every pair. Their bias is one number, and they are all past or all future.

    It is the same from queries to keys and from keys to queries. Where nothing is near (``NEAR`` is False: neither a
    bias nor causal) it is all of the ``tiles``.
    """
    before, behind = tiles, tiles
    if NEAR:
        before = tl.maximum(first - reach + 1, 0) // OTHER
        behind = tl.cdiv(first + SIZE - 1 + reach, OTHER)
    return before, behind


@triton.jit
def tile_of(x, start, first, length, step, SIZE: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr):
    """``[SIZE, PADDED]`` of one head of x, zero beyond the sequence and beyond the head size."""
    row, channel = tl.arange(0, SIZE), tl.arange(0, PADDED)
    inside = (first + row < length)[:, None] & (channel < HEAD)[None, :]
    return tl.load(x + (start + first) * step + row[:, None] * step + channel[None, :], mask=inside, other=0.0)


@triton.jit
def put_tile(x, tile, start, first, length, step, SIZE: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr):
    """The way back of ``tile_of``, rounded to the type of x."""
    row, channel = tl.arange(0, SIZE), tl.arange(0, PADDED)
    inside = (first + row < length)[:, None] & (channel < HEAD)[None, :]
    to = x + (start + first) * step + row[:, None] * step + channel[None, :]
    tl.store(to, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def logits_of(x, y, table, distance, reach, scale):
    """``scale * x y^T``, and the bias at distances ``key - query`` from one head's table ``[2 D + 1]``.

    The bias, divided by the scale, is what the products are added to. Added afterwards it would take as many registers
    as they do, or be brought into shared memory ahead of time, as much again as all keys and values there.
    """
    bias = tl.zeros(distance.shape, tl.float32)
    if table is not None:
        bias = tl.load(table + tl.minimum(tl.maximum(distance, -reach), reach) + reach) * (1.0 / scale)
    return scale * tl.dot(x, tl.trans(y), bias, input_precision="ieee")


def padded(head_size: int) -> int:
    """The power of two, of 16 at least, that a product of tiles needs."""
    return max(16, 1 << (head_size - 1).bit_length())


def reach_of(table: Tensor | None) -> int:
    """``D`` of a table ``[h, 2 D + 1]``; 0 without one, so that what is near is what is neither past nor future."""
    return 0 if table is None else (table.shape[1] - 1) // 2


def unit(*tensors: Tensor) -> int:
    """What all strides are multiples of, 8 or 1: said to the compiler, it lets a load take 8 numbers at once."""
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:2]) else 1


def launch(kernel: Any, programs: tuple[int, int], size: Tiles, *arguments: Any, **constants: int) -> None:
    """Run a kernel on the device where its tensors are, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[programs](*arguments, **constants, num_warps=size.warps, num_stages=size.stages)
