"""T5 against transformers itself: tiny random twins, loaded from what it saves in every published form.

Then the way back, the gradients, and proof that the comparison sees each of the mistakes that a T5 invites.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle_t5 import (
    CASES,
    FORMS,
    GOLDEN,
    CleanFloat64,
    Twin,
    hub_twin,
    in_float64,
    pad,
    run_hub,
    run_ours,
    save,
    truth_of,
)
from parity import Outputs, differences, largest, rms
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel, T5ForConditionalGeneration

import plm
import plm_kernels
from plm.models import t5
from plm.models.t5 import T5, lm_loss
from plm.packing import Packed
from plm_kernels import RelativeBias
from plm_weights import export_weights, import_weights, write_safetensors
from plm_weights.t5 import hub_files, hub_rows, key_map

# Two float64 programs that add in another order differ by 4e-14 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
# One token, equal lengths apart from each other, and one that goes beyond the last bucket of every twin.
LENGTHS = (9, 33, 1, 150, 33, 2, 17, 5)
DECODER_LENGTHS = (4, 1, 7, 140, 7, 2, 2, 61)
TWINS = [
    Twin(2, 2, 16, 2, 8, 40, "relu", seed=1),  # inner = channels
    Twin(1, 3, 30, 5, 7, 33, "gated-gelu", "true", buckets=64, seed=2),
    Twin(3, 1, 20, 3, 4, 50, "gated-silu", "false", buckets=64, max_distance=50, seed=3),
    Twin(2, 3, 24, 3, 16, 19, "relu", "null", max_distance=200, norm_eps=1e-5, seed=4),
    Twin(4, 2, 18, 2, 5, 26, "gated-gelu", "false", buckets=12, max_distance=30, vocabulary=150, seed=5),
]
every_twin = pytest.mark.parametrize("twin", TWINS, ids=str)
one_of_each = pytest.mark.parametrize("twin", TWINS[1:4], ids=str)


def random_ids(twin: Twin, lengths: tuple[int, ...], side: Any = "right") -> tuple[Tensor, Tensor]:
    """Ids ``[b, t]`` of every kind, even ``<pad>`` among the residues, and the mask of the padding."""
    generator = torch.Generator().manual_seed(twin.seed + len(lengths))
    rows = [torch.randint(twin.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return pad(rows, side)


def inputs_of(twin: Twin, side: Any = "right") -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Of the encoder ids and mask, and of the decoder both as well."""
    return *random_ids(twin, LENGTHS, side), random_ids(twin, DECODER_LENGTHS)


def packed(ids: Tensor, mask: Tensor, decoder: tuple[Tensor, Tensor] | None = None) -> tuple[Packed, Packed | None]:
    return Packed.from_padded(ids, mask), None if decoder is None else Packed.from_padded(*decoder)


def load(folder: Path, dtype: str) -> T5:
    net = plm.load(folder, dtype=dtype).net
    assert isinstance(net, T5)
    return net


def error_of(net: T5, truth: Outputs, inputs: tuple[Any, ...]) -> float:
    ours = run_ours(net, *packed(*inputs))
    assert ours.keys() == truth.keys()
    return largest(differences(ours, truth))


def assert_parity(folder: Path, theirs: Any, inputs: tuple[Any, ...]) -> None:
    """All outputs of ours from ``folder`` and of ``theirs`` agree in float64, and ours are as precise in float32."""
    truth = truth_of(theirs, *inputs)
    assert error_of(load(folder, "float64"), truth, inputs) < FLOAT64

    floor = rms(differences(run_hub(theirs, *inputs), truth))
    found = rms(differences(run_ours(load(folder, "float32"), *packed(*inputs)), truth))
    for name in truth:
        # The noise floor is the original's own error in float32, measured here on the same inputs.
        assert found[name] <= 2 * floor[name], f"{name}: {found[name]:.1e}, theirs {floor[name]:.1e}"


@every_twin
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_output(twin: Twin, side: Any, tmp_path: Path) -> None:
    """Hidden states and attention maps of both stacks and of what lies between, and logits, wherever the padding is."""
    theirs = hub_twin(twin)
    net = load(save(theirs, twin, tmp_path), "float32")
    assert (net.lm_head is None) == twin.tied
    assert_parity(tmp_path, theirs, inputs_of(twin, side))


@every_twin
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_encoder_alone(twin: Twin, form: str, tmp_path: Path) -> None:
    theirs = hub_twin(twin, T5EncoderModel)
    folder = save(theirs, twin, tmp_path, form)
    assert_parity(folder, theirs, random_ids(twin, LENGTHS))
    net = load(folder, "float32")
    assert net.config.decoder_layers == 0 and net.decoder is None and net.lm_head is None
    batch = Packed.from_ids([[3, 4]])
    for refused in (lambda: net(batch, decoder=batch), lambda: net.begin(batch, 1, 5)):
        with pytest.raises(ValueError, match="this checkpoint is an encoder alone"):
            refused()


@one_of_each
def test_an_encoder_in_float16(twin: Twin, tmp_path: Path) -> None:
    """As ProtT5's half: stored in float16, used in a wider type."""
    theirs = hub_twin(twin, T5EncoderModel).half()
    save(theirs, twin, tmp_path, "bin")
    assert_parity(tmp_path, theirs.float(), random_ids(twin, LENGTHS))


@pytest.mark.parametrize("name", CASES)
def test_stored_checkpoints(name: str) -> None:
    """The checkpoints of test_parity_t5.py, for every output at other lengths."""
    theirs = T5ForConditionalGeneration.from_pretrained(GOLDEN / name, attn_implementation="eager").eval()
    assert_parity(GOLDEN / name, theirs, inputs_of(replace(TWINS[0], vocabulary=theirs.config.vocab_size)))


@one_of_each
@pytest.mark.parametrize("form", FORMS)
def test_every_file_form(twin: Twin, form: str, tmp_path: Path) -> None:
    """Loading gives the very numbers that were in the original's memory, and from them the original's outputs."""
    theirs = hub_twin(twin)
    save(theirs, twin, tmp_path, form)
    assert ("shards" in form) == any(tmp_path.glob("*.index.json"))
    net = load(tmp_path, "float32")
    ours = net.state_dict()
    stored = {name: x.detach() for name, x in theirs.named_parameters()}
    wanted = import_weights(hub_rows(asdict(net.config)), stored, ours)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name
    inputs = inputs_of(twin)
    assert error_of(load(tmp_path, "float64"), truth_of(theirs, *inputs), inputs) < FLOAT64


@every_twin
def test_what_transformers_saves_with_its_own_config(twin: Twin, tmp_path: Path) -> None:
    """Since version 5 it writes that every T5 is tied, and beside it whether the head's input is scaled."""
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["tie_word_embeddings"] is True and said["scale_decoder_outputs"] is twin.tied
    assert load(tmp_path, "float32").config.tied is twin.tied
    inputs = inputs_of(twin)
    assert error_of(load(tmp_path, "float64"), truth_of(theirs, *inputs), inputs) < FLOAT64


def export(folder: Path, target: Path) -> dict[str, Tensor]:
    """What is published in ``folder``, through our network's names and back; the tensors that were written."""
    target.mkdir()
    net = load(folder, "float32")
    config = asdict(net.config)
    exported = export_weights(hub_rows(config), net.state_dict())
    write_safetensors(target / "model.safetensors", exported, {"format": "pt"}, hub_files(config))
    return exported


@every_twin
@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, T5EncoderModel], ids=lambda kind: kind.__name__)
def test_back_to_transformers(twin: Twin, kind: Any, tmp_path: Path) -> None:
    """The same tensors, bit for bit, and so the same outputs. Nothing is missing, and everything is read."""
    theirs = hub_twin(twin, kind)
    save(theirs, twin, tmp_path / "made")
    exported = export(tmp_path / "made", tmp_path / "back")
    published = load_file(tmp_path / "made" / "model.safetensors")
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in published.items())

    found, report = kind.from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole = kind is T5ForConditionalGeneration
    inputs = inputs_of(twin) if whole else random_ids(twin, LENGTHS)
    assert largest(differences(run_hub(found.eval(), *inputs), run_hub(theirs, *inputs))) == 0
    if whole:
        generation = found.generation_config
        assert (generation.decoder_start_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 0)


@one_of_each
@pytest.mark.parametrize("backend", ["segments", "dense", "reference"])
def test_gradients(twin: Twin, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the loss by every parameter, through every attention backend of a CPU."""
    theirs = hub_twin(twin)
    save(theirs, twin, tmp_path)
    ids, mask, (decoder_ids, decoder_mask) = inputs_of(twin)
    labels = torch.where(decoder_mask.bool(), decoder_ids.roll(-1, 1), -100)
    with CleanFloat64():
        wide = in_float64(theirs)
        given = {"input_ids": ids, "attention_mask": mask, "decoder_attention_mask": decoder_mask}
        loss = wide(**given, decoder_input_ids=decoder_ids, labels=labels).loss
        loss.backward()

    monkeypatch.setattr(t5, "attention", partial(plm_kernels.attention, backend=backend))
    net = load(tmp_path, "float64")
    batch, decoder = packed(ids, mask, (decoder_ids, decoder_mask))
    ours = lm_loss(net(batch, decoder=decoder).logits, labels[decoder_mask.bool()])
    ours.backward()
    assert abs(ours.item() - loss.item()) < FLOAT64

    found = {name: x.grad for name, x in net.named_parameters()}
    named = {name: x.grad for name, x in wide.named_parameters()}
    for name, wanted in import_weights(key_map(named, asdict(net.config)), named, found).items():
        assert wanted.abs().max() > 1e-6, name  # there is something to compare
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=FLOAT64, msg=name)


def patched(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Put ``change(the original, ...)`` in its place."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, partial(change, getattr(owner, name)))


def method(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """The same for a method, whose ``self`` comes second."""
    real = getattr(owner, name)
    return lambda monkeypatch: monkeypatch.setattr(owner, name, lambda self, *args: change(real, self, *args))


def centred(real: Any, self: Any, x: Tensor) -> Tensor:
    return real(self, x - x.mean(-1, keepdim=True))


def gate_last(real: Any, self: Any, x: Tensor) -> Tensor:
    """The gated layer with its two halves exchanged."""
    linear, gate = self.up(x).chunk(2, -1)
    return self.down(F.gelu(gate, approximate="tanh") * linear)


def with_table(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another bias by distance."""
    return method(t5.PositionBias, "forward", lambda real, self: RelativeBias(change(real(self).table)))


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the exact gelu": patched(t5, "gated", lambda real, x, activation: real(x, "gelu")),
    "the gate after the linear half": method(t5.FeedForward, "forward", gate_last),
    "attention scaled by its head size": patched(
        t5, "attention", lambda real, *args, **how: real(*args, **how | {"scale": args[0].shape[-1] ** -0.5})
    ),
    "the bias scaled with the logits": with_table(lambda table: table * 7**-0.5),
    "no bias": with_table(torch.zeros_like),
    "a reach that is too short": with_table(lambda table: table[:, 8:-8]),
    "distance as query less key": patched(t5, "bucket", lambda real, distance, *how: real(-distance, *how)),
    "the decoder's buckets in the encoder": patched(
        t5, "bucket", lambda real, distance, buckets, reach, causal: real(distance, buckets, reach, True)
    ),
    "the encoder's buckets in the decoder": patched(
        t5, "bucket", lambda real, distance, buckets, reach, causal: real(distance, buckets, reach, False)
    ),
    "another greatest distance": patched(
        t5, "bucket", lambda real, distance, buckets, reach, causal: real(distance, buckets, reach + 2, causal)
    ),
    "the head's input scaled twice": method(
        T5, "logits", lambda real, self, x: real(self, x * self.config.channels**-0.5)
    ),
    "the head's input not scaled": method(T5, "logits", lambda real, self, x: F.linear(x, self.embed.weight)),
    "a norm that takes the mean away": method(t5.Norm, "forward", centred),
    "embeddings scaled as in other transformers": method(
        torch.nn.Embedding, "forward", lambda real, self, ids: real(self, ids) * self.embedding_dim**0.5
    ),
    "a decoder that looks ahead": patched(
        t5, "attention", lambda real, *args, **how: real(*args, **how | {"causal": False})
    ),
}


@pytest.fixture(scope="module")
def gated_gelu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outputs, tuple[Any, ...]]:
    """A twin that can show every mistake: gated by a gelu, tied and scaled. Its folder, and what it gives for what."""
    theirs, inputs = hub_twin(TWINS[1]), inputs_of(TWINS[1])
    return save(theirs, TWINS[1], tmp_path_factory.mktemp("gated_gelu")), truth_of(theirs, *inputs), inputs


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(mistake: str, gated_gelu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is sharp: it fails for every way of reading the paper wrong that is known from other ports."""
    folder, truth, inputs = gated_gelu
    net = load(folder, "float64")
    assert error_of(net, truth, inputs) < FLOAT64
    MISTAKES[mistake](monkeypatch)
    assert error_of(load(folder, "float64"), truth, inputs) > 1e-4


def test_each_transposed_square_matrix_is_caught(tmp_path: Path) -> None:
    """Which no shape tells: those of every attention whose heads together are as wide as the stream."""
    theirs, inputs = hub_twin(TWINS[0]), inputs_of(TWINS[0])
    truth, folder = truth_of(theirs, *inputs), save(theirs, TWINS[0], tmp_path)
    state = load_file(folder / "model.safetensors")
    square = [name for name, x in state.items() if x.dim() == 2 and x.shape[0] == x.shape[1]]
    assert len(square) == 4 * (TWINS[0].layers + 2 * TWINS[0].decoder_layers)
    for name in square:
        save_file(state | {name: state[name].T.contiguous()}, folder / "model.safetensors")
        assert error_of(load(folder, "float64"), truth, inputs) > 1e-3, name


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("relative_attention_max_distance", 127),
        ("layer_norm_epsilon", 1e-5),
        ("feed_forward_proj", "gated-silu"),
    ],
)
def test_each_wrong_setting_is_caught(setting: str, value: Any, gated_gelu: Any, tmp_path: Path) -> None:
    folder, truth, inputs = gated_gelu
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    assert settings[setting] != value
    (tmp_path / "config.json").write_text(json.dumps(settings | {setting: value}))
    assert error_of(load(tmp_path, "float64"), truth, inputs) > 100 * FLOAT64
