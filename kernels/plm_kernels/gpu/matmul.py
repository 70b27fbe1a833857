"""Products of rows and a stored weight whose tiles never depend on how many rows there are.

A row of the result is summed over its inputs in one fixed order: ``depth`` of them at a time, from the first to the
last, by one program. So it has the same bits whatever rows are beside it. There is no split along the inputs and no
choice by measuring.

p_ pointer, i_ index, o_ offsets; M rows, N outputs, K inputs; BM, BN, BK a tile's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FUSED = ("none", "gelu", "gelu_tanh", "relu", "silu")  # activations that are applied before the result is rounded


class Tiles(NamedTuple):
    """What a program computes: so many rows and outputs, ``depth`` inputs at a time."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int  # of loads under way; all of them lie in shared memory, of which a program has 227 KiB on Hopper


def tiles(outputs: int, dtype: torch.dtype) -> Tiles:
    """One choice for each width and dtype.

    Half precision fills Hopper's 64-row instructions, two groups of four warps beside each other; the widest tile that
    divides the outputs reads inputs least often. float32 runs on ordinary cores, where registers bound the tile.
    """
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 3)
    if outputs >= 2048 and outputs % 256 == 0:
        return Tiles(128, 256, 64, 8, 3)
    return Tiles(128, 128, 64, 8, 4) if outputs >= 512 else Tiles(128, 64, 64, 4, 4)


@triton.jit
def _sigmoid(x):
    """``sigmoid(x)``, without an exponential that overflows; below -80 nothing of a product with it is left."""
    return tl.sigmoid(tl.maximum(x, -80.0))


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 1 + tanh(u) is 2 sigmoid(2 u)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "silu":
        x = x * _sigmoid(x)
    return x


@triton.jit(do_not_specialize=["M"])  # one program for all numbers of rows
def product_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    M,
    N,
    stride_x,
    stride_weight,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile ``[BM, BN]`` of ``activation(x @ weight.T + bias)``, contiguous ``[M, N]``."""
    # Programs that run at one time share rows and weights in the L2 cache: GROUP tiles of rows, then the next outputs.
    i_tile, n_rows, n_outputs = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_group = i_tile // (GROUP * n_outputs)
    n_group = tl.minimum(n_rows - i_group * GROUP, GROUP)
    i_rest = i_tile % (GROUP * n_outputs)
    o_m = (i_group * GROUP + i_rest % n_group) * BM + tl.arange(0, BM)
    o_n = (i_rest // n_group) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    p_rows = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]  # [BM, BK]
    p_columns = p_weight + o_n.to(tl.int64)[None, :] * stride_weight + o_k[:, None]  # [BK, BN]
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        m_x, m_weight = m_m[:, None], m_n[None, :]
        if K % BK != 0:  # which is known when the kernel is compiled
            m_k = o_k < K - first
            m_x, m_weight = m_x & m_k[None, :], m_weight & m_k[:, None]
        x = tl.load(p_rows + first, mask=m_x, other=0.0)
        weight = tl.load(p_columns + first, mask=m_weight, other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    y = _activated(sums, ACTIVATION).to(p_y.dtype.element_ty)
    tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], y, mask=m_m[:, None] & m_n[None, :])


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See ``plm_kernels.matmul.product``; ``activation`` is one of ``FUSED``."""
    x, weight = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, weight))
    (rows, inputs), outputs = x.shape, len(weight)
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    tile = tiles(outputs, x.dtype)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        product_kernel[grid](
            x,
            weight,
            weight if bias is None else bias,
            y,
            rows,
            outputs,
            x.stride(0),
            weight.stride(0),
            K=inputs,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            BM=tile.rows,
            BN=tile.outputs,
            BK=tile.depth,
            GROUP=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y
