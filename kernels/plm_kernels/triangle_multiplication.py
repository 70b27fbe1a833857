"""What surrounds the products of triangle multiplication (Jumper et al. 2021, algorithms 11, 12).

The products themselves are one matrix product per channel, for which cuBLAS is at its best: ``a @ b.mT`` on tensors
``[c, l, l]``. Around them everything is memory traffic: pairs ``[l, l, c]`` are normed, gated, turned to ``[c, l, l]``,
and back. PyTorch passes over all pairs for each of these steps, a kernel once for several.

Kernels have no gradients, so with gradients "auto" is PyTorch. Letters: r rows of pairs, l residues, c channels.
"""

import torch.nn.functional as F
from torch import Tensor

from plm_kernels.backends import Backend, serve
from plm_kernels.triangle_attention import DTYPES, OpenGate

# cuBLAS has its fast products of half precision for rows that begin at multiples of 16 bytes, and Triton reads and
# writes several numbers at once where rows are known to begin at multiples of 16 numbers.
ALIGNED = 16


def pair_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """LayerNorm over the channels of ``[..., c]``: in the wider of both dtypes, given in that of the weights.

    ``x`` may be a transposed view: a kernel reads it where it is.
    """

    def plain() -> Tensor:
        if x.dtype == weight.dtype:
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(weight.dtype)

    def kernel() -> Tensor:
        from plm_kernels.gpu import triangle_multiplication as gpu

        rows = x[None] if x.dim() == 2 else x
        return gpu.pair_norm(rows, weight, bias, eps).view(x.shape)

    if backend == "auto" and not (x.dtype in DTYPES and weight.dtype in DTYPES and x.dim() in (2, 3)):
        return plain()
    return serve("pair_norm", x, backend, kernel, plain)


def triangle_norm(
    product: Tensor, length: int, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend = "auto"
) -> Tensor:
    """``pair_norm`` of the first l columns of a matrix for each channel, ``[c, r, w]``: ``[r * l, c]``."""

    def plain() -> Tensor:
        return pair_norm(product[..., :length].flatten(1).T, weight, bias, eps, backend="torch")

    def kernel() -> Tensor:
        from plm_kernels.gpu import triangle_multiplication as gpu

        whole = product.stride()[1:] == (product.shape[2], 1)
        return gpu.pair_norm(product[..., :length].permute(1, 2, 0), weight, bias, eps, padded=whole).flatten(0, 1)

    if backend == "auto" and not (product.dtype in DTYPES and weight.dtype in DTYPES):
        return plain()
    return serve("pair_norm", product, backend, kernel, plain)


def empty_sides(channels: int, length: int, like: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Room for a matrix of pairs for each channel, ``[c, w, w]`` with w >= l: on a GPU rows are aligned.

    Rows from l on are zero; so will be columns, once ``write_sides`` has filled the others.
    """
    multiple = ALIGNED if backend == "triton" or (backend == "auto" and like.is_cuda) else 1
    width = -(-length // multiple) * multiple
    sides = like.new_empty(channels, width, width)
    sides[:, length:] = 0
    return sides


def write_sides(sides: Tensor, x: Tensor, gate: OpenGate, *, backend: Backend = "auto") -> None:
    """Write ``x * sigmoid(gate)``, ``[r * l, c]`` each, into some rows ``[c, r, w]`` of ``empty_sides``.

    Columns from l on become zero.
    """
    length = len(x) // sides.shape[1]

    def plain() -> None:
        gated = x * gate("sigmoid")
        sides[..., :length] = gated.T.unflatten(1, (-1, length))
        sides[..., length:] = 0

    def kernel() -> None:
        from plm_kernels.gpu import triangle_multiplication as gpu

        gpu.write_sides(sides, x, gate("none"), length)

    if backend == "auto" and x.dtype not in DTYPES:
        return plain()
    return serve("triangle_sides", x, backend, kernel, plain)


def add_gated(z: Tensor, x: Tensor, gate: OpenGate, *, backend: Backend = "auto") -> None:
    """Add ``x * sigmoid(gate)``, ``[r * l, c]`` each, to pairs ``[r, l, c]`` in place; z may be a view."""

    def plain() -> None:
        z.add_((x * gate("sigmoid")).view_as(z))

    def kernel() -> None:
        from plm_kernels.gpu import triangle_multiplication as gpu

        gpu.add_gated(z, x, gate("none"))

    if backend == "auto" and not (z.dtype in DTYPES and x.dtype in DTYPES):
        return plain()
    return serve("add_gated", z, backend, kernel, plain)
