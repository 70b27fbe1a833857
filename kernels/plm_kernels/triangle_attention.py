"""Attention along rows of pairs of residues, with a bias that all rows share (Jumper et al. 2021, algorithms 13, 14).

Letters: r rows of pairs, l residues, h heads, d head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels.backends import Backend, serve
from plm_kernels.linear import Activation

OpenGate = Callable[[Activation], Tensor]
"""A linear layer on its input, once it is told the activation: a kernel takes "none" and opens the gate itself, PyTorch
takes "sigmoid", which is part of the product on a CPU."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that kernels take; float64 is for truth, and PyTorch's


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    gate: OpenGate | None = None,
    *,
    scale: float,
    backend: Backend = "auto",
) -> Tensor:
    """``sigmoid(gate) * sum over k of softmax(scale * q[i, j] . k[i, k] + bias[j, k]) v[i, k]`` for rows of pairs.

    The Triton kernel never writes the logits ``[r, h, l, l]`` and rounds once, at its end. It has no gradient, so with
    gradients "auto" is PyTorch.

    Args:
        q, k, v: ``[r, l, h, d]``; views of one product are read where they are.
        bias: ``[h, l, l]``, of (j, k), the same for all rows; finite.
        gate: gives ``[r * l, h * d]``; None opens all.

    Returns: ``[r * l, h * d]``.
    """

    def plain() -> Tensor:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # [r, h, l, d]
        mixed = F.scaled_dot_product_attention(queries, keys, values, bias[None], scale=scale)
        mixed = mixed.transpose(1, 2).reshape(-1, q.shape[2] * q.shape[3])
        return mixed if gate is None else mixed * gate("sigmoid")

    def kernel() -> Tensor:
        from plm_kernels.gpu import triangle_attention as gpu

        return gpu.triangle_attention(q, k, v, bias, None if gate is None else gate("none"), scale)

    if backend == "auto" and q.dtype not in DTYPES:
        return plain()
    return serve("triangle_attention", q, backend, kernel, plain)
