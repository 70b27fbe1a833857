"""T5 (Ankh, ProtT5, ProstT5, IgT5): key map and configuration of the hub's files.

The embedding is stored once (safetensors), or again under the names of both stacks and of a tied head (``.bin``).
Copies are compared on import and written again on export.

Source: transformers 5.23 models/t5, and the listings of the published files.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.keymap import Drop, KeyMap, Row, Tied, stacked
from plm_weights.settings import read_size, read_value, require

PREFIXES = ("", "transformer.", "module.", "base_model.model.")  # of classifiers, of parallel training, of adapters
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
ACTIVATIONS = ("relu", "gated-gelu", "gated-silu")


def recognise(names: Iterable[str]) -> str | None:
    """ "hub" or "plm" if the names are those of a T5, else None."""
    names = set(names)
    if "encoder.relative_bias.weight" in names:
        return "plm"
    return None if _prefix(names) is None else "hub"


def _prefix(names: Iterable[str]) -> str | None:
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return next((name.removesuffix(bias) for name in names if name.endswith(bias)), None)


def key_map(names: Iterable[str], config: Mapping[str, Any]) -> KeyMap:
    """The table for a checkpoint with these names."""
    names = set(names)
    if recognise(names) == "plm":
        return tuple(Row(name, name) for name in names)
    prefix = _prefix(names) or ""
    if prefix not in PREFIXES:
        raise CheckpointError(f"the names begin with {prefix!r}; known are {', '.join(map(repr, PREFIXES))}")
    stored = [name for name in EMBEDDINGS if prefix + name in names]
    return hub_rows(config, prefix=prefix, embeddings=tuple(stored) or EMBEDDINGS[:1])


def hub_rows(
    config: Mapping[str, Any], *, prefix: str = "", embeddings: tuple[str, ...] = EMBEDDINGS[:1], copies: bool = False
) -> KeyMap:
    """Files of transformers' T5 classes.

    ``embeddings`` are the names under which the one embedding is stored; the first is read, the others are compared
    with it. With ``copies`` a tied head is one of them, as in ``.bin`` files.
    """
    gated, decoder = config["activation"] != "relu", config["decoder_layers"] > 0
    first, *others = (prefix + name for name in embeddings)
    rows: KeyMap = (
        Row(first, "embed.weight"),
        *(Tied(name, first, "one embedding for both stacks") for name in others),
        *_stack(f"{prefix}encoder", "encoder", "i", gated, cross=False),
    )
    head = f"{prefix}lm_head.weight"
    if not decoder:
        return *rows, Drop(head, "an encoder alone has no use for it"), *_unused_decoder(prefix)
    rows = *rows, *_stack(f"{prefix}decoder", "decoder", "j", gated, cross=True)
    if config["tied"]:
        return *rows, Tied(head, first, "the configuration ties the head to the embedding", optional=not copies)
    return *rows, Row(head, "lm_head.weight")


def _stack(theirs: str, ours: str, hole: str, gated: bool, cross: bool) -> KeyMap:
    """One of the two stacks; their depths differ, and so do the holes for their layer numbers."""
    layer, block = f"{theirs}.block.{{{hole}}}.layer.", f"{ours}.blocks.{{{hole}}}."
    bias = "relative_attention_bias.weight"
    last = 2 if cross else 1
    feed_forward = f"{layer}{last}.DenseReluDense."
    rows: KeyMap = (
        Row(f"{theirs}.block.0.layer.0.SelfAttention.{bias}", f"{ours}.relative_bias.weight"),
        *stacked(f"{layer}0.SelfAttention.", ("q", "k", "v"), f"{block}attention.qkv", ("weight",)),
        Row(f"{layer}0.SelfAttention.o.weight", f"{block}attention.out.weight"),
        Row(f"{layer}0.layer_norm.weight", f"{block}attention_norm.weight"),
        Row(f"{layer}{last}.layer_norm.weight", f"{block}feed_forward_norm.weight"),
        Row(f"{feed_forward}wo.weight", f"{block}feed_forward.down.weight"),
        Row(f"{theirs}.final_layer_norm.weight", f"{ours}.norm.weight"),
        *(
            stacked(feed_forward, ("wi_0", "wi_1"), f"{block}feed_forward.up", ("weight",))
            if gated
            else (Row(f"{feed_forward}wi.weight", f"{block}feed_forward.up.weight"),)
        ),
    )
    if cross:
        rows = (
            *rows,
            Row(f"{layer}1.EncDecAttention.q.weight", f"{block}cross.q.weight"),
            *stacked(f"{layer}1.EncDecAttention.", ("k", "v"), f"{block}cross.kv", ("weight",)),
            Row(f"{layer}1.EncDecAttention.o.weight", f"{block}cross.out.weight"),
            Row(f"{layer}1.layer_norm.weight", f"{block}cross_norm.weight"),
            Drop(
                f"{theirs}.block.0.layer.1.EncDecAttention.{bias}", "old files have one; cross-attention adds no bias"
            ),
        )
    return rows


def _unused_decoder(prefix: str) -> KeyMap:
    """What a whole checkpoint has beside its encoder."""
    why = "the configuration says that this is an encoder alone"
    layer = f"{prefix}decoder.block.{{j}}.layer."
    ends = (
        *(f"0.SelfAttention.{part}" for part in ("q", "k", "v", "o", "relative_attention_bias")),
        *(f"1.EncDecAttention.{part}" for part in ("q", "k", "v", "o", "relative_attention_bias")),
        *(f"2.DenseReluDense.{part}" for part in ("wi", "wi_0", "wi_1", "wo")),
        *(f"{place}.layer_norm" for place in (0, 1, 2)),
    )
    return *(Drop(f"{layer}{end}.weight", why) for end in ends), Drop(f"{prefix}decoder.final_layer_norm.weight", why)


def hub_config(settings: Mapping[str, object], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our T5 config from a hub ``config.json`` and the names and shapes beside it.

    The head is tied (and its input scaled) unless ``tie_word_embeddings`` is false; absent and null mean true.

    Raises: CheckpointError for a missing key, a value of a wrong type, or another kind of model.
    """
    require(settings, "model_type", "t5", None)
    activation = read_value(settings, "feed_forward_proj", str, "relu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"feed_forward_proj is {activation!r}; only {', '.join(ACTIVATIONS)} are supported")
    layers = read_size(settings, "num_layers")
    # transformers 5 writes tie_word_embeddings true into every T5, and what used to stand there under another name.
    tied = read_value(settings, "scale_decoder_outputs", bool, read_value(settings, "tie_word_embeddings", bool, True))
    prefix = _prefix(meta) or ""
    whole = settings.get("architectures") != ["T5EncoderModel"]
    has_decoder = whole and any(name.startswith(f"{prefix}decoder.block.") for name in meta)
    if has_decoder and not tied and f"{prefix}lm_head.weight" not in meta:
        raise CheckpointError(
            "by tie_word_embeddings or scale_decoder_outputs the head is not the embedding, "
            "but there is no lm_head.weight"
        )
    return {
        "vocabulary": read_size(settings, "vocab_size"),
        "layers": layers,
        "decoder_layers": read_size(settings, "num_decoder_layers", layers) if has_decoder else 0,
        "channels": read_size(settings, "d_model"),
        "heads": read_size(settings, "num_heads"),
        "head_size": read_size(settings, "d_kv"),
        "feed_forward": read_size(settings, "d_ff"),
        "activation": activation,
        "buckets": read_size(settings, "relative_attention_num_buckets", 32),
        "max_distance": read_size(settings, "relative_attention_max_distance", 128),
        "norm_eps": read_value(settings, "layer_norm_epsilon", float, 1e-6),
        "tied": tied,
    }


def hub_files(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, str]:
    """The text files that make a folder of weights loadable by transformers, by name (its tokenizer aside)."""
    activation = config["activation"]
    settings = {
        "architectures": ["T5ForConditionalGeneration" if config["decoder_layers"] else "T5EncoderModel"],
        "model_type": "t5",
        "torch_dtype": dtype,
        "vocab_size": config["vocabulary"],
        "num_layers": config["layers"],
        "num_decoder_layers": config["decoder_layers"] or config["layers"],
        "d_model": config["channels"],
        "num_heads": config["heads"],
        "d_kv": config["head_size"],
        "d_ff": config["feed_forward"],
        "feed_forward_proj": activation,
        "dense_act_fn": {"gated-gelu": "gelu_new"}.get(activation, activation.removeprefix("gated-")),
        "is_gated_act": activation != "relu",
        "relative_attention_num_buckets": config["buckets"],
        "relative_attention_max_distance": config["max_distance"],
        "layer_norm_epsilon": config["norm_eps"],
        "tie_word_embeddings": config["tied"],
        "is_encoder_decoder": config["decoder_layers"] > 0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "dropout_rate": 0.0,
        "initializer_factor": 1.0,
        "use_cache": True,
    }
    generation = {name: settings[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    texts = {"config.json": settings} | ({"generation_config.json": generation} if config["decoder_layers"] else {})
    return {name: json.dumps(values, indent=2, sort_keys=True) + "\n" for name, values in texts.items()}
