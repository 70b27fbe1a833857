"""Texts while they are written: what their bits depend on, rows that are replaced, streams that rest and go on."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import ankh, writing_progen2
from torch import Tensor

import plm
from plm.models.progen2 import ProGen2
from plm.models.t5 import T5
from plm_kernels import packing_available

PROMPTS = ("MKTAYIAK", "1", "2QRQISF", "MKTAYIAK", "V", "ACDEFGHIKLMNPQRSTVWY" * 4)
RESIDUES = [prompt.lstrip("12") or "M" for prompt in PROMPTS]
Make = Callable[..., plm.Model]
both = pytest.mark.parametrize(
    ("make", "prompts"), [(ankh, RESIDUES), (writing_progen2, PROMPTS)], ids=["t5", "progen2"]
)
needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def settings(model: plm.Model, **more: Any) -> dict[str, Any]:
    """Lengths of a T5 count no prompt."""
    return {"max_length": 25 if isinstance(model.net, T5) else 95, "num_samples": 3, "seed": 5, **more}


def drawn(model: plm.Model, prompts: Sequence[Any] = PROMPTS, **more: Any) -> list[list[plm.Sample]]:
    return plm.generate(model, prompts, **settings(model, **more))


def same_bits(found: Sequence[plm.Sample], wanted: Sequence[plm.Sample]) -> bool:
    """Ids, and every bit of the log-probabilities."""
    pairs = zip(found, wanted, strict=True)
    return all(a.ids == b.ids and torch.equal(a.log_probs, b.log_probs) for a, b in pairs)


# What a text depends on


@needs_packing
@both
@pytest.mark.parametrize("how", [{}, {"temperature": 0, "num_samples": 1}], ids=["drawn", "greedy"])
def test_alone_or_among_others(make: Make, prompts: Sequence[str], how: dict[str, Any]) -> None:
    """The same bits in float32, however many rows there are at a time and whatever is written in the others."""
    model = make()
    wanted = drawn(model, prompts, **how)
    assert max(len(sample.ids) for samples in wanted for sample in samples) > 20
    for max_tokens in (1, 400):
        found = drawn(model, prompts, max_tokens=max_tokens, **how)
        assert all(map(same_bits, found, wanted)), max_tokens
    others = [prompt if i == 2 else "MACH"[: i + 1] for i, prompt in enumerate(prompts)]
    found = drawn(model, others, **how)
    assert same_bits(found[2], wanted[2]) and not same_bits(found[0], wanted[0])
    assert same_bits(drawn(model, prompts[:1], **how)[0], wanted[0])


@needs_packing
@both
def test_however_many_samples(make: Make, prompts: Sequence[str]) -> None:
    model = make()
    many = drawn(model, prompts, num_samples=9)
    for count in (1, 2):
        for few, more in zip(drawn(model, prompts, num_samples=count), many, strict=True):
            assert same_bits(few, more[:count])


@both
def test_seeds(make: Make, prompts: Sequence[str]) -> None:
    model, prompts = make(), prompts[:4]

    def written(seed: int | None) -> list[list[plm.Sample]]:
        return drawn(model, prompts, seed=seed, max_length=25, likelihood=False)

    wanted = written(5)
    assert written(5) == wanted != written(6)
    assert wanted[0] != wanted[3], "the same prompt at another place is another sample"
    assert written(None) != written(None)
    torch.manual_seed(3)
    first = written(None)
    torch.manual_seed(3)
    assert written(None) == first, "without one it is torch's"
    state = torch.get_rng_state()
    written(5)
    assert torch.equal(torch.get_rng_state(), state), "with one torch's own stays where it is"


def test_weights_that_change_between_two_calls() -> None:
    model, other = writing_progen2(), writing_progen2(seed=1)
    before = drawn(model)
    model.net.load_state_dict(other.net.state_dict())
    assert drawn(model) == drawn(other) != before


# Work that is done once


class Watched:
    """What goes through a network: prompts read and to how many texts, rows of each step, and where keys lie."""

    def __init__(self, kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.caches, self.begun, self.rows = [], 0, list[int]()
        self.waiting: list[int] = []  # texts that had not begun at each step
        self.prompts: list[list[int]] = []
        self.places: set[int] = set()
        room, join, step = kind.room, kind.join, kind.step

        def watched_room(net: Any, asked: Any) -> Any:
            self.caches.append(asked)
            return room(net, asked)

        def watched_join(net: Any, state: Any, prompts: Sequence[Any], counts: Sequence[int]) -> None:
            self.prompts += [list(ids) for ids in prompts]
            self.begun += sum(counts)
            join(net, state, prompts, counts)

        def watched_step(net: Any, tokens: Tensor, state: Any) -> Tensor:
            self.rows.append(len(tokens))
            self.waiting.append(self.begun)
            stores = (state.cache.keys, state.cache.values, state.memory.keys, state.memory.values)
            self.places |= {store.data_ptr() for store in stores}
            return step(net, tokens, state)

        monkeypatch.setattr(kind, "room", watched_room)
        monkeypatch.setattr(kind, "join", watched_join)
        monkeypatch.setattr(kind, "step", watched_step)


@both
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_that_are_finished_are_replaced(
    make: Make, prompts: Sequence[str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a quarter of the rows may rest while others wait; keys and values are allocated once, for so many rows."""
    model = make()
    watched = Watched(type(model.net), monkeypatch)
    many = [prompts[i % 5] for i in range(25)]
    longest = 30 if isinstance(model.net, T5) else 60
    budget = rows * (longest + (max(map(len, many)) + 2 if isinstance(model.net, T5) else 0))
    texts = drawn(model, many, num_samples=1, max_length=longest, max_tokens=budget, likelihood=False)
    written = sum(len(sample.log_probs) for (sample,) in texts)
    assert len({len(sample.log_probs) for (sample,) in texts}) > 5
    assert sum(watched.rows) == written and max(watched.rows) == rows
    for count, begun in zip(watched.rows, watched.waiting, strict=True):
        assert begun == len(many) or rows - count < max(1, rows // 4)
    (room,) = watched.caches
    assert (room.texts, room.prompts) == (rows, min(rows, len(many))) and len(watched.places) == 4
    assert len(watched.prompts) == len(many)


def test_a_prompt_is_read_once_for_all_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its last token once for each text, as the first step of it."""
    model = writing_progen2()
    watched, counts, read = Watched(ProGen2, monkeypatch), list[int](), ProGen2.read

    def counted(net: ProGen2, tokens: Tensor, *given: Any) -> Tensor:
        counts.append(len(tokens))
        return read(net, tokens, *given)

    monkeypatch.setattr(ProGen2, "read", counted)
    texts = drawn(model, num_samples=7, likelihood=False)
    ids = [model.tokenizer.encode(p if p[0] in "12" else f"1{p}") for p in PROMPTS]
    assert sorted(watched.prompts) == sorted(ids)
    written = sum(len(sample.log_probs) for samples in texts for sample in samples)
    assert sum(counts) == sum(len(each) - 1 for each in ids) + written


@both
def test_more_samples_than_rows(make: Make, prompts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in several goes, and the prompt is read once while any of its texts is there."""
    model = make()
    wanted = drawn(model, prompts[:2], num_samples=7, max_length=12)
    watched = Watched(type(model.net), monkeypatch)
    longest = 12 + (11 if isinstance(model.net, T5) else 0)
    found = drawn(model, prompts[:2], num_samples=7, max_length=12, max_tokens=3 * longest)
    assert found == wanted and max(watched.rows) <= 3 and 2 <= len(watched.prompts) < 2 * 3
    assert sum(watched.rows) > 0.8 * 3 * len(watched.rows), "rows that are free are given to the next texts"


# Streams


def joined(stream: Iterator[plm.Piece]) -> list[list[plm.Piece]]:
    """The pieces of each sample, in the order of prompts and samples."""
    found: dict[tuple[int, int], list[plm.Piece]] = {}
    for piece in stream:
        found.setdefault((piece.prompt, piece.number), []).append(piece)
    return [found[name] for name in sorted(found)]


@both
@pytest.mark.parametrize("max_tokens", [None, 300])
def test_pieces_are_the_samples(make: Make, prompts: Sequence[str], max_tokens: int | None) -> None:
    """Token by token, with the whole sample on the last one; in float64, so that rows cannot matter."""
    model = make(torch.float64)
    how = settings(model, max_tokens=max_tokens)
    if isinstance(model.net, T5):
        how["max_length"] = None  # twice the prompt, so that `generate` begins with the longest and a stream does not
    wanted = [sample for samples in plm.generate(model, prompts, **how) for sample in samples]
    found = joined(plm.stream(model, prompts, **how))
    assert len(found) == len(wanted)
    vocabulary = model.tokenizer.vocabulary
    for pieces, sample in zip(found, wanted, strict=True):
        assert [piece.id for piece in pieces] == list(sample.ids[-len(pieces) :])
        torch.testing.assert_close(torch.tensor([piece.log_prob for piece in pieces]), sample.log_probs)
        assert [piece.text for piece in pieces] == [vocabulary[p.id] if p.id < len(vocabulary) else "" for p in pieces]
        assert [piece.sample for piece in pieces] == [None] * (len(pieces) - 1) + [sample]
        last = pieces[-1].sample
        assert last is not None and last.ll_sum == pytest.approx(sample.ll_sum, rel=1e-6, abs=1e-6)


def test_texts_of_a_stream_are_written_side_by_side() -> None:
    """Every text that is being written gets a piece before any gets its next."""
    model = writing_progen2()
    names = [(piece.prompt, piece.number) for piece in plm.stream(model, PROMPTS, **settings(model))]
    assert names[: 3 * len(PROMPTS)] == [(i, k) for i in range(len(PROMPTS)) for k in range(3)]


@both
@pytest.mark.parametrize("stop", [0, 7, 40])
def test_a_stream_that_rests_goes_on(make: Make, prompts: Sequence[str], stop: int) -> None:
    """Whatever is done meanwhile: with the same model, with another, by another stream, and to torch's random state."""
    model, prompts = make(), prompts[:4]
    more = settings(model, max_tokens=300, max_length=40, likelihood=False)
    wanted = list(plm.stream(model, prompts, **more))
    stream, other = plm.stream(model, prompts, **more), plm.stream(model, prompts[::-1], **more | {"seed": 9})
    found = list(itertools.islice(stream, stop))
    assert found == wanted[:stop]
    meanwhile = drawn(model, prompts[:1])
    list(itertools.islice(other, 11))
    make(seed=1), torch.rand(5)
    assert not torch.is_inference_mode_enabled()
    found += list(itertools.islice(stream, 5))
    list(itertools.islice(other, 3))
    assert found + list(stream) == wanted
    assert drawn(model, prompts[:1]) == meanwhile
    assert list(other) == list(plm.stream(model, prompts[::-1], **more | {"seed": 9}))[14:]


@both
def test_nothing_is_done_before_it_is_asked_for(
    make: Make, prompts: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But prompts and settings are looked at."""
    model = make()
    watched = Watched(type(model.net), monkeypatch)
    stream = plm.stream(model, prompts, **settings(model))
    assert not (watched.caches or watched.prompts or watched.rows)
    next(stream)
    assert len(watched.caches) == len(watched.rows) == 1
    list(itertools.islice(stream, 3 * len(prompts) - 1))
    assert len(watched.rows) == 1, "pieces of a step that was taken"
    next(stream)
    assert len(watched.rows) == 2
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="temperature must be above 0"):
        plm.stream(model, prompts, temperature=-1)
    with pytest.raises(plm.InputError, match="'J' at position 1"):
        plm.stream(model, "J")
    with pytest.raises(ValueError, match="a beam search knows its first token when it knows its last"):
        plm.stream(model, prompts, num_beams=2, temperature=0)
    with pytest.raises(TypeError, match=r"plm\.load\('progen2-small'\)"):
        plm.stream("progen2-small", prompts)  # type: ignore[arg-type]


# Texts that were cut


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {},
    "cuts": {"top_k": 9, "top_p": 0.8, "temperature": 1.3},
    "rules": {"repetition_penalty": 1.3, "no_repeat": 2, "min_length": 30, "banned": "A"},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("cut", [12, 20])
def test_a_sample_that_was_cut_goes_on_from_its_ids(rules: str, cut: int) -> None:
    """With the same seed and place as if it had not been: random numbers are those of places in a text."""
    model, prompts = writing_progen2(torch.float64), ["MKTAYIAK", "1", "2QRQISF", "V", "1MK"]
    how = settings(model, num_samples=1, **RULES[rules])
    whole = plm.generate(model, prompts, **how | {"max_length": 60})
    short = plm.generate(model, prompts, **how | {"max_length": cut, "min_length": min(how.get("min_length", 0), cut)})
    assert {sample.stopped_by for (sample,) in short} >= {"length"}
    again = [sample.ids for (sample,) in short if sample.stopped_by == "length"]
    places = [i for i, (sample,) in enumerate(short) if sample.stopped_by == "length"]
    given: list[Any] = list(prompts)
    for i, ids in zip(places, again, strict=True):
        given[i] = ids
    resumed = plm.generate(model, given, **how | {"max_length": 60})
    for i in places:
        (found,), (first,), (wanted,) = resumed[i], short[i], whole[i]
        assert found == wanted and found.reverse == wanted.reverse
        # The noise floor is the rounding of float32, in which logarithms below 16 are kept.
        both = torch.cat((first.log_probs, found.log_probs))
        torch.testing.assert_close(both, wanted.log_probs, rtol=0, atol=2 * 16 * 2**-24)
        assert found.ll_sum == pytest.approx(wanted.ll_sum, abs=1e-9)
