"""Pictures of structures: a PNG for each, and one page for all that needs no network."""

import base64
import io
import json
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import FOLDS, Plm, no_model_is_loaded, outputs
from test_cli_fold import FASTA, PROTEINS
from test_cli_fold_again import nothing_left
from torch import nn

from plm.esmfold.confidence import ERRORS, MOST, pair_errors
from plm.plots import BANDS, MOST_ERROR, draw_confidence
from plm.report import CELLS, UNIT, Row, Shown, coarse, write_report

HOSTILE = '</script><script>alert("x")</script>&<b>'
PAE = np.linspace(0, MOST_ERROR, 25).reshape(5, 5)
PROTEIN = Shown(
    HOSTILE, "5 residues", "ATOM <x>\nEND\n", "pdb", {"A": "MKT", "B": "GX"}, [12.3, 55, 71.5, 95.2, 0], PAE, [1, 516]
)


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, and the text in scripts, styles and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id") or tag

    def handle_data(self, text: str) -> None:
        self.texts.append((self.inside, text))

    def of(self, inside: str) -> list[str]:
        return [text for name, text in self.texts if name == inside and text.strip()]


def report(*proteins: Shown) -> str:
    file = io.StringIO()
    rows = [Row(each.id, len(each.plddt), len(each.chains), 46.81, 0.1234) for each in proteins]
    write_report(file, rows, proteins, title=HOSTILE, subtitle="two")
    return file.getvalue()


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


# -- the page


def test_the_page_needs_no_network() -> None:
    text = report(PROTEIN)
    page = Page(text)
    loading = {"src", "href", "srcset", "data", "action", "background", "poster"}
    assert [tag for tag, attributes in page.tags if loading & attributes.keys()] == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.tags}
    policy = next(given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';") and "http" not in policy
    viewer, script = page.of("script")
    assert len(viewer) > 500_000 and "fetch(" not in script + page.of("style")[0] and "http" not in script
    assert "url(" not in page.of("style")[0] and "@import" not in page.of("style")[0]


def test_ids_are_text_wherever_they_stand() -> None:
    page = Page(report(PROTEIN))
    assert [tag for tag, _ in page.tags].count("script") == 3 and "b" not in {tag for tag, _ in page.tags}
    assert page.of("h1") == page.of("title") == [HOSTILE]
    assert page.of("td") == [HOSTILE, "5", "2", "46.8", "0.123"]
    assert json.loads(page.of("p0")[0])["id"] == HOSTILE


def test_the_page_holds_structures_and_confidence() -> None:
    page = Page(report(PROTEIN, Shown("P2", "one", "data_x\n#\n", "cif", {"A": "M"}, [88.8], [[0.3]])))
    first, second = (json.loads(page.of(f"p{i}")[0]) for i in range(2))
    assert unpacked(first["structure"]) == b"ATOM <x>\nEND\n" and first["layout"] == "pdb"
    assert first["plddt"] == [12.3, 55, 71.5, 95.2, 0] and first["step"] == 1
    assert first["chains"] == [
        {"name": "A", "sequence": "MKT", "start": 1},
        {"name": "B", "sequence": "GX", "start": 516},
    ]
    cells = np.frombuffer(unpacked(first["pae"]), np.uint8).reshape(5, 5) * first["unit"]
    np.testing.assert_allclose(cells, PAE, rtol=0, atol=UNIT / 2)  # half a step of what is stored
    assert first["most"] * first["unit"] == MOST_ERROR and second["layout"] == "cif"


def test_large_maps_are_means() -> None:
    length = CELLS + 1
    map = np.arange(length)[:, None] + 2.0 * np.arange(length)
    cells, step = coarse(map)
    assert step == 2 and cells.shape == ((length + 1) // 2,) * 2
    assert (
        cells[3, 5] == map[6:8, 10:12].mean() and cells[3, -1] == map[6:8, -1].mean() and cells[-1, -1] == map[-1, -1]
    )
    assert coarse(map[:CELLS, :CELLS])[1] == 1


def test_the_script_reads_what_the_page_holds(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs scripts of pages, is not installed")
    page = Page(report(PROTEIN))
    program = f"""
{page.of("script")[1]}
decode({json.dumps(page.of("p0")[0])}).then((protein) => console.log(JSON.stringify({{
  ...protein, pae: [...protein.pae], borders: borders(protein), ticks: ticks(120),
  colours: [95, 90, 89.9, 50, 0].map(band), greens: [green(0), green(1), green(2)],
}})));
"""
    (tmp_path / "page.js").write_text(program)
    done = subprocess.run([node, tmp_path / "page.js"], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told["structure"] == PROTEIN.structure and told["id"] == HOSTILE and told["borders"] == [3]
    assert told["residues"] == ["A M1", "A K2", "A T3", "B G516", "B X517"]
    assert told["pae"] == np.rint(PAE / UNIT).astype(int).ravel().tolist()
    assert told["ticks"] == [50, 100] and told["greens"] == [[0, 68, 27], [247, 252, 245], [247, 252, 245]]
    blue, cyan, yellow, orange = (colour for _, colour in BANDS)
    assert told["colours"] == [blue, blue, cyan, yellow, orange]


# -- the picture


def test_a_picture_of_two_chains(tmp_path: Path) -> None:
    """Bands from blue above 90 to orange below 50; a map that is dark where the error is small."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    pae = np.full((20, 20), 30.0)
    pae[:10, :10] = pae[10:, 10:] = 1.0
    chains, metadata = {"A": 10, "B": 10}, {"Description": "mine"}
    draw_confidence([99.0] * 20, pae, tmp_path / "p.png", chains=chains, title="$x$_1", metadata=metadata)
    with image.open(tmp_path / "p.png") as drawing:
        assert drawing.text["Description"] == "mine"
        pixels = np.asarray(drawing.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    column = pixels[:, width // 4]
    seen = [tuple(colour) for i, colour in enumerate(column[:-1]) if (colour == column[i + 1]).all()]
    tints = [tuple(round(255 - 0.22 * (255 - int(hex[i : i + 2], 16))) for i in (1, 3, 5)) for _, hex in BANDS]
    found = [next(i for i, colour in enumerate(seen) if max(np.abs(np.subtract(colour, tint))) <= 1) for tint in tints]
    assert found == sorted(found)
    map = pixels[:, width // 2 :].sum(-1)
    quarter = (slice(height // 5, height // 2 - 20), slice(width // 2 // 8, width // 2 // 3))
    assert np.median(map[quarter]) < 200  # dark, and the quarter beside it light
    assert np.median(map[quarter[0], width // 2 // 2 : width // 2 * 3 // 4]) > 600


def test_the_largest_error_is_that_of_the_model() -> None:
    """A head that is sure of the last bin."""
    head = nn.Linear(1, ERRORS).requires_grad_(False)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -1e4)
    head.bias[-1] = 0
    assert pair_errors(head, torch.zeros(2, 2, 1), 2).expected.tolist() == [[MOST_ERROR] * 2] * 2 and MOST == MOST_ERROR


# -- plm fold --plot


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text(FASTA)
    return "in.fasta"


def test_fold_draws_each_protein_and_a_page_of_all(
    run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--plot")
    kinds = ("json", "pdb", "png")
    names = sorted([*(f"{id}.{kind}" for id in PROTEINS for kind in kinds), "fold.csv", "report.html"])
    assert code == 0 and outputs(Path("out")) == names
    assert "Note: out/report.html shows 3 proteins in 1 MB" in err.replace("\\", "/")
    page = Page(Path("out/report.html").read_text())
    for i, id in enumerate(PROTEINS):
        told, confidence = json.loads(page.of(f"p{i}")[0]), json.loads(Path(f"out/{id}.json").read_text())
        assert told["id"] == id and unpacked(told["structure"]) == Path(f"out/{id}.pdb").read_bytes()
        cells = np.frombuffer(unpacked(told["pae"]), np.uint8) * UNIT
        np.testing.assert_allclose(cells, np.ravel(confidence["pae"]), rtol=0, atol=UNIT / 2)
        with image.open(f"out/{id}.png") as drawing:
            assert json.loads(drawing.text["Description"])["fingerprint"] == confidence["fingerprint"]
            assert drawing.width > 1000 and len(drawing.convert("RGB").getcolors(10**6)) > 20
    Path("out/P1.png").unlink()
    Path("out/report.html").unlink()
    nothing_left(monkeypatch)  # pictures are drawn from the files
    code, out, _ = run("fold", fasta, "-m", FOLDS, "-o", "out", "--plot", "--json")
    summary: dict[str, Any] = json.loads(out)
    assert code == 0 and outputs(Path("out")) == names
    assert (summary["skipped"], summary["report"]) == (3, str(Path("out") / "report.html"))


@pytest.mark.parametrize("numbering", ["chain", "index"])
def test_the_page_counts_residues_as_the_file(run: Plm, numbering: str) -> None:
    pytest.importorskip("matplotlib")
    argv = ("--plot", "--numbering", numbering, "--linker", "GG", "--residue-gap", "9")
    err = run("fold", "MKT:GSH:W", "-m", FOLDS, "-o", "out", *argv).err
    assert "report.html shows 1 protein in " in err
    page, (file,) = Page(Path("out/report.html").read_text()), Path("out").glob("*.pdb")
    found = {line[21]: int(line[22:26]) for line in reversed(file.read_text().splitlines()) if line[:4] == "ATOM"}
    assert {chain["name"]: chain["start"] for chain in json.loads(page.of("p0")[0])["chains"]} == found
    assert found == ({"A": 1, "B": 1, "C": 1} if numbering == "chain" else {"A": 1, "B": 15, "C": 29})
    assert page.of("p")[0].startswith("1 structure by ")


def test_pages_and_pictures_of_others_are_kept(
    run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "report.html"
    mine.write_text("<html>mine</html>")
    with monkeypatch.context() as patched:
        no_model_is_loaded(patched)
        code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--plot")
    assert code == 4 and "report.html was not written by plm fold" in err and "mine" in mine.read_text()
    mine.unlink()
    (tmp_path / "out" / "P1.png").write_bytes(b"mine")
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--plot")
    assert code == 4 and "P1.png" in err and outputs(tmp_path / "out") == ["P1.png"]
    assert run("fold", fasta, "-m", FOLDS, "-o", "out", "--plot", "--overwrite").code == 0
    assert (tmp_path / "out" / "P1.png").read_bytes() != b"mine"


def test_pictures_need_matplotlib(run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model_is_loaded(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("fold", fasta, "-m", FOLDS, "-o", "out", "--plot")
    assert code == 4 and "pip install matplotlib" in err and outputs(tmp_path) == ["in.fasta"]
