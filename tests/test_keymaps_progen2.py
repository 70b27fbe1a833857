"""The key map of ProGen2: every published form in and out, tensor for tensor, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import equal
from torch import Tensor

from plm.models.progen2 import Config, ProGen2
from plm_weights import CheckpointError, KeyMapError, export_weights, import_weights, open_tensors
from plm_weights.progen2 import hub_config, hub_files, hub_rows, key_map, no_original, original_masks, recognise

GOLDEN = Path(__file__).parent / "golden" / "progen2"
EPS = {"norm_eps": 1e-5}
CONFIGS: dict[str, dict[str, Any]] = {
    "half_rotary_buffers": EPS
    | {"vocabulary": 32, "outputs": 32, "layers": 3, "channels": 64, "heads": 8}
    | {"rotated": 4, "feed_forward": 256, "max_length": 64},
    "bin_fp16_large_vocab": EPS
    | {"vocabulary": 128, "outputs": 128, "layers": 2, "channels": 96, "heads": 16}
    | {"rotated": 4, "feed_forward": 384, "max_length": 48},
    "hub_port_asymmetric_vocab": EPS
    | {"vocabulary": 37, "outputs": 32, "layers": 2, "channels": 64, "heads": 16}
    | {"rotated": 4, "feed_forward": 256, "max_length": 48},
}
MASKS = (".attn.bias", ".attn.masked_bias")


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stored(name: str) -> dict[str, Tensor]:
    file = "pytorch_model.bin" if name.startswith("bin") else "model.safetensors"
    return dict(open_tensors(GOLDEN / name / file))


def settings_of(name: str) -> dict[str, Any]:
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    assert isinstance(settings, dict)
    return settings


def wanted(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of our network."""
    with torch.device("meta"):
        return ProGen2(Config(**config)).state_dict()


def imported(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return import_weights(key_map(source), source, wanted(config))


def trained(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in source.items() if not key.endswith(MASKS)}


def test_both_ways(name: str) -> None:
    source, config = stored(name), CONFIGS[name]
    assert hub_config(settings_of(name), source) == config
    exported = export_weights(hub_rows(), imported(source, config))
    assert equal(exported, trained(source))
    assert equal(imported(exported, config), imported(source, config))


def test_every_imported_tensor_is_the_right_one(name: str) -> None:
    """Values, against the published names spelled out: two swapped rows of equal shape would pass a round trip."""
    source, config = stored(name), CONFIGS[name]
    state, c, heads = imported(source, config), config["channels"], config["heads"]
    published = {"embed": "transformer.wte", "norm": "transformer.ln_f", "lm_head": "lm_head"}
    for layer in range(config["layers"]):
        theirs = f"transformer.h.{layer}"
        published |= {
            f"blocks.{layer}.norm": f"{theirs}.ln_1",
            f"blocks.{layer}.attention.out": f"{theirs}.attn.out_proj",
            f"blocks.{layer}.feed_forward.up": f"{theirs}.mlp.fc_in",
            f"blocks.{layer}.feed_forward.down": f"{theirs}.mlp.fc_out",
        }
        # Row by row, as modeling_progen.py reads them: heads // 8 of each kind in a shard, kinds in the order q, v, k.
        fused, ours = source[f"{theirs}.attn.qkv_proj.weight"], state.pop(f"blocks.{layer}.attention.qvk.weight")
        size, per_shard = c // heads, heads // 8
        for kind in range(3):
            for head in range(heads):
                shard, place = divmod(head, per_shard)
                start = shard * 3 * c // 8 + kind * c // 8 + place * size
                at = kind * c + head * size
                assert torch.equal(ours[at : at + size], fused[start : start + size]), (layer, kind, head)
    assert {target.rpartition(".")[0] for target in state} == published.keys()
    for target, tensor in state.items():
        stem, _, part = target.rpartition(".")
        assert torch.equal(tensor, source[f"{published[stem]}.{part}"]), target


@pytest.mark.parametrize("heads", [4, 12, 20])
def test_heads_that_are_no_multiple_of_the_shards(heads: int) -> None:
    """The ports accept them: the shards of a kind end to end, then cut into heads, which may straddle shards."""
    c = 40 * heads
    config = {**CONFIGS["half_rotary_buffers"], "channels": c, "heads": heads, "feed_forward": 8, "layers": 1}
    source = export_weights(hub_rows(), {k: torch.randn(x.shape) for k, x in wanted(config).items()})
    settings = settings_of("half_rotary_buffers") | {"n_embd": c, "n_head": heads, "n_inner": 8, "n_layer": 1}
    assert hub_config(settings, source) == config
    fused = source["transformer.h.0.attn.qkv_proj.weight"]
    shards = fused.split(3 * c // 8)
    in_order = torch.cat([torch.cat([shard.split(c // 8)[kind] for shard in shards]) for kind in range(3)])
    assert torch.equal(imported(source, config)["blocks.0.attention.qvk.weight"], in_order)
    assert f"a multiple of 8 heads, and this has {heads}" in str(no_original(config))


def test_masks_are_dropped_by_their_whole_name(name: str) -> None:
    """``attn.bias`` is no bias: others that end alike are weights."""
    source = stored(name) | original_masks(CONFIGS[name])
    state = imported(source, CONFIGS[name])
    assert not any(tensor.dtype == torch.bool for tensor in state.values())
    for stray in ("transformer.h.0.attn.out_proj.bias", "transformer.attn.bias", "attn.masked_bias"):
        with pytest.raises(KeyMapError, match=rf"{stray}: in no row of the key map"):
            imported(source | {stray: torch.zeros(64)}, CONFIGS[name])


@pytest.mark.parametrize("lost", ["lm_head.weight", "lm_head.bias", "transformer.ln_f.bias", "transformer.wte.weight"])
def test_nothing_may_be_missing(name: str, lost: str) -> None:
    """The original takes random numbers for a head that is not there."""
    source = stored(name)
    del source[lost]
    with pytest.raises(KeyMapError, match=lost.replace(".", r"\.")):
        imported(source, CONFIGS[name])


def test_a_transposed_matrix_is_refused(name: str) -> None:
    source = stored(name)
    key = "transformer.h.1.mlp.fc_in.weight"
    source[key] = source[key].T.contiguous()
    with pytest.raises(KeyMapError, match=r"blocks\.1\.feed_forward\.up\.weight: the model has"):
        imported(source, CONFIGS[name])


def test_configurations_saved_again_by_later_versions() -> None:
    """Sorted keys, and more of them: defaults of the class that mean nothing, and nulls."""
    settings = settings_of("half_rotary_buffers")
    more = {"n_ctx": 2048, "n_inner": None, "resid_pdrop": 0.0, "scale_attn_weights": True, "_name_or_path": "x"}
    again = dict(sorted((settings | more).items()))
    assert hub_config(again, stored("half_rotary_buffers")) == CONFIGS["half_rotary_buffers"]


def test_the_ports_names_of_sizes() -> None:
    name = "hub_port_asymmetric_vocab"
    settings = settings_of(name)
    assert not {"n_embd", "vocab_size"} & settings.keys()
    both = settings | {"n_embd": 64, "vocab_size": 32}  # some ports have both; a vocabulary of its own counts first
    assert hub_config(both, stored(name)) == CONFIGS[name]


@pytest.mark.parametrize("given", [64, 9])
def test_more_rotated_channels_than_a_head_has(given: int) -> None:
    """The original cuts a head's channels at ``rotary_dim``, and takes the frequencies from what is left."""
    settings = settings_of("half_rotary_buffers") | {"rotary_dim": given}
    assert hub_config(settings, {})["rotated"] == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "codegen"}, "model_type is 'codegen'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"n_embd": None}, "has no embed_dim"),
        ({"n_embd": "64"}, "n_embd is '64'"),
        ({"n_head": 7}, "n_embd is 64, no multiple of n_head, 7"),
        ({"n_embd": 36, "n_head": 4}, "n_embd is 36; its attention weights come in 8 shards"),
        ({"rotary_dim": None}, "has no rotary_dim"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_positions": 1024}, r"n_positions is 1024, but the stored causal mask has shape \[1, 1, 64, 64\]"),
        ({"layer_norm_epsilon": None}, "has no layer_norm_epsilon"),
        ({"vocab_size": None}, "has no vocab_size"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, object], says: str) -> None:
    """Nothing has a default: those of the original's class are of another model."""
    settings = settings_of("half_rotary_buffers") | changes
    with pytest.raises(CheckpointError, match=says):
        hub_config(settings, stored("half_rotary_buffers"))


@pytest.mark.parametrize("key", ["n_embd", "n_head", "n_layer", "n_positions", "rotary_dim", "vocab_size"])
def test_no_size_is_guessed(key: str) -> None:
    settings = settings_of("half_rotary_buffers")
    del settings[key]
    with pytest.raises(CheckpointError, match="the configuration has no"):
        hub_config(settings, stored("half_rotary_buffers"))


def test_config_json_both_ways(name: str) -> None:
    """It has what the original's class reads, and what the ports' class reads."""
    source = trained(stored(name))
    for config in (CONFIGS[name], CONFIGS[name] | {"norm_eps": 1e-6, "feed_forward": 72, "max_length": 9}):
        settings = json.loads(hub_files(config, "float16")["config.json"])
        assert settings["torch_dtype"] == "float16"
        assert hub_config(settings, source) == config
        port = {k: v for k, v in settings.items() if k not in ("n_embd", "vocab_size")}
        assert hub_config(port, source) == config
        if no_original(config) is None:
            plain = {k: v for k, v in settings.items() if k != "embed_dim" and not k.startswith("vocab_size_")}
            assert hub_config(plain, source) == config
        official = settings_of(name)
        assert all(settings[k] == official[k] for k in ("architectures", "model_type", "bos_token_id", "eos_token_id"))


def test_layouts_are_told_apart_by_names(name: str) -> None:
    import plm_weights.bert
    import plm_weights.esm
    import plm_weights.t5

    for names, layout in ((stored(name), "hub"), (wanted(CONFIGS[name]), "plm")):
        assert recognise(names) == layout
        assert [other.recognise(names) for other in (plm_weights.esm, plm_weights.bert, plm_weights.t5)] == [None] * 3
