"""What ProGen2 writes, token by token: against what the original wrote and against transformers' ``generate``."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from oracle_progen2 import CASES, GOLDEN, Relative, Twin, relative, save
from test_parity_progen2 import FLOAT64, round_as_the_original
from tiny import writing_progen2

import plm
from plm.decoding import Request, write
from plm.models.progen2 import ProGen2
from plm.packing import Packed
from plm.sampling import Greedy, Rules, Sampler, streams

EOS, TERMINALS = 2, ("1", "2")
ENDS = (EOS, 3, 4)
TOLD: dict[str, dict[str, Any]] = {name: json.loads((GOLDEN / name / "expected.json").read_text()) for name in CASES}
GREEDY = [(name, i) for name in CASES for i in range(len(TOLD[name]["greedy"]))]
FILTERS = [(name, i) for name in CASES for i in range(len(TOLD[name].get("sampling_filters", [])))]
TRUNCATED = [each for name in CASES for each in TOLD[name].get("truncate", [])]


def net_of(model: plm.Model) -> ProGen2:
    assert isinstance(model.net, ProGen2)
    return model.net


def until_end(ids: Sequence[int], given: int) -> tuple[int, ...]:
    """Ids up to the first end behind those that are given; the original goes on behind a terminal."""
    last = next((i for i in range(given, len(ids)) if ids[i] in ENDS), len(ids))
    return tuple(ids[: last + 1])


# What the original wrote


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "i"), GREEDY)
def test_stored_ids(name: str, i: int, dtype: str) -> None:
    """Exactly, up to our stop; and the residues up to the first terminal."""
    stored = TOLD[name]["greedy"][i]
    model = plm.load(GOLDEN / name, dtype=dtype)
    settings: dict[str, Any] = {"max_length": stored["max_length"], "temperature": 0}
    ((sample,),) = plm.generate(model, [stored["prompt_ids"]], **settings)
    assert sample.ids == until_end(stored["output_ids"], len(stored["prompt_ids"]))
    assert sample.stopped_by == ("end" if sample.ids[-1] in ENDS else "length")
    if "truncated" in stored:
        assert sample.sequence == stored["truncated"].strip("12")
    if stored.get("prompt", "M")[0] in TERMINALS:  # bare residues are read as 1 and residues
        assert plm.generate(model, stored["prompt"], **settings) == [[sample]]
        assert sample.reverse == stored["prompt"].startswith("2")


@pytest.mark.parametrize("name", CASES)
def test_stored_ids_behind_the_terminal(name: str) -> None:
    """All that is stored, in one batch: without terminals as ends the loop goes on as the original does."""
    model = plm.load(GOLDEN / name, dtype="float64")
    stored = TOLD[name]["greedy"]
    anything = torch.ones(net_of(model).config.outputs, dtype=torch.bool)
    requests = [
        Request(each["prompt_ids"], 0, each["max_length"], anything, start=each["prompt_ids"]) for each in stored
    ]
    for rows in (1, len(requests)):
        found = write(net_of(model), requests, Greedy(), Rules((EOS,)), partial(streams, 0), 1, rows)
        assert [list(text.ids) for (text,) in found] == [each["output_ids"] for each in stored]


def test_stored_ids_have_what_they_are_for() -> None:
    """A terminal at once and one later, texts from C to N and without a terminal, columns and rows of no token."""
    written = [(case["prompt_ids"], case["output_ids"]) for name, i in GREEDY if (case := TOLD[name]["greedy"][i])]
    texts = [until_end(ids, len(given)) for given, ids in written]
    assert {len(text) - len(given) for text, (given, _) in zip(texts, written, strict=True) if text[-1] in ENDS} > {1}
    assert {text[0] for text in texts} == {3, 4, 16, 33}
    assert any(token >= 30 for _, ids in written for token in ids)
    assert any(ids[-1] not in ENDS and 4 in ids for _, ids in written)


@pytest.mark.parametrize(("name", "i"), FILTERS)
def test_stored_distributions(name: str, i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the next token after temperature, top-k and top-p: the tokens that are kept, and their probabilities."""
    stored = TOLD[name]["sampling_filters"][i]
    sampler = Sampler(stored["temperature"], stored["top_k"] or None, stored["top_p"])
    net = net_of(plm.load(GOLDEN / name, dtype="float64"))
    round_as_the_original(monkeypatch)
    with torch.inference_mode():
        logits = net(Packed.from_ids([stored["prompt_ids"]])).logits[-1:]
    found = sampler.probabilities(logits)[0]
    # Probabilities move by less than the logits do, over the temperature, of which none is below 0.2: 1e-15 is seen.
    torch.testing.assert_close(found, torch.tensor(stored["probs"], dtype=torch.float64), rtol=0, atol=5 * FLOAT64)
    assert found.nonzero()[:, 0].tolist() == stored["kept_ids"]
    uniform = torch.linspace(0, 1, 400, dtype=torch.float64)[:-1]
    drawn = sampler(logits.expand(len(uniform), -1), uniform)
    assert set(drawn.tolist()) <= set(stored["kept_ids"])


@pytest.mark.parametrize("example", TRUNCATED, ids=[each["text"] or "empty" for each in TRUNCATED])
def test_stored_truncations(example: dict[str, Any]) -> None:
    """Of each text that the original cuts behind its first terminal, we stop there; the first token never counts."""
    model = writing_progen2()
    text, wanted = example["text"], example["truncated"]
    if len(text) < 2:  # there is a prompt, and a token at least behind it
        assert wanted == text
        return
    (first,), rest = model.tokenizer.encode(text[0]), text[1:]
    residues = int(text[0] not in TERMINALS)
    forced = dict(enumerate(rest, residues + 1))
    ((sample,),) = plm.generate(model, [[first]], max_length=len(text), forced=forced, seed=0)
    assert sample.ids == tuple(model.tokenizer.encode(wanted))
    assert sample.sequence == wanted.strip("12")
    assert sample.stopped_by == ("end" if wanted[-1] in TERMINALS else "length")


# What transformers writes

TWINS: list[tuple[Twin, Relative]] = [
    (Twin(layers=2, heads=16, head_size=6, rotated=6, feed_forward=50, seed=2), "codegen"),
    (Twin(layers=2, heads=24, head_size=3, rotated=2, vocabulary=90, outputs=90, seed=3), "gptj"),
]
LENGTHS = (9, 1, 5)  # of prompts
DECISIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_length": 40},
    "least": {"max_length": 40, "min_length": 25},
    "exact": {"max_length": 30, "min_length": 30},
    "penalty": {"max_length": 35, "min_length": 30, "repetition_penalty": 1.3},
    "favoured": {"max_length": 30, "min_length": 25, "repetition_penalty": 0.7},
    "no token twice": {"max_length": 26, "min_length": 26, "no_repeat_ngram_size": 1},
    "no pair twice": {"max_length": 35, "min_length": 35, "no_repeat_ngram_size": 2},
    "no run of four": {"max_length": 35, "min_length": 35, "no_repeat_ngram_size": 4},
    "banned": {"max_length": 30, "min_length": 25, "bad_words_ids": [[token] for token in range(5, 20)]},
    "all rules": {
        "max_length": 35,
        "min_length": 30,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[0], [1], [9], [17]],
    },
    "the whole context": {"max_length": 81, "min_length": 81},
}


@pytest.fixture(scope="module", params=TWINS, ids=lambda twin: f"{twin[0]}-{twin[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, plm.Model]:
    """The same weights in transformers and here, the ends more likely than other tokens.

    In float32, for in float64 theirs rounds to float32 within.
    """
    twin, kind = request.param
    theirs = relative(twin, kind)
    with torch.no_grad():
        theirs.lm_head.bias[list(ENDS)] += 1.5
    return theirs, plm.load(save(theirs, twin, tmp_path_factory.mktemp("twin")), dtype="float32")


def random_prompts(model: plm.Model) -> list[list[int]]:
    """A terminal and residues, no residue twice."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.tensor(model.tokenizer.residue_ids)
    draws = [letters[torch.randperm(len(letters), generator=generator)[:length]].tolist() for length in LENGTHS]
    return [[3 + i % 2, *ids[1:]] for i, ids in enumerate(draws)]


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions_of_transformers(pair: tuple[Any, plm.Model], name: str) -> None:
    """Each text exactly: with its cache, one prompt at a time, for its rules count padding as tokens of the text."""
    theirs, model = pair
    settings, wanted = dict(DECISIONS[name]), []
    for prompt in random_prompts(model):
        ids = torch.tensor([prompt])
        ends = {"eos_token_id": list(ENDS), "pad_token_id": 0}
        with torch.no_grad():
            (row,) = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **ends, **settings)
        wanted.append(tuple(row.tolist()))
    renamed = {
        "no_repeat": settings.pop("no_repeat_ngram_size", None),
        "banned": [token for (token,) in settings.pop("bad_words_ids", [])],
    }
    for max_tokens in (None, 1):
        found = plm.generate(
            model, random_prompts(model), temperature=0, max_tokens=max_tokens, likelihood=False, **renamed, **settings
        )
        assert [sample.ids for (sample,) in found] == wanted


def test_those_texts_end_in_both_ways(pair: tuple[Any, plm.Model]) -> None:
    _, model = pair
    some = [
        plm.generate(model, random_prompts(model), temperature=0, **DECISIONS[name]) for name in ("greedy", "exact")
    ]
    ways = Counter(sample.stopped_by for texts in some for (sample,) in texts)
    assert min(ways["end"], ways["length"]) >= 2


# Log-probabilities


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.5, "top_k": 20, "num_samples": 4}])
def test_log_probs_are_those_of_a_pass_over_the_whole_text(how: dict[str, Any]) -> None:
    """Of the model itself, whatever bent the choice: penalties, bans, forced residues, temperatures."""
    model = writing_progen2(torch.float64, vocabulary=37)
    prompts = [[3], [33, 3, 16, 12, 7], [4, 25, 7, 13, 9, 9], [16]]
    bent = {"repetition_penalty": 1.5, "no_repeat": 2, "banned": ["A", "2", 30], "min_length": 12, "forced": {9: "W"}}
    for settings in ({}, bent):
        found = plm.generate(model, prompts, max_length=30, seed=2, **settings, **how)
        for prompt, samples in zip(prompts, found, strict=True):
            for sample in samples:
                with torch.inference_mode():
                    logits = net_of(model)(Packed.from_ids([sample.ids[:-1]])).logits[len(prompt) - 1 :]
                written = torch.tensor(sample.ids[len(prompt) :])
                wanted = logits.log_softmax(-1).gather(1, written[:, None])[:, 0].float()
                # The noise floor is the rounding of float32, in which logits of at most 16 are kept.
                torch.testing.assert_close(sample.log_probs, wanted, rtol=0, atol=4 * 16 * 2**-24)
                assert (
                    len(sample.log_probs) == len(sample.ids) - len(prompt) and sample.log_probs.dtype == torch.float32
                )
