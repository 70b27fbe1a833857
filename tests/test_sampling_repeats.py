"""No run of tokens twice, against transformers; and ProGen2's texts at every setting against exact probabilities."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from test_sampling import p_value
from tiny import writing_progen2
from torch import Tensor
from transformers.generation import logits_process as published

import plm
from plm.packing import Packed
from plm.sampling import Rules, repeats

ROWS, VOCABULARY = 60, 7


def ruled(rules: Rules, logits: Tensor, written: Tensor, length: Tensor | None = None) -> Tensor:
    allowed = torch.ones(logits.shape, dtype=torch.bool)
    return rules(logits, written, allowed, torch.ones(len(logits), dtype=torch.bool), length)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 13])
@pytest.mark.parametrize("tokens", [1, 2, 5, 12])
def test_repeats_are_those_of_transformers(size: int, tokens: int) -> None:
    """The same numbers, bit for bit, but where no token at all would be left."""
    written, logits = torch.randint(VOCABULARY, (ROWS, tokens)), torch.randn(ROWS, VOCABULARY)
    written[ROWS // 2 :] %= 2  # many repeats
    written[-1] = 3
    wanted = published.NoRepeatNGramLogitsProcessor(size)(written, logits)
    found = ruled(Rules((), no_repeat=size), logits, written)
    stuck = (wanted == -torch.inf).all(-1)
    assert torch.equal(found[~stuck], wanted[~stuck])
    assert torch.equal(found[stuck], logits[stuck])
    banned = repeats(written, torch.full((ROWS,), tokens), size, VOCABULARY)
    assert torch.equal(banned, wanted == -torch.inf)
    assert banned.any() == (size <= tokens), "or there is nothing to compare"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_of_any_length_side_by_side(size: int) -> None:
    """What fills a row up behind its text is no part of it, though it may look like a run."""
    lengths = torch.arange(1, 21)
    written = torch.randint(3, (20, 20))
    filled = torch.where(torch.arange(20) < lengths[:, None], written, written[:, :1])
    together = repeats(filled, lengths, size, 3)
    for row, length in enumerate(lengths.tolist()):
        one = filled[row : row + 1, :length]
        alone = repeats(one, torch.tensor([length]), size, 3)
        assert torch.equal(together[row : row + 1], alone)
        wanted = published.NoRepeatNGramLogitsProcessor(size)(one, torch.zeros(1, 3))
        assert torch.equal(alone, wanted == -torch.inf)


def test_where_nothing_else_is_left_a_run_may_come_again() -> None:
    """Of two tokens, one is banned and the other would repeat; a token that was banned stays so."""
    logits, written = torch.zeros(1, 4), torch.tensor([[2, 2, 3]])
    allowed = torch.tensor([[False, False, True, False]])
    found = Rules((1,), no_repeat=1)(logits, written, allowed, torch.tensor([True]))
    assert found.tolist() == [[-torch.inf, -torch.inf, 0, -torch.inf]]
    allowed[0, 0] = True
    found = Rules((1,), no_repeat=1)(logits, written, allowed, torch.tensor([True]))
    assert found.tolist() == [[0, -torch.inf, -torch.inf, -torch.inf]]


def test_tokens_that_the_head_does_not_have() -> None:
    """A tag of a prompt has a row in the embedding and no column: it may repeat nothing, and is penalised nowhere."""
    written = torch.tensor([[33, 5, 33, 5, 33], [33, 6, 5, 33, 6]])
    found = ruled(Rules((), no_repeat=2), torch.zeros(2, 8), written)
    assert (found == -torch.inf).nonzero().tolist() == [[0, 5], [1, 5]]
    penalised = ruled(Rules((), repetition_penalty=2.0), torch.ones(2, 8), written)
    assert (penalised == 0.5).nonzero().tolist() == [[0, 5], [1, 5], [1, 6]]


@pytest.mark.parametrize("size", [0, -1])
def test_runs_have_a_token_at_least(size: int) -> None:
    with pytest.raises(ValueError, match=f"no_repeat must be at least 1, or None to allow repeats; got {size}"):
        Rules((), no_repeat=size)


# Texts as often as they should come

LETTERS, ENDS, LONGEST = "ALGV", "12", 6
PROMPTS = ("1V", "2AG", "1AGL")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.9},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "both cuts": {"temperature": 1.4, "top_k": 4, "top_p": 0.85},
    "penalty": {"repetition_penalty": 2.0},
    "no token twice": {"no_repeat": 1},
    "no pair twice": {"no_repeat": 2},
    "banned": {"banned": "AG1"},
    "forced": {"forced": {4: "L"}},
    "least": {"min_length": 6},
    "all": {
        "temperature": 1.3,
        "top_k": 4,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "no_repeat": 2,
        "banned": "1",
        "forced": {4: "V"},
        "min_length": 5,
    },
}


@pytest.fixture(scope="module")
def model() -> plm.Model:
    """Its terminals are about as likely as its letters."""
    return writing_progen2(torch.float64)


@pytest.fixture(scope="module")
def logits(model: plm.Model) -> dict[tuple[int, ...], Tensor]:
    """Of every text that can be written to the prompts and goes on: read whole, without a cache."""
    letters = model.tokenizer.encode(LETTERS)
    texts = []
    for prompt in map(model.tokenizer.encode, PROMPTS):
        for count in range(LONGEST - len(prompt)):
            texts += [(*prompt, *more) for more in itertools.product(letters, repeat=count)]
    batch = Packed.from_ids(texts)
    with torch.no_grad():
        found = model.net(batch).logits[batch.offsets[1:].long() - 1]  # type: ignore[call-arg]
    return dict(zip(texts, found.float().double(), strict=True))


def exact(
    model: plm.Model, logits: dict[tuple[int, ...], Tensor], prompt: str, settings: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    """The probability of every text, each next token distributed by transformers' processors in transformers' order."""
    encode, given = model.tokenizer.encode, tuple(model.tokenizer.encode(prompt))
    kept = {*encode(LETTERS), *encode(ENDS)} - set(encode(settings.get("banned", "")))
    steps: list[Any] = [published.RepetitionPenaltyLogitsProcessor(settings.get("repetition_penalty", 1.0))]
    if "no_repeat" in settings:
        steps.append(published.NoRepeatNGramLogitsProcessor(settings["no_repeat"]))
    steps.append(published.SuppressTokensLogitsProcessor([token for token in range(32) if token not in kept]))
    steps.append(published.MinLengthLogitsProcessor(settings.get("min_length", 0), encode(ENDS)))
    steps.append(published.TemperatureLogitsWarper(settings.get("temperature", 1.0)))
    steps += [published.TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []
    steps += [published.TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    forced = {place: encode(letter)[0] for place, letter in settings.get("forced", {}).items()}
    texts, found = {given: 1.0}, {}
    while texts:
        text, probability = texts.popitem()
        if len(text) == LONGEST or (len(text) > len(given) and text[-1] in encode(ENDS)):
            found[text] = probability
            continue
        row = logits[text][None]
        for step in steps:
            row = step(torch.tensor([text]), row)
        chances = row.softmax(-1)[0]
        if len(text) in forced:  # positions count residues, and the terminal stands before them
            chances = torch.zeros_like(chances)
            chances[forced[len(text)]] = 1
        texts |= {(*text, token): probability * p for token, p in enumerate(chances.tolist()) if p}
    return found


def drawn(model: plm.Model, prompts: Any, settings: dict[str, Any], **more: Any) -> list[list[tuple[int, ...]]]:
    kept = {*LETTERS, *ENDS} - set(settings.get("banned", ""))
    banned = [token for token in range(32) if token not in {model.tokenizer.encode(each)[0] for each in kept}]
    how = {**settings, "banned": banned, "max_length": LONGEST, "likelihood": False, "seed": 0, **more}
    return [[sample.ids for sample in samples] for samples in plm.generate(model, prompts, **how)]


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_come_as_often_as_they_should(model: plm.Model, logits: dict[tuple[int, ...], Tensor], name: str) -> None:
    """800 texts to each of three prompts, 200 at a time, of up to four tokens among four letters and two ends.

    At 1 in 1,000 for each of the 41 comparisons of this file, a right program would fail with 4 % of the seeds; this
    one is fixed.
    """
    settings, sharp = SETTINGS[name], []
    found = drawn(model, PROMPTS, settings, num_samples=800, max_tokens=200 * LONGEST)
    for prompt, texts in zip(PROMPTS, found, strict=True):
        counts, wanted = Counter(texts), exact(model, logits, prompt, settings)
        assert sum(wanted.values()) == pytest.approx(1)
        assert set(counts) <= set(wanted)
        assert p_value(counts, wanted) > 1e-3
        wrong = exact(model, logits, prompt, SETTINGS["cold" if name == "hot" else "hot"])
        sharp.append(not set(counts) <= set(wrong) or p_value(counts, wrong) < 1e-9)
    assert any(sharp), "another setting would be noticed"


@pytest.mark.parametrize("name", ["plain", "all"])
def test_one_text_to_each_of_many_prompts(model: plm.Model, logits: dict[tuple[int, ...], Tensor], name: str) -> None:
    """800 times the same prompt, each with a stream of its own."""
    texts = drawn(model, [PROMPTS[1]] * 800, SETTINGS[name])
    assert p_value(Counter(text for (text,) in texts), exact(model, logits, PROMPTS[1], SETTINGS[name])) > 1e-3
