"""``plm fold``: files, names, index, failures, and exit codes. The model is tiny and random."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ESM2, FOLDS, Plm, no_model_is_loaded, outputs

import plm
from plm.cli.job import Job
from plm.esmfold.config import Config, StructureConfig
from plm.esmfold.cost import operations
from plm.outputs.proteins import COLUMNS
from plm.outputs.target import FileTarget

PROTEINS = {"P1": "MKTAYIAKQR", "P2": "MKTWYF:GSHML", "P3": "ACX"}
FASTA = "".join(f">{id} of some organism\n{sequence}\n" for id, sequence in PROTEINS.items())
FILES = ["P1.pdb", "P2.pdb", "P3.pdb", "fold.csv"]


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text(FASTA)
    return "in.fasta"


@pytest.fixture(scope="module")
def model() -> plm.Model:
    return plm.load(FOLDS)


def index(folder: str = "out") -> list[dict[str, str]]:
    with (Path(folder) / "fold.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def written(folder: str = "out") -> list[str]:
    return outputs(Path(folder))


def atoms(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ATOM")]


# -- what is written


def test_structures_are_those_of_python(run: Plm, fasta: str, model: plm.Model) -> None:
    code, out, err = run("fold", fasta, "-m", FOLDS, "-o", "out")
    assert (code, out) == (0, "") and written() == FILES
    for id, structure in zip(PROTEINS, plm.fold(model, PROTEINS.values()), strict=True):
        text = Path(f"out/{id}.pdb").read_text()
        assert atoms(text) == atoms(structure.to_pdb(numbering="chain")) and text.endswith("END\n")
        assert f"mean pLDDT {structure.mean_plddt:.2f}" in text and f"pTM {structure.ptm:.4f}" in text
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["P2", "P1", "P3"]  # the longest with its linker first
    assert lines[0].startswith("P2: 11 residues in 2 chains, mean pLDDT ") and lines[0].endswith(" left")
    assert lines[-1].startswith("3 proteins, 24 residues in ") and lines[-1].endswith(" with a_hub_layout -> out")


def test_mmcif_and_numbers_as_the_model_was_told(run: Plm, fasta: str, model: plm.Model) -> None:
    argv = ("--format", "cif", "--numbering", "index", "--recycles", "0", "--linker", "GG", "--residue-gap", "9")
    assert run("fold", fasta, "-m", FOLDS, "-o", "out", "--chunk", "4", *argv).code == 0
    structure = plm.fold(model, PROTEINS["P2"], recycles=0, linker="GG", residue_gap=9, chunk=4)[0]
    text = Path("out/P2.cif").read_text()
    assert written() == [name.replace("pdb", "cif") for name in FILES]
    assert atoms(text) == atoms(structure.to_mmcif(numbering="index")) and len(atoms(text)) > 50
    assert [row["file"] for row in index()] == ["P1.cif", "P2.cif", "P3.cif"]
    gemmi = pytest.importorskip("gemmi")
    block = gemmi.cif.read("out/P2.cif").sole_block()
    assert block.find_value("_plm.fingerprint") == index()[1]["fingerprint"]


def test_the_index(run: Plm, fasta: str, model: plm.Model) -> None:
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    rows = index()
    assert tuple(rows[0]) == COLUMNS and [row["id"] for row in rows] == list(PROTEINS)
    assert [(row["length"], row["chains"]) for row in rows] == [("10", "1"), ("11", "2"), ("3", "1")]
    for row, structure in zip(rows, plm.fold(model, PROTEINS.values()), strict=True):
        assert row["mean_plddt"] == f"{structure.mean_plddt:.2f}" and row["ptm"] == f"{structure.ptm:.4f}"
        assert float(row["seconds"]) >= 0 and row["fingerprint"] in Path("out", row["file"]).read_text()


def test_json_has_confidence_and_provenance(run: Plm, fasta: str, model: plm.Model) -> None:
    code, out, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--json", "--quiet")
    assert (code, err) == (0, "") and written() == sorted([*FILES, "P1.json", "P2.json", "P3.json"])
    summary = json.loads(out)
    assert (summary["proteins"], summary["residues"], summary["skipped"], summary["failed"]) == (3, 24, 0, [])
    assert summary["results"] == [
        {"id": row["id"], "file": row["file"], "length": int(row["length"]), "chains": int(row["chains"])}
        | {name: float(row[name]) for name in ("mean_plddt", "ptm", "seconds")}
        | {"fingerprint": row["fingerprint"]}
        for row in index()
    ]
    structure = plm.fold(model, PROTEINS["P2"])[0]
    told = json.loads(Path("out/P2.json").read_text())
    assert told["chains"] == {"A": "MKTWYF", "B": "GSHML"} and told["max_pae"] == 31.75
    # Hundredths, as they are rounded to
    torch.testing.assert_close(torch.tensor(told["plddt"]), structure.residue_plddt, rtol=0, atol=0.00501)
    torch.testing.assert_close(torch.tensor(told["pae"]), structure.pae, rtol=0, atol=0.00501)
    assert told["ptm"] == round(structure.ptm, 4) and told["settings"]["recycles"] == 3
    assert told["provenance"]["model"] == "a_hub_layout" and told["provenance"]["sha256"]


def test_hidden_residues_are_those_of_the_seed(run: Plm, fasta: str, model: plm.Model) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("fold", fasta, "-m", FOLDS, "-o", folder, "--hide", "0.5", "--seed", seed).code == 0
    one, again, other = (atoms(Path(folder, "P1.pdb").read_text()) for folder in "abc")
    assert one == again and one != other
    assert one != atoms(plm.fold(model, PROTEINS["P1"])[0].to_pdb())
    assert "hide 0.5, seed 1" in " ".join(Path("a/P1.pdb").read_text().split()).replace("REMARK 6 ", "")


# -- names


def test_names_stay_in_the_folder_and_apart(run: Plm, tmp_path: Path) -> None:
    ids = ["../../etc/passwd", "a/b", "A_B", "sp|P1|X", ".hidden", "ä" * 150]
    (tmp_path / "in.fasta").write_text("".join(f">{id}\nMKT\n" for id in ids))
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out")
    assert code == 0 and outputs(tmp_path) == ["in.fasta", "out"]
    rows = index()
    assert [row["id"] for row in rows] == ids
    names = [row["file"] for row in rows]
    assert names[:5] == ["_._.._etc_passwd.pdb", "a_b.pdb", "A_B.2.pdb", "sp_P1_X.pdb", "_hidden.pdb"]
    assert len(names[5].encode()) < 210 and written() == sorted([*names, "fold.csv"])
    assert "files are named otherwise than ids: ../../etc/passwd -> _._.._etc_passwd, a/b -> a_b, A_B -> A_B.2" in err


def test_the_same_names_in_every_run(run: Plm, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKT\n>A\nGSH\n")
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out").code == 0
    assert "2 proteins are in out already" in run("fold", "in.fasta", "-m", FOLDS, "-o", "out").err


# -- failures


def test_some_fail_and_the_others_are_written(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2 does not fit into memory, P3 gives a NaN."""
    whole = plm.folding.fold_in_pieces

    def fold_in_pieces(model: plm.Model, chains: Any, *rest: Any) -> Any:
        if chains.letters.startswith("MKTWYF"):
            raise MemoryError("36 residues do not fit")
        found, rows = whole(model, chains, *rest)
        return (replace(found, plddt=found.plddt * torch.nan) if chains.letters == "ACX" else found), rows

    with monkeypatch.context() as patched:
        patched.setattr("plm.folding.fold_in_pieces", fold_in_pieces)
        code, out, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--json")
    summary = json.loads(out)
    assert code == 3 and written() == ["P1.json", "P1.pdb", "fold.csv"] and summary["proteins"] == 1
    assert [failed["id"] for failed in summary["failed"]] == ["P2", "P3"]
    failed = [line for line in err.splitlines() if line.startswith("Failed: ")]
    assert failed[0] == "Failed: line 3, record 2 'P2': 36 residues do not fit"
    assert failed[1].startswith("Failed: line 5, record 3 'P3': ") and "nan" in failed[1].lower()
    assert err.endswith("; 2 failed\n")
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0 and written() == sorted(["P1.json", *FILES])


def test_a_full_disk_leaves_what_is_whole(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2 is the first; of the second only the JSON could be written."""
    commit, count = FileTarget.commit, iter(range(100))

    def fails(target: FileTarget) -> None:
        if next(count) == 4:
            raise OSError(28, "No space left on device")
        commit(target)

    with monkeypatch.context() as patched:
        patched.setattr(FileTarget, "commit", fails)
        code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--json")
    assert code == 4 and "P1.pdb: No space left on device" in err
    assert written() == ["P1.json", "P2.json", "P2.pdb", "fold.csv"] and [row["id"] for row in index()] == ["P2"]
    err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--json").err
    assert "1 protein is in out already" in err and [row["id"] for row in index()] == list(PROTEINS)


def test_coordinates_that_have_no_room_fail_alone(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plm.folding.fold_in_pieces

    def fold_in_pieces(model: plm.Model, chains: Any, *rest: Any) -> Any:
        found, rows = whole(model, chains, *rest)
        return (replace(found, positions=found.positions * 1e5) if chains.letters == "ACX" else found), rows

    monkeypatch.setattr("plm.folding.fold_in_pieces", fold_in_pieces)
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out")
    assert code == 3 and "record 3 'P3': a PDB file has no room for" in err and written() == [*FILES[:2], "fold.csv"]


def test_progress_is_weighed_by_cost(run: Plm, fasta: str, model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is taken out."""
    bars = []

    class Bar:
        def __init__(self, job: Job, total: int, unit: str) -> None:
            self.total, self.unit = total, unit
            self.steps: list[int] = []
            bars.append(self)

        def update(self, step: int) -> None:
            self.steps.append(step)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            """Nothing is open."""

    monkeypatch.setattr(Job, "bar", lambda job, total, unit: Bar(job, total, unit))
    whole = plm.folding.fold_in_pieces

    def fold_in_pieces(model: plm.Model, chains: Any, *rest: Any) -> Any:
        if chains.letters == "ACX":
            raise MemoryError("too long")
        return whole(model, chains, *rest)

    monkeypatch.setattr("plm.folding.fold_in_pieces", fold_in_pieces)
    assert run("fold", fasta, "-m", FOLDS, "-o", "out", "--recycles", "1").code == 3
    cost = [operations(model.net.config, length, 2) for length in (11 + 25, 10)]
    assert [(bar.total, bar.unit, bar.steps) for bar in bars] == [(sum(cost), "FLOP", cost)]


def test_failures_count_in_no_time(run: Plm, fasta: str, model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2, the longest by far, fails after 1,000 s; P1 takes 500 s, and P3 costs less."""
    whole, clock = plm.folding.fold_in_pieces, [0.0]

    def fold_in_pieces(model: plm.Model, chains: Any, *rest: Any) -> Any:
        if chains.letters.startswith("MKTWYF"):
            clock[0] += 1000
            raise MemoryError("too long")
        clock[0] += 500
        return whole(model, chains, *rest)

    monkeypatch.setattr("plm.folding.fold_in_pieces", fold_in_pieces)
    monkeypatch.setattr("plm.cli.folding.perf_counter", lambda: clock[0])
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out")
    first, second, *_ = err.splitlines()
    left = 500 * operations(model.net.config, 3, 4) / operations(model.net.config, 10, 4)
    assert code == 3 and first.startswith("P1: ") and first.endswith(f", 500.0 s; about {left:.0f} s left")
    assert second.startswith("P3: ") and second.endswith(", 500.0 s; about 0 s left")
    assert [row["seconds"] for row in index()] == ["500.00", "500.00"]


def test_cost_of_the_published_model() -> None:
    """Against what was counted at published sizes: 10^12 operations, 4 passes, without the language model."""
    stem = {"layers": 36, "channels": 2560, "feed_forward": 10240}
    structure = StructureConfig(384, 128, 8, 12, 16, 4, 8, 1, 128, 2)
    config = Config(stem, 48, 1024, 128, 32, 32, 32, 4, 128, structure)
    alone = {length: operations(config, length, 0) for length in (1, 128, 256, 384, 512, 1024)}
    assert alone[1] == pytest.approx(5.7e9, rel=0.01)
    for length, counted in ((128, 4.5), (256, 19), (384, 48), (512, 94), (1024, 529)):
        # Two digits were noted
        assert operations(config, length, 4) - alone[length] == pytest.approx(counted * 1e12, rel=0.03)


def test_durations_as_people_say_them() -> None:
    from plm.cli.folding import duration

    assert [duration(seconds) for seconds in (0.4, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_a_bar_on_a_terminal(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    err = run("fold", fasta, "-m", FOLDS, "-o", "out").err
    assert " FLOP/s]" in err and "P1: 10 residues" not in err


# -- bad input and options


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (">a\nMKT\n>b\nMKtay\n", "record 2 'b': 't' at position 3"),
        (">a\nMK7\n", "record 1 'a': '7' at position 3"),
        (">a\nMKT::GSH\n", "record 1 'a': chain 2 of 3 is empty"),
        (">a\nMKT:\n", "record 1 'a': chain 2 of 2 is empty"),
        (">a\n\n", "record 1 'a': empty sequence"),
    ],
)
def test_bad_input(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, told: str) -> None:
    no_model_is_loaded(monkeypatch)
    (tmp_path / "in.fasta").write_text(content)
    code, out, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out")
    assert (code, out) == (4, "") and told in err and "What to do: " in err
    assert outputs(tmp_path) == ["in.fasta"]


def test_what_the_model_or_the_file_does_not_take(run: Plm, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK<mask>T\n")
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out")
    assert code == 4 and "line 1, record 1 'a': character '<' at position 3" in err
    (tmp_path / "in.fasta").write_text(f">a\n{':'.join('M' * 63)}\n>b\n{':'.join('M' * 20)}\n")
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out", "--numbering", "index")
    assert code == 4 and "'a': 63 chains, and a PDB file has letters for 62" in err and "--format cif" in err
    assert "'b': residues up to 10,223" in err and "--numbering chain" in err
    assert outputs(tmp_path) == ["in.fasta"]


def test_what_no_pdb_file_holds_is_not_folded(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mmCIF has room. "b" has 14 atoms in each residue (W) and 2 ends of chains."""
    chain = "W" * 3572
    (tmp_path / "in.fasta").write_text(f">a\n{'G' * 10_000}\n>b\n{chain}:{chain}\n>c\n{'W' * 3572}:{'W' * 3570}\n")
    monkeypatch.setattr("plm.cli.folding.fold_rows", lambda *args, **options: pytest.fail("too late"))
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out")
    assert code == 4 and outputs(tmp_path) == ["in.fasta"] and "What to do: write mmCIF: --format cif" in err
    assert "line 1, record 1 'a': a chain of 10,000 residues, and a PDB file has room for 9,999" in err
    assert "record 2 'b': 100,018 atoms and ends of chains, and a PDB file has room for 99,999" in err
    monkeypatch.setattr("plm.cli.folding.fold_rows", lambda *args, **options: [])
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out", "--format", "cif").code == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "add -o out/"),
        (("-o", ""), "add -o out/"),
        (("-o", "out", "--format", "xyz"), "--format"),
        (("-o", "out", "--recycles", "-1"), "--recycles"),
        (("-o", "out", "--chunk", "0"), "'0' is no number of rows"),
        (("-o", "out", "--chunk", "many"), "'many' is no number of rows"),
        (("-o", "out", "--linker", "G1"), "--linker"),
        (("-o", "out", "--residue-gap", "-5"), "--residue-gap"),
        (("-o", "out", "--numbering", "pdb"), "--numbering"),
        (("-o", "out", "--hide", "2", "--seed", "1"), "--hide"),
        (("-o", "out", "--hide", "nan", "--seed", "1"), "nan is not in the range"),
        (("-o", "out", "--hide", "0.1"), "add --seed"),
    ],
)
def test_usage(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], told: str) -> None:
    no_model_is_loaded(monkeypatch)
    code, out, err = run("fold", "MKT", "-m", FOLDS, *argv)
    assert (code, out) == (2, "") and told in err and outputs(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dtypes_that_no_structure_comes_of(run: Plm, tmp_path: Path, dtype: str) -> None:
    code, _, err = run("fold", "MKT", "-m", FOLDS, "-o", "out", "--dtype", dtype)
    assert code == 2 and f"Invalid value for --dtype: dtype {dtype} cannot be used" in err and outputs(tmp_path) == []


def test_models(run: Plm, tmp_path: Path) -> None:
    code, _, err = run("fold", "MKT", "-o", "out")
    assert code == 2 and "-m: esmfold" in err
    code, _, err = run("fold", "MKT", "-m", ESM2, "-o", "out")
    assert code == 2 and "predicts no structures" in err and outputs(tmp_path) == []
