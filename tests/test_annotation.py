"""Annotations: probabilities as the network gives them, and users' tables of what its outputs stand for."""

import copy
import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import ankh, igbert, proteinbert_model
from torch import Tensor

import plm
from plm import running
from plm.annotation import annotate_rows, ranked
from plm.models.proteinbert import PAD, ProteinBERT

SEQUENCES = ["MKTAYIAKQR", "V", "QISFVKSHFSRQLEE", "MK", "MKTAYIAKQR"]


@torch.inference_mode()
def network(model: plm.Model, text: str, pad_to: int = 0, annotations: Tensor | None = None) -> Tensor:
    ids = torch.tensor([model.tokenizer.encode(text)])
    ids = F.pad(ids, (0, max(0, pad_to - ids.shape[1])), value=PAD)
    found: Tensor = model.net(ids, annotations).annotation_logits.sigmoid()[0]
    return found


@pytest.mark.parametrize("pad_to", [None, 40])
def test_probabilities_are_those_of_the_network(pad_to: int | None) -> None:
    model = proteinbert_model(torch.float64)
    known = (torch.rand(len(SEQUENCES), 40) < 0.2).float()
    known[1] = 0
    for annotations in (None, known):
        for max_tokens in (1, 30, None):
            found = plm.annotate(model, SEQUENCES, annotations=annotations, pad_to=pad_to, max_tokens=max_tokens)
            for i, (text, ours) in enumerate(zip(SEQUENCES, found, strict=True)):
                told = None if annotations is None else annotations[i : i + 1]
                wanted = network(model, text, pad_to or 0, told)
                assert ours.dtype == torch.float64 and ours.shape == (40,)
                # Ten times what two float64 programs that add in another order differ by here (measured).
                torch.testing.assert_close(ours, wanted, rtol=0, atol=4e-15)
    pairs = zip(plm.annotate(model, SEQUENCES), plm.annotate(model, SEQUENCES, annotations=known), strict=True)
    changed = [(a - b).abs().max() > 1e-3 for a, b in pairs]
    assert changed == [True, False, True, True, True]


def test_one_string_and_none() -> None:
    model = proteinbert_model()
    assert torch.equal(plm.annotate(model, "MKT")[0], plm.annotate(model, ["MKT"])[0])
    assert plm.annotate(model, []) == []


def test_results_are_ordinary_probabilities() -> None:
    """In float32 from bfloat16: the last step is not rounded to eight bits."""
    exact, half = (plm.annotate(proteinbert_model(dtype), SEQUENCES) for dtype in (torch.float64, torch.bfloat16))
    for one, other in zip(exact, half, strict=True):
        assert other.dtype == torch.float32 and not other.is_inference() and not other.requires_grad
        assert ((other > 0) & (other < 1)).all()
        assert other.untyped_storage().nbytes() == 40 * 4
        # Three times what was measured: 0.006, of logits that are off by 0.026 as bfloat16 keeps 8 bits.
        assert 1e-4 < (one - other).abs().max() < 0.02
        assert not torch.equal(other.bfloat16().float(), other)


def test_a_stream_names_its_sequences() -> None:
    model = proteinbert_model()
    rows = running.encode(model, SEQUENCES)
    streamed = list(annotate_rows(model, rows))
    assert [i for i, _ in streamed] == [2, 0, 4, 3, 1]
    wanted = plm.annotate(model, SEQUENCES)
    assert all(torch.equal(each, wanted[i]) for i, each in streamed)


@pytest.mark.parametrize("make", [igbert, ankh])
def test_other_families_do_not_annotate(make: Callable[[], plm.Model]) -> None:
    with pytest.raises(ValueError, match=r"(igbert|ankh) predicts no annotations; use a ProteinBERT"):
        plm.annotate(make(), "MKT")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no room": ({"pad_to": 2}, "pad_to must be at least 3"),
    "too narrow": ({"annotations": torch.zeros(2, 39)}, r"have shape \[2, 39\]; proteinbert takes \[2, 40\]"),
    "too many": ({"annotations": torch.zeros(3, 40)}, r"have shape \[3, 40\]; proteinbert takes \[2, 40\]"),
    "too long": ({"pad_to": 4}, "3 residues; pad_to=4 takes at most 2"),
    "budget": ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, told = REFUSED[case]
    monkeypatch.setattr(
        ProteinBERT, "encode", lambda *_, **__: pytest.fail("computed before the settings were checked")
    )
    with pytest.raises(ValueError, match=told):
        plm.annotate(proteinbert_model(), ["MKT", "MK"], **given)


def test_a_nan_is_never_returned() -> None:
    model = proteinbert_model()
    broken = replace(model, net=copy.deepcopy(model.net))
    with torch.no_grad():
        broken.net.annotation_head.bias[3] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="sequence 1 gave a NaN or an infinity"):
        plm.annotate(broken, "MAM")


def test_ranking() -> None:
    """Of equal ones the first comes first."""
    probabilities = torch.tensor([0.5, 0.9, 0.1, 0.9, 0.5])
    assert ranked(probabilities) == [1, 3, 0, 4, 2]
    assert ranked(probabilities, top=3) == [1, 3, 0] and ranked(probabilities, top=9) == [1, 3, 0, 4, 2]
    assert ranked(probabilities, least=0.5) == [1, 3, 0, 4] and ranked(probabilities, least=0.95) == []
    many = torch.arange(1_000) % 3 / 3  # an unstable sort keeps few equals in their order, but many it does not
    assert ranked(many) == [*range(2, 1_000, 3), *range(1, 1_000, 3), *range(0, 1_000, 3)]


# Tables of terms


def table(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FORMS = {
    "named.csv": "index,term,name\n1,GO:0000003,reproduction\n0,GO:0000002,genome\n2,GO:0000009,alpha\n",
    "other_names.tsv": "GO_ID\tcount\tName\tIndex\nGO:0000003\t7\treproduction\t1\nGO:0000002\t5\tgenome\t0\n"
    "GO:0000009\t7\talpha\t2\n",
    "plain.tsv": "1\tGO:0000003\treproduction\n0\tGO:0000002\tgenome\n2\tGO:0000009\talpha\n",
    "semicolons.csv": "0;GO:0000002;genome\n1;GO:0000003;reproduction\n2;GO:0000009;alpha\n",
    "in_order.tsv": "GO:0000002\tgenome\nGO:0000003\treproduction\nGO:0000009\talpha\n",
    "named_in_order.csv": "term,name\nGO:0000002,genome\nGO:0000003,reproduction\nGO:0000009,alpha\n",
    "odd.tsv": b"\xef\xbb\xbf0\tGO:0000002\tgenome\r\n\r\n1 \t GO:0000003\treproduction\r\n2\tGO:0000009\talpha",
    "packed.tsv.gz": gzip.compress(b"0\tGO:0000002\tgenome\n1\tGO:0000003\treproduction\n2\tGO:0000009\talpha\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_that_mean_the_same(tmp_path: Path, form: str) -> None:
    path = table(tmp_path / form, FORMS[form])
    terms = plm.read_terms(path, 3)
    found = [terms.get(i) for i in range(3)]
    assert [term and (term.id, term.name) for term in found] == [
        ("GO:0000002", "genome"),
        ("GO:0000003", "reproduction"),
        ("GO:0000009", "alpha"),
    ]
    assert terms.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and terms.source == str(path)
    with pytest.raises(plm.InputError, match=rf"{form}.*3 terms, and the model has 4 outputs"):
        terms.check(4)


def test_names_are_kept_whole(tmp_path: Path) -> None:
    """Names of terms have commas in them, and quotes; some lines have no name, the first among them."""
    names = ["", "transferase activity, hexosyl, 6-", "5'-3' exonuclease, \"old\""]
    text = "".join(f"{i}\tGO:000000{i}\t{name}\n" for i, name in enumerate(names))
    terms = plm.read_terms(table(tmp_path / "go.tsv", text.replace("0000000\t\n", "0000000\n", 1)), 3)
    assert [terms.terms[i].name for i in range(3)] == names
    text = '0,GO:0000002\n1,GO:0000003,"one, two"\n'
    assert plm.read_terms(table(tmp_path / "go.csv", text), 2).terms[1].name == "one, two"


def test_ids_alone_are_in_the_order_of_the_outputs(tmp_path: Path) -> None:
    path = table(tmp_path / "go.txt", "GO:0000002\nGO:0000003\n")
    terms = plm.read_terms(path, 2)
    assert [terms.terms[i].id for i in range(2)] == ["GO:0000002", "GO:0000003"] and terms.terms[0].name == ""
    for partial in (False, True):  # nobody knows which are missing
        with pytest.raises(plm.InputError, match=r"2 terms, and the model has 3 outputs\n.*number those that you know"):
            plm.read_terms(path, 3, partial=partial)
    with pytest.raises(plm.InputError, match="2 terms, and the model has 1 outputs"):
        plm.read_terms(path, 1, partial=True)


def test_a_partial_table_has_to_be_meant(tmp_path: Path) -> None:
    path = table(tmp_path / "go.tsv", "0\tGO:0000002\n2\tGO:0000003\n")
    told = r"2 terms, and the model has 40 outputs; the first without one is 1\n.*partial=True \(--partial-terms\)"
    with pytest.raises(plm.InputError, match=told):
        plm.read_terms(path, 40)
    terms = plm.read_terms(path, 40, partial=True)
    assert terms.get(1) is None and terms.get(2) == ("GO:0000003", "", 2)
    assert plm.read_terms(path).terms == terms.terms  # how many outputs there are is not known yet


def test_rows_of_an_ontology_are_not_outputs(tmp_path: Path) -> None:
    """The table that the original's own set-up writes numbers the terms of the ontology, up to 47,352."""
    path = table(tmp_path / "go_annotations.csv", "id,index\nGO:0000002,1\nGO:0047352,47352\nGO:0000003,2\n")
    for partial in (False, True):
        with pytest.raises(plm.InputError, match="line 3: index 47,352; the model has 8,943 outputs, from 0 to 8,942"):
            plm.read_terms(path, 8943, partial=partial)


FAULTS = {
    "an index twice": ("0\tGO:0000002\n0\tGO:0000003\n", "line 2: index 0 is also in line 1"),
    "a term twice": ("0\tGO:0000002\n1\tGO:0000002\n", "line 2: GO:0000002 is also in line 1"),
    "no index": ("0\tGO:0000002\none\tGO:0000003\n", "line 2: 'one' is no index"),
    "a negative index": ("0\tGO:0000002\n-1\tGO:0000003\n", "line 2: '-1' is no index"),
    "a short id": ("GO:2\n", "line 1: 'GO:2' is no GO id"),
    "a cut line": ("0\tGO:0000002\n1\n", "line 2: '' is no GO id"),
    "a cell too many": ("0,GO:0000002,a, b\n1,GO:0000003,c\n", "line 1: 4 cells, and there are 3 columns"),
    "unknown columns": ("nr\tacc\n0\tGO:0000002\n", "line 1: 'acc' is no GO id"),
    "no column of ids": ("index\tname\n0\tgenome\n", "line 1: no column of GO ids, such as 'term'"),
    "a head alone": ("index\tterm\n", "no term in it"),
    "nothing": ("\n\n", "no term in it"),
    "torn quotes": ('0,GO:0000002,"a\n', r"line 1: not a table \(unexpected end of data\)"),
    "Latin-1": (b"0\tGO:0000002\t\xe9\n", "no text in UTF-8"),
    "a torn archive": (gzip.compress(b"0\tGO:0000002\n")[:-9], "torn or damaged archive"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_have_their_lines(tmp_path: Path, case: str) -> None:
    data, told = FAULTS[case]
    with pytest.raises(plm.InputError, match=rf"go\.tsv: (\d+ faults\n.*)*{told}") as caught:
        plm.read_terms(table(tmp_path / "go.tsv", data), 1, partial=True)
    assert "What to do: " in str(caught.value)


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = table(tmp_path / "go.tsv", "0\tGO:0000002\n0\tGO:2\nx\tGO:0000002\n")
    with pytest.raises(plm.InputError) as caught:
        plm.read_terms(path)
    assert [fault.line for fault in caught.value.faults] == [2, 2, 3, 3]
    with pytest.raises(plm.InputError, match="No such file"):
        plm.read_terms(tmp_path / "none.tsv")
