"""Scores against stored truths and against the words restated with transformers' own networks, in float64."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

import oracle_bert
import oracle_esm
import oracle_t5
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import ankh, ankh3, ankh3_without_files, encoder_alone, igbert, prostt5, prott5
from torch import Tensor

import plm
from plm import running
from plm.models.t5 import START
from plm.scoring import score_rows
from plm.tokens import Task, Tokenizer
from plm_kernels import packing_available

# Two float64 programs that add in another order differ by 1e-13 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
SEQUENCES = ["MKTAYIAKQR", "V", "QISFVKSHFSRQLEE", "MK"]
PAIRS = ["EVQLVESGG|DIQMTQS", "Q|V", "QVQ|EIVLTQSPA"]
needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


# T5


@pytest.mark.parametrize("name", oracle_t5.CASES)
def test_stored_pseudo_likelihood(name: str) -> None:
    """Of Ankh's own formula, with a vocabulary made for the case: what its meta.json ignores is in brackets."""
    folder = oracle_t5.GOLDEN / name
    about = json.loads((folder / "meta.json").read_text())["pseudo_likelihood"]
    expected = load_file(folder / "expected.safetensors")
    prefix, *ids, end = expected["pll_input_ids"][0].tolist()
    model = plm.load(folder, dtype="float64")
    letters = iter(ascii_letters)
    size = len(model.tokenizer.vocabulary)
    vocabulary = [f"<{i}>" if i in about["ignore"] else next(letters) for i in range(size)]
    vocabulary[about["sentinel"]] = "<extra_id_0>"
    tokenizer = Tokenizer(tuple(vocabulary), f"<{end}>", "<2>", tasks={"nlu": Task(vocabulary[prefix])})
    text = "".join(vocabulary[i] for i in ids)
    (found,) = plm.score(plm.Model(model.net, tokenizer, model.checkpoint), text)
    same(found.per_residue, expected["pll_per_position"])
    assert math.exp(found.mean) == pytest.approx(about["value"], abs=FLOAT64)
    assert len(ids) == about["length"] and about["shift"] == 1 and about["start"] == START


T5_TWINS = (
    oracle_t5.Twin(2, 2, 32, 4, 8, 48, "gated-silu", "false", buckets=64, seed=1),
    oracle_t5.Twin(3, 2, 24, 3, 16, 40, "relu", "absent", seed=2),
)


@torch.no_grad()
def ankh_pseudo_likelihood(theirs: Any, tokenizer: Tokenizer, text: str) -> Tensor:
    """One pass per residue, padded with nothing, and brackets silenced by their text."""
    ids = tokenizer.encode(text)
    silent = [i for i, token in enumerate(tokenizer.vocabulary) if token.startswith(("<", "["))]
    found = []
    for place in range(len(text)):
        hidden = [*ids[:place], tokenizer.sentinel(0), *ids[place + 1 :]]
        decoder = torch.tensor([[0, tokenizer.sentinel(0)]])
        logits = theirs(input_ids=torch.tensor([hidden]), decoder_input_ids=decoder).logits[0, -1]
        found.append(logits.index_fill(0, torch.tensor(silent), -torch.inf).log_softmax(-1)[ids[place]])
    return torch.stack(found)


@pytest.mark.parametrize("twin", T5_TWINS, ids=str)
def test_pseudo_likelihood_of_a_t5(twin: oracle_t5.Twin, tmp_path: Path) -> None:
    theirs = oracle_t5.hub_twin(twin)
    model = plm.load(oracle_t5.save(theirs, twin, tmp_path), dtype="float64")
    for text, found in zip(SEQUENCES, plm.score(model, SEQUENCES), strict=True):
        with oracle_esm.CleanFloat64():
            same(found.per_residue, ankh_pseudo_likelihood(oracle_t5.in_float64(theirs), model.tokenizer, text))


@torch.inference_mode()
def restated(model: plm.Model, ids: list[int], first: int, count: int) -> Tensor:
    """The same with our own network, of ids that have ``count`` residues from ``first`` on."""
    found = []
    for place in range(first, first + count):
        hidden = [*ids[:place], model.tokenizer.sentinel(0), *ids[place + 1 :]]
        decoder = plm.Packed.from_ids([[START, model.tokenizer.sentinel(0)]])
        logits = model.net(plm.Packed.from_ids([hidden]), decoder=decoder).logits[-1]  # type: ignore[call-arg]
        spoken = torch.tensor([token[0] not in "<[" for token in model.tokenizer.vocabulary])
        found.append(logits.masked_fill(~spoken, -torch.inf).log_softmax(-1)[ids[place]])
    return torch.stack(found)


def test_tasks() -> None:
    """Ankh3 is scored with NLU, ProstT5 as residues, unless told otherwise."""
    for model, task, chosen, text in (
        (ankh3(torch.float64), None, "nlu", "MKTA"),
        (ankh3(torch.float64), "s2s", "s2s", "MKTA"),
        (prostt5(torch.float64), None, "aa2fold", "MKTA"),
        (prostt5(torch.float64), "fold2aa", "fold2aa", "dvva"),
    ):
        ids = model.tokenizer.encode(text, task=chosen)
        same(plm.score(model, text, task=task)[0].per_residue, restated(model, ids, 1, len(text)))
    bare = ankh3(torch.float64)
    same(plm.score(bare, "MKTA", task="none")[0].per_residue, restated(bare, bare.tokenizer.encode("MKTA"), 0, 4))


def test_a_pair_of_igt5() -> None:
    """The end token between the chains is not scored, but is there."""
    model = prott5(torch.float64)
    ids = model.tokenizer.encode("VQL</s>EVV")
    wanted = restated(model, ids, 0, 7)
    same(plm.score(model, ("VQL", "EVV"))[0].per_residue, torch.cat([wanted[:3], wanted[4:]]))


def test_ankh3_without_its_vocabulary_file() -> None:
    model = ankh3_without_files()
    with pytest.raises(ValueError, match=r"task='nlu' needs the id of \[NLU\], .*put its tokenizer.json or spiece"):
        plm.score(model, "MKT")
    assert len(plm.score(model, "MKT", task="none")[0].per_residue) == 3


# BERT


@pytest.mark.parametrize("name", oracle_bert.CASES)
def test_stored_log_probabilities(name: str) -> None:
    """Every residue of the third sequence hidden in turn, its U and B as they are: the verb would read them as X."""
    folder = oracle_bert.GOLDEN / name
    ids = [i for i in json.loads((folder / "inputs.json").read_text())["input_ids"][2] if i][1:-1]
    model = plm.load(folder, dtype="float64")
    ((_, found),) = score_rows(model, [bytes(ids)])
    same(found.per_residue, load_file(folder / "expected.safetensors")["pseudo_logp_row2"][range(len(ids)), ids])
    about = json.loads((folder / "meta.json").read_text())
    assert found.total == pytest.approx(about["pll_row2"], abs=FLOAT64)
    assert found.mean == pytest.approx(about["pll_row2"] / len(ids), abs=FLOAT64)


BERT_TWIN = oracle_bert.Twin(2, 32, 4, 40, seed=1)
ESM_TWINS = (
    oracle_esm.Twin("esm2", 2, 32, 4, 128, seed=1),
    oracle_esm.Twin("esm2", 2, 32, 4, 128, token_dropout=False, seed=2),
    oracle_esm.Twin("esm1b", 2, 24, 3, 52, seed=3),
)


@torch.no_grad()
def masked(theirs: Any, ids: list[int], mask: int, skipped: int) -> Tensor:
    """Log-probability of every token that is not ``skipped``, but the first and the last, each hidden alone."""
    places = [i for i, token in enumerate(ids[:-1]) if i > 0 and token != skipped]
    copies = [[mask if i == place else token for i, token in enumerate(ids)] for place in places]
    rows = [theirs(input_ids=torch.tensor([copy]), attention_mask=torch.ones(1, len(ids))).logits[0] for copy in copies]
    return torch.stack([row.log_softmax(-1)[place, ids[place]] for row, place in zip(rows, places, strict=True)])


@torch.no_grad()
def seen(theirs: Any, ids: list[int], skipped: int) -> Tensor:
    """The same with nothing hidden."""
    log_probs = theirs(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].log_softmax(-1)
    return torch.stack([log_probs[i, token] for i, token in enumerate(ids[:-1]) if i > 0 and token != skipped])


@pytest.mark.parametrize("given", [SEQUENCES, PAIRS], ids=["single", "pairs"])
def test_bert(given: list[str], tmp_path: Path) -> None:
    """Of a pair all residues but not the token between the chains, each hidden while the other chain is there."""
    theirs = oracle_bert.hub_twin(BERT_TWIN, transformers.BertForMaskedLM)
    theirs.save_pretrained(tmp_path)
    model, theirs = plm.load(tmp_path, dtype="float64"), theirs.double()
    tokenizer = model.tokenizer
    found, fast = plm.score(model, given), plm.score(model, given, how="single-pass")
    for text, slow, single in zip(given, found, fast, strict=True):
        ids = tokenizer.encode(text)
        same(slow.per_residue, masked(theirs, ids, tokenizer.mask_id, tokenizer.separator_id))
        same(single.per_residue, seen(theirs, ids, tokenizer.separator_id))
        assert len(slow.per_residue) == len(text.replace("|", ""))


@pytest.mark.parametrize("twin", ESM_TWINS, ids=str)
def test_esm(twin: oracle_esm.Twin, tmp_path: Path) -> None:
    theirs = oracle_esm.hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    model, theirs = plm.load(tmp_path, dtype="float64"), oracle_esm.in_float64(theirs)
    found, fast = plm.score(model, SEQUENCES), plm.score(model, SEQUENCES, how="single-pass")
    for text, slow, single in zip(SEQUENCES, found, fast, strict=True):
        ids = model.tokenizer.encode(text)
        with oracle_esm.CleanFloat64():
            same(slow.per_residue, masked(theirs, ids, model.tokenizer.mask_id, -1))
            same(single.per_residue, seen(theirs, ids, -1))


def test_pairs_in_every_form() -> None:
    model = igbert()
    wanted = plm.score(model, "EVQLV|DIQ")[0].per_residue
    for given in (("EVQLV", "DIQ"), [("EVQLV", "DIQ")], ["EVQLV|DIQ"], ["EVQLV[SEP]DIQ"], iter([("EVQLV", "DIQ")])):
        assert torch.equal(plm.score(model, given)[0].per_residue, wanted)
    both = plm.score(model, [("EVQLV", "DIQ"), ("DIQ", "EVQLV")])
    assert torch.equal(both[0].per_residue, wanted)
    assert (both[1].per_residue - wanted).abs().max() > 1e-3


def test_rare_letters_are_scored_as_x() -> None:
    model = igbert()
    assert torch.equal(plm.score(model, "MUK")[0].per_residue, plm.score(model, "MXK")[0].per_residue)


# All


@needs_packing
@pytest.mark.parametrize("make", [ankh, ankh3, igbert])
def test_order_and_budget_do_not_matter(make: Callable[[], plm.Model]) -> None:
    """In float32 not a bit."""
    model = make()
    alone = [plm.score(model, text)[0].per_residue for text in SEQUENCES]
    for max_tokens in (1, 7, 40, None):
        for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
            found = plm.score(model, [SEQUENCES[i] for i in order], max_tokens=max_tokens)
            assert all(torch.equal(each.per_residue, alone[i]) for i, each in zip(order, found, strict=True))


def test_a_stream_names_its_sequences(model: plm.Model) -> None:
    """Longest first, as everywhere."""
    rows = running.encode(model, SEQUENCES)
    for how in ("pseudo-likelihood", "single-pass"):
        streamed = list(score_rows(model, rows, how=how))
        assert [i for i, _ in streamed] == [2, 0, 3, 1]
        for (i, each), wanted in zip(sorted(streamed), plm.score(model, SEQUENCES, how=how), strict=True):
            assert torch.equal(each.per_residue, wanted.per_residue), i


def test_totals_and_means(model: plm.Model) -> None:
    (found,) = plm.score(model, "MKTAYIAK")
    assert found.per_residue.shape == (8,) and found.per_residue.dtype == torch.float32
    assert found.total == found.per_residue.double().sum().item()
    assert found.mean == pytest.approx(found.total / 8)
    assert repr(found) == f"Score(total={found.total:.4f}, mean={found.mean:.4f}, residues=8)"
    assert (found.per_residue < 0).all() and not found.per_residue.is_inference()


def test_auto_is_the_pseudo_likelihood(model: plm.Model) -> None:
    found = {how: plm.score(model, "MKTAY", how=how)[0] for how in ("auto", "pseudo-likelihood", "single-pass")}
    assert torch.equal(found["auto"].per_residue, found["pseudo-likelihood"].per_residue)
    assert (found["auto"].per_residue - found["single-pass"].per_residue).abs().max() > 1e-3


def test_bfloat16_is_scored_in_float32() -> None:
    for make in (ankh, igbert):
        exact, half = (plm.score(make(dtype), "MKTAYIAK")[0].per_residue for dtype in (torch.float64, torch.bfloat16))
        assert half.dtype == torch.float32 and exact.dtype == torch.float64
        # The noise floor is bfloat16's: 0.4 % of logits that are at most 16, summed over a few layers.
        assert 1e-4 < (half - exact).abs().max() < 0.5


def test_no_sequences(model: plm.Model) -> None:
    assert plm.score(model, []) == []


# Errors


@pytest.mark.parametrize(
    ("model", "settings", "wrong"),
    [
        (ankh(), {"how": "single-pass"}, "a T5 has no single-pass score; choose 'pseudo-likelihood'"),
        (encoder_alone(), {}, "this checkpoint is an encoder alone; use one with a decoder"),
        (igbert(lm_head=False), {}, "igbert has no language-model head, so it gives no probabilities"),
        (igbert(), {"how": "masked"}, "how='masked' is unknown; choose 'auto', 'pseudo-likelihood' or 'single-pass'"),
        (igbert(), {"task": "nlu"}, "task 'nlu' is unknown; igbert has no tasks: leave it out"),
        (ankh(), {"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        (igbert(), {"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        (igbert(), {"max_tokens": 0, "how": "single-pass"}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_scored(model: plm.Model, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        plm.score(model, "MKT", **settings)


def test_all_bad_sequences_are_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = igbert()
    monkeypatch.setattr(type(model.net), "encode", lambda *_: pytest.fail("computed before the input was checked"))
    with pytest.raises(plm.InputError) as caught:
        plm.score(model, ["EV|DI", "EV", "|DI", "EV|", "EV|D|I", "E1|DI", "M" * 30 + "|" + "M" * 9])
    assert [fault.record for fault in caught.value.faults] == [2, 3, 4, 5, 6, 7]
    with pytest.raises(TypeError, match=r"plm\.load\('igbert'\)"):
        plm.score("igbert", "MKT")  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "how"), [(ankh, "auto"), (igbert, "auto"), (igbert, "single-pass")])
def test_a_nan_is_never_returned(make: Callable[[], plm.Model], how: Any) -> None:
    model = make()
    broken = replace(model, net=copy.deepcopy(model.net))
    with torch.no_grad():
        broken.net.embed.weight[model.tokenizer.vocabulary.index("K"), 3] = torch.nan
    with pytest.raises(FloatingPointError, match="sequence 1 gave a NaN or an infinity"):
        plm.score(broken, ["MAKAM"], how=how)


@pytest.mark.parametrize(("make", "text"), [(ankh, "MK<extra_id_0>T"), (igbert, "MK<mask>T")])
def test_what_is_no_residue_has_no_score(make: Callable[[], plm.Model], text: str) -> None:
    with pytest.raises(plm.InputError, match="is no residue"):
        plm.score(make(), ["MKT", text])
