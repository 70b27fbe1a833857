"""Rotary positions, in place on the queries and keys of a fused projection: each number is read and written once.

A program turns some heads, of the queries or of the keys; heads are numbered token by token.

Letters: n packed tokens, h heads, d head size, r rotated pairs of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from plm_kernels.gpu.precision import precise

PAIRS_AT_ONCE = 1024  # of a program: eight in each of its threads, which are 16 bytes to load in half precision


def rotate_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, scale: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Turn q, k ``[n, h, d]`` by cos, sin ``[n, 1, r]``, and multiply the turned channels of ``q`` by ``scale``.

    Returns: ``q`` and ``k``, changed; of one whose channels do not lie side by side a copy.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    count, pairs = q.shape[:2].numel(), cos.shape[-1]
    columns = triton.next_power_of_2(pairs)
    heads_at_once = max(PAIRS_AT_ONCE // columns, 1)
    if count:
        with torch.cuda.device_of(q):
            rotary_kernel[(triton.cdiv(count, heads_at_once), 2)](
                q,
                k,
                cos.contiguous(),
                sin.contiguous(),
                count,
                *q.stride()[:2],
                *k.stride()[:2],
                SCALE=scale,
                INTERLEAVED=interleaved,
                HEADS=q.shape[1],
                PAIRS=pairs,
                ROWS=heads_at_once,
                COLUMNS=columns,
                num_warps=4,
            )
    return q, k


@triton.jit(do_not_specialize=["count"])  # one kernel for any count
def rotary_kernel(
    q,
    k,
    cos,
    sin,
    count,
    q_token,
    q_head,
    k_token,
    k_head,
    SCALE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (number // HEADS).to(tl.int64), number % HEADS
    there = (number < count)[:, None]
    pair = tl.arange(0, COLUMNS)
    angle = token[:, None] * PAIRS + pair
    real = there & (pair < PAIRS)[None, :]
    c = precise(tl.load(cos + angle, mask=real, other=0.0))
    s = precise(tl.load(sin + angle, mask=real, other=0.0))
    if tl.program_id(1) == 0:
        turn(q + (token * q_token + head * q_head)[:, None], c * SCALE, s * SCALE, there, INTERLEAVED, PAIRS)
    else:
        turn(k + (token * k_token + head * k_head)[:, None], c, s, there, INTERLEAVED, PAIRS)


@triton.jit
def turn(x, c, s, there, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """Channel ``i`` with ``i + r``; interleaved, ``2 i`` with ``2 i + 1``, which are parted in registers."""
    ROWS: tl.constexpr = c.shape[0]
    COLUMNS: tl.constexpr = c.shape[1]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * COLUMNS)
        both = there & (channel < 2 * PAIRS)[None, :]
        even, odd = tl.split(tl.reshape(precise(tl.load(x + channel, mask=both, other=0.0)), (ROWS, COLUMNS, 2)))
        turned = tl.join(even * c - odd * s, odd * c + even * s)
        tl.store(x + channel, tl.reshape(turned, (ROWS, 2 * COLUMNS)), mask=both)
    else:
        pair = tl.arange(0, COLUMNS)
        real = there & (pair < PAIRS)[None, :]
        first = precise(tl.load(x + pair, mask=real, other=0.0))
        second = precise(tl.load(x + PAIRS + pair, mask=real, other=0.0))
        tl.store(x + pair, first * c - second * s, mask=real)
        tl.store(x + PAIRS + pair, second * c + first * s, mask=real)
