"""Convolution along a sequence. On a CPU oneDNN takes ``[b, t, c]`` as it is and adds the activation in the same pass.
On a GPU Triton takes what ProteinBERT does around its convolutions into one kernel.

As a product of matrices it would need every row nine times (a kernel of nine), and copying them takes longer than
oneDNN's whole convolution, which runs at the speed of its matrix products.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels.backends import Backend, serve
from plm_kernels.linear import ACTIVATIONS, Activation

_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # channels that one program of the Triton kernel holds


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: Activation = "none",
    *,
    dilation: int = 1,
    packed: Tensor | None = None,
) -> Tensor:
    """``[b, t, i] -> [b, t, o]`` with weight ``[o, i, k]``, then the activation.

    Beyond both ends there are zeros: ``(k - 1) * dilation`` in all, of which an odd one stands behind.

    Args:
        packed: what ``pack_filters`` made of ``weight``. With it there is no gradient.
    """
    if packed is not None:
        return _on_rows(x, packed, bias, activation, dilation)
    total = (weight.shape[-1] - 1) * dilation
    padded = F.pad(x.transpose(1, 2), (total // 2, total - total // 2))
    return ACTIVATIONS[activation].formula(F.conv1d(padded, weight, bias, dilation=dilation).transpose(1, 2))


def pack_filters(weight: Tensor) -> Tensor | None:
    """``[o, i, k]`` in oneDNN's layout for any dilation; None where that is not possible (even k, dtype, build)."""
    odd, known = weight.shape[-1] % 2 == 1, weight.dtype in _DTYPES
    if weight.device.type != "cpu" or not odd or not known or not filters_available(weight.dtype):
        return None
    return _packed(weight)


def _packed(weight: Tensor) -> Tensor:
    with torch.no_grad():
        filters = weight.detach()[:, :, None].contiguous().to_mkldnn()
        beyond = weight.shape[-1] // 2
        packed: Tensor = torch._C._nn.mkldnn_reorder_conv2d_weight(filters, [0, beyond], [1, 1], [1, 1], 1)
        return packed


def _on_rows(x: Tensor, packed: Tensor, bias: Tensor, activation: Activation, dilation: int) -> Tensor:
    """As an image of one line whose channels lie last, which is what ``x`` is already."""
    _, name, form = ACTIVATIONS[activation]
    image = x.contiguous()[:, None].permute(0, 3, 1, 2)
    beyond = packed.shape[-1] // 2 * dilation
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        image, packed, bias, [0, beyond], [1, 1], [1, dilation], 1, name, [], form
    )
    return y.permute(0, 2, 3, 1)[:, 0]


@cache
def filters_available(dtype: torch.dtype) -> bool:
    """Whether this torch has the two (private) operators that TorchInductor itself uses, and they work here."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, bias = torch.eye(3, 16, dtype=dtype)[None], torch.zeros(16, dtype=dtype)
    weight = F.pad(torch.eye(16, dtype=dtype)[:, :, None], (1, 1))
    try:
        found = [(act.formula(x), _on_rows(x, _packed(weight), bias, name, 2)) for name, act in ACTIVATIONS.items()]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return all(torch.allclose(*pair, atol=1e-6 if dtype == torch.float32 else 1e-2) for pair in found)


class LocalBlock(NamedTuple):
    """What a block of ProteinBERT knows of residues; the filters as ``taps_first`` lays them."""

    narrow: Tensor  # [k, c, c]: taps, inputs, outputs
    narrow_bias: Tensor  # [c]
    wide: Tensor  # [k, c, c]
    wide_bias: Tensor
    dilation: int  # of the wide filters
    gain1: Tensor  # [c], of the first norm
    shift1: Tensor
    eps1: float
    dense: Tensor  # [c, c]: outputs, inputs
    dense_bias: Tensor
    gain2: Tensor
    shift2: Tensor
    eps2: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In this order, which is that of the kernel's arguments."""
        return tuple(part for part in self if isinstance(part, Tensor))


def taps_first(weight: Tensor) -> Tensor:
    """Filters ``[o, i, k] -> [k, i, o]``, so that those of one tap are a matrix that is read in one piece."""
    return weight.detach().permute(2, 1, 0).contiguous()


def local_block(
    x: Tensor,
    added: Tensor,
    weights: Callable[[], LocalBlock],
    plain: Callable[[], tuple[Tensor, Tensor]],
    *,
    keep: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The local track of a block of ProteinBERT; a convolution is followed by GELU and reads zeros beyond both ends.

        mid = norm1(x + added + gelu(narrow * x) + gelu(wide * x))
        out = norm2(mid + gelu(dense mid))

    Tokens that ``keep`` drops are zeros in ``x``, for their neighbours and themselves.

    The Triton kernel computes without gradients, sums in float32, and rounds the two results alone. It fits up to 128
    channels in float32, bfloat16 or float16; else "auto" is PyTorch. A sequence has the same bits in any batch of any
    width.

    Args:
        x: ``[b, t, c]``.
        added: ``[b, c]``, the same for all tokens of a sequence.
        weights: gives all weights; asked only where the kernel runs.
        plain: gives the same by PyTorch: the caller's layers, whose weights may be packed or in 8 bits.
        keep: ``[b, t]`` bool; None keeps all.

    Returns: mid and out, ``[b, t, c]`` both.
    Raises: ValueError if "triton" is asked for by name and the inputs do not fit it.
    """

    def kernel() -> tuple[Tensor, Tensor]:
        from plm_kernels.gpu import convolution as gpu

        given = weights()
        dtypes = {part.dtype for part in (x, added, *given.tensors)}
        if x.dtype in _TRITON_DTYPES and len(dtypes) == 1 and x.shape[-1] <= WIDEST and x.numel() > 0:
            return gpu.local_block(x, added, given, keep)
        if backend == "auto":
            return plain()
        raise ValueError(
            f"the Triton kernel takes [b, t, c] of up to {WIDEST} channels, all in one of "
            f"{', '.join(map(str, _TRITON_DTYPES))}; got {[*x.shape]} in {', '.join(sorted(map(str, dtypes)))}"
        )

    return serve("local_block", x, backend, kernel, plain)
