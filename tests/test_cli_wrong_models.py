"""A model that cannot do what is asked for is refused with the library's words, and by name before it is fetched."""

from pathlib import Path

import pytest
import torch
from command_line import ESM2, FOLDS, SEQUENCE, Plm, no_model_is_loaded, outputs

import plm
from plm.previews import preview
from plm_weights.registry import CHECKPOINTS, header

WRONG = {
    "annotate": (("annotate", "-m", "esm2-8m"), "esm2-8m predicts no annotations; use a ProteinBERT"),
    "fold": (("fold", "-m", "esm2-8m", "-o", "out/"), "esm2-8m predicts no structures; load esmfold"),
    "generate": (("generate", "-m", "esm2-8m"), "esm2-8m writes no sequences; use ProGen2"),
    "encoder": (("generate", "-m", "prott5-xl-half"), "prott5-xl-half writes no sequences"),
    "global": (("embed", "-m", "esm2-8m", "--pool", "global"), "--pool: esm2-8m has no global vector"),
    "cls": (("embed", "-m", "progen2-small", "--pool", "cls"), "--pool: the start token of progen2-small sees nothing"),
    "all": (("embed", "-m", "esm2-8m", "--pool", "mean", "--layer", "all"), "--layer: all layers side by side are"),
    "layer": (("embed", "-m", "esm2-8m", "--pool", "mean", "--layer", "9"), "--layer: esm2-8m has layers 0 to 6"),
    "pads": (("embed", "-m", "esm2-8m", "--pool", "mean", "--pad-to", "512"), "--pad-to: pad_to is for ProteinBERT"),
    "alias": (("contacts", "-m", "Exscientia/IgBert", "-o", "x.npz"), "igbert has no contact head"),
    "contacts": (("contacts", "-m", "igbert", "-o", "x.npz"), "igbert has no contact head"),
    "original": (("contacts", "-m", "original:esm1v-1", "-o", "x.npz"), "esm1v-1 has no contact head"),
    "embed": (("embed", "-m", "esmfold", "--pool", "mean"), "esmfold predicts structures alone"),
    "score": (("score", "-m", "esmfold"), "esmfold predicts structures alone"),
    "score pads": (("score", "-m", "esm2-8m", "--pad-to", "512"), "--pad-to: pad_to is for ProteinBERT"),
    "score how": (("score", "-m", "proteinbert", "--how", "likelihood"), "so it has no 'likelihood'"),
    "variants": (("variants", "--scan", "-m", ESM2, "-m", "esmfold"), "esmfold predicts structures alone"),
    "variants how": (("variants", "--scan", "-m", "proteinbert", "--how", "pseudo-ppl"), "choose 'wt-marginals'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_published_model_by_its_name(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    no_model_is_loaded(monkeypatch)
    (verb, *argv), told = WRONG[case]
    code, out, err = run(verb, SEQUENCE, *argv)
    assert (code, out) == (2, "") and told in err and f"Usage: plm {verb}" in err
    assert outputs(tmp_path) == []


@pytest.mark.parametrize("verb", ["embed", "score", "variants", "contacts", "annotate", "generate"])
def test_a_folder_is_refused_with_the_same_words(run: Plm, tmp_path: Path, verb: str) -> None:
    argv = {"embed": ("--pool", "mean"), "variants": ("--scan",), "contacts": ("-o", "x.npz")}.get(verb, ())
    code, out, err = run(verb, SEQUENCE, *argv, "-m", FOLDS)
    assert (code, out) == (2, "") and "a_hub_layout " in err and outputs(tmp_path) == []


def test_what_is_on_this_machine_is_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that has the name of a published model, and what nobody knows."""
    monkeypatch.chdir(tmp_path)
    assert preview("esm2-8m") is not None
    (tmp_path / "esm2-8m").mkdir()
    assert (
        preview("esm2-8m") is preview("no-such-model") is preview("organisation/model") is preview("plm-mini") is None
    )


@pytest.mark.parametrize("row", [row for row in CHECKPOINTS if row.folder is None], ids=lambda row: row.name)
def test_a_preview_has_the_sizes_of_the_published_one(row: plm.loading.Checkpoint) -> None:
    model = preview(row.name)
    assert model is not None and model.checkpoint.name == row.name and model.checkpoint.family == row.family
    state = model.net.state_dict()
    assert {tensor.device for tensor in state.values()} == {torch.device("meta")}
    assert model.net.embed.weight.numel() in {tensor.numel() for tensor in header(row.name, row.preferred).values()}
