"""From text to what the network reads: chains of residues, joined by a linker and far apart in numbering.

The language model has seen single chains only, so several are joined by a flexible linker, and the trunk is told that
they are far apart: each chain's numbers start ``residue_gap`` later (Lin et al. 2023; facebookresearch/esm@2b36991).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from plm.esmfold.residues import LETTERS, UNKNOWN
from plm.vocabularies import ESM

LINKER, RESIDUE_GAP = "G" * 25, 512
LARGEST_GAP = 1_000_000
READ_AS_X = "BJOUZ"
AS_X = str.maketrans(dict.fromkeys(READ_AS_X, LETTERS[UNKNOWN]))


@dataclass(frozen=True)
class Chains:
    """One protein of one or more chains.

    Attributes:
        letters: residues of all chains, linkers between them included.
        positions: ``[l]`` int64, number of each residue along the chain, from 0.
        chain: ``[l]`` int64, which chain it belongs to; a linker belongs to the one before it.
        linker: ``[l]`` bool, where the linkers are.
        hidden: ``[l]`` bool, residues that the language model does not see; None hides none.
        joined_by, residue_gap: what ``read_chains`` was told.
    """

    letters: str
    positions: Tensor
    chain: Tensor
    linker: Tensor
    hidden: Tensor | None = None
    joined_by: str = LINKER
    residue_gap: int = RESIDUE_GAP

    @property
    def length(self) -> int:
        """Residues and linkers."""
        return len(self.letters)

    @cached_property
    def types(self) -> Tensor:
        """``[l]`` int64 residue types, in AlphaFold's order."""
        return torch.tensor([LETTERS.find(letter) for letter in self.letters])

    @cached_property
    def stem_tokens(self) -> Tensor:
        """``[l + 2]`` int64 tokens of the language model, with its start and end, once around all chains."""
        ids = torch.tensor([ESM.index(letter) for letter in self.letters])
        if self.hidden is not None:
            ids[self.hidden] = ESM.index("<mask>")
        return torch.cat([torch.tensor([ESM.index("<cls>")]), ids, torch.tensor([ESM.index("<eos>")])])


def read_chains(
    text: str, *, linker: str = LINKER, residue_gap: int = RESIDUE_GAP, hidden: Tensor | None = None
) -> Chains:
    """Chains written ``A:B``, in upper case. B, J, O, U and Z are read as X, as everything unknown is in the original.

    Args:
        linker: residues between two chains; may be empty.
        residue_gap: added to the numbers of each chain and its linker, once for every chain before it.
        hidden: ``[l]`` bool over residues and linkers, see `Chains`.

    Raises: ValueError for an empty chain, a letter that is none, a linker that is no residues, a hidden of wrong shape.
    """
    parts = text.split(":")
    if empty := [i + 1 for i, part in enumerate(parts) if not part]:
        several = f"chain {', '.join(map(str, empty))} of {len(parts)} is empty" if len(parts) > 1 else "it is empty"
        raise ValueError(f"{several}; chains are written A:B")
    for what, part in (("the linker", linker), *((f"chain {i + 1}", part) for i, part in enumerate(parts))):
        for at, letter in enumerate(part):
            if letter not in LETTERS + READ_AS_X:
                case = " Residues are upper case." if letter.upper() in LETTERS else ""
                raise ValueError(
                    f"character {letter!r} at position {at + 1} of {what} is no residue; wanted {LETTERS}, "
                    f"or {READ_AS_X}, which are read as X.{case}"
                )
    if type(residue_gap) is not int or not 0 <= residue_gap <= LARGEST_GAP:
        raise ValueError(f"residue_gap must be a whole number from 0 to {LARGEST_GAP:,}; got {residue_gap!r}")
    letters = linker.join(parts).translate(AS_X)
    chain, between = [], []
    for i, part in enumerate(parts):
        follows = linker if i + 1 < len(parts) else ""
        chain += [i] * (len(part) + len(follows))
        between += [False] * len(part) + [True] * len(follows)
    number = torch.tensor(chain)
    if hidden is not None and (hidden.shape != number.shape or hidden.dtype != torch.bool):
        raise ValueError(
            f"hidden must be bool and have shape [{len(number)}], one per residue and linker; got {hidden.dtype} and "
            f"{[*hidden.shape]}"
        )
    positions = torch.arange(len(letters)) + residue_gap * number
    return Chains(letters, positions, number, torch.tensor(between), hidden, linker, residue_gap)
