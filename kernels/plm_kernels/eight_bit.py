"""Linear layers whose weights are kept in 8 bits: what is multiplied with few rows is bound by reading its weights.

A weight is ``scale[o] * whole[o, i]`` with whole numbers from -127 to 127 and a scale per output, the largest weight of
the row over 127. Inputs stay bfloat16, so nothing is lost but the weights' own rounding.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # the kernel reads inputs in such blocks, without looking whether a row ends within one
FEW = 3  # rows up to which torch's kernel on whole numbers is faster than a product in bfloat16


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[o, i]`` as whole numbers in int8 and their scales ``[o]`` in bfloat16."""
    largest = weight.detach().float().abs().amax(-1, keepdim=True)
    # Rounded first, so that the numbers are whole multiples of the scale that is kept.
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    whole = (weight.detach().float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return whole, scale[:, 0]


def linear_8bit(x: Tensor, whole: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ (scale * whole).T + bias`` for few rows in bfloat16: ``[n, i] -> [n, o]``."""
    if x.device.type == "cpu" and x.shape[1] % BLOCK == 0 and kernel_available():
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), whole, scale)
    else:
        y = F.linear(x, whole.to(x.dtype)) * scale
    return y if bias is None else y + bias


@cache
def kernel_available() -> bool:
    """Whether this torch has the (private) operator on a CPU, and it works."""
    x, whole = torch.eye(2, 32, dtype=torch.bfloat16), torch.arange(32 * 32, dtype=torch.int8).view(32, 32)
    try:
        y = torch.ops.aten._weight_int8pack_mm(x, whole, torch.full((32,), 0.5, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(y, (0.5 * whole[:, :2].T).to(torch.bfloat16))
