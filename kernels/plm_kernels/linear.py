"""Matrix products on weights that oneDNN has laid out for this CPU in advance.

Packing a weight once makes products up to 2.4 times as fast for few rows and fuses an activation into them. In float32
it has a second use: a row of the result has the same bits however many rows are computed with it (fewer than four
are filled up), which ordinary ``F.linear`` does not promise. So a sequence embeds to the same bits alone or in any
batch.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from mmap import mmap
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
Activation = Literal["none", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"]


class Act(NamedTuple):
    """An activation: its formula, and what oneDNN calls it."""

    formula: Callable[[Tensor], Tensor]
    name: str
    form: str


ACTIVATIONS: Mapping[Activation, Act] = {
    "none": Act(lambda x: x, "none", ""),
    "gelu": Act(F.gelu, "gelu", "none"),  # the exact one, by erf
    "gelu_tanh": Act(partial(F.gelu, approximate="tanh"), "gelu", "tanh"),
    "relu": Act(F.relu, "relu", ""),
    "sigmoid": Act(torch.sigmoid, "sigmoid", ""),
    "tanh": Act(torch.tanh, "tanh", ""),
}
LEAST = 4  # rows that are multiplied at once; fewer are filled up


@cache
def packing_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this torch has the two (private) operators that TorchInductor itself uses, and they work here.

    In bfloat16 they need AVX-512 or AVX-NE-CONVERT.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        rows, weight, bias = torch.eye(2, 16, dtype=dtype), torch.eye(16, dtype=dtype), torch.zeros(16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        acted = [
            (act, torch.ops.mkldnn._linear_pointwise(rows, packed, bias, act.name, [], act.form))
            for act in ACTIVATIONS.values()
        ]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(acted[0][1], rows) and all(
        torch.allclose(found, act.formula(rows), atol=1e-6 if dtype == torch.float32 else 1e-2) for act, found in acted
    )


def pack_weight(weight: Tensor) -> Tensor | None:
    """``[o, i]`` in oneDNN's layout, or None where packing is not possible (device, dtype, build)."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not packing_available(weight.dtype):
        return None
    with torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def pack_rounded(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``pack_weight`` of ``[o, i]`` in another dtype.

    What it is rounded to lies in memory pages of its own until it is packed. On the heap, packed weights would settle
    in the gaps that such tensors leave and tear them up: a network of ESM-2's shape took a third more than its weights.
    """
    if weight.device.type != "cpu" or dtype not in _DTYPES or not packing_available(dtype) or not weight.numel():
        return None
    pages = mmap(-1, weight.numel() * dtype.itemsize)
    return pack_weight(torch.frombuffer(pages, dtype=dtype).view(weight.shape).copy_(weight.detach()))


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """``x @ weight.T + bias`` on a packed weight, then the activation: ``[n, i] -> [n, o]``. No gradient.

    In bfloat16 the bias may be float32: it is added before anything is rounded.
    """
    _, name, form = ACTIVATIONS[activation]
    if bias is not None and bias.dtype != x.dtype and not wide_bias_available():
        bias = bias.to(x.dtype)
    count = x.shape[0]
    if count >= LEAST:
        return _operator()(x.contiguous(), packed, bias, name, [], form)
    if count == 0:
        return x.new_empty(0, packed.shape[0])
    # One row alone takes a matrix-vector kernel with other rounding, and two or three rows take longer than four.
    padded = torch.cat((x, x[:1].expand(LEAST - count, -1)))
    return _operator()(padded, packed, bias, name, [], form)[:count]


@cache
def wide_bias_available() -> bool:
    """Whether the operator adds a bias in float32 to products in bfloat16."""
    rows, bias = torch.eye(2, 16, dtype=torch.bfloat16), torch.full((16,), 2.0**-20)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16))
        found = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, bias.to(torch.bfloat16).expand(2, -1))


@cache
def _operator() -> Callable[..., Tensor]:
    """Its one form for tensors, so that no call has to look for it."""
    return torch.ops.mkldnn._linear_pointwise.default
