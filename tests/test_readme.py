"""Every code block of the README runs as printed; only downloads are replaced, by random weights."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import tiny

import plm
from plm.cli import main
from plm.cli.errors import Code
from plm.conversion import to_plm
from plm_weights.registry import Checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "data" / "yeast_300.fasta.gz"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def desk(random_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with proteins.fasta.gz in it, on a machine where downloads give small random models."""
    real = plm.loading.fetch
    small = {"igbert": partial(tiny.igbert, positions=320), "ankh3-large": tiny.ankh3, "prostt5": tiny.prostt5}
    small["proteinbert"] = partial(tiny.proteinbert_model, config=replace(tiny.PROTEINBERT, layers=6))
    small |= dict.fromkeys(("progen2-small", "progen2-medium"), partial(tiny.progen2_model, max_length=2048))

    def fetch(source: Checkpoint, **options: object) -> Path:
        if source.folder is not None:
            return real(source, **options)
        if source.name == "esmfold":
            return ROOT / "tests" / "golden" / "esmfold" / "a_hub_layout"
        if source.name not in small:
            return random_8m
        model, folder = small[source.name](), tmp_path / "published" / source.name
        if not folder.exists():
            to_plm(model.net.state_dict(), model.net.config, folder)
            vocabulary = [[token, 0.0] for token in model.tokenizer.vocabulary]
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": vocabulary}}))
        return folder

    monkeypatch.setattr("plm.loading.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples" / "data").mkdir(parents=True)
    for name in (EXAMPLE.name, "antibodies.csv", "blat_ecolx.csv.gz", "blat_ecolx.fasta"):
        shutil.copyfile(EXAMPLE.with_name(name), tmp_path / "examples" / "data" / name)
    lines = gzip.decompress(EXAMPLE.read_bytes()).split(b"\n>")[:5]
    (tmp_path / "proteins.fasta.gz").write_bytes(gzip.compress(b"\n>".join(lines)))
    return tmp_path


def test_python_blocks_run_one_after_the_other(desk: Path) -> None:
    scope: dict[str, object] = {}
    for code in (block for kind, block in BLOCKS if kind == "python"):
        exec(compile(code, "README.md", "exec"), scope)
    assert scope["residues"][0].shape == (25, 240)
    assert [tuple(rows.shape) for rows in scope["middle"]] == [(25, 240), (28, 240)]
    assert [tuple(found.shape) for found in scope["maps"]] == [(25, 25), (28, 28)]
    assert (scope["heavy"].shape, scope["light"].shape) == ((21, 32), (21, 32))
    assert len(scope["completed"].sequence) <= len(scope["protein"]) == 35 and len(scope["filled"].filled) == 2
    assert len(scope["samples"]) == 3 and [len(score.per_residue) for score in scope["scores"]] == [17, 17]
    assert (scope["state"].shape, scope["loss"].requires_grad) == ((64,), True)
    assert scope["structure"].pae.shape == (25, 25) and scope["text"].endswith("END\n")
    assert (desk / "esm2_8m-contact-regression.pt").exists()


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("plm ")])
def test_commands_run(desk: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(line)[1:]
    # Random weights give none of the published numbers, and `verify` has to say so.
    wanted = Code.BAD_MODEL if arguments[0] == "verify" else Code.DONE
    assert main(arguments) == wanted, capsys.readouterr().err
    for flag, value in pairwise(arguments):
        if flag == "-o" and value != "-":
            assert (desk / value).stat().st_size > 0


def test_other_commands_name_things_that_exist() -> None:
    """What cannot run inside a test: cloning, installing, make, and benchmarks. Their names must be right at least."""
    others = [line for line in SHELL if line and not line.startswith("plm ")]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in others:
        match shlex.split(line):
            case ["git", "clone", *_] | ["pip", "install", "."]:
                pass
            case ["make", target, *_]:
                assert target in targets
            case ["python", script, *options]:
                text = (ROOT / script).read_text()
                assert all(f'"{option}"' in text for option in options if option.startswith("--"))
            case _:
                pytest.fail(f"README has a command that no test runs: {line}")


def test_links_and_tree_name_files_that_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\b[\w/]+\.(?:py|md)\b", README.split("## Where things are")[1].split("| to add")[0]):
        assert any(path.name == Path(name).name for path in ROOT.rglob(Path(name).name)), name


def test_table_lists_the_registry() -> None:
    cells = re.findall(r"^\| (`[\w-]+`.*?) \|", README.split("## Use")[1].split("## What it does")[0], re.MULTILINE)
    named = set(re.findall(r"`([\w-]+)`", " ".join(cells))) | {f"esm1v-{i}" for i in range(2, 6)}
    assert named == {row.name for row in plm.available()}


def test_demo_writes_what_it_says(tmp_path: Path) -> None:
    paths = ":".join(str(ROOT / folder) for folder in ("", "kernels", "weights"))
    command = [sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path]
    environment = {"PYTHONPATH": paths, "MPLCONFIGDIR": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "300 proteins, 120,229 residues" in run.stdout
    assert (tmp_path / "yeast.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "yeast.safetensors").stat().st_size > 300 * 240 * 4
