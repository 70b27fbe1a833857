"""The key map of ProteinBERT: every published form in and out, tensor for tensor, and what is refused.

Shapes cannot tell a narrow convolution from a wide one, nor the norms and the two dense layers of a track from each
other. What tells them are values: here against the names that the original printed, elsewhere by the numbers that it
computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import equal
from torch import Tensor

import plm_weights.bert
import plm_weights.esm
import plm_weights.progen2
import plm_weights.t5
from plm.models.proteinbert import Config, ProteinBERT
from plm_weights import CheckpointError, KeyMapError, TensorSource, export_weights, import_weights, open_tensors
from plm_weights.proteinbert import (
    from_settings,
    from_shapes,
    key_map,
    published_config,
    published_rows,
    read_config,
    recognise,
    weights,
)

GOLDEN = Path(__file__).parent / "golden" / "proteinbert"
INDEX = GOLDEN / "saved_model" / "variables" / "variables.index"
PLAIN = {"vocabulary": 26, "kernel": 9, "dilation": 5, "norm_eps": 1e-3}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny_2blocks": PLAIN
    | {"annotations": 13, "layers": 2, "channels": 12, "global_channels": 20, "heads": 2, "key_size": 6},
    "padding_3blocks": PLAIN
    | {"annotations": 37, "layers": 3, "channels": 16, "global_channels": 24, "heads": 4, "key_size": 8},
    "finetune_heads": PLAIN
    | {"annotations": 9, "layers": 2, "channels": 8, "global_channels": 12, "heads": 2, "key_size": 4},
}
# The original's names of layers and weights, and how a Keras weight lies in torch.
LAYERS = {
    "dense-global-input": "annotations_in",
    "embedding-seq-input": "embed",
    "global-to-seq-dense-block": "to_local",
    "narrow-conv-block": "narrow",
    "wide-conv-block": "wide",
    "seq-merge1-norm-block": "local_norm1",
    "seq-dense-block": "local_dense",
    "seq-merge2-norm-block": "local_norm2",
    "global-dense1-block": "global_dense1",
    "global-attention-block": "attention",
    "global-merge1-norm-block": "global_norm1",
    "global-dense2-block": "global_dense2",
    "global-merge2-norm-block": "global_norm2",
    "output-seq": "lm_head",
    "output-annotations": "annotation_head",
}
PARTS = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
PARTS |= {"Wq": "query.weight", "Wk": "key.weight", "Wv": "value.weight"}


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stored(name: str) -> TensorSource:
    return open_tensors(GOLDEN / name / "weights.pkl")


def saved() -> TensorSource:
    return open_tensors(INDEX)


class Printed(NamedTuple):
    """A weight of the original as it named it."""

    place: str
    layer: str
    weight: str
    shape: list[int]


def printed(name: str) -> list[Printed]:
    """The weights of the original in its order."""
    found = json.loads((GOLDEN / name / "names.json").read_text())
    return [Printed(each["index"], *each["keras_name"].removesuffix(":0").split("/"), each["shape"]) for each in found]


def wanted(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of our network."""
    with torch.device("meta"):
        return ProteinBERT(Config(**config)).state_dict()


def imported(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return import_weights(key_map(source, config), source, wanted(config))


def target_of(layer: str, weight: str) -> str:
    """Our name of one of the original's weights."""
    stem = layer.rstrip("0123456789") if "-block" in layer else layer
    block = f"blocks.{int(layer.removeprefix(stem)) - 1}." if stem != layer else ""
    return f"{block}{LAYERS[stem]}.{PARTS[weight]}"


def in_torch(tensor: Tensor, weight: str) -> Tensor:
    """Keras multiplies from the right and stores convolutions as (kernel, in, out), attention as (heads, in, out)."""
    if weight == "kernel":
        return tensor.T if tensor.dim() == 2 else tensor.permute(2, 1, 0)
    return tensor.permute(0, 2, 1).flatten(0, 1) if weight.startswith("W") else tensor


def test_both_ways(name: str) -> None:
    source, config = stored(name), CONFIGS[name]
    exported = export_weights(published_rows(config), imported(source, config))
    assert list(exported) == list(source) and equal(exported, source)
    assert equal(imported(exported, config), imported(source, config))


def test_a_saved_model_both_ways() -> None:
    source, config = saved(), CONFIGS["tiny_2blocks"]
    state = imported(source, config)
    assert equal(state, imported(stored("tiny_2blocks"), config))
    assert equal(export_weights(published_rows(config, "keras"), state), source)


def test_the_order_is_that_of_the_original(name: str) -> None:
    """By the names that it printed: place, layer, kind and our name of every weight."""
    ours, layers = weights(CONFIGS[name]["layers"]), list(dict.fromkeys(each.layer for each in printed(name)))
    assert [(each.pickled, each.layer, each.kind, each.target) for each in ours] == [
        (place, layers.index(layer), weight, target_of(layer, weight)) for place, layer, weight, _ in printed(name)
    ]
    meta = stored(name).meta
    assert {each.pickled: [*meta[each.pickled].shape] for each in ours} == {p.place: p.shape for p in printed(name)}


def test_every_imported_tensor_is_the_right_one(name: str) -> None:
    """Values, turned here by hand: two swapped rows of equal shape would pass a round trip."""
    source, state = stored(name), imported(stored(name), CONFIGS[name])
    for place, layer, weight, _ in printed(name):
        tensor = state.pop(target_of(layer, weight))
        assert torch.equal(tensor, in_torch(source[place], weight)), (layer, weight)
    assert not state


@pytest.mark.parametrize(("first", "second"), [("005", "007"), ("009", "013"), ("015", "022"), ("009", "010")])
def test_swapped_weights_of_equal_shape_are_not_seen_by_shapes(first: str, second: str) -> None:
    """Narrow and wide convolution, gains of two norms, both dense layers, a gain and its shift: why values are
    compared above."""
    source, config = dict(stored("tiny_2blocks")), CONFIGS["tiny_2blocks"]
    right = imported(source, config)
    source[first], source[second] = source[second], source[first]
    wrong = imported(source, config)
    assert sum(not torch.equal(wrong[name], right[name]) for name in right) == 2


@pytest.mark.parametrize("lost", ["000", "002", "017", "028", "052"])
def test_nothing_may_be_missing(lost: str) -> None:
    """By the number of weights, and where that is that of another model, by its place."""
    source, config = dict(stored("tiny_2blocks")), CONFIGS["tiny_2blocks"]
    del source[lost]
    with pytest.raises(KeyMapError, match=rf"{lost}: not there|{lost}: nothing has such a name"):
        imported(source, config)
    with pytest.raises(CheckpointError, match=r"it holds 52 weights; .* 7 \+ 23 l, the published one 145"):
        from_shapes(source, "pickle")


def test_a_weight_more_is_found() -> None:
    for source, stray in (
        (dict(stored("tiny_2blocks")), "053"),
        (dict(saved()), "layer_with_weights-26/kernel/.ATTRIBUTES/VARIABLE_VALUE"),
    ):
        with pytest.raises(KeyMapError, match=f"{stray}: in no row of the key map"):
            imported(source | {stray: torch.zeros(3)}, CONFIGS["tiny_2blocks"])


def test_a_transposed_matrix_is_refused(name: str) -> None:
    source = dict(stored(name))
    source["003"] = source["003"].T.contiguous()
    with pytest.raises(KeyMapError, match=r"blocks\.0\.to_local\.weight: the model has"):
        imported(source, CONFIGS[name])


def test_what_keras_keeps_of_a_training_is_dropped() -> None:
    """The names that Keras 2.15 gave the variables of a model after ``fit``."""
    kept = [
        *("save_counter", "optimizer/_iterations", "optimizer/_learning_rate", "optimizer/_variables/17"),
        *("keras_api/metrics/0/count", "keras_api/metrics/2/total"),
    ]
    source = dict(saved()) | {f"{each}/.ATTRIBUTES/VARIABLE_VALUE": torch.zeros(()) for each in kept}
    assert equal(imported(source, CONFIGS["tiny_2blocks"]), imported(saved(), CONFIGS["tiny_2blocks"]))
    assert from_shapes(source, "keras") == from_shapes(saved().meta, "keras")


def test_layouts_are_told_apart_by_names(name: str) -> None:
    others = (plm_weights.esm, plm_weights.bert, plm_weights.t5, plm_weights.progen2)
    forms = ((stored(name), "pickle"), (saved(), "keras"), (wanted(CONFIGS[name]), "plm"))
    for names, layout in forms:
        assert recognise(names) == layout
        assert [other.recognise(names) for other in others] == [None] * len(others)
    for foreign in ([], ["0", "1"], ["000", "weight"], ["layer_with_weights-9/kernel/.ATTRIBUTES/VARIABLE_VALUE"]):
        assert recognise(foreign) is None


# ------------------------------------------------------------------------------------------------ configuration


def source_in(folder: Path, config: Mapping[str, object] | str | None) -> TensorSource:
    """The tiny model with this config.json beside it, or none."""
    (folder / "weights.pkl").write_bytes((GOLDEN / "tiny_2blocks" / "weights.pkl").read_bytes())
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return open_tensors(folder / "weights.pkl")


def settings() -> dict[str, Any]:
    found = json.loads((GOLDEN / "tiny_2blocks" / "config.json").read_text())
    assert isinstance(found, dict)
    return found


def test_the_configuration_of_the_goldens(name: str) -> None:
    assert read_config("pickle", stored(name)) == CONFIGS[name]
    assert read_config("keras", saved()) == CONFIGS["tiny_2blocks"]


def test_what_no_shape_tells(tmp_path: Path) -> None:
    """Without a file, the published dilation and eps; with one, what it says, if that is the dilation at least."""
    shapes = CONFIGS["tiny_2blocks"]
    assert read_config("pickle", source_in(tmp_path, None)) == shapes
    told = {"model_type": "proteinbert", "wide_conv_dilation": 3}
    assert read_config("pickle", source_in(tmp_path, told)) == shapes | {"dilation": 3}
    told |= {"layer_norm_eps": 1e-5}
    assert read_config("pickle", source_in(tmp_path, told)) == shapes | {"dilation": 3, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": None}, "has no model_type; wanted is a model_type of 'proteinbert' and the wide_conv_dilation"),
        ({"wide_conv_dilation": None}, r"has no wide_conv_dilation; .*Where no config\.json lies there, 5 is taken"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"gelu": "tanh"}, "gelu is 'tanh'"),
        ({"pad_token_id": 0}, "pad_token_id is 0"),
        ({"n_annotations": 8943}, "n_annotations is 8943 in config.json, but the weights have 13"),
        ({"n_blocks": 6}, "n_blocks is 6 in config.json, but the weights have 2"),
        ({"value_dim": 12}, "value_dim is 12 in config.json, but the weights have 10"),
        ({"conv_kernel_size": "9"}, "conv_kernel_size is '9'"),
        ({"wide_conv_dilation": 0}, "wide_conv_dilation is 0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_config("pickle", source_in(tmp_path, settings() | changes))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"config\.json is not JSON"),
        ("[" * 100_000, r"config\.json is not JSON"),
        ("[]", "must hold one JSON object"),
        ("{}", "has no model_type and no wide_conv_dilation"),
    ],
)
def test_a_configuration_that_is_none(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_config("pickle", source_in(tmp_path, text))


def test_a_configuration_that_is_a_folder(tmp_path: Path) -> None:
    source = source_in(tmp_path, None)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Is a directory"):
        read_config("pickle", source)


def test_the_number_in_the_pickle_must_be_that_of_the_weights(tmp_path: Path) -> None:
    source = source_in(tmp_path, None)
    path = tmp_path / "weights.pkl"
    path.write_bytes(path.read_bytes().replace(b"\x80\x03K\x0d]", b"\x80\x03K\x0e]"))
    assert read_config("pickle", source)["annotations"] == 13
    with pytest.raises(
        CheckpointError, match="first item says that it is for 14 annotations, but its weights are for 13"
    ):
        read_config("pickle", open_tensors(path))


@pytest.mark.parametrize(
    ("place", "shape", "says"),
    [
        ("000", (13,), "000, which should be annotations_in.weight with 2 axes, has shape"),
        ("005", (12, 12), "005, which should be blocks.0.narrow.weight with 3 axes, has shape"),
        ("017", (20, 12), "017, which should be blocks.0.attention.query.weight with 3 axes, has shape"),
    ],
)
def test_shapes_of_another_model(place: str, shape: tuple[int, ...], says: str) -> None:
    meta = stored("tiny_2blocks").meta | {place: torch.empty(shape, device="meta")}
    with pytest.raises(CheckpointError, match=says):
        from_shapes(meta, "pickle")


def test_config_json_both_ways(name: str) -> None:
    for config in (CONFIGS[name], CONFIGS[name] | {"dilation": 3, "norm_eps": 1e-6}):
        (text,) = published_config(config).values()
        told = json.loads(text)
        assert {**config, **from_settings(told, config)} == config
        official = json.loads((GOLDEN / name / "config.json").read_text())
        official.pop("upstream_create_model_kwargs")
        assert told.keys() >= official.keys()
        if config is CONFIGS[name]:
            assert told == told | official
