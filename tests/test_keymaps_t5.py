"""The key map of T5: every published form in and out, tensor for tensor, and what is refused."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from checkpoints import equal, fair, hub
from oracle_t5 import CASES, GOLDEN, Twin, hub_twin, unique
from safetensors.torch import load_file
from torch import Tensor

from plm.models.t5 import T5, Config
from plm_weights import CheckpointError, Drop, KeyMapError, Tied, check, export_weights, import_weights
from plm_weights.t5 import EMBEDDINGS, PREFIXES, hub_config, hub_files, hub_rows, key_map, recognise

ANKH3: dict[str, Any] = {
    "vocabulary": 48,
    "layers": 3,
    "decoder_layers": 2,
    "channels": 40,
    "heads": 4,
    "head_size": 8,
    "feed_forward": 56,
    "activation": "gated-silu",
    "buckets": 64,
    "max_distance": 128,
    "norm_eps": 1e-6,
    "tied": False,
}
PROTT5 = ANKH3 | {"vocabulary": 40, "decoder_layers": 3, "channels": 32, "head_size": 16, "feed_forward": 96}
PROTT5 |= {"activation": "relu", "buckets": 32, "tied": True}
CONFIGS = {"ankh3_tiny": ANKH3, "prott5_tiny": PROTT5}
SHARED, HEAD = "shared.weight", "lm_head.weight"
BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


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
        return T5(Config(**config)).state_dict()


def imported(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return import_weights(key_map(source, config), source, wanted(config))


def copied(name: str) -> dict[str, Tensor]:
    """As ``.bin`` files are: the embedding under all its names, and a tied head as well."""
    source = stored(name)
    copies = {copy: source[SHARED].clone() for copy in (*EMBEDDINGS, HEAD)}
    return copies | source


def encoder_of(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As ``T5EncoderModel`` saves it."""
    return {key: tensor for key, tensor in source.items() if key.startswith(("shared.", "encoder."))}


def prefixed(source: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in source.items()}


def test_both_ways(name: str) -> None:
    source, config = stored(name), CONFIGS[name]
    assert hub_config(settings_of(name), source) == config
    assert equal(export_weights(hub_rows(config), imported(source, config)), source)


def test_bin_files_both_ways(name: str) -> None:
    """They hold the embedding three times, and a tied head is a fourth copy."""
    source, config = copied(name), CONFIGS[name]
    assert len(source) == len(stored(name)) + (2 if name == "ankh3_tiny" else 3)
    assert hub_config(settings_of(name), source) == config
    state = imported(source, config)
    assert equal(state, imported(stored(name), config))
    assert equal(export_weights(hub_rows(config, embeddings=EMBEDDINGS, copies=True), state), source)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("embeddings", [EMBEDDINGS, EMBEDDINGS[1:2], EMBEDDINGS[1:], EMBEDDINGS[2:]], ids=len)
def test_prefixes_and_names_of_the_embedding_both_ways(name: str, prefix: str, embeddings: tuple[str, ...]) -> None:
    """Any of the names will do, and what is written under it is what was read."""
    source, config = copied(name), CONFIGS[name]
    source = prefixed({k: x for k, x in source.items() if k not in EMBEDDINGS or k in embeddings}, prefix)
    assert hub_config(settings_of(name), source) == config
    state = imported(source, config)
    assert equal(state, imported(stored(name), config))
    rows = hub_rows(config, prefix=prefix, embeddings=embeddings, copies=True)
    assert equal(export_weights(rows, state), source)


@pytest.mark.parametrize("embeddings", [EMBEDDINGS[:1], EMBEDDINGS[1:2], EMBEDDINGS[:2]], ids=["shared", "own", "both"])
def test_an_encoder_alone_both_ways(name: str, embeddings: tuple[str, ...]) -> None:
    """In half precision, as ProtT5's is published: nothing is cast."""
    source = {k: x.half() for k, x in encoder_of(copied(name)).items() if k not in EMBEDDINGS or k in embeddings}
    config = CONFIGS[name] | {"decoder_layers": 0}
    assert hub_config(settings_of(name), source) == config
    state = imported(source, config)
    assert equal(state, {k: x.half() for k, x in imported(stored(name), CONFIGS[name]).items() if k in state})
    assert equal(export_weights(hub_rows(config, embeddings=embeddings), state), source)


def test_every_imported_tensor_is_the_right_one(name: str) -> None:
    """Values, against the published names spelled out: two swapped rows of equal shape would pass a round trip."""
    source, config = stored(name), CONFIGS[name]
    published: dict[str, tuple[str, ...]] = {"embed": ("shared",), "lm_head": ("lm_head",)}
    for stack, layers in (("encoder", config["layers"]), ("decoder", config["decoder_layers"])):
        published[f"{stack}.norm"] = (f"{stack}.final_layer_norm",)
        published[f"{stack}.relative_bias"] = (BIAS.format(stack).removesuffix(".weight"),)
        last = 1 if stack == "encoder" else 2
        for i in range(layers):
            ours, layer = f"{stack}.blocks.{i}", f"{stack}.block.{i}.layer"
            up = ("wi",) if config["activation"] == "relu" else ("wi_0", "wi_1")
            published |= {
                f"{ours}.attention_norm": (f"{layer}.0.layer_norm",),
                f"{ours}.attention.qkv": tuple(f"{layer}.0.SelfAttention.{part}" for part in "qkv"),
                f"{ours}.attention.out": (f"{layer}.0.SelfAttention.o",),
                f"{ours}.cross_norm": (f"{layer}.1.layer_norm",),
                f"{ours}.cross.q": (f"{layer}.1.EncDecAttention.q",),
                f"{ours}.cross.kv": tuple(f"{layer}.1.EncDecAttention.{part}" for part in "kv"),
                f"{ours}.cross.out": (f"{layer}.1.EncDecAttention.o",),
                f"{ours}.feed_forward_norm": (f"{layer}.{last}.layer_norm",),
                f"{ours}.feed_forward.up": tuple(f"{layer}.{last}.DenseReluDense.{part}" for part in up),
                f"{ours}.feed_forward.down": (f"{layer}.{last}.DenseReluDense.wo",),
            }
    for target, tensor in imported(source, config).items():
        parts = [source[f"{part}.weight"] for part in published[target.removesuffix(".weight")]]
        assert torch.equal(tensor, torch.cat(parts)), target


@pytest.mark.parametrize("copy", [*EMBEDDINGS[1:], HEAD])
def test_copies_that_differ_are_refused(copy: str) -> None:
    """Another number, another dtype, or another shape."""
    source = copied("prott5_tiny")
    one_off = source[SHARED].clone()
    one_off[7, 3] += 1e-6
    for wrong, complaint in (
        (one_off, f"{copy}: its values are not those of shared.weight"),
        (source[SHARED].half(), f"{copy}: .* float16, but should be a copy of shared.weight"),
        (source[SHARED][:-1].clone(), f"{copy}: .*39, 32.*should be a copy of shared.weight"),
    ):
        with pytest.raises(KeyMapError, match=complaint):
            imported(source | {copy: wrong}, PROTT5)


def test_a_head_of_its_own_need_not_be_like_the_embedding() -> None:
    """Ankh's is another tensor, and no copy of the embedding is mistaken for it."""
    source = copied("ankh3_tiny")
    assert not torch.equal(source[HEAD], source[SHARED])
    assert torch.equal(imported(source, ANKH3)["lm_head.weight"], source[HEAD])
    with pytest.raises(KeyMapError, match=r"lm_head\.weight: its values are not those of shared\.weight"):
        imported(source, ANKH3 | {"tied": True})


def test_the_bias_of_cross_attention_is_dropped(name: str) -> None:
    """Files of before 2021 have one, which no program ever added. Elsewhere than there it is refused."""
    source, config = stored(name), CONFIGS[name]
    stray = torch.full_like(source[BIAS.format("decoder")], torch.nan)
    rows = key_map(source | {STRAY: stray}, config)
    assert [row.source for row in rows if isinstance(row, Drop)] == [STRAY]
    assert equal(imported(source | {STRAY: stray}, config), imported(source, config))
    for elsewhere in (STRAY.replace("block.0", "block.1"), BIAS.format("encoder").replace("block.0", "block.1")):
        with pytest.raises(KeyMapError, match=f"{elsewhere}: in no row of the key map"):
            imported(source | {elsewhere: stray}, config)


def test_the_encoder_of_a_whole_checkpoint(name: str) -> None:
    """The key map can take it alone: everything of the decoder is dropped with a reason."""
    source, config = copied(name) | {STRAY: torch.zeros(2, 4)}, CONFIGS[name] | {"decoder_layers": 0}
    state = imported(source, config)
    assert equal(state, imported(encoder_of(stored(name)), config))
    unread = source.keys() - export_weights(hub_rows(config, embeddings=EMBEDDINGS), state).keys()
    assert unread == {key for key in source if key.startswith("decoder.block.")} | {
        "decoder.final_layer_norm.weight",
        HEAD,
    }


@pytest.mark.parametrize("transposed", [False, True], ids=["missing", "transposed"])
def test_what_is_wrong_is_named(name: str, transposed: bool) -> None:
    """Each matrix, by its own name; transposed, by that of its layer, for it may be one of several to be stacked."""
    source = stored(name)
    for key, tensor in source.items():
        if tensor.dim() == 2:
            wrong = {other: x for other, x in source.items() if other != key}
            rows = key_map(source, CONFIGS[name])
            with pytest.raises(KeyMapError) as error:
                check(rows, wrong | {key: tensor.T} if transposed else wrong, wanted(CONFIGS[name]))
            assert (key.rsplit(".", 2)[0] if transposed else key) in str(error.value)


def test_stacked_parts_of_two_types_are_refused(name: str) -> None:
    source, key = stored(name), "encoder.block.0.layer.0.SelfAttention.k.weight"
    source[key] = source[key].half()
    with pytest.raises(KeyMapError, match=r"encoder\.block\.0.*to be stacked, but unlike: .* float32, .* float16"):
        imported(source, CONFIGS[name])


def test_unknown_tensors_are_refused(name: str) -> None:
    source = stored(name) | {"classification_head.dense.weight": torch.zeros(2, 2)}
    with pytest.raises(KeyMapError, match=r"classification_head\.dense\.weight: in no row of the key map"):
        imported(source, CONFIGS[name])


def test_unknown_prefixes_are_refused(name: str) -> None:
    source = prefixed(stored(name), "my_model.")
    assert recognise(source) == "hub"
    with pytest.raises(CheckpointError, match=r"the names begin with 'my_model\.'; known are '', 'transformer\.'"):
        imported(source, CONFIGS[name])


def test_absent_and_null_settings_have_the_defaults_of_transformers() -> None:
    source, settings = stored("prott5_tiny"), settings_of("prott5_tiny")
    optional = {
        "model_type": None,
        "num_decoder_layers": None,  # as many as the encoder has
        "relative_attention_num_buckets": None,
        "relative_attention_max_distance": None,
        "layer_norm_epsilon": None,
        "feed_forward_proj": None,
        "tie_word_embeddings": None,
        "dense_act_fn": None,
        "is_gated_act": None,
    }
    assert hub_config(settings | optional, source) == PROTT5
    assert hub_config({key: value for key, value in settings.items() if key not in optional}, source) == PROTT5


def test_settings_that_mean_nothing_are_ignored(name: str) -> None:
    odd = {
        "n_positions": 512,
        "output_past": True,
        "_name_or_path": "t5",
        "torch_dtype": "float16",
        "gradient_checkpointing": False,
        "task_specific_params": {"summarization": {"num_beams": 4}},
        "dense_act_fn": "relu",  # feed_forward_proj counts
        "is_gated_act": False,
        "dropout_rate": 0.9,
        "hidden_size": 7,
    }
    assert hub_config(settings_of(name) | odd, stored(name)) == CONFIGS[name]


@pytest.mark.parametrize(("said", "tied"), [(True, True), (None, True), (False, False)])
def test_only_false_unties_the_head(said: bool | None, tied: bool) -> None:
    settings = settings_of("ankh3_tiny") | {"tie_word_embeddings": said}
    assert hub_config(settings, stored("ankh3_tiny"))["tied"] is tied


@pytest.mark.parametrize(("said", "tied"), [(True, True), (False, False)])
def test_transformers_5_says_elsewhere_whether_the_head_is_tied(said: bool, tied: bool) -> None:
    """It writes ``tie_word_embeddings: true`` for every T5, and what was read there as ``scale_decoder_outputs``."""
    settings = settings_of("ankh3_tiny") | {"tie_word_embeddings": True, "scale_decoder_outputs": said}
    assert hub_config(settings, stored("ankh3_tiny"))["tied"] is tied


def test_an_untied_head_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match=r"scale_decoder_outputs .* no lm_head\.weight"):
        hub_config(settings_of("ankh3_tiny"), {k: x for k, x in stored("ankh3_tiny").items() if k != HEAD})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "mt5"),
        ("feed_forward_proj", "gelu"),
        ("feed_forward_proj", "gated-relu"),
        ("feed_forward_proj", 3),
        ("num_layers", None),
        ("num_layers", 0),
        ("d_model", "40"),
        ("d_kv", -1),
        ("d_kv", None),
        ("vocab_size", None),
        ("num_decoder_layers", "two"),
        ("layer_norm_epsilon", "tiny"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_other_kinds_of_t5_are_refused(setting: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=setting):
        hub_config(settings_of("ankh3_tiny") | {setting: value}, stored("ankh3_tiny"))


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("vocab_size", 41, r"embed\.weight: the model has \(41, 32\), shared\.weight gives \(40, 32\)"),
        ("num_heads", 2, r"encoder\.relative_bias\.weight: the model has \(32, 2\)"),
        ("num_layers", 2, r"encoder\.blocks\.2\."),
        ("num_decoder_layers", 4, r"decoder\.blocks\.3\."),
        ("d_kv", 8, r"attention\.qkv\.weight: the model has \(96, 32\)"),
        ("relative_attention_num_buckets", 64, r"relative_bias\.weight: the model has \(64, 4\)"),
        ("feed_forward_proj", "gated-gelu", r"DenseReluDense\.wi\.weight: in no row of the key map"),
    ],
)
def test_settings_of_another_checkpoint(setting: str, value: object, complaint: str) -> None:
    source = stored("prott5_tiny")
    config = hub_config(settings_of("prott5_tiny") | {setting: value}, source)
    with pytest.raises(KeyMapError, match=complaint):
        check(key_map(source, config), source, wanted(config))


def test_config_json_both_ways(name: str) -> None:
    source = stored(name)
    for change in ({}, {"activation": "gated-gelu", "norm_eps": 1e-5}, {"buckets": 12, "max_distance": 99}):
        config = CONFIGS[name] | change
        files = hub_files(config, "bfloat16")
        assert files.keys() == {"config.json", "generation_config.json"}
        written = json.loads(files["config.json"])
        assert written["torch_dtype"] == "bfloat16"
        assert hub_config(written, source) == config
    encoder = CONFIGS[name] | {"decoder_layers": 0}
    files = hub_files(encoder)
    assert files.keys() == {"config.json"}
    assert hub_config(json.loads(files["config.json"]), encoder_of(source)) == encoder


# Values and bytes of published files, in which every copy counts (Ankh's), or none (ProtT5's .bin files share memory).
ANKH = {"layers": 48, "decoder_layers": 24, "head_size": 64}
ANKH_BASE = {"vocabulary": 144, "channels": 768, "heads": 12, "feed_forward": 3072}
ANKH_LARGE = {"vocabulary": 144, "channels": 1536, "heads": 16, "feed_forward": 3840}
PROTT5_XL = {"vocabulary": 128, "layers": 24, "decoder_layers": 24, "channels": 1024, "heads": 32, "head_size": 128}
PROTT5_XL |= {"feed_forward": 16384}
SIZES: list[tuple[dict[str, Any], int, int]] = [
    (ANKH3 | ANKH | ANKH_BASE, 736_674_816, 736_453_632),
    (ANKH3 | ANKH | ANKH_LARGE, 1_879_147_520, 1_878_705_152),
    (ANKH3 | ANKH | ANKH_LARGE | {"vocabulary": 256}, 1_879_835_648, 1_879_049_216),
    (
        ANKH3 | ANKH | {"vocabulary": 256, "channels": 2560, "heads": 32, "feed_forward": 6720},
        5_732_217_856,
        5_730_907_136,
    ),
]


@pytest.mark.parametrize(("config", "stored_values", "values"), SIZES, ids=lambda x: "")
def test_the_sizes_of_ankh(config: dict[str, Any], stored_values: int, values: int) -> None:
    """776 tensors in each file, and as many values as are published with copies and without."""
    whole = export_weights(hub_rows(config, embeddings=EMBEDDINGS, copies=True), wanted(config))
    assert len(whole) == 776
    assert sum(tensor.numel() for tensor in whole.values()) == stored_values
    once = export_weights(hub_rows(config), wanted(config))
    assert sum(tensor.numel() for tensor in once.values()) == values
    check(key_map(whole, config), whole, wanted(config))


def test_the_size_of_prott5() -> None:
    """The published file of 11,275,562,628 bytes holds its float32 values and less than a MB of names."""
    config = PROTT5 | PROTT5_XL
    exported = export_weights(hub_rows(config), wanted(config))
    values = sum(tensor.numel() for tensor in exported.values())
    assert 0 < 11_275_562_628 - 4 * values < 1_000_000
    check(key_map(exported, config), exported, wanted(config))


def test_layouts_are_told_apart_by_names() -> None:
    for name in CASES:
        ours = wanted(CONFIGS[name])
        assert recognise(stored(name)) == recognise(encoder_of(stored(name))) == "hub"
        assert recognise(ours) == "plm"
        check(key_map(ours, CONFIGS[name]), ours, ours)
    for source in (hub("esm1b_tiny"), hub("esm2_tiny"), fair("esm1b_tiny"), fair("esm2_tiny")):
        assert recognise(source) is None
    assert recognise(load_file(GOLDEN.parent / "bert" / "igbert_tiny" / "model.safetensors")) is None


def test_what_a_twin_holds_is_what_the_key_map_writes() -> None:
    """Against transformers' own names, for a decoder deeper than its encoder and one less deep."""
    for layers, decoder_layers in ((1, 3), (3, 1)):
        twin = Twin(layers, decoder_layers, 12, 2, 5, 9, "gated-gelu", "false")
        source = unique(hub_twin(twin))
        config = hub_config(twin.settings(), source)
        assert equal(export_weights(hub_rows(config), imported(source, config)), source)
        assert not any(isinstance(row, Tied) for row in hub_rows(config))
