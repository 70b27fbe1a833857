"""`verify` for ProGen2: published values as its authors' scripts compute them, and GPT-J on the files themselves."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Plm
from safetensors.torch import save_file
from test_loading_progen2 import CASES, GOLDEN, tensors
from torch import Tensor

import plm
from plm import peers, verification
from plm.loading import open_checkpoint
from plm.verification import published_values, values
from plm_weights.checks import Check, What
from plm_weights.registry import CHECKPOINTS, find

# Twice what was measured: `values` computes the softmax in float32, and differs from the original's float64 by up to
# 4e-7 in a mean and 8e-6 in a sum of 36.
FLOAT32, SUM = 1e-6, 2e-5
QKV, OUT = "transformer.h.1.attn.qkv_proj.weight", "transformer.h.1.attn.out_proj.weight"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def likelihoods() -> list[Any]:
    return [
        pytest.param(name, one, id=f"{name}-{one['sequence'][:4]}")
        for name in CASES[:2]
        for one in json.loads((GOLDEN / name / "expected.json").read_text())["likelihood"]
    ]


def check(what: What, sequence: str, expected: float, absolute: float = 1e-4) -> Check:
    return Check(what, (0,), (0,), ((expected,),), "self", "none", absolute, 0.0, "for a test", sequence)


@pytest.mark.parametrize(("name", "expected"), likelihoods())
def test_likelihoods_are_those_of_the_original(name: str, expected: dict[str, Any]) -> None:
    """Both directions over the residues for ``ll_sum`` and ``ll_mean``; one over all columns for ``causal_nll``."""
    model, text = plm.load(GOLDEN / name, dtype="float64"), expected["sequence"]
    found = values(model, check("causal_nll", text, 0.0))
    assert float(found) == pytest.approx(expected["ce_lr"], abs=FLOAT32)
    if {text[0], text[-1]} != {"1", "2"}:  # a text without one of its ends has no such likelihood
        return
    residues = text[1:-1] if text[0] == "1" else text[-2:0:-1]
    assert float(values(model, check("ll_sum", residues, 0.0))) == pytest.approx(expected["ll_sum"], abs=SUM)
    assert float(values(model, check("ll_mean", residues, 0.0))) == pytest.approx(expected["ll_mean"], abs=FLOAT32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["ll_sum", "ll_mean", "causal_nll"])
def test_a_wrong_published_value_fails(case: Path, dtype: str, what: What, monkeypatch: pytest.MonkeyPatch) -> None:
    model, residues = plm.load(case, dtype=dtype), "MKTVRQERLK"
    right = float(values(plm.load(case), check(what, residues, 0.0)))
    for expected, passes in ((right, True), (right * 1.2, False)):
        row = SimpleNamespace(family="progen2", config=None, checks=(check(what, residues, expected),))
        monkeypatch.setattr(verification, "find", lambda _, row=row: row)
        (finding,) = published_values(model)
        assert finding.passed == passes, finding
        assert finding.what == f"{what}, {residues}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gptj_agrees(case: Path, dtype: str) -> None:
    """From the files' own tensors, rearranged apart from our key map; spare rows, or 37 over 32, make no difference."""
    report = plm.verify(case, dtype=dtype)
    assert report.passed, str(report)
    (finding,) = report.findings
    assert (finding.what, finding.source) == ("logits of 4 sequences", "GPT-J of transformers, float32 on this CPU")
    if dtype == "float32":
        assert finding.error < 0.1  # the networks are 2 or 3 layers deep, what is allowed is of 32
    else:
        assert f"(torch.{dtype})" in finding.allowed and finding.error > 0.05  # the noise floor is not far below


def swapped_layers(state: dict[str, Tensor]) -> None:
    first = OUT.replace("h.1", "h.0")
    state[OUT], state[first] = state[first], state[OUT]


def transposed(state: dict[str, Tensor]) -> None:
    state[OUT] = state[OUT].T.contiguous()


def shards(state: dict[str, Tensor], count: int, order: str) -> None:
    """As if the file had so many shards, and the kinds in this order: a misreading with the right shapes."""
    c = state[QKV].shape[1]
    kinds = dict(zip("qvk", state[QKV].reshape(8, 3, c // 8, c).unbind(1), strict=True))
    state[QKV] = torch.stack([kinds[kind].reshape(count, c // count, c) for kind in order], 1).reshape(3 * c, c)


FAULTS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "two keys swapped": swapped_layers,
    "a matrix transposed": transposed,
    "values and keys swapped": lambda state: shards(state, 8, "qkv"),
    "four shards, as CodeGen has": lambda state: shards(state, 4, "qvk"),
    "no shards": lambda state: shards(state, 1, "qvk"),
    "norms of another layer": lambda state: state.update(
        {"transformer.h.0.ln_1.weight": state["transformer.h.1.ln_1.weight"]}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_are_found(case: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J gets the good file, our network the spoiled one, which has the same names and shapes."""
    shutil.copyfile(case / "config.json", tmp_path / "config.json")
    state = tensors(case)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert plm.verify(tmp_path).passed
    FAULTS[fault](state)
    save_file({k: x.contiguous().clone() for k, x in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = peers.theirs
    monkeypatch.setattr(peers, "theirs", lambda _, *asked: theirs(open_checkpoint(case), *asked))
    report = plm.verify(tmp_path)
    assert not report.passed and report.findings[0].error > 10, str(report)


def test_our_own_form_has_no_peer(case: Path, tmp_path: Path) -> None:
    plm.convert(case, tmp_path / "own")
    report = plm.verify(tmp_path / "own")
    assert report.findings == () and not report.passed


def test_a_namesake_of_another_size_is_not_held_to_a_rows_numbers(case: Path, tmp_path: Path) -> None:
    shutil.copytree(case, tmp_path / "progen2-oas")
    assert list(published_values(plm.load(tmp_path / "progen2-oas"))) == []


@pytest.mark.parametrize("row", [row for row in CHECKPOINTS if row.family == "progen2"], ids=lambda row: row.name)
def test_published_values_as_their_sources_have_them(row: Any) -> None:
    """The authors' assertion for each checkpoint; of a hosted sample, sum and mean are of the same residues."""
    asserted, *hosted = row.checks
    assert asserted.what == "causal_nll" and asserted.absolute == 0.1 and asserted.relative == 0
    assert asserted.sequence[0] + asserted.sequence[-1] in ("12", "21")
    assert 0 < asserted.expected[0][0] < math.log(25)
    means, sums = ([one for one in hosted if one.what == what] for what in ("ll_mean", "ll_sum"))
    served = row.name in ("progen2-medium", "progen2-oas", "progen2-large", "progen2-bfd90")
    assert len(means) == len(sums) == (2 if served else 0)
    for mean, total in zip(means, sums, strict=True):
        assert mean.sequence == total.sequence and not {*"12"} & {*mean.sequence}
        length = len(mean.sequence)
        assert total.expected[0][0] == pytest.approx(length * mean.expected[0][0], rel=1e-6)
        assert mean.absolute == 2e-3 and length * 1.9e-3 < total.absolute < 150 * 2.01e-3


def test_the_antibody_model_is_told_from_the_others_by_its_values() -> None:
    """So that files under a wrong name would be noticed."""
    lowest = {row.name: row.checks[0].expected[0][0] for row in CHECKPOINTS if row.family == "progen2"}
    assert lowest["progen2-oas"] == 0.3 and lowest["progen2-bfd90"] == 1.3 and lowest["progen2-small"] == 2.4
    assert all(abs(one.expected[0][0]) < 0.25 for one in find("progen2-oas").checks if one.what == "ll_mean")


def test_a_likelihood_is_of_residues() -> None:
    with pytest.raises(ValueError, match="a sequence for ll_sum, ll_mean"):
        dataclasses.replace(check("ll_sum", "MK", 0.0), sequence="")


def test_on_the_command_line(case: Path, run: Plm) -> None:
    code, out, _ = run("verify", str(case))
    assert code == 0 and "1 of 1 comparisons passed" in out and "GPT-J" in out


def test_rows_on_the_command_line(run: Plm) -> None:
    rows = {row["name"]: row for row in json.loads(run("models", "--json").out) if row["family"] == "progen2"}
    assert len(rows) == 7
    medium = rows["progen2-medium"]
    assert medium["source"].endswith("/checkpoints/progen2-medium.tar.gz") and medium["revision"] is None
    assert (medium["licence"], medium["parameters"]) == ("BSD-3-Clause", 764_803_616)
    table = run("models").out.splitlines()
    assert len({line.index("progen2 ") for line in table if line.startswith("progen2-")}) == 1
    assert max(map(len, table)) <= 120
