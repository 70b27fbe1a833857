"""What `plm fold` writes of one protein: its structure, and its confidence as JSON."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace

from plm.esmfold.chains import Chains
from plm.esmfold.confidence import MOST
from plm.esmfold.residues import tables
from plm.structures import PDB_ATOMS, PDB_CHAINS, PDB_RESIDUES, Numbering, Structure

# Of what is computed and written: one more whenever a change of this library makes other files of the same input.
FORMAT = 1
CIF = "write mmCIF: --format cif"
DIGITS = 32  # of the sha256, so that it fits into a line of a PDB file


def fingerprint(
    sequence: str, weights: Mapping[str, str], config: Mapping[str, object], settings: Mapping[str, object]
) -> str:
    """Of all that decides what a file holds: residues ``A:B``, sha256 of weights, sizes of the network, settings."""
    told = json.dumps([FORMAT, sequence, sorted(weights.values()), config, settings], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:DIGITS]


def beyond_pdb(protein: Chains, numbering: Numbering) -> tuple[str, str] | None:
    """What a PDB file has no room for, whatever the structure will be, and what to do; None if there is nothing."""
    real = ~protein.linker
    lengths = protein.chain[real].bincount()
    chains, longest, most = len(lengths), int(lengths.max()), int(protein.positions[-1]) + 1
    serials = int(tables().kinds_present[protein.types[real]].sum()) + chains
    if chains > len(PDB_CHAINS):
        return f"{chains} chains, and a PDB file has letters for {len(PDB_CHAINS)}", CIF
    if longest > PDB_RESIDUES:
        return f"a chain of {longest:,} residues, and a PDB file has room for {PDB_RESIDUES:,}", CIF
    if serials > PDB_ATOMS:
        return f"{serials:,} atoms and ends of chains, and a PDB file has room for {PDB_ATOMS:,}", CIF
    if numbering == "index" and most > PDB_RESIDUES:
        advice = "number each chain from 1: --numbering chain"
        return f"residues up to {most:,}, and a PDB file has room for {PDB_RESIDUES:,}", advice
    return None


def first_numbers(protein: Chains, numbering: Numbering) -> list[int]:
    """The number of each chain's first residue in a file."""
    real = ~protein.linker
    lengths = protein.chain[real].bincount()
    firsts = protein.positions[real][lengths.cumsum(0) - lengths] + 1
    return firsts.tolist() if numbering == "index" else [1] * len(lengths)


def structure_text(
    structure: Structure, layout: str, numbering: Numbering, mark: str, settings: Mapping[str, object]
) -> str:
    """A PDB or mmCIF file (``layout``), with what else was set and the fingerprint ``mark`` in its head or end.

    Raises: ValueError for what a PDB file has no room for.
    """
    structure = replace(structure, settings={**structure.settings, **settings})
    if layout == "pdb":
        return f"REMARK   6 fingerprint {mark}\n{structure.to_pdb(numbering=numbering, remarks=True)}"
    return f"{structure.to_mmcif(numbering=numbering)}_plm.fingerprint {mark}\n#\n"


def confidence_text(
    id: str,
    structure: Structure,
    layout: str,
    mark: str,
    settings: Mapping[str, object],
    provenance: Mapping[str, object],
) -> str:
    """JSON with pLDDT of each residue (0 to 100), PAE (Å) and pTM under the names that ColabFold uses, and more."""
    names = PDB_CHAINS if layout == "pdb" else structure.chain_ids
    told = {
        "id": id,
        "fingerprint": mark,
        "chains": dict(zip(names, structure.chains, strict=False)),
        "mean_plddt": round(structure.mean_plddt, 2),
        "ptm": round(structure.ptm, 4),
        "plddt": rounded(structure.residue_plddt.tolist()),
        "max_pae": MOST,
        "pae": [rounded(row) for row in structure.pae.tolist()],
        "settings": {**structure.settings, **settings},
        "provenance": dict(provenance),
    }
    return json.dumps(told) + "\n"


def rounded(values: list[float]) -> list[float]:
    """To hundredths, as structure files have them."""
    return [round(value, 2) for value in values]


def confidence_of(text: str) -> tuple[str, str]:
    """Mean pLDDT and pTM as a structure file of ours says them."""
    found = re.search(r"mean pLDDT ([\d.]+) .*pTM ([\d.]+)", text)
    assert found is not None, "its fingerprint was there"
    return found[1], found[2]
