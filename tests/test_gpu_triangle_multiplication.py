"""Triton's kernels around triangle multiplication against the formulas, and in ESMFold's module in both directions."""

from functools import partial

import pytest
import torch
from kernel_device import DEVICE, HALF
from kernel_errors import allowed, error
from kernel_triangles import SIZES, gate_of, normal, updates
from torch import Tensor

from plm.esmfold.pair import TriangleMultiplication
from plm_kernels import add_gated, empty_sides, pair_norm, reference, triangle_norm, write_sides
from plm_kernels.triangle_multiplication import ALIGNED

pytest.importorskip("triton")

# Rows, residues, channels: also more than one tile of tokens or of channels, and channels that fill no tile.
SHAPES = [(3, length, 128) for length in SIZES] + [(2, 70, 6), (1, 65, 24), (1, 3, 1024), (2, 64, 64)]
EPS = 1e-5
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def affine(c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = normal(2, c, dtype=dtype, seed=3)
    return weight, bias


def pairs(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Of any size and far from zero, and the first so small that eps counts."""
    z = 30 * normal(*shape) + 10
    z[:1, :1] = normal(*shape)[:1, :1] * 1e-3
    return z.to(dtype)


@each_shape
@each_dtype
@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "float32 pairs"])
def test_pair_norm(shape: tuple[int, int, int], dtype: torch.dtype, wide: bool) -> None:
    """Also of rows of transposed pairs, of some channels, and of residues ``[l, c]``."""
    z, (weight, bias) = pairs(shape, torch.float32 if wide else dtype), affine(shape[2], dtype)
    exact = weight.double(), bias.double(), EPS
    turned = z.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (z, turned, turned[1:], torch.cat((z, z), -1)[..., shape[2] :], z[0], z[:0]):
        ours, truth = pair_norm(x, weight, bias, EPS, backend="triton"), reference.pair_norm(x.double(), *exact)
        assert ours.dtype == dtype and ours.shape == x.shape and ours.is_contiguous()
        if x.numel():
            assert error(ours, truth) <= allowed(reference.pair_norm(x, weight, bias, EPS), truth)


@each_shape
@each_dtype
@pytest.mark.parametrize("beyond", [0, 3, ALIGNED], ids="{}_more".format)
def test_triangle_norm(shape: tuple[int, int, int], dtype: torch.dtype, beyond: int) -> None:
    """Of some rows of a wider matrix per channel: what is behind its columns is not seen."""
    rows, length, c = shape
    product, (weight, bias) = normal(c, rows + 2, length + beyond, dtype=dtype), affine(c, dtype)
    product[..., length:] = torch.nan
    x = product[:, 1 : rows + 1]
    last_first = x[..., :length].permute(1, 2, 0).flatten(0, 1)
    truth = reference.pair_norm(last_first.double(), weight.double(), bias.double(), EPS)
    for some in (x, x.mT.contiguous().mT):
        ours = triangle_norm(some, length, weight, bias, EPS, backend="triton")
        assert ours.shape == (rows * length, c) and ours.dtype == dtype
        assert error(ours, truth) <= allowed(reference.pair_norm(last_first, weight, bias, EPS), truth)
    assert triangle_norm(x[:, :0], length, weight, bias, EPS, backend="triton").shape == (0, c)


@each_shape
@each_dtype
def test_sides(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Written into some rows, with zeros behind; other rows stay."""
    rows, length, c = shape
    x, gate = normal(rows * length, c, dtype=dtype), normal(rows * length, c, dtype=dtype, seed=1)
    truth = reference.triangle_sides(x.double(), gate.double(), length)
    floor = allowed(reference.triangle_sides(x, gate, length), truth, exponentials=True)
    for width in (length, length + 3, length + ALIGNED):
        sides = torch.full((c, rows + 2, width), 7, dtype=dtype, device=DEVICE)
        write_sides(sides[:, 1 : rows + 1], x.T.contiguous().T, gate_of(gate), backend="triton")
        assert error(sides[:, 1 : rows + 1, :length], truth) <= floor
        assert not sides[:, 1 : rows + 1, length:].any()
        assert (sides[:, 0] == 7).all() and (sides[:, -1] == 7).all()


@pytest.mark.parametrize("length", [*SIZES, 16])
def test_room_for_sides(length: int) -> None:
    """Aligned for kernels, as large as it must be for a CPU; and a product of what is padded has the same numbers."""
    like = torch.empty(0, device=DEVICE)
    room = empty_sides(4, length, like, backend="triton")
    assert room.shape[1] == room.shape[2] == -(-length // 16) * 16
    assert not room[:, length:].any()
    assert empty_sides(4, length, torch.empty(0)).shape == (4, length, length)
    x, gate = normal(length * length, 4, dtype=torch.float32), normal(length * length, 4, dtype=torch.float32, seed=1)
    write_sides(room[:, :length], x, gate_of(gate), backend="triton")
    a, b = room.double().chunk(2)
    true_a, true_b = reference.triangle_sides(x.double(), gate.double(), length).chunk(2)
    for product, outgoing in ((a @ b.mT, True), (a.mT @ b, False)):
        truth = reference.triangle_product(true_a, true_b, outgoing)
        # Float32 sides: a rounding or two of each factor of up to 33 terms.
        torch.testing.assert_close(product[:, :length, :length], truth, rtol=0, atol=1e-5)
        assert not product[:, length:].any() and not product[..., length:].any()


@each_shape
@each_dtype
@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "float32 pairs"])
def test_add_gated(shape: tuple[int, int, int], dtype: torch.dtype, wide: bool) -> None:
    """Into pairs, into some rows of transposed ones, and nowhere else."""
    rows, length, c = shape
    x, gate = normal(rows * length, c, dtype=dtype), normal(rows * length, c, dtype=dtype, seed=1)
    z = normal(rows, length, c, dtype=torch.float32 if wide else dtype, seed=2)
    truth = reference.add_gated(z.double(), x.double(), gate.double())
    floor = allowed(reference.add_gated(z, x, gate), truth, exponentials=True)
    large = torch.full((length, rows + 2, c), 7, dtype=z.dtype, device=DEVICE)
    for some in (z.clone(), large.transpose(0, 1)[1:-1]):
        some.copy_(z)
        add_gated(some, x, gate_of(gate), backend="triton")
        assert error(some, truth) <= floor
    assert (large[:, 0] == 7).all() and (large[:, -1] == 7).all()
    add_gated(z[:0], x[:0], gate_of(gate[:0]), backend="triton")


def test_layouts_that_kernels_cannot_write() -> None:
    x = normal(6, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="numbers of a row of sides must lie side by side"):
        write_sides(x.new_empty(4, 3, 2).mT, x, gate_of(x), backend="triton")
    with pytest.raises(ValueError, match="channels of pairs must lie side by side"):
        add_gated(x.new_empty(4, 3, 2).permute(1, 2, 0), x, gate_of(x), backend="triton")


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    x, gate = normal(5 * 17, 128, dtype=HALF), normal(5 * 17, 128, dtype=HALF, seed=1)
    z, (weight, bias) = normal(5, 17, 128, dtype=torch.float32), affine(128, HALF)
    normed, whole = pair_norm(z, weight, bias, EPS, backend="triton"), z.clone()
    add_gated(whole, x, gate_of(gate), backend="triton")
    for some in (slice(0, 1), slice(3, 5)):
        assert torch.equal(pair_norm(z[some], weight, bias, EPS, backend="triton"), normed[some])
        part = z[some].clone()
        of_part = (y.view(5, 17, 128)[some].flatten(0, 1) for y in (x, gate))
        add_gated(part, next(of_part), gate_of(next(of_part)), backend="triton")
        assert torch.equal(part, whole[some])


def test_mistakes_are_caught() -> None:
    """Sides of transposed pairs, a gate that is open, a norm with another eps or without its centre."""
    x, gate = normal(25, 8, dtype=torch.float32), normal(25, 8, dtype=torch.float32, seed=1)
    truth = reference.triangle_sides(x.double(), gate.double(), 5)
    floor = allowed(reference.triangle_sides(x, gate, 5), truth)
    for wrong in ((x, gate.view(5, 5, 8).transpose(0, 1).flatten(0, 1)), (x, torch.full_like(gate, 30))):
        sides = torch.empty(8, 5, 5, device=DEVICE)
        write_sides(sides, wrong[0], gate_of(wrong[1]), backend="triton")
        assert error(sides, truth) > 1000 * floor
    z, (weight, bias) = pairs((3, 17, 8), torch.float32), affine(8, torch.float32)
    exact = reference.pair_norm(z.double(), weight.double(), bias.double(), EPS)
    floor = allowed(reference.pair_norm(z, weight, bias, EPS), exact)
    assert error(pair_norm(z, weight, bias, EPS / 2, backend="triton"), exact) > 1000 * floor
    ours = pair_norm(z + z.mean(), weight, bias, EPS, backend="triton")
    assert error(ours, reference.pair_norm(z.double() / 2, weight.double(), bias.double(), EPS)) > 10 * floor


# In the module


def multiplication(outgoing: bool) -> partial[TriangleMultiplication]:
    return partial(TriangleMultiplication, 64, outgoing)


@pytest.mark.parametrize("outgoing", [False, True], ids=["incoming", "outgoing"])
@pytest.mark.parametrize("rows", [99, 7])
@pytest.mark.parametrize("length", SIZES)
@each_dtype
def test_the_module(
    dtype: torch.dtype, length: int, rows: int, outgoing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 pairs and weights of either precision, all rows at once and some at a time."""
    ours, plain, truth, served = updates(multiplication(outgoing), length, 64, rows, dtype, monkeypatch)
    assert {"pair_norm", "triangle_sides", "add_gated"} == set(served)
    assert error(ours, truth) <= allowed(plain, truth, exponentials=True)


def test_more_rows_than_a_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products, whose second begins behind row 64."""
    part = partial(TriangleMultiplication, 16, True)
    ours, plain, truth, _ = updates(part, 70, 16, 40, torch.float32, monkeypatch)
    assert error(ours, truth) <= allowed(plain, truth, exponentials=True)


def test_the_other_direction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, _, _ = updates(multiplication(False), 17, 64, 17, torch.float32, monkeypatch)
    _, plain, truth, _ = updates(multiplication(True), 17, 64, 17, torch.float32, monkeypatch)
    assert error(ours, truth) > 1000 * allowed(plain, truth)


def test_float64_is_pytorchs() -> None:
    """Also on a GPU: it is what kernels are compared with."""
    z, (weight, bias) = normal(3, 5, 8), affine(8, torch.float64)
    x, gate = normal(15, 8), normal(15, 8, seed=1)
    # Float64 sums of eight terms of size 1, in another order.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-13)
    close(pair_norm(z, weight, bias, EPS), reference.pair_norm(z, weight, bias, EPS))
    sides = torch.empty(8, 3, 6, dtype=torch.float64, device=DEVICE)
    write_sides(sides, x, gate_of(gate))
    close(sides[..., :5], reference.triangle_sides(x, gate, 5))
    assert not sides[..., 5:].any()
    normed = triangle_norm(sides, 5, weight, bias, EPS)
    close(normed, reference.pair_norm(sides[..., :5].permute(1, 2, 0), weight, bias, EPS).flatten(0, 1))
    added = z.clone()
    add_gated(added, x, gate_of(gate))
    close(added, reference.add_gated(z, x, gate))
