"""Norms of rows, and of the sum of two rows: what stands between the layers of every family.

A Triton kernel serves CUDA devices without gradients; it has none. It computes in float32 and rounds twice: the sum to
the dtype of ``x``, before any statistics are taken of it, as PyTorch rounds it; and the norm. What it does not take, as
rows that are no matrix, is PyTorch's to compute or to refuse.

Letters: n packed tokens, c channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels.backends import Backend, serve


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    delta: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``weight * (x - mean) / sqrt(variance + eps) + bias`` over the channels of x, or x + delta, ``[n, c]``."""

    def plain() -> Tensor:
        return F.layer_norm(x if delta is None else x + delta, weight.shape, weight, bias, eps)

    return serve(
        "norm",
        x,
        backend,
        lambda: _kernel(x, delta, weight, bias, eps, True, False)[1],
        plain,
        lambda: _fits(x, delta, weight, bias),
    )


def add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """``x + delta``, and ``layer_norm`` of it: ``[n, c]`` each."""

    def plain() -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)

    return serve(
        "norm",
        x,
        backend,
        lambda: _kernel(x, delta, weight, bias, eps, True, True),
        plain,
        lambda: _fits(x, delta, weight, bias),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the channels of ``[n, c]``; the mean in float32 at least."""

    def plain() -> Tensor:
        return _rms(x, weight, eps)

    def kernel() -> Tensor:
        return _kernel(x, None, weight, None, eps, False, False)[1]

    return serve("norm", x, backend, kernel, plain, lambda: _fits(x, None, weight, None))


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """``x + delta``, and ``rms_norm`` of it: ``[n, c]`` each."""

    def plain() -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, _rms(total, weight, eps)

    return serve(
        "norm",
        x,
        backend,
        lambda: _kernel(x, delta, weight, None, eps, False, True),
        plain,
        lambda: _fits(x, delta, weight, None),
    )


def _fits(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes these: rows ``[n, c]``, to which nothing wider is added, all on one device."""
    if x.dim() != 2 or not x.is_floating_point():
        return False
    if delta is not None and (delta.shape != x.shape or torch.promote_types(x.dtype, delta.dtype) != x.dtype):
        return False
    scales = [weight] if bias is None else [weight, bias]
    if any(scale.shape != x.shape[1:] or not scale.is_floating_point() for scale in scales):
        return False
    return all(other.device == x.device for other in (*scales, x if delta is None else delta))


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's. It has no fused form on a CPU. There, without gradients, its batch norm takes rows for channels and
    scales each in one pass: with the multiplication by ``weight`` 0.6 times the time of ``F.rms_norm``, and the same
    roundings as the T5 of transformers.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or len(x) == 0 or x.dim() != 2:
        return F.rms_norm(x, weight.shape, weight, eps)
    precise = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, dtype=precise).square_().div_(x.shape[-1])
    scaled = F.batch_norm(x[None], torch.zeros_like(square), square, training=False, eps=eps)[0]
    return scaled.mul_(weight)


def _kernel(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    from plm_kernels.gpu import norms

    return norms.norm(x, delta, weight, bias, eps, centred=centred, keep_sum=keep_sum)
