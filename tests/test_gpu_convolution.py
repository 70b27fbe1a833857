"""The local track of ProteinBERT as a Triton kernel against the formula, on a GPU if there is one, else interpreted."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, HALF
from torch import Tensor

from plm.models.proteinbert import Config, Convolution
from plm_kernels import LocalBlock, local_block, reference, taps_first
from plm_kernels.convolution import WIDEST

pytest.importorskip("triton")


@dataclass(frozen=True)
class Size:
    """Of a test; rows of 64 (float32) or 128 tokens are one program's."""

    channels: int
    tokens: int
    narrow: int = 9
    wide: int = 9
    dilation: int = 5

    def __str__(self) -> str:
        return f"c{self.channels}-t{self.tokens}-k{self.narrow}k{self.wide}d{self.dilation}"


SIZES = [
    Size(16, 1),
    Size(128, 33),
    Size(48, 130),  # channels that are no power of two, and two tokens more than one or two whole tiles
    Size(10, 64),  # fewer channels than the smallest product takes
    Size(33, 7, narrow=4, wide=6, dilation=3),  # even kernels, whose extra zero lies behind
    Size(80, 21, narrow=1, wide=3, dilation=30),  # taps that reach nothing but zeros
]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)


@dataclass(frozen=True)
class Given:
    x: Tensor
    added: Tensor
    weights: LocalBlock
    keep: Tensor

    def to(self, dtype: torch.dtype) -> "Given":
        weights = (part.to(dtype) if isinstance(part, Tensor) else part for part in self.weights)
        return Given(self.x.to(dtype), self.added.to(dtype), LocalBlock(*weights), self.keep)

    def run(self, *, masked: bool) -> tuple[Tensor, Tensor]:
        """By the kernel."""
        keep = self.keep if masked else None
        with torch.inference_mode():
            return local_block(self.x, self.added, lambda: self.weights, fail, keep=keep, backend="triton")

    def formula(self, dtype: torch.dtype, *, masked: bool) -> tuple[Tensor, Tensor]:
        given = self.to(dtype)
        return reference.local_block(given.x, given.added, given.weights, keep=self.keep if masked else None)


def fail() -> tuple[Tensor, Tensor]:
    raise AssertionError("PyTorch was asked, not the kernel")


def given(size: Size, dtype: torch.dtype) -> Given:
    """Three sequences: whole, of one token, and with every third token dropped, wherever it is. Both norms' rows have
    numbers of size 1 and each weight matters."""
    generator = torch.Generator().manual_seed(size.channels + size.tokens)

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    c = size.channels
    narrow, wide = (taps_first(normal(c, c, taps, scale=1.4 / (taps * c) ** 0.5)) for taps in (size.narrow, size.wide))
    weights = LocalBlock(
        *(narrow, normal(c, scale=0.3), wide, normal(c, scale=0.3), size.dilation),
        *(1 + normal(c, scale=0.2), normal(c), 1e-3),
        *(normal(c, c, scale=c**-0.5), normal(c, scale=0.3), 1 + normal(c, scale=0.2), normal(c), 1e-3),
    )
    keep = torch.ones(3, size.tokens, dtype=torch.bool)
    keep[1, 1:], keep[2, 1::3] = False, False
    return Given(normal(3, size.tokens, c), normal(3, c), weights, keep.to(DEVICE))


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@each_size
@each_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(size: Size, dtype: torch.dtype, masked: bool) -> None:
    """Every number of both results: as exact as the formula in float32, and in half precision as what is rounded."""
    inputs = given(size, dtype)
    truths = inputs.formula(torch.float64, masked=masked)
    formulas = inputs.formula(dtype, masked=masked)
    for found, truth, formula in zip(inputs.run(masked=masked), truths, formulas, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        # The noise floor: the formula's own error, or one rounding of the result. Seen are 0.7 to 1.3 of it, and in
        # single numbers 7 of it.
        floor = rms((formula if dtype == torch.float32 else truth.to(dtype)) - truth)
        assert rms(found - truth) <= 2 * floor
        assert (found - truth).abs().max() <= 14 * floor


FAULTS: dict[str, Callable[[LocalBlock], LocalBlock]] = {
    "filters swapped": lambda w: w._replace(narrow=w.wide, wide=w.narrow),
    "filters transposed": lambda w: w._replace(narrow=w.narrow.transpose(1, 2)),
    "taps reversed": lambda w: w._replace(wide=w.wide.flip(0)),
    "no dilation": lambda w: w._replace(dilation=1),
    "dense layer transposed": lambda w: w._replace(dense=w.dense.T),
    "eps of other norms": lambda w: w._replace(eps1=1e-5),
    "eps of the second norm": lambda w: w._replace(eps2=1e-5),
    "norms swapped": lambda w: w._replace(gain1=w.gain2, gain2=w.gain1, shift1=w.shift2, shift2=w.shift1),
    "no bias": lambda w: w._replace(narrow_bias=torch.zeros_like(w.narrow_bias)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault: str) -> None:
    """By more than a hundred times what two right results differ by."""
    inputs = given(Size(16, 40), torch.float32)
    wrong = Given(inputs.x, inputs.added, FAULTS[fault](inputs.weights), inputs.keep).run(masked=False)
    truth, right = inputs.formula(torch.float64, masked=False), inputs.run(masked=False)
    assert rms(wrong[1] - truth[1]) > 100 * rms(right[1] - truth[1])


@each_dtype
def test_a_sequence_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """Of any width, whatever stands behind it, even if that is not a number."""
    inputs = given(Size(16, 150), dtype)
    lengths = (150, 1, 67)
    inputs.keep[:] = torch.arange(150, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    inputs.x.masked_fill_(~inputs.keep[:, :, None], torch.nan)
    whole = inputs.run(masked=True)
    for i, length in enumerate(lengths):
        alone = Given(inputs.x[i : i + 1, :length], inputs.added[i : i + 1], inputs.weights, inputs.keep)
        for found, wanted in zip(alone.run(masked=False), whole, strict=True):
            assert torch.equal(found[0], wanted[i, :length])
    order = [2, 0, 2]
    turned = Given(inputs.x[order], inputs.added[order], inputs.weights, inputs.keep[order])
    for found, wanted in zip(turned.run(masked=True), whole, strict=True):
        assert torch.equal(found.nan_to_num(7), wanted[order].nan_to_num(7))


def test_views() -> None:
    """Inputs, masks and weights that lie otherwise in memory: the same bits as of copies."""
    inputs = given(Size(16, 30), HALF)
    wanted = inputs.run(masked=True)
    w = inputs.weights
    weights = w._replace(narrow=w.narrow.permute(2, 1, 0).contiguous().permute(2, 1, 0), dense=w.dense.T.contiguous().T)
    for x in (
        inputs.x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((inputs.x, inputs.x + 1), 2).flatten(1, 2)[:, ::2],
        torch.cat((inputs.x, inputs.x), -1)[..., 16:],
    ):
        assert not x.is_contiguous()
        added, keep = inputs.added.T.contiguous().T, inputs.keep.T.contiguous().T
        for found, copied in zip(Given(x, added, weights, keep).run(masked=True), wanted, strict=True):
            assert torch.equal(found, copied)
    shared = Given(inputs.x[:1].expand(3, -1, -1), inputs.added[:1].expand(3, -1), w, inputs.keep).run(masked=False)
    assert torch.equal(shared[0][1], shared[0][0]) and torch.equal(shared[1][2], shared[1][0])


def test_the_inputs_are_left_alone() -> None:
    inputs = given(Size(16, 30), torch.float32)
    before = [part.clone() for part in (inputs.x, inputs.added, *inputs.weights.tensors)]
    inputs.run(masked=True)
    assert all(map(torch.equal, before, (inputs.x, inputs.added, *inputs.weights.tensors)))


def test_taps_are_kept_until_a_filter_changes() -> None:
    """On the device that they are for, and in copies anew."""
    layer = Convolution(Config(26, 5, 1, 16, 32, 2, 8), dilation=5).requires_grad_(False).to(DEVICE)
    x = torch.zeros(1, 3, 16, device=DEVICE)
    layer.weight.normal_()
    layer.turned.device = DEVICE.type
    with torch.no_grad():
        first = layer.taps(x)
        assert torch.equal(first, layer.weight.permute(2, 1, 0)) and layer.taps(x) is first
        layer.weight.mul_(2)
        assert torch.equal(layer.taps(x), 2 * first)
        again = copy.deepcopy(layer)
        assert again.turned.device == DEVICE.type and again.turned.packed is None
        layer.turned.device = {"cpu": "cuda", "cuda": "cpu"}[DEVICE.type]
        assert layer.taps(x) is not layer.taps(x)
    assert Convolution(Config(26, 5, 1, 16, 32, 2, 8), 1).turned.device == "cuda"


def test_taps_of_filters() -> None:
    """As a convolution of torch's has them."""
    x, weight = torch.randn(1, 9, 4), torch.randn(4, 4, 3)
    columns = F.conv1d(x.transpose(1, 2), weight).transpose(1, 2)
    sums = sum(x[:, j : j + 7] @ tap for j, tap in enumerate(taps_first(weight)))
    torch.testing.assert_close(columns, sums)


def test_what_does_not_fit() -> None:
    """By name it is an error; else the caller's own steps are taken."""
    inputs = given(Size(16, 5), torch.float32)
    wide = given(Size(WIDEST + 2, 3), torch.float32)
    none = Given(inputs.x[:0], inputs.added[:0], inputs.weights, inputs.keep[:0])
    mixed = Given(inputs.x, inputs.added, inputs.weights._replace(dense=inputs.weights.dense.half()), inputs.keep)
    for case in (inputs.to(torch.float64), wide, none, mixed):
        with pytest.raises(ValueError, match=r"takes \[b, t, c\] of up to 128 channels, all in one of .*; got \["):
            case.run(masked=False)
        with torch.inference_mode():
            plain = (case.x, case.x)
            assert local_block(case.x, case.added, lambda case=case: case.weights, lambda plain=plain: plain) == plain
