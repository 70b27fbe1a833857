"""Triton's rotary positions, in place on a fused projection, against the formula."""

import pytest
import torch
from kernel_device import DEVICE
from kernel_errors import DTYPES, HALVES, ROUNDS_BFLOAT16, allowed, error
from torch import Tensor

from plm_kernels import Turns, backends, reference, rotate_half_, rotate_pairs_

pytest.importorskip("triton")

SIZES = [(1, 1, 2, 1), (0, 3, 16, 8), (1, 20, 16, 8), (7, 20, 24, 12), (63, 3, 32, 16), (5, 6, 64, 32), (2, 3, 128, 64)]
"""Tokens, heads, head size, rotated pairs."""
PARTS = [(7, 3, 64, 16), (1, 3, 96, 24), (3, 2, 256, 32), (9, 5, 10, 1)]
"""The same, where not all of a head is turned."""


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def inputs(n: int, h: int, d: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Turns, Tensor]:
    """A projection ``[n, 3, h, d]``, the turns, and their angles ``[n, r]`` in float64."""
    x = torch.randn(n, 3, h, d, generator=torch.Generator().manual_seed(n + h + d), dtype=torch.float64)
    frequencies = 1 / 100 ** (torch.arange(r) / r)
    positions = torch.arange(n) * 7 + 1
    turns = Turns.at(positions.to(DEVICE), frequencies.to(DEVICE), dtype)
    return x.to(dtype).to(DEVICE), turns, (positions.double()[:, None] * frequencies.double()).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_halves_equal_the_formula(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """In place on queries ‖ keys ‖ values, of which the values stay."""
    qkv, turns, angles = inputs(*size, dtype)
    given = qkv.clone()
    q, k = rotate_half_(qkv[:, :2], turns, 0.3, backend="triton")
    assert torch.equal(qkv[:, 2], given[:, 2])
    assert q.data_ptr() == qkv[:, 0].data_ptr()
    assert torch.equal(qkv[:, 1], k)
    if not len(q):
        return
    for ours, x, scale in ((q, given[:, 0], 0.3), (k, given[:, 1], 1.0)):
        truth = reference.rotary_half(x.double(), angles) * scale
        assert error(ours, truth) <= allowed(reference.rotary_half(x, angles) * scale, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES + PARTS, ids=str)
def test_pairs_equal_the_formula(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """In place on queries ‖ values ‖ keys, of which the values and the last channels of a head stay."""
    qvk, turns, angles = inputs(*size, dtype)
    given, rotated = qvk.clone(), 2 * size[3]
    q, k = rotate_pairs_(qvk[:, 0], qvk[:, 2], turns, backend="triton")
    assert torch.equal(qvk[:, 1], given[:, 1])
    assert torch.equal(qvk[..., rotated:], given[..., rotated:])
    assert q.data_ptr() == qvk[:, 0].data_ptr()
    if not len(q):
        return
    for ours, x in ((q, given[:, 0]), (k, given[:, 2])):
        truth = reference.rotary_pairs(x.double(), angles)
        assert error(ours, truth) <= allowed(reference.rotary_pairs(x, angles), truth)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_against_pytorch_in_half_precision(dtype: torch.dtype) -> None:
    """PyTorch rounds each product before the sum (not so pairs on a CPU), the kernel the sum alone."""
    qkv, turns, _ = inputs(63, 3, 32, 16, dtype)
    pairs = [rotate_half_(qkv[:, :2].clone(), turns, 0.25, backend=backend) for backend in ("triton", "torch")]
    pairs += [
        rotate_pairs_(qkv[:, 0].clone(), qkv[:, 2].clone(), turns, backend=backend) for backend in ("triton", "torch")
    ]
    for first, second in (pairs[:2], pairs[2:]):
        for ours, plain in zip(first, second, strict=True):
            # Terms are up to 4: each rounding is half of one step of such numbers at most, and one that cuts a whole.
            gap, step = (ours.double() - plain.double()).abs().max().item(), 4 * torch.finfo(dtype).eps
            assert gap <= (2 if dtype == torch.float16 or ROUNDS_BFLOAT16 else 3) * step


def test_a_token_has_the_same_bits_alone_and_in_a_batch() -> None:
    qkv, turns, _ = inputs(63, 5, 24, 12, torch.float32)
    whole = rotate_half_(qkv[:, :2].clone(), turns, 0.3, backend="triton")
    for i in (0, 31, 62):
        own = Turns(turns.cos[i : i + 1], turns.sin[i : i + 1])
        alone = rotate_half_(qkv[i : i + 1, :2].clone(), own, 0.3, backend="triton")
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


def test_channels_that_do_not_lie_side_by_side_are_copied() -> None:
    qkv, turns, _ = inputs(7, 3, 24, 12, torch.float32)
    q, _, k = qkv.unbind(1)
    scattered = q.transpose(1, 2).contiguous().transpose(1, 2)
    given = scattered.clone()
    found = rotate_pairs_(scattered, k.clone(), turns, backend="triton")
    wanted = rotate_pairs_(q, k, turns, backend="triton")
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(scattered, given)


@pytest.mark.parametrize("size", [(7, 20, 24, 12), (3, 2, 96, 24), (1, 3, 64, 16)], ids=str)
def test_nothing_is_written_beyond_the_tokens(size: tuple[int, int, int, int]) -> None:
    """Behind the last token of the queries, of whole heads and of parts, and in the values between."""
    qvk, turns, _ = inputs(size[0] + 64, *size[1:], torch.float32)
    given, tokens = qvk.clone(), slice(32, 32 + size[0])
    own = Turns(turns.cos[tokens], turns.sin[tokens])
    rotate_pairs_(qvk[tokens, 0], qvk[tokens, 2], own, backend="triton")
    changed = (qvk != given).any(1, keepdim=True).any(2, keepdim=True)
    assert changed[tokens, ..., : 2 * size[3]].all()
    assert not changed[:32].any()
    assert not changed[tokens.stop :].any()
    assert torch.equal(qvk[:, 1], given[:, 1])
    assert torch.equal(qvk[..., 2 * size[3] :], given[..., 2 * size[3] :])


def test_what_does_not_fit_is_pytorchs() -> None:
    """Turns of other tokens or of wider heads, which PyTorch refuses, and keys in another dtype than the queries."""
    qkv, turns, _ = inputs(7, 3, 24, 12, torch.float32)
    fewer = Turns(turns.cos[:5], turns.sin[:5])
    for backend in ("auto", "triton"):
        with pytest.raises(RuntimeError):
            rotate_half_(qkv[:, :2].clone(), fewer, 1.0, backend=backend)
        with pytest.raises(RuntimeError):
            rotate_half_(qkv[:, :2, :, :16].clone(), turns, 1.0, backend=backend)
        q, k = rotate_pairs_(qkv[:, 0].double(), qkv[:, 1].clone(), turns, backend=backend)
        wanted = rotate_pairs_(qkv[:, 0].double(), qkv[:, 1].double(), turns, backend="torch")
        assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])
    assert "rotary" not in backends.broken()


def test_a_wrong_turn_is_told_from_a_right_one() -> None:
    """Each fault is larger than what the comparison allows."""
    qkv, turns, angles = inputs(63, 3, 32, 16, torch.float32)
    truth = reference.rotary_half(qkv[:, 0].double(), angles)
    bound = allowed(reference.rotary_half(qkv[:, 0], angles), truth)

    def turned(turns: Turns, scale: float = 1.0) -> Tensor:
        return rotate_half_(qkv[:, :2].clone(), turns, scale, backend="triton")[0]

    assert error(turned(turns), truth) <= bound
    assert error(turned(Turns(turns.cos, -turns.sin)), truth) > bound
    assert error(turned(Turns(turns.cos.roll(1, 0), turns.sin.roll(1, 0))), truth) > bound
    assert error(turned(turns, 1 + 1e-6), truth) > bound
    assert error(rotate_pairs_(qkv[:, 0].clone(), qkv[:, 1].clone(), turns, backend="triton")[0], truth) > bound
