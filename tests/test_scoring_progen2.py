"""Likelihoods and embeddings of ProGen2: their definitions restated, one residue at a time, and what is refused.

What the original itself gives is in test_parity_progen2.py.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import ankh, igbert, progen2_model
from torch import Tensor

import plm
from plm import running, scoring
from plm.models.progen2 import ProGen2
from plm.scoring import Score, score_rows
from plm_kernels import packing_available

# Two float64 programs that add in another order differ by 2e-14 here (measured); one norm in float32 by 7e-7.
FLOAT64 = 1e-9
SEQUENCES = ["MKTAYIAKQR", "V", "QISFVKSHFSRQLEE", "MK", "BOUXZ", "MKTAYIAKQR"]
needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


@torch.no_grad()
def restated(model: plm.Model, text: str) -> Tensor:
    """Log-probability of each letter given those before it, in the order of reading; a pass for each."""
    letters = "ABCDEFGHIKLMNOPQRSTUVWXYZ"
    found = []
    for place in range(1, len(text) - 1):
        logits = model.net(plm.Packed.from_ids([model.tokenizer.encode(text[:place])])).logits[-1]
        each = {letter: logits[model.tokenizer.encode(letter)[0]].exp() for letter in letters}
        found.append((each[text[place]] / sum(each.values())).log())
    return torch.stack(found)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


def test_the_definition() -> None:
    model = progen2_model(torch.float64)
    for text, found in zip(SEQUENCES, plm.score(model, SEQUENCES), strict=True):
        forward, backward = restated(model, f"1{text}2"), restated(model, f"2{text[::-1]}1").flip(0)
        assert found.forward is not None and found.backward is not None
        same(found.forward.per_residue, forward)
        same(found.backward.per_residue, backward)
        same(found.per_residue, (forward + backward) / 2)
        assert found.total == pytest.approx((forward.sum() + backward.sum()).item() / 2, abs=FLOAT64)
        assert found.mean == found.total / len(text)
        assert (found.forward.forward, found.backward.backward) == (None, None)


def test_one_direction() -> None:
    model = progen2_model(torch.float64)
    both = plm.score(model, SEQUENCES)
    for how in ("forward", "backward"):
        for found, pair in zip(plm.score(model, SEQUENCES, how=how), both, strict=True):  # type: ignore[arg-type]
            same(found.per_residue, getattr(pair, how).per_residue)
            assert (found.forward, found.backward) == (None, None)


def test_auto_is_the_likelihood() -> None:
    model = progen2_model()
    found, wanted = plm.score(model, SEQUENCES), plm.score(model, SEQUENCES, how="likelihood")
    assert all(torch.equal(a.per_residue, b.per_residue) for a, b in zip(found, wanted, strict=True))
    assert repr(found[1]) == f"Score(total={found[1].total:.4f}, mean={found[1].mean:.4f}, residues=1)"


def test_the_order_of_residues_matters() -> None:
    """A protein and the same from its other end are two proteins, each read from both ends."""
    model = progen2_model(torch.float64)
    there, back = plm.score(model, ["MKTAY", "YATKM"])
    assert abs(there.total - back.total) > 1e-2
    assert there.forward is not None and abs(there.total - there.forward.total) > 1e-2


def test_the_rest_of_a_large_head_is_not_there() -> None:
    """large and BFD90 have 51,200 columns: scores of the first 32 are the same, and only the letters are computed."""
    small, large = progen2_model(torch.float64), progen2_model(torch.float64, outputs=512)
    state = large.net.state_dict()
    larger = ("lm_head", "embed")
    state |= {name: x for name, x in small.net.state_dict().items() if not name.startswith(larger)}
    state["embed.weight"][:32] = small.net.embed.weight
    for name, x in small.net.lm_head.state_dict().items():  # type: ignore[union-attr]
        state[f"lm_head.{name}"][:32] = x
    large.net.load_state_dict(state)
    assert scoring.letter_head(large).weight.shape == (25, 40)
    large.net.lm_head.forward = lambda *_: pytest.fail("the whole head was computed")  # type: ignore[union-attr, method-assign, assignment]
    for found, wanted in zip(plm.score(large, SEQUENCES), plm.score(small, SEQUENCES), strict=True):
        same(found.per_residue, wanted.per_residue)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_and_budget_do_not_matter(dtype: torch.dtype) -> None:
    """In float32 not a bit; nor in bfloat16 for so narrow a network."""
    model = progen2_model(dtype)
    for how in ("likelihood", "forward", "backward"):
        alone = [plm.score(model, text, how=how)[0].per_residue for text in SEQUENCES]  # type: ignore[arg-type]
        for max_tokens in (1, 7, 40, None):
            for order in ((0, 1, 2, 3, 4, 5), (2, 5, 0, 3, 1, 4)):
                found = plm.score(model, [SEQUENCES[i] for i in order], how=how, max_tokens=max_tokens)  # type: ignore[arg-type]
                assert all(torch.equal(each.per_residue, alone[i]) for i, each in zip(order, found, strict=True))


def test_both_directions_are_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no token is read whose logits nobody wants: L of each direction, within the budget."""
    model, read = progen2_model(), []
    encode = ProGen2.encode

    def counted(self: ProGen2, batch: plm.Packed, **options: Any) -> Any:
        read.append([model.tokenizer.decode(row) for row in batch.split(batch.tokens)])
        return encode(self, batch, **options)

    monkeypatch.setattr(ProGen2, "encode", counted)
    plm.score(model, ["MKTA", "V", "QIS"], max_tokens=14)
    assert read == [["1MKT", "2ATK", "1QI", "2SI"], ["1", "2"]]


def test_a_stream_names_its_sequences() -> None:
    """Longest first, as everywhere; what generation and variants call."""
    model = progen2_model()
    rows = running.encode(model, SEQUENCES, hidden=False)
    streamed = list(score_rows(model, rows))
    assert [i for i, _ in streamed] == [2, 0, 5, 4, 3, 1]
    wanted = plm.score(model, SEQUENCES)
    assert all(torch.equal(each.per_residue, wanted[i].per_residue) for i, each in streamed)


@pytest.mark.parametrize("row", [b"", bytes([3, 16, 14]), bytes([16, 14, 4]), bytes([16, 0]), bytes([16, 31])])
def test_rows_are_residues_alone(row: bytes) -> None:
    """A caller with ids of its own is told, before anything is computed."""
    with pytest.raises(ValueError, match="row 2 must be ids of residues, without terminals, and at least one; got"):
        next(score_rows(progen2_model(), [bytes([16, 14]), row]))


def test_scores_are_ordinary_tensors_of_their_own() -> None:
    (found,) = plm.score(progen2_model(), "MKTAYIAK")
    assert isinstance(found, Score) and found.forward is not None and found.backward is not None
    for each in (found, found.forward, found.backward):
        assert each.per_residue.shape == (8,) and each.per_residue.dtype == torch.float32
        assert (each.per_residue < 0).all()
        assert not each.per_residue.is_inference() and not each.per_residue.requires_grad


def test_bfloat16_is_scored_in_float32() -> None:
    """As near as bfloat16 brings the hidden states: the 25 logits are not rounded to it."""
    exact, half = (plm.score(progen2_model(dtype), SEQUENCES) for dtype in (torch.float64, torch.bfloat16))
    errors = torch.cat([(a.per_residue - b.per_residue) for a, b in zip(exact, half, strict=True)])
    assert half[0].per_residue.dtype == torch.float32 and exact[0].per_residue.dtype == torch.float64
    # The noise floor: RMS 0.01 of the golden checkpoints, from hidden states that are off by 0.9 %.
    assert 1e-4 < errors.square().mean().sqrt() < 0.03


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = progen2_model()
    expected = plm.score(model, SEQUENCES)
    encode = ProGen2.encode

    def limited(self: ProGen2, batch: plm.Packed, **options: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, batch, **options)

    monkeypatch.setattr(ProGen2, "encode", limited)
    found = plm.score(model, SEQUENCES)
    assert [each.total for each in found] == pytest.approx([each.total for each in expected], abs=1e-4)


# What is refused


@pytest.mark.parametrize("how", ["pseudo-likelihood", "single-pass"])
def test_a_causal_model_hides_nothing(how: Any) -> None:
    told = f"progen2 predicts each residue from those before it, so it has no '{how}'; choose 'likelihood', 'forward'"
    with pytest.raises(ValueError, match=told):
        plm.score(progen2_model(), "MKT", how=how)


@pytest.mark.parametrize("how", ["likelihood", "forward", "backward"])
@pytest.mark.parametrize(
    ("make", "choice"), [(ankh, "'pseudo-likelihood'$"), (igbert, "'pseudo-likelihood' or 'single-pass'$")]
)
def test_others_do_not_read_from_one_end(make: Callable[[], plm.Model], how: Any, choice: str) -> None:
    with pytest.raises(ValueError, match=f"one end to the other, so it has no '{how}'; choose {choice}"):
        plm.score(make(), "MKT", how=how)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"how": "ll"}, "how='ll' is unknown; choose 'auto', 'likelihood', 'forward' or 'backward'"),
        ({"task": "nlu"}, "task 'nlu' is unknown; progen2 has no tasks: leave it out"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_scored(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        plm.score(progen2_model(), "MKT", **settings)


REFUSED = {
    "1MK2": r"1 is no residue.*\n.*give residues alone: 1 is put before them and 2 behind them",
    "MK2": "2 is no residue",
    "<|bos|>MK": r"<\|bos\|> is no residue",
    "MK<|eos|>": r"<\|eos\|> is no residue",
    "MK<|pad|>": r"<\|pad\|> is no residue",
    "MKJ": "character 'J' at position 3 is not in the vocabulary",
    "MK*": "'\\*' is a stop codon",
    "mkt": r"Sequences are upper case: call \.upper\(\)",
    "MK<mask>": "character '<' at position 3",
    "": "the sequence is empty",
    "M" * 39: "39 residues; progen2 takes at most 38",
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("verb", [plm.score, plm.embed])
def test_what_is_no_protein(verb: Callable[..., object], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published tokenizer drops in silence what it does not know. It is said here, before anything is computed."""
    monkeypatch.setattr(ProGen2, "encode", lambda *_, **__: pytest.fail("computed before the input was checked"))
    with pytest.raises(plm.InputError, match=REFUSED[text]) as caught:
        verb(progen2_model(), ["MKT", text])
    assert [fault.record for fault in caught.value.faults] == [2]


def test_pairs_are_refused() -> None:
    for given in (["MK|MT"], [("MK", "MT")]):
        with pytest.raises(plm.InputError, match="this model takes single chains"):
            plm.score(progen2_model(), given)


def test_the_longest_protein() -> None:
    """With its two terminals it fills the context."""
    model = progen2_model()
    assert model.net.config.max_length == 40
    assert len(plm.score(model, "M" * 38)[0].per_residue) == len(plm.embed(model, "M" * 38)[0]) == 38


@pytest.mark.parametrize("how", ["likelihood", "backward"])
def test_a_nan_is_never_returned(how: Any) -> None:
    model = progen2_model()
    broken = replace(model, net=copy.deepcopy(model.net))
    with torch.no_grad():
        broken.net.embed.weight[model.tokenizer.vocabulary.index("K"), 3] = torch.nan
    with pytest.raises(FloatingPointError, match="sequence 2 gave a NaN or an infinity"):
        plm.score(broken, ["MAM", "MAKAM"], how=how)


# Embeddings


@torch.no_grad()
def test_embeddings_are_of_the_framed_protein() -> None:
    """Read from N to C between its terminals: exactly one row per residue, of every letter of the vocabulary."""
    model = progen2_model(torch.float64)
    for text, found, mean in zip(
        SEQUENCES, plm.embed(model, SEQUENCES), plm.embed(model, SEQUENCES, pool="mean"), strict=True
    ):
        hidden = model.net(plm.Packed.from_ids([model.tokenizer.encode(f"1{text}2")])).hidden
        same(found, hidden[1:-1])
        same(mean, hidden[1:-1].mean(0))


def test_a_row_knows_what_is_before_it() -> None:
    """And nothing behind it."""
    model = progen2_model(torch.float64)
    one, other = plm.embed(model, ["MKTAYIAK", "MKTAGGGG"])
    same(one[:4], other[:4])
    assert (one[4:] - other[4:]).abs().amax(1).min() > 1e-2


def test_there_is_no_start_token_to_pool() -> None:
    with pytest.raises(
        ValueError, match="the start token of progen2 sees nothing of what follows it; pool with 'mean'"
    ):
        plm.embed(progen2_model(), "MKT", pool="cls")


def test_there_are_no_contacts() -> None:
    with pytest.raises(ValueError, match="progen2 has no contact head, so it predicts no contacts; use esm1b or esm2"):
        plm.contacts(progen2_model(), "MKT")
