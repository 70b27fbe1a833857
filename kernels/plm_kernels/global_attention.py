"""Attention of one vector to all tokens of a sequence."""

import torch
from torch import Tensor

from plm_kernels.backends import Backend, serve

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 512  # key or value size that the Triton kernel holds


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    keep: Tensor | None = None,
    weights: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T) v`` with one query per sequence, and the weights.

    The Triton kernel computes without gradients, reads keys and values once, and gives a sequence the same bits in any
    batch of any width; it fits heads of up to 512 in float32, bfloat16 or float16, else "auto" is PyTorch. There one
    query is so little work that keys and values are better left where they are than sorted by head: every head's
    query is multiplied with the keys of all heads, with zeros for the others', and of every head's mean of all values
    its own are kept.

    Args:
        q: ``[b, h, d]``.
        k, v: ``[b, t, h, d]`` and ``[b, t, h, e]``.
        keep: ``[b, t]``, False for tokens that get no weight; None keeps all. Every sequence keeps one at least.
        weights: whether they are wanted.

    Returns: ``[b, h, e]``, ``[b, h, t]`` or None. The softmax runs in float32 at least.
    Raises: ValueError if "triton" is asked for by name and the inputs do not fit it.
    """
    fits = q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES and k.numel() > 0
    fits = fits and max(k.shape[-1], v.shape[-1]) <= LARGEST

    def kernel() -> tuple[Tensor, Tensor | None]:
        from plm_kernels.gpu import global_attention as gpu

        if not fits:
            raise ValueError(
                f"the Triton kernel takes heads of up to {LARGEST}, all in one of {', '.join(map(str, _DTYPES))}; got "
                f"keys {[*k.shape]} in {k.dtype}, values {[*v.shape]} in {v.dtype}, queries in {q.dtype}"
            )
        return gpu.global_attention(q, k, v, scale, keep, weights)

    def plain() -> tuple[Tensor, Tensor | None]:
        mixed, shares = _products(q, k, v, scale, keep)
        return mixed, shares if weights else None

    return serve("global_attention", q, "torch" if backend == "auto" and not fits else backend, kernel, plain)


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    heads, precise = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    own = torch.eye(heads, dtype=q.dtype, device=q.device)
    queries = (scale * q)[..., None] * own[:, None]  # [b, h, d, h]
    logits = (k.flatten(2) @ queries.flatten(1, 2)).transpose(1, 2)  # [b, h, t]
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None], -torch.inf)
    weights = logits.softmax(-1, dtype=precise).to(q.dtype)
    means = (weights @ v.flatten(2)).unflatten(2, (heads, -1))  # [b, h, h, e]
    return means.diagonal(dim1=1, dim2=2).transpose(1, 2), weights
