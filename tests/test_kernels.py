"""Every kernel against the plain formula in plm_kernels/reference.py: values, then gradients, at odd sizes first."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plm_kernels import (
    Activation,
    RelativeBias,
    attention,
    attention_backends,
    linear,
    pack_weight,
    packing_available,
    reference,
    rms_norm,
)
from plm_kernels.packed_attention import _hankel

CPU_BACKENDS = ("segments", "dense", "reference")
LENGTHS = [(1,), (63,), (5, 5, 5), (1, 111, 60), (2, 7, 7, 1, 64)]


def packed_qkv(lengths: tuple[int, ...], heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Strided q, k, v ``[n, 3, h, d]`` as a fused projection gives them, and offsets."""
    generator = torch.Generator().manual_seed(sum(lengths) * heads + size)
    qkv = torch.randn(sum(lengths), 3, heads, size, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def relative_bias(heads: int, reach: int, dtype: torch.dtype) -> RelativeBias:
    table = torch.randn(heads, 2 * reach + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return RelativeBias(table.to(dtype))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "L" + "-".join(map(str, lengths)))
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_attention_equals_the_formula(backend: str, lengths: tuple[int, ...], causal: bool, bias: bool) -> None:
    qkv, offsets = packed_qkv(lengths, heads=3, size=24, dtype=torch.float64)
    table = relative_bias(3, 9, torch.float64) if bias else None
    expected = reference.attention(*qkv.unbind(1), offsets, scale=0.3, causal=causal, bias=table)
    ours = attention(
        *qkv.unbind(1), offsets, scale=0.3, causal=causal, bias=table, max_length=max(lengths), backend=backend
    )
    # Float64 sums of at most 111 terms of size 1, in another order: a few hundred units of 2e-16.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_attention_in_low_precision_is_as_exact_as_the_formula(backend: str, dtype: torch.dtype) -> None:
    qkv, offsets = packed_qkv((1, 111, 60), heads=5, size=16, dtype=dtype)
    truth = reference.attention(*qkv.double().unbind(1), offsets, scale=0.25)
    formula = reference.attention(*qkv.unbind(1), offsets, scale=0.25)
    ours = attention(*qkv.unbind(1), offsets, scale=0.25, max_length=111, backend=backend)
    # The noise floor is the formula's own error in this dtype; twice that is allowed.
    assert (ours - truth).abs().max() <= 2 * (formula - truth).abs().max()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_attention_gradients_equal_the_formulas(backend: str, bias: bool) -> None:
    def gradients(name: str) -> list[Tensor]:
        qkv, offsets = packed_qkv((4, 4, 1, 13), heads=2, size=8, dtype=torch.float64)
        qkv.requires_grad_()
        table = relative_bias(2, 3, torch.float64)
        table.table.requires_grad_()
        out = attention(*qkv.unbind(1), offsets, scale=0.5, bias=table if bias else None, max_length=13, backend=name)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        return [qkv.grad, *([table.table.grad] if bias else [])]

    for ours, expected in zip(gradients(backend), gradients("reference"), strict=True):
        assert expected.abs().max() > 1e-3  # there is something to compare
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_attention_weights_are_those_that_attention_mixes_with() -> None:
    qkv, offsets = packed_qkv((17,), heads=2, size=8, dtype=torch.float64)
    q, k, v = qkv.unbind(1)
    weights = reference.attention_weights(q, k, scale=0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 17, dtype=torch.float64))
    mixed = torch.einsum("hqk,khd->qhd", weights, v)
    torch.testing.assert_close(mixed, attention(q, k, v, offsets, scale=0.5, max_length=17))


def test_a_sequence_never_sees_its_neighbour() -> None:
    """Replace one of three packed sequences by huge numbers: the other two keep every bit."""
    qkv, offsets = packed_qkv((6, 9, 4), heads=2, size=8, dtype=torch.float32)
    other = qkv.clone()
    other[6:15] = 1e15
    for backend in CPU_BACKENDS:
        kept = attention(*qkv.unbind(1), offsets, scale=0.3, max_length=9, backend=backend)
        seen = attention(*other.unbind(1), offsets, scale=0.3, max_length=9, backend=backend)
        rows = [*range(6), *range(15, 19)]
        assert torch.equal(kept[rows], seen[rows]), backend


def test_no_tokens_at_all() -> None:
    qkv = torch.empty(0, 3, 2, 8)
    for backend in CPU_BACKENDS:
        out = attention(*qkv.unbind(1), torch.tensor([0], dtype=torch.int32), scale=1, max_length=0, backend=backend)
        assert out.shape == (0, 2, 8)


def test_automatic_choice_of_a_backend() -> None:
    from plm_kernels.packed_attention import choose_backend

    on_cpu = torch.empty(1, 2, 16, dtype=torch.bfloat16)
    assert choose_backend(on_cpu, None) == "segments"
    assert choose_backend(torch.empty(1, 2, 16, device="meta"), None) == "dense"


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_called_as_torch_defines_it(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """The kernel itself needs CUDA. Here the arguments are bound to its real signature, and the formula answers."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    real = inspect.signature(varlen.varlen_attn)

    def formula(*args: object, **kwargs: object) -> Tensor:
        call = real.bind(*args, **kwargs).arguments
        assert call["cu_seq_q"].dtype == torch.int32
        assert call["max_q"] == call["max_k"] == 60
        q, k, v = call["query"], call["key"], call["value"]
        assert call["window_size"] == ((-1, 0) if causal else (-1, -1))
        return reference.attention(q, k, v, call["cu_seq_q"], scale=call["scale"], causal=causal)

    monkeypatch.setattr(varlen, "varlen_attn", formula)
    qkv, offsets = packed_qkv((1, 60, 7), heads=2, size=16, dtype=torch.float64)
    ours = attention(*qkv.unbind(1), offsets, scale=0.2, causal=causal, max_length=60, backend="varlen")
    expected = attention(*qkv.unbind(1), offsets, scale=0.2, causal=causal, max_length=60)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="takes no bias"):
        bias = relative_bias(2, 3, torch.float64)
        attention(*qkv.unbind(1), offsets, scale=1, bias=bias, max_length=60, backend="varlen")


def test_wrong_arguments_say_what_is_wrong() -> None:
    qkv, offsets = packed_qkv((3,), heads=2, size=8, dtype=torch.float32)
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match=r"q must be.*\[3, 2, 8\], \[3, 2, 4\]"):
        attention(q, k[..., :4], v, offsets, scale=1, max_length=3)
    with pytest.raises(ValueError, match=r"'flash' is unknown.*segments"):
        attention(q, k, v, offsets, scale=1, max_length=3, backend="flash")
    with pytest.raises(ValueError, match="cover 2 keys; k has 3"):
        attention(q, k, v, offsets, scale=1, max_length=2, backend="dense")
    with pytest.raises(ValueError, match=r"\[h, 2 D \+ 1\].*\[2, 4\]"):
        RelativeBias(torch.zeros(2, 4))
    assert set(CPU_BACKENDS) < set(attention_backends())


CROSS = [((1,), (63,)), ((63,), (1,)), ((5, 5, 5), (7, 7, 7)), ((4, 4, 4), (9, 9, 2)), ((1, 30, 2), (60, 1, 111))]


@pytest.mark.parametrize("lengths", CROSS, ids=lambda lengths: "-".join(map(str, lengths)))
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_attention_to_another_batch_equals_the_formula(backend: str, lengths: Any) -> None:
    """Each sequence to its partner, values and gradients; equal lengths with equal partners go together."""
    own, partners = lengths

    def everything(name: str) -> list[Tensor]:
        q, k, v, offsets, key_offsets = cross_qkv(own, partners, torch.float64)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if name == "reference":
            out = reference.attention(*leaves, offsets, scale=0.3, key_offsets=key_offsets)
        else:
            there = {"key_offsets": key_offsets, "max_key_length": max(partners)}
            out = attention(*leaves, offsets, scale=0.3, max_length=max(own), **there, backend=name)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for ours, expected in zip(everything(backend), everything("reference"), strict=True):
        # Float64 sums of at most 111 terms of size 1, in another order.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def cross_qkv(own: tuple[int, ...], partners: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q of one batch, k and v of another, and the offsets of both."""
    (first, offsets), (second, key_offsets) = (packed_qkv(x, 3, 24, dtype) for x in (own, partners))
    return first[:, 0].clone(), second[:, 1].clone(), second[:, 2].clone(), offsets, key_offsets


def test_a_sequence_never_sees_its_neighbours_partner() -> None:
    q, k, v, offsets, key_offsets = cross_qkv((6, 9, 4), (5, 3, 5), torch.float32)
    strange_k, strange_v = k.clone(), v.clone()
    strange_k[5:8], strange_v[5:8] = 1e15, 1e15
    rows = [*range(6), *range(15, 19)]
    for backend in CPU_BACKENDS:
        kept, seen = (
            attention(
                q, *pair, offsets, scale=1, max_length=9, key_offsets=key_offsets, max_key_length=5, backend=backend
            )
            for pair in ((k, v), (strange_k, strange_v))
        )
        assert torch.equal(kept[rows], seen[rows]), backend
        assert not torch.equal(kept, seen), backend


def test_a_band_holds_all_that_the_dense_bias_holds() -> None:
    """``[h, 2 t - 1]`` numbers laid out as ``[h, t, t]`` without a copy, shorter and longer than the table reaches."""
    bias = relative_bias(3, 9, torch.float64)
    for length in (1, 2, 9, 10, 11, 50):
        for causal in (False, True):
            band = bias.band(length, causal, torch.float64)
            assert band is bias.band(length, causal, torch.float64)  # every layer of a stack asks for it
            hankel = _hankel(band, length)
            assert hankel.untyped_storage().data_ptr() == band.untyped_storage().data_ptr()
            dense = bias.dense(length)
            if causal:
                dense = dense.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            assert torch.equal(hankel[0].flip(1), dense)


def test_the_sign_of_a_distance() -> None:
    """``key - query``: the table's last column is for keys far behind the query, in the direction of the text."""
    bias = RelativeBias(torch.tensor([[10.0, 20.0, 30.0]]))
    assert bias.dense(3).tolist() == [[[20, 30, 30], [10, 20, 30], [10, 10, 20]]]
    assert bias.at(torch.tensor([-7, -1, 0, 1, 7])).tolist() == [[10, 10, 20, 30, 30]]


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_gradients_through_a_relative_bias(backend: str, causal: bool) -> None:
    """Of the table as well, whose edges many distances share; each value is used by several sequences."""

    def gradients(name: str) -> list[Tensor]:
        qkv, offsets = packed_qkv((4, 4, 1, 13), heads=2, size=8, dtype=torch.float64)
        qkv.requires_grad_()
        bias = relative_bias(2, 3, torch.float64)
        bias.table.requires_grad_()
        out = attention(*qkv.unbind(1), offsets, scale=0.5, causal=causal, bias=bias, max_length=13, backend=name)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        return [qkv.grad, bias.table.grad]

    for ours, expected in zip(gradients(backend), gradients("reference"), strict=True):
        assert expected.abs().max() > 1e-3  # there is something to compare
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_a_large_bias_stays_in_float32(causal: bool) -> None:
    """Tokens in bfloat16 and a bias of up to 16 in float32, where bfloat16 would round it to sixteenths."""
    qkv, offsets = packed_qkv((1, 111, 60), heads=5, size=16, dtype=torch.bfloat16)
    table = relative_bias(5, 64, torch.float32).table * 4

    def run(x: Tensor, table: Tensor, backend: str = "reference") -> Tensor:
        bias = RelativeBias(table)
        return attention(*x.unbind(1), offsets, scale=0.25, causal=causal, bias=bias, max_length=111, backend=backend)

    def error(found: Tensor) -> Tensor:
        return (found - run(qkv.double(), table.double())).square().mean().sqrt()

    # The noise floor is the formula's own error in bfloat16; twice that is allowed, and less than a rounded bias costs.
    allowed = 2 * error(run(qkv, table))
    assert error(run(qkv, table, "segments")) <= allowed < error(run(qkv.double(), table.bfloat16().double()))


class LargestStorage(TorchDispatchMode):
    """Remembers the largest piece of memory, in bytes, behind anything that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = call(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bias_of_quadratic_size(causal: bool, dtype: torch.dtype) -> None:
    """Neither a bias nor a mask nor a map of ``t x t`` numbers is made. The dense backend makes one, and is seen."""
    length = 700
    qkv, offsets = packed_qkv((length, length, 20), heads=2, size=8, dtype=dtype)
    bias = relative_bias(2, 128, torch.float32)
    how = {"scale": 1, "causal": causal, "bias": bias, "max_length": length}
    with torch.no_grad(), LargestStorage() as largest:
        attention(*qkv.unbind(1), offsets, **how, backend="segments")
    assert largest.bytes < length * length  # not even one byte for each pair of tokens
    with torch.no_grad(), LargestStorage() as largest:
        attention(*qkv.unbind(1), offsets, **how, backend="dense")
    assert largest.bytes >= 2 * length * length


def test_wrong_arguments_of_attention_to_another_batch() -> None:
    q, k, v, offsets, key_offsets = cross_qkv((6, 9), (5, 3), torch.float32)
    there = {"key_offsets": key_offsets, "max_key_length": 5}
    for wrong in ({"causal": True}, {"bias": relative_bias(3, 4, torch.float32)}, {"max_key_length": None}):
        with pytest.raises(ValueError, match="with key_offsets give max_key_length as well, and neither causal nor"):
            attention(q, k, v, offsets, scale=1, max_length=9, **there | wrong)
    with pytest.raises(
        ValueError, match=r"without key_offsets q, k and v must share one shape.*\[15, 3, 24\], \[8, 3,"
    ):
        attention(q, k, v, offsets, scale=1, max_length=9)
    with pytest.raises(ValueError, match="q must be"):
        attention(q, k, v[:-1], offsets, scale=1, max_length=9, **there)
    with pytest.raises(ValueError, match="q must be"):
        attention(q[:, :2], k, v, offsets, scale=1, max_length=9, **there)
    with pytest.raises(ValueError, match="2 sequences of q and 1 of k and v"):
        attention(q, k, v, offsets, scale=1, max_length=9, **there | {"key_offsets": key_offsets[:2]})


@pytest.mark.skipif(not packing_available(), reason="this torch build has no oneDNN")
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 52), (320, 960), (640, 33)])
def test_packed_linear(inputs: int, outputs: int, activation: Activation) -> None:
    """Values as exact as torch's own, and the same bits for a row however many rows there are."""
    generator = torch.Generator().manual_seed(inputs)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((260, inputs), (outputs, inputs), (outputs,)))
    packed = pack_weight(weight)
    assert packed is not None

    def formula(dtype: torch.dtype) -> Tensor:
        y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        gelu, sigmoid = y * 0.5 * (1 + torch.erf(y / 2**0.5)), 1 / (1 + torch.exp(-y))
        inner = (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)
        gelu_tanh = y * 0.5 * (1 + torch.tanh(inner))
        return {
            "none": y,
            "gelu": gelu,
            "gelu_tanh": gelu_tanh,
            "relu": y * (y > 0),
            "sigmoid": sigmoid,
            "tanh": torch.tanh(y),
        }[activation]

    with torch.inference_mode():
        whole = linear(x, packed, bias, activation)
        truth, plain = formula(torch.float64), formula(torch.float32)
        # The noise floor is torch's own error in float32. Which kernel adds in which order is up to the CPU: the root
        # mean squares are within a factor of 1.6 on one with AVX-512, the largest of the single errors are not.
        assert (whole - truth).square().mean().sqrt() <= 2 * (plain - truth).square().mean().sqrt()
        for rows in (0, 1, 2, 3, 17, 128, 259):
            assert torch.equal(linear(x[:rows], packed, bias, activation), whole[:rows]), rows


@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (33, 768)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_formula(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Both ways, with gradients and without; rows of zeros and of tiny numbers, where eps counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    x[0] *= 1e-4
    x, weight = x.to(dtype), torch.randn(shape[1], generator=generator, dtype=torch.float64).to(dtype)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
    formula = reference.rms_norm(x, weight, 1e-6).double()
    # The noise floor: what rounding to the dtype costs the formula itself; in float64 a few units in the last place.
    floor = (formula - truth).square().mean().sqrt() + 1e-15 * truth.abs().max()
    with torch.inference_mode():
        fast = rms_norm(x, weight, 1e-6).double()
    with torch.enable_grad():
        plain = rms_norm(x, weight.requires_grad_(), 1e-6).double()
    for ours in (fast, plain.detach()):
        assert (ours - truth).square().mean().sqrt() <= 2 * floor
