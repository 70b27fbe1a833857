"""Texts against transformers' ``generate``, and what they may and may not depend on."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from oracle_t5 import CASES, GOLDEN, Twin, hub_twin, pad, save
from safetensors.torch import load_file
from tiny import ankh
from torch import Tensor
from transformers.generation import GenerationMixin

import plm
from plm.beams import Finished, beam_search
from plm.decoding import Request, Text, write
from plm.models.t5 import EOS, START, T5
from plm.packing import Packed
from plm.sampling import Greedy, Rules, Sampler, streams

GENERATIONS = {name: json.loads((GOLDEN / name / "meta.json").read_text())["generation"] for name in CASES}
SETTINGS = (
    *("min_length", "max_length", "num_beams", "early_stopping", "length_penalty", "repetition_penalty"),
    *("num_return_sequences", "bad_words_ids"),
)
LENGTHS = (9, 4, 1, 17, 4)  # of prompts


def until_end(ids: Sequence[int]) -> tuple[int, ...]:
    """Ids up to the first end token; behind it transformers puts whatever fills its rows."""
    ids = list(ids)
    return tuple(ids[: ids.index(EOS) + 1] if EOS in ids else ids)


def ours(model: plm.Model, prompts: Sequence[Any], settings: dict[str, Any]) -> list[plm.Sample]:
    """``plm.generate`` by transformers' names, all samples of the first prompt first."""
    settings = dict(settings)
    renamed = {
        "num_samples": settings.pop("num_return_sequences", 1),
        "banned": [token for (token,) in settings.pop("bad_words_ids", [])],
    }
    found = plm.generate(model, prompts, temperature=0, **renamed, **settings)
    return [sample for samples in found for sample in samples]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in CASES for case in GENERATIONS[name]])
def test_stored_ids(name: str, case: str, dtype: str) -> None:
    """Exactly: greedy, with a least length, beams that stop early or not, penalties, and banned tokens."""
    stored = GENERATIONS[name][case]
    inputs = json.loads((GOLDEN / name / "inputs.json").read_text())
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    prompts = [ids[: sum(mask)] for ids, mask in rows]
    if "[0:1]" in stored["batch"]:
        prompts = prompts[:1]
    settings = {key: value for key, value in stored.items() if key in SETTINGS}
    found = ours(plm.load(GOLDEN / name, dtype=dtype), prompts, settings)
    assert [sample.ids for sample in found] == [tuple(ids) for ids in stored["until_eos"]]
    assert [sample.stopped_by for sample in found] == ["end" if s.ids[-1] == EOS else "length" for s in found]


@pytest.mark.parametrize("name", CASES)
def test_all_stored_ids_are_compared(name: str) -> None:
    """And all their settings are known here."""
    stored = load_file(GOLDEN / name / "expected.safetensors")
    assert {f"gen_{case}" for case in GENERATIONS[name]} == {key for key in stored if key.startswith("gen_")}
    told = {"batch", "ids", "until_eos", "fp32_and_f64_agree"}
    for case, about in GENERATIONS[name].items():
        assert about.keys() <= {*SETTINGS, *told}
        assert stored[f"gen_{case}"].tolist() == about["ids"]
        assert [list(until_end(ids)) for ids in about["ids"]] == about["until_eos"]


TWINS = (
    Twin(2, 2, 32, 4, 8, 48, "gated-silu", "false", buckets=64, seed=1),
    Twin(3, 2, 24, 3, 16, 40, "relu", "absent", seed=2),
    Twin(2, 1, 32, 2, 16, 64, "gated-gelu", "false", seed=3),
)


def beams(count: int, **settings: Any) -> dict[str, Any]:
    """All that a search finds."""
    return {"max_length": 16, "num_beams": count, "num_return_sequences": count, **settings}


DECISIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_length": 20},
    "least": {"max_length": 16, "min_length": 9},
    "exact": {"max_length": 12, "min_length": 12},
    "penalty": {"max_length": 20, "repetition_penalty": 1.4},
    "favoured": {"max_length": 12, "repetition_penalty": 0.7},
    "banned": {"max_length": 16, "bad_words_ids": [[token] for token in range(20, 36)]},
    "2 beams": beams(2),
    "3 beams, early": beams(3, early_stopping=True),
    "5 beams, never": beams(5, early_stopping="never"),
    "never, short": beams(3, early_stopping="never", length_penalty=-1.0),
    "short": beams(4, length_penalty=-0.5),
    "no penalty": beams(4, length_penalty=0.0),
    "the best 2 of 4, long": beams(4, length_penalty=2.0, num_return_sequences=2),
    "long, early": beams(4, length_penalty=2.0, early_stopping=True, min_length=7),
    "beams, least": beams(3, min_length=10),
    "beams, exact": beams(3, min_length=10, max_length=10),
    "beams, penalty": beams(3, repetition_penalty=1.4),
    "beams, favoured": beams(3, repetition_penalty=0.5),
    "beams, all rules": beams(4, min_length=5, repetition_penalty=1.3, bad_words_ids=[[0], [2], [5], [30]]),
    "two tokens": beams(3, max_length=2),
}


@pytest.fixture(scope="module", params=TWINS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, plm.Model]:
    """The same weights in transformers and here, in float64; the end is likely enough to come in half of the texts."""
    theirs = hub_twin(request.param)
    head = theirs.shared if request.param.tied else theirs.lm_head
    with torch.no_grad():
        head.weight[EOS] *= 2
    folder = save(theirs, request.param, tmp_path_factory.mktemp("twin"))
    return theirs.double(), plm.load(folder, dtype="float64")


def random_prompts(model: plm.Model, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = len(model.tokenizer.vocabulary)
    return [[*torch.randint(3, vocabulary, (length,), generator=generator).tolist(), EOS] for length in LENGTHS]


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions_of_transformers(pair: tuple[Any, plm.Model], name: str) -> None:
    """Each text of a batch exactly, in order, and what the beam search found it worth."""
    theirs, model = pair
    settings = DECISIONS[name]
    prompts = random_prompts(model)
    ids, mask = pad(prompts)
    with torch.no_grad():
        wanted = theirs.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            decoder_start_token_id=START,
            eos_token_id=EOS,
            pad_token_id=0,
            **settings,
        )
    found = ours(model, prompts, settings)
    assert [sample.ids for sample in found] == [until_end(row) for row in wanted.sequences.tolist()]
    if settings.get("num_beams", 1) > 1 and "repetition_penalty" not in settings:
        power = settings.get("length_penalty", 1.0)
        worth = torch.tensor([sample.ll_sum / len(sample.log_probs) ** power for sample in found])
        # The noise floor is the rounding of float32, in which transformers adds up at most 15 logarithms below 100.
        torch.testing.assert_close(worth, wanted.sequences_scores.float(), rtol=16 * 2**-23, atol=0)


@pytest.mark.parametrize("length_penalty", [-1.0, -0.1, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_a_search_is_settled_when_transformers_finds_it_so(early_stopping: Any, length_penalty: float) -> None:
    """Of three finished texts and a running one, whatever their log-probabilities."""
    length, asked = 12, Request([EOS], 0, 20, torch.ones(9, dtype=torch.bool))
    verdicts = []
    for worst, mean in (-10 * torch.rand(200, 2)).tolist():
        running = mean * (length - 1) ** length_penalty
        result = Finished(asked, 3, length_penalty, early_stopping)
        for worth in (worst, worst + 1, worst + 2):
            result.add(worth * 7**length_penalty, Text((START,) * 8, torch.zeros(7), "length"))
        hopeful = GenerationMixin._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=torch.tensor([[True]]),
            running_beam_scores=torch.tensor([[running, running - 1, running - 2]]),
            beam_scores=torch.tensor([[worst + 2, worst + 1, worst]]),
            is_sent_finished=torch.tensor([[True] * 3]),
            cur_len=length,
            max_length=asked.max_length,
            decoder_prompt_len=1,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
        )
        verdicts.append(not hopeful)
        assert result.settled(length - 1, running) == verdicts[-1]
    assert 20 < sum(verdicts) < 180


def test_those_texts_end_in_both_ways(pair: tuple[Any, plm.Model]) -> None:
    _, model = pair
    found = ours(model, random_prompts(model), DECISIONS["5 beams, never"])
    ways = Counter(sample.stopped_by for sample in found)
    assert min(ways["end"], ways["length"]) >= 3


PROMPTS = ("MKTAYIAK", "V", "QRQISFVKSHFSRQ", "MKTAYIAK", "LEE")


@pytest.fixture(scope="module")
def model() -> plm.Model:
    return ankh(torch.float64)


def net_of(model: plm.Model) -> T5:
    assert isinstance(model.net, T5)
    return model.net


def request(model: plm.Model, prompt: str, max_length: int = 12, min_length: int = 0) -> Request:
    allowed = torch.ones(len(model.tokenizer.vocabulary), dtype=torch.bool)
    return Request(model.tokenizer.encode(prompt), min_length, max_length, allowed)


def drawn(model: plm.Model, prompts: Sequence[str], **settings: Any) -> list[list[tuple[int, ...]]]:
    settings = {"num_samples": 3, "max_length": 12, "seed": 5, **settings}
    return [[sample.ids for sample in samples] for samples in plm.generate(model, prompts, **settings)]


def test_seeds_reproduce(model: plm.Model) -> None:
    assert drawn(model, PROMPTS) == drawn(model, PROMPTS)
    assert drawn(model, PROMPTS) != drawn(model, PROMPTS, seed=6)
    assert drawn(model, PROMPTS, seed=None) != drawn(model, PROMPTS, seed=None)
    same = drawn(model, PROMPTS)
    assert same[0] != same[3], "the same prompt at another place is another sample"
    assert len(set(same[0])) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [{}, {"temperature": 0, "num_samples": 1}, {"temperature": 0, "num_beams": 3}])
def test_a_text_does_not_depend_on_what_is_written_beside_it(dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Whatever ``max_tokens`` allows at a time, and whatever the other prompts are."""
    model = ankh(dtype)
    wanted = drawn(model, PROMPTS, **how)
    for max_tokens in (1, 60, 130, 10**6):
        assert drawn(model, PROMPTS, max_tokens=max_tokens, **how) == wanted
    others = [prompt if i == 2 else "ACDEFGHIKLMN"[: 2 + i] for i, prompt in enumerate(PROMPTS)]
    found = drawn(model, others, **how)
    assert found[2] == wanted[2] and found[0] != wanted[0]
    shorter = {**how, "max_length": 7}
    for short, long in zip(drawn(model, PROMPTS, **shorter), wanted, strict=True):
        if "num_beams" not in how:
            assert short == [ids[:7] for ids in long]


def test_more_samples_are_the_same_and_more(model: plm.Model) -> None:
    few, many = drawn(model, PROMPTS, num_samples=2), drawn(model, PROMPTS, num_samples=9)
    assert [samples[:2] for samples in many] == few


class Watched:
    """Counts the rows that go through ``step``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        step = T5.step

        def watched(net: T5, tokens: Tensor, state: Any) -> Tensor:
            self.rows.append(len(tokens))
            return step(net, tokens, state)

        monkeypatch.setattr(T5, "step", watched)


def test_finished_texts_leave_the_batch(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text costs as many steps as it has tokens, and the end of the last one is the end of the loop."""
    watched = Watched(monkeypatch)
    for settings in ({"num_samples": 4}, {"num_samples": 1, "temperature": 0}):
        watched.rows.clear()
        texts = [ids for samples in drawn(model, PROMPTS, max_length=40, **settings) for ids in samples]
        steps = [len(ids) - 1 for ids in texts]
        assert len(set(steps)) > 2
        assert watched.rows == [sum(count > t for count in steps) for t in range(max(steps))]
    ended = [prompt for prompt, ids in zip(PROMPTS, texts, strict=True) if ids[-1] == EOS]
    watched.rows.clear()
    drawn(model, ended, max_length=40, **settings)
    assert 0 < len(watched.rows) < 39


def test_settled_prompts_leave_the_beam_search(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three beams of every prompt as long as it is searched, alone as in a batch."""
    watched = Watched(monkeypatch)
    settings = {"temperature": 0, "num_beams": 3, "early_stopping": True, "max_length": 40}
    drawn(model, PROMPTS, **settings, max_tokens=1)
    assert set(watched.rows) == {3}
    alone, watched.rows = len(watched.rows), []
    drawn(model, PROMPTS, **settings)
    assert watched.rows[0] == 3 * len(PROMPTS) and watched.rows == sorted(watched.rows, reverse=True)
    assert sum(watched.rows) == 3 * alone and watched.rows[-1] < watched.rows[0]


def test_each_row_has_its_own_limits(model: plm.Model) -> None:
    """Greatest and least lengths, and tokens that may not be written, of three prompts in one batch."""
    bounds = ((3, 0), (9, 9), (40, 5), (2, 0))
    requests = [request(model, prompt, *bound) for prompt, bound in zip(PROMPTS, bounds, strict=False)]
    likely = write(net_of(model), requests[2:3], Greedy(), Rules((EOS,)), partial(streams, 0), 1, 1)[0][0].ids[1]
    requests[2].allowed[likely] = False
    drawn_texts = write(net_of(model), requests, Sampler(), Rules((EOS,)), partial(streams, 1), 5, 20)
    searched = beam_search(net_of(model), requests, Rules((EOS,)), 5)
    for texts in (drawn_texts, searched):
        for wanted, found in zip(requests, texts, strict=True):
            assert len(found) == 5
            for text in found:
                assert len(text.ids) <= wanted.max_length
                assert len(text.ids) > wanted.min_length or text.stopped_by == "length" or EOS not in text.ids[:-1]
                assert len(text.ids) >= wanted.min_length
                assert (text.stopped_by == "end") == (text.ids[-1] == EOS)
                assert text.stopped_by == "end" or len(text.ids) == wanted.max_length
        assert all(likely not in text.ids for text in texts[2])
        assert all(len(text.ids) == 9 and EOS not in text.ids[:-1] for text in texts[1])


def test_a_beam_search_with_fewer_tokens_than_beams(model: plm.Model) -> None:
    """One token is left, so there is one text; no banned token fills the other beams."""
    only = torch.zeros(len(model.tokenizer.vocabulary), dtype=torch.bool)
    only[5] = True
    asked = Request(model.tokenizer.encode("MK"), 0, 6, only)
    for text in beam_search(net_of(model), [asked], Rules((EOS,)), 4)[0]:
        assert text.ids == (START, 5, 5, 5, 5, 5)


@pytest.mark.parametrize("how", [{}, {"temperature": 0, "num_samples": 1}, {"temperature": 0, "num_beams": 4}])
def test_log_probs_are_those_of_a_pass_over_the_whole_text(model: plm.Model, how: dict[str, Any]) -> None:
    """Of the model itself, whatever bent the choice: penalties, bans, temperatures."""
    bent = {"repetition_penalty": 1.5, "banned": ["A", "<unk>"], "min_length": 4, "max_length": 12, "seed": 2}
    drawing = {} if how else {"temperature": 1.5, "top_k": 20, "num_samples": 4}
    given = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    for settings in ({"max_length": 12, "seed": 2}, bent):
        for ids, samples in zip(given, plm.generate(model, given, **settings, **how, **drawing), strict=True):
            decoder = Packed.from_ids([sample.ids[:-1] for sample in samples])
            written = torch.cat([torch.tensor(sample.ids[1:]) for sample in samples])
            with torch.inference_mode():
                logits = net_of(model)(Packed.from_ids([ids] * len(samples)), decoder=decoder).logits
            wanted = logits.log_softmax(-1).gather(1, written[:, None])[:, 0].float()
            found = torch.cat([sample.log_probs for sample in samples])
            # The noise floor is the rounding of float32, in which logits of at most 16 are kept.
            torch.testing.assert_close(found, wanted, rtol=0, atol=4 * 16 * 2**-24)
            assert all(len(sample.log_probs) == len(sample.ids) - 1 for sample in samples)
            sums = torch.stack([part.double().sum() for part in decoder.split(found)])
            assert [sample.ll_sum for sample in samples] == pytest.approx(sums.tolist())
            assert samples[0].ll_mean == pytest.approx(samples[0].ll_sum / len(samples[0].log_probs))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"max_length": 1}, "max_length counts the start token, so it must be at least 2, .* got max_length=1"),
        ({"max_length": 5, "min_length": 6}, "min_length must not be above it; got max_length=5, min_length=6"),
        ({"banned": range(144)}, "every token but the end is banned; allow some"),
        ({"banned": {*range(144)} - {EOS}}, "every token but the end is banned; allow some"),
    ],
)
def test_bounds_that_leave_nothing_to_write(model: plm.Model, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        plm.generate(model, "MKT", **settings)


def test_early_stopping_is_one_of_three(model: plm.Model) -> None:
    """Any other word used to count as False."""
    with pytest.raises(ValueError, match="early_stopping must be True, False or 'never'; got 'always'"):
        plm.generate(model, "MKT", temperature=0, num_beams=2, early_stopping="always")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [{"temperature": 0}, {}, {"temperature": 0, "num_beams": 2}])
def test_a_nan_is_never_written(how: dict[str, Any]) -> None:
    """It used to come back as tokens, chosen by nothing."""
    model = ankh()
    with torch.no_grad():
        net_of(model).decoder.blocks[1].feed_forward.down.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"sequence 1 gave a NaN .* in float32; .*plm verify"):
        plm.generate(model, "MKT", **how)
