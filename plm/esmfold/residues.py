"""What is known of the twenty residues: their atoms, ideal geometry, and which atoms each torsion turns.

The numbers are those that the weights were trained with: the "literature positions" of AlphaFold's
``residue_constants`` (Jumper et al. 2021, supplement 1.8.4; Apache-2.0), in thousandths of an Ångström, each in the
frame of the rigid group that the atom belongs to. All else is derived from them here.

Rigid groups: 0 backbone, 1 pre-omega (without atoms), 2 phi (without heavy atoms), 3 psi, 4 to 7 chi 1 to 4.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

RESIDUES = "ARNDCQEGHILKMFPSTWYV"  # AlphaFold's order
UNKNOWN = len(RESIDUES)  # X: no atoms
LETTERS = RESIDUES + "X"
GROUPS = 8


@dataclass(frozen=True)
class Tables:
    """By residue type (21 of them, X last) and, for atoms, by place among its up to 14 heavy atoms.

    Attributes:
        names: three-letter names.
        atoms: names of the 37 kinds of atoms, in the order in which a structure file lists them.
        group: ``[21, 14]`` int64, rigid group of each atom.
        present: ``[21, 14]`` float32, 1 for atoms that exist.
        ideal: ``[21, 14, 3]`` float32, Ångström, in the frame of the group.
        frames: ``[21, 8, 4, 4]`` float32: each group's frame within the one it hangs on, at torsion zero. All zero
            where there is no such group.
        kinds: ``[21, 14]`` int64, which of the 37 kinds each atom is; 0 where there is none.
        places: ``[21, 37]`` int64, the way back.
        kinds_present: ``[21, 37]`` float32.
    """

    names: tuple[str, ...]
    atoms: tuple[str, ...]
    group: Tensor
    present: Tensor
    ideal: Tensor
    frames: Tensor
    kinds: Tensor
    places: Tensor
    kinds_present: Tensor


@cache
def tables() -> Tables:
    """The tables, on the CPU; they are small. Computed in float64, rounded to float32 as in training."""
    data = json.loads(Path(__file__).with_name("residues.json").read_text())
    kind_of = {name: i for i, name in enumerate(data["atom37"])}
    types = len(LETTERS)
    group, kinds = torch.zeros(types, 14, dtype=torch.int64), torch.zeros(types, 14, dtype=torch.int64)
    present, kinds_present = torch.zeros(types, 14), torch.zeros(types, 37)
    ideal, frames = torch.zeros(types, 14, 3), torch.zeros(types, GROUPS, 4, 4)
    places = torch.zeros(types, 37, dtype=torch.int64)
    for type_, letter in enumerate(RESIDUES):
        residue = data["residues"][letter]
        at = {}
        for place, (name, number, *thousandths) in enumerate(residue["atoms"]):
            at[name] = torch.tensor(thousandths, dtype=torch.float64) / 1000
            group[type_, place], present[type_, place], ideal[type_, place] = number, 1, at[name]
            kinds[type_, place], places[type_, kind_of[name]], kinds_present[type_, kind_of[name]] = (
                kind_of[name],
                place,
                1,
            )
        frames[type_, 0] = frames[type_, 1] = torch.eye(4)
        frames[type_, 2] = frame(at["N"] - at["CA"], torch.tensor([1.0, 0, 0]).double(), at["N"])
        frames[type_, 3] = frame(at["C"] - at["CA"], at["CA"] - at["N"], at["C"])
        for chi, end in enumerate(residue["axis"]):  # the first hangs on the backbone, others on the one before
            along = at[end] - at["CA"] if chi == 0 else at[end]
            aside = at["N"] - at["CA"] if chi == 0 else torch.tensor([-1.0, 0, 0]).double()
            frames[type_, 4 + chi] = frame(along, aside, at[end])
    names = (*(data["residues"][letter]["name"] for letter in RESIDUES), "UNK")
    return Tables(names, tuple(data["atom37"]), group, present, ideal, frames, kinds, places, kinds_present)


def frame(along: Tensor, aside: Tensor, origin: Tensor) -> Tensor:
    """A ``[4, 4]`` transformation whose x axis points along, and whose xy plane holds aside."""
    x = along / along.norm()
    y = aside - (aside @ x) * x
    y = y / y.norm()
    found = torch.eye(4, dtype=torch.float64)
    found[:3] = torch.stack([x, y, torch.linalg.cross(x, y), origin], -1)
    return found
