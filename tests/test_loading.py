"""From a name or a path to a model: what is found, what is refused, and how it is said."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import plm
from plm.models.esm import Config, default_frequencies

Spoil = Callable[[Path], object]


@pytest.fixture
def hub(golden: Path, tmp_path: Path) -> Path:
    """A copy of the hub form of the tiny ESM-2, to spoil."""
    folder = tmp_path / "esm2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        shutil.copyfile(golden / "esm" / "esm2_tiny" / name, folder / name)
    return folder


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")

    return spoil


def change_config(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


LAYER = "esm.encoder.layer.1.intermediate.dense"
BAD_CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "missing": (change_tensors(lambda t: t.pop(f"{LAYER}.bias")), rf"{LAYER}.bias"),
    "extra": (change_tensors(lambda t: t.update(stranger=torch.zeros(2))), "stranger"),
    "mis-shaped": (change_tensors(lambda t: t.update({f"{LAYER}.bias": torch.zeros(5)})), r"blocks\.1\.up\.bias"),
    "torn": (lambda f: os.truncate(f / "model.safetensors", 300_000), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "must hold one JSON object; it holds a list"),
    "no config": (lambda f: (f / "config.json").unlink(), "needs a config.json beside it"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "fewer layers": (change_config(num_hidden_layers=3), r"blocks\.3\.up\.bias"),
    "other act": (change_config(hidden_act="relu"), "hidden_act"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_name_and_reason(hub: Path, case: str) -> None:
    plm.load(hub)
    spoil, complaint = BAD_CHECKPOINTS[case]
    spoil(hub)
    with pytest.raises(plm.CheckpointError, match=complaint):
        plm.load(hub)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> object:
            return Path.touch, (marker,)

    path = tmp_path / "esm2_evil.pt"
    path.write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(plm.CheckpointError, match=r"esm2_evil\.pt"):
        plm.load(path)
    torch.save({"model": {"embed_tokens.weight": torch.zeros(2)}, "args": Hostile()}, path)
    with pytest.raises(plm.CheckpointError, match=r"esm2_evil\.pt"):
        plm.load(path)
    assert not marker.exists()


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(plm.UnknownModelError, match="did you mean esm2-8m"):
        plm.load("esm2-9m")
    with pytest.raises(plm.CheckpointError, match=r"no such file or folder: \./nowhere/esm2"):
        plm.load("./nowhere/esm2")
    with pytest.raises(plm.CheckpointError, match=r"no such file or folder: nowhere\.pt"):
        plm.load("nowhere.pt")


def test_offline_and_not_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(plm.DownloadError, match="offline"):
        plm.load("esm2-8m", offline=True)


def test_every_form_gives_the_same_network(golden: Path, hub: Path) -> None:
    """Folder, safetensors file, fair-esm file and our own form: one state, bit for bit."""
    plm.convert(hub, hub.parent / "own")
    case = golden / "esm" / "esm2_tiny"
    states = [plm.load(s).net.state_dict() for s in (hub, hub / "model.safetensors", hub.parent / "own")]
    original = plm.load(case / "esm2_tiny.pt").net.state_dict()
    for state in states:
        assert state.keys() == original.keys()
        assert all(torch.equal(state[name], original[name]) for name in state)


def test_what_a_model_knows_of_itself(hub: Path) -> None:
    model = plm.load(hub)
    origin = model.checkpoint
    assert (origin.name, origin.family, origin.source) == ("esm2", "esm", str(hub))
    assert [file.name for file in origin.files] == ["model.safetensors"]
    assert len(origin.sha256()["model.safetensors"]) == 64
    assert not model.net.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


def test_dtypes(hub: Path) -> None:
    """Weights take the dtype asked for; rotary frequencies are data and keep theirs."""
    stored = default_frequencies(8)
    for dtype in ("bfloat16", torch.float16, "float64"):
        net = plm.load(hub, dtype=dtype).net
        assert net.embed.weight.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        assert torch.equal(net.frequencies, stored)
        assert net.frequencies.dtype == torch.float32
    assert torch.equal(plm.load(hub).net.to(torch.bfloat16).frequencies, stored)
    with pytest.raises(ValueError, match=r"'int8' is unknown; choose 'auto', 'float32'"):
        plm.load(hub, dtype="int8")
    with pytest.raises(ValueError, match=r"device 'warp' cannot be used"):
        plm.load(hub, device="warp")


def test_missing_frequencies_are_those_of_the_published_files(hub: Path) -> None:
    expected = plm.load(hub).net.frequencies
    change_tensors(lambda t: [t.pop(name) for name in list(t) if name.endswith("inv_freq")])(hub)
    assert torch.equal(plm.load(hub).net.frequencies, expected)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of heads; got 10 channels and 3 heads"):
        Config(1, 10, 3, 40, None, False, True, 1e-5)


def test_available_lists_every_checkpoint() -> None:
    names = {row.name for row in plm.available()}
    assert {"plm-mini", "esm2-8m", "esm2-650m", "esm2-15b", "esm1b", "esm1v-1", "esm1v-5"} <= names
