"""Key maps: both published ESM formats in and out tensor for tensor, and every kind of disagreement is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from plm_weights import (
    CheckpointError,
    Drop,
    KeyMap,
    KeyMapError,
    Row,
    TensorSource,
    Tied,
    check,
    explain,
    export_weights,
    import_weights,
    open_tensors,
    read_fair_esm,
    write_fair_esm,
    write_safetensors,
)
from plm_weights.esm import (
    VOCABULARY,
    detect,
    fair_config,
    fair_rows,
    hub_config,
    hub_config_json,
    hub_files,
    hub_rows,
    key_map,
    stores_frequencies,
)

GOLDEN = Path(__file__).parent / "golden" / "esm"
NAMES = ("esm1b_tiny", "esm2_tiny")
PLAIN: dict[str, Any] = {"token_dropout": True, "norm_eps": 1e-5, "lm_head": True, "contact_head": True}
PLAIN |= {"pooler": False, "sequence_labels": None, "token_labels": None}
ESM1B = {"layers": 3, "channels": 24, "heads": 3, "feed_forward": 52, "learned_positions": 1026, "norm_before": True}
ESM2 = {"layers": 4, "channels": 32, "heads": 4, "feed_forward": 128, "learned_positions": None, "norm_before": False}
CONFIGS: dict[str, dict[str, Any]] = {"esm1b_tiny": ESM1B | PLAIN, "esm2_tiny": ESM2 | PLAIN}


def wanted(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the ESM module, written out independently of the key maps."""
    c, f = config["channels"], config["feed_forward"]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (33, c)}

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    if config["learned_positions"] is None:
        shapes["frequencies"] = (c // config["heads"] // 2,)
    else:
        shapes["positions.weight"] = (config["learned_positions"], c)
    if config["norm_before"]:
        affine("norm_before", c)
    for layer in range(config["layers"]):
        block = f"blocks.{layer}"
        affine(f"{block}.attention_norm", c)
        affine(f"{block}.attention.qkv", 3 * c, c)
        affine(f"{block}.attention.out", c, c)
        affine(f"{block}.feed_forward_norm", c)
        affine(f"{block}.up", f, c)
        affine(f"{block}.down", c, f)
    affine("norm", c)
    if config["lm_head"]:
        affine("lm_head.dense", c, c)
        affine("lm_head.norm", c)
        shapes["lm_head.bias"] = (33,)
    if config["contact_head"]:
        affine("contact_head", 1, config["layers"] * config["heads"])
    if config["pooler"]:
        affine("pooler", c, c)
    if config["sequence_labels"]:
        affine("sequence_classifier.dense", c, c)
        affine("sequence_classifier.out", config["sequence_labels"], c)
    if config["token_labels"]:
        affine("token_classifier", config["token_labels"], c)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def rows_of(name: str, names: Mapping[str, Tensor]) -> KeyMap:
    return key_map(names, rotary=CONFIGS[name]["learned_positions"] is None, contact_head=True)


def hub(name: str) -> TensorSource:
    return open_tensors(GOLDEN / name / "model.safetensors")


def fair(name: str) -> TensorSource:
    return read_fair_esm(GOLDEN / name / f"{name}.pt")


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


# ------------------------------------------------------------------------------------------------ published formats

DROPPED = {
    "esm1b_tiny": {"esm.embeddings.position_ids"},
    "esm2_tiny": {"esm.embeddings.position_ids", "esm.embeddings.position_embeddings.weight"},
}


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


FREQUENCY = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"


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


# ------------------------------------------------------------------------------------------------ faults


def lose(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda source: source.pop(key)


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda source: source.update({key: tensor})


def lose_layers(*layers: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda source: [source.pop(key) for key in list(source) if any(f"layer.{each}." in key for each in layers)]


KEY = "esm.encoder.layer.2.attention.self.key.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "missing": (lose(KEY), [f"{KEY}: not there, needed for blocks.2.attention.qkv.weight"]),
    "missing once": (
        lose("esm.encoder.emb_layer_norm_after.bias"),
        ["esm.encoder.emb_layer_norm_after.bias: not there, needed for norm.bias"],
    ),
    "optional to the table, but not to the model": (
        lose("lm_head.bias"),
        ["lm_head.bias: the model has it, nothing fills it"],
    ),
    "extra": (put("esm.extra", torch.zeros(1)), ["esm.extra: in no row of the key map"]),
    "extra layer number": (
        put("esm.encoder.layer.07.LayerNorm.bias", torch.zeros(32)),
        ["esm.encoder.layer.07.LayerNorm.bias: in no row of the key map"],
    ),
    "other shape": (
        put("lm_head.bias", torch.zeros(34)),
        ["lm_head.bias: the model has (33,), lm_head.bias gives (34,)"],
    ),
    "one of three of another shape": (
        put(KEY, torch.zeros(31, 32)),
        [
            f"{KEY.replace('key', 'query')}: to be stacked, but unlike: (32, 32) float32, (31, 32) float32, "
            "(32, 32) float32"
        ],
    ),
    "one of three of another dtype": (
        put(KEY, torch.zeros(32, 32, dtype=torch.float16)),
        [
            f"{KEY.replace('key', 'query')}: to be stacked, but unlike: (32, 32) float32, (32, 32) float16, "
            "(32, 32) float32"
        ],
    ),
    "copy of another shape": (
        put(FREQUENCY.format(3), torch.zeros(5)),
        [f"{FREQUENCY.format(3)}: (5,) float32, but should be a copy of {FREQUENCY.format(0)}, (4,) float32"],
    ),
    "copy with other values": (
        put(FREQUENCY.format(3), torch.zeros(4)),
        [f"{FREQUENCY.format(3)}: its values are not those of {FREQUENCY.format(0)}, of which it should be a copy"],
    ),
    "head not tied": (
        put("lm_head.decoder.weight", torch.zeros(33, 32)),
        [
            "lm_head.decoder.weight: its values are not those of esm.embeddings.word_embeddings.weight, of which it "
            "should be a copy"
        ],
    ),
    "a layer lost within": (
        lose_layers(2),
        [
            f"blocks.2.{name}.{part}: the model has it, nothing fills it"
            for name in ("attention.out", "attention.qkv", "attention_norm", "down", "feed_forward_norm", "up")
            for part in ("bias", "weight")
        ],
    ),
    "layers lost at the end": (
        lose_layers(2, 3),
        [
            f"blocks.{{i}}.{name}.{part}: the model has it, nothing fills it, i = 2..3"
            for name in ("attention.out", "attention.qkv", "attention_norm", "down", "feed_forward_norm", "up")
            for part in ("bias", "weight")
        ],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_named_and_nothing_else(fault: str) -> None:
    source = dict(hub("esm2_tiny"))
    seed, lines = FAULTS[fault]
    seed(source)
    with pytest.raises(KeyMapError) as error:
        import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    first, *named, advice = str(error.value).splitlines()
    assert first == "The checkpoint and the model disagree:"
    assert named == [f"  {line}" for line in lines]
    assert advice.startswith("Check that the checkpoint is complete")


def test_a_model_with_fewer_layers_than_the_checkpoint() -> None:
    source = hub("esm2_tiny")
    with pytest.raises(KeyMapError) as error:
        check(rows_of("esm2_tiny", source), source.meta, wanted(CONFIGS["esm2_tiny"] | {"layers": 1}))
    lines = str(error.value).splitlines()
    assert "  blocks.{i}.up.weight: a row fills it, the model has no such tensor, i = 1..3" in lines
    assert "  contact_head.weight: the model has (1, 4), esm.contact_head.regression.weight gives (1, 16)" in lines
    assert len(lines) == 2 + 12 + 1


def test_all_faults_come_at_once_and_sorted() -> None:
    source = dict(hub("esm2_tiny"))
    lose(KEY)(source)
    put("a.name", torch.zeros(1))(source)
    put("lm_head.bias", torch.zeros(34))(source)
    with pytest.raises(KeyMapError) as error:
        import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]] == [
        "a.name",
        KEY,
        "lm_head.bias",
    ]


def test_faults_are_found_before_data_is_read() -> None:
    meta = dict(hub("esm2_tiny").meta)
    del meta["lm_head.bias"]

    def read(name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    source = TensorSource(meta, {}, (), read)
    with pytest.raises(KeyMapError, match=r"lm_head\.bias"):
        import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    complete = TensorSource(hub("esm2_tiny").meta, {}, (), read)
    check(rows_of("esm2_tiny", complete), complete, wanted(CONFIGS["esm2_tiny"]))


def test_what_is_dropped_is_not_read_and_the_rest_once() -> None:
    original = hub("esm2_tiny")
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return original[name]

    source = TensorSource(original.meta, {}, (), read)
    import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    untied = [name for name in reads if "inv_freq" not in name]
    assert sorted(untied) == sorted(set(untied))
    assert set(reads) == original.keys() - DROPPED["esm2_tiny"]


def a_to_b(*rows: Row | Drop | Tied, names: str = "a", want: str = "b") -> str:
    """What is said about a table between tensors of one element."""
    source, target = ({name: torch.ones(1) for name in each.split()} for each in (names, want))
    with pytest.raises(KeyMapError) as error:
        check(rows, source, target)
    return "\n".join(line.strip() for line in str(error.value).splitlines()[1:-1])


def test_faults_of_tables() -> None:
    ab = Row("a", "b")
    assert a_to_b(ab, Row("c", "b"), names="a c") == "b: filled by 2 rows"
    assert a_to_b(ab, Row("a", "c"), want="b c") == "a: read by 2 rows"
    assert a_to_b(ab, Drop("a", "why")) == "a: read by 2 rows"
    assert a_to_b(ab, Tied("x", "c"), names="a x") == "x: should be a copy of c, which is not there"
    assert a_to_b(ab, Row("x.{i}", "y.{i}")) == "x.{i}: nothing has such a name, needed for y.{i}"
    assert a_to_b(ab, Row("x", "y")) == "x: not there, needed for y\ny: a row fills it, the model has no such tensor"
    assert a_to_b(ab, Tied("c", "a")) == "c: not there, should be a copy of a"
    assert a_to_b(ab, Row("c", "d"), names="a c") == "d: a row fills it, the model has no such tensor"
    assert a_to_b(Row("a", ("b", "c")), want="b c") == "a: shape (1,), to be unstacked into 2 tensors"
    assert "Wrong shape: expected 2 dims" in a_to_b(Row("a", "b", "x y -> y x"))
    both = (Row("x.{i}.a", "x.{i}.b"), Row("x.{i}.c", "x.{i}.d"))
    assert a_to_b(*both, names="x.0.a x.1.a x.1.c", want="x.0.b x.1.b x.0.d x.1.d") == (
        "x.0.c: not there, needed for x.0.d"
    )
    with pytest.raises(ValueError, match="same holes"):
        Row("a.{i}", "b.{j}")


def test_faults_of_an_export() -> None:
    rows: KeyMap = (Row(("a", "c"), "b"), Row("d", "e"))
    with pytest.raises(KeyMapError) as error:
        export_weights(rows, {"b": torch.ones(3), "x": torch.ones(1)})
    assert str(error.value).splitlines()[1:-1] == [
        "  b: shape (3,), to be unstacked into 2 tensors",
        "  e: not there, needed for d",
        "  x: in no row of the key map",
    ]


# ------------------------------------------------------------------------------------------------ the language


def both_ways(rows: KeyMap, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Import with whatever shapes come out, and prove the way back."""
    state = import_weights(rows, source, imported_shapes(rows, source))
    assert equal(export_weights(rows, state), source)
    return state


def imported_shapes(rows: KeyMap, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets of a table, by reading the table turned round from right to left."""
    turned = [
        Row(row.target, row.source, "->".join(reversed(row.view.split("->"))), row.sizes)
        for row in rows
        if isinstance(row, Row)
    ]
    return export_weights(tuple(turned), source)


def test_two_numbers_in_one_name() -> None:
    """As T5 has them: ``encoder.block.{i}.layer.0`` is a name with one hole and one digit; some have two holes."""
    rows: KeyMap = (Row("block.{i}.layer.{j}.norm", "norms.{j}.{i}"), Row("block.{i}.layer.0.q", "blocks.{i}.q"))
    source = {f"block.{i}.layer.{j}.norm": torch.tensor([i, j]) for i in (0, 1, 10) for j in (0, 1)}
    source |= {f"block.{i}.layer.0.q": torch.tensor([i]) for i in (0, 1, 10)}
    state = both_ways(rows, source)
    assert torch.equal(state["norms.1.10"], torch.tensor([10, 1]))


def test_a_name_with_the_same_number_twice() -> None:
    rows: KeyMap = (Row("a.{i}.b.{i}", "c.{i}"), Drop("a.0.b.1", "the numbers differ"))
    source = {"a.0.b.0": torch.zeros(1), "a.1.b.1": torch.ones(1), "a.0.b.1": torch.ones(2)}
    state = import_weights(rows, source, {"c.0": torch.zeros(1), "c.1": torch.zeros(1)})
    assert torch.equal(state["c.1"], torch.ones(1))


def test_the_sharded_projection_of_progen2() -> None:
    """One published matrix holds, for each of 8 shards, its part of q, v and k in this order (salesforce/progen,
    modeling_progen.py): the row gives what its forward computes."""
    c, heads, shards = 64, 16, 8
    weight, x = torch.randn(3 * c, c, generator=torch.Generator().manual_seed(0)), torch.ones(2, c)
    targets = tuple(f"blocks.{{i}}.{name}" for name in "qvk")
    row = Row("h.{i}.qkv", targets, "(shard three o) i -> three (shard o) i", {"three": 3, "shard": shards})
    state = both_ways((row,), {"h.0.qkv": weight})
    projected = rearrange(x @ weight.T, "n (shard rest) -> n shard rest", shard=shards)
    for name, part in zip("qvk", projected.split(c // shards, dim=-1), strict=True):
        published = rearrange(part, "n shard (h d) -> n (shard h) d", h=heads // shards)
        torch.testing.assert_close((x @ state[f"blocks.0.{name}"].T).unflatten(-1, (heads, -1)), published)


def test_copies_per_layer() -> None:
    rows: KeyMap = (
        Row("layer.{i}.w", "blocks.{i}.w"),
        Row("layer.0.table", "table"),
        Tied("layer.{i}.table", "layer.0.table"),
        Tied("again", "layer.0.table", optional=True),
    )
    table = torch.arange(3.0)
    source = {f"layer.{i}.w": torch.tensor([i]) for i in range(12)} | {f"layer.{i}.table": table for i in range(12)}
    want = {f"blocks.{i}.w": torch.zeros(1) for i in range(12)} | {"table": table}
    state = import_weights(rows, source | {"again": table}, want)
    assert equal(export_weights(rows, state), source)
    del source["layer.7.table"]
    with pytest.raises(KeyMapError, match=r"layer\.7\.table: not there"):
        check(rows, source, state)


NUMBERS = st.sampled_from([(), (0,), (0, 1), (0, 1, 2, 11)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    layers=NUMBERS.filter(bool),
    parts=st.integers(1, 4),
    targets=st.integers(1, 4),
    view=st.sampled_from(["", "fuse", "transpose"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_any_row_has_an_inverse(
    layers: tuple[int, ...], parts: int, targets: int, view: str, shape: tuple[int, int]
) -> None:
    sources = tuple(f"a.{{i}}.{part}" for part in range(parts))
    if parts > 1:
        patterns = {"": "", "fuse": "p x y -> (p x) y", "transpose": "p x y -> p y x"}
    else:
        patterns = {"": "", "fuse": "x y -> (x y)", "transpose": "x y -> y x"}
    rows: KeyMap = (Row(sources, "b.{i}", patterns[view], {"x": shape[0], "y": shape[1]} if view == "fuse" else {}),)
    random = torch.Generator().manual_seed(0)
    source = {f"a.{i}.{part}": torch.randn(shape, generator=random) for i in layers for part in range(parts)}
    state = both_ways(rows, source)
    assert state.keys() == {f"b.{i}" for i in layers}

    unstacked: KeyMap = (Row("a.{i}", tuple(f"b.{{i}}.{target}" for target in range(targets))),)
    if targets > 1:
        both_ways(unstacked, {f"a.{i}": torch.randn((targets, *shape), generator=random) for i in layers})


def test_a_table_explained() -> None:
    rows: KeyMap = (
        Row(("q", "k"), "qk", "two o i -> (two o) i"),
        Row("a", "b"),
        Tied("head", "a", "the head shares the embedding"),
        Tied("tail", "a"),
        Drop("ids", "computed"),
    )
    assert explain(rows) == [
        ("q, k", "qk", "two o i -> (two o) i"),
        ("a", "b", "as it is"),
        ("head", "", "equal to a: the head shares the embedding"),
        ("tail", "", "equal to a"),
        ("ids", "", "dropped: computed"),
    ]


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_give_the_same_configuration(name: str) -> None:
    published = json.loads((GOLDEN / name / "config.json").read_text())
    assert hub_config(published, hub(name).meta) == CONFIGS[name]
    source = fair(name)
    assert fair_config(source.extras, source.meta) == CONFIGS[name]
    del published["transformers_version"]
    assert hub_config_json(CONFIGS[name]) == published
    assert hub_files(CONFIGS[name])["vocab.txt"] == (GOLDEN / name / "vocab.txt").read_text()


def test_fair_esm_without_its_regression_has_no_contact_head() -> None:
    source = open_tensors(GOLDEN / "esm2_tiny" / "esm2_tiny.pt")
    assert fair_config(source.extras, source.meta) == CONFIGS["esm2_tiny"] | {"contact_head": False}


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    from transformers import EsmConfig

    given = {"model_type": "esm", "vocab_size": 33}
    theirs, ours = EsmConfig(**given), hub_config(given, {})
    for key, name in {
        "layers": "num_hidden_layers",
        "channels": "hidden_size",
        "heads": "num_attention_heads",
        "feed_forward": "intermediate_size",
        "learned_positions": "max_position_embeddings",
        "token_dropout": "token_dropout",
        "norm_eps": "layer_norm_eps",
    }.items():
        assert ours[key] == getattr(theirs, name), key
    assert theirs.position_embedding_type == "absolute"
    assert ours["norm_before"] is bool(theirs.emb_layer_norm_before)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": None}, "model_type is None"),
        ({"vocab_size": 35}, "vocab_size is 35 in the configuration; only 33"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu' in the configuration; only 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"is_folding_model": True}, "is_folding_model is True"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' or 'rotary'"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers is '6' in the configuration, wanted int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 in the configuration, wanted 1 or more"),
        ({"hidden_size": 30}, "30 channels do not divide into 4 heads of even size"),
        ({"hidden_size": 36}, "36 channels do not divide into 4 heads of even size"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps is '1e-5' in the configuration, wanted float"),
        ({"token_dropout": 1}, "token_dropout is 1 in the configuration, wanted bool"),
        ({"mask_token_id": 31}, "mask_token_id is 31"),
        ({"hidden_size": [320]}, "hidden_size is a list"),
    ],
)
def test_a_hub_configuration_that_cannot_be_used(changed: dict[str, object], says: str) -> None:
    published = json.loads((GOLDEN / "esm2_tiny" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=says):
        hub_config(published | changed, hub("esm2_tiny").meta)


def test_a_fair_esm_configuration_that_cannot_be_used() -> None:
    source = fair("esm1b_tiny")
    args = source.extras["args"]
    assert isinstance(args, dict)
    for extras, says in (
        ({}, "no model arguments under 'args' or 'cfg'"),
        ({"cfg": {"model": 3}}, "no model arguments"),
        ({"args": args | {"arch": "protein_bert_base"}}, "arch is 'protein_bert_base'"),
        ({"args": args | {"arch": "msa_transformer"}}, "only 'roberta_large' is supported"),
        ({"args": {"arch": "roberta_large"}}, "the configuration has no max_positions"),
        ({"args": args | {"encoder_layers": 3.0}}, "encoder_layers is 3.0 in the configuration, wanted int"),
    ):
        with pytest.raises(CheckpointError, match=says):
            fair_config(extras, source.meta)
    embedding = "encoder.sentence_encoder.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=r"\(35, 24\); wanted 33 rows"):
        fair_config(source.extras, source.meta | {embedding: torch.empty(35, 24, device="meta")})


def test_layouts_are_told_apart_by_names() -> None:
    for name in NAMES:
        assert detect(hub(name)) == "hub"
        assert detect(fair(name)) == "fair"
        assert detect(wanted(CONFIGS[name])) == "plm"
        ours = wanted(CONFIGS[name])
        check(key_map(ours, rotary=True, contact_head=True), ours, ours)
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0\.attention\.output\.LayerNorm\.weight"):
        detect(["bert.encoder.layer.0.attention.output.LayerNorm.weight"])


def test_the_vocabulary() -> None:
    assert list(VOCABULARY) == (GOLDEN / "esm2_tiny" / "vocab.txt").read_text().split("\n")
