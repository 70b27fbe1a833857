"""Frames in space, and from backbone frames and torsions to atoms.

A frame is a unit quaternion ``(w, x, y, z)`` and a translation. Letters: l residues, g rigid groups, p points.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from plm.esmfold.residues import Tables

CA, BACKBONE = 1, 3  # the first three atoms of every residue are N, CA and C


def rotation(quaternion: Tensor) -> Tensor:
    """``[..., 4] -> [..., 3, 3]`` of unit quaternions."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def turned(quaternion: Tensor, turn: Tensor) -> Tensor:
    """Quaternions ``[..., 4]`` times ``(1, b, c, d)``, a turn within their own frames; ``turn`` is ``[..., 3]``."""
    w, x, y, z = quaternion.unbind(-1)
    b, c, d = turn.unbind(-1)
    change = (-x * b - y * c - z * d, w * b + y * d - z * c, w * c - x * d + z * b, w * d + x * c - y * b)
    return F.normalize(quaternion + torch.stack(change, -1), dim=-1, eps=0)


def place(points: Tensor, rotations: Tensor, translation: Tensor) -> Tensor:
    """Points ``[l, ..., 3]`` of frames ``[l, 3, 3]``, ``[l, 3]`` in space."""
    shape = (len(points),) + (1,) * (points.dim() - 2)
    return torch.einsum("lij,l...j->l...i", rotations, points) + translation.view(*shape, 3)


def unplace(points: Tensor, rotations: Tensor, translation: Tensor) -> Tensor:
    """The inverse of ``place``."""
    shape = (len(points),) + (1,) * (points.dim() - 2)
    return torch.einsum("lji,l...j->l...i", rotations, points - translation.view(*shape, 3))


def group_frames(types: Tensor, rotations: Tensor, translation: Tensor, angles: Tensor, tables: Tables) -> Tensor:
    """Where the rigid groups of each residue are: ``[l, 8, 4, 4]``.

    Args:
        types: ``[l]`` residue types.
        rotations, translation: the backbone's, ``[l, 3, 3]`` and ``[l, 3]`` Ångström.
        angles: ``[l, 7, 2]`` sine and cosine of pre-omega, phi, psi and chi 1 to 4.
    """
    still = angles.new_tensor([0.0, 1.0]).expand(len(angles), 1, 2)  # the backbone does not turn
    sine, cosine = torch.cat([still, angles], 1).unbind(-1)
    turn = angles.new_zeros(*sine.shape, 4, 4)  # about the x axis
    turn[..., 0, 0] = turn[..., 3, 3] = 1
    turn[..., 1, 1], turn[..., 1, 2], turn[..., 2, 1], turn[..., 2, 2] = cosine, -sine, sine, cosine
    local = tables.frames.to(angles)[types] @ turn
    local[..., 3, 3] = 1  # groups that do not exist are flat, and lie where the one that they hang on does
    chained = list(local.unbind(1))
    for chi in (5, 6, 7):
        chained[chi] = chained[chi - 1] @ local[:, chi]
    backbone = angles.new_zeros(len(angles), 1, 4, 4)
    backbone[:, 0, :3, :3], backbone[:, 0, :3, 3], backbone[:, 0, 3, 3] = rotations, translation, 1
    return backbone @ torch.stack(chained, 1)


def atoms(types: Tensor, frames: Tensor, tables: Tables) -> Tensor:
    """Positions ``[l, 14, 3]`` in Ångström of all atoms, from ``group_frames``; atoms that do not exist are at zero."""
    group, ideal, present = (x.to(frames.device)[types] for x in (tables.group, tables.ideal, tables.present))
    own = frames[torch.arange(len(types), device=types.device)[:, None], group]
    found = torch.einsum("laij,laj->lai", own[..., :3, :3], ideal.to(frames)) + own[..., :3, 3]
    return found * present.to(frames)[..., None]


def backbone_atoms(types: Tensor, rotations: Tensor, translation: Tensor, tables: Tables) -> Tensor:
    """The same for N, CA and C alone, which no torsion moves: ``[l, 3, 3]``."""
    ideal, present = (x.to(rotations)[types.to(x.device)][:, :BACKBONE] for x in (tables.ideal, tables.present))
    return place(ideal, rotations, translation) * present[..., None]


def distance_bins(backbone: Tensor) -> Tensor:
    """Which of 15 ranges the distance of two (virtual) CB is in: ``[l, 3, 3]`` Ångström -> ``[l, l]`` int64.

    Glycine has one as well; X stands at the origin.
    """
    n, ca, c = backbone.unbind(1)
    b, d = ca - n, c - ca
    cb = -0.58273431 * torch.linalg.cross(b, d) + 0.56802827 * b - 0.54067466 * d + ca
    squares = (cb[:, None] - cb[None]).square().sum(-1)
    edges = torch.linspace(3.375, 21.375, 14, dtype=cb.dtype, device=cb.device).square()
    return torch.bucketize(squares, edges)  # how many edges are less


def point_sums(weights: Tensor, points: Tensor) -> Tensor:
    """Weighted sums of points: ``[h, l, k]``, ``[k, h, p, 3]`` -> ``[l, h, p, 3]``."""
    flat = rearrange(points, "k h p xyz -> h k (p xyz)")
    return rearrange(weights @ flat, "h l (p xyz) -> l h p xyz", xyz=3)
