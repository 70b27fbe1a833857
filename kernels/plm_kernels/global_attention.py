"""Attention of one vector to all tokens of a sequence."""

import torch
from torch import Tensor


def global_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` with one query per sequence, and the weights.

    One query is so little work that keys and values are better left where they are than sorted by head: every head's
    query is multiplied with the keys of all heads, with zeros for the others', and of every head's mean of all values
    its own are kept.

    Args:
        q: ``[b, h, d]``.
        k, v: ``[b, t, h, d]`` and ``[b, t, h, e]``.
        keep: ``[b, t]``, False for tokens that get no weight; None keeps all.

    Returns: ``[b, h, e]``, ``[b, h, t]``. The softmax runs in float32 at least.
    """
    heads, precise = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    own = torch.eye(heads, dtype=q.dtype, device=q.device)
    queries = (scale * q)[..., None] * own[:, None]  # [b, h, d, h]
    logits = (k.flatten(2) @ queries.flatten(1, 2)).transpose(1, 2)  # [b, h, t]
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None], -torch.inf)
    weights = logits.softmax(-1, dtype=precise).to(q.dtype)
    means = (weights @ v.flatten(2)).unflatten(2, (heads, -1))  # [b, h, h, e]
    return means.diagonal(dim1=1, dim2=2).transpose(1, 2), weights
