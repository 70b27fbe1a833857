"""Rotary positions as PyTorch computes them: the formula, digits, and what both forms are for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plm_kernels import Turns, reference, rotary_half, rotary_pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotary_half_equals_the_formula(dtype: torch.dtype) -> None:
    x = torch.randn(63, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    frequencies = 1 / 10000 ** (torch.arange(0, 24, 2) / 24)
    positions = torch.arange(63) * 7
    angles = positions.double()[:, None] * frequencies.double()
    ours = rotary_half(x, Turns.at(positions, frequencies, dtype))
    # Two products and a sum: three roundings of values up to 6.
    atol = 12 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, reference.rotary_half(x, angles), rtol=0, atol=atol)


@pytest.mark.parametrize("rotated", [8, 24], ids=["part", "whole"])
def test_rotary_pairs_equals_the_formula(rotated: int) -> None:
    x = torch.randn(63, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = 1 / 10000 ** (torch.arange(0, rotated, 2) / rotated)
    angles = torch.arange(63).double()[:, None] * frequencies.double()
    ours = rotary_pairs(x, Turns.at(torch.arange(63), frequencies, x.dtype))
    torch.testing.assert_close(ours, reference.rotary_pairs(x, angles), rtol=0, atol=1e-14)
    assert torch.equal(ours[..., rotated:], x[..., rotated:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotary_pairs_as_complex_numbers_lose_no_digits(dtype: torch.dtype) -> None:
    x = torch.randn(63, 3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    turns = Turns.at(torch.arange(63), 1 / 10000 ** (torch.arange(0, 24, 2) / 24), dtype)
    plain = rotary_pairs(x, turns)
    with torch.no_grad():
        ours = rotary_pairs(x, turns)
    truth = rotary_pairs(x.double(), Turns(turns.cos.double(), turns.sin.double()))
    assert 0 < (ours - truth).norm() < (plain - truth).norm()


def test_rotary_makes_products_depend_on_distance_alone() -> None:
    """The property that both forms exist for: <R(i) q, R(j) k> is a function of i - j."""
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)

    def product(rotate: Callable[[Tensor, Turns], Tensor], i: int, j: int) -> Tensor:
        at_i, at_j = (Turns.at(torch.tensor([at]), frequencies, q.dtype) for at in (i, j))
        return (rotate(q, at_i) * rotate(k, at_j)).sum()

    for rotate in (rotary_half, rotary_pairs):
        torch.testing.assert_close(product(rotate, 3, 8), product(rotate, 1003, 1008), rtol=0, atol=1e-12)
        assert (product(rotate, 3, 8) - product(rotate, 3, 9)).abs() > 1e-3


def test_cosines_do_not_depend_on_the_batch() -> None:
    """A float32 cosine may come from a vector unit or from its scalar tail; the tables are the same all the same."""
    frequencies = (1 / 10000 ** (torch.arange(0, 24, 2) / 24)).half().float()
    longest = Turns.at(torch.arange(1500), frequencies, torch.float32)
    for length in (1, 2, 3, 5, 17, 333, 1001):
        turns = Turns.at(torch.arange(length), frequencies, torch.float32)
        assert torch.equal(turns.cos, longest.cos[:length])
        assert torch.equal(turns.sin, longest.sin[:length])
