"""The row of ProteinBERT through its key map: both published forms to a network on ``meta``, and back."""

from __future__ import annotations

import json
import pickle
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.models.proteinbert import Config, ProteinBERT
from plm_weights import CheckpointError
from plm_weights.errors import KeyMapError
from plm_weights.keymap import check, export_weights
from plm_weights.proteinbert import from_settings, from_shapes, key_map, published_config, published_rows, recognise
from plm_weights.registry import Form, find, header

ROW = find("proteinbert")
LAYOUTS: dict[Form, Any] = {"hub": "keras", "original": "pickle"}
both_forms = pytest.mark.parametrize("form", LAYOUTS)


def config() -> dict[str, Any]:
    assert ROW.config is not None
    return dict(ROW.config)


def state() -> dict[str, Tensor]:
    """Our network, without memory."""
    with torch.device("meta"):
        return ProteinBERT(Config(**config())).state_dict()


@both_forms
def test_every_header_loads_into_the_model_and_comes_back(form: Form) -> None:
    """Each of the 145 published tensors is read once, each of ours filled once, and nothing is dropped."""
    published, ours = header("proteinbert", form), state()
    assert len(published) == len(ours) == 145
    assert recognise(published) == LAYOUTS[form] and recognise(ours) == "plm"
    rows = key_map(published, config())
    check(rows, published, ours)
    exported = export_weights(published_rows(config(), LAYOUTS[form]), ours)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in published.items()
    }


@both_forms
def test_one_tensor_more_or_less_is_found(form: Form) -> None:
    published, ours = header("proteinbert", form), state()
    for name in list(published)[::9]:
        without = {key: tensor for key, tensor in published.items() if key != name}
        with pytest.raises(KeyMapError, match=rf"{name}: not there|{name}: nothing has such a name"):
            check(key_map(without, config()), without, ours)
    with pytest.raises(KeyMapError, match="145: in no row"):
        check(key_map(published, config()), published | {"145": published[name]}, ours)


@both_forms
def test_configuration_is_what_the_shapes_and_our_file_give(form: Form) -> None:
    """A row and a folder of the same checkpoint must build the same model."""
    found = from_shapes(header("proteinbert", form), LAYOUTS[form])
    told = json.loads(published_config(config())["config.json"])
    assert found | from_settings(told, found) == config()
    with pytest.raises(CheckpointError, match="no model_type and no wide_conv_dilation"):
        from_settings({}, found)  # a file that does not say it is none; without one it is as published


def test_parameters_follow_from_the_configuration() -> None:
    """By the formula, by our network, and by adding up what was published."""
    sizes = config()
    c, g, a, v, h, k = (
        sizes[key] for key in ("channels", "global_channels", "annotations", "vocabulary", "heads", "key_size")
    )
    local = 2 * (sizes["kernel"] * c * c + c) + (g * c + c) + (c * c + c) + 4 * c
    both = 2 * (g * g + g) + h * k * (g + c) + g * c + 4 * g
    assert ROW.parameters == (a * g + g) + v * c + sizes["layers"] * (local + both) + (c * v + v) + (g * a + a)
    assert ROW.parameters == sum(tensor.numel() for tensor in state().values())
    assert ROW.parameters == sum(tensor.numel() for tensor in header("proteinbert").values())


class Counter:
    """A file that only counts."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes


def test_the_header_gives_the_published_size_to_the_byte() -> None:
    """As its authors' program wrote it: weights, then LAMB's step count and two moments of each weight."""
    shapes = [tuple(tensor.shape) for tensor in header("proteinbert", "original").values()]
    weights, first, second = ([np.zeros(shape, np.float32) for shape in shapes] for _ in range(3))
    file = Counter()
    pickle.dump((config()["annotations"], weights, [np.int64(1), *first, *second]), file, protocol=3)  # type: ignore[arg-type]
    # numpy 2 has a name for its module that is a byte longer, and two functions of it are named.
    longer = 2 * (b"numpy._core" in pickle.dumps(first[0], 3))
    assert [file.size - longer] == [each.size for each in ROW.originals] == [191_800_918]


def test_what_the_row_says() -> None:
    """Names in use, the address of the publisher, and a second one of the same bytes."""
    for name in (
        *("ProteinBERT", "protein_bert", "grimsqueaker/proteinbert"),
        *("epoch_92400_sample_23500000", "full_go_epoch_92400_sample_23500000"),
    ):
        assert find(name) is ROW
    (file,) = ROW.originals
    assert file.name == "epoch_92400_sample_23500000.pkl" and re.fullmatch("cffb53e2.*2ebacbf", file.sha256[0])
    assert file.url == (
        "https://media.githubusercontent.com/media/nadavbra/proteinbert_data_files/master/epoch_92400_sample_23500000.pkl"
    )
    assert [url.rpartition("/")[2] for url in file.mirrors] == [f"full_go_{file.name}"]
    assert ROW.preferred == "original" and ROW.licence.startswith("MIT (") and "btac020" in ROW.citation
    assert not ROW.files and ROW.revision is None and ROW.hub == "GrimSqueaker/proteinBERT"


def test_the_generator_gives_the_order_that_the_original_printed(golden: Path) -> None:
    """For the models of the goldens, whose lists the original wrote."""
    layers = runpy.run_path(str(golden / "make_headers_proteinbert.py"))["layers"]
    for case in ("tiny_2blocks", "padding_3blocks", "finetune_heads"):
        folder = golden / "proteinbert" / case
        told = json.loads((folder / "config.json").read_text())
        keys = (
            "n_blocks",
            "local_dim",
            "global_dim",
            "n_heads",
            "key_dim",
            "conv_kernel_size",
            "vocab_size",
            "n_annotations",
        )
        found = [
            (f"{layer}/{weight}", shape)
            for layer, shapes in layers(*map(told.get, keys))
            for weight, shape in shapes.items()
        ]
        printed = json.loads((folder / "names.json").read_text())
        assert found == [(each["keras_name"].removesuffix(":0"), each["shape"]) for each in printed]
