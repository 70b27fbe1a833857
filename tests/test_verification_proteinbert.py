"""`verify` for ProteinBERT: its authors' code on Keras where that is installed, and everywhere a stand-in for it.

The stand-in computes the same function from the arrays in Keras' order, written down apart from our network and key
map.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import Plm, save_tiny_proteinbert
from tiny import PROTEINBERT, proteinbert_model
from torch import Tensor

import plm
from plm import peers, verification
from plm.families import BY_NAME
from plm.loading import Opened
from plm.peers import installed
from plm.verification import Finding, other_library
from plm_weights import TensorSource, export_weights

DISTRIBUTIONS = ("protein-bert", "tensorflow")
there = installed("protein-bert") and (installed("tensorflow") or installed("tensorflow-cpu"))


class Result(SimpleNamespace):
    """A tensor of TensorFlow: one of bfloat16 becomes an array of a dtype that numpy does not have by itself."""

    def numpy(self) -> Any:
        return self.tensor.float().numpy()


class StandIn:
    """Both of its modules, as far as they are used, with Keras' dtype policy."""

    def __init__(self) -> None:
        self.policy = "float32"
        self.made: list[dict[str, int]] = []
        precision = SimpleNamespace(global_policy=lambda: self.policy, set_global_policy=self.set_policy)
        self.tensorflow = SimpleNamespace(
            keras=SimpleNamespace(mixed_precision=precision),
            config=SimpleNamespace(set_visible_devices=lambda devices, kind: None),
            device=lambda name: nullcontext(),
            **dict.fromkeys(("Tensor", "Variable"), Result),  # einops asks for them wherever there is a tensorflow
        )
        self.proteinbert = SimpleNamespace(
            create_model=self.create_model, get_model_with_hidden_layers_as_outputs=lambda model: model
        )

    def set_policy(self, name: str) -> None:
        self.policy = name

    def create_model(self, seq_len: int, vocab_size: int, n_annotations: int, **sizes: int) -> "Keras":
        self.made.append({"seq_len": seq_len, "vocab_size": vocab_size, "n_annotations": n_annotations, **sizes})
        return Keras(seq_len, sizes, getattr(torch, self.policy))


class Keras:
    """The model with both concatenations as its outputs."""

    def __init__(self, length: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
        self.length, self.sizes, self.dtype = length, sizes, dtype
        self.weights: list[Tensor] = []

    def set_weights(self, arrays: list[Any]) -> None:
        self.weights = [torch.from_numpy(array).to(self.dtype) for array in arrays]

    def __call__(self, given: list[Any], training: bool) -> tuple[Result, Result]:
        """In the order in which Keras sorts the layers, which is that of the weights."""
        ids, annotations = map(torch.from_numpy, given)
        assert not training and ids.dtype == torch.int32 and ids.shape[1] == self.length
        weights = iter(self.weights)
        dilation = self.sizes["wide_conv_dilation_rate"]
        x = dense(weights, annotations.to(self.dtype))
        s = next(weights)[ids.long()]
        local, both = [], [x]
        for _ in range(self.sizes["n_blocks"]):
            s = s + dense(weights, x)[:, None] + convolution(weights, s, 1) + convolution(weights, s, dilation)
            local.append(s := norm(weights, s))
            local.append(s := norm(weights, s + dense(weights, s)))
            both.append(x := norm(weights, x + dense(weights, x) + attention(weights, x, s)))
            both.append(x := norm(weights, x + dense(weights, x)))
        local.append(dense(weights, s, lambda logits: logits.softmax(-1)))
        both.append(dense(weights, x, torch.sigmoid))
        assert next(weights, None) is None
        return Result(tensor=torch.cat(local, -1)), Result(tensor=torch.cat(both, -1))


def dense(weights: Iterator[Tensor], x: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    return activation(x @ next(weights) + next(weights))


def convolution(weights: Iterator[Tensor], s: Tensor, dilation: int) -> Tensor:
    kernel = next(weights).permute(2, 1, 0)  # Keras has width, inputs, outputs
    return F.gelu(F.conv1d(s.mT, kernel, next(weights), padding="same", dilation=dilation)).mT


def norm(weights: Iterator[Tensor], x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], next(weights), next(weights), 1e-3)


def attention(weights: Iterator[Tensor], x: Tensor, s: Tensor) -> Tensor:
    queries, keys, values = next(weights), next(weights), next(weights)  # heads, inputs, outputs
    q = torch.einsum("bg,hgk->bhk", x, queries).tanh()
    k = torch.einsum("bls,hsk->bhlk", s, keys).tanh()
    v = F.gelu(torch.einsum("bls,hsv->bhlv", s, values))
    p = (torch.einsum("bhk,bhlk->bhl", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhl,bhlv->bhv", p, v).flatten(1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setattr(peers, "installed", lambda name: name in DISTRIBUTIONS)
    monkeypatch.setitem(sys.modules, "tensorflow", found.tensorflow)
    monkeypatch.setitem(sys.modules, "proteinbert", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "proteinbert.conv_and_global_attention_model", found.proteinbert)
    return found


def opened(model: plm.Model) -> Opened:
    """The model's weights as the published pickle has them: a list in Keras' order."""
    family, config = BY_NAME["proteinbert"], model.net.config
    rows = family.original_rows(config)
    stored = {name: x.contiguous() for name, x in export_weights(rows, model.net.state_dict()).items()}
    meta = {name: x.to("meta") for name, x in stored.items()}
    return Opened(TensorSource(meta, {}, (Path("weights.pkl"),), stored.__getitem__), family, "pickle", config, rows)


def compared(model: plm.Model, files: Opened, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    monkeypatch.setattr(verification, "open_checkpoint", lambda path: files)
    return list(other_library(model, Path("weights.pkl")))


def test_states_and_outputs_are_compared(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = proteinbert_model()
    findings = compared(model, opened(model), monkeypatch)
    told = [(each.what, each.source) for each in findings]
    source = "protein-bert, float32 on this CPU"
    assert told == [
        ("local representations of 4 sequences", source),
        ("global representations of 4 sequences", source),
    ]
    assert all(each.passed and 0 < each.error < 0.1 for each in findings), findings  # what is allowed is of 6 blocks
    sizes = {"vocab_size": 26, "n_annotations": 40, "d_hidden_seq": 32, "d_hidden_global": 64, "n_blocks": 3}
    sizes |= {"n_heads": 4, "d_key": 16, "conv_kernel_size": 9, "wide_conv_dilation_rate": 5, "seq_len": 67}
    assert stand_in.made == [sizes]


def test_every_part_of_the_function_is_asked_about() -> None:
    """Pads, annotations (of the first sequence all), each letter, and unknown ones."""
    question = peers.question_for(opened(proteinbert_model()))
    assert set(question.batch.lengths) == {67, 35, 27, 3} and question.padding == 25
    assert set(question.batch.tokens.tolist()) == set(range(25))
    assert question.annotations is not None
    assert question.annotations.sum(-1).tolist() == [40, 20, 14, 10]


def transposed(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: state[name].mT.contiguous()})


def exchanged(one: str, other: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({one: state[other], other: state[one]})


FAULTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "narrow and wide": exchanged("blocks.1.narrow.weight", "blocks.1.wide.weight"),
    "gain and shift": exchanged("blocks.2.local_norm1.weight", "blocks.2.local_norm1.bias"),
    "two norms": exchanged("blocks.0.global_norm1.weight", "blocks.0.global_norm2.weight"),
    "two dense layers": exchanged("blocks.0.global_dense1.weight", "blocks.0.global_dense2.weight"),
    "a dense layer transposed": transposed("blocks.2.local_dense.weight"),
    "a convolution's channels": lambda state: state.update(
        {"blocks.0.wide.weight": state["blocks.0.wide.weight"].transpose(0, 1).contiguous()}
    ),
    "a convolution mirrored": lambda state: state.update(
        {"blocks.0.wide.weight": state["blocks.0.wide.weight"].flip(2)}
    ),
    "annotations in another order": lambda state: state.update(
        {"annotations_in.weight": state["annotations_in.weight"].flip(1)}
    ),
    "pads that are nothing": lambda state: state["embed.weight"][25].zero_(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_are_found(stand_in: StandIn, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = proteinbert_model()
    spoiled = replace(model, net=copy.deepcopy(model.net))
    state = {name: x.clone() for name, x in model.net.state_dict().items()}
    FAULTS[fault](state)
    spoiled.net.load_state_dict(state)
    findings = compared(spoiled, opened(model), monkeypatch)
    assert max(each.error for each in findings) > 10 and not all(each.passed for each in findings)


@pytest.mark.parametrize("wrong", [{"norm_eps": 1e-5}, {"dilation": 4}])
def test_what_no_shape_tells_is_found(
    stand_in: StandIn, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = proteinbert_model(), proteinbert_model(config=replace(PROTEINBERT, **wrong))
    assert not all(each.passed for each in compared(other, opened(good), monkeypatch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_judged_by_its_own_noise(
    stand_in: StandIn, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = compared(proteinbert_model(dtype), opened(proteinbert_model()), monkeypatch)
    assert len(findings) == 2 and all(each.passed and f"({dtype})" in each.allowed for each in findings), findings
    assert all(each.error > 0.05 for each in findings)  # the noise floor is not far below
    assert stand_in.policy == "float32"  # as it was before


def test_only_where_both_are_installed(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = proteinbert_model()
    for there in ((), ("protein-bert",), ("tensorflow",)):
        monkeypatch.setattr(peers, "installed", lambda name, there=there: name in there)
        assert compared(model, opened(model), monkeypatch) == []
    monkeypatch.setattr(peers, "installed", lambda name: name in ("protein-bert", "tensorflow-cpu"))
    assert len(compared(model, opened(model), monkeypatch)) == 2
    other = proteinbert_model(config=replace(PROTEINBERT, norm_eps=1e-5))  # which protein-bert cannot make
    assert compared(other, opened(other), monkeypatch) == []


def test_keras_gets_its_policy_back(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keras, "set_weights", lambda *_: 1 / 0)
    files = opened(proteinbert_model())
    with pytest.raises(ZeroDivisionError):
        peers.theirs(files, peers.question_for(files), torch.bfloat16)
    assert stand_in.policy == "float32"


def test_our_own_form_has_no_peer(stand_in: StandIn, tmp_path: Path, run: Plm) -> None:
    """Nor has anybody published values: that nothing was compared is said, and does not pass."""
    folder = save_tiny_proteinbert(tmp_path / "tiny")
    report = plm.verify(folder)
    assert report.findings == () and not report.passed
    code, out, _ = run("verify", folder)
    assert code == 5 and "nothing to compare with: no published values" in out


@pytest.mark.skipif(not there, reason="protein-bert and TensorFlow are not installed")
def test_the_original_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = proteinbert_model()
    findings = compared(model, opened(model), monkeypatch)
    assert len(findings) == 2 and all(each.error < 0.1 for each in findings), findings
