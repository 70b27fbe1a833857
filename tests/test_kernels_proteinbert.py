"""ProteinBERT's two kernels against the plain formulas in plm_kernels/reference.py, as in test_kernels.py."""

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plm.models.proteinbert import Config, Convolution
from plm_kernels import Activation, convolution, filters_available, global_attention, pack_filters, reference

needs_packing = pytest.mark.skipif(not filters_available(torch.float32), reason="this torch build has no oneDNN")
ACTIVATIONS = ("none", "gelu", "tanh")
# Channels, taps, dilation, tokens: one token; fewer than the taps reach; even kernels; one tap; more than a block.
SIZES = [(16, 9, 1, 1), (16, 9, 5, 7), (5, 4, 3, 21), (24, 6, 1, 2), (7, 1, 4, 9), (128, 9, 5, 60), (33, 3, 2, 130)]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def given(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[3, t, c]``, weight ``[c + 1, c, k]`` and bias, so that inputs and outputs are told apart."""
    channels, taps, _, tokens = size
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = normal(channels + 1, channels, taps) / (channels * taps) ** 0.5
    return normal(3, tokens, channels), weight, normal(channels + 1)


def formula(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, dilation: int) -> Tensor:
    y = reference.convolution(x, weight, bias, dilation=dilation)
    return {"none": y, "gelu": y * 0.5 * (1 + torch.erf(y / 2**0.5)), "tanh": torch.tanh(y)}[activation]


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@each_size
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution_equals_the_formula(size: tuple[int, int, int, int], activation: Activation) -> None:
    x, weight, bias = given(size, torch.float64)
    ours = convolution(x, weight, bias, activation, dilation=size[2])
    assert ours.shape == (3, size[3], size[0] + 1)
    # Float64 sums of at most 1,152 terms that together are of size 1, in another order: 4e-15 is seen.
    torch.testing.assert_close(ours, formula(x, weight, bias, activation, size[2]), rtol=0, atol=1e-13)


@each_size
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_in_low_precision(
    size: tuple[int, int, int, int], dtype: torch.dtype, activation: Activation
) -> None:
    """On packed filters and without: as exact as one convolution of torch's own with the same numbers."""
    x, weight, bias = given(size, dtype)
    total = (size[1] - 1) * size[2]
    padded = F.pad(x.transpose(1, 2), (total // 2, total - total // 2))
    plain = F.conv1d(padded, weight, bias, dilation=size[2]).transpose(1, 2).double()
    floor = rms(plain - reference.convolution(x.double(), weight.double(), bias.double(), dilation=size[2]))
    truth = formula(x.double(), weight.double(), bias.double(), activation, size[2])
    packed = pack_filters(weight)
    with torch.inference_mode():
        for way in (None, packed):
            ours = convolution(x, weight, bias, activation, dilation=size[2], packed=way).double()
            # The noise floor: torch's own error without an activation, and one rounding of the activation's result.
            assert rms(ours - truth) <= 2 * (floor + rms(truth - truth.to(dtype)))


def test_even_kernels_and_float64_are_not_packed() -> None:
    for taps, dtype in ((4, torch.float32), (3, torch.float64), (3, torch.float16)):
        assert pack_filters(torch.ones(8, 8, taps, dtype=dtype)) is None
    assert (pack_filters(torch.ones(8, 8, 3)) is not None) == filters_available(torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_convolution_of_a_view(activation: Activation, packed: bool) -> None:
    """Channels first in memory, every other token, part of the channels: the same bits as of a copy."""
    x, weight, bias = given((16, 9, 5, 30), torch.float32)
    filters = pack_filters(weight) if packed else None
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((x, x + 1), 2).flatten(1, 2)[:, ::2],
        torch.cat((x, x), -1)[..., 16:],
        x[:1].expand(3, -1, -1),
    ]
    with torch.inference_mode():
        for view in views:
            assert not view.is_contiguous()
            found, wanted = (
                convolution(each, weight, bias, activation, dilation=5, packed=filters)
                for each in (view, view.contiguous())
            )
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(3, 3, 2, 4), (2, 4, 1, 5), (2, 9, 5, 3)], ids=str)
def test_gradients_of_a_convolution(size: tuple[int, int, int, int], activation: Activation) -> None:
    """By the input, the weight and the bias, against differences; and the formula's, to the last digits."""

    def gradients(run: Any) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in given(size, torch.float64)]
        y = run(*leaves, activation, dilation=size[2])
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        return [leaf.grad for leaf in leaves]

    leaves = [x.requires_grad_() for x in given(size, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: convolution(*x, activation, dilation=size[2]), leaves)
    for ours, expected in zip(gradients(convolution), gradients(formula), strict=True):
        assert expected.abs().max() > 1e-3  # there is something to compare
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


@needs_packing
@pytest.mark.parametrize("size", [size for size in SIZES if size[1] % 2], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_sequence_has_the_same_bits_in_any_batch(size: tuple[int, int, int, int], activation: Activation) -> None:
    """Of its own width. Within a longer row it has not: where oneDNN cuts a row into registers depends on its length,
    so that the vector units and the scalar tails of an activation, or the sums of a short row, round otherwise."""
    x, weight, bias = given(size, torch.float32)
    truth = formula(x.double(), weight.double(), bias.double(), activation, size[2])
    packed = pack_filters(weight)
    with torch.inference_mode():
        whole = convolution(x, weight, bias, activation, dilation=size[2], packed=packed)
        for rows in ([0], [2], [1, 0], [2, 2, 0, 1, 1]):
            part = convolution(x[rows], weight, bias, activation, dilation=size[2], packed=packed)
            assert torch.equal(part, whole[rows]), rows
        for more in (1, 16, 501):
            longer = convolution(F.pad(x, (0, 0, 0, more)), weight, bias, activation, dilation=size[2], packed=packed)
            # The noise floor is the error of the shorter row.
            assert rms(longer[:, : size[3]] - whole) <= 2 * rms(whole - truth), more


class Missing:
    """In the place of the private operator: what torch does where it is not there, or not able to."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __call__(self, *given: object) -> Tensor:
        raise self.error("no such operator")


@pytest.mark.parametrize("how", [Missing(AttributeError), Missing(RuntimeError), Missing(NotImplementedError), "wrong"])
def test_without_the_private_operator(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is packed, and torch's own convolution answers; also where the operator gives other numbers."""
    module = import_module("plm_kernels.convolution")
    layer = Convolution(Config(26, 5, 1, 16, 32, 2, 8), dilation=5).requires_grad_(False)
    x, weight, bias = given((16, 9, 5, 30), torch.float32)
    layer.weight.copy_(weight[:16])
    layer.bias.copy_(bias[:16])
    monkeypatch.setattr(module, "_on_rows", (lambda x, *_: x + 0.1) if how == "wrong" else how)
    module.filters_available.cache_clear()
    try:
        assert not filters_available(torch.float32) and pack_filters(layer.weight) is None
        with torch.inference_mode():
            assert torch.equal(layer(x), convolution(x, layer.weight, layer.bias, "gelu", dilation=5))
            assert layer.packed.packed is None
    finally:
        module.filters_available.cache_clear()


# Attention of one vector

HEADS = [(4, 64, 128, 60), (1, 3, 5, 1), (2, 8, 8, 2), (5, 2, 7, 33), (4, 6, 3, 600)]  # heads, d, e, tokens
each_shape = pytest.mark.parametrize("shape", HEADS, ids=str)


def queries_keys_values(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q ``[3, h, d]``, k ``[3, t, h, d]``, v ``[3, t, h, e]``."""
    heads, d, e, tokens = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((3, heads, d), (3, tokens, heads, d), (3, tokens, heads, e))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def masks(tokens: int) -> list[Tensor | None]:
    """No mask; one that keeps all; one that keeps one token of a protein, the first of another, and every other."""
    some = torch.zeros(3, tokens, dtype=torch.bool)
    some[0, tokens // 2], some[1, 0], some[2, ::2] = True, True, True
    return [None, torch.ones(3, tokens, dtype=torch.bool), some]


@each_shape
def test_global_attention_equals_the_formula(shape: tuple[int, int, int, int]) -> None:
    q, k, v = queries_keys_values(shape, torch.float64)
    for keep in masks(shape[3]):
        ours = global_attention(q, k, v, scale=0.3, keep=keep)
        expected = reference.global_attention(q, k, v, scale=0.3, keep=keep)
        for found, wanted in zip(ours, expected, strict=True):
            # Float64 sums of at most 600 terms of size 1 with weights that add up to 1, in another order.
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
        assert keep is None or torch.count_nonzero(ours[1].masked_select(~keep[:, None])) == 0


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_attention_in_low_precision(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q, k, v = queries_keys_values(shape, dtype)
    for keep in masks(shape[3]):
        truth = reference.global_attention(q.double(), k.double(), v.double(), scale=0.3, keep=keep)
        formula = reference.global_attention(q, k, v, scale=0.3, keep=keep)
        ours = global_attention(q, k, v, scale=0.3, keep=keep)
        for found, plain, wanted in zip(ours, formula, truth, strict=True):
            # The noise floor is the formula's own error in this dtype, and one rounding of the result.
            assert rms(found - wanted) <= 2 * (rms(plain - wanted) + rms(wanted - wanted.to(dtype)))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_global_attention(masked: bool) -> None:
    """By queries, keys and values, against differences and the formula's; through both things that it returns."""
    shape = (2, 3, 4, 5)
    keep = masks(shape[3])[2] if masked else None

    def gradients(run: Any) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in queries_keys_values(shape, torch.float64)]
        sums = [(y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in run(*leaves, scale=0.7, keep=keep)]
        sum(sums).backward()  # type: ignore[union-attr]
        return [leaf.grad for leaf in leaves]

    leaves = [x.requires_grad_() for x in queries_keys_values(shape, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: global_attention(*x, scale=0.7, keep=keep), leaves)
    for ours, expected in zip(gradients(global_attention), gradients(reference.global_attention), strict=True):
        assert expected.abs().max() > 1e-3  # there is something to compare
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


def test_global_attention_of_views() -> None:
    """Heads that lie before tokens in memory, and one query for all: the same bits as of copies."""
    q, k, v = queries_keys_values((4, 8, 6, 30), torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for ours, wanted in zip(global_attention(q, *turned, scale=1), global_attention(q, k, v, scale=1), strict=True):
        assert torch.equal(ours, wanted)
    shared = global_attention(q[:1].expand(3, -1, -1), k, v, scale=1)
    for ours, wanted in zip(shared, global_attention(q[:1].repeat(3, 1, 1), k, v, scale=1), strict=True):
        assert torch.equal(ours, wanted)


def test_what_is_not_kept_changes_no_bit() -> None:
    q, k, v = queries_keys_values((4, 8, 6, 30), torch.float32)
    keep = torch.arange(30) < torch.tensor([[30], [1], [17]])
    other = [x.masked_fill(~keep[:, :, None, None], 1e15) for x in (k, v)]
    kept, seen = (global_attention(q, *pair, scale=0.3, keep=keep) for pair in ((k, v), other))
    assert torch.equal(kept[0], seen[0]) and torch.equal(kept[1], seen[1])
    assert torch.equal(kept[0][1], v[1, 0]) and torch.equal(kept[1][1, :, 0], torch.ones(4))


@each_shape
def test_attention_of_a_protein_in_any_batch(shape: tuple[int, int, int, int]) -> None:
    """Of its own width: the same bits. In a longer row only within rounding: its length decides how sums go."""
    q, k, v = queries_keys_values(shape, torch.float32)
    truth = reference.global_attention(q.double(), k.double(), v.double(), scale=0.3)
    whole = global_attention(q, k, v, scale=0.3)
    for rows in ([0], [2], [1, 0], [2, 2, 0, 1, 1]):
        part = global_attention(q[rows], k[rows], v[rows], scale=0.3)
        assert all(torch.equal(ours, wanted[rows]) for ours, wanted in zip(part, whole, strict=True)), rows
    for more in (1, 16, 501):
        longer = [F.pad(x, (0, 0, 0, 0, 0, more), value=3) for x in (k, v)]
        keep = torch.arange(shape[3] + more) < torch.full((3, 1), shape[3])
        mixed, maps = global_attention(q, *longer, scale=0.3, keep=keep)
        for found, wanted, exact in zip((mixed, maps[:, :, : shape[3]]), whole, truth, strict=True):
            # The noise floor is the error of the shorter row, and one rounding of the result.
            assert rms(found - wanted) <= 2 * (rms(wanted - exact) + rms(exact - exact.float())), more
