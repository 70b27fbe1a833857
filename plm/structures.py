"""A predicted structure: atoms in space, how sure the model is of them, and its text as PDB or mmCIF."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from plm.esmfold.chains import AS_X
from plm.esmfold.geometry import CA
from plm.esmfold.residues import LETTERS, tables
from plm.mmcif import mmcif

Numbering = Literal["index", "chain"]
# What the columns of a PDB file hold.
PDB_CHAINS = ascii_uppercase + ascii_lowercase + digits
PDB_ATOMS, PDB_RESIDUES, PDB_LEAST, PDB_MOST = 99_999, 9_999, -999.9995, 9_999.9995
METHOD = "ESMFold, Lin et al. 2023, doi:10.1126/science.ade2574, published under the MIT licence"


class Atom(NamedTuple):
    """What a structure file says of an atom; ``residue`` counts from 0 over all chains, places are in Ångström."""

    residue: int
    name: str
    x: float
    y: float
    z: float
    plddt: float

    @property
    def element(self) -> str:
        return self.name[0]  # the heavy atoms of residues are C, N, O and S


@dataclass(frozen=True, repr=False, eq=False)
class Structure:
    """One protein as it was predicted. The linkers that joined its chains are left out everywhere.

    Attributes:
        chains: residues of each chain; X is an unknown one.
        positions: ``[L, 37, 3]`` float32 in Ångström, of the kinds of atoms in the order of
            ``plm.esmfold.residues.tables().atoms``; zero where a residue has no such atom. X has none.
        atoms: ``[L, 37]`` bool, which there are.
        plddt: ``[L, 37]`` float32, 0 to 100: how well each atom stands to those around it, as the model thinks. It is
            predicted of every kind of atom, whether the residue has it or not.
        pae: ``[L, L]`` float32 in Ångström: the error expected of residue j once residue i is aligned, in row i.
        ptm: predicted TM-score, 0 to 1; as in the original, it counts the linkers.
        chain: ``[L]`` int64, which chain each residue belongs to.
        residue_index: ``[L]`` int64, numbers from 0 as the model was told them: far apart between chains.
        settings: what it was made with: model, recycles, chunk, linker, residue_gap, dtype, device.
    """

    chains: tuple[str, ...]
    positions: Tensor
    atoms: Tensor
    plddt: Tensor
    pae: Tensor
    ptm: float
    chain: Tensor
    residue_index: Tensor
    settings: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        """Residues of all chains."""
        return len(self.residue_index)

    def __repr__(self) -> str:
        chains = "" if len(self.chains) == 1 else f" in {len(self.chains)} chains"
        return f"Structure({len(self.chain)} residues{chains}, mean pLDDT {self.mean_plddt:.1f}, pTM {self.ptm:.3f})"

    @property
    def sequence(self) -> str:
        """``A:B``."""
        return ":".join(self.chains)

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """``A`` to ``Z``, then ``AA``, ``BA``, ``CA``..., as the Protein Data Bank names chains in mmCIF.

        A PDB file has one letter per chain: there, ``a`` to ``z`` and ``0`` to ``9`` follow on ``Z``.
        """
        names = []
        for i in range(len(self.chains)):
            name, left = "", i + 1
            while left:
                left, letter = divmod(left - 1, len(ascii_uppercase))
                name += ascii_uppercase[letter]
            names.append(name)
        return tuple(names)

    @property
    def mean_plddt(self) -> float:
        """Over all atoms, 0 to 100, as in the original; of a protein without atoms, the mean of ``residue_plddt``."""
        values = self.plddt[self.atoms] if self.atoms.any() else self.residue_plddt
        return float(values.double().mean())

    @property
    def residue_plddt(self) -> Tensor:
        """``[L]``, 0 to 100: that of CA, as is usual; of X, which has none, the mean over all kinds of atoms."""
        return self.plddt[:, CA].where(self.atoms[:, CA], self.plddt.mean(-1))

    @property
    def residue_names(self) -> list[str]:
        """Three letters each, ``UNK`` for X."""
        names = tables().names
        return [names[LETTERS.index(letter)] for chain in self.chains for letter in chain]

    def to_pdb(self, *, numbering: Numbering = "index", remarks: bool = False) -> str:
        """The text of a PDB file, with pLDDT (0 to 100) as B-factors.

        Args:
            numbering: "index" numbers residues as the original does, each chain some 500 behind the one before it, and
                a chain's TER names the end of its linker; "chain" counts each chain from 1, and its TER names its last
                residue.
            remarks: begin with confidence, model and settings, which the original does not write.

        Raises: ValueError if the columns have no room for so many chains (62 at most), atoms (99,999), so high a
            residue number (9,999) or a coordinate.
        """
        numbers, ends = self.numbers(numbering), self.ends(numbering)
        self.check_columns(max(number for _, number in ends))
        names, atoms = self.residue_names, self.each_atom()
        chain = self.chain.tolist()
        lines, serial = self.remarks() if remarks else [], 0
        of_chain = {i: list(some) for i, some in groupby(atoms, lambda atom: chain[atom.residue])}
        for i, (letter, (end, last)) in enumerate(zip(PDB_CHAINS, ends, strict=False)):
            lines.append("PARENT N/A")
            for atom in of_chain.get(i, ()):  # a chain of X has no atoms
                serial += 1
                residue = f"{names[atom.residue]} {letter}{numbers[atom.residue]:>4}"
                place = f"{atom.x:8.3f}{atom.y:8.3f}{atom.z:8.3f}"
                lines.append(
                    f"ATOM  {serial:>5}  {atom.name:<3} {residue}    {place}  1.00{atom.plddt:6.2f}{atom.element:>12}  "
                )
            serial += 1
            lines.append(f"TER   {serial:>5}      {end} {letter}{last:>4}")
        return "\n".join([*lines, "END", ""])

    def to_mmcif(self, *, numbering: Numbering = "index") -> str:
        """The text of an mmCIF file, with pLDDT (0 to 100) as B-factors and confidence as ModelCIF has it.

        ``numbering`` is that of ``to_pdb``, for ``auth_seq_id``; ``label_seq_id`` always counts each chain from 1.
        """
        return mmcif(self, self.numbers(numbering))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each chain begins and ends among the residues."""
        return list(pairwise(accumulate(map(len, self.chains), initial=0)))

    def numbers(self, numbering: Numbering) -> list[int]:
        """Of each residue, as files count.

        Raises: ValueError for another ``numbering``.
        """
        if numbering not in get_args(Numbering):
            raise ValueError(f"numbering {numbering!r} is unknown; choose 'index' or 'chain'")
        if numbering == "index":
            return [index + 1 for index in self.residue_index.tolist()]
        return [i + 1 for chain in self.chains for i in range(len(chain))]

    def ends(self, numbering: Numbering) -> list[tuple[str, int]]:
        """Name and number of the residue in each chain's TER."""
        names, numbers = self.residue_names, self.numbers(numbering)
        ends = [(names[stop - 1], numbers[stop - 1]) for _, stop in self.spans]
        linker = str(self.settings.get("linker", "")).translate(AS_X)
        if numbering == "chain" or not linker:
            return ends
        name = tables().names[LETTERS.index(linker[-1])]
        return [*((name, number + len(linker)) for _, number in ends[:-1]), ends[-1]]

    def each_atom(self) -> Iterator[Atom]:
        """All atoms, in the order of files."""
        residues, kinds = self.atoms.nonzero(as_tuple=True)
        places, plddt = self.positions[residues, kinds].tolist(), self.plddt[residues, kinds].tolist()
        names = tables().atoms
        for residue, kind, (x, y, z), sure in zip(residues.tolist(), kinds.tolist(), places, plddt, strict=True):
            yield Atom(residue, names[kind], x, y, z, sure)

    def check_columns(self, highest: int) -> None:
        """Raises: ValueError with all that a PDB file has no room for; ``highest`` residue number."""
        serials, places = int(self.atoms.sum()) + len(self.chains), self.positions[self.atoms].double()
        faults = []
        if len(self.chains) > len(PDB_CHAINS):
            faults.append(f"{len(self.chains)} chains (at most {len(PDB_CHAINS)})")
        if serials > PDB_ATOMS:
            faults.append(f"{serials:,} atoms and ends of chains (at most {PDB_ATOMS:,})")
        if highest > PDB_RESIDUES:
            faults.append(f"a residue numbered {highest:,} (at most {PDB_RESIDUES:,}; numbering='chain' starts at 1)")
        if ((places <= PDB_LEAST) | (places >= PDB_MOST)).any():
            faults.append(f"coordinates from {places.min():.0f} to {places.max():.0f} Å (from -999.999 to 9999.999)")
        if faults:
            raise ValueError(f"a PDB file has no room for {', nor for '.join(faults)}; write mmCIF, with to_mmcif()")

    def about(self) -> list[str]:
        """What a file says of the whole."""
        told = {name: "none" if value == "" else value for name, value in self.settings.items()}
        lines = [f"mean pLDDT {self.mean_plddt:.2f} (0 to 100, in the B-factor column), pTM {self.ptm:.4f}"]
        if told:
            lines.append(", ".join(f"{name} {value}" for name, value in told.items()))
        return [*lines, METHOD]

    def remarks(self) -> list[str]:
        """The same in a PDB file, which keeps remark 6 and those behind it for free text."""
        return [f"REMARK   6 {part}" for line in self.about() for part in textwrap.wrap(line, 69)]
