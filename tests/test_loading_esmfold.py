"""`plm.load` of ESMFold: every published form gives the same network, each tensor in the dtype that it needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import equal, same
from safetensors.torch import load_file, save_file
from test_read_maps import measured
from torch import Tensor

import plm
from plm.esmfold.model import ESMFold
from plm.esmfold.residues import LETTERS
from plm.families import BY_NAME
from plm_weights import TensorSource, esmfold, export_weights, open_tensors

GOLDEN = Path(__file__).parent / "golden" / "esmfold"
HUB = GOLDEN / "a_hub_layout"  # as facebook/esmfold_v1
SAVED = GOLDEN / "b_v5_layout_multimer"  # as transformers 5 saves
ORIGINAL = GOLDEN / "original"  # the same numbers as the authors publish them
TRUNK, STEM = "esmfold_tiny.pt", "esm2_tiny.pt"
CONTACTS = "esm2_tiny-contact-regression.pt"
Settings = dict[str, Any]


def net_of(model: plm.Model) -> ESMFold:
    assert isinstance(model.net, ESMFold)
    return model.net


def copied(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copyfile(ORIGINAL / name, folder / name)
    return folder / TRUNK


def hub_folder(folder: Path, settings: Settings, tensors: dict[str, Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def settings_of(case: Path) -> Settings:
    found = json.loads((case / "config.json").read_text())
    assert isinstance(found, dict)
    return found


# ------------------------------------------------------------------------------------------------ forms


def test_the_authors_files_give_the_network_of_the_hubs() -> None:
    ours, hub = plm.load(ORIGINAL / TRUNK), plm.load(SAVED)
    assert equal(ours.net.state_dict(), hub.net.state_dict())
    assert ours.net.config == hub.net.config and not ours.net.training
    assert [file.name for file in ours.checkpoint.files] == [TRUNK, STEM, CONTACTS]
    assert ours.checkpoint.family == "esmfold" and ours.tokenizer == hub.tokenizer
    (one,), (other,) = (plm.fold(model, "MKTAYIAKQR:GPXVLN") for model in (ours, hub))
    assert same(one.positions, other.positions) and one.ptm == other.ptm


def test_a_pickle_as_the_hub_publishes_it(tmp_path: Path) -> None:
    """``pytorch_model.bin`` with half and single precision, and whole numbers."""
    shutil.copyfile(HUB / "config.json", tmp_path / "config.json")
    torch.save(load_file(HUB / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert equal(plm.load(tmp_path).net.state_dict(), plm.load(HUB).net.state_dict())


@pytest.mark.parametrize("case", [HUB, SAVED, ORIGINAL / TRUNK], ids=lambda path: path.name)
def test_own_form(case: Path, tmp_path: Path) -> None:
    plm.convert(case, tmp_path / "own")
    own, published = plm.load(tmp_path / "own"), plm.load(case)
    assert equal(own.net.state_dict(), published.net.state_dict())
    assert own.net.config == published.net.config


def test_the_language_model_is_found_by_its_published_name(tmp_path: Path) -> None:
    """As both lie in torch's hub folder, among others; and its contact regression is not missed."""
    path = copied(tmp_path, TRUNK, STEM)
    (tmp_path / STEM).rename(tmp_path / "esm2_t36_3B_UR50D.pt")
    (tmp_path / "other.pt").write_bytes(b"something else")
    model = plm.load(path)
    assert [file.name for file in model.checkpoint.files] == [TRUNK, "esm2_t36_3B_UR50D.pt"]
    assert net_of(model).stem.contact_head is None
    whole = plm.load(SAVED).net.state_dict()
    assert equal(
        model.net.state_dict(), {name: x for name, x in whole.items() if not name.startswith("stem.contact_head.")}
    )


def test_frequencies_that_are_not_stored_are_computed(tmp_path: Path) -> None:
    tensors = {name: x for name, x in load_file(HUB / "model.safetensors").items() if "inv_freq" not in name}
    net = net_of(plm.load(hub_folder(tmp_path, settings_of(HUB), tensors)))
    size = net.config.stem["channels"] // net.config.stem["heads"]
    exact = 10000 ** -(torch.arange(0, size, 2) / size)
    torch.testing.assert_close(net.stem.frequencies, exact, rtol=2**-11, atol=0)  # as float16 rounds


def test_a_model_without_a_trunk(tmp_path: Path) -> None:
    """As the authors' ablations have it: no blocks, no attention maps."""
    settings = settings_of(HUB)
    settings["esmfold_config"]["trunk"]["num_blocks"] = 0
    tensors = {
        name: x for name, x in load_file(HUB / "model.safetensors").items() if not name.startswith("trunk.blocks.")
    }
    model = plm.load(hub_folder(tmp_path, settings, tensors))
    assert len(net_of(model).blocks) == 0
    (structure,) = plm.fold(model, "MKTAYIAK")
    assert structure.positions.isfinite().all() and len(structure) == 8


def test_the_tokenizer_is_the_published_one(tmp_path: Path) -> None:
    """Letters in the order of AlphaFold, nothing around them; and the file beside the weights is compared."""
    shutil.copytree(HUB, tmp_path / "hub")
    vocabulary = tmp_path / "hub" / "vocab.txt"
    vocabulary.write_text("\n".join([*LETTERS, "<pad>", "<mask>", "<cls>", "<sep>", "<eos>"]))
    tokenizer = plm.load(tmp_path / "hub").tokenizer
    assert tokenizer == plm.load(HUB).tokenizer
    assert list(tokenizer.encode("ARNDX")) == [0, 1, 2, 3, 20]
    vocabulary.write_text("\n".join([*reversed(LETTERS), "<pad>"]))
    with pytest.raises(plm.CheckpointError, match=r"vocab\.txt.* id 0 is 'X', wanted 'A'"):
        plm.load(tmp_path / "hub")


# ------------------------------------------------------------------------------------------------ dtypes


def dtypes(model: plm.Model, *modules: str) -> set[torch.dtype]:
    return {x.dtype for name, x in model.net.state_dict().items() if f"{name}.".startswith(modules)}


def test_float32_keeps_the_language_models_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers alone, as stored, to the bit. "auto" is float32 also where other families take bfloat16."""
    model = plm.load(HUB, dtype="float32")
    stored = load_file(HUB / "model.safetensors")
    assert dtypes(model, "stem.blocks.") == {torch.float16}
    rest = {name: x.dtype for name, x in model.net.state_dict().items() if not name.startswith("stem.blocks.")}
    assert set(rest.values()) == {torch.float32} and model.dtype == torch.float32
    block = net_of(model).stem.blocks[1]
    assert torch.equal(block.up.weight, stored["esm.encoder.layer.1.intermediate.dense.weight"])
    monkeypatch.setattr("plm.placement.choose_dtype", lambda dtype, device: torch.bfloat16)
    assert equal(plm.load(HUB).net.state_dict(), model.net.state_dict())


def test_a_language_model_in_float32_stays_so() -> None:
    assert dtypes(plm.load(SAVED), "") == {torch.float32}


def test_float64_is_float64_everywhere() -> None:
    """But for the frequencies, which are numbers of half precision in any case."""
    state = plm.load(HUB, dtype="float64").net.state_dict()
    assert {name for name, x in state.items() if x.dtype != torch.float64} == {"stem.frequencies"}


def test_bfloat16_leaves_the_structure_module_alone() -> None:
    model = plm.load(HUB, dtype="bfloat16")
    precise = ("structure.", "to_structure.", "to_structure_pair.", "confidence_head.", "error_head.")
    assert dtypes(model, *precise) == {torch.float32}
    assert dtypes(model, "blocks.", "stem.blocks.", "embed.", "stem.embed.") == {torch.bfloat16}
    (coarse,), (fine,) = (plm.fold(each, "MKTAYIAKQRQISFVKSHF") for each in (model, plm.load(HUB)))
    # Twice what was measured, of any atom in points of 100.
    assert (coarse.plddt - fine.plddt).abs().max() < 2 * 0.47


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        ("float16", "65,504"),
        ("int8", "what they do to structures is not known"),
        ("float32-bfloat16", "mixes the two by itself"),
    ],
)
def test_dtypes_that_are_refused(dtype: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"dtype {dtype} cannot be used: .*{why}.* Choose bfloat16 or float32"):
        plm.load(HUB, dtype=dtype)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by files only on Linux")
def test_loading_holds_nothing_twice(tmp_path: Path) -> None:
    """A hub folder with a language model of 100 MB, in half precision.

    A quarter of it, queries, keys and values, is stacked and so becomes the program's own; its pages of the file are
    let go. All else are pages of the file.
    """
    config = asdict(plm.load(HUB).net.config)
    config["stem"] |= {"layers": 4, "channels": 1024, "heads": 16, "feed_forward": 4096}
    family = BY_NAME["esmfold"]
    with torch.device("meta"):
        empty = family.network(family.config(**config)).state_dict()
    state = {
        name: torch.ones(x.shape, dtype=torch.float16 if name.startswith("stem.") else torch.float32)
        for name, x in empty.items()
    }
    torch.save(export_weights(esmfold.hub_rows(config), state), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(esmfold.hub_files(config)["config.json"])
    work = "import plm\ndef work(path):\n    return plm.load(path, device='cpu')\n"
    size, found = (tmp_path / "pytorch_model.bin").stat().st_size, measured(work, HUB, tmp_path)
    assert size > 100e6
    # Measured: 0.25 of its own, and 1.00 in all.
    assert found["own"] < 0.3 * size and found["most"] < 1.1 * size
    found = measured(work.replace("device='cpu'", "device='cpu', dtype='bfloat16'"), HUB, tmp_path)
    # Measured: 1.00 of its own, and 1.08 in all: the largest tensor, 8 % of this file, twice while it is cast. All of
    # them twice would be 2.
    assert found["own"] < 1.01 * size and found["most"] < 1.2 * size


# ------------------------------------------------------------------------------------------------ faults


def test_a_missing_language_model_is_named(tmp_path: Path) -> None:
    path = copied(tmp_path, TRUNK)
    with pytest.raises(plm.CheckpointError, match=r"no esm2_t36_3B_UR50D\.pt, and no other \.pt file.*dl\.fbaipublic"):
        plm.load(path)
    copied(tmp_path, STEM)
    shutil.copyfile(path, tmp_path / "another.pt")
    with pytest.raises(plm.CheckpointError, match=r"several other files \(another\.pt, esm2_tiny\.pt\)"):
        plm.load(path)


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    """An ESM-1b; a file that holds none; and an ESM-2 of other sizes, with all that does not fit."""
    path = copied(tmp_path, TRUNK)
    stem = tmp_path / STEM
    shutil.copyfile(GOLDEN.parent / "esm" / "esm1b_tiny" / "esm1b_tiny.pt", stem)
    with pytest.raises(plm.CheckpointError, match=rf"{STEM}, taken for .* of {TRUNK}: it is an ESM-1, and"):
        plm.load(path)
    torch.save({"weight": torch.ones(2)}, stem)
    with pytest.raises(plm.CheckpointError, match=rf"{STEM}, taken for .*not those of ESM-1b"):
        plm.load(path)
    shutil.copyfile(GOLDEN.parent / "esm" / "esm2_tiny" / "esm2_tiny.pt", stem)
    with pytest.raises(plm.CheckpointError, match=r"(?s)layer_weights: the model has \(5,\).*stem_transition\.norm"):
        plm.load(path)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    for torn in (TRUNK, STEM):
        path = copied(tmp_path, TRUNK, STEM)
        (tmp_path / torn).write_bytes((ORIGINAL / torn).read_bytes()[:-100])
        with pytest.raises(plm.CheckpointError, match=f"{torn} cannot be read as a torch checkpoint"):
            plm.load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_esm_attn_map": True}, "esmfold_structure_module_only, are not supported"),
        ({"bypass_lm": True}, "bypass_lm is True"),
        ({"embed_aa": False}, "embed_aa is False"),
        ({"trunk": None}, "has no trunk"),
        ({"lddt_head_hid_dim": "wide"}, "lddt_head_hid_dim is 'wide'"),
    ],
)
def test_configurations_that_are_refused(changes: Settings, says: str, tmp_path: Path) -> None:
    """In the hub's form and in the authors'."""
    settings = settings_of(HUB)
    settings["esmfold_config"] |= changes
    with pytest.raises(plm.CheckpointError, match=rf"config\.json: .*{says}"):
        plm.load(hub_folder(tmp_path, settings, load_file(HUB / "model.safetensors")))
    source: TensorSource = open_tensors(ORIGINAL / TRUNK)
    plain = json.loads(json.dumps(source.extras["cfg"]))  # which torch writes without OmegaConf
    plain["model"] |= changes
    torch.save({"cfg": plain, "model": dict(source)}, tmp_path / TRUNK)
    shutil.copyfile(ORIGINAL / STEM, tmp_path / STEM)
    with pytest.raises(plm.CheckpointError, match=rf"{TRUNK}: .*{says}"):
        plm.load(tmp_path / TRUNK)


@pytest.mark.parametrize("fault", ["missing", "transposed", "swapped layouts", "nan"])
def test_wrong_weights_are_named(fault: str, tmp_path: Path) -> None:
    tensors = load_file(HUB / "model.safetensors")
    name = "trunk.blocks.1.mlp_seq.mlp.1.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "transposed":
        tensors[name] = tensors[name].T.contiguous()
    elif fault == "nan":
        tensors[name][0, 0] = torch.nan
    else:
        tensors["esm.layers.0.fc1.weight"] = tensors.pop("esm.encoder.layer.0.intermediate.dense.weight")
    told = {"nan": r"NaN or infinite values in blocks\.1\.transition\.up\.weight"}
    told["swapped layouts"] = r"esm\.layers\.0\.fc1\.weight: in no row"
    with pytest.raises(plm.CheckpointError, match=told.get(fault, r"blocks\.1\.(mlp_seq\.mlp\.1|transition\.up)")):
        plm.load(hub_folder(tmp_path, settings_of(HUB), tensors))


def test_the_folder_of_both_files(golden: Path) -> None:
    """The trunk is told by what is in it, so that the folder means the same."""
    folder = golden / "esmfold" / "original"
    whole = plm.load(folder)
    assert whole.checkpoint.files[0].name != whole.checkpoint.files[1].name and len(whole.checkpoint.files) >= 2
    named = plm.load(whole.checkpoint.files[0].path)
    assert torch.equal(whole.net.recycle_distances.weight, named.net.recycle_distances.weight)  # type: ignore[union-attr]
