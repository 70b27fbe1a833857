"""``plm fold`` into a folder that holds something: what is kept, what is gone on with, also after an interruption."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import FOLDS, Plm, no_model_is_loaded
from safetensors.torch import load_file, save_file
from test_cli_fold import FASTA, FILES, PROTEINS, index, written
from test_cli_signals import start

import plm
from plm.outputs.proteins import COLUMNS, ENDS, PAUSE, ProteinFolder
from plm.outputs.target import OutputError


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text(FASTA)
    return "in.fasta"


def test_what_is_there_is_not_folded_again(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    before = {name: Path("out", name).read_bytes() for name in FILES}
    Path("out/P2.pdb").unlink()
    code, out, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--json", "--quiet")
    assert code == 0 and json.loads(out)["skipped"] == 0  # the JSON is wanted now
    Path("out/P2.pdb").unlink()
    code, out, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--json")
    summary = json.loads(out)
    assert (code, summary["proteins"], summary["skipped"]) == (0, 1, 2)
    assert err.startswith("Note: 2 proteins are in out already, and not folded again\nP2: ")
    assert [result["id"] for result in summary["results"]] == list(PROTEINS)
    assert all(Path("out", name).read_bytes() == before[name] for name in FILES[:3])
    nothing_left(monkeypatch)
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--quiet", "--overwrite")
    assert (code, err) == (0, "")


def nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fold_rows(model: plm.Model, proteins: list[object], **options: object) -> list[object]:
        assert proteins == []
        return []

    monkeypatch.setattr("plm.cli.folding.fold_rows", fold_rows)


def test_an_index_that_was_lost_is_made_anew(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    before = index()
    Path("out/fold.csv").unlink()
    nothing_left(monkeypatch)
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    assert index() == [{**row, "seconds": ""} for row in before]


def test_the_index_keeps_what_other_inputs_left(run: Plm, fasta: str, tmp_path: Path) -> None:
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    (tmp_path / "more.fasta").write_text(">P0\nMKT\n")
    assert run("fold", "more.fasta", "-m", FOLDS, "-o", "out").code == 0
    assert [row["id"] for row in index()] == ["P0", *PROTEINS]
    Path("out/P1.pdb").unlink()
    assert run("fold", "more.fasta", "-m", FOLDS, "-o", "out").code == 0  # nothing to write: it stays as it was
    assert run("fold", fasta, "-m", FOLDS, "-o", "out", "--quiet").code == 0
    assert [row["id"] for row in index()] == [*PROTEINS, "P0"]


@pytest.mark.parametrize(
    "other",
    [
        ("--recycles", "0"),
        ("--numbering", "index"),
        ("--linker", "GGG"),
        ("--residue-gap", "0"),
        ("--dtype", "float64"),
        ("--hide", "0.5", "--seed", "1"),
    ],
    ids=lambda argv: argv[0],
)
def test_other_settings_are_never_mixed(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[str, ...]
) -> None:
    (tmp_path / "in.fasta").write_text(f">P2\n{PROTEINS['P2']}\n")
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out").code == 0
    before = Path("out/P2.pdb").read_bytes()
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out", *other)
    assert code == 4 and "out holds P2.pdb, made from another" in err and "--overwrite" in err
    assert Path("out/P2.pdb").read_bytes() == before
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out", "--overwrite", *other).code == 0
    assert Path("out/P2.pdb").read_bytes() != before and len(index()) == 1


CIF, BESIDE = ("--format", "cif", "--recycles", "0"), ("--json",)


@pytest.mark.parametrize(
    ("first", "then", "names"),
    [
        (("--format", "cif", *BESIDE), CIF, ["1.cif"]),
        (BESIDE, CIF, ["1.cif"]),
        (CIF, BESIDE, ["1.json", "1.pdb"]),
        ((*CIF, *BESIDE), (), ["1.pdb"]),
    ],
)
def test_files_of_two_runs_are_never_beside_each_other(
    run: Plm, tmp_path: Path, first: tuple[str, ...], then: tuple[str, ...], names: list[str]
) -> None:
    """A picture of the first run, too; a file that is no run's is kept."""
    (tmp_path / "in.fasta").write_text(">1\nMKTAYIAKQR\n")
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out", *first).code == 0
    mark = index()[0]["fingerprint"]
    Path("out/1.png").write_bytes(f'{{"fingerprint": "{mark}"}}'.encode() + ENDS[".png"])
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out", *then)
    assert code == 4 and all(path.name in err for path in before if path.name != "fold.csv") and "--overwrite" in err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    Path("out/1.txt").touch()
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out", "--overwrite", *then).code == 0
    assert written() == sorted([*names, "1.txt", "fold.csv"])


def test_what_was_removed_leaves_the_index(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the new file could not be written; of the others the old ones stay."""
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    write = ProteinFolder.write

    def fails(folder: ProteinFolder, id: str, suffix: str, content: bytes) -> None:
        if id == "P1":
            raise OutputError("full")
        write(folder, id, suffix, content)

    monkeypatch.setattr(ProteinFolder, "write", fails)
    assert run("fold", fasta, "-m", FOLDS, "-o", "out", *CIF, "--overwrite").code == 4
    assert written() == ["P2.cif", "P3.pdb", "fold.csv"] and [row["file"] for row in index()] == ["P2.cif", "P3.pdb"]


def test_what_another_run_left_beside_what_is_there_goes(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it has no fingerprint."""
    (tmp_path / "in.fasta").write_text(">1\nMKTAYIAKQR\n>2\nGSH\n")
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "old", *CIF).code == 0
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out").code == 0
    shutil.copy("old/1.cif", "out/1.cif")
    Path("out/2.cif").write_text("data_mine\n#\n")
    nothing_left(monkeypatch)
    code, _, err = run("fold", "in.fasta", "-m", FOLDS, "-o", "out")
    assert code == 4 and "out holds 1.cif, made from another" in err and Path("out/1.cif").exists()
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out", "--overwrite").code == 0
    assert written() == ["1.pdb", "2.cif", "2.pdb", "fold.csv"]


def test_settings_that_change_nothing_are_not_compared(
    run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory; and for a single chain what joins chains."""
    (tmp_path / "in.fasta").write_text(">P1\nMKTAYIAKQR\n")
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out").code == 0
    nothing_left(monkeypatch)
    argv = ("--chunk", "3", "--max-tokens", "5", "--linker", "GGG", "--residue-gap", "3", "--seed", "4")
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out", *argv).code == 0


@pytest.mark.parametrize("what", ["sequence", "weights", "config", "format", "torn", "foreign"])
def test_a_file_that_is_something_else_is_kept(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "in.fasta").write_text(">P1\nMKTAYIAKQR\n")
    model = FOLDS
    assert run("fold", "in.fasta", "-m", FOLDS, "-o", "out").code == 0
    file = Path("out/P1.pdb")
    if what == "sequence":
        (tmp_path / "in.fasta").write_text(">P1\nMKTAYIAKQW\n")
    elif what == "weights":
        model = str(tmp_path / "other")
        tensors = load_file(Path(FOLDS, "model.safetensors"))
        tensors["embedding.weight"] *= 2
        shutil.copytree(FOLDS, model)
        save_file(tensors, Path(model, "model.safetensors"), {"format": "pt"})
    elif what == "config":
        model = str(tmp_path / "other")
        shutil.copytree(FOLDS, model)
        settings = json.loads(Path(model, "config.json").read_text())
        settings["esmfold_config"]["trunk"]["structure_module"]["trans_scale_factor"] = 5
        Path(model, "config.json").write_text(json.dumps(settings))
    elif what == "format":
        monkeypatch.setattr("plm.cli.folded.FORMAT", 0)
    elif what == "torn":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.write_text("HEADER    MINE\nEND\n")
    before = file.read_bytes()
    code, _, err = run("fold", "in.fasta", "-m", model, "-o", "out")
    assert code == 4 and "P1.pdb" in err and "--overwrite" in err and file.read_bytes() == before
    assert run("fold", "in.fasta", "-m", model, "-o", "out", "--overwrite").code == 0
    assert file.read_bytes() != before and file.read_bytes().endswith(ENDS[".pdb"])


def test_files_of_the_folder_that_are_not_ours(
    run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_model_is_loaded(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fold.csv").write_text("mine\n1\n")
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out")
    assert code == 4 and "fold.csv was not written by plm fold" in err and "--overwrite" in err
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "in.fasta")
    assert code == 2 and "is the input" in err
    (tmp_path / "file").touch()
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "file")
    assert code == 4 and "proteins need a folder" in err
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "no/such/folder")
    assert code == 4 and "create it first" in err


def test_the_index_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, after a pause, and at the end; also where that is an error, and then as well on a full disk."""
    clock, writes = [100.0], []
    monkeypatch.setattr("plm.outputs.proteins.monotonic", lambda: clock[0])
    monkeypatch.setattr("plm.outputs.proteins.write_whole", lambda path, content: writes.append(content.count(b"\n")))
    folder = ProteinFolder(tmp_path / "out", [str(i) for i in range(30)], overwrite=False)
    with pytest.raises(KeyboardInterrupt), folder.filling():
        for i in range(30):
            folder.add_row(dict.fromkeys(COLUMNS, "x") | {"id": i})
            clock[0] += PAUSE / 20
        raise KeyboardInterrupt
    assert writes == [2, 22, 31]  # a line for the columns
    with folder.filling():
        pass
    assert len(writes) == 3

    def full(path: Path, content: bytes) -> None:
        raise OutputError("full")

    monkeypatch.setattr("plm.outputs.proteins.write_whole", full)
    with pytest.raises(KeyboardInterrupt), folder.filling():
        folder.add_row(dict.fromkeys(COLUMNS, "x") | {"id": 0})
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="full"), folder.filling():
        pass


def test_files_that_are_there_are_read_once(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    opened: list[str] = []
    whole = Path.open

    def counted(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return whole(path, *args, **options)

    monkeypatch.setattr(Path, "open", counted)
    assert run("fold", fasta, "-m", FOLDS, "-o", "out").code == 0
    assert sorted(name for name in opened if name.endswith((".pdb", ".csv"))) == FILES


# -- interruption


def test_interrupted_and_gone_on_with(run: Plm, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text("".join(f">{i}\n{'ACDEFGHIKLMNPQRSTVWY' * 2}\n" for i in range(2000)))
    process = start(tmp_path, "fold", "in.fasta", "-o", "out", "-q", model=FOLDS)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.pdb"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    there = sorted(path.stem for path in (tmp_path / "out").glob("*.pdb"))
    told = f"{len(there)} of 2,000 proteins are in out; the same command goes on with the others.\n"
    assert (process.returncode, out, err) == (130, "", f"{told}Error: interrupted\n")
    assert written() == sorted([*(f"{id}.pdb" for id in there), "fold.csv"])
    assert all(Path("out", f"{id}.pdb").read_bytes().endswith(b"END\n") for id in there)
    assert sorted(row["id"] for row in index()) == there
    records = [*there, "1999"]
    (tmp_path / "in.fasta").write_text("".join(f">{id}\n{'ACDEFGHIKLMNPQRSTVWY' * 2}\n" for id in records))
    code, out, _ = run("fold", "in.fasta", "-m", FOLDS, "-o", "out", "--quiet")
    assert (code, out) == (0, "") and sorted(row["id"] for row in index()) == sorted(records)
