"""ESMFold: key maps and configuration of facebook/esmfold_v1 ("hub") and of the authors' files ("original").

Apart from the language model below, both have the same names. The authors' file holds no language model: that is ESM-2
3B's own file (see `esmfold_files`). Sources: facebookresearch/esm@2b36991 and openfold@4b41059; transformers 5.23
models/esm.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from plm_weights import esm
from plm_weights.errors import CheckpointError
from plm_weights.keymap import Drop, KeyMap, Row, Tied, affine, stacked
from plm_weights.settings import read_size, read_value, require

Layout = Literal["hub", "original", "plm"]
OWN_MARK, MARK = "recycle_distances.weight", "trunk.recycle_disto.weight"
STEM = "stem."
RESIDUES = "ARNDCQEGHILKMFPSTWYVX"
VOCABULARY = (*RESIDUES, "<pad>", "<mask>", "<cls>", "<sep>", "<eos>")  # vocab.txt of facebook/esmfold_v1


def recognise(names: Iterable[str]) -> Layout | None:
    """Which layout of ESMFold the names belong to; None if to none."""
    names = set(names)
    if OWN_MARK in names:
        return "plm"
    if MARK not in names:
        return None
    return "hub" if any(name.startswith(("esm.encoder.", "esm.embeddings.")) for name in names) else "original"


def key_map(names: Iterable[str], config: Mapping[str, Any]) -> KeyMap:
    """The table for a checkpoint with these names. ``config`` has the keywords of our ESMFold config."""
    names = set(names)
    layout = recognise(names)
    if layout == "plm":
        return tuple(Row(name, name) for name in names)
    return hub_rows(config) if layout == "hub" else original_rows(config)


def hub_rows(config: Mapping[str, Any]) -> KeyMap:
    """transformers' class, whose ESM-2 has no head."""
    rows = esm.hub_rows(rotary=True, contact_head=config["stem"]["contact_head"])
    stem = (row for row in rows if str(row.source).lstrip("('").startswith("esm."))  # and not the heads beside it
    return (*below(stem), *folding_rows(config))


def original_rows(config: Mapping[str, Any]) -> KeyMap:
    """The authors' file joined with that of ESM-2 3B, whose names then begin with ``esm.``."""
    rows = esm.fair_rows(rotary=True, contact_head=config["stem"]["contact_head"], prefix="")
    stem = [row for row in rows if config["stem"]["lm_head"] or not str(row.source).startswith("lm_head.")]
    unused: list[Drop] = []
    if not config["stem"]["lm_head"]:
        parts = ("weight", "bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias")
        unused = [Drop(f"esm.lm_head.{part}", "folding takes states, not letters, from ESM-2") for part in parts]
    module, constant = "trunk.structure_module", "a constant that old versions of openfold and fairseq stored"
    unused += [
        Drop(f"{module}.{name}", constant) for name in ("default_frames", "group_idx", "atom_mask", "lit_positions")
    ]
    unused.append(Drop("positional_encoding._float_tensor", constant))
    return (*below(stem, "esm."), *unused, *folding_rows(config))


def below(rows: Iterable[Row | Drop | Tied], prefix: str = "") -> KeyMap:
    """Rows of an ESM-2 as those of a part, its names behind ``stem.`` here and ``prefix`` there."""

    def moved(names: str | tuple[str, ...], front: str) -> Any:
        return front + names if isinstance(names, str) else tuple(front + name for name in names)

    found: list[Row | Drop | Tied] = []
    for row in rows:
        if isinstance(row, Row):
            found.append(replace(row, source=moved(row.source, prefix), target=moved(row.target, STEM)))
        elif isinstance(row, Tied):
            found.append(replace(row, source=prefix + row.source, same_as=prefix + row.same_as))
        else:
            found.append(replace(row, source=prefix + row.source))
    return tuple(found)


def folding_rows(config: Mapping[str, Any]) -> KeyMap:
    """All but the language model: the same in both forms."""
    return (
        Row("esm_s_combine", "layer_weights"),
        *affine("esm_s_mlp.0", "stem_transition.norm"),
        *affine("esm_s_mlp.1", "stem_transition.up"),
        *affine("esm_s_mlp.3", "stem_transition.down"),
        Row("embedding.weight", "embed.weight"),
        Drop("af2_to_esm", "which token each residue is; computed where needed"),
        Row("trunk.pairwise_positional_embedding.embedding.weight", "relative_positions.weight"),
        *affine("trunk.recycle_s_norm", "recycle_norm"),
        *affine("trunk.recycle_z_norm", "recycle_pair_norm"),
        Row("trunk.recycle_disto.weight", "recycle_distances.weight"),
        *affine("trunk.trunk2sm_s", "to_structure"),
        *affine("trunk.trunk2sm_z", "to_structure_pair"),
        *affine("distogram_head", "distogram_head"),
        *affine("ptm_head", "error_head"),
        *affine("lm_head", "residue_head"),
        *affine("lddt_head.0", "confidence_head.norm"),
        *affine("lddt_head.1", "confidence_head.first"),
        *affine("lddt_head.2", "confidence_head.second"),
        *affine("lddt_head.3", "confidence_head.out"),
        *(trunk_rows(config["channels"] // config["head_size"]) if config["blocks"] else ()),
        *structure_rows(config["structure"]),
    )


def trunk_rows(heads: int) -> KeyMap:
    """The blocks of the trunk."""
    block, ours = "trunk.blocks.{n}.", "blocks.{n}."
    rows: list[Row | Drop | Tied] = [
        *affine(f"{block}layernorm_1", f"{ours}attention_norm"),
        *affine(f"{block}pair_to_sequence.layernorm", f"{ours}pair_to_sequence.norm"),
        Row(f"{block}pair_to_sequence.linear.weight", f"{ours}pair_to_sequence.out.weight"),
        Row(
            f"{block}seq_attention.proj.weight",  # queries, keys and values of each head lie together
            f"{ours}attention.qkv.weight",
            "(h parts d) i -> (parts h d) i",
            {"h": heads, "parts": 3},
        ),
        *affine(f"{block}seq_attention.g_proj", f"{ours}attention.gate"),
        *affine(f"{block}seq_attention.o_proj", f"{ours}attention.out"),
        *affine(f"{block}sequence_to_pair.layernorm", f"{ours}sequence_to_pair.norm"),
        *affine(f"{block}sequence_to_pair.proj", f"{ours}sequence_to_pair.qk"),
        *affine(f"{block}sequence_to_pair.o_proj", f"{ours}sequence_to_pair.out"),
    ]
    for theirs, name in (("mlp_seq", "transition"), ("mlp_pair", "pair_transition")):
        for number, part in ((0, "norm"), (1, "up"), (3, "down")):
            rows += affine(f"{block}{theirs}.mlp.{number}", f"{ours}{name}.{part}")
    for theirs, name in (("tri_mul_out", "outgoing"), ("tri_mul_in", "incoming")):
        rows += affine(f"{block}{theirs}.layer_norm_in", f"{ours}{name}.norm")
        rows += affine(f"{block}{theirs}.layer_norm_out", f"{ours}{name}.product_norm")
        rows += stacked(f"{block}{theirs}.linear_", ("a_p", "b_p"), f"{ours}{name}.sides")
        rows += stacked(f"{block}{theirs}.linear_", ("a_g", "b_g"), f"{ours}{name}.side_gates")
        rows += affine(f"{block}{theirs}.linear_g", f"{ours}{name}.gate")
        rows += affine(f"{block}{theirs}.linear_z", f"{ours}{name}.out")
    for theirs, name in (("tri_att_start", "starting"), ("tri_att_end", "ending")):
        rows += affine(f"{block}{theirs}.layer_norm", f"{ours}{name}.norm")
        rows += [Row(f"{block}{theirs}.linear.weight", f"{ours}{name}.bias.weight")]
        rows += stacked(f"{block}{theirs}.mha.linear_", ("q", "k", "v"), f"{ours}{name}.qkv", ("weight",))
        rows += affine(f"{block}{theirs}.mha.linear_g", f"{ours}{name}.gate")
        rows += affine(f"{block}{theirs}.mha.linear_o", f"{ours}{name}.out")
    return tuple(rows)


def structure_rows(config: Mapping[str, Any]) -> KeyMap:
    """The structure module. Points are stored with all x first, then all y and all z."""
    module, ipa, angles = (
        "trunk.structure_module.",
        "trunk.structure_module.ipa.",
        "trunk.structure_module.angle_resnet.",
    )
    ours, attention = "structure.", "structure.attention."
    points = {"xyz": 3}
    rows: list[Row | Drop | Tied] = [
        *affine(f"{module}layer_norm_s", f"{ours}norm"),
        *affine(f"{module}layer_norm_z", f"{ours}pair_norm"),
        *affine(f"{module}linear_in", f"{ours}first"),
        *affine(f"{module}layer_norm_ipa", f"{ours}attention_norm"),
        *affine(f"{module}transition.layer_norm", f"{ours}transition.norm"),
        *affine(f"{module}bb_update.linear", f"{ours}move"),
        *affine(f"{ipa}linear_q", f"{attention}query"),
        *affine(f"{ipa}linear_b", f"{attention}pair_bias"),
        *affine(f"{ipa}linear_out", f"{attention}out"),
        Row(f"{ipa}head_weights", f"{attention}head_weights"),
        *affine(f"{angles}linear_in", f"{ours}torsions.now"),
        *affine(f"{angles}linear_initial", f"{ours}torsions.before"),
        *affine(f"{angles}linear_out", f"{ours}torsions.out"),
    ]
    for number, name in enumerate(("first", "second", "third"), 1):
        rows += affine(f"{module}transition.layers.{{k}}.linear_{number}", f"{ours}transition.layers.{{k}}.{name}")
    for number, name in enumerate(("up", "down"), 1):
        rows += affine(f"{angles}layers.{{m}}.linear_{number}", f"{ours}torsions.blocks.{{m}}.{name}")
    for kind, rest in (("weight", " i"), ("bias", "")):
        rows += [
            Row(
                f"{ipa}linear_kv.{kind}",
                f"{attention}key_value.{kind}",
                f"(h two d){rest} -> (two h d){rest}",
                {"two": 2, "h": config["heads"]},
            ),
            Row(
                f"{ipa}linear_q_points.{kind}",
                f"{attention}query_points.{kind}",
                f"(xyz hp){rest} -> (hp xyz){rest}",
                points,
            ),
            Row(
                f"{ipa}linear_kv_points.{kind}",
                f"{attention}key_value_points.{kind}",
                f"(xyz hp){rest} -> (hp xyz){rest}",
                points,
            ),
        ]
    return tuple(rows)


def hub_config(settings: Mapping[str, object], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our ESMFold config from the hub's ``config.json`` and the names and shapes beside it.

    Raises: CheckpointError for a missing key, a value of a wrong type, or a kind of ESMFold that is not supported.
    """
    require(settings, "is_folding_model", True)
    stem = esm.hub_config({**settings, "is_folding_model": False}, _stem(meta))
    return folding_config(_part(settings, "esmfold_config"), stem, {})


def original_config(extras: Mapping[str, object]) -> dict[str, Any]:
    """The keywords of our ESMFold config from the ``cfg`` of the authors' file and from its language model's, which
    `esmfold_files.joined` has put beside it.

    Raises: CheckpointError as ``hub_config``.
    """
    return folding_config(_part(_part(extras, "cfg"), "model"), dict(_part(extras, "stem")), AUTHORS)


def folding_config(folding: Mapping[str, object], stem: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``names``: what the settings of the structure module are called, where not as transformers calls them."""
    if folding.get("use_esm_attn_map"):
        raise CheckpointError(
            "use_esm_attn_map is on in the configuration: pairs that begin as attention maps of the language model, as "
            "in models called esmfold_structure_module_only, are not supported. Take esmfold_v1 (or esmfold_v0)."
        )
    require(folding, "bypass_lm", False, None)
    require(folding, "embed_aa", True, None)
    require(folding, "esm_ablate_pairwise", False, None)
    require(folding, "esm_ablate_sequence", False, None)
    trunk = _part(folding, "trunk")
    return {
        "stem": stem,
        **_trunk(trunk),
        "confidence_channels": read_size(folding, "lddt_head_hid_dim", 128),
        "structure": _structure(_part(trunk, "structure_module"), names),
    }


# our name: transformers' name
STRUCTURE = {
    "channels": "sequence_dim",
    "pair": "pairwise_dim",
    "layers": "num_blocks",
    "heads": "num_heads_ipa",
    "head_size": "ipa_dim",
    "query_points": "num_qk_points",
    "value_points": "num_v_points",
    "transitions": "num_transition_layers",
    "angle_channels": "resnet_dim",
    "angle_blocks": "num_resnet_blocks",
    "scale": "trans_scale_factor",
}
# transformers' name: the authors'
AUTHORS = {
    "sequence_dim": "c_s",
    "pairwise_dim": "c_z",
    "num_blocks": "no_blocks",
    "num_heads_ipa": "no_heads_ipa",
    "ipa_dim": "c_ipa",
    "num_qk_points": "no_qk_points",
    "num_v_points": "no_v_points",
    "num_transition_layers": "no_transition_layers",
    "resnet_dim": "c_resnet",
    "num_resnet_blocks": "no_resnet_blocks",
    "num_angles": "no_angles",
}


def _part(settings: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = settings.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the configuration has no {key}; an ESMFold needs it")
    return value


def _stem(meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the language model, without the head of ours that has the same name as its head."""
    return {name: tensor for name, tensor in meta.items() if name.startswith("esm.")}


def _trunk(trunk: Mapping[str, object]) -> dict[str, int]:
    return {
        "blocks": read_size(trunk, "num_blocks", least=0),
        "channels": read_size(trunk, "sequence_state_dim"),
        "pair": read_size(trunk, "pairwise_state_dim"),
        "head_size": read_size(trunk, "sequence_head_width"),
        "pair_head_size": read_size(trunk, "pairwise_head_width"),
        "position_bins": read_size(trunk, "position_bins"),
        "passes": read_size(trunk, "max_recycles"),
    }


def _structure(settings: Mapping[str, object], names: Mapping[str, str]) -> dict[str, Any]:
    require(settings, names.get("num_angles", "num_angles"), 7, None)
    found: dict[str, Any] = {}
    for ours, theirs in STRUCTURE.items():
        name = names.get(theirs, theirs)
        found[ours] = read_value(settings, name, float) if ours == "scale" else read_size(settings, name)
    return found


def hub_extras() -> dict[str, Tensor]:
    """What transformers stores besides weights: the language model's token for a pad and for each residue."""
    tokens = [esm.PAD, *map(esm.VOCABULARY.index, RESIDUES)]
    return {"af2_to_esm": torch.tensor(tokens)}


def hub_files(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, str]:
    """The text files that make a folder of weights loadable by transformers, by name.

    ``config`` has the keywords of our ESMFold config, ``dtype`` is that of the trunk's weights. Its tokenizer has to be
    called with ``add_special_tokens=False``: the network has no rows for them. A pad is an A, as published.
    """
    special = {"cls_token": "<cls>", "eos_token": "<eos>", "mask_token": "<mask>", "pad_token": "A", "unk_token": "X"}
    tokenizer = {"tokenizer_class": "EsmTokenizer", **special}
    return {
        "config.json": json.dumps(hub_config_json(config, dtype), indent=2, sort_keys=True) + "\n",
        "vocab.txt": "\n".join(VOCABULARY),
        "tokenizer_config.json": json.dumps(tokenizer, indent=2, sort_keys=True) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def hub_config_json(config: Mapping[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The way back from ``hub_config``: ``config.json``, with nothing left to a default."""
    structure = {theirs: config["structure"][ours] for ours, theirs in STRUCTURE.items()}
    if float(config["structure"]["scale"]).is_integer():  # transformers 5 takes no other numbers
        structure["trans_scale_factor"] = int(config["structure"]["scale"])
    trunk = {
        "num_blocks": config["blocks"],
        "sequence_state_dim": config["channels"],
        "pairwise_state_dim": config["pair"],
        "sequence_head_width": config["head_size"],
        "pairwise_head_width": config["pair_head_size"],
        "position_bins": config["position_bins"],
        "max_recycles": config["passes"],
        "dropout": 0,
        "layer_drop": 0,
        "cpu_grad_checkpoint": False,
        "chunk_size": None,
        "structure_module": {**structure, "num_angles": 7, "dropout_rate": 0.1, "epsilon": 1e-8, "inf": 1e5},
    }
    return {
        **esm.hub_config_json({**config["stem"], "lm_head": False}, dtype),
        "architectures": ["EsmForProteinFolding"],
        "is_folding_model": True,
        "esmfold_config": {
            "esm_type": "esm2_3B",
            "fp16_esm": False,
            "use_esm_attn_map": False,
            "esm_ablate_pairwise": False,
            "esm_ablate_sequence": False,
            "esm_input_dropout": 0,
            "embed_aa": True,
            "bypass_lm": False,
            "lddt_head_hid_dim": config["confidence_channels"],
            "trunk": trunk,
        },
        "vocab_list": list(esm.VOCABULARY),
    }
