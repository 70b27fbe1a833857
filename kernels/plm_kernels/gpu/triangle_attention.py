"""Triangle attention in Triton: a softmax that is corrected as keys come in, so that no logits are ever written.

Letters: r rows of pairs, l residues, h heads, d head size.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
# Queries, keys, warps, stages. In half precision 128 queries share what is read of keys and values; proteins with up to
# 64 residues would leave half of them idle. The compiler needs 97 registers for both, so that 16 warps share an SM.
# Float32 has no tensor cores ("ieee"): in four warps it needs all 255 registers, in eight 80.
WIDE, NARROW, FLOAT32 = (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 8, 2)


@triton.jit(do_not_specialize=["length"])
def attend(
    q,
    k,
    v,
    bias,
    gate,
    out,
    length,
    width,
    row_stride,
    token_stride,
    head_stride,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries of one row and head.

    q, k, v ``[r, l, h, d]`` by strides; bias ``[h, l, w]``, where w is a multiple of ``BLOCK_K`` and columns from l on
    are -inf; gate and out ``[r, l, h, d]``. Programs next to each other share a row's keys and values, then a head's
    bias: all pairs' keys are larger than the cache, but 2 l^2 bytes of bias are not.
    """
    tile, row, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    queries, keys, channels = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    asked = queries < length
    inside = asked[:, None] & (channels < D)
    start_of_row = row * row_stride + head * head_stride
    q_tile = tl.load(q + start_of_row + queries.to(tl.int64)[:, None] * token_stride + channels, mask=inside, other=0.0)
    bias_rows = bias + (head.to(tl.int64) * length + queries)[:, None] * width + keys
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_K):
        known = (first + keys < length)[:, None] & (channels < D)
        at = start_of_row + (first + keys).to(tl.int64)[:, None] * token_stride + channels
        k_tile = tl.load(k + at, mask=known, other=0.0)
        bias_tile = tl.load(bias_rows + first, mask=asked[:, None], other=0.0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * SCALE + bias_tile
        higher = tl.maximum(highest, tl.max(logits, 1))  # finite: key 0 is in the first tile, for every query
        weights = tl.exp2(logits * LOG2_E - (higher * LOG2_E)[:, None])
        fewer = tl.exp2((highest - higher) * LOG2_E)
        total = total * fewer + tl.sum(weights, 1)
        v_tile = tl.load(v + at, mask=known, other=0.0)
        mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * fewer[:, None], input_precision="ieee")
        highest = higher
    mixed /= total[:, None]
    at = ((row * length + queries)[:, None] * HEADS + head) * D + channels
    if GATED:
        mixed *= tl.sigmoid(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside)


def triangle_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """As ``plm_kernels.triangle_attention``; gate ``[r * l, h * d]`` are logits."""
    rows, length, heads, d = q.shape
    if not q.stride() == k.stride() == v.stride() or q.stride(3) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    queries, keys, warps, stages = FLOAT32 if q.dtype == torch.float32 else WIDE if length > 64 else NARROW
    beyond = -length % keys
    bias = F.pad(bias, (0, beyond), value=-torch.inf) if beyond else bias.contiguous()
    out = q.new_empty(rows * length, heads * d)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(length, queries), rows, heads)
    logits = out if gate is None else gate.contiguous()
    with torch.cuda.device_of(q):  # Triton launches on the current device
        attend[grid](
            q,
            k,
            v,
            bias,
            logits,
            out,
            length,
            bias.shape[2],
            *q.stride()[:3],
            SCALE=scale,
            HEADS=heads,
            D=d,
            GATED=gate is not None,
            BLOCK_Q=queries,
            BLOCK_K=keys,
            BLOCK_D=max(16, triton.next_power_of_2(d)),
            num_warps=warps,
            num_stages=stages,
        )
    return out
