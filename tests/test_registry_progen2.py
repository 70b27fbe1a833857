"""Every row of ProGen2 through its key map: both published forms to a network on ``meta``, and back."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.models.progen2 import Config, ProGen2
from plm_weights.errors import KeyMapError
from plm_weights.keymap import Drop, check, export_weights
from plm_weights.progen2 import hub_config, hub_files, key_map, original_masks, recognise
from plm_weights.registry import CHECKPOINTS, Checkpoint, Form, find, header

ROWS = [row for row in CHECKPOINTS if row.family == "progen2"]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
both_forms = pytest.mark.parametrize("form", ["hub", "original"])
# As the authors' files have them: tensors, and bytes of an element.
STORED = {
    "progen2-small": (125, 4),
    "progen2-medium": (275, 4),
    "progen2-oas": (275, 2),
    "progen2-base": (275, 2),
    "progen2-large": (325, 2),
    "progen2-bfd90": (325, 2),
    "progen2-xlarge": (325, 2),
}


def config(row: Checkpoint) -> dict[str, Any]:
    assert row.config is not None
    return dict(row.config)


def state(row: Checkpoint) -> dict[str, Tensor]:
    """Our network, without memory."""
    with torch.device("meta"):
        return ProGen2(Config(**config(row))).state_dict()


def masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith((".attn.bias", ".attn.masked_bias"))}


@every_row
@both_forms
def test_every_header_loads_into_the_model_and_comes_back(row: Checkpoint, form: Form) -> None:
    """Each published tensor is read once, each of ours filled once; back, only the masks are missing."""
    published, ours = header(row.name, form), state(row)
    assert recognise(published) == "hub" and recognise(ours) == "plm"
    rows = key_map(published)
    check(rows, published, ours)
    assert [each.source.rpartition(".")[2] for each in rows if isinstance(each, Drop)] == ["bias", "masked_bias"]
    exported = export_weights(rows, ours)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in published.items() if name not in masks(published)
    }


@every_row
def test_masks_are_those_of_the_published_files(row: Checkpoint) -> None:
    made, published = original_masks(config(row)), masks(header(row.name, "original"))
    assert {name: tensor.shape for name, tensor in made.items()} == {name: x.shape for name, x in published.items()}
    assert len({tensor.data_ptr() for tensor in made.values()}) == 2, "one memory for all layers"
    causal = made["transformer.h.0.attn.bias"]
    assert causal.dtype == torch.bool and all(causal[0, 0, i].sum() == i + 1 for i in range(0, causal.shape[-1], 97))
    assert not masks(header(row.name))


@every_row
@both_forms
def test_one_tensor_more_or_less_is_found(row: Checkpoint, form: Form) -> None:
    """A head that is missing, too, with which the original would go on at random."""
    published, ours = header(row.name, form), state(row)
    for name in ("transformer.h.0.attn.qkv_proj.weight", "transformer.h.1.mlp.fc_in.bias", "lm_head.weight"):
        for wrong in ({name: None}, {f"{name}.again": published[name]}):
            changed = {key: tensor for key, tensor in (published | wrong).items() if tensor is not None}
            with pytest.raises(KeyMapError, match=name.replace(".", r"\.")):
                check(key_map(changed), changed, ours)


@every_row
def test_parameters_follow_from_the_configuration(row: Checkpoint) -> None:
    """By the formula, by our network, and by adding up what was published."""
    sizes = config(row)
    c, layers, v = sizes["channels"], sizes["layers"], sizes["vocabulary"]
    block = 2 * c + 4 * c * c + 8 * c * c + 5 * c
    assert row.parameters == v * c + layers * block + 2 * c + v * c + v
    assert row.parameters == sum(tensor.numel() for tensor in state(row).values())
    assert row.parameters == sum(tensor.numel() for tensor in header(row.name).values())


@every_row
def test_headers_fit_the_published_files(row: Checkpoint) -> None:
    """A file holds its weights, one mask for all layers, and less than 350 bytes per tensor besides."""
    count, itemsize = STORED[row.name]
    published = header(row.name, "original")
    weights = {name: tensor for name, tensor in published.items() if name not in masks(published)}
    assert len(published) == count and {tensor.element_size() for tensor in weights.values()} == {itemsize}
    (file,) = (file for file in row.originals if file.name == "pytorch_model.bin")
    assert file.size is not None and row.parameters is not None
    mask = config(row)["max_length"] ** 2
    assert 0 < file.size - itemsize * row.parameters - mask < 350 * count


def test_the_elements_of_the_smallest() -> None:
    """Somebody counted those of the authors' file: 163,731,500 with all masks."""
    assert sum(tensor.numel() for tensor in header("progen2-small", "original").values()) == 163_731_500


@pytest.mark.parametrize(("name", "megabytes"), [("progen2-small", 605), ("progen2-base", 3060)])
def test_headers_of_the_ports_fit_the_sizes_on_the_hub(name: str, megabytes: int) -> None:
    """Which are rounded there; an older revision of the small one is 12 masks larger."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in header(name).values())
    assert abs(size / 1e6 - megabytes) < 1
    if name == "progen2-small":
        assert round((size + 12 * 1024 * 1024) / 1e6) == 617


@every_row
def test_configuration_is_what_the_published_config_file_gives(row: Checkpoint) -> None:
    """A row and a folder of the same checkpoint must build the same model, with the masks and without."""
    settings = json.loads(hub_files(config(row))["config.json"])
    forms: tuple[Form, ...] = ("hub", "original")
    for form in forms:
        assert hub_config(settings, header(row.name, form)) == config(row)


def test_what_tells_the_rows_apart() -> None:
    assert [row.name for row in ROWS if config(row)["max_length"] != 1024] == ["progen2-base"]
    assert [row.name for row in ROWS if config(row)["outputs"] == 51200] == ["progen2-large", "progen2-bfd90"]
    assert {row.licence for row in ROWS} == {"BSD-3-Clause"}
    assert all("Cell Systems 14" in row.citation and row.note for row in ROWS)
    large, bfd90 = find("progen2-large"), find("progen2-bfd90")
    assert replace(large, header=None).config == bfd90.config and large.originals != bfd90.originals


def test_archives_have_the_addresses_of_their_publisher() -> None:
    addresses = [row.archive for row in ROWS]
    assert addresses[5] == "https://storage.googleapis.com/sfr-progen-research/checkpoints/progen2-BFD90.tar.gz"
    assert len(set(addresses)) == len({row.hub for row in ROWS}) == 7
    assert {row.preferred for row in ROWS} == {"original"}
