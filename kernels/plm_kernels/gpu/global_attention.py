"""Attention of one query per sequence and head, which reads keys and values once, where the projections left them.

One query is too little for tensor cores: it is a weighted mean of values, as fast as memory. A program takes one head
of one sequence and walks through its tokens, ROWS at a time. Each row of that tile keeps a softmax of its own over the
tokens that it sees (every ROWS-th), so that no tile waits for a sum over rows; the rows are merged at the end. What a
sequence gets depends on its own tokens alone: those behind it, dropped, add zeros and multiply by one.

Prefixes: ``i_`` an index, ``o_`` offsets, ``m_`` a mask, ``b_`` a tile in registers; b sequences, t tokens, h heads,
d key size, e value size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = (
    8192  # numbers of values in a tile of at most 64 tokens: 32 registers of each of 256 threads, of 128 that are used
)
LOWEST = -3e38  # in the place of -inf where nothing was seen, so that differences are numbers


@triton.jit(do_not_specialize=["heads", "t"])
def global_attention_kernel(
    q, k, v, keep, mixed, logits, heads, t,
    q_b, q_h, k_b, k_t, k_h, v_b, v_t, v_h, scale, lowest,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, LOGITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """``plm_kernels.reference.global_attention``, and the logits ``[b, h, t]``. Grid: ``b * h``."""
    i_b, i_h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    o_row, o_d, o_e = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, VALUES)
    m_d, m_e = o_d < D, o_e < E
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    logits += (i_b * heads + i_h) * t
    if MASKED:
        keep += i_b * t
    b_q = scale * tl.load(q + i_b * q_b + i_h * q_h + o_d, mask=m_d, other=0.0).to(tl.float32)

    b_top = tl.zeros((ROWS,), tl.float32) + lowest
    b_total = tl.zeros((ROWS,), tl.float32)
    b_sum = tl.zeros((ROWS, VALUES), tl.float32)
    for first in tl.range(0, t, ROWS, num_stages=3):
        o_t = first + o_row
        m_t = o_t < t
        if MASKED:
            m_t = m_t & (tl.load(keep + o_t, mask=m_t, other=0) != 0)
        m_k, m_v = m_t[:, None] & m_d[None, :], m_t[:, None] & m_e[None, :]
        b_k = tl.load(k + o_t[:, None] * k_t + o_d[None, :], mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_t[:, None] * v_t + o_e[None, :], mask=m_v, other=0.0).to(tl.float32)
        b_logits = tl.where(m_t, tl.sum(b_k * b_q[None, :], 1), float("-inf"))
        if LOGITS:
            tl.store(logits + o_t, b_logits, mask=o_t < t)
        b_higher = tl.maximum(b_top, b_logits)
        b_shrunk, b_weight = tl.exp(b_top - b_higher), tl.exp(b_logits - b_higher)
        b_total = b_total * b_shrunk + b_weight
        b_sum = b_sum * b_shrunk[:, None] + b_weight[:, None] * b_v
        b_top = b_higher

    b_share = tl.exp(b_top - tl.max(b_top, 0))
    b_mixed = tl.sum(b_sum * b_share[:, None], 0) / tl.sum(b_total * b_share, 0)
    tl.store(mixed + (i_b * heads + i_h) * E + o_e, b_mixed.to(mixed.dtype.element_ty), mask=m_e)


def global_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None, weights: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``plm_kernels.global_attention``, whose inputs were found to fit."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, t, h, d = k.shape
    mixed = q.new_empty(b, h, v.shape[-1])
    logits = q.new_empty((b, h, t) if weights else (1,), dtype=torch.float32)
    keys, values = (max(16, triton.next_power_of_2(size)) for size in (d, v.shape[-1]))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        global_attention_kernel[(b * h,)](
            q, k, v, q if keep is None else keep.contiguous().view(torch.uint8), mixed, logits, h, t,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], scale, LOWEST,
            D=d, E=v.shape[-1], MASKED=keep is not None, LOGITS=weights,
            ROWS=min(64, TILE // max(keys, values)), KEYS=keys, VALUES=values, num_warps=8,
        )  # fmt: skip
    return mixed, logits.softmax(-1).to(q.dtype) if weights else None
