"""Convolution along a sequence, as oneDNN does it on rows: on a CPU it takes ``[b, t, c]`` as it is."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, *, dilation: int = 1, gelu: bool = False) -> Tensor:
    """``[b, t, i] -> [b, t, o]`` with weight ``[o, i, k]``, then exact (erf) GELU if asked.

    Beyond both ends there are zeros: ``(k - 1) * dilation`` in all, of which an odd one stands behind.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled() and weight.shape[-1] % 2 and fused(x.dtype):
        return _on_rows(x, weight, bias, dilation, gelu)
    total = (weight.shape[-1] - 1) * dilation
    padded = F.pad(x.transpose(1, 2), (total // 2, total - total // 2))
    y = F.conv1d(padded, weight, bias, dilation=dilation).transpose(1, 2)
    return F.gelu(y) if gelu else y


def _on_rows(x: Tensor, weight: Tensor, bias: Tensor, dilation: int, gelu: bool) -> Tensor:
    """An image of one line whose channels lie last is what ``x`` is already, and GELU costs no pass of its own."""
    image = x.contiguous()[:, None].permute(0, 3, 1, 2)
    beyond = weight.shape[-1] // 2 * dilation
    activation, form = ("gelu", "none") if gelu else ("none", "")
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        image, weight[:, :, None], bias, [0, beyond], [1, 1], [1, dilation], 1, activation, [], form
    )
    return y.permute(0, 2, 3, 1)[:, 0]


@cache
def fused(dtype: torch.dtype) -> bool:
    """Whether this torch has the (private) operator that TorchInductor itself uses, and it works here."""
    if dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    x = torch.eye(3, 16, dtype=dtype)[None]
    weight, bias = torch.eye(16, dtype=dtype)[:, :, None].expand(-1, -1, 3), torch.zeros(16, dtype=dtype)
    try:
        y = _on_rows(x, weight, bias, 2, True)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(y, F.gelu(x), atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
