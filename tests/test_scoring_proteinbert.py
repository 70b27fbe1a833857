"""Scores and variants of ProteinBERT: their definitions restated, and what a model without a mask cannot do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import igbert, proteinbert_model
from torch import Tensor

import plm
from plm import running
from plm.models.proteinbert import PAD, ProteinBERT
from plm.scoring import score_rows

# Ten times what two float64 programs that add in another order differ by here (measured).
FLOAT64 = 4e-14
SEQUENCES = ["MKTAYIAKQR", "V", "QISFVKSHFSRQLEE", "MK", "UXACDEFGHIKL", "MKTAYIAKQR"]


@torch.inference_mode()
def log_probs(model: plm.Model, text: str, pad_to: int = 0, annotations: Tensor | None = None) -> Tensor:
    """``[L, 26]`` of the protein alone, with so many pads behind it."""
    ids = torch.tensor([model.tokenizer.encode(text)])
    ids = F.pad(ids, (0, max(0, pad_to - ids.shape[1])), value=PAD)
    found: Tensor = model.net(ids, annotations).local_logits[0, 1 : len(text) + 1].log_softmax(-1)
    return found


def own(model: plm.Model, text: str, table: Tensor) -> Tensor:
    return table[range(len(text)), list(model.tokenizer.residues(text))]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("pad_to", [None, 40])
def test_the_definition(pad_to: int | None) -> None:
    model = proteinbert_model(torch.float64)
    known = (torch.rand(len(SEQUENCES), 40) < 0.2).float()
    for annotations in (None, known):
        for max_tokens in (1, 30, None):
            scores = plm.score(model, SEQUENCES, pad_to=pad_to, annotations=annotations, max_tokens=max_tokens)
            for i, (text, found) in enumerate(zip(SEQUENCES, scores, strict=True)):
                told = None if annotations is None else annotations[i : i + 1]
                wanted = own(model, text, log_probs(model, text, pad_to or 0, told))
                same(found.per_residue, wanted)
                assert found.total == pytest.approx(float(wanted.sum()), abs=FLOAT64 * len(text))
                assert (found.forward, found.backward) == (None, None)


def test_pads_and_annotations_matter() -> None:
    model = proteinbert_model(torch.float64)
    plain, padded, told = (
        plm.score(model, "MKTAYIAK", pad_to=pad_to, annotations=known)[0].total
        for pad_to, known in ((None, None), (40, None), (None, torch.ones(1, 40)))
    )
    assert abs(plain - padded) > 1e-3 and abs(plain - told) > 1e-3


def test_auto_is_the_single_pass() -> None:
    model = proteinbert_model()
    found, wanted = plm.score(model, SEQUENCES), plm.score(model, SEQUENCES, how="single-pass")
    assert all(torch.equal(a.per_residue, b.per_residue) for a, b in zip(found, wanted, strict=True))
    assert all(each.per_residue.dtype == torch.float32 and each.total < 0 for each in found)


def test_a_stream_names_its_sequences() -> None:
    model = proteinbert_model()
    rows = running.encode(model, SEQUENCES, hidden=False, pad_to=20)
    assert [i for i, _ in score_rows(model, rows, pad_to=20, max_tokens=40)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            "pseudo-likelihood",
            "has no token that hides a residue, so it has no 'pseudo-likelihood'; choose 'single-pass'",
        ),
        ("likelihood", "does not read from one end to the other, so it has no 'likelihood'; choose 'single-pass'"),
        ("forward", "so it has no 'forward'; choose 'single-pass'"),
        ("ll", "how='ll' is unknown; choose 'auto' or 'single-pass'"),
    ],
)
def test_what_a_model_without_a_mask_cannot_score(how: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProteinBERT, "encode", lambda *_, **__: pytest.fail("computed before the way was checked"))
    with pytest.raises(ValueError, match=told):
        plm.score(proteinbert_model(), "MKT", how=how)


def test_settings_are_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ProteinBERT, "encode", lambda *_, **__: pytest.fail("computed before the settings were checked")
    )
    model = proteinbert_model()
    with pytest.raises(plm.InputError, match="3 residues; pad_to=4 takes at most 2"):
        plm.score(model, ["MK", "MKT"], pad_to=4)
    with pytest.raises(ValueError, match=r"have shape \[1, 40\]; proteinbert takes \[2, 40\]"):
        plm.score(model, ["MK", "MKT"], annotations=torch.zeros(1, 40))
    with pytest.raises(ValueError, match="pad_to is for ProteinBERT; pads change no number of igbert"):
        plm.score(igbert(), "MKT", pad_to=512)
    with pytest.raises(ValueError, match="annotations are for ProteinBERT; igbert reads residues alone"):
        plm.score(igbert(), "MKT", annotations=torch.zeros(1, 40))
    with pytest.raises(plm.InputError, match="<PAD> is no residue"):
        plm.score(model, "MK<PAD>")


def test_what_has_no_letter_of_its_own_is_scored() -> None:
    """As its authors' code reads B, J, O and Z."""
    (found,) = plm.score(proteinbert_model(), "MK<OTHER>")
    assert len(found.per_residue) == 3


# Variants


@pytest.mark.parametrize("pad_to", [None, 40])
def test_variants_by_one_pass_over_the_wild_type(pad_to: int | None) -> None:
    model, wild_type = proteinbert_model(torch.float64), "MKTAYIAK"
    table = log_probs(model, wild_type, pad_to or 0)
    ids = model.tokenizer.residues("AVG")
    wanted = [
        table[3, ids[1]] - table[3, ids[0]],
        table[3, ids[2]] - table[3, ids[0]] + table[6, ids[1]] - table[6, ids[0]],
        torch.tensor(0.0),
    ]
    for how in ("auto", "wt-marginals"):
        found = plm.variants(model, wild_type, ["A4V", "A4G:A7V", "WT"], how=how, pad_to=pad_to)  # type: ignore[arg-type]
        assert found == pytest.approx([float(value) for value in wanted], abs=FLOAT64)


@pytest.mark.parametrize("how", ["masked-marginals", "pseudo-ppl"])
def test_variants_that_would_need_a_mask(how: Any) -> None:
    told = f"proteinbert has no token that hides a residue, so it has no {how}; choose 'wt-marginals'"
    with pytest.raises(ValueError, match=told):
        plm.variants(proteinbert_model(), "MKT", "K2A", how=how)


def test_what_else_variants_cannot_be() -> None:
    model = proteinbert_model()
    with pytest.raises(ValueError, match="proteinbert has no likelihood; choose 'wt-marginals'"):
        plm.variants(model, "MKT", "K2A", how="likelihood")
    told = r"2 residues, the wild type has 3; wt-marginals takes equal lengths\n.*with a ProGen2, or with an ESM and"
    with pytest.raises(plm.InputError, match=told):
        plm.variants(model, "MKT", "K2del")
    with pytest.raises(plm.InputError, match="3 residues; pad_to=4 takes at most 2"):
        plm.variants(model, "MKT", "K2A", pad_to=4)
    with pytest.raises(ValueError, match="pad_to is for ProteinBERT; pads change no number of igbert"):
        plm.variants(igbert(), "MKT", "K2A", pad_to=512)
