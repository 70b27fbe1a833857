"""The comparison of test_parity_proteinbert.py is sharp: it fails for every mistake that other ports are known to make.

Each is made in our network or in its weights, and measured against what the original gives: a thousand million times
the tolerance and more. Swapped and transposed weights of every kind are in that file too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import differences, largest
from stored_proteinbert import CASES, Case, build, keras_list, numbered, run_ours, with_changes
from test_oracle_proteinbert import TWINS, truth_of
from test_parity_proteinbert import FLOAT64
from torch import Tensor

from plm.models import proteinbert
from plm.models.proteinbert import PAD, Block, GlobalAttention, ProteinBERT, States
from plm_weights.proteinbert import BLOCK, weights

Mistake = Callable[[pytest.MonkeyPatch, ProteinBERT], ProteinBERT | None]
# Three blocks, so that a mistake in either track is read by the other; and pads.
WHERE = "g2"


def in_method(owner: type, name: str, change: Callable[..., Any]) -> Mistake:
    """Put ``change`` in the place of a method, whose ``self`` comes first."""
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, change)


def in_module(name: str, change: Callable[..., Any]) -> Mistake:
    """Put ``change(the original, ...)`` in the place of what the network calls by this name."""
    real = getattr(proteinbert, name)
    return lambda monkeypatch, _: monkeypatch.setattr(proteinbert, name, lambda *x, **how: change(real, *x, **how))


def in_net(change: Callable[[ProteinBERT], object]) -> Mistake:
    def make(_: pytest.MonkeyPatch, net: ProteinBERT) -> None:
        change(net)

    return make


def in_blocks(change: Callable[[Block], object]) -> Mistake:
    return in_net(lambda net: [change(block) for block in net.blocks])  # type: ignore[arg-type]


def exchange(owner: Any, one: str, other: str) -> None:
    first, second = getattr(owner, one), getattr(owner, other)
    setattr(owner, one, second)
    setattr(owner, other, first)


def exchange_dilations(block: Block) -> None:
    """The weights of either are those of the other, as both are added to the same."""
    block.narrow.dilation, block.wide.dilation = block.wide.dilation, block.narrow.dilation


def tanh_gelu(real: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, *act: Any, **how: Any) -> Tensor:
    return F.gelu(real(x, weight, bias, **how), approximate="tanh")


def without_value_gelu(self: GlobalAttention, y: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return mixed_with(self, y, x, self.value(x))


def without_tanh(self: GlobalAttention, y: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return mixed_with(self, y, x, self.value(x, "gelu"), "none")


def mixed_with(self: GlobalAttention, y: Tensor, x: Tensor, v: Tensor, act: Any = "tanh") -> tuple[Tensor, Tensor]:
    q, k = self.query(y, act).unflatten(-1, (self.heads, -1)), self.key(x, act).unflatten(-1, (self.heads, -1))
    mixed, maps = proteinbert.global_attention(q, k, v.unflatten(-1, (self.heads, -1)), scale=self.scale)
    return mixed.flatten(1), maps


def changed_block(
    seen: Callable[[Tensor, Tensor], Tensor] = lambda old, new: new,
    known: Callable[[Tensor, Tensor], Tensor] = lambda old, mid: old,
    wide: Callable[[Tensor, Tensor], Tensor] = lambda old, narrow: old,
) -> Callable[..., States]:
    """A block whose attention sees other local states, whose dense layer reads another global vector, or whose wide
    convolution reads another input."""

    def forward(self: Block, x: Tensor, y: Tensor, keep: Tensor | None, global_: bool, attentions: bool) -> States:
        narrow = self.narrow(x)
        mid = self.local_norm1(x + self.to_local(y, "gelu")[:, None] + narrow + self.wide(wide(x, narrow)))
        local = self.local_norm2(mid + self.local_dense(mid, "gelu"))
        mixed, maps = self.attention(y, seen(x, local), keep, attentions)
        dense = self.global_dense1(known(y, y + mixed), "gelu")
        global_mid = self.global_norm1(y + dense + mixed)
        after = self.global_norm2(global_mid + self.global_dense2(global_mid, "gelu"))
        return States(mid, local, global_mid, after, maps)

    return forward


def after_the_global_track(self: Block, x: Tensor, y: Tensor, *rest: Any) -> States:
    """The local track reads the global vector of its own block, which it should have from the block before."""
    _, local, global_mid, after, maps = BLOCK_FORWARD(self, x, y, *rest)
    mid, local, _, _, _ = BLOCK_FORWARD(self, x, after, *rest)
    return States(mid, local, global_mid, after, maps)


def masked(self: GlobalAttention, y: Tensor, x: Tensor, keep: object, attentions: bool) -> tuple[Tensor, Tensor | None]:
    return ATTENTION(self, y, x, CASES[WHERE].tokens != PAD, attentions)


BLOCK_FORWARD, ATTENTION = Block.forward, GlobalAttention.forward
MISTAKES: dict[str, Mistake] = {
    "an epsilon of 1e-5": lambda _, net: with_changes(net, norm_eps=1e-5),
    "an epsilon of 1e-6": lambda _, net: with_changes(net, norm_eps=1e-6),
    "a dilation of 4": lambda _, net: with_changes(net, dilation=4),
    "gelu by tanh in the convolutions": in_module("convolution", tanh_gelu),
    "narrow and wide swapped": in_blocks(exchange_dilations),
    "no dilation": in_blocks(lambda block: setattr(block.wide, "dilation", 1)),
    "the wide convolution behind the narrow one": in_method(
        Block, "forward", changed_block(wide=lambda old, narrow: narrow)
    ),
    "attention never looks at pads": in_method(GlobalAttention, "forward", masked),
    "the embedding of pads is zero": in_net(lambda net: net.embed.weight[PAD].zero_()),
    "pads have the id 0": in_net(lambda net: net.embed.weight.copy_(net.embed.weight.roll(1, 0))),
    "no scale": in_blocks(lambda block: setattr(block.attention, "scale", 1.0)),
    "the scale of the values' size": in_blocks(lambda block: setattr(block.attention, "scale", 6**-0.5)),
    "no gelu on the values": in_method(GlobalAttention, "forward", without_value_gelu),
    "no tanh on queries and keys": in_method(GlobalAttention, "forward", without_tanh),
    "attention to what the block began with": in_method(Block, "forward", changed_block(seen=lambda old, new: old)),
    "the global layer reads what attention gave": in_method(
        Block, "forward", changed_block(known=lambda old, mid: mid)
    ),
    "the global vector from behind the block": in_method(Block, "forward", after_the_global_track),
    "local norms swapped": in_blocks(lambda block: exchange(block, "local_norm1", "local_norm2")),
    "global norms swapped": in_blocks(lambda block: exchange(block, "global_norm1", "global_norm2")),
    "global layers swapped": in_blocks(lambda block: exchange(block, "global_dense1", "global_dense2")),
    "no annotations": in_net(lambda net: net.annotations_in.weight.zero_()),
}


@pytest.fixture
def case() -> Case:
    return CASES[WHERE]


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(case: Case, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = case.net()
    assert case.error_of(net) < FLOAT64
    net = MISTAKES[mistake](monkeypatch, net) or net
    # The least is 5e-3, of the gelu by tanh and of an epsilon; all others are above 1.
    assert case.error_of(net) > 1e9 * FLOAT64


def test_the_changed_block_is_right_where_nothing_is_changed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what the tests above catch is the mistake, and not how it was put in."""
    monkeypatch.setattr(Block, "forward", changed_block())
    assert case.error_of(case.net()) < FLOAT64
    monkeypatch.setattr(
        GlobalAttention, "forward", lambda self, y, x, *rest: mixed_with(self, y, x, self.value(x, "gelu"))
    )
    assert case.error_of(case.net()) < FLOAT64


@torch.no_grad()
def test_a_mask_changes_nothing_without_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why ports that mask agree with the original on proteins of full length."""
    case = CASES["g3"]
    assert (case.tokens != PAD).all()
    net = case.net()
    net.embed.weight[PAD].zero_()
    assert case.error_of(net) < FLOAT64


# Weights in another order or layout, which no shape tells


def changed(case: Case, kind: str, change: Callable[[dict[str, Tensor], list[str]], Mapping[str, Tensor]]) -> float:
    """The error with the weights of one layer changed, in every block."""
    blocks = case.net().config.layers
    state = keras_list(case.folder)
    for i in range(blocks):
        own = [weight.pickled for weight in weights(blocks) if weight.target.startswith(f"blocks.{i}.{kind}.")]
        assert own
        state |= change(state, own)
    return case.error_with(state)


def swapped(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    one, other = names
    return {one: state[other], other: state[one]}


def transposed(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {names[0]: state[names[0]].mT.contiguous()}


def mirrored(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {names[0]: state[names[0]].flip(0)}


@pytest.mark.parametrize("kind", [name for name, kinds in BLOCK if "gamma" in kinds[0]])
def test_gamma_as_beta_is_caught(case: Case, kind: str) -> None:
    assert changed(case, kind, swapped) > 1e9 * FLOAT64


@pytest.mark.parametrize("kind", ["narrow", "wide", "local_dense", "global_dense1", "global_dense2"])
def test_a_transposed_kernel_is_caught(case: Case, kind: str) -> None:
    """Square matrices, and inputs for outputs in a convolution."""
    assert changed(case, kind, transposed) > 1e9 * FLOAT64


@pytest.mark.parametrize("kind", ["narrow", "wide"])
def test_a_mirrored_kernel_is_caught(case: Case, kind: str) -> None:
    """A convolution is a correlation here, as in every framework of neural networks."""
    assert changed(case, kind, mirrored) > 1e9 * FLOAT64


def beside(real: Callable[..., Tensor], moved: int, only: int | None = None) -> Callable[..., Tensor]:
    """A convolution with so many zeros more before the sequence, and fewer behind it."""

    def convolution(x: Tensor, *given: Any, dilation: int, packed: Tensor | None = None) -> Tensor:
        if only not in (None, dilation):
            return real(x, *given, dilation=dilation)
        longer = F.pad(x, (0, 0, max(moved, 0), max(-moved, 0)))
        return real(longer, *given, dilation=dilation)[:, max(-moved, 0) :][:, : x.shape[1]]

    return convolution


@pytest.mark.parametrize("moved", [-20, -1, 1, 20])
def test_a_convolution_beside_its_place_is_caught(case: Case, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide one; by 20 it has all its 40 zeros before the sequence, as if it were causal, or all behind."""
    monkeypatch.setattr(proteinbert, "convolution", beside(proteinbert.convolution, moved, only=5))
    assert case.error_of(case.net()) > 1e9 * FLOAT64


def test_the_odd_zero_before_the_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel is even, one zero more stands behind. No stored checkpoint has one; the formulas do."""
    twin = next(twin for twin in TWINS if twin.kernel == 4)
    net, truth = build(numbered(twin.weights()), twin.config, torch.float64), truth_of(twin)
    assert largest(differences(run_ours(net, *twin.batch()), truth)) < FLOAT64
    monkeypatch.setattr(proteinbert, "convolution", beside(proteinbert.convolution, 1))
    assert largest(differences(run_ours(net, *twin.batch()), truth)) > 1e9 * FLOAT64
