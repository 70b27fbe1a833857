"""Every row of the T5 and BERT families through its key map: header to network on ``meta``, and back."""

import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import plm.models.bert
import plm.models.t5
import plm_weights.bert
import plm_weights.t5
from plm_weights.errors import KeyMapError
from plm_weights.keymap import Drop, KeyMap, Tied, check, export_weights
from plm_weights.registry import CHECKPOINTS, Checkpoint, header

MAPS: dict[str, ModuleType] = {"t5": plm_weights.t5, "bert": plm_weights.bert}
ROWS = [row for row in CHECKPOINTS if row.family in MAPS]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def config(row: Checkpoint) -> dict[str, Any]:
    assert row.config is not None
    return dict(row.config)


def state(row: Checkpoint) -> dict[str, Tensor]:
    """Our network, without memory."""
    with torch.device("meta"):
        if row.family == "t5":
            return plm.models.t5.T5(plm.models.t5.Config(**config(row))).state_dict()
        return plm.models.bert.BERT(plm.models.bert.Config(**config(row))).state_dict()


def table(row: Checkpoint, published: Mapping[str, Tensor]) -> KeyMap:
    rows: KeyMap = MAPS[row.family].key_map(published, config(row))
    return rows


@every_row
def test_every_header_loads_into_the_model_and_comes_back(row: Checkpoint) -> None:
    """Each published tensor is read once, each of ours filled once; back, only what is dropped or a copy is missing."""
    published, ours = header(row.name), state(row)
    assert {family: maps.recognise(published) for family, maps in MAPS.items()} == {
        **dict.fromkeys(MAPS),
        row.family: "hub",
    }
    rows = table(row, published)
    check(rows, published, ours)
    missing = {each.source for each in rows if isinstance(each, Drop) or (isinstance(each, Tied) and each.optional)}
    exported = export_weights(rows, ours)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in published.items() if name not in missing
    }


@every_row
def test_one_tensor_more_or_less_is_found(row: Checkpoint) -> None:
    published, ours = header(row.name), state(row)
    name = next(name for name in published if "layer.0" in name and name.endswith("weight"))
    for wrong in ({name: None}, {f"{name}.again": published[name]}):
        changed = {key: tensor for key, tensor in (published | wrong).items() if tensor is not None}
        with pytest.raises(KeyMapError, match=name.replace(".", r"\.")):
            check(table(row, changed), changed, ours)


@every_row
def test_parameters_are_those_of_the_network(row: Checkpoint) -> None:
    assert row.parameters == sum(tensor.numel() for tensor in state(row).values())


@every_row
def test_configuration_is_what_the_published_config_file_gives(row: Checkpoint) -> None:
    """A row and a hub folder of the same checkpoint must build the same model."""
    maps = MAPS[row.family]
    settings = json.loads(maps.hub_files(config(row))["config.json"])
    assert maps.hub_config(settings, header(row.name)) == config(row)
