"""Triton's gated activations against the formula."""

import math

import pytest
import torch
from kernel_device import DEVICE
from kernel_errors import DTYPES, HALVES, ROUNDS_BFLOAT16, Fences, allowed, error, steps_apart
from torch import Tensor

from plm_kernels import GATES, Gate, gated, reference

pytest.importorskip("triton")

SHAPES = [(1, 1), (1, 3840), (5, 7), (33, 320), (2, 1024), (3, 1025), (0, 8), (4, 0)]


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def inputs(n: int, f: int, dtype: torch.dtype) -> Tensor:
    """``[n, 2 f]`` as columns of wider rows."""
    wide = torch.randn(n, 2 * f + 3, generator=torch.Generator().manual_seed(n + f), dtype=torch.float64) * 3
    return wide.to(dtype).to(DEVICE)[:, : 2 * f]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_equal_the_formula(shape: tuple[int, int], activation: Gate, dtype: torch.dtype) -> None:
    x = inputs(*shape, dtype)
    ours = gated(x, activation, backend="triton")
    assert ours.shape == shape
    assert ours.dtype == dtype
    if ours.numel():
        truth = reference.gated(x.double(), activation)
        assert error(ours, truth) <= allowed(reference.gated(x, activation), truth, exponentials=activation != "gelu")


@pytest.mark.parametrize("activation", GATES)
def test_pytorchs_gates_equal_the_formula(activation: Gate) -> None:
    """In place without gradients and fresh with them: the same bits, and the gradients of the formula."""
    x = inputs(33, 320, torch.float64).clone()
    truth = reference.gated(x, activation)
    assert error(gated(x, activation), truth) <= allowed(truth, truth)
    with torch.inference_mode(False), torch.enable_grad():
        leaf, same = (x.clone().requires_grad_() for _ in range(2))
        fresh = gated(leaf, activation)
        assert torch.equal(fresh, gated(x, activation))
        ours, wanted = (
            torch.autograd.grad(y.sum(), z)[0] for y, z in ((fresh, leaf), (reference.gated(same, activation), same))
        )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)  # sums of numbers up to 15: some 100 roundings


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", GATES)
def test_gates_against_pytorchs_in_half_precision(activation: Gate, dtype: torch.dtype) -> None:
    """PyTorch rounds the activated half and the product, the kernel the product alone."""
    x = inputs(33, 320, dtype)
    found, plain = (gated(x, activation, backend=backend) for backend in ("triton", "torch"))
    cut = dtype == torch.bfloat16 and not ROUNDS_BFLOAT16
    assert 0 < steps_apart(found, plain) <= 2 + cut


@pytest.mark.parametrize("activation", GATES)
def test_large_gates(activation: Gate) -> None:
    """What goes to infinity on the way, as an exponential does, does not come out."""
    gate = torch.tensor([1e4, 60.0, -60.0, -1e4, 3e12, -3e12], device=DEVICE)
    x = torch.stack((gate, torch.ones_like(gate)), -1)
    found = gated(x, activation, backend="triton")[:, 0]
    wanted = torch.tensor([1e4, 60.0, -60 * math.exp(-60) if activation == "silu" else 0, 0, 3e12, 0], device=DEVICE)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30)


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    x = inputs(9, 480, torch.float32)
    whole = gated(x, "gelu_tanh", backend="triton")
    for row in (0, 5, 8):
        assert torch.equal(gated(x[row : row + 1].clone(), "gelu_tanh", backend="triton")[0], whole[row])
    assert torch.equal(gated(x.T.contiguous().T, "gelu_tanh", backend="triton"), whole)


@pytest.mark.parametrize("shape", [(1, 3840), (5, 7), (3, 1025)], ids=str)
def test_nothing_is_written_beyond_the_result(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(*shape, torch.float32)
    fences = Fences(monkeypatch)
    gated(x, "silu", backend="triton")
    assert fences.stand()


def test_the_activations_are_told_apart() -> None:
    """Each is farther from the others, and from one with the halves exchanged, than the comparison allows."""
    x = inputs(33, 320, torch.float32)
    for activation in GATES:
        truth = reference.gated(x.double(), activation)
        bound = allowed(reference.gated(x, activation), truth, exponentials=activation != "gelu")
        for other in GATES:
            wrong = gated(x, other, backend="triton")
            assert (error(wrong, truth) > bound) == (other != activation)
        assert error(gated(x.roll(320, 1), activation, backend="triton"), truth) > bound


def test_wrong_arguments_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"\[n, 2 f\] and the activation one of \['gelu', .*got \[3, 4\], 'relu'"):
        gated(torch.zeros(3, 4), "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \[3, 5\], 'silu'"):
        gated(torch.zeros(3, 5), "silu")
