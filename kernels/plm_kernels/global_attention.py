"""Attention of one vector to all tokens of a sequence."""

import torch
from torch import Tensor


def global_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` with one query per sequence, and the weights.

    Args:
        q: ``[b, h, d]``.
        k, v: ``[b, t, h, d]`` and ``[b, t, h, e]``.
        keep: ``[b, t]``, False for tokens that get no weight; None keeps all.

    Returns: ``[b, h, e]``, ``[b, h, t]``. The softmax runs in float32 at least.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bhd,bthd->bht", scale * q, k)
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None], -torch.inf)
    weights = logits.softmax(-1, dtype=precise).to(q.dtype)
    return torch.einsum("bht,bthe->bhe", weights, v), weights
