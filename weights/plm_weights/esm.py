"""ESM-1b, ESM-1v and ESM-2: key maps and configurations of the transformers hub ("hub") and of fair-esm ("fair").

Rotary frequencies are data: the published ones are rounded to float16, so stored values are always used. A file without
any is complete all the same: if not ``stores_frequencies(names)``, leave ``frequencies`` out of what is wanted from the
key map and keep what the model computes.

Sources: transformers 5.23 models/esm, fair-esm 2.0.0 esm/pretrained.py and esm/model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.keymap import Drop, KeyMap, Row, Tied, affine, stacked
from plm_weights.settings import read_size, read_value, require

VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
PAD, MASK = VOCABULARY.index("<pad>"), VOCABULARY.index("<mask>")
POSITION_START = PAD + 1  # rows of the position table before the first token's

Layout = Literal["hub", "fair", "plm"]
# layout, prefixes that its files are seen with, and what marks a name as one of its layers
LAYOUTS: tuple[tuple[Layout, tuple[str, ...], str, str], ...] = (
    ("hub", ("esm.", ""), "encoder.layer.", ".attention.LayerNorm."),
    ("fair", ("encoder.sentence_encoder.", "encoder.", ""), "layers.", ".self_attn_layer_norm."),
)
OWN_MARKS = {"norm.weight", "blocks.0.attention.qkv.weight"}  # our BERT has no final norm, our ProGen2 no such matrix


def recognise(names: Iterable[str]) -> Layout | None:
    """Which layout of ESM the names belong to: the hub's, fair-esm's or this library's; None if to none."""
    found = _layout(list(names))
    return found and found[0]


def key_map(names: Iterable[str], *, rotary: bool, contact_head: bool) -> KeyMap:
    """The table that fits a checkpoint with these names, in any of the layouts."""
    names = list(names)
    layout, prefix = _known_layout(names)
    if layout == "plm":
        return tuple(Row(name, name) for name in names)
    rows = hub_rows if layout == "hub" else fair_rows
    return rows(rotary=rotary, contact_head=contact_head, prefix=prefix)


def stores_frequencies(names: Iterable[str]) -> bool:
    """Whether a checkpoint holds rotary frequencies."""
    return any(name.endswith(("inv_freq", "frequencies")) for name in names)


def _layout(names: list[str]) -> tuple[Layout, str] | None:
    """The layout and the prefix of its names."""
    if OWN_MARKS.issubset(names):
        return "plm", ""
    for layout, prefixes, layers, norm in LAYOUTS:
        for prefix in prefixes:
            if any(name.startswith(prefix + layers) and norm in name for name in names):
                return layout, prefix
    return None


def _known_layout(names: list[str]) -> tuple[Layout, str]:
    if found := _layout(names):
        return found
    some = ", ".join(sorted(names)[:5])
    raise CheckpointError(f"these tensors are not those of ESM-1b, ESM-1v or ESM-2 in any known layout: {some}, ...")


def _layer_norm(source: str, target: str) -> KeyMap:
    """Norms that transformers 5 saves as gamma and beta, if the model was not itself loaded from weight and bias."""
    return (
        *affine(source, target, optional=True),
        Row(f"{source}.gamma", f"{target}.weight", optional=True),
        Row(f"{source}.beta", f"{target}.bias", optional=True),
    )


def hub_rows(*, rotary: bool, contact_head: bool, prefix: str = "esm.") -> KeyMap:
    """Files of transformers' Esm classes. ``prefix`` is "" where the base class EsmModel was saved."""
    layer, block = f"{prefix}encoder.layer.{{i}}.", "blocks.{i}."
    words, positions = f"{prefix}embeddings.word_embeddings.weight", f"{prefix}embeddings.position_embeddings.weight"
    inv_freq = "attention.self.rotary_embeddings.inv_freq"
    regression = f"{prefix}contact_head.regression"
    placed: KeyMap
    if rotary:
        first = f"{prefix}encoder.layer.0.{inv_freq}"
        placed = (
            Drop(positions, "rotary models never read it; the hub's files carry random numbers"),
            Row(first, "frequencies", optional=True),
            Tied(f"{layer}{inv_freq}", first, "one per layer before transformers 5"),
            Row(f"{prefix}rotary_embeddings.inv_freq", "frequencies", optional=True),
            # transformers 5 saves under this literal name (conversion_mapping.py:1227)
            Row(f"{prefix}encoder.layer.*.{inv_freq}", "frequencies", optional=True),
        )
    else:
        placed = (Row(positions, "positions.weight"),)
    untrained = "untrained: there is no contact regression for ESM-1v, the hub's files carry random numbers"
    contacts: KeyMap = tuple(Drop(f"{regression}.{part}", untrained) for part in ("weight", "bias"))
    return (
        Row(words, "embed.weight"),
        Drop(f"{prefix}embeddings.position_ids", "counts 0, 1, 2, ...; computed where needed"),
        *placed,
        *affine(f"{prefix}embeddings.layer_norm", "norm_before", optional=True),
        *_layer_norm(f"{layer}attention.LayerNorm", f"{block}attention_norm"),
        *stacked(f"{layer}attention.self.", ("query", "key", "value"), f"{block}attention.qkv"),
        *affine(f"{layer}attention.output.dense", f"{block}attention.out"),
        *_layer_norm(f"{layer}LayerNorm", f"{block}feed_forward_norm"),
        *affine(f"{layer}intermediate.dense", f"{block}up"),
        *affine(f"{layer}output.dense", f"{block}down"),
        *affine(f"{prefix}encoder.emb_layer_norm_after", "norm"),
        *(affine(regression, "contact_head") if contact_head else contacts),
        *affine("lm_head.dense", "lm_head.dense", optional=True),
        *affine("lm_head.layer_norm", "lm_head.norm", optional=True),
        Row("lm_head.bias", "lm_head.bias", optional=True),
        Tied("lm_head.decoder.weight", words, "the head shares the embedding", optional=True),
        *affine(f"{prefix}pooler.dense", "pooler", optional=True),
        *affine("classifier.dense", "sequence_classifier.dense", optional=True),
        *affine("classifier.out_proj", "sequence_classifier.out", optional=True),
        *affine("classifier", "token_classifier", optional=True),
    )


def fair_rows(*, rotary: bool, contact_head: bool = True, prefix: str = "encoder.sentence_encoder.") -> KeyMap:
    """fair-esm's files, contact regression included. ``prefix`` is "" for the ``state_dict`` of fair-esm's modules."""
    layer, block = f"{prefix}layers.{{i}}.", "blocks.{i}."
    head = "encoder.lm_head." if prefix else "lm_head."
    words, inv_freq = f"{prefix}embed_tokens.weight", "self_attn.rot_emb.inv_freq"
    regression = "contact_head.regression"
    placed: KeyMap
    if rotary:
        first = f"{prefix}layers.0.{inv_freq}"
        placed = (Row(first, "frequencies"), Tied(f"{layer}{inv_freq}", first, "one per layer"))
    else:
        placed = (Row(f"{prefix}embed_positions.weight", "positions.weight"),)
    contacts: KeyMap = tuple(Drop(f"{regression}.{part}", "untrained in ESM-1v") for part in ("weight", "bias"))
    return (
        Row(words, "embed.weight"),
        *placed,
        *affine(f"{prefix}emb_layer_norm_before", "norm_before", optional=True),
        *affine(f"{layer}self_attn_layer_norm", f"{block}attention_norm"),
        *stacked(f"{layer}self_attn.", ("q_proj", "k_proj", "v_proj"), f"{block}attention.qkv"),
        *affine(f"{layer}self_attn.out_proj", f"{block}attention.out"),
        *affine(f"{layer}final_layer_norm", f"{block}feed_forward_norm"),
        *affine(f"{layer}fc1", f"{block}up"),
        *affine(f"{layer}fc2", f"{block}down"),
        *affine(f"{prefix}emb_layer_norm_after", "norm"),
        *(affine(regression, "contact_head", optional=True) if contact_head else contacts),
        *affine(f"{head}dense", "lm_head.dense"),
        *affine(f"{head}layer_norm", "lm_head.norm"),
        Row(f"{head}bias", "lm_head.bias"),
        Tied(f"{head}weight", words, "the head shares the embedding"),
    )


def hub_config(config: Mapping[str, object], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our ESM config from a hub ``config.json`` and the names and shapes beside it.

    A key that is absent or null has the default of transformers' EsmConfig, because ``save_pretrained`` may leave such
    keys out: note norm_eps 1e-12 and token_dropout False there, where every published file says 1e-5 and true.

    Raises: CheckpointError for a missing key, a value of a wrong type, or a kind of ESM that is not ESM-1b, 1v or 2.
    """
    require(config, "model_type", "esm")
    require(config, "is_folding_model", False, None)
    require(config, "vocab_size", len(VOCABULARY))
    require(config, "hidden_act", "gelu", None)
    require(config, "is_decoder", False, None)
    require(config, "add_cross_attention", False, None)
    require(config, "position_embedding_type", "absolute", "rotary", None)
    require(config, "rope_theta", 10000, None)
    require(config, "pad_token_id", PAD, None)
    require(config, "mask_token_id", MASK, None)
    rotary = config.get("position_embedding_type") == "rotary"
    return _config(
        meta,
        layers=read_size(config, "num_hidden_layers", 12),
        channels=read_size(config, "hidden_size", 768),
        heads=read_size(config, "num_attention_heads", 12),
        feed_forward=read_size(config, "intermediate_size", 3072),
        learned_positions=None if rotary else read_size(config, "max_position_embeddings", 1026),
        norm_before=read_value(config, "emb_layer_norm_before", bool, False),
        token_dropout=read_value(config, "token_dropout", bool, False),
        norm_eps=read_value(config, "layer_norm_eps", float, 1e-12),
    )


def fair_config(extras: Mapping[str, object], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our ESM config from the ``args`` (ESM-1b, 1v) or ``cfg`` (ESM-2) of a fair-esm ``.pt``.

    What fair-esm fixes in code is fixed here: LayerNorm eps 1e-5, and for ESM-2 a feed-forward of 4 * channels.

    Raises: CheckpointError as ``hub_config``.
    """
    embedding = meta.get(_known_layout(list(meta))[1] + "embed_tokens.weight")
    if embedding is not None and embedding.shape[:1] != (len(VOCABULARY),):
        raise CheckpointError(
            f"the embedding is {tuple(embedding.shape)}; wanted {len(VOCABULARY)} rows as in ESM-1b, ESM-1v and ESM-2 "
            "(ESM-1 and the MSA Transformer have other alphabets and are not supported)"
        )
    arguments, configuration = extras.get("args"), extras.get("cfg")
    if isinstance(arguments, Mapping):
        require(arguments, "arch", "roberta_large")
        learned = read_size(arguments, "max_positions") + POSITION_START
        feed_forward = read_size(arguments, "encoder_ffn_embed_dim")
    elif isinstance(configuration, Mapping) and isinstance(configuration.get("model"), Mapping):
        arguments = configuration["model"]
        learned = None
        feed_forward = 4 * read_size(arguments, "encoder_embed_dim")
    else:
        raise CheckpointError("no model arguments under 'args' or 'cfg', as a fair-esm checkpoint has them")
    return _config(
        meta,
        layers=read_size(arguments, "encoder_layers"),
        channels=read_size(arguments, "encoder_embed_dim"),
        heads=read_size(arguments, "encoder_attention_heads"),
        feed_forward=feed_forward,
        learned_positions=learned,
        norm_before=any("emb_layer_norm_before." in name for name in meta),
        token_dropout=read_value(arguments, "token_dropout", bool, False),
        norm_eps=1e-5,
    )


def _config(meta: Mapping[str, Tensor], **known: Any) -> dict[str, Any]:
    """``known``, with the heads that the names show."""
    channels, heads, rotary = known["channels"], known["heads"], known["learned_positions"] is None
    if channels % heads or (rotary and channels // heads % 2):
        raise CheckpointError(
            f"{channels} channels do not divide into {heads} heads{' of even size' if rotary else ''}"
        )
    # Learned positions without a norm before are ESM-1v, whose contact head nobody has trained.
    trained = rotary or known["norm_before"]
    return {
        **known,
        "lm_head": any("lm_head.dense." in name for name in meta),
        "contact_head": trained and any("contact_head.regression." in name for name in meta),
        "pooler": any("pooler.dense." in name for name in meta),
        "sequence_labels": _labels(meta, "classifier.out_proj.weight"),
        "token_labels": _labels(meta, "classifier.weight"),
    }


def _labels(meta: Mapping[str, Tensor], name: str) -> int | None:
    if name not in meta:
        return None
    if meta[name].ndim != 2:
        raise CheckpointError(f"{name} is {tuple(meta[name].shape)}; wanted [labels, channels]")
    return meta[name].shape[0]


def hub_files(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, str]:
    """The text files that make a folder of weights loadable by transformers, by name.

    ``config`` has the keywords of our ESM config, ``dtype`` is that of the weights.
    """
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "eos", "mask", "pad", "unk")}
    tokenizer = {"tokenizer_class": "EsmTokenizer", "model_max_length": (config["learned_positions"] or 1026) - 2}
    return {
        "config.json": json.dumps(hub_config_json(config, dtype), indent=2, sort_keys=True) + "\n",
        "vocab.txt": "\n".join(VOCABULARY),  # as published, without a last newline
        "tokenizer_config.json": json.dumps({**tokenizer, **special}, indent=2, sort_keys=True) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def hub_config_json(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The way back from ``hub_config``: ``config.json``, with nothing left to a default."""
    labels = config["sequence_labels"] or config["token_labels"]
    architecture = "EsmForMaskedLM" if config["lm_head"] else "EsmModel"
    if labels:
        architecture = "EsmForSequenceClassification" if config["sequence_labels"] else "EsmForTokenClassification"
    named = {str(label): f"LABEL_{label}" for label in range(labels or 0)}
    return {
        "architectures": [architecture],
        "model_type": "esm",
        "torch_dtype": dtype,
        "num_hidden_layers": config["layers"],
        "hidden_size": config["channels"],
        "num_attention_heads": config["heads"],
        "intermediate_size": config["feed_forward"],
        "position_embedding_type": "rotary" if config["learned_positions"] is None else "absolute",
        "max_position_embeddings": config["learned_positions"] or 1026,
        "emb_layer_norm_before": config["norm_before"],
        "token_dropout": config["token_dropout"],
        "layer_norm_eps": config["norm_eps"],
        "vocab_size": len(VOCABULARY),
        "pad_token_id": PAD,
        "mask_token_id": MASK,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "initializer_range": 0.02,
        "is_folding_model": False,
        "esmfold_config": None,
        "vocab_list": None,
        "use_cache": True,
        **({"id2label": named, "label2id": {name: int(label) for label, name in named.items()}} if labels else {}),
    }
