"""Products of rows and a weight as it is stored: torch's, or on CUDA those whose bits do not depend on the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels.backends import Backend
from plm_kernels.invariance import is_batch_invariant
from plm_kernels.linear import ACTIVATIONS, Activation


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none", *, backend: Backend = "auto"
) -> Tensor:
    """``activation(x @ weight.T + bias)``: ``[n, i] -> [n, o]``.

    "auto" is torch, which rounds the product before the activation; but on CUDA in a ``batch_invariant`` scope it is
    the Triton kernel, which rounds once if it knows the activation. That one gives no gradients, and is not replaced by
    torch's where it does not work: a promise was made.

    Raises:
        ValueError: an unknown backend, or an x or a weight that the kernel does not take.
        RuntimeError: the kernel is needed for gradients.
    """
    if backend == "auto":
        backend = "triton" if x.is_cuda and is_batch_invariant() else "torch"
    if backend == "torch":
        return ACTIVATIONS[activation].formula(F.linear(x, weight, bias))
    if backend != "triton":
        raise ValueError(f"backend {backend!r} is unknown; choose 'auto', 'torch' or 'triton'")
    halves = (torch.float16, torch.bfloat16)
    if x.dim() != 2 or x.dtype != weight.dtype or x.dtype not in (*halves, torch.float32):
        raise ValueError(
            f"batch-invariant products take x [n, i] and a weight of one dtype, float32, bfloat16 or float16; got x "
            f"{[*x.shape]} in {x.dtype} and a weight in {weight.dtype}"
        )
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        raise RuntimeError("batch-invariant products have no gradients: use torch.inference_mode() or leave the scope")
    from plm_kernels.gpu import matmul

    if activation in matmul.FUSED:
        return matmul.product(x, weight, bias, activation)
    return ACTIVATIONS[activation].formula(matmul.product(x, weight, bias, "none"))
