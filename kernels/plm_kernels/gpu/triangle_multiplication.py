"""Around the products of triangle multiplication, in Triton: each kernel reads and writes pairs once.

Letters: r rows of pairs, l residues, c channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a program. 64 neighbours in the matrix of a channel are 128 bytes of half precision, which is a line of the cache.
TOKENS, CHANNELS = 64, 64
NUMBERS, WARPS = 8192, 8  # of a program that needs all channels of a pair: 32 numbers for each thread


@triton.jit(do_not_specialize=["length"])
def norm(
    x,
    weight,
    bias,
    out,
    length,
    row_stride,
    token_stride,
    channel_stride,
    EPS: tl.constexpr,
    PADDED: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """LayerNorm over the channels of x ``[r, l, c]`` by strides, to ``[r, l, c]``.

    All channels of a pair are in registers, so the variance is that of centred numbers. Where x is ``PADDED``, tokens
    lie side by side, and all that ``row_stride`` spans may be read: several at once, which masked by l would be one.
    """
    row, tokens = tl.program_id(1).to(tl.int64), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, BLOCK_C)
    at = row * row_stride + tokens.to(tl.int64)[:, None] * token_stride + channels.to(tl.int64) * channel_stride
    readable = tokens < (row_stride if PADDED else length)
    numbers = tl.load(x + at, mask=readable[:, None] & (channels < C), other=0.0).to(tl.float32)
    centred = tl.where(channels < C, numbers - tl.sum(numbers, 1)[:, None] / C, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)[:, None]
    scales = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)
    shifts = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)
    to = (row * length + tokens)[:, None] * C + channels
    inside = (tokens < length)[:, None] & (channels < C)
    tl.store(out + to, (normed * scales + shifts).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def sides(
    x,
    gate,
    out,
    length,
    width,
    channel_stride,
    row_stride,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``x * sigmoid(gate)`` of ``[r, l, c]`` to out ``[c, r, w]`` by strides, zeros from column l on."""
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (tokens < length)[:, None] & (channels < C)
    at = (row * length + tokens)[:, None] * C + channels
    numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gated = numbers * tl.sigmoid(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))
    to = row * row_stride + tokens[:, None] + channels.to(tl.int64) * channel_stride
    tl.store(out + to, gated.to(out.dtype.element_ty), mask=(tokens < width)[:, None] & (channels < C))


@triton.jit(do_not_specialize=["length"])
def add(z, x, gate, length, row_stride, token_stride, C: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``z += x * sigmoid(gate)``: z ``[r, l, c]`` by strides, x and gate ``[r, l, c]``."""
    row, tokens = tl.program_id(1).to(tl.int64), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, BLOCK_C)
    inside = (tokens < length)[:, None] & (channels < C)
    at = (row * length + tokens)[:, None] * C + channels
    numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gated = numbers * tl.sigmoid(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))
    here = z + row * row_stride + tokens.to(tl.int64)[:, None] * token_stride + channels
    total = tl.load(here, mask=inside, other=0.0).to(tl.float32) + gated
    tl.store(here, total.to(z.dtype.element_ty), mask=inside)


def pair_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, padded: bool = False) -> Tensor:
    """``[r, l, c]`` of any strides -> ``[r, l, c]`` in the weights' dtype; ``padded`` as of the kernel."""
    rows, length, c = x.shape
    out = weight.new_empty(x.shape)
    if x.is_contiguous() and not padded:  # one long row has fewer tiles that are not full
        rows, length, x = 1, rows * length, x.view(1, -1, c)
    if out.numel():
        tokens, options = tile(c)
        grid = (triton.cdiv(length, tokens), rows)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            norm[grid](x, weight, bias, out, length, *x.stride(), EPS=eps, PADDED=padded, C=c, **options)
    return out


def write_sides(out: Tensor, x: Tensor, gate: Tensor, length: int) -> None:
    """x and gate, logits ``[r * l, c]``, into out ``[c, r, w]``."""
    c, rows, width = out.shape
    if out.stride(2) != 1:
        raise ValueError(f"numbers of a row of sides must lie side by side; got strides {out.stride()}")
    if out.numel():
        grid = (triton.cdiv(width, TOKENS), rows, triton.cdiv(c, CHANNELS))
        strides, tiles = out.stride()[:2], {"TOKENS": TOKENS, "CHANNELS": CHANNELS}
        with torch.cuda.device_of(x):
            sides[grid](x.contiguous(), gate.contiguous(), out, length, width, *strides, C=c, **tiles)


def add_gated(z: Tensor, x: Tensor, gate: Tensor) -> None:
    """x and gate, logits ``[r * l, c]``, onto z ``[r, l, c]`` in place."""
    rows, length, c = z.shape
    if z.stride(2) != 1:
        raise ValueError(f"channels of pairs must lie side by side; got strides {z.stride()}")
    if z.is_contiguous():
        rows, length, z = 1, rows * length, z.view(1, -1, c)
    if z.numel():
        tokens, options = tile(c)
        grid = (triton.cdiv(length, tokens), rows)
        with torch.cuda.device_of(z):
            add[grid](z, x.contiguous(), gate.contiguous(), length, *z.stride()[:2], C=c, **options)


def tile(channels: int) -> tuple[int, dict[str, int]]:
    """Pairs of a program that takes all channels of each, and how it is launched."""
    block = triton.next_power_of_2(channels)
    tokens = max(1, min(TOKENS, NUMBERS // block))
    return tokens, {"TOKENS": tokens, "BLOCK_C": block, "num_warps": WARPS}
