"""Packed batches: what is packed comes out again, and batches cover every sequence once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plm
from plm.packing import Packed, batches, in_order

ROWS = [[0, 5, 2], [0, 2], [0, 7, 8, 9, 2]]


def test_fields_of_a_batch() -> None:
    batch = plm.Packed.from_ids(ROWS)
    assert batch.tokens.tolist() == [0, 5, 2, 0, 2, 0, 7, 8, 9, 2]
    assert batch.tokens.dtype == torch.int64
    assert batch.lengths == (3, 2, 5)
    assert batch.offsets.tolist() == [0, 3, 5, 10]
    assert batch.offsets.dtype == torch.int32
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert batch.first.tolist() == [0, 3, 5]
    assert batch.max_length == 5
    assert len(batch) == 3


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_from_padded_takes_what_the_mask_keeps(left: bool) -> None:
    """The mask decides, not the ids: a pad id that is attended to (as transformers allows) stays."""
    ids = torch.ones(3, 6, dtype=torch.int64)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    for row, tokens in enumerate(ROWS):
        at = slice(6 - len(tokens), 6) if left else slice(0, len(tokens))
        ids[row, at], mask[row, at] = torch.tensor(tokens), 1
    batch = Packed.from_padded(ids, mask)
    assert [row.tolist() for row in batch.split(batch.tokens)] == ROWS
    everything = Packed.from_padded(ids, torch.ones_like(mask))
    assert everything.lengths == (6, 6, 6)


@given(st.lists(st.lists(st.integers(0, 32), min_size=1, max_size=9), min_size=1, max_size=6))
def test_split_and_pad_give_the_rows_back(rows: list[list[int]]) -> None:
    batch = Packed.from_ids(rows)
    assert [row.tolist() for row in batch.split(batch.tokens)] == rows
    padded = batch.pad(batch.tokens, value=-1)
    assert padded.shape == (len(rows), max(map(len, rows)))
    assert [[i for i in row if i >= 0] for row in padded.tolist()] == rows


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_take_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(batches(lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in found)
    in_turn = [lengths[i] for batch in found for i in batch]
    assert in_turn == sorted(in_turn, reverse=True)


def test_padded_batches_cost_what_is_computed() -> None:
    """A long sequence among short ones does not make rectangles of its length of all of them."""
    for lengths, budget in (([2000] + [9] * 500, 4096), ([700, 690, 30, 28, 28, 27] * 20, 2048), ([5000, 3], 1000)):
        found = list(batches(lengths, budget, padded=True))
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        computed = 0
        for batch in found:
            sizes = [lengths[i] for i in batch]
            assert len(batch) == 1 or (len(batch) * max(sizes) <= budget and 2 * min(sizes) >= max(sizes))
            computed += len(batch) * max(sizes)
        assert computed <= 2 * sum(lengths)
    assert len(list(batches([2000] + [9] * 500, 4096, padded=True))) == 3  # the long one, and 455 and 45 short ones


def test_rows_may_come_from_any_iterable() -> None:
    assert Packed.from_ids(iter(ROWS)).lengths == (3, 2, 5)
    assert Packed.from_ids(torch.ones(3, 4, dtype=torch.int64)).lengths == (4, 4, 4)


def test_in_order() -> None:
    pairs = [(2, torch.tensor(2)), (0, torch.tensor(0)), (1, torch.tensor(1))]
    assert [x.item() for x in in_order(pairs, 3)] == [0, 1, 2]


def test_wrong_batches_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        Packed.from_ids([])
    with pytest.raises(ValueError, match=r"rows \[1\] are empty"):
        Packed.from_ids([[0, 2], []])
    with pytest.raises(ValueError, match=r"share one shape.*\[2, 3\] and \[2, 4\]"):
        Packed.from_padded(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        list(batches([3], 0))


def test_moving_to_the_device_it_is_on_costs_nothing() -> None:
    batch = Packed.from_ids(ROWS)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert {x.device.type for x in (moved.tokens, moved.offsets, moved.positions)} == {"meta"}
