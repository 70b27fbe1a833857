"""A structure as mmCIF: its atoms, and confidence where the dictionary of predicted models (ModelCIF) has it."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from plm.esmfold.residues import LETTERS, tables

if TYPE_CHECKING:
    from plm.structures import Structure

# Of ModelCIF's kinds of confidence: number, mode, and name.
MEAN_PLDDT, RESIDUE_PLDDT, PTM = (1, "global", "pLDDT"), (2, "local", "pLDDT"), (3, "global", "pTM")


def mmcif(structure: "Structure", numbers: list[int]) -> str:
    """The text of a file; ``numbers`` of each residue go to ``auth_seq_id``."""
    parts = (
        "data_model\n_entry.id model",
        f"_struct.entry_id model\n_struct.title 'ESMFold prediction'\n_struct.pdbx_descriptor{text(structure.about())}",
        *entities(structure),
        *confidence(structure),
        atom_sites(structure, numbers),
        "",
    )
    return "\n#\n".join(parts)


def entities(structure: "Structure") -> list[str]:
    """Which chains there are; those of equal sequence are one entity."""
    kinds, of_chain = entity_numbers(structure)
    three_letters = dict(zip(LETTERS, tables().names, strict=True))
    count = range(1, len(kinds) + 1)
    strands = [
        ",".join(id for id, one in zip(structure.chain_ids, of_chain, strict=True) if one == number) for number in count
    ]
    return [
        loop("entity", {"id": count, "type": ["polymer" for _ in kinds]}),
        loop(
            "entity_poly",
            {
                "entity_id": count,
                "type": ["'polypeptide(L)'" for _ in kinds],
                "pdbx_strand_id": strands,
                "pdbx_seq_one_letter_code": [text([kind.replace("X", "(UNK)")]) for kind in kinds],
                "pdbx_seq_one_letter_code_can": [text([kind]) for kind in kinds],
            },
        ),
        loop(
            "entity_poly_seq",
            {
                "entity_id": [number for number, kind in zip(count, kinds, strict=True) for _ in kind],
                "num": [i + 1 for kind in kinds for i in range(len(kind))],
                "mon_id": [three_letters[letter] for kind in kinds for letter in kind],
            },
        ),
        loop("struct_asym", {"id": structure.chain_ids, "entity_id": of_chain}),
    ]


def confidence(structure: "Structure") -> list[str]:
    """Of the whole and of each residue."""
    length = range(len(structure))
    ids, names, metrics = structure.chain_ids, structure.residue_names, (MEAN_PLDDT, RESIDUE_PLDDT, PTM)
    return [
        loop(
            "ma_qa_metric",
            {
                "id": [number for number, _, _ in metrics],
                "mode": [mode for _, mode, _ in metrics],
                "name": [name for _, _, name in metrics],
                "type": [name for _, _, name in metrics],
            },
        ),
        loop(
            "ma_qa_metric_global",
            {
                "ordinal_id": [1, 2],
                "model_id": [1, 1],
                "metric_id": [MEAN_PLDDT[0], PTM[0]],
                "metric_value": [f"{structure.mean_plddt:.2f}", f"{structure.ptm:.4f}"],
            },
        ),
        loop(
            "ma_qa_metric_local",
            {
                "ordinal_id": [i + 1 for i in length],
                "model_id": [1 for _ in length],
                "label_asym_id": [ids[chain] for chain in structure.chain.tolist()],
                "label_seq_id": structure.numbers("chain"),
                "label_comp_id": names,
                "metric_id": [RESIDUE_PLDDT[0] for _ in length],
                "metric_value": [f"{value:.2f}" for value in structure.residue_plddt.tolist()],
            },
        ),
    ]


def atom_sites(structure: "Structure", numbers: list[int]) -> str:
    """A line for each atom."""
    atoms, names, labels = list(structure.each_atom()), structure.residue_names, structure.numbers("chain")
    chain, ids, of_chain = structure.chain.tolist(), structure.chain_ids, entity_numbers(structure)[1]
    chains = [ids[chain[atom.residue]] for atom in atoms]
    residues = [names[atom.residue] for atom in atoms]
    return loop(
        "atom_site",
        {
            "group_PDB": ["ATOM" for _ in atoms],
            "id": range(1, len(atoms) + 1),
            "type_symbol": [atom.element for atom in atoms],
            "label_atom_id": [atom.name for atom in atoms],
            "label_alt_id": ["." for _ in atoms],
            "label_comp_id": residues,
            "label_asym_id": chains,
            "label_entity_id": [of_chain[chain[atom.residue]] for atom in atoms],
            "label_seq_id": [labels[atom.residue] for atom in atoms],
            "pdbx_PDB_ins_code": ["?" for _ in atoms],
            "Cartn_x": [f"{atom.x:.3f}" for atom in atoms],
            "Cartn_y": [f"{atom.y:.3f}" for atom in atoms],
            "Cartn_z": [f"{atom.z:.3f}" for atom in atoms],
            "occupancy": ["1.00" for _ in atoms],
            "B_iso_or_equiv": [f"{atom.plddt:.2f}" for atom in atoms],
            "auth_seq_id": [numbers[atom.residue] for atom in atoms],
            "auth_asym_id": chains,
            "auth_comp_id": residues,
            "auth_atom_id": [atom.name for atom in atoms],
            "pdbx_PDB_model_num": ["1" for _ in atoms],
        },
    )


def entity_numbers(structure: "Structure") -> tuple[list[str], list[int]]:
    """Different sequences, and the number, from 1, of each chain's among them."""
    kinds = list(dict.fromkeys(structure.chains))
    return kinds, [kinds.index(chain) + 1 for chain in structure.chains]


def loop(category: str, columns: Mapping[str, Iterable[object]]) -> str:
    """A table of mmCIF, from the values under each name."""
    names = (f"_{category}.{name}" for name in columns)
    rows = (" ".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    return "\n".join(["loop_", *names, *rows])


def text(lines: Iterable[str]) -> str:
    """A value of several lines. It begins on a line of its own; a space before the others keeps them from ending it."""
    return "\n".join(["", ";", *(f" {part}" for line in lines for part in textwrap.wrap(line, 78)), ";"])
