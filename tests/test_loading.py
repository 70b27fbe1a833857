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
    "missing": (change_tensors(lambda t: t.pop(f"{LAYER}.bias")), rf"(?s)model\.safetensors: .*{LAYER}.bias"),
    "NaN": (
        change_tensors(lambda t: [t[f"{LAYER}.{part}"][:1].fill_(torch.nan) for part in ("bias", "weight")]),
        r"model\.safetensors has NaN or infinite values in blocks\.1\.up\.bias, blocks\.1\.up\.weight",
    ),
    "infinite": (
        change_tensors(lambda t: t["lm_head.bias"][5:6].fill_(-torch.inf)),
        r"infinite values in lm_head\.bias",
    ),
    "integers": (
        change_tensors(lambda t: t.update({f"{LAYER}.bias": torch.ones(128, dtype=torch.int8)})),
        r"model\.safetensors has blocks\.1\.up\.bias \(torch\.int8\); wanted one of float32",
    ),
    "extra": (change_tensors(lambda t: t.update(stranger=torch.zeros(2))), "stranger"),
    "mis-shaped": (change_tensors(lambda t: t.update({f"{LAYER}.bias": torch.zeros(5)})), r"blocks\.1\.up\.bias"),
    "torn": (lambda f: os.truncate(f / "model.safetensors", 300_000), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json cannot be read: Is a directory",
    ),
    "list": (lambda f: (f / "config.json").write_text("[]"), "must hold one JSON object; it holds a list"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"config\.json is missing; weights in this layout need it beside them",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "fewer layers": (change_config(num_hidden_layers=3), r"blocks\.3\.up\.bias"),
    "other act": (change_config(hidden_act="relu"), r"config\.json: hidden_act is 'relu'"),
    "other family": (change_config(model_type="bert"), r"config\.json: model_type is 'bert'"),
    "foreign": (
        lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"),
        r"model\.safetensors: these tensors",
    ),
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
    with pytest.raises(plm.CheckpointError, match=r"no such file or folder: runs/best"):
        plm.load(Path("runs/best"))
    with pytest.raises(plm.UnknownModelError, match="no model is called 'esm2_t6': did you mean"):
        plm.load("fair-esm:esm2_t6")


def test_an_empty_name_is_not_the_current_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    with pytest.raises(plm.UnknownModelError, match="no model is called ''"):
        plm.load("")
    assert plm.load(".").checkpoint.name == "esm2"


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


def test_a_folder_may_call_its_weights_what_it_likes(golden: Path, hub: Path) -> None:
    """Layout and format are read from the content: hub names in a ``.pt`` or ``.ckpt``, fair-esm's in a ``.bin``."""
    expected = plm.load(hub).net.state_dict()
    tensors = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").rename(hub / "epoch-3.safetensors")

    def check(source: Path) -> None:
        state = plm.load(source).net.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items()), source

    check(hub)
    (hub / "epoch-3.safetensors").unlink()
    for name in ("finetuned.pt", "last.ckpt", "weights.pth"):
        torch.save(tensors, hub / name)
        check(hub)
        check(hub / name)
        (hub / name).unlink()
    for source, target in (("esm2_tiny.pt", "x.bin"), ("esm2_tiny-contact-regression.pt", "x-contact-regression.pt")):
        shutil.copyfile(golden / "esm" / "esm2_tiny" / source, hub / target)
    (hub / "config.json").write_text("{}")  # what fair-esm's file needs lies inside it
    check(hub / "x.bin")


def test_a_folder_with_several_weights(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "a.safetensors")
    shutil.copyfile(hub / "a.safetensors", hub / "b.safetensors")
    with pytest.raises(
        plm.CheckpointError, match=r"several \.safetensors files \(a\.safetensors, b\.safetensors\); name"
    ):
        plm.load(hub)
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(plm.CheckpointError, match=r"model-1\.safetensors is not there"):
        plm.load(hub)


def test_names_of_local_models(hub: Path) -> None:
    """A folder's whole name, which may hold dots; a file's, unless every model's file is called so."""
    folder = hub.rename(hub.with_name("esm2.v1"))
    shutil.copyfile(folder / "model.safetensors", folder / "best.v2.safetensors")
    for source, name in ((folder, "esm2.v1"), (folder / "model.safetensors", "esm2.v1")):
        assert plm.load(source).checkpoint.name == name
    assert plm.load(folder / "best.v2.safetensors").checkpoint.name == "best.v2"


def test_a_hub_model_is_named_by_its_id_and_commit(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = hub.rename(hub.with_name(commit))
    monkeypatch.setattr("plm.loading.fetch", lambda row, **_: snapshot)
    for source, name in (("someone/finetuned", "someone/finetuned"), ("esm2-8m", "esm2-8m")):
        origin = plm.load(source, revision="main").checkpoint
        assert (origin.name, origin.revision) == (name, commit)
    assert (origin.source, origin.licence) == ("facebook/esm2_t6_8M_UR50D", "MIT")


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
    with pytest.raises(ValueError, match=r"'int4' is unknown; choose 'auto', 'float32'"):
        plm.load(hub, dtype="int4")
    with pytest.raises(ValueError, match=r"device 'warp' cannot be used"):
        plm.load(hub, device="warp")


def test_none_means_auto(hub: Path) -> None:
    ours, theirs = plm.load(hub, device=None, dtype=None), plm.load(hub)
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)


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
