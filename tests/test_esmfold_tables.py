"""What ESMFold knows of the residues: the same numbers, bit for bit, as in openfold's tables in transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.esm.openfold_utils import make_atom14_masks
from transformers.models.esm.openfold_utils import residue_constants as theirs

from plm.esmfold.residues import LETTERS, RESIDUES, UNKNOWN, frame, tables

INDICES = make_atom14_masks({"aatype": torch.arange(len(LETTERS))})
WANTED = {
    "frames": torch.tensor(theirs.restype_rigid_group_default_frame),
    "group": torch.tensor(theirs.restype_atom14_to_rigid_group),
    "present": torch.tensor(theirs.restype_atom14_mask),
    "ideal": torch.tensor(theirs.restype_atom14_rigid_group_positions),
    "kinds": INDICES["residx_atom14_to_atom37"],
    "places": INDICES["residx_atom37_to_atom14"],
    "kinds_present": INDICES["atom37_atom_exists"],
}


@pytest.mark.parametrize("name", WANTED)
def test_every_table(name: str) -> None:
    found: Tensor = getattr(tables(), name)
    assert found.shape == WANTED[name].shape
    assert found.dtype == (torch.float32 if WANTED[name].is_floating_point() else torch.int64)
    assert torch.equal(found, WANTED[name].to(found.dtype))


def test_names() -> None:
    fixed = tables()
    assert [*LETTERS] == theirs.restypes_with_x
    assert fixed.names == (*(theirs.restype_1to3[letter] for letter in RESIDUES), "UNK")
    assert fixed.atoms == tuple(theirs.atom_types)
    for type_, name in enumerate(fixed.names):
        there = [fixed.atoms[kind] for kind in fixed.kinds[type_][fixed.present[type_].bool()]]
        assert there == [atom for atom in theirs.restype_name_to_atom14_names[name] if atom]


def test_how_many_atoms_there_are() -> None:
    fixed = tables()
    assert fixed.present.sum() == fixed.kinds_present.sum() == 167
    assert not fixed.present[UNKNOWN].any() and not fixed.frames[UNKNOWN].any()


def test_places_are_the_way_back_from_kinds() -> None:
    fixed = tables()
    for type_ in range(UNKNOWN):
        for kind in fixed.kinds_present[type_].nonzero().flatten():
            assert fixed.kinds[type_, fixed.places[type_, kind]] == kind


def test_frames_are_rotations() -> None:
    """Or zero, where there is no such group: all of X, and all but 39 of the four chi of twenty residues."""
    turns = tables().frames[..., :3, :3]
    there = turns.flatten(2).any(-1)
    assert there[:UNKNOWN, :4].all() and there[:UNKNOWN, 4:].sum() == 39
    found = turns[there].double()
    # The noise floor: one rounding to float32 of each of nine numbers, 1e-7.
    torch.testing.assert_close(found @ found.mT, torch.eye(3).double().expand_as(found), rtol=0, atol=5e-7)
    assert (torch.linalg.det(found) > 0).all()


def test_a_frame() -> None:
    """Its x axis points along, and what lies aside is in the half plane of y."""
    along, aside, origin = torch.tensor([[0.0, 0, 2], [3.0, 0, 5], [1.0, 2, 3]]).double()
    wanted = [[0, 1, 0, 1], [0, 0, 1, 2], [1, 0, 0, 3], [0, 0, 0, 1]]
    assert frame(along, aside, origin).tolist() == wanted
