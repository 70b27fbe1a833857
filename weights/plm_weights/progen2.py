"""ProGen2: key map and configuration of the official files and of the hub's ports, which share their tensors' names.

Sources: salesforce/progen@c27a419, progen2/models/progen; hugohrban's ports, whose configurations name sizes otherwise.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.keymap import Drop, KeyMap, Row, affine
from plm_weights.settings import read_size, read_value, require

SHARDS = 8  # the original was trained on so many devices, each with its own slice of the fused projection

Layout = Literal["hub", "plm"]
HUB_MARK, OWN_MARK = "transformer.h.0.attn.qkv_proj.weight", "blocks.0.attention.qvk.weight"


def recognise(names: Iterable[str]) -> Layout | None:
    """Which layout of ProGen2 the names belong to, the published one or this library's; None if another family's."""
    names = set(names)
    return "plm" if OWN_MARK in names else "hub" if HUB_MARK in names else None


def key_map(names: Iterable[str]) -> KeyMap:
    """The table for a checkpoint with these names."""
    names = set(names)
    if recognise(names) == "plm":
        return tuple(Row(name, name) for name in names)
    return hub_rows()


def hub_rows() -> KeyMap:
    """The official files and the ports.

    Each of eight shards of ``qkv_proj`` holds its heads' queries, values and keys, in this order; the shards of a kind
    end to end are all heads in their natural order.
    """
    layer, block = "transformer.h.{i}.", "blocks.{i}."
    return (
        Row("transformer.wte.weight", "embed.weight"),
        *affine(f"{layer}ln_1", f"{block}norm"),
        Row(
            f"{layer}attn.qkv_proj.weight",
            f"{block}attention.qvk.weight",
            "(shard kind o) i -> (kind shard o) i",
            {"shard": SHARDS, "kind": 3},
        ),
        Row(f"{layer}attn.out_proj.weight", f"{block}attention.out.weight"),
        *affine(f"{layer}mlp.fc_in", f"{block}feed_forward.up"),
        *affine(f"{layer}mlp.fc_out", f"{block}feed_forward.down"),
        *affine("transformer.ln_f", "norm"),
        *affine("lm_head", "lm_head"),
        Drop(f"{layer}attn.bias", "the causal mask, which is no parameter"),
        Drop(f"{layer}attn.masked_bias", "what the mask puts into its place"),
    )


def hub_config(settings: Mapping[str, object], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our ProGen2 config from a ``config.json`` and the shapes beside it.

    Ports say ``embed_dim`` for ``n_embd`` and may count the rows of embedding and head apart. Nothing has a default:
    those of the original's class are GPT-J's, and fit no checkpoint.

    Raises: CheckpointError for a missing key, a value of a wrong type, or another kind of model.
    """
    require(settings, "model_type", "progen", None)
    require(settings, "activation_function", "gelu_new", None)
    channels = _either(settings, "n_embd", "embed_dim")
    heads = read_size(settings, "n_head")
    if channels % heads:
        raise CheckpointError(f"n_embd is {channels}, no multiple of n_head, {heads}")
    if channels % SHARDS:
        raise CheckpointError(
            f"n_embd is {channels}; its attention weights come in {SHARDS} shards, so it must divide by {SHARDS}"
        )
    max_length = read_size(settings, "n_positions")
    mask = meta.get("transformer.h.0.attn.bias")
    if mask is not None and mask.shape[-1:] != (max_length,):
        raise CheckpointError(f"n_positions is {max_length}, but the stored causal mask has shape {[*mask.shape]}")
    return {
        "vocabulary": _either(settings, "vocab_size_emb", "vocab_size"),
        "outputs": _either(settings, "vocab_size_lm_head", "vocab_size"),
        "layers": read_size(settings, "n_layer"),
        "channels": channels,
        "heads": heads,
        "rotated": min(read_size(settings, "rotary_dim"), channels // heads),
        "feed_forward": read_size(settings, "n_inner", 4 * channels),
        "max_length": max_length,
        "norm_eps": read_value(settings, "layer_norm_epsilon", float),
    }


def _either(settings: Mapping[str, object], first: str, second: str) -> int:
    """A size under the first of two names that is there."""
    return read_size(settings, first if settings.get(first) is not None else second)


def hub_files(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, str]:
    """A ``config.json`` with the keys of the original and, where they differ, those of the ports as well."""
    settings: dict[str, object] = {
        "activation_function": "gelu_new",
        "architectures": ["ProGenForCausalLM"],
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "embed_dim": config["channels"],
        "eos_token_id": 2,
        "gradient_checkpointing": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config["norm_eps"],
        "model_type": "progen",
        "n_embd": config["channels"],
        "n_head": config["heads"],
        "n_inner": None if config["feed_forward"] == 4 * config["channels"] else config["feed_forward"],
        "n_layer": config["layers"],
        "n_positions": config["max_length"],
        "rotary_dim": config["rotated"],
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config["vocabulary"],
        "vocab_size_emb": config["vocabulary"],
        "vocab_size_lm_head": config["outputs"],
    }
    return {"config.json": json.dumps(settings, indent=2) + "\n"}


def original_masks(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the authors' files hold beside the weights: the causal mask, one memory for all layers, and its filling.

    The filling is float32 whatever the weights are: in float16 the published -1e9 would be minus infinity.
    """
    size = config["max_length"]
    mask = torch.ones(size, size, dtype=torch.bool).tril().view(1, 1, size, size)
    filling = torch.tensor(-1e9)
    layers = [f"transformer.h.{i}.attn." for i in range(config["layers"])]
    return {f"{layer}bias": mask for layer in layers} | {f"{layer}masked_bias": filling for layer in layers}


def no_original(config: Mapping[str, Any]) -> str | None:
    """Why the authors' own code could not read a model that the ports can; None if it can."""
    if config["vocabulary"] != config["outputs"]:
        return (
            f"the authors' code has one vocabulary for embedding and head, and these have {config['vocabulary']} "
            f"and {config['outputs']} rows"
        )
    if config["heads"] % SHARDS:
        return f"the authors' code wants a multiple of {SHARDS} heads, and this has {config['heads']}"
    return None
