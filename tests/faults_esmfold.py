"""Mistakes that ports of ESMFold are known to make, each as a change of our network, its weights or what it calls.

test_faults_esmfold.py measures what each amounts to.
"""

import dataclasses
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plm.esmfold import model as folding
from plm.esmfold import structure
from plm.esmfold.confidence import PairErrors
from plm.esmfold.geometry import rotation, turned
from plm.esmfold.model import ESMFold
from plm.esmfold.pair import TriangleMultiplication
from plm.esmfold.residues import LETTERS, Tables, tables
from plm.esmfold.trunk import Block
from plm.layers import Linear

Mistake = Callable[[pytest.MonkeyPatch, ESMFold], None]


def in_module(name: str, change: Callable[..., Any], owner: Any = folding) -> Mistake:
    """Put ``change(the original, ...)`` in the place of what the network calls by this name."""
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, partial(change, getattr(owner, name)))


def in_method(owner: type, name: str, change: Any) -> Mistake:
    """The same for a method, whose ``self`` comes first."""
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, change)


def in_net(change: Callable[[ESMFold], object]) -> Mistake:
    return lambda _, net: void(change(net))


def void(_: object) -> None:
    """Changes of a network are made for their effect."""


def in_blocks(change: Callable[[Any], object]) -> Mistake:
    return in_net(lambda net: [change(block) for block in net.blocks])


def before(part: Callable[[ESMFold], nn.Module], change: Callable[[ESMFold, Any], Any]) -> Mistake:
    """Change what a part is given."""
    return in_net(lambda net: part(net).register_forward_pre_hook(lambda _, inputs: change(net, inputs)))


def after(part: Callable[[ESMFold], nn.Module], change: Callable[[Any], Any]) -> Mistake:
    """Change what a part gives."""
    return in_net(lambda net: part(net).register_forward_hook(lambda _, inputs, out: change(out)))


def affine(layer: Linear, change: Callable[[Tensor], Tensor]) -> None:
    """Change the rows of a weight, and its bias with them."""
    for x in (layer.weight, layer.bias):
        if x is not None:
            x.copy_(change(x).clone())


def reordered(layer: Linear, there: str, here: str, **sizes: int) -> None:
    """The rows in another order."""
    affine(layer, lambda x: rearrange(x, f"{there} ... -> {here} ...", **sizes))


# Mistakes of several lines


def biased_when_there_is_something(norm: nn.LayerNorm) -> None:
    real = norm.forward
    norm.forward = lambda x: real(x) if x.any() else torch.zeros_like(x)  # type: ignore[method-assign]


def by_the_new_rotation(net: ESMFold) -> None:
    """Shifts are told in such a way that the old rotation, which is applied to them, amounts to the new one."""
    quaternion: list[Tensor] = []

    def begin(_: nn.Module, inputs: Any) -> None:
        quaternion[:] = [torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(len(inputs[0]), 4)]

    def move(_: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        turn, shift = out.chunk(2, -1)
        old = rotation(quaternion[0])
        quaternion[0] = turned(quaternion[0], turn)
        return torch.cat([turn, (old.mT @ rotation(quaternion[0]) @ shift[..., None])[..., 0]], -1)

    net.structure.register_forward_pre_hook(begin)
    net.structure.move.register_forward_hook(move)


def turned_from_the_left(real: Any, quaternion: Tensor, turn: Tensor) -> Tensor:
    conjugate = torch.tensor([1.0, -1, -1, -1], dtype=torch.float64)
    return real(quaternion * conjugate, -turn) * conjugate


def triangle(
    self: TriangleMultiplication, z: Tensor, rows: int, *, gated_by: str = "norm", normed: bool = True
) -> Tensor:
    """The formula, with the gate from what it should not be from, or without the second norm."""
    x = self.norm(z)
    a, b = (self.sides(x) * self.side_gates(x).sigmoid()).chunk(2, -1)
    product = torch.einsum("ikc,jkc->ijc" if self.outgoing else "kic,kjc->ijc", a, b)
    gate = self.gate({"norm": x, "pairs": z, "product": product}[gated_by]).sigmoid()
    return z + self.out(self.product_norm(product) if normed else product) * gate


def bias_of_later_pairs(self: Block, s: Tensor, z: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    z = self.sequence_to_pair(z, s, rows)
    for part in (self.outgoing, self.incoming, self.starting, self.ending, self.pair_transition):
        z = part(z, rows)
    s = s + self.attention(self.attention_norm(s), self.pair_to_sequence(z, rows))
    return s + self.transition(s), z


def pairs_of_earlier_residues(self: Block, s: Tensor, z: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    old = s
    s = s + self.attention(self.attention_norm(s), self.pair_to_sequence(z, rows))
    z = self.sequence_to_pair(z, old, rows)
    for part in (self.outgoing, self.incoming, self.starting, self.ending, self.pair_transition):
        z = part(z, rows)
    return s + self.transition(s), z


def bins_of(cb: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Mistake:
    """From another CB, made of CA, N to CA and CA to C."""

    def bins(real: Any, backbone: Tensor) -> Tensor:
        n, ca, c = backbone.unbind(1)
        squares = (x := cb(ca, ca - n, c - ca))[:, None] - x
        edges = torch.linspace(3.375, 21.375, 14, dtype=torch.float64).square()
        return (squares.square().sum(-1)[..., None] > edges).sum(-1)

    return in_module("distance_bins", bins)


def bins_without_glycine(monkeypatch: pytest.MonkeyPatch, net: ESMFold) -> None:
    """CA is taken for the CB that glycine does not have."""
    kept: dict[str, Tensor] = {}
    real = folding.backbone_atoms

    def backbone(types: Tensor, *rest: Any) -> Tensor:
        kept["types"] = types
        return real(types, *rest)

    def bins(points: Tensor) -> Tensor:
        n, ca, c = points.unbind(1)
        b, d = ca - n, c - ca
        cb = -0.58273431 * torch.linalg.cross(b, d) + 0.56802827 * b - 0.54067466 * d + ca
        cb = torch.where((kept["types"] == LETTERS.index("G"))[:, None], ca, cb)
        edges = torch.linspace(3.375, 21.375, 14, dtype=torch.float64).square()
        return ((cb[:, None] - cb).square().sum(-1)[..., None] > edges).sum(-1)

    monkeypatch.setattr(folding, "backbone_atoms", backbone)
    monkeypatch.setattr(folding, "distance_bins", bins)


def wrong_frames(parents: tuple[int, int, int] = (4, 5, 6), turn_of: int = 1) -> Mistake:
    """Frames of groups with chi 2 to 4 hanging on others, or turned by torsions of their neighbours."""

    def frames(real: Any, types: Tensor, rotations: Tensor, translation: Tensor, angles: Tensor, fixed: Tables) -> Any:
        sine, cosine = torch.cat([angles.new_tensor([0.0, 1.0]).expand(len(types), 1, 2), angles], 1).unbind(-1)
        one, zero = torch.ones_like(sine), torch.zeros_like(sine)
        entries = (one, zero, zero, zero, zero, cosine, -sine, zero, zero, sine, cosine, zero, zero, zero, zero, one)
        local = fixed.frames.double()[types] @ torch.stack(entries, -1).unflatten(-1, (4, 4))
        local[..., 3, 3] = 1
        found = list(local.unbind(1))
        for group, parent in zip((5, 6, 7), parents, strict=True):
            found[group] = found[parent] @ local[:, group]
        first = torch.eye(4, dtype=torch.float64).repeat(len(types), 1, 1)
        first[:, :3, :3], first[:, :3, 3] = rotations, translation
        return first[:, None] @ torch.stack(found, 1)

    return in_module("group_frames", frames)


def with_tables(change: Callable[[Tables], Tables]) -> Mistake:
    return in_module("tables", lambda real: change(real()))


def phi_for_psi(fixed: Tables) -> Tables:
    frames = fixed.frames.clone()
    frames[:, 3] = frames[:, 2]
    return dataclasses.replace(fixed, frames=frames)


def errors(**wrong: Any) -> Mistake:
    """PAE and pTM by the formula, with a wrong part."""

    def found(real: Any, head: Linear, z: Tensor, rows: int) -> PairErrors:
        how = {"least": 19, "minus": 1.8, "first": 0.25, "best": torch.max, "turned": False} | wrong
        shares = head(z).softmax(-1)
        middles = torch.arange(64, dtype=torch.float64) / 2 + how["first"]
        near = 1.24 * (max(len(z), how["least"]) - 15) ** (1 / 3) - how["minus"]
        rows_of = (shares @ (1 / (1 + (middles / near) ** 2))).mean(-1)
        expected = shares @ middles
        return PairErrors(expected.T if how["turned"] else expected, float(how["best"](rows_of)))

    return in_module("pair_errors", found)


def lengths_with_eps(net: ESMFold, inputs: Any, eps: float) -> Any:
    """Lengths of the points that residues have found, which the last layer of IPA reads, with another epsilon."""
    cfg = net.config.structure
    x = inputs[0].clone()
    points = cfg.heads * cfg.value_points
    start = cfg.heads * cfg.head_size
    coordinates = x[:, start : start + 3 * points].unflatten(1, (3, points))
    x[:, start + 3 * points : start + 4 * points] = (coordinates.square().sum(1) + eps).sqrt()
    return (x, *inputs[1:])


def coordinates_together(net: ESMFold) -> None:
    """The last layer of IPA reads x, y and z of each point, where it should read x of all, y of all and z of all."""
    cfg = net.config.structure
    columns = slice(start := cfg.heads * cfg.head_size, start + 3 * cfg.heads * cfg.value_points)
    weight = net.structure.attention.out.weight
    weight[:, columns] = rearrange(weight[:, columns].clone(), "o (xyz hp) -> o (hp xyz)", xyz=3)


def queries(part: Any, factor: float) -> None:
    """The first third of a projection to queries, keys and values."""
    part.qkv.weight[: len(part.qkv.weight) // 3] *= factor


def exact_frequencies(net: ESMFold) -> None:
    pairs = torch.arange(0, net.stem.config.head_size, 2)
    net.stem.frequencies = 1 / 10_000 ** (pairs / net.stem.config.head_size)


def eps_of_norms(net: ESMFold, eps: float) -> None:
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


MISTAKES: dict[str, Mistake] = {
    # the language model
    "the last layer without its norm": in_net(lambda net: setattr(net.stem.norm, "forward", lambda x: x)),
    "no factor of 0.88": in_net(
        lambda net: setattr(net.stem, "config", dataclasses.replace(net.stem.config, token_dropout=False))
    ),
    "frequencies that are not rounded": in_net(exact_frequencies),
    "weights of layers the other way round": in_net(lambda net: net.layer_weights.copy_(net.layer_weights.flip(0))),
    # what the trunk begins with
    "residues embedded by their number plus 1": in_net(
        lambda net: net.embed.weight.copy_(net.embed.weight.roll(-1, 0))
    ),
    "nothing from the norms in the first pass": in_net(
        lambda net: [biased_when_there_is_something(norm) for norm in (net.recycle_norm, net.recycle_pair_norm)]
    ),
    "distances along the chain the other way": in_net(
        lambda net: net.relative_positions.weight[1:].copy_(net.relative_positions.weight[1:].flip(0))
    ),
    "distances along the chain without the place for padding": in_net(
        lambda net: net.relative_positions.weight.copy_(net.relative_positions.weight.roll(1, 0))
    ),
    # recycles
    "no distances told": in_module("distance_bins", lambda real, x: torch.zeros_like(real(x))),
    "bins off by one": in_module("distance_bins", lambda real, x: (real(x) + 1).clamp(max=14)),
    "CB on the other side": bins_of(
        lambda ca, b, d: 0.58273431 * torch.linalg.cross(b, d) + 0.56802827 * b - 0.54067466 * d + ca
    ),
    "CA for CB": bins_of(lambda ca, b, d: ca),
    "glycine without CB": bins_without_glycine,
    # blocks
    "queries, keys and values of all heads, not of each": in_blocks(
        lambda block: reordered(block.attention.qkv, "(parts h d)", "(h parts d)", parts=3, h=block.attention.heads)
    ),
    "residues' attention without a scale": in_blocks(lambda block: queries(block.attention, 1 / block.attention.scale)),
    "triangle attention without a scale": in_blocks(
        lambda block: [queries(part, 1 / part.scale) for part in (block.starting, block.ending)]
    ),
    "a bias from later pairs": in_method(Block, "forward", bias_of_later_pairs),
    "pairs from earlier residues": in_method(Block, "forward", pairs_of_earlier_residues),
    "i and j of residues to pairs swapped": in_blocks(lambda block: affine(block.sequence_to_pair.qk, halves)),
    "outgoing and incoming swapped": in_blocks(
        lambda block: [setattr(part, "outgoing", not part.outgoing) for part in (block.outgoing, block.incoming)]
    ),
    "starting and ending swapped": in_blocks(
        lambda block: [setattr(part, "ending", not part.ending) for part in (block.starting, block.ending)]
    ),
    "sides of triangles swapped": in_blocks(
        lambda block: [affine(x, halves) for part in (block.outgoing,) for x in (part.sides, part.side_gates)]
    ),
    "triangles gated by pairs without a norm": in_method(
        TriangleMultiplication, "forward", partialmethod(triangle, gated_by="pairs")
    ),
    "triangles gated by their product": in_method(
        TriangleMultiplication, "forward", partialmethod(triangle, gated_by="product")
    ),
    "triangles without the second norm": in_method(
        TriangleMultiplication, "forward", partialmethod(triangle, normed=False)
    ),
    # the structure module
    "keys and values of all heads, not of each": in_net(
        lambda net: reordered(
            net.structure.attention.key_value, "(two h d)", "(h two d)", two=2, h=net.config.structure.heads
        )
    ),
    "points with x, y and z together": in_net(
        lambda net: [
            reordered(part, "(hp xyz)", "(xyz hp)", xyz=3)
            for part in (net.structure.attention.query_points, net.structure.attention.key_value_points)
        ]
    ),
    "found points with x, y and z together": in_net(coordinates_together),
    "Ångström in attention": before(
        lambda net: net.structure.attention,
        lambda net, inputs: (*inputs[:-1], inputs[-1] * net.config.structure.scale),
    ),
    "no square root of a third": in_net(lambda net: affine(net.structure.attention.pair_bias, lambda x: x * 3**0.5)),
    "no softplus": in_module("softplus", lambda real, x: x, F),
    "shifted by the new rotation": in_net(by_the_new_rotation),
    "turned from the left": in_module("turned", turned_from_the_left, structure),
    "turned the other way": in_module("rotation", lambda real, x: real(x).mT, structure),
    "no norm behind the transition": in_net(lambda net: setattr(net.structure.transition.norm, "forward", lambda x: x)),
    "torsions from behind the first layer": before(
        lambda net: net.structure.torsions, lambda net, inputs: (inputs[0], net.structure.first(inputs[1]))
    ),
    # atoms
    "cosine before sine": in_module("group_frames", lambda real, *args: real(*args[:3], args[3].flip(-1), args[4])),
    "torsions of the neighbours": in_module(
        "group_frames", lambda real, *args: real(*args[:3], args[3].roll(1, 1), args[4])
    ),
    "chi 2 on the backbone": wrong_frames(parents=(0, 5, 6)),
    "chi 3 on chi 1": wrong_frames(parents=(4, 4, 6)),
    "chi 4 on chi 2": wrong_frames(parents=(4, 5, 5)),
    "phi's frame for psi": with_tables(phi_for_psi),
    # confidence
    "an activation in the head of pLDDT": after(lambda net: net.confidence_head.first, torch.relu),
    "another in the head of pLDDT": after(lambda net: net.confidence_head.second, torch.relu),
    "levels from their lower ends": in_module("accuracy", lambda real, logits: real(logits) - 0.01),
    "PAE transposed": errors(turned=True),
    "errors from the lower ends of their bins": errors(first=0.0),
    "pTM of the mean row": errors(best=torch.mean),
    "pTM with another d0": errors(minus=1.5),
    "another epsilon of norms": in_net(partial(eps_of_norms, eps=1e-6)),
}


def unrounded(_: Tables) -> Tables:
    """The tables as they are computed, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return tables.__wrapped__()
    finally:
        torch.set_default_dtype(torch.float32)


SMALL: dict[str, Mistake] = {
    "constants that are not rounded to float32": with_tables(unrounded),
    "an epsilon of 1e-12 in lengths of points": before(
        lambda net: net.structure.attention.out, partial(lengths_with_eps, eps=1e-12)
    ),
}
