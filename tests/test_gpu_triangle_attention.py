"""Triton's triangle attention against the formula, and in ESMFold's module in both directions."""

from functools import partial

import pytest
import torch
from kernel_device import DEVICE, HALF
from kernel_errors import allowed, error
from kernel_triangles import SIZES, gate_of, normal, updates
from torch import Tensor

from plm.esmfold.pair import TriangleAttention
from plm_kernels import reference, triangle_attention

pytest.importorskip("triton")

# Rows, residues, heads, head size: also more than one tile of queries, whole tiles, head sizes that fill no tile.
SHAPES = [(3, length, 4, 32) for length in SIZES] + [(2, 130, 1, 32), (1, 64, 2, 16), (2, 7, 2, 3), (2, 9, 1, 24)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Inputs:
    """q, k, v as views of one product; a bias; logits of the gate."""
    rows, length, heads, d = shape
    q, k, v = normal(rows, length, 3, heads, d, dtype=dtype).unbind(2)
    return q, k, v, normal(heads, length, length, dtype=dtype) * 2, normal(rows * length, heads * d, dtype=dtype)


def wanted(given: Inputs, dtype: torch.dtype = torch.float64) -> Tensor:
    return reference.triangle_attention(*(x.to(dtype) for x in given), scale=0.3)


def kernel(given: Inputs) -> Tensor:
    *tensors, gate = given
    return triangle_attention(*tensors, gate_of(gate), scale=0.3, backend="triton")


@each_shape
@each_dtype
def test_it_equals_the_formula(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = inputs(shape, dtype)
    ours, truth = kernel(given), wanted(given)
    assert ours.shape == (shape[0] * shape[1], shape[2] * shape[3]) and ours.dtype == dtype
    assert error(ours, truth) <= allowed(wanted(given, dtype), truth, exponentials=True)


@each_dtype
def test_without_a_gate(dtype: torch.dtype) -> None:
    q, k, v, bias, _ = inputs((2, 17, 2, 32), dtype)
    truth = reference.triangle_attention(q.double(), k.double(), v.double(), bias.double(), scale=0.3)
    floor = allowed(reference.triangle_attention(q, k, v, bias, scale=0.3), truth, exponentials=True)
    assert error(triangle_attention(q, k, v, bias, scale=0.3, backend="triton"), truth) <= floor


@each_dtype
def test_logits_that_overflow_an_exponential(dtype: torch.dtype) -> None:
    """e^89 is beyond float32. A bias of thousands leaves one key to each query, or the first of two tiles' none."""
    q, k, v, bias, gate = inputs((2, 70, 1, 32), dtype)
    bias = bias * 1000
    bias[:, :9, :66] -= 20_000
    given = q, k, v, bias, gate
    truth = wanted(given)
    assert truth.isfinite().all()
    assert error(kernel(given), truth) <= allowed(wanted(given, dtype), truth, exponentials=True)


def test_views_are_read_as_their_copies() -> None:
    """Transposed rows and tokens, each of q, k, v with other strides, a bias and a gate in other orders."""
    q, k, v, bias, gate = inputs((17, 17, 2, 32), torch.float32)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    odd = [q, turned[1], torch.cat((v, v), -1)[..., 32:]]
    last = torch.stack((q, q, q), -1)[..., 1]
    others = bias.mT.contiguous().mT, gate.T.contiguous().T
    expected = kernel((q, k, v, bias, gate))
    for some in (turned, odd, [last, k, v]):
        assert torch.equal(kernel((*some, *others)), expected)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    q, k, v, bias, gate = inputs((5, 33, 2, 32), HALF)
    whole = kernel((q, k, v, bias, gate)).view(5, 33, 64)
    for some in (slice(0, 1), slice(3, 5)):
        part = kernel((q[some], k[some], v[some], bias, gate.view(5, 33, 64)[some].flatten(0, 1)))
        assert torch.equal(part.view(-1, 33, 64), whole[some])


def test_no_rows() -> None:
    q, k, v, bias, gate = inputs((0, 5, 2, 32), torch.float32)
    assert kernel((q, k, v, bias, gate)).shape == (0, 64)


def test_mistakes_are_caught() -> None:
    """A bias of (k, j), keys for queries, a bias of another head, and a gate that is not opened."""
    q, k, v, bias, gate = given = inputs((3, 33, 4, 32), torch.float32)
    truth, floor = wanted(given), allowed(wanted(given, torch.float32), wanted(given))
    for wrong in (
        (q, k, v, bias.mT, gate),
        (k, q, v, bias, gate),
        (q, k, v, bias.roll(1, 0), gate),
        (q, k, v, bias, torch.full_like(gate, 30)),
    ):
        assert error(kernel(wrong), truth) > 1000 * floor


# In the module


def attention(ending: bool) -> partial[TriangleAttention]:
    return partial(TriangleAttention, 64, 32, ending)


@pytest.mark.parametrize("ending", [False, True], ids=["starting", "ending"])
@pytest.mark.parametrize("rows", [99, 7])
@pytest.mark.parametrize("length", SIZES)
@each_dtype
def test_the_module(dtype: torch.dtype, length: int, rows: int, ending: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 pairs and weights of either precision, all rows at once and some at a time."""
    ours, plain, truth, served = updates(attention(ending), length, 64, rows, dtype, monkeypatch)
    assert {"triangle_attention", "pair_norm"} == set(served)
    assert error(ours, truth) <= allowed(plain, truth, exponentials=True)


def test_the_other_direction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, _, _ = updates(attention(False), 17, 64, 17, torch.float32, monkeypatch)
    _, plain, truth, _ = updates(attention(True), 17, 64, 17, torch.float32, monkeypatch)
    assert error(ours, truth) > 1000 * allowed(plain, truth)


# Who serves


def test_float64_and_gradients_are_pytorchs() -> None:
    """Also on a GPU: the kernel has no gradient, and float64 is what it is compared with."""
    q, k, v, bias, gate = inputs((2, 5, 2, 32), torch.float64)
    truth = wanted((q, k, v, bias, gate))
    # Float64 sums of five terms of size 1, in another order.
    torch.testing.assert_close(triangle_attention(q, k, v, bias, gate_of(gate), scale=0.3), truth, rtol=0, atol=1e-14)
    with torch.inference_mode(False):
        q, k, v, bias, gate = (x.clone().requires_grad_() for x in inputs((2, 5, 2, 32), torch.float32))
        with torch.enable_grad():
            triangle_attention(q, k, v, bias, gate_of(gate), scale=0.3).sum().backward()
        assert all(x.grad is not None for x in (q, k, v, bias, gate))


def test_a_cpu_is_served_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("this is one with a GPU")
    monkeypatch.setattr("plm_kernels.gpu.triangle_attention.triangle_attention", None)
    *tensors, gate = inputs((2, 5, 2, 32), torch.float32)
    triangle_attention(*tensors, gate_of(gate), scale=0.3)
