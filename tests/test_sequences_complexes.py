"""Complexes: any number of chains in a record, joined by ``:``, as `plm fold` reads them."""

from pathlib import Path
from typing import Any

import pytest

from plm.sequences import InputError, Reading, read_records


def read(tmp_path: Path, content: str, name: str = "in.fasta", **policies: Any) -> Reading:
    path = tmp_path / name
    path.write_text(content)
    return read_records(path, case="capitals", complexes=True, **policies)


def message(tmp_path: Path, content: str, **policies: Any) -> str:
    with pytest.raises(InputError) as error:
        read(tmp_path, content, **policies)
    return str(error.value).removeprefix(f"{tmp_path}/in.fasta: ")


def test_any_number_of_chains(tmp_path: Path) -> None:
    """Single chains, complexes and pairs stand beside each other: all are chains that are folded together."""
    reading = read(tmp_path, ">a\nMKT\n>b\nMKT:GS\nH:\nW\n>c\nEVQ|DIQ\n")
    assert [record.sequence for record in reading.records] == ["MKT", "MKT:GSH:W", "EVQ:DIQ"]
    assert [record.chains for record in reading.records] == [("MKT",), ("MKT", "GSH", "W"), ("EVQ", "DIQ")]
    assert reading.lengths == [3, 7, 6] and reading.changes == []


def test_a_table_of_antibodies_and_a_literal_complex(tmp_path: Path) -> None:
    reading = read(tmp_path, "id,heavy,light\na,EVQ,DIQ\n", "in.csv")
    assert [record.sequence for record in reading.records] == ["EVQ:DIQ"]
    assert [record.sequence for record in read_records("MKT:GSH", complexes=True).records] == ["MKT:GSH"]
    with pytest.raises(InputError, match="no such file"):
        read_records("MKT:GSH")


def test_stops_at_the_end_of_each_chain(tmp_path: Path) -> None:
    reading = read(tmp_path, ">a\nMKT*:GSH*:W\n")
    assert [record.sequence for record in reading.records] == ["MKT:GSH:W"]
    assert reading.changes == ["terminal stops (*) removed from 1 sequences"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (">a\nMKT:\n", "line 1, record 1 'a': chain 2 of 2 is empty"),
        (">a\n:MKT::G\n", "line 1, record 1 'a': chain 1, 3 of 4 is empty"),
        (">a\nEVQ|\n", "line 1, record 1 'a': chain 2 of 2 is empty"),
        (">a\nMKT\nGS:H7\n", "line 3, record 1 'a': '7' at position 2 of chain 2"),
        (">a\nM7T:GSH\n", "line 2, record 1 'a': '7' at position 2 of chain 1"),
        (">a\nMK*:\nGS*:\nW\n7\n", "line 5, record 1 'a': '7' at position 2 of chain 3"),
        (">a\nMKTgsh\n", "line 2, record 1 'a': 'g' at position 4"),
    ],
)
def test_what_is_wrong_is_found_in_its_chain(tmp_path: Path, content: str, told: str) -> None:
    assert message(tmp_path, content).startswith(f"{told}\nWhat to do: ")


def test_small_letters_are_refused_with_advice(tmp_path: Path) -> None:
    assert "write residues in capitals" in message(tmp_path, ">a\nmkt\n")
    with pytest.raises(InputError, match="in capitals"):
        read_records("mkt", case="capitals", complexes=True)


def test_records_without_a_chain_can_be_left_out(tmp_path: Path) -> None:
    reading = read(tmp_path, ">a\nMKT:\n>b\nMKT:G\n", empty="skip")
    assert reading.ids == ["b"] and [fault.id for fault in reading.failed] == ["a"]


def test_other_verbs_are_told_who_takes_chains(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKT:GSH\n")
    with pytest.raises(InputError, match=r"':' at position 4\nWhat to do: .*plm fold"):
        read_records(tmp_path / "in.fasta")
