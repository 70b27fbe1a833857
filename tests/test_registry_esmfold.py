"""The rows of ESMFold through their key maps: both published forms to a network on ``meta``, and back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.esmfold.config import Config
from plm.families import BY_NAME
from plm.placement import kept_in
from plm_weights import KeyMapError, esmfold
from plm_weights.keymap import Drop, KeyMap, check, export_weights
from plm_weights.registry import Form, find, header

ROW = find("esmfold")
FAMILY = BY_NAME["esmfold"]
both_forms = pytest.mark.parametrize("form", ["hub", "original"])


def config() -> dict[str, Any]:
    assert ROW.config is not None
    return dict(ROW.config)


def state() -> dict[str, Tensor]:
    """Our network, without memory."""
    with torch.device("meta"):
        return FAMILY.network(Config(**config())).state_dict()


def published(form: Form) -> dict[str, Tensor]:
    """What loading sees: the authors' trunk joined with ESM-2 3B in fair-esm's form."""
    if form == "hub":
        return header("esmfold")
    stem = {
        re.sub(r"^encoder\.(sentence_encoder\.)?", "", name): x for name, x in header("esm2-3b", "original").items()
    }
    return header("esmfold", "original") | {f"esm.{name}": x for name, x in stem.items()}


def dropped(rows: KeyMap, names: dict[str, Tensor]) -> set[str]:
    return {row.source for row in rows if isinstance(row, Drop)} & names.keys()


@both_forms
def test_every_header_loads_into_the_model_and_comes_back(form: Form) -> None:
    tensors, ours = published(form), state()
    assert esmfold.recognise(tensors) == form and esmfold.recognise(ours) == "plm"
    rows = esmfold.key_map(tensors, config())
    check(rows, tensors, ours)
    exported = export_weights(rows, ours)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in tensors.items() if name not in dropped(rows, tensors)
    }


def test_what_is_dropped() -> None:
    """No trained number but the head for masked tokens, of the authors' ESM-2."""
    hub, original = published("hub"), published("original")
    assert dropped(esmfold.hub_rows(config()), hub) == {
        "af2_to_esm",
        "esm.embeddings.position_ids",
        "esm.embeddings.position_embeddings.weight",
    }
    rest = dropped(esmfold.original_rows(config()), original) - {"af2_to_esm"}
    assert {name for name in rest if not name.startswith("esm.lm_head.")} == {
        "positional_encoding._float_tensor",
        *(f"trunk.structure_module.{name}" for name in ("default_frames", "group_idx", "atom_mask", "lit_positions")),
    }
    assert len(rest) == 5 + 6


def test_numbers_of_tensors() -> None:
    """3,918 outside the language model, as transformers 5 has, which keeps 582 in it; five constants more by its
    authors."""
    hub, original = header("esmfold"), header("esmfold", "original")
    assert sum(not name.startswith("esm.") for name in hub) == 3_918
    assert sum(name.startswith("esm.") for name in hub) == 582 - 1 + 36 + 2
    assert len(original) == 3_918 + 5 and not any(name.startswith("esm.") for name in original)
    assert {name: x.shape for name, x in original.items() if name in hub} == {
        name: x.shape for name, x in hub.items() if not name.startswith("esm.")
    }


@both_forms
def test_headers_fit_the_published_files(form: Form) -> None:
    """Each has at most 400 bytes per tensor besides the numbers: a table of positions more or less would be seen."""
    size = next(file.size for file in (ROW.files if form == "hub" else ROW.originals))
    tensors = header("esmfold", form)
    assert size is not None
    assert 200 < (size - sum(x.numel() * x.element_size() for x in tensors.values())) / len(tensors) < 400


@both_forms
def test_one_tensor_more_or_less_is_found(form: Form) -> None:
    tensors, ours = published(form), state()
    rows = esmfold.key_map(tensors, config())
    for name in [name for name in tensors if name not in dropped(rows, tensors) and "inv_freq" not in name][::301]:
        without = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(KeyMapError, match=f"{re.escape(name)}|the model has it, nothing fills it"):
            check(esmfold.key_map(without, config()), without, ours)
    with pytest.raises(KeyMapError, match=r"trunk\.extra: in no row"):
        check(rows, tensors | {"trunk.extra": torch.empty(1)}, ours)


def test_configuration_both_ways() -> None:
    """A row and a folder of the same checkpoint must build the same model."""
    told = json.loads(esmfold.hub_files(config())["config.json"])
    assert esmfold.hub_config(told, header("esmfold")) == config()


def test_parameters_follow_from_the_configuration() -> None:
    """By the formulas of the fact sheets of its parts, by our network, and by adding up what was published."""
    not_trained = re.compile(r".*(inv_freq|frequencies|contact_head\..*|position_\w+(\.weight)?)|af2_to_esm")
    for tensors in (state(), header("esmfold")):
        assert ROW.parameters == sum(x.numel() for name, x in tensors.items() if not not_trained.fullmatch(name))
    c, wide = 2560, 10240
    stem = 33 * c + 36 * (4 * (c * c + c) + 2 * c * wide + wide + c + 4 * c) + 2 * c
    blocks = 48 * 14_293_888
    assert stem + blocks == ROW.parameters - sum(
        x.numel() for name, x in header("esmfold", "original").items()
        if not name.startswith(("trunk.blocks.", "positional_")) and name != "af2_to_esm"
        and not re.search("default_frames|group_idx|atom_mask|lit_positions", name)
    )  # fmt: skip


def test_what_is_kept_in_half_precision() -> None:
    """In float32 the layers of the language model, 5.7 GB as stored instead of 11.3, and nothing else."""
    kept = {
        name: kept_in(FAMILY, name, torch.float16 if name.startswith("stem.") else torch.float32, torch.float32)
        for name in state()
    }
    assert {name for name, dtype in kept.items() if dtype == torch.float16} == {
        name for name in kept if name.startswith("stem.blocks.")
    }
    assert {kept_in(FAMILY, name, torch.float16, torch.float64) for name in kept} == {torch.float64, torch.float32}
    in_bfloat16 = {name: kept_in(FAMILY, name, torch.float32, torch.bfloat16) for name in kept}
    precise = ("structure.", "to_structure", "confidence_head.", "error_head.", "stem.frequencies")
    precise += ("stem_transition.", "recycle_", "relative_positions.")  # what is summed in float32
    assert {name for name, dtype in in_bfloat16.items() if dtype == torch.float32} == {
        name for name in kept if name.startswith(precise)
    }


def test_what_the_rows_say() -> None:
    """Names in use, the addresses of the publisher, and that the language model comes along."""
    early = find("esmfold-v0")
    for name in ("esmfold_v1", "esmfold_3B_v1", "Facebook/ESMFold_v1"):
        assert find(name) is ROW
    assert find("esmfold_3B_v0") is early and early.hub is None and early.preferred == "original"
    assert early.config == ROW.config and early.parameters == ROW.parameters and not early.files
    for row, name in ((ROW, "esmfold_3B_v1"), (early, "esmfold_3B_v0")):
        assert [file.name for file in row.originals] == [
            f"{name}.pt",
            "esm2_t36_3B_UR50D.pt",
            "esm2_t36_3B_UR50D-contact-regression.pt",
        ]
        assert row.originals[0].url == f"https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"
        assert row.originals[1:] == find("esm2-3b").originals
        assert row.licence == "MIT" and "doi:10.1126/science.ade2574" in row.citation
    assert [file.size for file in ROW.files] == [8_442_062_570] and early.originals[0].size is None
