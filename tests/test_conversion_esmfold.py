"""`plm.convert` of ESMFold: nothing is lost on the way, and transformers reads what is written for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import equal
from command_line import Plm
from safetensors.torch import load_file
from test_loading_esmfold import HUB, ORIGINAL, SAVED, TRUNK
from torch import Tensor

import plm
from plm.conversion import to_plm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SOURCES = [HUB, SAVED, ORIGINAL / TRUNK]
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
HUB_FILES = ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer_config.json", "vocab.txt"]
POSITIONS = "esm.embeddings.position_ids"
FREQUENCIES = "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq"


def as_the_hub_has_it(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms as weight and bias, without counted positions; frequencies aside, of which there are copies."""
    renamed = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): x for name, x in tensors.items()}
    return {name: x for name, x in renamed.items() if name != POSITIONS and "inv_freq" not in name}


@every_source
def test_there_and_back(source: Path, tmp_path: Path) -> None:
    """Published to ours to the hub's, tensor for tensor and as stored; and ours again."""
    own, hub, again = (tmp_path / name for name in ("own", "hub", "again"))
    assert [file.name for file in plm.convert(source, own)] == ["config.json", "model.safetensors"]
    assert sorted(file.name for file in plm.convert(own, hub, to="transformers")) == HUB_FILES
    plm.convert(hub, again)
    published = load_file((SAVED if source.is_relative_to(ORIGINAL) else source) / "model.safetensors")
    written = load_file(hub / "model.safetensors")
    frequencies = [x for name, x in published.items() if "inv_freq" in name]
    assert equal(as_the_hub_has_it(written), as_the_hub_has_it(published))
    assert all(torch.equal(written[FREQUENCIES], x) for x in frequencies)
    assert equal(load_file(again / "model.safetensors"), load_file(own / "model.safetensors"))
    assert all(plm.load(folder).net.config == plm.load(source).net.config for folder in (own, hub, again))


def theirs(folder: Path) -> Any:
    """transformers' ESMFold of a folder, with nothing left out, and nothing left over but what it does not keep."""
    net, report = transformers.EsmForProteinFolding.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
    assert not report["unexpected_keys"]
    return net.float().eval()


@torch.no_grad()
@every_source
def test_transformers_reads_what_is_written_for_it(source: Path, tmp_path: Path) -> None:
    """And gives the same numbers, to the bit, as from the published file."""
    plm.convert(source, tmp_path / "out", to="transformers")
    ours, published = theirs(tmp_path / "out"), theirs(SAVED if source.is_relative_to(ORIGINAL) else source)
    assert ours.af2_to_esm.tolist() == published.af2_to_esm.tolist()
    ids = torch.tensor([plm.load(source).tokenizer.encode("MKTAYIAKQRGPXVLN")])
    found, wanted = ours(ids, num_recycles=1), published(ids, num_recycles=1)
    assert all(torch.equal(found[name], wanted[name]) for name in ("positions", "plddt", "ptm", "s_z"))


def test_its_tokenizer_reads_the_vocabulary(tmp_path: Path) -> None:
    """Without special tokens, for which the network has no rows; X for what is no residue."""
    plm.convert(HUB, tmp_path / "out", to="transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("ARNDCQEGHILKMFPSTWYVX", add_special_tokens=False).input_ids
    assert ids == list(range(21))
    assert tokenizer("MOM", add_special_tokens=False).input_ids == [12, 20, 12]
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("source", [HUB, ORIGINAL / TRUNK], ids=lambda path: path.name)
def test_the_authors_form_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(plm.CheckpointError, match=r"OmegaConf.*Choose to='plm' or to='transformers'"):
        plm.convert(source, tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    """Of everything but the frequencies. Half precision is stored if wanted, but computed in float32."""
    plm.convert(HUB, tmp_path / "own", dtype=dtype)
    state = load_file(tmp_path / "own" / "model.safetensors")
    frequencies = state.pop("stem.frequencies")
    assert {str(x.dtype) for x in state.values()} == {f"torch.{dtype}"} and frequencies.dtype == torch.float16
    model = plm.load(tmp_path / "own", dtype="float32")
    kept = {str(x.dtype) for name, x in model.net.state_dict().items() if name.startswith("stem.blocks.")}
    assert kept == {"torch.float32" if dtype == "float64" else f"torch.{dtype}"}
    assert plm.fold(model, "MKTAYI")[0].positions.isfinite().all()


def test_files_of_the_tokenizer_come_along(tmp_path: Path) -> None:
    """As they lie beside the weights."""
    plm.convert(HUB, tmp_path / "hub", to="transformers")
    (tmp_path / "hub" / "special_tokens_map.json").write_text("{}")
    plm.convert(tmp_path / "hub", tmp_path / "again", to="transformers")
    assert (tmp_path / "again" / "special_tokens_map.json").read_text() == "{}"


def test_settings_that_are_not_the_published_ones(tmp_path: Path) -> None:
    """All sizes of the golden survive in config.json, and so do those of a model without a trunk."""
    settings = json.loads((SAVED / "config.json").read_text())
    plm.convert(SAVED, tmp_path / "out", to="transformers")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_list"):
        assert written[key] == settings[key], key
    wanted = settings["esmfold_config"] | {"esm_type": "esm2_3B"}
    assert written["esmfold_config"] == wanted
    config = plm.load(SAVED).net.config
    to_plm(plm.load(SAVED).net.state_dict(), config, tmp_path / "own")
    assert plm.load(tmp_path / "own").net.config == config


def test_on_the_command_line(run: Plm) -> None:
    assert run("convert", str(ORIGINAL / TRUNK), "out", "--to", "transformers").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == HUB_FILES
    code, _, err = run("convert", str(HUB), "other", "--to", "original")
    assert code == 5 and "OmegaConf" in err and not Path("other").exists()
    rows = {row["name"]: row for row in json.loads(run("models", "--json").out)}
    assert rows["esmfold"]["parameters"] == rows["esmfold-v0"]["parameters"] == 3_525_037_474
    assert rows["esmfold-v0"]["source"].endswith("/esmfold_3B_v0.pt") and rows["esmfold"]["licence"] == "MIT"
