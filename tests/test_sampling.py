"""How tokens are chosen, against the processors of transformers and against what the words say."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import ankh
from torch import Tensor
from transformers.generation import logits_process as published

import plm
from plm.models.t5 import EOS, START
from plm.packing import Packed
from plm.sampling import Greedy, Rules, Sampler, streams

END = 1
ROWS, VOCABULARY = 40, 30


def random_logits(ties: bool = False) -> Tensor:
    logits = 3 * torch.randn(ROWS, VOCABULARY, dtype=torch.float64)
    return logits.round() if ties else logits


def warped(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities after transformers' processors, in its order."""
    steps = [published.TemperatureLogitsWarper(temperature)]
    steps += [] if top_k is None else [published.TopKLogitsWarper(top_k)]
    steps += [] if top_p == 1 else [published.TopPLogitsWarper(top_p)]
    for step in steps:
        logits = step(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-17])
@pytest.mark.parametrize("top_k", [None, 1, 2, 7, VOCABULARY - 1, VOCABULARY, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1.7])
def test_probabilities_are_those_of_transformers(
    temperature: float, top_k: int | None, top_p: float, ties: bool
) -> None:
    """The same numbers, bit for bit: the formulas are the same, and so is their order."""
    logits = random_logits(ties)
    found = Sampler(temperature, top_k, top_p).probabilities(logits)
    assert torch.equal(found, warped(logits, temperature, top_k, top_p))


def test_probabilities_where_tokens_are_banned() -> None:
    """More tokens asked for than are left."""
    logits = random_logits().index_fill(1, torch.arange(5, VOCABULARY), -torch.inf)
    for settings in ((1.0, 7, 1.0), (0.5, None, 0.9), (2.0, 7, 0.3)):
        found = Sampler(*settings).probabilities(logits)
        assert torch.equal(found, warped(logits, *settings))
        assert (found[:, 5:] == 0).all() and found.isfinite().all()


def test_order_of_the_cuts() -> None:
    """``top_p`` is of what the temperature and ``top_k`` have left: 0.4/0.7 of two tokens is more than a half."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert Sampler(top_k=2, top_p=0.5).probabilities(logits).tolist() == [[1, 0, 0, 0]]
    both = Sampler(top_p=0.5).probabilities(logits)
    torch.testing.assert_close(both, torch.tensor([[4 / 7, 3 / 7, 0, 0]], dtype=torch.float64))
    assert Sampler(top_k=2, top_p=0.58).probabilities(logits)[0, 1] > 0


def test_float32_logits_give_float64_probabilities() -> None:
    logits = random_logits().float()
    found = Sampler(0.7).probabilities(logits)
    assert torch.equal(found, (logits.double() / 0.7).softmax(-1))


def test_draws_are_where_the_cumulative_distribution_passes() -> None:
    logits = torch.tensor([[0.5, 0, 0.25, 0.125, 0.125, 0]], dtype=torch.float64).log()
    near = 1e-12  # logarithm and softmax move the edges by one rounding
    places = {0: 0, 0.5 - near: 0, 0.5 + near: 2, 0.75 - near: 2, 0.75 + near: 3, 0.875 - near: 3, 0.875 + near: 4}
    places[1 - 2**-53] = 4  # the largest number that is drawn
    drawn = Sampler()(logits.expand(len(places), -1), torch.tensor(list(places), dtype=torch.float64))
    assert drawn.tolist() == list(places.values())


def test_a_token_without_probability_is_never_drawn() -> None:
    """Neither at the ends of the unit interval nor in a long row of them."""
    logits = torch.full((2, 1000), -torch.inf, dtype=torch.float64)
    logits[:, 400:403] = random_logits()[:1, :3]
    drawn = Sampler()(logits, torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [400, 402]


def test_greedy_is_the_most_probable_and_the_limit_of_drawing() -> None:
    logits, uniform = random_logits(), torch.rand(ROWS, dtype=torch.float64)
    wanted = logits.argmax(-1)
    assert torch.equal(Greedy()(logits, uniform), wanted)
    for sampler in (Sampler(top_k=1), Sampler(temperature=1e-5), Sampler(top_p=1e-9)):
        assert torch.equal(sampler(logits, uniform), wanted)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"temperature": -1.0}, r"temperature must be above 0, or 0 for the most probable token; got -1.0"),
        ({"temperature": math.nan}, "temperature must be above 0, .* got nan"),
        ({"temperature": math.inf}, "temperature must be above 0, .* got inf"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all tokens; got 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, r"top_p must be above 0 and at most 1; got 1.1"),
    ],
)
def test_settings_out_of_bounds(settings: dict[str, float], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Sampler(**settings)


@pytest.mark.parametrize("penalty", [1.0, 1.2, 0.5])
def test_rules_are_those_of_transformers(penalty: float) -> None:
    """Penalty, banned tokens and a least length, on logits and (as in a beam search) on log-probabilities."""
    banned = [3, 8, 29]
    written = torch.randint(VOCABULARY, (ROWS, 6))
    allowed = torch.ones(ROWS, VOCABULARY, dtype=torch.bool).index_fill(1, torch.tensor(banned), False)
    for logits in (random_logits(), random_logits().log_softmax(-1)):
        for early in (True, False):
            wanted = published.RepetitionPenaltyLogitsProcessor(penalty)(written, logits)
            wanted = published.NoBadWordsLogitsProcessor([[token] for token in banned], END)(written, wanted)
            wanted = published.MinLengthLogitsProcessor(7 if early else 6, END)(written, wanted)
            given = logits.clone()
            found = Rules((END,), penalty)(given, written, allowed, torch.full((ROWS,), not early))
            assert torch.equal(found, wanted)
            assert torch.equal(given, logits), "the logits that were given are still needed"


def test_rules_are_by_row() -> None:
    logits = torch.zeros(2, 4)
    allowed = torch.tensor([[True, True, False, True], [False, True, True, True]])
    found = Rules((END,))(logits, torch.zeros(2, 1, dtype=torch.int64), allowed, torch.tensor([False, True]))
    assert found.isfinite().tolist() == [[True, False, False, True], [False, True, True, True]]


def test_a_token_that_came_twice_is_penalised_once() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    found = Rules((END,), 2.0)(
        logits, torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([True])
    )
    assert found.tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan])
def test_penalties_out_of_bounds(penalty: float) -> None:
    with pytest.raises(ValueError, match="repetition_penalty must be above 0, 1 for none; got"):
        Rules((END,), penalty)


def test_a_stream_depends_on_its_seed_and_its_name_alone() -> None:
    """Not on its length, on the streams beside it, nor on torch's own generator."""
    names = [(prompt, sample) for prompt in range(3) for sample in range(4)]
    together = streams(7, names, 50)
    torch.rand(3)
    for row, name in zip(together, names, strict=True):
        assert torch.equal(streams(7, [name], 50)[0], row)
        for length in (1, 2, 15, 16, 17, 49):
            assert torch.equal(streams(7, [name], length)[0], row[:length])
    state = torch.get_rng_state()
    streams(7, names, 50)
    assert torch.equal(torch.get_rng_state(), state)


def test_streams_differ() -> None:
    """By seed, by prompt and by sample; ``1 12`` is not ``11 2``."""
    names = [(1, 12), (11, 2), (1, 1), (12, 1), (0, 0), (0, 1), (1, 0)]
    draws = torch.cat([streams(seed, names, 20) for seed in (0, 1, -1, 2**40)])
    assert len(draws.flatten().unique()) == draws.numel()
    assert ((draws >= 0) & (draws < 1)).all() and draws.dtype == torch.float64
    # The mean of 560 uniform numbers is 0.5 with a standard deviation of 0.012; five of those are allowed.
    assert abs(draws.mean() - 0.5) < 0.06


def exact(model: plm.Model, letters: str, tokens: int, prompt: str, how: tuple[Any, ...], penalty: float) -> dict:
    """The probability of every text of at most ``tokens`` tokens among ``letters`` and the end.

    Each prefix is read whole, without a cache, and its next token distributed by transformers' processors.
    """
    tokenizer = model.tokenizer
    choices = [tokenizer.vocabulary.index(letter) for letter in letters]
    prefixes = [(START, *p) for count in range(tokens) for p in itertools.product(choices, repeat=count)]
    batch = Packed.from_ids([tokenizer.encode(prompt)] * len(prefixes))
    decoder = Packed.from_ids(prefixes)
    with torch.no_grad():
        logits = model.net(batch, decoder=decoder).logits[decoder.offsets[1:].long() - 1].float().double()
    kept, penalise = torch.tensor([EOS, *choices]), published.RepetitionPenaltyLogitsProcessor(penalty)
    logits = torch.full_like(logits, -torch.inf).index_copy(1, kept, logits[:, kept])
    rows = [penalise(torch.tensor([prefix]), row[None]) for prefix, row in zip(prefixes, logits, strict=True)]
    steps = dict(zip(prefixes, warped(torch.cat(rows), *how), strict=True))
    texts = {(START,): 1.0}
    for _ in range(tokens):
        for text in [text for text in texts if text in steps]:
            probability = texts.pop(text)
            texts |= {(*text, token): probability * steps[text][token].item() for token in (EOS, *choices)}
    return texts


def p_value(counts: Counter[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-square test; texts that are expected less than five times count as one."""
    draws = sum(counts.values())
    usual = [text for text, p in probabilities.items() if p * draws >= 5]
    found = [counts[text] for text in usual]
    wanted = [probabilities[text] * draws for text in usual]
    rare = draws - sum(wanted)
    if rare > 1e-6:
        found, wanted = [*found, draws - sum(found)], [*wanted, rare]
    statistic = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True))
    half = torch.tensor([len(wanted) - 1, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(*half).item()


HOW = {
    "plain": (1.0, None, 1.0),
    "cold": (0.6, None, 1.0),
    "hot": (1.8, None, 1.0),
    "top-k": (1.0, 3, 1.0),
    "top-p": (1.0, None, 0.8),
    "all": (1.3, 4, 0.9),
}


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("how", HOW)
def test_texts_come_as_often_as_they_should(how: str, penalty: float) -> None:
    """3,000 texts of up to three tokens among four letters and the end, against their exact probabilities."""
    model = ankh(torch.float64)
    temperature, top_k, top_p = HOW[how]
    letters, tokens, draws = "ALGV", 3, 3000
    banned = set(range(len(model.tokenizer.vocabulary))) - {EOS, *model.tokenizer.residues(letters)}
    (samples,) = plm.generate(
        model,
        "V",
        num_samples=draws,
        max_length=tokens + 1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        banned=banned,
        seed=0,
    )
    counts = Counter(sample.ids for sample in samples)
    wanted = exact(model, letters, tokens, "V", HOW[how], penalty)
    assert sum(wanted.values()) == pytest.approx(1)
    assert all(wanted[ids] > 0 for ids in counts)
    assert p_value(counts, wanted) > 1e-3
    other = exact(model, letters, tokens, "V", HOW["plain" if how == "hot" else "hot"], penalty)
    assert p_value(counts, other) < 1e-9, "the test is sharp"
