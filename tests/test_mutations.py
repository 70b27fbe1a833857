"""Names of variants: what they make of a wild type, and everything that can be wrong with them, at once."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plm
from plm.mutations import RESIDUES, mutated, single_substitutions

WILD_TYPE = "MKTAYIAK"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("M1A", "AKTAYIAK"),
        ("K8W", "MKTAYIAW"),
        ("M1M", "MKTAYIAK"),
        ("M1A:K2E", "AETAYIAK"),
        ("K2E,M1A", "AETAYIAK"),
        ("M1A / K8W", "AKTAYIAW"),
        ("K2del", "MTAYIAK"),
        ("K2_A4del", "MYIAK"),
        ("K2_T3insGG", "MKGGTAYIAK"),
        ("K2delinsGG", "MGGTAYIAK"),
        ("K2_A4delinsW", "MWYIAK"),
        ("K8delinsKG", "MKTAYIAKG"),
        ("M1_K2insG:K2E", "MGETAYIAK"),
        ("M1A:M1_K2insG", "AGKTAYIAK"),
        ("T3del:A7del", "MKAYIK"),
        ("MKTAY", "MKTAY"),
        ("GMKTAYIAKG", "GMKTAYIAKG"),
        *((name, WILD_TYPE) for name in ("", "WT", "wt", "_wt", " _WT ")),
    ],
)
def test_what_a_name_means(name: str, wanted: str) -> None:
    assert mutated(WILD_TYPE, [name]) == [wanted]


def test_the_first_residue_may_have_any_number() -> None:
    assert mutated(WILD_TYPE, ["M24A", "K25_T26insG"], offset=24) == ["AKTAYIAK", "MKGTAYIAK"]
    assert mutated(WILD_TYPE, ["M-2A:A1G"], offset=-2) == ["AKTGYIAK"]


def test_a_pair_is_numbered_through() -> None:
    assert mutated("EVQ|DI", ["Q3A:D4W", "WT", "EV|DIQM"]) == ["EVA|WI", "EVQ|DI", "EV|DIQM"]
    with pytest.raises(plm.InputError, match=r"a change of length in a pair\nWhat to do: give the whole pair"):
        mutated("EVQ|DI", ["V2del"])


def test_all_faults_at_once_with_positions() -> None:
    names = ["A24T", "K2E", "K3E", "M1*", "M1A:M1C", "K2_A4insG", "zz1", "K2_T3A", "A4_K2del", "M9L", "M1", "1A", "m1A"]
    with pytest.raises(plm.InputError) as caught:
        mutated(WILD_TYPE, names)
    found = {fault.id: fault.reason for fault in caught.value.faults}
    assert found == {
        "A24T": "position 24 is outside the wild type, which has 1 to 8",
        "K3E": "position 3 is T in the wild type; the variant says K",
        "M1*": "M1* stops the protein",
        "M1A:M1C": "position 1 is changed twice",
        "K2_A4insG": "K2_A4insG does not insert between neighbours",
        "zz1": "'zz1' is no change of a sequence",
        "K2_T3A": "'K2_T3A' is no change of a sequence",
        "A4_K2del": "'A4_K2del' is no change of a sequence",
        "M9L": "position 9 is outside the wild type, which has 1 to 8",
        "M1": "'M1' is no change of a sequence",
        "1A": "'1A' is no change of a sequence",
        "m1A": "position 1 is M in the wild type; the variant says m",
    }
    assert [fault.record for fault in caught.value.faults] == [1, *range(3, 14)]


def test_the_numbering_that_fits_is_told() -> None:
    """Only where it is the one that does, and not by chance."""
    with pytest.raises(plm.InputError, match=r"all fit if the number of the first residue is 24: offset=24 \(--offset"):
        mutated(WILD_TYPE, ["M24A", "K25A", "T26G"])
    for names in (["K25A"], ["M24A", "K25A", "W26G"], ["M24A", "K25A", "T126G"]):
        with pytest.raises(
            plm.InputError, match=r"check the sequence, and the number of its first residue, which is 1 "
        ):
            mutated(WILD_TYPE, names)


def test_all_single_substitutions() -> None:
    names = single_substitutions("MX|K", offset=5)
    assert len(names) == 19 + 20 + 19 and names[0] == "M5A" and names[-1] == "K7Y"
    assert len(set(mutated("MX|K", names, offset=5)) - {"MX|K"}) == len(names)


SEQUENCES = st.text(RESIDUES, min_size=1, max_size=12)
OFFSETS = st.integers(-30, 300)


@st.composite
def changes(draw: Callable[..., object]) -> tuple[str, int, str, str]:
    """A wild type, a numbering, a name of up to one change for every third residue, and what it makes of it."""
    wild_type, offset = str(draw(SEQUENCES)), int(str(draw(OFFSETS)))
    parts, result, i = [], "", 0
    while i < len(wild_type):
        kind = draw(st.sampled_from(["keep", "substitute", "delete", "replace", "insert"]))
        stop = min(len(wild_type), i + int(str(draw(st.integers(1, 3)))))
        new, here = str(draw(SEQUENCES)), f"{wild_type[i]}{i + offset}"
        there = f"{here}_{wild_type[stop - 1]}{stop - 1 + offset}" if stop > i + 1 else here
        if kind == "substitute":
            parts.append(f"{here}{new[0]}")
            result, i = result + new[0], i + 1
        elif kind == "delete":
            parts.append(f"{there}del")
            i = stop
        elif kind == "replace":
            parts.append(f"{there}delins{new}")
            result, i = result + new, stop
        else:
            result, i = result + wild_type[i], i + 1
            if kind == "insert" and i < len(wild_type):
                parts.append(f"{here}_{wild_type[i]}{i + offset}ins{new}")
                result += new
    order = draw(st.permutations(parts))
    assert isinstance(order, list)
    return wild_type, offset, ":".join(order), result


@settings(deadline=None, derandomize=True)
@given(changes())
def test_names_are_read_as_they_are_written(case: tuple[str, int, str, str]) -> None:
    wild_type, offset, name, wanted = case
    assert mutated(wild_type, [name], offset) == [wanted]
