"""The configurations of ESM: both published forms mean the same, and what we cannot build is refused."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import CONFIGS, GOLDEN, NAMES, fair, hub

from plm import vocabularies
from plm.models import esm
from plm_weights import CheckpointError, open_tensors
from plm_weights.esm import MASK, PAD, VOCABULARY, fair_config, hub_config, hub_config_json, hub_files


def test_one_vocabulary() -> None:
    """What is written into files, what the tokenizer makes and what the network counts on are the same numbers."""
    assert vocabularies.ESM == VOCABULARY
    assert len(VOCABULARY) == esm.VOCABULARY
    assert [VOCABULARY[i] for i in (esm.CLS, esm.PAD, esm.EOS, esm.MASK)] == ["<cls>", "<pad>", "<eos>", "<mask>"]
    assert (PAD, MASK) == (esm.PAD, esm.MASK)


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
