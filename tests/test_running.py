"""What is before and around every forward pass: which rows it gets, and how many at a time."""

from collections.abc import Sequence

import pytest
import torch
from tiny import igbert, proteinbert_model
from torch import Tensor

import plm
from plm import running

TEXTS = ["MKTAYIAK", "M", "QISF", "MK", "ACDEFGHIKLMN", "V"]


@pytest.mark.parametrize("max_tokens", [1, 9, 100])
def test_a_forward_knows_which_rows_it_has(max_tokens: int) -> None:
    """Its batch holds the tokens of just these, in this order, and each result goes to its own row."""
    model = igbert()
    rows = running.encode(model, TEXTS)

    def forward(batch: plm.Packed, members: Sequence[int]) -> list[Tensor]:
        wanted = [model.tokenizer.encode(TEXTS[i]) for i in members]
        assert [tokens.tolist() for tokens in batch.split(batch.tokens)] == wanted
        return [torch.tensor(float(i)) for i in members]

    found = dict(running.run(model, rows, forward, max_tokens=max_tokens))
    assert sorted(found) == list(range(6)) and all(float(found[i]) == i for i in found)


def test_a_halved_batch_knows_its_rows_too() -> None:
    model = igbert()
    rows = running.encode(model, TEXTS)
    sizes: list[int] = []

    def forward(batch: plm.Packed, members: Sequence[int]) -> list[Tensor]:
        sizes.append(len(members))
        if len(members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [torch.tensor(float(len(rows[i]))) for i in members]

    found = dict(running.run(model, rows, forward))
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    assert [float(found[i]) for i in range(6)] == [len(text) for text in TEXTS]


def test_pads_that_were_asked_for_count() -> None:
    """Twenty tokens a row and 45 a batch: two rows at a time, whatever their lengths. Without them those of 14 and 10,
    and then those of 6 to 3: beside 14, six would be more pads than protein."""
    model = proteinbert_model()
    rows = running.encode(model, TEXTS, pad_to=20)
    sizes: list[int] = []

    def forward(batch: plm.Packed, members: Sequence[int]) -> list[Tensor]:
        sizes.append(len(members))
        return [torch.zeros(1) for _ in members]

    list(running.run(model, rows, forward, max_tokens=45, pad_to=20))
    list(running.run(model, rows, forward, max_tokens=45))
    assert sizes == [2, 2, 2, 2, 4]


def test_what_does_not_fit_is_named_with_all_that_does_not() -> None:
    with pytest.raises(plm.InputError) as caught:
        running.encode(proteinbert_model(), TEXTS, pad_to=6)
    assert [fault.record for fault in caught.value.faults] == [1, 5]
    assert "record 1 'MKTAYIAK': 8 residues; pad_to=6 takes at most 4" in str(caught.value)
    assert "What to do: pad to 2 more than its residues; without pad_to (--pad-to) each has its own length" in str(
        caught.value
    )
