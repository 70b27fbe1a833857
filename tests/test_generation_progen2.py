"""What users ask ProGen2 to write and what they get back: prompts, lengths, rules, likelihoods, and errors."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import ankh, writing_progen2

import plm
from plm import writing
from plm.cache import STEP
from plm.models.progen2 import ProGen2
from plm.packing import Packed
from plm_kernels import padded_keys

LETTERS = set("ABCDEFGHIKLMNOPQRSTUVWXYZ")
LIMIT = 40  # tokens that the model of `short` reads
ENDS = (2, 3, 4)


@pytest.fixture(scope="module")
def model() -> plm.Model:
    return writing_progen2(torch.float64)


@pytest.fixture(scope="module")
def short() -> plm.Model:
    return writing_progen2(max_length=LIMIT)


def one(model: plm.Model, prompt: Any, **settings: Any) -> plm.Sample:
    ((sample,),) = plm.generate(model, [prompt], **{"seed": 0, "max_length": 30, **settings})
    return sample


def dictated(model: plm.Model, prompt: str, text: str, **settings: Any) -> plm.Sample:
    """What becomes of a text that the model is made to write behind residues, terminals included."""
    residues = sum(letter in LETTERS for letter in prompt)
    return one(model, prompt, forced=dict(enumerate(text, residues + 1)), **settings)


# Prompts


def test_bare_residues_are_read_from_the_n_terminus(model: plm.Model) -> None:
    for bare in ("MKT", "M K\tT\n", " MKT"):
        assert one(model, bare) == one(model, "1MKT") == one(model, [3, 16, 14, 23])
    assert one(model, "MKT").ids[:4] == (3, 16, 14, 23)
    assert one(model, "MKT") != one(model, [16, 14, 23]), "ids are taken as they are"


def test_prompts_from_the_c_terminus(model: plm.Model) -> None:
    """``sequence`` is in the order of writing, ``protein`` from N to C."""
    sample = dictated(model, "2TK", "GA1")
    assert (sample.sequence, sample.protein, sample.reverse) == ("TKGA", "AGKT", True)
    assert sample.ids == (4, 23, 14, 11, 5, 3) and sample.stopped_by == "end"
    sample = dictated(model, "1TK", "GA2")
    assert (sample.sequence, sample.protein, sample.reverse) == ("TKGA", "TKGA", False)
    assert sample.ids == (3, 23, 14, 11, 5, 4)


@pytest.mark.parametrize("prompt", ["1", "2"])
def test_writing_from_nothing(model: plm.Model, prompt: str) -> None:
    samples = plm.generate(model, prompt, num_samples=20, max_length=30, seed=0)[0]
    assert len({sample.sequence for sample in samples}) > 5
    for sample in samples:
        assert sample.ids[0] == int(prompt) + 2 and sample.reverse == (prompt == "2")
        assert set(sample.sequence) <= LETTERS


@pytest.mark.parametrize("end", ["1", "2", "<|eos|>"])
@pytest.mark.parametrize("prompt", ["1MK", "2MK"])
def test_each_end_ends(model: plm.Model, prompt: str, end: str) -> None:
    """Either terminal, as the original cuts there; and the token at which the original stops."""
    sample = one(model, prompt, forced={3: "A", 4: end, 5: "G"})
    assert (sample.sequence, sample.stopped_by) == ("MKA", "end")
    assert sample.ids[-1] == model.tokenizer.vocabulary.index(end) and len(sample.ids) == 5


def test_a_tag_goes_before_the_terminal() -> None:
    """Of a fine-tuned port, as text and as an id that the head has no column for."""
    model = writing_progen2(vocabulary=37)
    sample = one(model, [33, 3, 16, 14])
    assert sample.ids[:4] == (33, 3, 16, 14) and sample.sequence.startswith("MK") and not sample.reverse
    assert one(model, [33, 4, 16, 14]).reverse
    assert one(model, "<|bos|>2MK").ids[:4] == (1, 4, 16, 14) and one(model, "<|bos|>2MK").reverse
    assert one(model, "<|bos|>MK") == one(model, [1, 3, 16, 14])


def test_tokens_of_no_letter_are_left_out_of_the_sequence() -> None:
    """Spare columns and padding, which the original's tokenizer drops as well."""
    model = writing_progen2(vocabulary=128, outputs=128)
    sample = one(model, "MK", forced={3: 52, 4: "A", 5: 0, 6: "<|bos|>", 7: 127, 8: "G", 9: "2"})
    assert sample.sequence == "MKAG" and sample.ids == (3, 16, 14, 52, 5, 0, 1, 127, 11, 4)
    assert len(sample.log_probs) == 7
    assert sample.score is not None and len(sample.score.per_residue) == 4


# Lengths


def test_max_length_counts_the_prompt_and_its_terminal(model: plm.Model) -> None:
    for prompt in ("1MKT", "MKT", "2MKT", [3, 16, 14, 23]):
        sample = one(model, prompt, max_length=12, min_length=12)
        assert len(sample.ids) == 12 and len(sample.log_probs) == 8 and sample.stopped_by == "length"
    assert len(one(model, "MKT", max_length=5, banned=[2, 3, 4]).ids) == 5


def test_min_length(model: plm.Model) -> None:
    """No end before so many tokens, prompt included; then there may be one."""
    samples = plm.generate(model, "1MK", num_samples=200, min_length=6, max_length=30, seed=0)[0]
    lengths = [len(sample.ids) for sample in samples if sample.stopped_by == "end"]
    assert min(lengths) == 7, "six tokens and the end"
    assert not any(token in ENDS for sample in samples for token in sample.ids[1:6])
    free = plm.generate(model, "1MK", num_samples=200, max_length=30, seed=0)[0]
    assert min(len(sample.ids) for sample in free) == 4


@pytest.mark.parametrize(("prompt", "length"), [("1", 1), ("MKT", 4), ("2MKT", 9), ("MKT", 25)])
def test_length_is_that_of_the_whole_protein(model: plm.Model, prompt: str, length: int) -> None:
    for sample in plm.generate(model, prompt, length=length, num_samples=5, seed=0)[0]:
        assert len(sample.sequence) == length == len(sample.ids) - 1 and sample.stopped_by == "length"
        assert set(sample.sequence) <= LETTERS


def test_as_long_as_the_model_reads(short: plm.Model) -> None:
    """The last token is written and not read, so there is one more than positions; that is also the most."""
    assert len(one(short, "MK", max_length=None, banned=[2, 3, 4]).ids) == LIMIT, "unless told otherwise"
    sample = one(short, "MK", max_length=LIMIT + 1, banned=[2, 3, 4], residues_only=True)
    assert len(sample.ids) == LIMIT + 1 and len(sample.sequence) == LIMIT and math.isfinite(sample.ll_mean)
    assert len(one(short, "MK", max_length=None, length=LIMIT).sequence) == LIMIT
    full = [3, *[16] * (LIMIT - 1)]
    assert len(one(short, full, max_length=None).ids) == LIMIT + 1, "a prompt of all positions has room for one token"


# Rules


def test_residues_only(model: plm.Model) -> None:
    free, held = (plm.generate(model, "1", num_samples=60, seed=0, residues_only=only)[0] for only in (False, True))
    others = {0, 1, 30, 31}
    assert any(others & set(sample.ids) for sample in free), "or there is nothing to ban"
    assert not any(others & set(sample.ids) for sample in held)
    assert {sample.stopped_by for sample in held} == {"end"}


def test_banned(model: plm.Model) -> None:
    banned = ["A", "X", "<|pad|>", 31, "2"]
    ids = {5, 27, 0, 31, 4}
    settings: dict[str, Any] = {"num_samples": 60, "max_length": 30, "seed": 0}
    assert any(ids & set(sample.ids[1:]) for sample in plm.generate(model, "1", **settings)[0])
    assert not any(ids & set(sample.ids[1:]) for sample in plm.generate(model, "1", banned=banned, **settings)[0])


def test_forced(model: plm.Model) -> None:
    """Positions count residues from 1 in the order of writing, whatever stands before them; bans do not matter."""
    for prompt, given in (("MK", 2), ("1MK", 2), ("2MK", 2), ([1, 3, 16, 14], 2), ([16, 14], 2), ("1", 0)):
        forced = {given + 2: "C", given + 5: 26}
        for sample in plm.generate(
            model, [prompt], num_samples=5, seed=0, length=9, forced=forced, banned="C", repetition_penalty=3.0
        )[0]:
            assert (sample.sequence[given + 1], sample.sequence[given + 4]) == ("C", "W")
            assert "C" not in sample.sequence[given + 2 :]


def test_no_repeat(model: plm.Model) -> None:
    for size in (1, 2, 3):
        for sample in plm.generate(model, ["1", "MKMKA"], num_samples=3, seed=0, length=20, no_repeat=size)[0]:
            runs = [sample.ids[i : i + size] for i in range(len(sample.ids) - size + 1)]
            assert len(runs) == len(set(runs))


def test_no_repeat_gives_way_where_nothing_is_left(model: plm.Model) -> None:
    """Of two letters that may be written each comes once, and then there is no other choice."""
    banned = [token for token in range(32) if token not in (16, 14)]
    sample = one(model, "1", max_length=9, no_repeat=1, banned=banned)
    assert set(sample.ids[1:3]) == {14, 16} and set(sample.ids[3:]) <= {14, 16} and len(sample.ids) == 9


# Likelihoods


def test_likelihoods_are_those_of_the_protein(model: plm.Model) -> None:
    """Of the whole, prompt included, in both directions: ``plm.score``, and the formula with our own network."""
    letters = slice(5, 30)

    def direction(text: str) -> list[float]:
        ids = model.tokenizer.encode(text)
        with torch.inference_mode():
            logits = model.net(Packed.from_ids([ids])).logits[:-1, letters].log_softmax(-1)  # type: ignore[call-arg]
        return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:]) - letters.start].tolist()

    for prompt in ("1MKT", "2MKT", "1"):
        for sample in plm.generate(model, prompt, num_samples=4, seed=1, min_length=6, max_length=20)[0]:
            forward, backward = direction(f"1{sample.protein}"), direction(f"2{sample.protein[::-1]}")
            # Two float64 programs that add in another order: 1e-14 is seen.
            assert sample.ll_sum == pytest.approx((sum(forward) + sum(backward)) / 2, abs=1e-9)
            assert sample.ll_mean == pytest.approx(sample.ll_sum / len(sample.sequence), abs=1e-9)
            (scored,) = plm.score(model, sample.protein)
            assert sample.score is not None
            torch.testing.assert_close(sample.score.per_residue, scored.per_residue, rtol=0, atol=1e-9)
            assert sample.score.forward is not None and sample.score.backward is not None
            assert sample.score.forward.total == pytest.approx(sum(forward), abs=1e-9)


def test_without_the_likelihood(model: plm.Model) -> None:
    """What is told then is of the tokens that were written; the samples are the same."""
    with_it, without = (
        plm.generate(model, "MK", num_samples=5, seed=3, max_length=20, likelihood=want)[0] for want in (True, False)
    )
    assert without == with_it
    for sample in without:
        assert sample.score is None
        assert sample.ll_sum == pytest.approx(sample.log_probs.double().sum().item())
        assert sample.ll_mean == pytest.approx(sample.ll_sum / len(sample.log_probs))


@pytest.mark.parametrize("prompt", ["1", "2"])
def test_a_protein_without_residues(model: plm.Model, prompt: str) -> None:
    """A terminal at once: no residue has a likelihood, so the sum is empty and the mean is no number."""
    sample = dictated(model, prompt, "2")
    assert (sample.sequence, sample.protein, sample.stopped_by) == ("", "", "end") and len(sample.ids) == 2
    assert sample.ll_sum == 0 and math.isnan(sample.ll_mean) and len(sample.log_probs) == 1


# Errors


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("MJT", "character 'J' at position 2 is not in the vocabulary"),
        ("1MJT", "character 'J' at position 3 is not"),
        ("2mk", "character 'm' at position 2 is not .* upper case"),
        ("mk", "character 'm' at position 1 is not"),
        ("M K J", "character 'J' at position 5 is not"),
        ("<|eos|>MKJ", "character 'J' at position 10 is not"),
        ("<|pf03668|>MK", "character '<' at position 1 is not"),
        ("MK*", "character '\\*' at position 3 is not"),
        ("MK2", "2 at position 3 ends the sequence"),
        ("1MK2", "2 at position 4 ends the sequence"),
        ("2MK1A", "1 at position 4 ends the sequence"),
        ("12", "2 at position 2 ends the sequence"),
        ("<|bos|>MK1", "1 at position 10 ends the sequence"),
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([3, 4], "2 at position 2 ends the sequence"),
        ([33, 3, 16, 4, 16], "2 at position 4 ends the sequence"),
        ([3, 16, 2], r"<\|eos\|> at position 3 ends the sequence"),
        ([3, 37, -1], r"ids \[37, -1\] are not in the vocabulary of 37 tokens"),
        ([3, *[16] * 200], "201 tokens with the terminal; progen2 reads at most 200"),
        ("M" * 200, "201 tokens with the terminal; progen2 reads at most 200"),
    ],
)
def test_prompts_that_cannot_be_used(prompt: Any, wrong: str) -> None:
    """Positions are those of the prompt as it was given."""
    with pytest.raises(plm.InputError, match=wrong):
        one(writing_progen2(vocabulary=37), prompt)


def test_all_bad_prompts_are_named_before_anything_is_written(
    model: plm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProGen2, "join", lambda *_: pytest.fail("wrote before the prompts were checked"))
    with pytest.raises(plm.InputError) as caught:
        plm.generate(model, ["MKT", "MJ", "2", "M" * 300, "A12"])
    assert [fault.record for fault in caught.value.faults] == [2, 4, 5]
    assert all(fault.hint for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"temperature": -0.1}, r"temperature must be above 0, or 0 for the most probable token; got -0.1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1; got 1.01"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all tokens; got 0"),
        ({"no_repeat": 0}, "no_repeat must be at least 1, or None to allow repeats; got 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be above 0, 1 for none; got -1"),
        ({"num_samples": 0}, "num_samples and num_beams must be at least 1"),
        ({"task": "s2s"}, "task 's2s' is unknown; progen2 has no tasks: leave it out"),
        ({"max_length": 4}, "max_length counts the 4 tokens that are given, so it must be at least 5, .* max_length=4"),
        ({"max_length": 9, "min_length": 10}, "min_length must not be above it; got max_length=9, min_length=10"),
        ({"min_length": 202}, "min_length must not be above it; got max_length=200, min_length=202"),
        ({"min_length": -1}, "min_length must not be negative; got -1"),
        ({"max_length": 202}, "max_length=202, but the model reads at most 200 tokens: give 201 or less"),
        ({"length": 201}, "length=201, but the model reads at most 200 tokens: give 200 or less"),
        ({"length": 3}, "length=3, but the prompt has 3 residues already; give more"),
        ({"length": 9, "max_length": 20}, "length takes the place of max_length and min_length"),
        ({"forced": {3: "C"}}, "forced position 3 cannot be written: the prompt has 3 residues, .* room for 196 more"),
        ({"forced": {0: "C"}}, "forced position 0 cannot be written"),
        ({"forced": {9: "C"}, "max_length": 9}, "forced position 9 cannot be written: .* room for 5 more"),
        ({"forced": {5: "J"}}, "forced token 'J' is not in the vocabulary"),
        ({"forced": {5: 32}}, "forced token 32 is not in the vocabulary"),
        ({"banned": ["J"]}, "banned token 'J' is not in the vocabulary"),
        ({"banned": range(32)}, "every token but the end is banned; allow some"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_settings_that_cannot_be_used(model: plm.Model, settings: dict[str, Any], wrong: str) -> None:
    for verb in (plm.generate, lambda *given, **how: list(plm.stream(*given, **how))):
        with pytest.raises(ValueError, match=wrong):
            verb(model, "MKT", **settings)


def test_there_is_no_beam_search(model: plm.Model) -> None:
    with pytest.raises(
        ValueError, match="beam search is for models with an encoder and a decoder: leave out num_beams"
    ):
        plm.generate(model, "MKT", temperature=0, num_beams=2)


def test_forced_is_for_models_that_go_on_from_their_prompt() -> None:
    with pytest.raises(ValueError, match="forced is for models whose text goes on from the prompt"):
        plm.generate(ankh(), "MKT", forced={5: "C"})


def test_no_prompts(model: plm.Model) -> None:
    assert plm.generate(model, []) == [] and list(plm.stream(model, [])) == []


@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 0}])
def test_a_nan_is_never_given(how: dict[str, Any]) -> None:
    """Neither as a sample nor as a piece of a stream."""
    model = writing_progen2()
    assert isinstance(model.net, ProGen2)
    with torch.no_grad():
        model.net.blocks[1].feed_forward.down.weight[3] = torch.nan  # type: ignore[union-attr, operator]
    for verb in (plm.generate, lambda *given, **how: next(plm.stream(*given, **how))):
        with pytest.raises(FloatingPointError, match=r"sequence 1 gave a NaN .* in float32; .*plm verify"):
            verb(model, "MKT", **how)


# Memory


def test_what_does_not_fit_is_refused_with_what_would(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed. A text's keys and values: 2 layers, 4 heads of 8, in float64, of 60 tokens and some
    padding; a prompt's are kept in steps of ``STEP`` tokens."""
    token, text = 2 * 2 * 4 * 8 * 8, padded_keys(60, 8)
    prompts, settings = ["MK", "A", "1", "2"], {"max_length": 61, "num_samples": 3, "seed": 0}
    wanted = plm.generate(model, prompts, **settings)
    monkeypatch.setattr(ProGen2, "join", lambda *_: pytest.fail("begun before the memory was looked at"))
    monkeypatch.setattr(writing, "free_memory", lambda _: 5 * text * token + 5 * STEP * token)
    with pytest.raises(MemoryError, match=r"keys and values of 12 texts of up to 61 tokens .* 5 at a time would") as no:
        plm.generate(model, prompts, max_tokens=10_000, **settings)
    assert "on cpu; 5 at a time would: give max_tokens=3" in str(no.value)
    monkeypatch.setattr(writing, "free_memory", lambda _: text * token)
    with pytest.raises(MemoryError, match="give a smaller max_length"):
        plm.generate(model, prompts, **settings)
    monkeypatch.undo()
    monkeypatch.setattr(writing, "free_memory", lambda _: 5 * text * token + 5 * STEP * token)
    enough = int(str(no.value).split("max_tokens=")[1])
    for budget in (None, enough):  # fewer at a time where nobody asked for a number
        assert plm.generate(model, prompts, max_tokens=budget, **settings) == wanted
    with pytest.raises(MemoryError):
        plm.generate(model, prompts, max_tokens=enough + 61, **settings)
    monkeypatch.setattr(writing, "free_memory", lambda _: None)
    assert plm.generate(model, prompts, **settings) == wanted, "a system that does not tell is trusted"


@pytest.mark.parametrize("fits", [1, 3])
def test_out_of_memory_halves_the_rows(model: plm.Model, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before stays; the rest is begun anew, and comes out the same."""
    prompts, settings = ["MK", "A", "1", "2GGG"], {"max_length": 30, "num_samples": 3, "seed": 0}
    wanted = plm.generate(model, prompts, **settings)
    step, tried = ProGen2.step, []

    def crowded(net: ProGen2, tokens: Any, state: Any) -> Any:
        tried.append(len(tokens))
        if len(tokens) > fits and len(tried) % 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return step(net, tokens, state)

    monkeypatch.setattr(ProGen2, "step", crowded)
    assert plm.generate(model, prompts, **settings) == wanted
    assert tried[0] == 12 and max(tried[-3:]) <= 3


def test_one_text_that_does_not_fit(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ProGen2, "step", full)
    with pytest.raises(MemoryError, match="a single text does not fit into the memory of cpu"):
        plm.generate(model, "MK", num_samples=4, max_length=20)
