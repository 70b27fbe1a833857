"""Spearman's correlation by hand-made cases, and by scipy where it is there."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plm.ranks import ranks, spearman


def test_equal_numbers_share_their_mean_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0, 3.0]).tolist() == [4, 1, 4, 2, 4]
    assert ranks([5.0, 5.0]).tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1e9], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # Pearson's of (1, 2.5, 2.5, 4) and (1, 2, 3, 4)
        ([1, 1, 2, 2], [1, 2, 1, 2], 0),
    ],
)
def test_by_hand(x: list[float], y: list[float], wanted: float) -> None:
    assert spearman(x, y) == pytest.approx(wanted, abs=1e-12)


def test_without_ranks_to_compare() -> None:
    for x, y in (([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0])):
        assert math.isnan(spearman(x, y))
    with pytest.raises(ValueError, match="2 numbers and 1; pairs are needed"):
        spearman([1, 2], [1])
    for odd in (math.nan, math.inf):
        with pytest.raises(ValueError, match="has no rank; leave such pairs out"):
            spearman([1, odd], [1, 2])


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_from_the_definition(pairs: list[tuple[int, int]]) -> None:
    """Rank: one more than how many are smaller, and half of how many others are equal."""
    x, y = ([pair[side] for pair in pairs] for side in (0, 1))
    one, other = ([sum(b < a for b in z) + (z.count(a) + 1) / 2 for a in z] for z in (x, y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
        return
    mean = (len(pairs) + 1) / 2
    products = sum((a - mean) * (b - mean) for a, b in zip(one, other, strict=True))
    squares = [sum((a - mean) ** 2 for a in z) for z in (one, other)]
    assert spearman(x, y) == pytest.approx(products / math.sqrt(squares[0] * squares[1]), abs=1e-12)


def test_scipy_says_the_same() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = [1.0, 5, 2, 2, 8, 8, 8, 0], [3.0, 1, 1, 2, 9, 7, 7, 7]
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
