"""`plm.convert` of ProGen2: every form gives back the published tensors, the authors' form its masks as well."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import equal, same
from command_line import Plm
from safetensors.torch import load_file
from test_conversion import full_disk
from test_loading_progen2 import BIN, CASES, GOLDEN, masks, tensors, tokenizer_json

import plm
from plm.conversion import Form, to_transformers
from plm.models.progen2 import Config, ProGen2
from plm_weights import open_tensors

WEIGHTS: dict[Form, str] = {"plm": "model.safetensors", "transformers": "model.safetensors", "original": BIN}
ASYMMETRIC = "hub_port_asymmetric_vocab"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


@pytest.fixture(params=[name for name in CASES if name != ASYMMETRIC])
def symmetric(request: pytest.FixtureRequest) -> Path:
    """What the authors' own code can read."""
    return GOLDEN / str(request.param)


def test_there_and_back(case: Path, tmp_path: Path) -> None:
    """Published to ours to the ports' form, tensor for tensor, as stored."""
    own, port = (tmp_path / form for form in ("plm", "transformers"))
    for source, target, form in ((case, own, "plm"), (own, port, "transformers"), (port, tmp_path / "again", "plm")):
        files = plm.convert(source, target, to=form)  # type: ignore[arg-type]
        assert [file.name for file in files] == ["config.json", "model.safetensors"]
        assert sorted(files) == sorted(target.iterdir())
    assert equal(load_file(port / "model.safetensors"), tensors(case))
    assert equal(load_file(tmp_path / "again" / "model.safetensors"), load_file(own / "model.safetensors"))
    assert all(plm.load(folder).net.config == plm.load(case).net.config for folder in (own, port))


@pytest.mark.parametrize("form", ["plm", "transformers", "original"])
def test_the_authors_form_from_any_other(symmetric: Path, tmp_path: Path, form: Form) -> None:
    """All that is in their file, masks included, in one memory for all layers: its size is that of theirs."""
    plm.convert(symmetric, tmp_path / form, to=form)
    if form != "original":
        plm.convert(tmp_path / form, tmp_path / "original", to="original")
    content = torch.load(tmp_path / "original" / BIN, weights_only=True)
    assert equal(content, tensors(symmetric) | masks(symmetric))
    assert len({x.data_ptr() for name, x in content.items() if name.endswith(".attn.bias")}) == 1
    assert equal(plm.load(tmp_path / "original").net.state_dict(), plm.load(symmetric).net.state_dict())


def test_masks_are_the_published_ones() -> None:
    """Bit for bit where the weights are float32; in float16 the published filling had overflowed."""
    for name, differ in (("half_rotary_buffers", set()), ("bin_fp16_large_vocab", {"masked_bias"})):
        folder = GOLDEN / name
        published = open_tensors(folder / WEIGHTS["original" if name.startswith("bin") else "plm"])
        made = masks(folder)
        assert published.keys() == tensors(folder).keys() | made.keys()
        assert {k.rpartition(".")[2] for k in made if not same(made[k], published[k])} == differ
        assert all(float(x) == -1e9 for k, x in made.items() if k.endswith("masked_bias"))


def test_a_published_file_comes_back_in_size(tmp_path: Path) -> None:
    """Two masks for two layers would be 2,304 bytes more; records of a zip file begin at multiples of 64."""
    folder = GOLDEN / "bin_fp16_large_vocab"
    plm.convert(folder, tmp_path / "out", to="original")
    sizes = [(place / BIN).stat().st_size for place in (folder, tmp_path / "out")]
    assert abs(sizes[0] - sizes[1]) < 48 * 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_dtype_is_of_the_weights_alone(symmetric: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    plm.convert(symmetric, tmp_path / "out", to="original", dtype=dtype)
    content = open_tensors(tmp_path / "out" / BIN)
    assert equal(dict(content), {k: x.to(dtype) for k, x in tensors(symmetric).items()} | masks(symmetric))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_both_classes_find_their_sizes(case: Path, tmp_path: Path) -> None:
    """The authors' class and that of the ports give a size each a name of its own."""
    plm.convert(case, tmp_path / "out", to="transformers")
    settings, config = json.loads((tmp_path / "out" / "config.json").read_text()), plm.load(case).net.config
    assert settings["n_embd"] == settings["embed_dim"] == config.channels
    assert settings["vocab_size"] == settings["vocab_size_emb"] == config.vocabulary
    assert settings["vocab_size_lm_head"] == config.outputs
    published = json.loads((case / "config.json").read_text())
    shared = settings.keys() & published.keys()
    assert len(shared) >= 16 and all(settings[key] == published[key] for key in shared)


def test_a_tokenizer_comes_along(case: Path, tmp_path: Path) -> None:
    source = shutil.copytree(case, tmp_path / "source")
    tokenizer_json(source)
    text = (source / "tokenizer.json").read_bytes()
    forms: list[Form] = ["plm", "transformers", *(["original"] if case.name != ASYMMETRIC else [])]  # type: ignore[list-item]
    for form in forms:
        plm.convert(source, tmp_path / form, to=form)
        assert (tmp_path / form / "tokenizer.json").read_bytes() == text
        source = tmp_path / form


def test_what_the_authors_code_has_no_place_for(tmp_path: Path) -> None:
    config = Config(32, 32, 1, 48, 4, 4, 96, 16)
    net = ProGen2(config)
    to_transformers(net.state_dict(), config, tmp_path / "heads")
    for source, says in (
        (GOLDEN / ASYMMETRIC, "one vocabulary for embedding and head, and these have 37 and 32 rows"),
        (tmp_path / "heads", "wants a multiple of 8 heads, and this has 4"),
    ):
        with pytest.raises(plm.CheckpointError, match=rf"{says}.*Choose to='plm' or to='transformers'"):
            plm.convert(source, tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(symmetric: Path, tmp_path: Path) -> None:
    with full_disk(100_000), pytest.raises(OSError, match="could not be written"):
        plm.convert(symmetric, tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(symmetric: Path, run: Plm) -> None:
    assert run("convert", str(symmetric), "out", "--to", "original").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.json", BIN]
    code, _, err = run("convert", str(GOLDEN / ASYMMETRIC), "other", "--to", "original")
    assert code == 5 and "37 and 32 rows" in err and not Path("other").exists()
