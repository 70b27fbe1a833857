"""`verify` compares with numbers of others, and fails when a weight is wrong."""

import dataclasses
import shutil
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file, save_file

import plm
from plm import peers
from plm.loading import open_checkpoint
from plm.verification import Finding, Report, published_values, values
from plm_weights.checks import FOLDED, Check, What
from plm_weights.registry import find

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("form", ["", "esm2_tiny.pt"], ids=["transformers", "fair-esm"])
def test_verify_asks_the_library_that_the_files_were_published_for(golden: Path, form: str) -> None:
    report = plm.verify(golden / "esm" / "esm2_tiny" / form)
    assert report.passed, str(report)
    assert [finding.source.split(",")[0] for finding in report.findings] == ["fair-esm" if form else "transformers"]
    assert "1 of 1 comparisons passed" in str(report)
    assert report.as_dict()["passed"] is True


@pytest.mark.parametrize("regression", [True, False], ids=["with-contacts", "without"])
@pytest.mark.parametrize("case", ["esm2_tiny", "esm1b_tiny"])
def test_verify_takes_a_fair_esm_file_of_any_name(golden: Path, tmp_path: Path, case: str, regression: bool) -> None:
    """fair-esm reads the architecture off the file's name and wants a regression beside it; users rename and forget."""
    source = golden / "esm" / case / case
    shutil.copyfile(f"{source}.pt", tmp_path / "mine.pt")
    if regression:
        shutil.copyfile(f"{source}-contact-regression.pt", tmp_path / "mine-contact-regression.pt")
    report = plm.verify(tmp_path / "mine.pt")
    assert report.passed, str(report)


@pytest.mark.parametrize("fault", ["swapped", "transposed"])
def test_verify_fails_on_wrong_weights(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The library reads the good files, our model the spoiled ones: a swap or a transposition cannot pass."""
    good = golden / "esm" / "esm2_tiny"
    for name in ("config.json", "vocab.txt"):
        shutil.copyfile(good / name, tmp_path / name)
    tensors = load_file(good / "model.safetensors")
    query, key = (f"esm.encoder.layer.2.attention.self.{name}.weight" for name in ("query", "value"))
    if fault == "swapped":
        tensors[query], tensors[key] = tensors[key], tensors[query]
    else:
        tensors[query] = tensors[query].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    theirs = peers.theirs
    monkeypatch.setattr(peers, "theirs", lambda _, *asked: theirs(open_checkpoint(good), *asked))
    report = plm.verify(tmp_path)
    assert not report.passed
    assert report.findings[0].error > 10
    assert "FAIL" in str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["", "esm2_tiny.pt"], ids=["transformers", "fair-esm"])
def test_half_precision_is_judged_by_the_librarys_own_noise(golden: Path, form: str, dtype: str) -> None:
    report = plm.verify(golden / "esm" / "esm2_tiny" / form, dtype=dtype)
    assert report.dtype == dtype
    assert report.passed, str(report)
    assert f"(torch.{dtype})" in report.findings[0].allowed
    assert report.findings[0].error > 0.1  # the noise floor is not far below


def test_an_encoder_alone_is_compared_by_its_hidden_states(golden: Path, tmp_path: Path) -> None:
    source = golden / "esm" / "esm2_tiny"
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    tensors = load_file(source / "model.safetensors")
    save_file({k: x for k, x in tensors.items() if not k.startswith("lm_head.")}, tmp_path / "model.safetensors")
    report = plm.verify(tmp_path)
    assert report.passed, str(report)
    assert [finding.what for finding in report.findings] == ["hidden states of 4 sequences"]


def test_a_file_that_the_library_would_not_find_is_not_compared(golden: Path, tmp_path: Path) -> None:
    source = golden / "esm" / "esm2_tiny"
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    shutil.copyfile(source / "model.safetensors", tmp_path / "mine.safetensors")
    report = plm.verify(tmp_path / "mine.safetensors")
    assert report.findings == () and not report.passed


def test_published_values_of_every_kind(golden: Path) -> None:
    """Each kind of check takes the matrix it names: the model's own float64 numbers pass, and not if moved."""
    model = plm.load(golden / "esm" / "esm2_tiny", dtype="float64")
    others = {"ll_sum", "ll_mean", *FOLDED}  # of models that read one way, or fold
    for what in sorted({*get_args(What)} - others):
        layer = 2 if what in ("hidden", "mean") else None
        check = Check(what, (0,), (0,), ((0.0,),), "self", "none", 1e-9, 0.0, "float64", "MKT<mask>V", layer=layer)
        matrix = values(model, check)
        shapes = {"nll": (1, 1), "mean": (1, 32), "hidden": (7, 32), "contacts": (5, 5)}
        shapes |= {"log_likelihood": (1, 1), "causal_nll": (1, 1), "masked_probabilities": (5, 33)}
        assert tuple(matrix.shape) == shapes.get(what, (7, 33)), what
        right = dataclasses.replace(check, expected=((matrix[0, 0].item(),),))
        wrong = dataclasses.replace(check, expected=((matrix[0, 0].item() + 1e-3,),))
        assert right.error(matrix) <= 1 < wrong.error(matrix)


def test_registry_checks_are_used_and_widened_in_half_precision(random_8m: Path) -> None:
    """A model that calls itself esm2-8m is held to that row's numbers, which random weights cannot meet."""
    model = plm.load(random_8m)
    findings = list(published_values(model))
    assert len(findings) == len(find("esm2-8m").checks) >= 5
    assert not any(finding.passed for finding in findings if finding.what.startswith("logits"))
    half = plm.load(random_8m, dtype="bfloat16")
    assert all("bfloat16" in finding.allowed for finding in published_values(half))


def test_a_namesake_of_another_size_is_not_held_to_a_rows_numbers(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "esm" / "esm2_tiny", tmp_path / "esm2-8m")
    assert list(published_values(plm.load(tmp_path / "esm2-8m"))) == []


def test_a_report_without_comparisons_does_not_pass() -> None:
    empty = Report("x", "cpu", "float32", ())
    assert not empty.passed
    assert "nothing to compare with" in str(empty)
    assert not Finding("x", "y", float("nan"), "1").passed
