"""From text to what ESMFold reads: residues, numbers, chains and linkers, and what is refused."""

import pytest
import torch

from plm.esmfold.chains import LINKER, RESIDUE_GAP, Chains, read_chains
from plm.esmfold.residues import LETTERS, UNKNOWN
from plm.vocabularies import ESM


def told(chains: Chains) -> tuple[list[int], list[int], list[int]]:
    """Numbers, chains and linkers."""
    return chains.positions.tolist(), chains.chain.tolist(), chains.linker.int().tolist()


def test_one_chain() -> None:
    chains = read_chains("MKTX")
    assert chains.letters == "MKTX" and chains.length == 4
    assert chains.types.tolist() == [12, 11, 16, 20]  # AlphaFold's order: ARNDCQEGHILKMFPSTWYV, X
    assert told(chains) == ([0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0])
    assert chains.hidden is None


def test_two_chains_as_published() -> None:
    """25 glycines between them, which belong to the first, and a gap of 512 in the numbers."""
    assert LINKER == 25 * "G" and RESIDUE_GAP == 512
    chains = read_chains("MK:WYC")
    assert chains.letters == "MK" + 25 * "G" + "WYC"
    assert chains.types[2:27].tolist() == [7] * 25
    assert told(chains) == ([*range(27), 539, 540, 541], [0] * 27 + [1] * 3, [0, 0] + [1] * 25 + [0] * 3)


def test_three_chains() -> None:
    """The gap counts once for every chain before, in the linkers as well."""
    chains = read_chains("A:CD:E", linker="GS", residue_gap=100)
    assert chains.letters == "AGSCDGSE"
    assert told(chains) == (
        [0, 1, 2, 103, 104, 105, 106, 207],
        [0, 0, 0, 1, 1, 1, 1, 2],
        [0, 1, 1, 0, 0, 1, 1, 0],
    )


def test_no_linker() -> None:
    chains = read_chains("AC:DE", linker="")
    assert chains.letters == "ACDE"
    assert told(chains) == ([0, 1, 514, 515], [0, 0, 1, 1], [0, 0, 0, 0])


def test_no_gap() -> None:
    chains = read_chains("A:C:D", linker="G", residue_gap=0)
    assert told(chains) == ([0, 1, 2, 3, 4], [0, 0, 1, 1, 2], [0, 1, 0, 1, 0])


def test_one_chain_has_no_linker_and_no_gap() -> None:
    assert told(read_chains("ACD", linker="WWW", residue_gap=7)) == told(read_chains("ACD"))


@pytest.mark.parametrize("letter", "BJOUZX")
def test_letters_that_are_read_as_x(letter: str) -> None:
    chains = read_chains(f"A{letter}:C", linker=letter)
    assert chains.letters == "AXXC" and chains.types.tolist() == [0, UNKNOWN, UNKNOWN, 4]
    assert chains.stem_tokens.tolist() == [ESM.index(token) for token in ("<cls>", "A", "X", "X", "C", "<eos>")]


def test_tokens_of_the_language_model() -> None:
    """Start and end stand once around all chains. The numbers are ESM-2's for AlphaFold's order."""
    chains = read_chains(f"{LETTERS[:10]}:{LETTERS[10:]}", linker="")
    wanted = [5, 10, 17, 13, 23, 16, 9, 6, 21, 12, 4, 15, 20, 18, 14, 8, 11, 22, 19, 7, 24]
    assert chains.stem_tokens.tolist() == [0, *wanted, 2]


def test_hidden_residues() -> None:
    """The language model sees a mask in their place; their types stay."""
    hidden = torch.tensor([False, True, False, True])
    chains = read_chains("AC:D", linker="G", hidden=hidden)
    assert chains.stem_tokens.tolist() == [0, 5, 32, 6, 32, 2]
    assert chains.types.tolist() == [0, 4, 7, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty; chains are written A:B"),
        (":", "chain 1, 2 of 2 is empty"),
        ("A::C", "chain 2 of 3 is empty"),
        ("AC:", "chain 2 of 2 is empty"),
        ("MKt", "character 't' at position 3 of chain 1 is no residue; .* Residues are upper case"),
        ("MK:a", "character 'a' at position 1 of chain 2 is no residue; .* Residues are upper case"),
        ("M1K", "character '1' at position 2 of chain 1 is no residue; wanted ARNDCQEGHILKMFPSTWYVX, or BJOUZ"),
        ("M-K", "character '-' at position 2 of chain 1"),
        ("MK*", r"character '\*' at position 3 of chain 1"),
        ("M K", "character ' ' at position 2 of chain 1"),
        ("MK\n", r"character '\\n' at position 3 of chain 1"),
        ("MΩ", "character 'Ω' at position 2 of chain 1"),
        ("<mask>", "character '<' at position 1 of chain 1"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_chains(text)


def test_the_hint_on_case_is_for_letters_that_have_one() -> None:
    with pytest.raises(ValueError) as error:
        read_chains("M1")
    assert "upper case" not in str(error.value)


@pytest.mark.parametrize("linker", ["g", "G-G", "G:G", "5"])
def test_a_linker_is_made_of_residues(linker: str) -> None:
    with pytest.raises(ValueError, match="of the linker is no residue"):
        read_chains("A:C", linker=linker)


def test_a_gap_is_not_negative() -> None:
    with pytest.raises(ValueError, match="residue_gap must be a whole number from 0 to 1,000,000; got -1"):
        read_chains("A:C", residue_gap=-1)


@pytest.mark.parametrize(
    ("hidden", "got"),
    [
        (torch.zeros(3, dtype=torch.bool), r"torch.bool and \[3\]"),
        (torch.zeros(1, 5, dtype=torch.bool), r"torch.bool and \[1, 5\]"),
        (torch.zeros(5), r"torch.float32 and \[5\]"),
        (torch.zeros(5, dtype=torch.int64), r"torch.int64 and \[5\]"),
    ],
    ids=str,
)
def test_hidden_is_one_bool_per_residue_and_linker(hidden: torch.Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=rf"hidden must be bool and have shape \[5\].*got {got}"):
        read_chains("AC:DE", linker="G", hidden=hidden)
