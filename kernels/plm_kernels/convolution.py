"""Convolution along a sequence. On a CPU oneDNN takes ``[b, t, c]`` as it is and adds the activation in the same pass.

As a product of matrices it would need every row nine times (a kernel of nine), and copying them takes longer than
oneDNN's whole convolution, which runs at the speed of its matrix products.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plm_kernels.linear import ACTIVATIONS, Activation

_DTYPES = (torch.float32, torch.bfloat16)


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
