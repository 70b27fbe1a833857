"""Attention of one vector as a Triton kernel against the formula, on a GPU if there is one, else interpreted."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, HALF
from torch import Tensor

from plm_kernels import global_attention, reference

pytest.importorskip("triton")

# Heads, key size, value size, tokens: one token, one less and one more than a tile of 64, sizes that are no powers of
# two, values so large that tiles are smaller.
SHAPES = [(4, 64, 128, 65), (1, 3, 5, 1), (2, 8, 8, 63), (5, 2, 7, 33), (2, 6, 3, 300), (1, 24, 300, 70)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Nothing here is a product of matrices, so that bfloat16 is interpreted rightly as well.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def queries_keys_values(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q ``[3, h, d]``, k ``[3, t, h, d]``, v ``[3, t, h, e]``."""
    heads, d, e, tokens = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((3, heads, d), (3, tokens, heads, d), (3, tokens, heads, e))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def masks(tokens: int) -> list[Tensor | None]:
    """None; one that keeps the last token of a sequence alone, the first of another, and every other of the third."""
    some = torch.zeros(3, tokens, dtype=torch.bool)
    some[0, -1], some[1, 0], some[2, ::2] = True, True, True
    return [None, some.to(DEVICE)]


def run(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, *, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        mixed, weights = global_attention(q, k, v, scale=scale, keep=keep, backend="triton")
    assert weights is not None
    return mixed, weights


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@each_shape
@each_dtype
def test_equals_the_formula(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q, k, v = queries_keys_values(shape, dtype)
    for keep in masks(shape[3]):
        truths = reference.global_attention(q.double(), k.double(), v.double(), scale=0.3, keep=keep)
        floors = reference.global_attention(q, k, v, scale=0.3, keep=keep)
        for found, floor, truth in zip(run(q, k, v, keep), floors, truths, strict=True):
            assert found.dtype == dtype and found.shape == truth.shape
            # The noise floor is the formula's own error in this dtype, and one rounding of the result. Up to 1.4 of it
            # is seen; a GPU's exponentials are off by two units more.
            errors, noise = found - truth, (floor - truth, truth - truth.to(dtype))
            assert rms(errors) <= 3 * sum(map(rms, noise))
            assert errors.abs().max() <= 3 * sum(each.abs().max() for each in noise)


@each_shape
def test_weights_are_told_only_if_wanted(shape: tuple[int, int, int, int]) -> None:
    q, k, v = queries_keys_values(shape, HALF)
    with torch.inference_mode():
        for keep in masks(shape[3]):
            mixed, weights = global_attention(q, k, v, scale=0.3, keep=keep, weights=False, backend="triton")
            assert weights is None and torch.equal(mixed, run(q, k, v, keep)[0])
            assert global_attention(q, k, v, scale=0.3, keep=keep, weights=False, backend="torch")[1] is None


def test_large_logits() -> None:
    """Whose exponentials are no numbers; the largest comes last, in another row of a tile than those before."""
    q, k, v = queries_keys_values((2, 16, 8, 200), torch.float32)
    k[:, -1] = 3 * q
    truths = reference.global_attention(q.double(), k.double(), v.double(), scale=20)
    assert (20 * torch.einsum("bhd,bthd->bht", q, k)).max() > 300
    for found, truth in zip(run(q, k, v, scale=20), truths, strict=True):
        # Logits of up to 1,500 are known to half of their spacing in float32, 6e-5; so is the logarithm of a weight.
        assert (found - truth).abs().max() < 1e-3


FAULTS = ("scale", "one token kept", "one token dropped", "two heads swapped", "keys for values")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault: str) -> None:
    """By more than a hundred times what two right results differ by."""
    q, k, v = queries_keys_values((2, 8, 8, 70), torch.float32)
    keep = masks(70)[1]
    assert keep is not None
    truth = reference.global_attention(q.double(), k.double(), v.double(), scale=0.3, keep=keep)[0]
    right, other = run(q, k, v, keep)[0], keep.clone()
    if fault in FAULTS[1:3]:
        other[2, 68 if "dropped" in fault else 69] = "kept" in fault
    keys, values = (k.flip(2), v) if fault == FAULTS[3] else (k, k) if fault == FAULTS[4] else (k, v)
    wrong = run(q, keys, values, other, scale=0.31 if fault == "scale" else 0.3)[0]
    assert rms(wrong - truth) > 100 * rms(right - truth)


@each_shape
@each_dtype
def test_a_sequence_has_the_same_bits_in_any_batch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Of any width, whatever stands behind it, even if that is not a number."""
    q, k, v = queries_keys_values(shape, dtype)
    whole = run(q, k, v)
    for rows in ([0], [2], [1, 0], [2, 2, 0, 1, 1]):
        for found, wanted in zip(run(q[rows], k[rows], v[rows]), whole, strict=True):
            assert torch.equal(found, wanted[rows]), rows
    for more in (1, 16, 130):
        longer = [F.pad(x, (0, 0, 0, 0, 0, more), value=torch.nan) for x in (k, v)]
        keep = (torch.arange(shape[3] + more) < torch.full((3, 1), shape[3])).to(DEVICE)
        assert torch.equal(run(q, *longer, keep)[0], whole[0]), more


def test_views() -> None:
    """Heads before tokens in memory, channels that lie apart, one query for all: the same bits as of copies."""
    q, k, v = queries_keys_values((4, 8, 6, 30), torch.float32)
    keep = masks(30)[1]
    assert keep is not None
    wanted = run(q, k, v, keep)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    fused = torch.cat((k, v), -1)
    for inputs in ((q, *turned), apart, (q, fused[..., :8], fused[..., 8:])):
        for found, copied in zip(run(*inputs, keep.T.contiguous().T), wanted, strict=True):
            assert torch.equal(found, copied)
    for found, copied in zip(run(q[:1].expand(3, -1, -1), k, v), run(q[:1].repeat(3, 1, 1), k, v), strict=True):
        assert torch.equal(found, copied)


def test_what_does_not_fit() -> None:
    """By name it is an error; else PyTorch does it."""
    q, k, v = queries_keys_values((2, 8, 6, 30), torch.float32)
    large = queries_keys_values((1, 513, 2, 3), torch.float32)
    with torch.inference_mode():
        for inputs in ([q.double(), k.double(), v.double()], [q, k, v.double()], large, [q[:0], k[:0], v[:0]]):
            with pytest.raises(ValueError, match=r"takes heads of up to 512, all in one of .*; got keys"):
                global_attention(*inputs, scale=1, backend="triton")
        assert global_attention(*large, scale=1)[0].shape == (3, 1, 2)
