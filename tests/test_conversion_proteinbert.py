"""`plm.convert` of ProteinBERT: every form gives back the published tensors, the authors' form byte for byte."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import equal
from command_line import Plm
from safetensors.torch import load_file
from test_conversion import full_disk
from test_loading_proteinbert import CASES, GOLDEN, INDEX, PICKLE, as_safetensors, tensors

import plm
from plm_weights import open_tensors

SAVED = GOLDEN / "saved_model"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


@pytest.mark.parametrize(
    "source", [*(GOLDEN / case for case in CASES), SAVED, SAVED / INDEX], ids=lambda path: path.name
)
def test_there_and_back(source: Path, tmp_path: Path) -> None:
    """Published to ours to the authors', tensor for tensor, as stored."""
    own, back, again = (tmp_path / name for name in ("own", "back", "again"))
    files = plm.convert(source, own)
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert sorted(files) == sorted(own.iterdir())
    assert [file.name for file in plm.convert(own, back, to="original")] == ["config.json", PICKLE]
    plm.convert(back, again)
    published = tensors(GOLDEN / "tiny_2blocks" if source.is_relative_to(SAVED) else source)
    assert equal(tensors(back), published)
    assert equal(load_file(again / "model.safetensors"), load_file(own / "model.safetensors"))
    assert all(plm.load(folder).net.config == plm.load(source).net.config for folder in (own, back, again))


@pytest.mark.parametrize("form", ["pickle", "plm", "safetensors"])
def test_the_authors_form_from_any_other(case: Path, tmp_path: Path, form: str) -> None:
    """The same bytes as the authors' program writes, for the model; of the optimizer there is nothing."""
    source = case
    if form == "plm":
        source = tmp_path / form
        plm.convert(case, source)
    elif form == "safetensors":
        as_safetensors(tmp_path, tensors(case))
        source = tmp_path / "model.safetensors"
    plm.convert(source, tmp_path / "out", to="original")
    ours, theirs = (folder / PICKLE for folder in (tmp_path / "out", case))
    content = ours.read_bytes()
    assert theirs.read_bytes().startswith(content[: content.rindex(b"eN\x87")] + b"e")
    annotations, weights, optimizer = pickle.loads(content)
    assert annotations == plm.load(case).net.config.annotations and optimizer is None
    assert equal({f"{place:03d}": torch.from_numpy(array) for place, array in enumerate(weights)}, tensors(case))


def test_the_dilation_is_not_lost(tmp_path: Path) -> None:
    """No pickle tells it, so that a file beside it does."""
    case = GOLDEN / "tiny_2blocks"
    source = tmp_path / "source"
    source.mkdir()
    (source / PICKLE).write_bytes((case / PICKLE).read_bytes())
    settings = json.loads((case / "config.json").read_text()) | {"wide_conv_dilation": 3, "layer_norm_eps": 1e-5}
    (source / "config.json").write_text(json.dumps(settings))
    plm.convert(source, tmp_path / "own")
    plm.convert(tmp_path / "own", tmp_path / "back", to="original")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == {key: value for key, value in settings.items() if key != "upstream_create_model_kwargs"}
    for folder in ("source", "own", "back"):
        config = plm.load(tmp_path / folder).net.config
        assert (config.dilation, config.norm_eps) == (3, 1e-5)


@pytest.mark.parametrize("source", [GOLDEN / "tiny_2blocks", SAVED], ids=lambda path: path.name)
def test_transformers_has_no_such_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(plm.CheckpointError, match=r"no ProteinBERT\. Choose to='plm' or to='original'"):
        plm.convert(source, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_for_our_form(case: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The authors' pickle holds float32: rounded weights have to be made float32 again to become one."""
    plm.convert(case, tmp_path / "own", dtype=dtype)
    rounded = load_file(tmp_path / "own" / "model.safetensors")
    assert {tensor.dtype for tensor in rounded.values()} == {dtype}
    for source, more in ((tmp_path / "own", {}), (case, {"dtype": dtype})):
        with pytest.raises(
            plm.CheckpointError,
            match=rf"holds float32, and these weights are {str(dtype)[6:]}: leave out dtype, or choose",
        ):
            plm.convert(source, tmp_path / "out", to="original", **more)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    plm.convert(tmp_path / "own", tmp_path / "out", to="original", dtype="float32")
    assert equal(tensors(tmp_path / "out"), {name: x.to(dtype).float() for name, x in tensors(case).items()})


@pytest.mark.parametrize("name", [PICKLE, "config.json"])
def test_a_file_that_is_there_is_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} would be replaced"):
        plm.convert(GOLDEN / "tiny_2blocks", tmp_path, to="original")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_file_as_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"out\.pkl is named like a file, but several files are written"):
        plm.convert(GOLDEN / "tiny_2blocks", tmp_path / "out.pkl", to="original")


@pytest.mark.parametrize("size", [10, 10_000], ids=["first file", "last file"])
def test_a_full_disk_leaves_nothing_behind(size: int, case: Path, tmp_path: Path) -> None:
    with full_disk(size), pytest.raises(OSError, match=r"could not be written: .*[Ff]ile too large"):
        plm.convert(case, tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(run: Plm) -> None:
    assert run("convert", str(SAVED), "out", "--to", "original").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.json", PICKLE]
    assert equal(open_tensors(Path("out") / PICKLE), tensors(GOLDEN / "tiny_2blocks"))
    code, _, err = run("convert", str(SAVED), "other", "--to", "transformers")
    assert code == 5 and "transformers has no ProteinBERT" in err and not Path("other").exists()


def test_the_command_line_tells_where_it_comes_from(run: Plm) -> None:
    rows = {row["name"]: row for row in json.loads(run("models", "--json").out)}
    assert rows["proteinbert"]["source"].startswith("https://media.githubusercontent.com/")
