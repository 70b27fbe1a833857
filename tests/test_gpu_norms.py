"""Triton's norms against the formula: values, strides, roundings, and bits that do not depend on the batch."""

import pytest
import torch
from kernel_device import DEVICE
from kernel_errors import DTYPES, HALVES, ROUNDS_BFLOAT16, Fences, allowed, error, steps_apart
from torch import Tensor

from plm_kernels import add_layer_norm, add_rms_norm, backends, layer_norm, reference, rms_norm

pytest.importorskip("triton")

SHAPES = [(1, 1), (1, 320), (5, 7), (3, 480), (33, 320), (2, 1536), (2, 3840), (0, 64)]
EPS = 1e-5


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def inputs(n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and delta ``[n, c]`` as columns of wider rows, weight and bias. One row is tiny, so that eps counts."""
    generator = torch.Generator().manual_seed(n + c)
    wide = torch.randn(n, 2 * c + 3, generator=generator, dtype=torch.float64) * 3 + 1
    wide[:1] *= 1e-3
    weight, bias = torch.randn(2, c, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    x, delta, _ = wide.to(dtype).to(DEVICE).split((c, c, 3), dim=1)
    return x, delta, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_equal_the_formulas(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, delta, weight, bias = inputs(*shape, dtype)
    total = x + delta
    normed = layer_norm(x, weight, bias, EPS, backend="triton")
    of_sum = layer_norm(x, weight, bias, EPS, delta=delta, backend="triton")
    added, also = add_layer_norm(x, delta, weight, bias, EPS, backend="triton")
    scaled = rms_norm(x, weight, EPS, backend="triton")
    rms_added, rms_also = add_rms_norm(x, delta, weight, EPS, backend="triton")
    assert {y.shape for y in (normed, of_sum, added, also, scaled, rms_added, rms_also)} == {x.shape}
    if not len(x):
        return
    assert torch.equal(also, of_sum)
    assert torch.equal(rms_added, added)
    if dtype != torch.bfloat16 or ROUNDS_BFLOAT16:
        assert torch.equal(added, total)  # a residual stream keeps the bits that it has without the kernel
    else:
        assert steps_apart(added, total) <= 1
    for ours, y in ((normed, x), (also, added)):
        truth = reference.layer_norm(y.double(), weight.double(), bias.double(), EPS)
        assert error(ours, truth) <= allowed(reference.layer_norm(y, weight, bias, EPS), truth)
    for ours, y in ((scaled, x), (rms_also, added)):
        truth = reference.rms_norm(y.double(), weight.double(), EPS)
        assert error(ours, truth) <= allowed(reference.rms_norm(y, weight, EPS), truth)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norms_against_pytorchs_in_half_precision(dtype: torch.dtype) -> None:
    """The same float32 statistics, rounded once: at most the neighbouring number. PyTorch's RMS norm rounds twice."""
    x, delta, weight, _ = inputs(33, 320, dtype)
    cut = dtype == torch.bfloat16 and not ROUNDS_BFLOAT16
    pairs = [add_layer_norm(x, delta, weight, None, EPS, backend=backend) for backend in ("triton", "torch")]
    if not cut:
        assert torch.equal(pairs[0][0], pairs[1][0])
        assert steps_apart(pairs[0][1], pairs[1][1]) <= 1
    # Here of a sum that is the same to both, which cutting does not promise.
    for apart, first, second in (
        (1, *(layer_norm(x, weight, None, EPS, backend=backend) for backend in ("triton", "torch"))),
        (2, *(rms_norm(x, weight, EPS, backend=backend) for backend in ("triton", "torch"))),
    ):
        assert steps_apart(first, second) <= apart + cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [320, 1536])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(channels: int, dtype: torch.dtype) -> None:
    x, delta, weight, bias = inputs(9, channels, dtype)
    whole = add_layer_norm(x, delta, weight, bias, EPS, backend="triton")
    for rows in (slice(0, 1), slice(5, 6), slice(8, 9), slice(2, 7)):
        alone = add_layer_norm(x[rows].clone(), delta[rows].clone(), weight, bias, EPS, backend="triton")
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, whole, strict=True))


def test_rows_in_any_layout() -> None:
    """Channels that do not lie side by side, rows that overlap, and a weight in another dtype than the rows."""
    x, delta, weight, bias = inputs(5, 7, torch.float32)
    flipped = x.T.contiguous().T
    wanted = add_layer_norm(x, delta, weight, bias, EPS, backend="triton")
    for first, second in ((flipped, delta), (x, delta.T.contiguous().T)):
        found = add_layer_norm(first, second, weight, bias, EPS, backend="triton")
        assert all(map(torch.equal, found, wanted))
    one = x[:1].expand(5, -1)
    assert torch.equal(rms_norm(one, weight, EPS, backend="triton")[4], rms_norm(x, weight, EPS, backend="triton")[0])
    widened = layer_norm(x, weight.double(), bias.double(), EPS, backend="triton")
    torch.testing.assert_close(widened, layer_norm(x, weight, bias, EPS, backend="triton"))


def test_what_does_not_fit_is_pytorchs() -> None:
    """Regression: rows that are no matrix marked the kernel as broken for the whole process. Also a wider, a shorter
    and a foreign second tensor, whole numbers, and a weight of another length, which PyTorch refuses."""
    x, delta, weight, bias = inputs(6, 7, torch.float32)
    cube = x.view(2, 3, 7)
    for backend in ("auto", "triton"):
        found = layer_norm(cube, weight, bias, EPS, delta=delta.reshape(2, 3, 7), backend=backend)
        assert torch.equal(found, layer_norm(cube, weight, bias, EPS, delta=delta.reshape(2, 3, 7), backend="torch"))
        assert rms_norm(cube, weight, EPS, backend=backend).shape == (2, 3, 7)
        assert add_rms_norm(x, delta.double(), weight.double(), EPS, backend=backend)[1].dtype == torch.float64
        assert add_layer_norm(x, delta[:1], weight, bias, EPS, backend=backend)[0].shape == (6, 7)
        for wrong in (weight[:3], torch.ones(7, device="meta")):
            with pytest.raises((RuntimeError, ValueError)):
                add_layer_norm(x, delta.to(wrong.device), wrong, bias, EPS, backend=backend)
    assert "norm" not in backends.broken()


@pytest.mark.parametrize("shape", [(1, 320), (5, 480), (9, 7)], ids=str)
def test_nothing_is_written_beyond_the_results(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, delta, weight, bias = inputs(*shape, torch.float32)
    fences = Fences(monkeypatch)
    add_layer_norm(x, delta, weight, bias, EPS, backend="triton")
    assert len(fences.made) == 2
    assert fences.stand()


def test_a_wrong_norm_is_told_from_a_right_one() -> None:
    """Each fault is larger than what the comparison allows."""
    x, delta, weight, bias = inputs(33, 320, torch.float32)
    exact = [y.double() for y in (x, weight, bias)]
    truth = reference.layer_norm(*exact, EPS)
    bound = allowed(reference.layer_norm(x, weight, bias, EPS), truth)
    rms_truth = reference.rms_norm(*exact[:2], EPS)
    rms_bound = allowed(reference.rms_norm(x, weight, EPS), rms_truth)
    assert error(layer_norm(x, weight, bias, 1.1 * EPS, backend="triton"), truth) > bound
    assert error(layer_norm(x, weight, bias, EPS, delta=1e-5 * delta, backend="triton"), truth) > bound
    assert error(layer_norm(x, weight, None, EPS, backend="triton"), truth) > bound
    assert error(rms_norm(x, weight, 1.1 * EPS, backend="triton"), rms_truth) > rms_bound
    assert error(layer_norm(x, weight, None, EPS, backend="triton"), rms_truth) > rms_bound
    biased = x.var(-1, keepdim=True, correction=1)  # over one channel less
    assert error((x - x.mean(-1, keepdim=True)) * (biased + EPS).rsqrt() * weight + bias, truth) > bound
