"""Structures as text: the original's PDB byte for byte, what its columns cannot hold, and mmCIF read by gemmi."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import plm
from plm.esmfold.residues import tables
from plm.structures import Structure

MULTIMER, SINGLE = "b_v5_layout_multimer", "a_hub_layout"
FOLDED = {
    SINGLE: ("MKTWYFHRDENQSCGPAVILX", {"recycles": 3}),
    MULTIMER: ("MKVLHT:WYCQNRE", {"recycles": 2, "linker": "G" * 5}),
}
NUMBER = slice(22, 26)  # columns of a residue's number


@pytest.fixture(scope="module")
def folded(golden: Path) -> dict[str, Structure]:
    """What we make of the goldens' inputs in float64."""
    found = {}
    for case, (sequence, options) in FOLDED.items():
        model = plm.load(golden / "esmfold" / case, dtype="float64")
        found[case] = plm.fold(model, sequence, **options)[0]
    return found


def made_up(*chains: str, apart: float = 1.0) -> Structure:
    """A structure without meaning: atoms on a line, ``apart`` Å from one to the next."""
    letters = "".join(chains)
    types = torch.tensor([tables().names.index(name) for name in named(letters)])
    atoms = tables().kinds_present[types].bool()
    places = torch.zeros(len(letters), 37, 3)
    places[atoms] = apart * torch.arange(int(atoms.sum()))[:, None].float()
    chain = torch.tensor([i for i, one in enumerate(chains) for _ in one])
    plddt, pae = torch.rand(len(letters), 37) * 100, torch.zeros(1, 1).expand(len(letters), len(letters))
    return Structure(chains, places, atoms, plddt, pae, 0.5, chain, torch.arange(len(letters)) + 512 * chain)


def named(letters: str) -> list[str]:
    three = dict(zip("ARNDCQEGHILKMFPSTWYVX", tables().names, strict=True))
    return [three[letter] for letter in letters]


@pytest.mark.parametrize("case", FOLDED)
def test_the_text_is_the_originals(case: str, folded: dict[str, Structure], golden: Path) -> None:
    """Every byte, the TER that names a linker's end among them."""
    assert folded[case].to_pdb() == (golden / "esmfold" / case / "expected_plddt100.pdb").read_text()


def test_mean_confidence_is_the_originals(folded: dict[str, Structure], golden: Path) -> None:
    """The mean over all atoms outside the linker. Ours is stored in float32, whose spacing below 64 is 4e-6."""
    truth = load_file(golden / "esmfold" / MULTIMER / "expected.safetensors")["multimer/r2/mean_plddt_100"]
    assert abs(folded[MULTIMER].mean_plddt - truth.item()) < 4e-6


def test_chains_may_be_numbered_from_1(folded: dict[str, Structure]) -> None:
    """Nothing else changes, but that a TER names the last residue."""
    structure = folded[MULTIMER]
    as_told, by_chain = structure.to_pdb().splitlines(), structure.to_pdb(numbering="chain").splitlines()
    atoms = [(a, b) for a, b in zip(as_told, by_chain, strict=True) if a.startswith("ATOM")]
    assert all(a[: NUMBER.start] + a[NUMBER.stop :] == b[: NUMBER.start] + b[NUMBER.stop :] for a, b in atoms)
    assert list(dict.fromkeys(b[21:26] for _, b in atoms)) == [
        *(f"A{i:>4}" for i in range(1, 7)),
        *(f"B{i:>4}" for i in range(1, 8)),
    ]
    assert [line for line in as_told if line.startswith("TER")] == [
        "TER      50      GLY A  11",
        "TER     120      GLU B 530",
    ]
    assert [line for line in by_chain if line.startswith("TER")] == [
        "TER      50      THR A   6",
        "TER     120      GLU B   7",
    ]


def test_a_linker_of_unknown_residues_ends_as_one() -> None:
    """B is read as X, so the original's TER would say UNK; without a linker it names the chain's last residue."""
    two = made_up("MK", "V")
    for linker, end in (("GGB", "UNK A   5"), ("GG", "GLY A   4"), ("", "LYS A   2")):
        assert f"      {end}\n" in replace(two, settings={"linker": linker}).to_pdb()


def test_a_chain_without_atoms_has_its_own_end() -> None:
    text = made_up("MK", "XX", "V").to_pdb(numbering="chain")
    assert [line for line in text.splitlines() if not line.startswith("ATOM")] == [
        "PARENT N/A",
        "TER      18      LYS A   2",
        "PARENT N/A",
        "TER      19      UNK B   2",
        "PARENT N/A",
        "TER      27      VAL C   1",
        "END",
    ]


def test_remarks_go_before_the_rest(folded: dict[str, Structure]) -> None:
    structure = folded[MULTIMER]
    text = structure.to_pdb(remarks=True)
    remarks = [line for line in text.splitlines() if line.startswith("REMARK   6 ")]
    assert text == "\n".join([*remarks, structure.to_pdb()])
    assert max(map(len, remarks)) <= 80
    told = " ".join(line.removeprefix("REMARK   6 ") for line in remarks)
    for what in (
        f"mean pLDDT {structure.mean_plddt:.2f}",
        f"pTM {structure.ptm:.4f}",
        f"model {MULTIMER}",
        "recycles 2",
        "linker GGGGG",
        "residue_gap 512",
        "float64",
        "cpu",
        "10.1126/science.ade2574",
        "MIT licence",
    ):
        assert what in told


def test_62_chains_fit_into_a_pdb_file_and_no_more() -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    text = made_up(*["G"] * 62).to_pdb(numbering="chain")
    assert "".join(line[21] for line in text.splitlines() if line.startswith("TER")) == letters
    with pytest.raises(ValueError, match=r"no room for 63 chains \(at most 62\); write mmCIF, with to_mmcif\(\)"):
        made_up(*["G"] * 63).to_pdb(numbering="chain")


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (lambda: made_up("G" * 24_999 + "A", apart=0), r"100,002 atoms and ends of chains \(at most 99,999\)"),
        (lambda: made_up(*["G"] * 21), r"a residue numbered 10,261 \(at most 9,999; numbering='chain' starts at 1\)"),
        (lambda: made_up("G" * 5, apart=600), r"coordinates from 0 to 11400 Å"),
        (lambda: made_up("G" * 5, apart=-60), r"coordinates from -1140 to"),
    ],
)
def test_what_the_columns_cannot_hold_is_refused(structure: Any, message: str) -> None:
    """And mmCIF takes it."""
    with pytest.raises(ValueError, match=message):
        structure().to_pdb()
    assert structure().to_mmcif().count("\nATOM ") == int(structure().atoms.sum())


def test_all_that_does_not_fit_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"63 chains .*, nor for a residue numbered .*, nor for coordinates from"):
        made_up(*["G"] * 63, apart=600).to_pdb()


def test_coordinates_at_the_edge_of_the_columns() -> None:
    """-999.999 and 9999.999 fill eight columns; a thousandth more would not fit."""
    edge = made_up("G")
    edge.positions[0, 0], edge.positions[0, 1] = torch.tensor([-999.999, 9999.999, 0]), torch.tensor([9999.999] * 3)
    assert "    -999.9999999.999   0.000  1.00" in edge.to_pdb()
    for beyond in (-1000.0, 10000.0):
        edge.positions[0, 0, 0] = beyond
        with pytest.raises(ValueError, match="coordinates"):
            edge.to_pdb()


def test_names_of_many_chains() -> None:
    ids = made_up(*["G"] * (26 + 26 * 26 + 1)).chain_ids
    assert [ids[i] for i in (0, 25, 26, 27, 51, 52, 701, 702)] == ["A", "Z", "AA", "BA", "ZA", "AB", "ZZ", "AAA"]
    assert len(set(ids)) == len(ids)


def test_unknown_numbering_is_refused() -> None:
    for write in (Structure.to_pdb, Structure.to_mmcif):
        with pytest.raises(ValueError, match="numbering 'uniprot' is unknown; choose 'index' or 'chain'"):
            write(made_up("G"), numbering="uniprot")  # type: ignore[arg-type]


def test_confidence_of_residues(folded: dict[str, Structure]) -> None:
    """That of CA; X has no CA and gets the mean of what is predicted for all kinds, so nothing is a NaN."""
    structure = folded[SINGLE]
    assert torch.equal(structure.residue_plddt[:20], structure.plddt[:20, 1])
    assert structure.residue_plddt[20] == structure.plddt[20].mean()
    unknown = made_up("XX")
    assert unknown.mean_plddt == pytest.approx(unknown.residue_plddt.mean().item(), rel=1e-6)


def test_sequence_and_length() -> None:
    structure = made_up("MKX", "V")
    assert structure.sequence == "MKX:V"
    assert len(structure) == 4


@pytest.mark.parametrize("numbering", ["index", "chain"])
@pytest.mark.parametrize("case", FOLDED)
def test_gemmi_reads_the_same_atoms_from_both_formats(
    case: str, numbering: Any, folded: dict[str, Structure], tmp_path: Path
) -> None:
    """Names, residues, chains, numbers and elements; coordinates to the last digit written, and pLDDT as B-factors."""
    gemmi = pytest.importorskip("gemmi")
    structure = folded[case]
    chain, names = structure.chain.tolist(), named("".join(structure.chains))
    numbers = structure.numbers(numbering)
    wanted = [
        (structure.chain_ids[chain[a.residue]], numbers[a.residue], names[a.residue], a.name, a.element)
        for a in structure.each_atom()
    ]
    (tmp_path / "a.pdb").write_text(structure.to_pdb(numbering=numbering, remarks=True))
    (tmp_path / "a.cif").write_text(structure.to_mmcif(numbering=numbering))
    for file in ("a.pdb", "a.cif"):
        read = gemmi.read_structure(str(tmp_path / file))
        assert len(read) == 1
        found = [(c.name, r.seqid.num, r.name, a.name, a.element.name) for c in read[0] for r in c for a in r]
        assert found == wanted
        atoms = [a for c in read[0] for r in c for a in r]
        places = torch.tensor([a.pos.tolist() for a in atoms])
        # three decimals in the files, and what float32 adds at 64 Å
        assert (places - structure.positions[structure.atoms]).abs().max() < 0.5e-3 + 8e-6
        if file == "a.cif":  # which numbers the residues of each chain from 1 as well
            assert [(r.subchain, r.label_seq) for c in read[0] for r in c for _ in r] == [
                (structure.chain_ids[chain[a.residue]], structure.numbers("chain")[a.residue])
                for a in structure.each_atom()
            ]
        factors = torch.tensor([a.b_iso for a in atoms])
        assert (factors - structure.plddt[structure.atoms]).abs().max() < 0.5e-2 + 8e-6


def test_gemmi_reads_entities_and_confidence(tmp_path: Path) -> None:
    """Equal chains are one entity; X is UNK, and written although it has no atoms."""
    gemmi = pytest.importorskip("gemmi")
    structure = made_up("MKX", "GV", "MKX")
    (tmp_path / "a.cif").write_text(structure.to_mmcif())
    read = gemmi.read_structure(str(tmp_path / "a.cif"))
    assert [(e.name, e.full_sequence, e.subchains) for e in read.entities] == [
        ("1", ["MET", "LYS", "UNK"], ["A", "C"]),
        ("2", ["GLY", "VAL"], ["B"]),
    ]
    assert {e.polymer_type for e in read.entities} == {gemmi.PolymerType.PeptideL}
    block = gemmi.cif.read(str(tmp_path / "a.cif")).sole_block()
    assert [tuple(row) for row in block.find("_ma_qa_metric.", ["id", "mode", "type"])] == [
        ("1", "global", "pLDDT"),
        ("2", "local", "pLDDT"),
        ("3", "global", "pTM"),
    ]
    assert [tuple(row) for row in block.find("_ma_qa_metric_global.", ["metric_id", "metric_value"])] == [
        ("1", f"{structure.mean_plddt:.2f}"),
        ("3", "0.5000"),
    ]
    columns = ["label_asym_id", "label_seq_id", "label_comp_id", "metric_id", "metric_value"]
    local = [tuple(row) for row in block.find("_ma_qa_metric_local.", columns)]
    assert [row[:3] for row in local] == [
        (chain, str(i + 1), name)
        for chain, names in zip("ABC", (["MET", "LYS", "UNK"], ["GLY", "VAL"], ["MET", "LYS", "UNK"]), strict=True)
        for i, name in enumerate(names)
    ]
    assert [row[3:] for row in local] == [("2", f"{value:.2f}") for value in structure.residue_plddt.tolist()]
    told = gemmi.cif.as_string(block.find_value("_struct.pdbx_descriptor"))
    assert "10.1126/science.ade2574" in told


def test_a_structure_says_what_it_is_in_a_line(folded: dict[str, Structure]) -> None:
    assert re.fullmatch(
        r"Structure\(13 residues in 2 chains, mean pLDDT \d\d\.\d, pTM 0\.042\)", repr(folded["b_v5_layout_multimer"])
    )
