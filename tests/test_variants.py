"""Scores of variants against stored truths and against their formulas restated with plain loops, in float64."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import GOLDEN, NAMES
from safetensors.torch import load_file
from tiny import ankh, ankh3, encoder_alone, igbert
from torch import Tensor

import plm
from plm.models.t5 import START
from plm.mutations import mutated, single_substitutions
from plm.packing import Packed
from plm.variant_effects import choose_how, encode, variant_rows

# Two float64 programs that add in another order differ by 1e-13 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
PROGEN2 = Path(__file__).parent / "golden" / "progen2"
WILD_TYPE = "MKTAYIAKQR"
SUBSTITUTIONS = ["M1A", "R10W", "K2E:I6V", "WT", "A4T:A7T:Q9M", "M1M", "MKTAYIAKQW", "M1A"]
INDELS = ["K2del", "A4_I6del", "K2_T3insGG", "M1delinsAV", "MKTAYIAKQRW", "M1A:R10del"]


def close(found: list[float], wanted: list[float], tolerance: float = FLOAT64) -> None:
    torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(wanted).double(), rtol=0, atol=tolerance)


# Stored truths


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("how", "table"), [("masked-marginals", "score.masked_logprobs"), ("wt-marginals", "score.wt_logprobs")]
)
def test_marginals_of_fair_esm(name: str, how: Any, table: str) -> None:
    """All single substitutions, from fair-esm's own log-probabilities of every token (start and end among them)."""
    model = plm.load(GOLDEN / name, dtype="float64")
    wild_type = json.loads((GOLDEN / name / "inputs.json").read_text())["scoring_sequence"]
    logp, id_of = load_file(GOLDEN / name / "expected.safetensors")[table], model.tokenizer.vocabulary.index
    names = single_substitutions(wild_type)
    wanted = [float(logp[int(v[1:-1]), id_of(v[-1])] - logp[int(v[1:-1]), id_of(v[0])]) for v in names]
    assert len(names) == 19 * len(wild_type)
    close(plm.variants(model, wild_type, names, how=how), wanted)


@pytest.mark.parametrize("name", ["half_rotary_buffers", "bin_fp16_large_vocab"])
def test_likelihoods_of_progen2(name: str) -> None:
    """Between two proteins whose log-likelihoods the original computed: a variant may share nothing at all."""
    stored = json.loads((PROGEN2 / name / "expected.json").read_text())["likelihood"]
    whole = {
        each["sequence"]: each["ll_sum"]
        for each in stored
        if {*each["sequence"][:: len(each["sequence"]) - 1]} == {*"12"}
    }
    proteins = {(text if text[0] == "1" else text[::-1])[1:-1]: total for text, total in whole.items()}
    (first, own), *others = proteins.items()
    assert others
    found = plm.variants(plm.load(PROGEN2 / name, dtype="float64"), first, [text for text, _ in others])
    # The original rounds its cosines and its scale to float32: 5e-7 per logit, of which two sums have up to 80.
    close(found, [total - own for _, total in others], 80 * 5e-7)


# The formulas, restated


@torch.inference_mode()
def masked(model: plm.Model, text: str, place: int, task: str | None = None) -> Tensor:
    """Log-probabilities ``[v]`` at a residue that is hidden, alone in its batch."""
    tokenizer = model.tokenizer
    before, after = tokenizer.frame(task)
    ids = [*before, *tokenizer.residues(text), *after]
    if model.checkpoint.name.startswith("ankh"):
        ids[len(before) + place] = tokenizer.sentinel(0)
        decoder = Packed.from_ids([[START, tokenizer.sentinel(0)]])
        logits = model.net(Packed.from_ids([ids]), decoder=decoder).logits[-1]  # type: ignore[call-arg]
        spoken = torch.tensor([token[0] not in "<[" for token in tokenizer.vocabulary])
        return logits.masked_fill(~spoken, -torch.inf).log_softmax(-1)  # type: ignore[no-any-return]
    ids[len(before) + place] = tokenizer.mask_id
    return model.net(Packed.from_ids([ids])).logits[len(before) + place].log_softmax(-1)  # type: ignore[no-any-return]


def masked_marginals(model: plm.Model, wild: str, text: str, task: str | None = None) -> float:
    total, id_of = 0.0, model.tokenizer.vocabulary.index
    for i, (old, new) in enumerate(zip(wild, text, strict=True)):
        if old != new:
            logp = masked(model, wild, i, task)
            total += float(logp[id_of(new)] - logp[id_of(old)])
    return total


@torch.inference_mode()
def wt_marginals(model: plm.Model, wild: str, text: str) -> float:
    logp = model.net(Packed.from_ids([model.tokenizer.encode(wild)])).logits.log_softmax(-1)
    id_of = model.tokenizer.vocabulary.index
    pairs = enumerate(zip(wild, text, strict=True), 1)
    return sum(float(logp[i, id_of(new)] - logp[i, id_of(old)]) for i, (old, new) in pairs if old != new)


def predict_py(model: plm.Model, text: str) -> float:
    """fair-esm's ``compute_pppl``: token ``i``, which is residue ``i - 1``, is hidden, and asked for residue ``i``."""
    pairs = range(1, len(text) - 1)
    return sum(float(masked(model, text, i - 1)[model.tokenizer.vocabulary.index(text[i])]) for i in pairs)


def esm(name: str) -> plm.Model:
    return plm.load(GOLDEN / name, dtype="float64")


MASKED: list[Callable[[], plm.Model]] = [
    lambda: esm("esm1b_tiny"),
    lambda: esm("esm2_tiny"),
    lambda: igbert(torch.float64),
    lambda: ankh(torch.float64),
]
masked_models = pytest.mark.parametrize("make", MASKED, ids=["esm1b", "esm2", "bert", "t5"])


@masked_models
def test_masked_marginals(make: Callable[[], plm.Model]) -> None:
    model = make()
    texts = mutated(WILD_TYPE, SUBSTITUTIONS)
    wanted = [masked_marginals(model, WILD_TYPE, text) for text in texts]
    for max_tokens in (1, 30, None):
        close(plm.variants(model, WILD_TYPE, SUBSTITUTIONS, max_tokens=max_tokens), wanted)
    assert choose_how(model, "auto") == "masked-marginals"


@masked_models
def test_pseudo_ppl(make: Callable[[], plm.Model]) -> None:
    model = make()
    names = SUBSTITUTIONS + INDELS
    own, *totals = [score.total for score in plm.score(model, [WILD_TYPE, *mutated(WILD_TYPE, names)])]
    found = plm.variants(model, WILD_TYPE, names, how="pseudo-ppl")
    close(found, [total - own for total in totals])
    assert found[SUBSTITUTIONS.index("WT")] == found[SUBSTITUTIONS.index("M1M")] == 0


@pytest.mark.parametrize("make", MASKED[:3], ids=["esm1b", "esm2", "bert"])
def test_wt_marginals(make: Callable[[], plm.Model]) -> None:
    model = make()
    wanted = [wt_marginals(model, WILD_TYPE, text) for text in mutated(WILD_TYPE, SUBSTITUTIONS)]
    close(plm.variants(model, WILD_TYPE, SUBSTITUTIONS, how="wt-marginals"), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_pseudo_ppl_and_the_right_one(name: str) -> None:
    model = esm(name)
    wanted = [predict_py(model, text) - predict_py(model, WILD_TYPE) for text in mutated(WILD_TYPE, SUBSTITUTIONS)]
    found = plm.variants(model, WILD_TYPE, SUBSTITUTIONS, how="pseudo-ppl-published", max_tokens=40)
    close(found, wanted)
    right = plm.variants(model, WILD_TYPE, SUBSTITUTIONS, how="pseudo-ppl")
    assert max(abs(one - other) for one, other in zip(found, right, strict=True)) > 0.01


def test_a_task() -> None:
    model = ankh3(torch.float64)
    for task, chosen in ((None, "nlu"), ("s2s", "s2s")):
        wanted = [masked_marginals(model, WILD_TYPE, text, chosen) for text in mutated(WILD_TYPE, SUBSTITUTIONS)]
        close(plm.variants(model, WILD_TYPE, SUBSTITUTIONS, task=task), wanted)


def test_a_pair() -> None:
    """Positions run on into the light chain, and a change in one is seen by the other."""
    model, id_of = igbert(torch.float64), igbert().tokenizer.vocabulary.index
    logp = masked(model, "EVQ[SEP]DI", 4)
    names = ["D4W", "EVQ|WI", "V2K:D4W"]
    found = plm.variants(model, ("EVQ", "DI"), names)
    close(found[:2], [float(logp[id_of("W")] - logp[id_of("D")])] * 2)
    close([found[2] - found[0]], plm.variants(model, "EVQ|DI", "V2K"))
    own, *totals = [score.total for score in plm.score(model, ["EVQ|DI", "EVQ|WI", "EV|DIQM"])]
    found = plm.variants(model, "EVQ|DI", ["D4W", "EV|DIQM"], how="pseudo-ppl")
    close(found, [total - own for total in totals])


def test_letters_that_are_read_as_x() -> None:
    model = igbert(torch.float64)
    assert plm.variants(model, "MKT", "K2U") == plm.variants(model, "MKT", "K2X")
    assert plm.variants(model, "MXT", "X2U") == [0.0]


# All


def test_many_or_one_in_input_order(model: plm.Model) -> None:
    found = plm.variants(model, WILD_TYPE, SUBSTITUTIONS)
    assert found == [plm.variants(model, WILD_TYPE, name)[0] for name in SUBSTITUTIONS]
    assert found == plm.variants(model, " MKTAY\nIAKQR", iter(SUBSTITUTIONS))
    assert all(type(value) is float for value in found) and found[0] == found[-1] != 0
    assert plm.variants(model, WILD_TYPE, []) == [] and plm.variants(model, WILD_TYPE, ["WT"]) == [0.0]


def test_several_changes_add_up_in_marginals_alone(model: plm.Model) -> None:
    for how, adds in (("masked-marginals", True), ("wt-marginals", True), ("pseudo-ppl", False)):
        one, other, both = plm.variants(model, WILD_TYPE, ["K2E", "I6V", "K2E:I6V"], how=how)  # type: ignore[arg-type]
        # One sum of two float32 differences of 1e-6 each.
        assert (abs(one + other - both) < 1e-5) == adds


@pytest.mark.parametrize("how", ["masked-marginals", "wt-marginals", "pseudo-ppl", "pseudo-ppl-published"])
def test_a_stream_has_every_variant_once(model: plm.Model, how: Any) -> None:
    wild_type, rows = encode(model, WILD_TYPE, SUBSTITUTIONS, how=how)
    streamed = list(variant_rows(model, wild_type, rows, how=how, max_tokens=24))
    assert sorted(i for i, _ in streamed) == list(range(len(SUBSTITUTIONS)))
    wanted = plm.variants(model, WILD_TYPE, SUBSTITUTIONS, how=how)
    assert [value for _, value in sorted(streamed)] == pytest.approx(wanted, abs=1e-5)


def test_each_position_is_hidden_once(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    original = type(model.net).encode

    def counted(net: Any, batch: Packed, **options: Any) -> Any:
        tokens.append(len(batch.tokens))
        return original(net, batch, **options)

    monkeypatch.setattr(type(model.net), "encode", counted)
    plm.variants(model, WILD_TYPE, ["K2E", "K2A", "K2E:I6V", "I6A", "WT", "M1M"])
    assert sum(tokens) == 2 * (len(WILD_TYPE) + 2)
    tokens.clear()
    plm.variants(model, WILD_TYPE, single_substitutions(WILD_TYPE), how="wt-marginals")
    assert tokens == [len(WILD_TYPE) + 2]


# Errors


def test_all_faults_at_once_before_anything_runs(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.net), "encode", lambda *_: pytest.fail("computed before the input was checked"))
    with pytest.raises(plm.InputError) as caught:
        plm.variants(model, WILD_TYPE, ["K2E", "K3E", "K2del", "K2J", "K12E", "MKT", "what?"])
    found = {fault.id: (fault.record, fault.reason) for fault in caught.value.faults}
    letters = found.pop("K2J")
    assert found == {
        "K3E": (2, "position 3 is T in the wild type; the variant says K"),
        "K2del": (3, "9 residues, the wild type has 10; masked-marginals takes equal lengths"),
        "K12E": (5, "position 12 is outside the wild type, which has 1 to 10"),
        "MKT": (6, "3 residues, the wild type has 10; masked-marginals takes equal lengths"),
        "what?": (7, "'what?' is no change of a sequence"),
    }
    assert letters[0] == 4 and letters[1].startswith("character 'J' at position 2 is not in the vocabulary")
    assert "how='pseudo-ppl'" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "settings", "wrong"),
    [
        (ankh(), {"how": "wt-marginals"}, "a T5 says nothing of residues that are not hidden"),
        (ankh(), {"how": "likelihood"}, "ankh has no likelihood; choose 'pseudo-ppl', or a ProGen2"),
        (igbert(), {"how": "pseudo-ppl-published"}, "pseudo-ppl-published is fair-esm's, for its models"),
        (encoder_alone(), {}, "this checkpoint is an encoder alone; use one with a decoder"),
        (igbert(lm_head=False), {}, "igbert has no language-model head, so it gives no probabilities"),
        (igbert(), {"how": "masked"}, "how='masked' is unknown; choose 'auto', 'masked-marginals'"),
        (igbert(), {"task": "nlu"}, "task 'nlu' is unknown; igbert has no tasks: leave it out"),
        (igbert(), {"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_scored(model: plm.Model, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        plm.variants(model, "MKT", "K2E", **settings)


def test_a_causal_model_hides_nothing() -> None:
    model = plm.load(PROGEN2 / "half_rotary_buffers")
    for how in ("masked-marginals", "wt-marginals", "pseudo-ppl", "pseudo-ppl-published"):
        with pytest.raises(ValueError, match=f"so it has no {how}; choose 'likelihood'"):
            plm.variants(model, "MKT", "K2E", how=how)  # type: ignore[arg-type]
    with pytest.raises(plm.InputError, match=r"record 2 'M1_K2insA+': 64 residues; .* takes at most 62"):
        plm.variants(model, "MK", ["K2E", f"M1_K2ins{'A' * 62}"])


def test_what_is_no_wild_type(model: plm.Model) -> None:
    with pytest.raises(TypeError, match="the wild type is one sequence or pair; got 2"):
        plm.variants(model, ["MKT", "MKV"], "K2E")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"plm\.load\('esm2'\)"):
        plm.variants("esm2", "MKT", "K2E")  # type: ignore[arg-type]
    with pytest.raises(plm.InputError, match="the sequence is empty"):
        plm.variants(model, "", "WT")


@pytest.mark.parametrize("how", ["masked-marginals", "wt-marginals", "pseudo-ppl", "pseudo-ppl-published"])
def test_a_nan_is_never_returned(model: plm.Model, how: Any) -> None:
    broken = replace(model, net=copy.deepcopy(model.net))
    with torch.no_grad():
        broken.net.embed.weight[model.tokenizer.vocabulary.index("K"), 3] = torch.nan
    with pytest.raises(FloatingPointError, match="gave a NaN or an infinity"):
        plm.variants(broken, WILD_TYPE, ["T3A"], how=how)
