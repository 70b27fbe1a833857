"""`verify` for ESMFold: what others published of structures, and transformers' own class on the same files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Plm
from safetensors.torch import load_file, save_file
from test_loading_esmfold import HUB, ORIGINAL, SAVED, TRUNK
from torch import Tensor

import plm
from plm import peers
from plm.loading import open_checkpoint
from plm.verification import published_values, values
from plm_weights.checks import Check, What
from plm_weights.registry import find

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
CASES = (HUB, SAVED)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)


def check(what: What, sequence: str, rows: list[list[float]], layer: int | None = None) -> Check:
    expected = tuple(map(tuple, rows))
    places = tuple(range(len(rows))), tuple(range(len(rows[0])))
    return Check(what, *places, expected, "self", "none", 1e-4, 0.0, "for a test", sequence, layer=layer)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_is_asked(case: Path, dtype: str) -> None:
    report = plm.verify(case, dtype=dtype)
    assert report.passed, str(report)
    names = ["positions", "pLDDT", "aligned errors", *(["pTM"] if dtype == "float32" else [])]
    assert [finding.what.partition(" of ")[0] for finding in report.findings] == names
    assert all(finding.source.startswith("transformers") for finding in report.findings)


@pytest.mark.parametrize("source", [ORIGINAL / TRUNK, "own"], ids=str)
def test_where_there_is_no_peer(source: Path | str, tmp_path: Path) -> None:
    """The authors' own code needs openfold, and nobody else reads our form."""
    if source == "own":
        source = tmp_path / "own"
        plm.convert(HUB, source)
    report = plm.verify(source)
    assert report.findings == () and not report.passed


def swapped(state: dict[str, Tensor]) -> None:
    first, second = (f"trunk.blocks.{i}.tri_mul_out.linear_a_p.weight" for i in (0, 1))
    state[first], state[second] = state[second], state[first]


def transposed(state: dict[str, Tensor]) -> None:
    name = "trunk.blocks.0.tri_att_end.mha.linear_o.weight"
    state[name] = state[name].T.contiguous()


def points(state: dict[str, Tensor]) -> None:
    """x, y and z innermost: a misreading with the right shape."""
    name = "trunk.structure_module.ipa.linear_q_points.weight"
    state[name] = state[name].unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1).contiguous()


@pytest.mark.parametrize("fault", [swapped, transposed, points])
def test_wrong_weights_are_found(
    fault: Callable[[dict[str, Tensor]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gets the good file, our network the spoiled one, which has the same names and shapes."""
    shutil.copyfile(SAVED / "config.json", tmp_path / "config.json")
    state = load_file(SAVED / "model.safetensors")
    fault(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = peers.theirs
    monkeypatch.setattr(peers, "theirs", lambda _, *asked: theirs(open_checkpoint(SAVED), *asked))
    report = plm.verify(tmp_path)
    assert not report.passed and report.findings[0].error > 10, str(report)


@torch.no_grad()
@every_case
def test_every_kind_of_value_is_that_of_transformers(case: Path) -> None:
    """Coordinates after the first and the last layer, pLDDT and pTM: which index of theirs is which of ours."""
    import transformers

    net = transformers.EsmForProteinFolding.from_pretrained(case).float().eval()
    model = plm.load(case)
    sequence = "MKTAYIAKQRGPVLN"
    out = net(torch.tensor([model.tokenizer.encode(sequence)]))
    last = len(out.positions) - 1
    for layer, other in ((0, last), (last, 0)):
        wanted = out.positions[layer, 0, :, :3].flatten(0, 1)
        one = check("backbone", sequence, wanted.tolist(), layer)
        # Ten times the float32 error of transformers itself, 1.2e-4 Å at most where it was measured.
        one = dataclasses.replace(one, absolute=1.2e-3)
        assert one.error(values(model, one)) <= 1 < one.error(values(model, dataclasses.replace(one, layer=other)))
    exist = out.atom37_atom_exists[0]
    mean = 100 * (out.plddt[0] * exist).sum() / exist.sum()
    for what, number in (("plddt", mean), ("ptm", out.ptm)):
        right = check(what, sequence, [[float(number)]])
        assert right.error(values(model, right)) <= 1
        assert right.error(values(model, right) + 1e-3) > 1


def test_chains_of_a_check_fold_together() -> None:
    model = plm.load(SAVED)
    (structure,) = plm.fold(model, "MKTAY:GPVLN")
    assert values(model, check("ptm", "MKTAY:GPVLN", [[0.0]])).item() == pytest.approx(structure.ptm)
    assert values(model, check("plddt", "MKTAY:GPVLN", [[0.0]])).item() == pytest.approx(structure.mean_plddt)


def test_published_values_as_printed_by_their_sources() -> None:
    first, user, readme, *hosted = find("esmfold").checks
    assert (first.what, first.layer, first.sequence, first.rows) == ("backbone", 0, "AECFQCTMKGN", (0,))
    ids = [0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]  # of the test, which takes them for residues
    assert plm.load(HUB).tokenizer.decode(ids) == first.sequence
    assert first.expected == ((2.5828, 0.7993, -10.9334),) and (first.absolute, first.relative) == (1e-4, 1e-5)
    assert user.expected[1] == (-1.5881, 7.7639, 12.0398) and user.sequence == "MLKNVQVQLV"
    assert readme.what == "plddt" and readme.expected == ((88.3,),) and len(readme.sequence or "") == 65
    assert [(one.what, round(one.expected[0][0], 4)) for one in hosted] == [
        *(("plddt", 64.429), ("plddt", 47.1606), ("ptm", 0.0127), ("ptm", 0.1054))
    ]


def test_a_namesake_of_another_size_is_not_held_to_a_rows_numbers(tmp_path: Path) -> None:
    shutil.copytree(HUB, tmp_path / "esmfold")
    assert list(published_values(plm.load(tmp_path / "esmfold"))) == []


def test_on_the_command_line(run: Plm) -> None:
    code, out, _ = run("verify", str(HUB))
    assert code == 0 and "4 of 4 comparisons passed" in out and "positions of 2 sequences" in out
