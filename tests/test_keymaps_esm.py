"""The key maps of ESM: both published formats in and out, tensor for tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS, DROPPED, FREQUENCY, GOLDEN, NAMES, equal, fair, hub, rows_of, wanted
from safetensors.torch import load_file
from torch import Tensor

from plm_weights import (
    CheckpointError,
    Drop,
    KeyMapError,
    check,
    export_weights,
    import_weights,
    open_tensors,
    write_fair_esm,
    write_safetensors,
)
from plm_weights.esm import (
    fair_config,
    fair_rows,
    hub_config,
    hub_config_json,
    hub_files,
    hub_rows,
    key_map,
    recognise,
    stores_frequencies,
)


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_format_both_ways(name: str) -> None:
    source = hub(name)
    rows = rows_of(name, source)
    state = import_weights(rows, source, wanted(CONFIGS[name]))
    kept = {key: source[key] for key in source.keys() - DROPPED[name]}
    assert equal(export_weights(rows, state), kept)
    assert len(kept) == len(source) - len(DROPPED[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_fair_esm_format_both_ways(name: str) -> None:
    source = fair(name)
    rows = rows_of(name, source)
    state = import_weights(rows, source, wanted(CONFIGS[name]))
    assert equal(export_weights(rows, state), dict(source))


@pytest.mark.parametrize("name", NAMES)
def test_every_imported_tensor_is_the_right_one(name: str) -> None:
    """Values, against the published names spelled out: two swapped rows of equal shape would pass a round trip."""
    source = hub(name)
    state = import_weights(rows_of(name, source), source, wanted(CONFIGS[name]))
    published = {
        "embed.weight": "esm.embeddings.word_embeddings.weight",
        "positions.weight": "esm.embeddings.position_embeddings.weight",
        "norm_before": "esm.embeddings.layer_norm",
        "norm": "esm.encoder.emb_layer_norm_after",
        "frequencies": "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq",
        "lm_head.dense": "lm_head.dense",
        "lm_head.norm": "lm_head.layer_norm",
        "lm_head.bias": "lm_head.bias",
        "contact_head": "esm.contact_head.regression",
    }
    for layer in range(CONFIGS[name]["layers"]):
        published |= {
            f"blocks.{layer}.attention_norm": f"esm.encoder.layer.{layer}.attention.LayerNorm",
            f"blocks.{layer}.attention.out": f"esm.encoder.layer.{layer}.attention.output.dense",
            f"blocks.{layer}.feed_forward_norm": f"esm.encoder.layer.{layer}.LayerNorm",
            f"blocks.{layer}.up": f"esm.encoder.layer.{layer}.intermediate.dense",
            f"blocks.{layer}.down": f"esm.encoder.layer.{layer}.output.dense",
        }
    for target, tensor in state.items():
        stem, _, part = target.rpartition(".")
        if "qkv" in target:
            attention = f"esm.encoder.layer.{target.split('.')[1]}.attention.self"
            original = torch.cat([source[f"{attention}.{each}.{part}"] for each in ("query", "key", "value")])
        else:
            original = source[published.get(target) or f"{published[stem]}.{part}"]
        assert torch.equal(tensor, original), target


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_give_the_same_model(name: str) -> None:
    ours, theirs = (
        import_weights(rows_of(name, source), source, wanted(CONFIGS[name])) for source in (hub(name), fair(name))
    )
    if name == "esm1b_tiny":  # fair-esm's ESM-1b file has a row for <mask> that its loader clears
        assert not torch.equal(ours["embed.weight"][32], theirs["embed.weight"][32])
        ours["embed.weight"], theirs["embed.weight"] = ours["embed.weight"][:32], theirs["embed.weight"][:32]
    assert equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_pooler_and_classifiers(name: str) -> None:
    heads = load_file(GOLDEN / name / "heads.safetensors")
    source = {**hub(name), **heads}
    config = hub_config(json.loads((GOLDEN / name / "config.json").read_text()), source)
    assert config == CONFIGS[name] | {"pooler": True, "sequence_labels": 3, "token_labels": 4}
    rows = rows_of(name, source)
    state = import_weights(rows, source, wanted(config))
    assert torch.equal(state["pooler.weight"], heads["esm.pooler.dense.weight"])
    assert torch.equal(state["sequence_classifier.dense.bias"], heads["classifier.dense.bias"])
    assert torch.equal(state["sequence_classifier.out.weight"], heads["classifier.out_proj.weight"])
    assert torch.equal(state["token_classifier.weight"], heads["classifier.weight"])
    assert equal(export_weights(rows, state), {key: source[key] for key in source.keys() - DROPPED[name]})


def esm2_with(*frequencies: str) -> dict[str, Tensor]:
    """The tiny ESM-2 with its rotary frequencies under other names."""
    source = {key: tensor for key, tensor in hub("esm2_tiny").items() if "inv_freq" not in key}
    return source | dict.fromkeys(frequencies, hub("esm2_tiny")[FREQUENCY.format(0)])


@pytest.mark.parametrize("stored", ["esm.rotary_embeddings.inv_freq", FREQUENCY.format("*")])
def test_frequencies_stored_once_as_transformers_5_does(stored: str) -> None:
    source = esm2_with(stored)
    rows = rows_of("esm2_tiny", source)
    state = import_weights(rows, source, wanted(CONFIGS["esm2_tiny"]))
    reference = import_weights(rows, hub("esm2_tiny"), wanted(CONFIGS["esm2_tiny"]))
    assert equal(state, reference)
    exported = export_weights(rows, state)  # in the one form that all versions read
    assert {key for key in exported if "inv_freq" in key} == {FREQUENCY.format(layer) for layer in range(4)}


def test_frequencies_stored_in_two_forms_or_only_partly() -> None:
    want = wanted(CONFIGS["esm2_tiny"])
    source = esm2_with("esm.rotary_embeddings.inv_freq", FREQUENCY.format("*"))
    with pytest.raises(KeyMapError, match="frequencies: filled by 2 rows"):
        check(rows_of("esm2_tiny", source), source, want)
    source = esm2_with(FREQUENCY.format(0), FREQUENCY.format(2))
    with pytest.raises(KeyMapError, match=r"inv_freq: not there, should be a copy of .*") as error:
        check(rows_of("esm2_tiny", source), source, want)
    assert "layer.1." in str(error.value)


def test_frequencies_not_stored() -> None:
    """Then the model keeps what it computes: they are left out of what is wanted."""
    source = esm2_with()
    want = wanted(CONFIGS["esm2_tiny"])
    assert not stores_frequencies(source)
    assert stores_frequencies(hub("esm2_tiny"))
    rows = rows_of("esm2_tiny", source)
    with pytest.raises(KeyMapError, match="frequencies: the model has it, nothing fills it"):
        check(rows, source, want)
    del want["frequencies"]
    assert import_weights(rows, source, want).keys() == want.keys()


def test_files_without_a_language_model_head() -> None:
    """As EsmModel saves them: no ``esm.`` before the names."""
    source = {key.removeprefix("esm."): tensor for key, tensor in hub("esm2_tiny").items() if "lm_head" not in key}
    config = CONFIGS["esm2_tiny"] | {"lm_head": False}
    assert hub_config(hub_config_json(config), source) == config
    rows = rows_of("esm2_tiny", source)
    state = import_weights(rows, source, wanted(config))
    dropped = {key.removeprefix("esm.") for key in DROPPED["esm2_tiny"]}
    assert equal(export_weights(rows, state), {key: source[key] for key in source.keys() - dropped})


@pytest.mark.parametrize("prefix", ["encoder.", ""])
def test_other_prefixes_of_fair_esm(prefix: str) -> None:
    stems = ("encoder.sentence_encoder.", "encoder.")
    source = {}
    for key, tensor in fair("esm2_tiny").items():
        stem = next((stem for stem in stems if key.startswith(stem)), "")
        source[(prefix if stem else "") + key.removeprefix(stem)] = tensor
    rows = rows_of("esm2_tiny", source)
    state = import_weights(rows, source, wanted(CONFIGS["esm2_tiny"]))
    assert equal(export_weights(rows, state), source)


def test_the_contact_head_of_esm1v_is_dropped() -> None:
    """The hub's files of ESM-1v (learned positions, no norm before) hold an untrained one."""
    source = {key: tensor for key, tensor in hub("esm1b_tiny").items() if "embeddings.layer_norm" not in key}
    config = hub_config(hub_config_json(CONFIGS["esm1b_tiny"] | {"norm_before": False}), source)
    assert config == CONFIGS["esm1b_tiny"] | {"norm_before": False, "contact_head": False}
    rows = key_map(source, rotary=False, contact_head=config["contact_head"])
    state = import_weights(rows, source, wanted(config))
    left_out = source.keys() - export_weights(rows, state).keys()
    assert left_out == DROPPED["esm1b_tiny"] | {f"esm.contact_head.regression.{part}" for part in ("weight", "bias")}
    assert {row.source for row in rows if isinstance(row, Drop) and "untrained" in row.why} < left_out


@pytest.mark.parametrize("name", NAMES)
def test_from_fair_esm_to_transformers(name: str, tmp_path: Path) -> None:
    """transformers finds every tensor in what we export, and reads the values that fair-esm's file holds."""
    from transformers import EsmForMaskedLM, EsmTokenizer

    source = fair(name)
    config = fair_config(source.extras, source.meta)
    rotary = config["learned_positions"] is None
    state = import_weights(rows_of(name, source), source, wanted(config))
    for file, text in hub_files(config).items():
        (tmp_path / file).write_text(text)
    exported = export_weights(hub_rows(rotary=rotary, contact_head=True), state)
    write_safetensors(tmp_path / "model.safetensors", exported, {"format": "pt"})
    model, report = EsmForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    # transformers makes a position table for rotary models too, and never reads it.
    unread = {"esm.embeddings.position_embeddings.weight"} if rotary else set()
    assert set(report["missing_keys"]) <= unread
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], exported[key]) for key in loaded.keys() & exported.keys())
    assert len(loaded.keys() & exported.keys()) >= len(exported) - config["layers"]
    assert EsmTokenizer.from_pretrained(tmp_path)("MK<mask>")["input_ids"] == [0, 20, 15, 32, 2]

    model.save_pretrained(tmp_path / "again")  # and what it saves is read as the same model
    again = open_tensors(tmp_path / "again" / "model.safetensors")
    assert equal(import_weights(rows_of(name, again), again, wanted(config)), state)


@pytest.mark.parametrize("name", NAMES)
def test_from_transformers_to_fair_esm(name: str, tmp_path: Path) -> None:
    import argparse

    import esm

    source = hub(name)
    config = hub_config(json.loads((GOLDEN / name / "config.json").read_text()), source.meta)
    state = import_weights(rows_of(name, source), source, wanted(config))
    exported = export_weights(fair_rows(rotary=config["learned_positions"] is None), state)
    write_fair_esm(tmp_path / f"{name}.pt", exported, config)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, _ = esm.pretrained.load_model_and_alphabet_local(tmp_path / f"{name}.pt")
    loaded = model.state_dict()
    rows = key_map(loaded, rotary=config["learned_positions"] is None, contact_head=True)
    state["embed.weight"] = state["embed.weight"].clone()
    if name == "esm1b_tiny":
        state["embed.weight"][32] = 0  # cleared by fair-esm's loader
    assert equal(import_weights(rows, loaded, wanted(config)), state)


def test_layouts_are_told_apart_by_names() -> None:
    for name in NAMES:
        assert recognise(hub(name)) == "hub"
        assert recognise(fair(name)) == "fair"
        assert recognise(wanted(CONFIGS[name])) == "plm"
        ours = wanted(CONFIGS[name])
        check(key_map(ours, rotary=True, contact_head=True), ours, ours)
    assert recognise(["bert.encoder.layer.0.attention.output.LayerNorm.weight"]) is None
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0\.attention\.output\.LayerNorm\.weight"):
        key_map(["bert.encoder.layer.0.attention.output.LayerNorm.weight"], rotary=True, contact_head=True)
