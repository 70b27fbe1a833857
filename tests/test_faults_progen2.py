"""The comparison of test_parity_progen2.py is sharp: it fails for every mistake that is known from other ports.

Each is made in our network or in its key map, and measured against what the original gives. With none, the error is
that of the original's own roundings.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_progen2 import CASES
from test_parity_progen2 import ROUNDED, Case
from torch import Tensor

import plm
import plm_weights.progen2 as published
from plm.models import progen2
from plm.models.progen2 import Attention, Block, FeedForward, ProGen2
from plm.packing import Packed
from plm_kernels import Turns, rotary, rotary_half, rotary_pairs

Mistake = Callable[[pytest.MonkeyPatch, ProGen2], None]
# Two heads in each shard, which a head in each would hide; and a third of each head is not turned.
WHERE = "bin_fp16_large_vocab"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def in_module(name: str, change: Callable[..., Any], owner: Any = progen2) -> Mistake:
    """Put ``change(the original, ...)`` in the place of what the network calls by this name."""
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, partial(change, getattr(owner, name)))


def in_method(owner: type, name: str, change: Callable[..., Any]) -> Mistake:
    """The same for a method, whose ``self`` comes first."""
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, change)


def in_net(change: Callable[[ProGen2], object]) -> Mistake:
    def make(_: pytest.MonkeyPatch, net: ProGen2) -> None:
        change(net)

    return make


def with_scale(change: Callable[[float], float]) -> Mistake:
    return in_module("self_attention", lambda real, batch, scale, maps: real(batch, change(scale), maps))


def with_turns(rotated: Callable[[ProGen2], int], base: Callable[[ProGen2], int]) -> Mistake:
    """So many channels turned, with frequencies over so many."""

    def turns(self: ProGen2, positions: Tensor) -> Turns:
        pair = torch.arange(0, rotated(self), 2, dtype=torch.float64)
        return Turns.at(positions, 10_000 ** (-pair / base(self)), torch.float64)

    return in_method(ProGen2, "turns", turns)


def with_order(*order: int) -> Mistake:
    """Which thirds of the projection are the queries, the values and the keys."""

    def forward(self: Attention, x: Tensor, turns: Turns, attend: Any) -> Tensor:
        parts = self.qvk(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, v, k = (parts[i] for i in order)
        return self.out(attend(rotary_pairs(q, turns), rotary_pairs(k, turns), v).flatten(-2))

    return in_method(Attention, "forward", forward)


def sequential(self: Block, x: Tensor, turns: Turns, attend: Any) -> Tensor:
    x = x + self.attention(self.norm(x), turns, attend)
    return x + self.feed_forward(self.norm(x))


def from_the_norm(self: Block, x: Tensor, turns: Turns, attend: Any) -> Tensor:
    normed = self.norm(x)
    return self.attention(normed, turns, attend) + self.feed_forward(normed) + normed


def half_split(real: Any, x: Tensor, turns: Turns) -> Tensor:
    rotated = 2 * turns.cos.shape[-1]
    return torch.cat((rotary_half(x[..., :rotated], turns), x[..., rotated:]), -1)


def last_channels(real: Any, x: Tensor, turns: Turns) -> Tensor:
    still = x.shape[-1] - 2 * turns.cos.shape[-1]
    return torch.cat((x[..., :still], real(x[..., still:], turns)), -1)


def set_eps(eps: float, net: ProGen2) -> None:
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps


def head_size(net: ProGen2) -> int:
    return net.config.head_size


def rotated(net: ProGen2) -> int:
    return net.config.rotated


MISTAKES: dict[str, Mistake] = {
    "keys before values": with_order(0, 2, 1),
    "values before queries": with_order(1, 0, 2),
    "halves turned in place of pairs": in_module("rotary_pairs", half_split, rotary),
    "turned the other way": in_module(
        "rotary_pairs", lambda real, x, turns: real(x, Turns(turns.cos, -turns.sin)), rotary
    ),
    "the last channels turned": in_module("rotary_pairs", last_channels, rotary),
    "whole heads turned": with_turns(head_size, head_size),
    "frequencies over the head size": with_turns(rotated, head_size),
    "no scale": with_scale(lambda scale: 1.0),
    "scaled twice": with_scale(lambda scale: scale**2),
    "attention, then feed-forward": in_method(Block, "forward", sequential),
    "the residual from the norm": in_method(Block, "forward", from_the_norm),
    "no causal mask": in_module("attention", lambda real, *args, **how: real(*args, **how | {"causal": False})),
    "the exact gelu": in_method(FeedForward, "forward", lambda self, x: self.down(self.up(x, "gelu"))),
    "no last norm": in_net(lambda net: setattr(net.norm, "forward", lambda x: x)),
    "the head is the embedding": in_net(lambda net: net.lm_head.weight.copy_(net.embed.weight)),
    "no bias of the head": in_net(lambda net: net.lm_head.bias.zero_()),
    "an epsilon of 1e-6": in_net(partial(set_eps, 1e-6)),
    "an epsilon of 1e-12": in_net(partial(set_eps, 1e-12)),
}


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(WHERE)
    net = case.net()
    assert case.error_of(net) < ROUNDED
    MISTAKES[mistake](monkeypatch, net)
    assert case.error_of(net) > 10 * ROUNDED


@pytest.mark.parametrize("shards", [1, 2, 4, 16])
def test_other_numbers_of_shards_are_caught(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is the plain way, four are CodeGen's (and were ProGen2's until e8adc55), sixteen are one per head."""
    case = Case(WHERE)
    assert case.settings["n_head"] == 16 and published.SHARDS == 8
    monkeypatch.setattr(published, "SHARDS", shards)
    assert case.error_of(case.net()) > 1


def test_positions_from_one_are_caught() -> None:
    """Attention looks at distances alone, so nothing but a cached key shows them."""
    case = Case("half_rotary_buffers")
    batch = case.batch
    case.batch = Packed(batch.tokens, batch.lengths, batch.offsets, batch.positions + 1)
    found, truth = case.outputs(case.net()), case.truth()
    assert (found["logits"][0] - truth["logits"][0]).abs().max() < ROUNDED
    assert (found["keys.2"][0] - truth["keys.2"][0]).abs().max() > 1e-3


def test_each_transposed_matrix_is_caught(case: Case, tmp_path: Path) -> None:
    """The only square ones are those behind attention; no shape tells."""
    tensors = case.tensors()
    square = [name for name, x in tensors.items() if x.dim() == 2 and x.shape[0] == x.shape[1]]
    assert len(square) == case.layers
    for name in square:
        assert case.error_with(tensors | {name: tensors[name].T}, tmp_path) > 1e-3, name


def test_each_swap_of_two_tensors_is_caught(case: Case, tmp_path: Path) -> None:
    """It fails too if two tensors of one shape change places: each with the next of that shape in the alphabet."""
    alike: dict[torch.Size, list[str]] = {}
    tensors = case.tensors()
    for name in sorted(tensors):
        alike.setdefault(tensors[name].shape, []).append(name)
    swaps = [pair for names in alike.values() for pair in pairwise(names)]
    assert len(swaps) > len(tensors) / 2
    for name, other in swaps:
        wrong = tensors | {name: tensors[other], other: tensors[name]}
        assert case.error_with(wrong, tmp_path) > 1e-3, (name, other)


def test_each_missing_tensor_is_refused(case: Case, tmp_path: Path) -> None:
    """By name, before anything is computed. A ProGen2 is known by its first projection: without it, it is of none."""
    tensors = case.tensors()
    for name in tensors:
        with pytest.raises(plm.CheckpointError) as error:
            case.error_with({other: x for other, x in tensors.items() if other != name}, tmp_path)
        said = "of no family" if name == published.HUB_MARK else name
        assert said in str(error.value), name


@pytest.mark.parametrize("changes", [{"rotated": 2}, {"heads": 8, "rotated": 4}, {"norm_eps": 1e-6}])
def test_each_wrong_setting_is_caught(changes: dict[str, Any]) -> None:
    case = Case(WHERE)
    net = case.net()
    wrong = ProGen2(replace(net.config, **changes)).double()
    wrong.load_state_dict(net.state_dict())
    assert case.error_of(wrong) > 10 * ROUNDED
