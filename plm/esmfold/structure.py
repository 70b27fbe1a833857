"""The structure module: from residues and pairs to a frame for every residue, and to atoms.

Jumper et al. 2021, algorithms 20 to 24, as in openfold@4b41059: one set of weights, used in every layer. Coordinates
are in units of ``config.scale`` Ångström until atoms are placed. Letters: l residues (i asks, j answers), h heads,
p points.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plm.esmfold.config import StructureConfig
from plm.esmfold.geometry import place, point_sums, rotation, turned, unplace
from plm.layers import Linear


class InvariantPointAttention(nn.Module):
    """Attention by content, by pair, and by how near points of two residues lie in space (algorithm 22)."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.config = config
        h, c = config.heads, config.channels
        self.query = Linear(c, h * config.head_size)
        self.key_value = Linear(c, 2 * h * config.head_size)
        self.query_points = Linear(c, h * config.query_points * 3)
        self.key_value_points = Linear(c, h * (config.query_points + config.value_points) * 3)
        self.pair_bias = Linear(config.pair, h)
        self.head_weights = nn.Parameter(torch.zeros(h))
        self.out = Linear(h * (config.head_size + 4 * config.value_points + config.pair), c)

    def forward(self, s: Tensor, z: Tensor, bias: Tensor, rotations: Tensor, translation: Tensor) -> Tensor:
        """``bias`` ``[h, l, l]`` is ``bias_of(z)``, the same in every layer."""
        cfg, h, length = self.config, self.config.heads, len(s)
        q = self.query(s).view(length, h, -1)
        k, v = self.key_value(s).view(length, 2, h, -1).unbind(1)
        q_points = place(self.query_points(s).view(length, h, -1, 3), rotations, translation)
        points = place(self.key_value_points(s).view(length, h, -1, 3), rotations, translation)
        k_points, v_points = points.split((cfg.query_points, cfg.value_points), 2)

        logits = (3 * cfg.head_size) ** -0.5 * torch.einsum("ihd,jhd->hij", q, k) + 3**-0.5 * bias
        near = F.softplus(self.head_weights) * (2 / (27 * cfg.query_points)) ** 0.5
        weights = (logits - 0.5 * near[:, None, None] * squared_distances(q_points, k_points)).softmax(-1)

        mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        mixed_points = unplace(point_sums(weights, v_points), rotations, translation)
        lengths = (mixed_points.square().sum(-1) + 1e-8).sqrt().flatten(1)
        mixed_pairs = (weights.transpose(0, 1) @ z).flatten(1)  # [i, h, j] by [i, j, p]
        coordinates = rearrange(mixed_points, "l h p xyz -> l (xyz h p)")
        return self.out(torch.cat([mixed, coordinates, lengths, mixed_pairs], -1))  # type: ignore[no-any-return]

    def bias_of(self, z: Tensor) -> Tensor:
        """``[l, l, p] -> [h, l, l]``."""
        return self.pair_bias(z.flatten(0, 1)).T.unflatten(1, z.shape[:2])  # type: ignore[no-any-return]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Sum over points of the squared distance: ``[i, h, p, 3]``, ``[j, h, p, 3]`` -> ``[h, i, j]``.

    The points of a head are one point of 3 p dimensions. Not as |a|^2 + |b|^2 - 2 a b, which cancels.
    """
    far = torch.cdist(
        rearrange(a, "i h p xyz -> h i (p xyz)"),
        rearrange(b, "j h p xyz -> h j (p xyz)"),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    return far.square()


class TransitionLayer(nn.Module):
    """``[l, c] -> [l, c]``, to be added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Linear(channels, channels)
        self.second = Linear(channels, channels)
        self.third = Linear(channels, channels)

    def forward(self, s: Tensor) -> Tensor:
        return self.third(self.second(self.first(s, "relu"), "relu"))  # type: ignore[no-any-return]


class Transition(nn.Module):
    """Residual layers, then one norm."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransitionLayer(config.channels) for _ in range(config.transitions))
        self.norm = nn.LayerNorm(config.channels)

    def forward(self, s: Tensor) -> Tensor:
        for layer in self.layers:
            s = s + layer(s)
        return self.norm(s)  # type: ignore[no-any-return]


class TorsionBlock(nn.Module):
    """``[l, c] -> [l, c]``, to be added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = Linear(channels, channels)
        self.down = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.relu(), "relu"))  # type: ignore[no-any-return]


class Torsions(nn.Module):
    """Sine and cosine of the seven torsions of a residue, ``[l, 7, 2]`` (algorithm 20, lines 11 to 14)."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        c = config.angle_channels
        self.now = Linear(config.channels, c)
        self.before = Linear(config.channels, c)
        self.blocks = nn.ModuleList(TorsionBlock(c) for _ in range(config.angle_blocks))
        self.out = Linear(c, 14)

    def forward(self, s: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """From the residues now and before the first layer; also as they are before they become unit vectors."""
        x = self.now(s.relu()) + self.before(first.relu())
        for block in self.blocks:
            x = x + block(x)
        raw = self.out(x.relu()).view(len(s), 7, 2)
        return raw / raw.square().sum(-1, keepdim=True).clamp(min=1e-8).sqrt(), raw


class Frames(NamedTuple):
    """What one layer of the structure module gives."""

    quaternion: Tensor  # [l, 4] (w, x, y, z)
    translation: Tensor  # [l, 3] in units of scale
    state: Tensor  # [l, c]


class StructureModule(nn.Module):
    """Every residue starts at the origin and is moved by each layer."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.norm = nn.LayerNorm(c)
        self.pair_norm = nn.LayerNorm(config.pair)
        self.first = Linear(c, c)
        self.attention = InvariantPointAttention(config)
        self.attention_norm = nn.LayerNorm(c)
        self.transition = Transition(config)
        self.move = Linear(c, 6)
        self.torsions = Torsions(config)

    def forward(self, s: Tensor, z: Tensor) -> tuple[list[Frames], Tensor]:
        """Frames after each layer from residues ``[l, c]`` and pairs ``[l, l, p]``, and the residues before the first,
        which the torsions want as well."""
        first, z = self.norm(s), self.pair_norm(z)
        bias = self.attention.bias_of(z)
        s = self.first(first)
        quaternion = s.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(len(s), 4)
        translation = s.new_zeros(len(s), 3)
        layers = []
        for _ in range(self.config.layers):
            rotations = rotation(quaternion)
            s = self.attention_norm(s + self.attention(s, z, bias, rotations, translation))
            s = self.transition(s)
            turn, shift = self.move(s).chunk(2, -1)
            quaternion = turned(quaternion, turn)
            translation = translation + torch.einsum("lij,lj->li", rotations, shift)  # by the rotation before the turn
            layers.append(Frames(quaternion, translation, s))
        return layers, first
