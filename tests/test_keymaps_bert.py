"""The key map of BERT: every published form in and out, tensor for tensor, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from checkpoints import equal, fair, hub
from oracle_bert import CASES, GOLDEN, build_bert
from safetensors.torch import load_file
from torch import Tensor

from plm.models.bert import BERT, Config
from plm_weights import CheckpointError, KeyMapError, check, export_weights, import_weights
from plm_weights.bert import hub_config, hub_config_json, hub_files, hub_rows, key_map, recognise

IGBERT = {"vocabulary": 30, "layers": 2, "channels": 40, "heads": 5, "feed_forward": 72, "positions": 48, "types": 2}
PROTBERT = {"vocabulary": 30, "layers": 3, "channels": 48, "heads": 4, "feed_forward": 96, "positions": 64, "types": 2}
ALL_HEADS: dict[str, Any] = {"norm_eps": 1e-12, "lm_head": True, "pooler": True, "relation_head": True}
CONFIGS: dict[str, dict[str, Any]] = {"igbert_tiny": IGBERT | ALL_HEADS, "protbert_tiny": PROTBERT | ALL_HEADS}
PUBLISHED = {"layers": 30, "channels": 1024, "heads": 16, "feed_forward": 4096, "positions": 40000}
HEADS = ("bert.pooler.", "cls.predictions.", "cls.seq_relationship.")
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stored(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "model.safetensors")


def settings_of(name: str) -> dict[str, Any]:
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    assert isinstance(settings, dict)
    return settings


def wanted(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of our network."""
    with torch.device("meta"):
        return BERT(Config(**config)).state_dict()


def imported(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return import_weights(key_map(source, config), source, wanted(config))


def without(source: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in source.items() if not key.startswith(starts)}


def test_both_ways(name: str) -> None:
    source, config = stored(name), CONFIGS[name]
    assert hub_config(settings_of(name), source) == config
    assert equal(export_weights(hub_rows(config), imported(source, config)), source)


def test_every_imported_tensor_is_the_right_one(name: str) -> None:
    """Values, against the published names spelled out: two swapped rows of equal shape would pass a round trip."""
    source, state = stored(name), imported(stored(name), CONFIGS[name])
    published = {
        "embed": "bert.embeddings.word_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "types": "bert.embeddings.token_type_embeddings",
        "embed_norm": "bert.embeddings.LayerNorm",
        "pooler": "bert.pooler.dense",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        "lm_head": "cls.predictions",
        "relation_head": "cls.seq_relationship",
    }
    for layer in range(CONFIGS[name]["layers"]):
        theirs = f"bert.encoder.layer.{layer}"
        published |= {
            f"blocks.{layer}.attention.out": f"{theirs}.attention.output.dense",
            f"blocks.{layer}.attention_norm": f"{theirs}.attention.output.LayerNorm",
            f"blocks.{layer}.up": f"{theirs}.intermediate.dense",
            f"blocks.{layer}.down": f"{theirs}.output.dense",
            f"blocks.{layer}.feed_forward_norm": f"{theirs}.output.LayerNorm",
        }
    for target, tensor in state.items():
        stem, _, part = target.rpartition(".")
        if stem.endswith("qkv"):
            attention = f"bert.encoder.layer.{target.split('.')[1]}.attention.self"
            original = torch.cat([source[f"{attention}.{each}.{part}"] for each in ("query", "key", "value")])
        else:
            original = source[f"{published[stem]}.{part}"]
        assert torch.equal(tensor, original), target


def legacy(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of files that were converted from TensorFlow."""
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = dict(source)
    for new, old in norms.items():
        renamed = {key.replace(new, old): tensor for key, tensor in renamed.items()}
    return renamed


def buffers(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers and copies that ``.bin`` files hold beside the weights."""
    return {
        **source,
        "bert.embeddings.position_ids": torch.arange(9)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 9, dtype=torch.int64),
        DECODER: source[WORDS],
        "cls.predictions.decoder.bias": source["cls.predictions.bias"],
    }


def parallel(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As saved from inside ``DataParallel``."""
    return {f"module.{key}": tensor for key, tensor in source.items()}


@pytest.mark.parametrize("form", [legacy, buffers, parallel, lambda x: parallel(legacy(buffers(x)))])
def test_other_forms_hold_the_same_model(name: str, form: Any) -> None:
    source, config = stored(name), CONFIGS[name]
    other = form(source)
    assert hub_config(settings_of(name), other) == config
    state = imported(other, config)
    assert equal(state, imported(source, config))
    assert equal(export_weights(hub_rows(config), state), source)  # in the one form that all versions read


@pytest.mark.parametrize("prefix", ["bert.", "", "module.bert.", "module."])
def test_an_encoder_alone(name: str, prefix: str) -> None:
    source = without(stored(name), *HEADS)
    config = CONFIGS[name] | {"lm_head": False, "pooler": False, "relation_head": False}
    other = {key.replace("bert.", prefix, 1): tensor for key, tensor in source.items()}
    assert hub_config(settings_of(name), other) == config
    assert equal(imported(other, config), imported(source, config))
    assert equal(export_weights(hub_rows(config, prefix), imported(other, config)), other)


@pytest.mark.parametrize("head", ["pooler", "lm_head", "relation_head"])
def test_any_head_may_be_missing(name: str, head: str) -> None:
    """Each with the tensors of its own, and the relation head with the pooler that it reads."""
    gone = {"pooler": ("bert.pooler.", "cls.seq_relationship."), "lm_head": ("cls.predictions.",)}
    source = without(stored(name), *gone.get(head, ("cls.seq_relationship.",)))
    config = hub_config(settings_of(name), source)
    assert not config[head]
    assert equal(export_weights(hub_rows(config), imported(source, config)), source)


def test_a_head_without_its_input(name: str) -> None:
    source = without(stored(name), "bert.pooler.")
    with pytest.raises(ValueError, match="a relation head without a pooler"):
        build_bert(source, source, settings_of(name), torch.float32)


def test_a_decoder_of_its_own_is_refused(name: str) -> None:
    for copy in (DECODER, "cls.predictions.decoder.bias"):
        source = buffers(stored(name))
        source[copy] = source[copy] + 1
        with pytest.raises(KeyMapError, match=f"{copy}: its values are not those of"):
            imported(source, CONFIGS[name])


def test_norms_in_both_forms_are_refused(name: str) -> None:
    with pytest.raises(KeyMapError, match=r"embed_norm\.weight: filled by 2 rows"):
        imported(stored(name) | legacy(stored(name)), CONFIGS[name])


def test_unknown_tensors_are_refused(name: str) -> None:
    source = stored(name) | {"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(9, 2)}
    with pytest.raises(KeyMapError, match=r"distance_embedding\.weight: in no row of the key map"):
        imported(source, CONFIGS[name])


def test_absent_and_null_settings_have_the_defaults_of_transformers() -> None:
    """ProtBert's file says nothing of eps and model type; in torch a norm would have 1e-5."""
    settings = settings_of("protbert_tiny")
    assert len(settings) == 12 and not settings.keys() & {"layer_norm_eps", "model_type", "pad_token_id"}
    optional = ("layer_norm_eps", "model_type", "hidden_act", "position_embedding_type", "type_vocab_size")
    settings |= dict.fromkeys(optional)
    assert hub_config(settings, stored("protbert_tiny")) == CONFIGS["protbert_tiny"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "roberta"),
        ("vocab_size", 30522),
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_size", None),
        ("hidden_size", "40"),
        ("num_hidden_layers", 0),
        ("layer_norm_eps", "tiny"),
    ],
)
def test_other_kinds_of_bert_are_refused(setting: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=setting):
        hub_config(settings_of("igbert_tiny") | {setting: value}, stored("igbert_tiny"))


@pytest.mark.parametrize("rows", [29, 31])
def test_another_vocabulary_than_the_configuration_says(name: str, rows: int) -> None:
    source = stored(name)
    source[WORDS] = torch.zeros(rows, source[WORDS].shape[1])
    with pytest.raises(KeyMapError, match=rf"embed\.weight: the model has \(30, .* gives \({rows}, "):
        build_bert(source, source, settings_of(name), torch.float32)


def test_config_json_both_ways(name: str) -> None:
    source = stored(name)
    for config in (CONFIGS[name], CONFIGS[name] | {"norm_eps": 1e-6, "types": 1, "positions": 40000}):
        written = json.loads(hub_files(config, "bfloat16")["config.json"])
        assert written == hub_config_json(config, "bfloat16") and written["torch_dtype"] == "bfloat16"
        assert hub_config(written, source) == config


def test_text_files_are_the_published_ones(name: str) -> None:
    files = hub_files(CONFIGS[name])
    assert files.keys() == {"config.json", "vocab.txt", "tokenizer_config.json"}
    assert files["vocab.txt"] == (GOLDEN / name / "vocab.txt").read_text()
    assert json.loads(files["tokenizer_config.json"])["do_lower_case"] is False


def test_the_size_of_protbert() -> None:
    """The published file of 1,684,058,277 bytes holds 420,984,864 float32 values (and 119 kB of names)."""
    config = CONFIGS["protbert_tiny"] | PUBLISHED
    exported = export_weights(hub_rows(config), wanted(config))
    assert sum(tensor.numel() for tensor in exported.values()) == 420_984_864
    check(key_map(exported, config), exported, wanted(config))


def test_layouts_are_told_apart_by_names() -> None:
    for name in CASES:
        ours = wanted(CONFIGS[name])
        assert recognise(stored(name)) == recognise(legacy(stored(name))) == "hub"
        assert recognise(ours) == "plm"
        check(key_map(ours, CONFIGS[name]), ours, ours)
        assert recognise(parallel(stored(name))) == recognise(without(stored(name), *HEADS)) == "hub"
    for source in (hub("esm1b_tiny"), hub("esm2_tiny"), fair("esm1b_tiny"), fair("esm2_tiny")):
        assert recognise(source) is None
    assert recognise(load_file(GOLDEN.parent / "t5" / "ankh3_tiny" / "model.safetensors")) is None
    with pytest.raises(CheckpointError, match=r"not those of BERT in any known layout: shared\.weight"):
        key_map(["shared.weight"], {})
