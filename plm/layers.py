"""Layers that several families use with the same formula."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm_kernels import (
    ACTIVATIONS,
    FEW,
    Activation,
    add_layer_norm,
    eight_bits,
    layer_norm,
    linear,
    linear_8bit,
    pack_rounded,
    pack_weight,
    product,
)

_unchanged: ContextVar[object | None] = ContextVar("unchanged", default=None)
_packing: ContextVar[bool] = ContextVar("packing", default=True)


@contextmanager
def weights_unchanged(scope: object | None = None) -> Iterator[None]:
    """A scope in which nobody changes a weight: each is looked at once, not at every use (which takes 10 us each).

    One that is left and entered again, as by a loop that rests, is the same ``scope`` each time.
    """
    token = _unchanged.set(object() if scope is None else scope)
    try:
        yield
    finally:
        _unchanged.reset(token)


def unchanged() -> object | None:
    """The scope in which nobody changes a weight; None outside of one."""
    return _unchanged.get()


@contextmanager
def unpacked() -> Iterator[None]:
    """A scope in which no weight is packed, for networks so large that a second copy would not fit."""
    token = _packing.set(False)
    try:
        yield
    finally:
        _packing.reset(token)


class PackedWeight:
    """A weight in a device's preferred layout, made at the first prediction and again whenever the weight changes.

    On CUDA a change shows by the weight's place and version alone, so an edit of ``weight.data`` goes unseen there.
    """

    def __init__(self, pack: Callable[[Tensor], Tensor | None] = pack_weight, device: str = "cpu") -> None:
        self.pack, self.device = pack, device
        self.seen_in: object | None = None
        self.packed: Tensor | None = None
        self.made_from: tuple[int, int, torch.dtype] | None = None
        self.sample = torch.empty(0)

    def __reduce__(self) -> tuple[type[Self], tuple[Callable[[Tensor], Tensor | None], str]]:
        """Copies and pickles start empty: oneDNN's layout cannot be copied."""
        return type(self), (self.pack, self.device)

    def of(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The packed form of ``weight``, if ``x`` can use it: where it is for, without gradients, in its dtype."""
        if torch.is_grad_enabled():
            self.made_from = None  # whoever trains changes the weight, and not always so that it shows below
            return None
        if torch.is_autocast_enabled(self.device) or x.device.type != self.device or x.dtype != weight.dtype:
            return None
        return self.made(weight)

    def made(self, weight: Tensor) -> Tensor | None:
        """What ``pack`` makes of ``weight``, on any device; None where gradients are wanted or nothing is packed."""
        if torch.is_grad_enabled():
            self.made_from = None
            return None
        if not _packing.get() or weight.is_inference():
            return None
        if (scope := _unchanged.get()) is not None and scope is self.seen_in:
            return self.packed
        self.seen_in = scope
        state = (weight.data_ptr(), weight._version, weight.dtype)
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():  # numbers cannot be looked at meanwhile
            return self.packed if self.made_from == state else None
        # Fused optimizers and edits of ``weight.data`` do not count versions; they change a sample of the numbers. Its
        # odd step comes by all columns and taps. A GPU would have to be waited for, so there versions have to do.
        watched = weight.detach().flatten() if weight.device.type == "cpu" else weight.new_empty(0)
        sample = watched[:: weight.numel() // 64 | 1]
        if self.made_from != state or (weight.device.type == "cpu" and not torch.equal(self.sample, sample)):
            self.packed, self.made_from, self.sample = self.pack(weight), state, sample.clone()
        return self.packed

    def of_8_bits(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The packed form of whole numbers as bfloat16, made once: they are not trained."""
        if x.device.type != "cpu":
            return None
        if self.made_from is None:
            self.packed = pack_rounded(weight, torch.bfloat16)
            self.made_from = (weight.data_ptr(), 0, weight.dtype)  # an inference tensor counts no versions
        return self.packed


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` of ``[n, c]`` that makes the sum before it as well, in one pass where a kernel can."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """The norm of ``x``, or of ``x + delta``."""
        return layer_norm(x, self.weight, self.bias, self.eps, delta=delta)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``x + delta``, and its norm."""
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in ``dtype``, packed where that is possible."""
    packed = pack_rounded(weight, dtype)
    return weight.detach().to(dtype) if packed is None else packed


class Linear(nn.Linear):
    """``nn.Linear`` that predicts on packed weights on a CPU, with an activation in the same pass.

    Its weight may be kept in 8 bits (see ``plm_kernels.eight_bit``): then ``scale`` is there, and it only predicts.

    Or its products are in ``products``, a narrower dtype than that of its weight: input and weight are rounded to it,
    sums are in float32, the bias in float32 where weights are packed, else rounded too, and the result is in it, as
    under torch's autocast. Gradients are the weight's.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.packed = PackedWeight()
        self.products: torch.dtype | None = None
        self.scale: Tensor | None
        self.register_buffer("scale", None)

    def keep_8_bits(self) -> None:
        """Keep the weight in 8 bits from now on, and take and give bfloat16."""
        if self.scale is None:
            whole, self.scale = eight_bits(self.weight)
            self.weight = nn.Parameter(whole, requires_grad=False)

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Round inputs and weights to ``dtype`` from now on. The weight itself stays what it is."""
        self.products, self.packed = dtype, PackedWeight(partial(rounded, dtype=dtype))

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """``[n, i] -> [n, o]``."""
        if self.scale is not None:
            return ACTIVATIONS[activation].formula(self.in_8_bits(x, self.scale))
        if self.products is not None:
            return self.narrowly(x, self.products, activation)
        packed = self.packed.of(x, self.weight)
        if packed is not None:
            return linear(x, packed, self.bias, activation)
        return product(x, self.weight, self.bias, activation)

    def narrowly(self, x: Tensor, dtype: torch.dtype, activation: Activation) -> Tensor:
        """Products in ``dtype``, on a weight that was rounded and packed once, unless gradients are wanted."""
        x, weight = x.to(dtype), self.packed.made(self.weight)
        if weight is not None and weight.is_mkldnn:
            return linear(x, weight, self.bias, activation)  # a bias in float32 is added to the sums as it is
        weight = self.weight.to(dtype) if weight is None else weight
        return product(x, weight, None if self.bias is None else self.bias.to(dtype), activation)

    def in_8_bits(self, x: Tensor, scale: Tensor) -> Tensor:
        """Few rows on the whole numbers themselves; many on the same numbers in bfloat16, packed when first needed.

        Raises: TypeError for another dtype than bfloat16.
        """
        if not x.dtype == scale.dtype == torch.bfloat16:
            raise TypeError(
                f"weights in 8 bits take bfloat16, not {x.dtype}: load the model again in the dtype you want"
            )
        if len(x) <= FEW:
            return linear_8bit(x, self.weight, scale, self.bias)
        wide = self.packed.of_8_bits(x, self.weight)
        y = (F.linear(x, self.weight.to(x.dtype)) if wide is None else linear(x, wide, None)) * scale
        return y if self.bias is None else y + self.bias
