"""ProteinBERT: key maps and configuration of the published pickle and of Keras checkpoints.

Source: nadavbra/protein_bert@83198c9. Neither form has names of its own: the pickle is a list in the order of Keras'
``get_weights()``, here named "000", "001", ...; a SavedModel numbers its layers. The order is that of the depth in the
graph, so what reads the annotations comes before the embedding of the letters.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.keymap import Drop, KeyMap, Row
from plm_weights.read import TensorSource
from plm_weights.settings import read_object, read_size, read_value, require

DILATION, NORM_EPS = 5, 1e-3  # what the published checkpoint was made with; no shape tells them
VOCABULARY = 26
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
OUTSIDE_BLOCKS, PER_BLOCK = 7, 23  # weights

Layout = Literal["pickle", "keras", "plm"]
OWN_MARK = "annotations_in.weight"

DENSE = (("kernel", "weight", "i o -> o i"), ("bias", "bias", ""))
EMBEDDING = (("embeddings", "weight", ""),)
CONVOLUTION = (("kernel", "weight", "k i o -> o i k"), ("bias", "bias", ""))
NORM = (("gamma", "weight", ""), ("beta", "bias", ""))
ATTENTION = tuple((f"W{name[0]}", f"{name}.weight", "h i d -> (h d) i") for name in ("query", "key", "value"))
Kinds = tuple[tuple[str, str, str], ...]  # (its name in Keras, its name in the module, how it is turned)

FIRST: tuple[tuple[str, Kinds], ...] = (("annotations_in", DENSE), ("embed", EMBEDDING))
BLOCK: tuple[tuple[str, Kinds], ...] = (
    ("to_local", DENSE),
    ("narrow", CONVOLUTION),
    ("wide", CONVOLUTION),
    ("local_norm1", NORM),
    ("local_dense", DENSE),
    ("local_norm2", NORM),
    ("global_dense1", DENSE),
    ("attention", ATTENTION),
    ("global_norm1", NORM),
    ("global_dense2", DENSE),
    ("global_norm2", NORM),
)
LAST: tuple[tuple[str, Kinds], ...] = (("lm_head", DENSE), ("annotation_head", DENSE))


class Weight(NamedTuple):
    """One weight: its place in the list, that of its layer among the layers with weights, and what becomes of it."""

    place: int
    layer: int
    kind: str
    target: str
    view: str

    @property
    def pickled(self) -> str:
        return f"{self.place:03d}"

    @property
    def keras(self) -> str:
        return f"layer_with_weights-{self.layer}/{self.kind}{SUFFIX}"


def weights(blocks: int) -> list[Weight]:
    """All weights in Keras' order."""
    layers = [*FIRST, *((f"blocks.{i}.{name}", kinds) for i in range(blocks) for name, kinds in BLOCK), *LAST]
    rows = [
        (layer, kind, f"{name}.{ours}", view)
        for layer, (name, kinds) in enumerate(layers)
        for kind, ours, view in kinds
    ]
    return [Weight(place, *row) for place, row in enumerate(rows)]


# What a model that was trained in Keras 2.15 is saved with.
KEPT_BY_KERAS = (
    Drop(f"save_counter{SUFFIX}", "how often Keras saved it"),
    *(Drop(f"keras_api/metrics/{{i}}/{name}{SUFFIX}", "a metric of the training") for name in ("count", "total")),
    *(Drop(f"optimizer/{name}{SUFFIX}", "the optimizer's") for name in ("_iterations", "_learning_rate")),
    Drop(f"optimizer/_variables/{{i}}{SUFFIX}", "the optimizer's"),
)

NAMES: Mapping[str, Callable[[Weight], str]] = {
    "pickle": lambda weight: weight.pickled,
    "keras": lambda weight: weight.keras,
}


def recognise(names: Iterable[str]) -> Layout | None:
    """Which layout of ProteinBERT the names belong to, a published one or this library's; None if another family's."""
    names = set(names)
    if OWN_MARK in names:
        return "plm"
    if names and all(name.isdigit() and len(name) >= 3 for name in names):
        return "pickle"
    attention = next(weight for weight in weights(1) if weight.kind == "Wq")
    return "keras" if attention.keras in names else None


def key_map(names: Iterable[str], config: Mapping[str, Any]) -> KeyMap:
    """The table for a checkpoint with these names. ``config`` has the keywords of our ProteinBERT config."""
    names = set(names)
    layout = recognise(names)
    if layout == "plm":
        return tuple(Row(name, name) for name in names)
    return published_rows(config, "keras" if layout == "keras" else "pickle")


def published_rows(config: Mapping[str, Any], layout: Literal["pickle", "keras"] = "pickle") -> KeyMap:
    """The published list, or a Keras checkpoint. Rows are written out, as the places of a block are no names."""
    heads, name = {"h": config["heads"]}, NAMES[layout]
    rows: KeyMap = tuple(
        Row(name(weight), weight.target, weight.view, heads if "h" in weight.view else {})
        for weight in weights(config["layers"])
    )
    return (*rows, *KEPT_BY_KERAS) if layout == "keras" else rows


def read_config(layout: str, tensors: TensorSource) -> dict[str, Any]:
    """The keywords of our ProteinBERT config from the shapes, and from a ``config.json`` if one lies in the folder.

    That must name the dilation of the wide convolution, which no shape tells; without a file it is the published one.

    Raises: CheckpointError if the number of weights or a shape is that of no ProteinBERT, or if that file or the number
    in the pickle contradicts them.
    """
    found = from_shapes(tensors.meta, "keras" if layout == "keras" else "pickle")
    if (told := tensors.extras.get("n_annotations", found["annotations"])) != found["annotations"]:
        has = found["annotations"]
        raise CheckpointError(f"its first item says that it is for {told} annotations, but its weights are for {has}")
    folder = tensors.files[0].parent
    if layout == "keras" and folder.name == "variables":  # of a SavedModel
        folder = folder.parent
    file = folder / "config.json"
    settings = read_object(file) if file.exists() else {}
    if not file.exists() or (layout == "keras" and settings.get("model_type") != "proteinbert"):  # a hub's own, perhaps
        return {**found, "dilation": DILATION, "norm_eps": NORM_EPS}
    return {**found, **from_settings(settings, found)}


def from_shapes(meta: Mapping[str, Tensor], layout: Literal["pickle", "keras"]) -> dict[str, Any]:
    """The sizes that shapes tell."""
    count = sum(name.startswith("layer_with_weights-") for name in meta) if layout == "keras" else len(meta)
    blocks, rest = divmod(count - OUTSIDE_BLOCKS, PER_BLOCK)
    if rest or blocks < 1:
        raise CheckpointError(
            f"it holds {count} weights; a ProteinBERT of l blocks has {OUTSIDE_BLOCKS} + {PER_BLOCK} l, the published "
            "one 145. A model that was fine-tuned has others."
        )
    shape: dict[str, Sequence[int]] = {}
    axes = {"annotations_in.weight": 2, "embed.weight": 2, "narrow.weight": 3, "query.weight": 3}
    for weight in weights(1):
        short = weight.target.removeprefix("blocks.0.").removeprefix("attention.")
        if short in axes:
            name = NAMES[layout](weight)
            if name not in meta or meta[name].dim() != axes[short]:
                told = "is missing" if name not in meta else f"has shape {[*meta[name].shape]}"
                raise CheckpointError(f"{name}, which should be {weight.target} with {axes[short]} axes, {told}")
            shape[short] = meta[name].shape
    annotations, global_channels = shape["annotations_in.weight"]
    vocabulary, channels = shape["embed.weight"]
    heads, _, key_size = shape["query.weight"]
    return {
        "vocabulary": vocabulary,
        "annotations": annotations,
        "layers": blocks,
        "channels": channels,
        "global_channels": global_channels,
        "heads": heads,
        "key_size": key_size,
        "kernel": shape["narrow.weight"][0],
    }


SIZES = {
    "vocab_size": "vocabulary",
    "n_annotations": "annotations",
    "n_blocks": "layers",
    "local_dim": "channels",
    "global_dim": "global_channels",
    "n_heads": "heads",
    "key_dim": "key_size",
    "conv_kernel_size": "kernel",
}


def from_settings(settings: Mapping[str, object], found: Mapping[str, int]) -> dict[str, Any]:
    """What only the file tells, once it is known to agree with the shapes. Raises: CheckpointError."""
    if lacking := [key for key in ("model_type", "wide_conv_dilation") if settings.get(key) is None]:
        raise CheckpointError(
            f"config.json beside the weights has no {' and no '.join(lacking)}; wanted is a model_type of "
            f"'proteinbert' and the wide_conv_dilation, {DILATION} of the published model, which no shape tells. "
            f"Where no config.json lies there, {DILATION} is taken"
        )
    require(settings, "model_type", "proteinbert")
    require(settings, "activation", "gelu", None)
    require(settings, "gelu", "exact (erf)", None)
    require(settings, "pad_token_id", VOCABULARY - 1, None)
    values = {
        "value_dim": found["global_channels"] // found["heads"],
        **{key: found[ours] for key, ours in SIZES.items()},
    }
    for key, size in values.items():
        if (told := read_size(settings, key, size)) != size:
            raise CheckpointError(f"{key} is {told} in config.json, but the weights have {size}")
    return {
        "dilation": read_size(settings, "wide_conv_dilation"),
        "norm_eps": read_value(settings, "layer_norm_eps", float, NORM_EPS),
    }


def published_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The way back: a ``config.json`` beside a pickle, which tells what no shape does."""
    settings = {
        "model_type": "proteinbert",
        **{key: config[ours] for key, ours in SIZES.items()},
        "value_dim": config["global_channels"] // config["heads"],
        "wide_conv_dilation": config["dilation"],
        "activation": "gelu",
        "gelu": "exact (erf)",
        "layer_norm_eps": config["norm_eps"],
        "pad_token_id": VOCABULARY - 1,
    }
    return {"config.json": json.dumps(settings, indent=2) + "\n"}
