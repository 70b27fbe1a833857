"""LayerNorm and root-mean-square norm of rows, or of the sum of two, in one pass: rows stay in registers.

Letters: n packed tokens, c channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from plm_kernels.gpu.precision import precise

VALUES_AT_ONCE = 2048  # of a program, in as many rows as that makes: narrow ones would keep few of its threads busy


def norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    """``x + delta`` (``x`` itself if that is not wanted) and its norm, ``[n, c]`` each."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    delta = delta if delta is None or delta.stride(-1) == 1 else delta.contiguous()
    count, channels = x.shape
    normed = torch.empty(count, channels, dtype=x.dtype, device=x.device)
    total = torch.empty(count, channels, dtype=x.dtype, device=x.device) if keep_sum else None
    columns = triton.next_power_of_2(channels)
    rows_at_once = max(VALUES_AT_ONCE // columns, 1)  # by the width alone: a row's bits must not depend on the batch
    if count:
        with torch.cuda.device_of(x):
            norm_kernel[(triton.cdiv(count, rows_at_once),)](
                x,
                delta,
                total,
                normed,
                weight,
                bias,
                count,
                x.stride(0),
                0 if delta is None else delta.stride(0),
                EPS=eps,
                CHANNELS=channels,
                CENTRED=centred,
                ROWS=rows_at_once,
                COLUMNS=columns,
                num_warps=min(max(rows_at_once * columns // 512, 4), 16),  # 16 values to a thread
            )
    return (x if total is None else total), normed


@triton.jit(do_not_specialize=["count"])  # one kernel, and so the same bits, for any count
def norm_kernel(
    x,
    delta,
    total,
    normed,
    weight,
    bias,
    count,
    x_stride,
    delta_stride,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of ``delta``, ``total`` and ``bias`` each may be None. Statistics are taken of the sum as it is rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    real = (row < count)[:, None] & inside[None, :]
    at = row[:, None] * CHANNELS + column
    value = precise(tl.load(x + row[:, None] * x_stride + column, mask=real, other=0.0))
    factor = precise(tl.load(weight + column, mask=inside, other=0.0))[None, :]
    if delta is not None:
        value += precise(tl.load(delta + row[:, None] * delta_stride + column, mask=real, other=0.0))
        value = precise(value.to(x.dtype.element_ty))
        if total is not None:
            tl.store(total + at, value, mask=real)
    if CENTRED:
        value = tl.where(real, value - (tl.sum(value, 1) / CHANNELS)[:, None], 0.0)
    square = tl.sum(value * value, 1) / CHANNELS
    value = value * tl.rsqrt(square + EPS)[:, None] * factor
    if bias is not None:
        value += precise(tl.load(bias + column, mask=inside, other=0.0))[None, :]
    tl.store(normed + at, value, mask=real)
