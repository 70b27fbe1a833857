"""ProtBert, ProtBert-BFD, IgBert and IgBert_unpaired: key map and configuration of transformers' Bert classes.

Sources: transformers 5.23 models/bert; config.json and vocab.txt of Rostlab/prot_bert.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.keymap import Drop, KeyMap, Row, Tied, affine, stacked
from plm_weights.settings import read_size, read_value, require

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO")
PREFIXES = ("bert.", "", "module.bert.", "module.")  # "" where BertModel was saved, "module." by DataParallel

Layout = Literal["hub", "plm"]
HUB_MARK, OWN_MARK = "encoder.layer.0.attention.output.LayerNorm.", "embed_norm."


def recognise(names: Iterable[str]) -> Layout | None:
    """Which layout of BERT the names belong to, the hub's or this library's; None if they are of another family."""
    names = list(names)
    if _prefix(names) is not None:
        return "hub"
    return "plm" if any(name.startswith(OWN_MARK) for name in names) else None


def key_map(names: Iterable[str], config: Mapping[str, Any]) -> KeyMap:
    """The table that fits a checkpoint with these names, in either layout; ``config`` has the keywords of our config.

    Raises: CheckpointError if the names are of another family.
    """
    names = list(names)
    match recognise(names):
        case "plm":
            return tuple(Row(name, name) for name in names)
        case "hub":
            return hub_rows(config, prefix=_prefix(names) or "")
    some = ", ".join(sorted(names)[:5])
    raise CheckpointError(f"these tensors are not those of BERT in any known layout: {some}, ...")


def _prefix(names: list[str]) -> str | None:
    """What stands before the encoder's names in the hub's layout; None in any other."""
    return next((p for p in PREFIXES if any(name.startswith(p + HUB_MARK) for name in names)), None)


def hub_rows(config: Mapping[str, Any], prefix: str = "bert.") -> KeyMap:
    """Files of transformers' Bert classes. ``prefix`` is "" where the base class BertModel was saved.

    One table fits every ``config``: what a checkpoint may lack is optional here and wanted or not by its network.
    """
    layer, block = f"{prefix}encoder.layer.{{i}}.", "blocks.{i}."
    embeddings, head = f"{prefix}embeddings.", f"{prefix.removesuffix('bert.')}cls."
    words = f"{embeddings}word_embeddings.weight"
    return (
        Row(words, "embed.weight"),
        Row(f"{embeddings}position_embeddings.weight", "positions.weight"),
        Row(f"{embeddings}token_type_embeddings.weight", "types.weight"),
        Drop(f"{embeddings}position_ids", "counts 0, 1, 2, ...; computed where needed"),
        Drop(f"{embeddings}token_type_ids", "zeros, what types are if none are given"),
        *_layer_norm(f"{embeddings}LayerNorm", "embed_norm"),
        *stacked(f"{layer}attention.self.", ("query", "key", "value"), f"{block}attention.qkv"),
        *affine(f"{layer}attention.output.dense", f"{block}attention.out"),
        *_layer_norm(f"{layer}attention.output.LayerNorm", f"{block}attention_norm"),
        *affine(f"{layer}intermediate.dense", f"{block}up"),
        *affine(f"{layer}output.dense", f"{block}down"),
        *_layer_norm(f"{layer}output.LayerNorm", f"{block}feed_forward_norm"),
        *affine(f"{prefix}pooler.dense", "pooler", optional=True),
        *affine(f"{head}predictions.transform.dense", "lm_head.dense", optional=True),
        *_layer_norm(f"{head}predictions.transform.LayerNorm", "lm_head.norm"),
        Row(f"{head}predictions.bias", "lm_head.bias", optional=True),
        Tied(f"{head}predictions.decoder.weight", words, "the head shares the embedding", optional=True),
        Tied(f"{head}predictions.decoder.bias", f"{head}predictions.bias", "one bias, two names", optional=True),
        *affine(f"{head}seq_relationship", "relation_head", optional=True),
    )


def _layer_norm(source: str, target: str) -> KeyMap:
    """Norms, which files converted from TensorFlow call gamma and beta."""
    return (
        *affine(source, target, optional=True),
        Row(f"{source}.gamma", f"{target}.weight", optional=True),
        Row(f"{source}.beta", f"{target}.bias", optional=True),
    )


def hub_config(settings: Mapping[str, object], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our BERT config from a hub ``config.json`` and the names and shapes beside it.

    ProtBert's file has twelve keys, so one that is absent or null has the default of transformers' BertConfig: note
    norm_eps 1e-12, where torch's own default is 1e-5. Sizes other than that of the types have no defaults.

    Raises: CheckpointError for a missing size, a value of a wrong type, or a kind of BERT that is not an encoder of
    proteins with absolute positions.
    """
    require(settings, "model_type", "bert", None)
    require(settings, "vocab_size", len(VOCABULARY))  # the one that the tokenizer knows; others mean other letters
    require(settings, "hidden_act", "gelu", None)
    require(settings, "position_embedding_type", "absolute", None)
    require(settings, "is_decoder", False, None)
    require(settings, "add_cross_attention", False, None)
    return {
        "vocabulary": len(VOCABULARY),
        "layers": read_size(settings, "num_hidden_layers"),
        "channels": read_size(settings, "hidden_size"),
        "heads": read_size(settings, "num_attention_heads"),
        "feed_forward": read_size(settings, "intermediate_size"),
        "positions": read_size(settings, "max_position_embeddings"),
        "types": read_size(settings, "type_vocab_size", 2),
        "norm_eps": read_value(settings, "layer_norm_eps", float, 1e-12),
        "lm_head": any("cls.predictions." in name for name in meta),
        "pooler": any("pooler.dense." in name for name in meta),
        "relation_head": any("cls.seq_relationship." in name for name in meta),
    }


def hub_files(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, str]:
    """The text files that make a folder of weights loadable by transformers, by name.

    ``config`` has the keywords of our BERT config, ``dtype`` is that of the weights.
    """
    tokenizer = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": False,  # which would make every residue [UNK]
        "model_max_length": config["positions"],
    }
    return {
        "config.json": json.dumps(hub_config_json(config, dtype), indent=2, sort_keys=True) + "\n",
        "vocab.txt": "".join(f"{token}\n" for token in VOCABULARY),
        "tokenizer_config.json": json.dumps(tokenizer, indent=2, sort_keys=True) + "\n",
    }


def hub_config_json(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The way back from ``hub_config``: ``config.json``, with nothing left to a default."""
    return {
        "architectures": ["BertForMaskedLM" if config["lm_head"] else "BertModel"],
        "model_type": "bert",
        "torch_dtype": dtype,
        "vocab_size": config["vocabulary"],
        "num_hidden_layers": config["layers"],
        "hidden_size": config["channels"],
        "num_attention_heads": config["heads"],
        "intermediate_size": config["feed_forward"],
        "max_position_embeddings": config["positions"],
        "type_vocab_size": config["types"],
        "layer_norm_eps": config["norm_eps"],
        "pad_token_id": VOCABULARY.index("[PAD]"),
        "position_embedding_type": "absolute",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
