"""The tokenizer: ids that the reference tokenizers give (facts printed by their own tests), and the way back."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EsmTokenizer

from plm.vocabularies import ESM, esm_tokenizer

TOKENIZER = esm_tokenizer()
PUBLISHED = EsmTokenizer(str(Path(__file__).parent / "golden" / "esm" / "esm2_tiny" / "vocab.txt"))
steady = settings(deadline=None, derandomize=True)  # the same verdict in every run, on a busy machine as well
KNOWN = {
    # fair-esm tests/test_alphabet.py
    "MKTVRQG": [0, 20, 15, 11, 7, 10, 16, 6, 2],
    "KALTA<mask>ISQP": [0, 15, 5, 4, 11, 5, 32, 12, 8, 16, 14, 2],
    "K A <mask> I S Q": [0, 15, 5, 32, 12, 8, 16, 2],
    # transformers tests/models/esm/test_tokenization_esm.py
    "LAGVS": [0, 4, 5, 6, 7, 8, 2],
    "WCB": [0, 22, 23, 25, 2],
    # both implementations, measured
    "MX BUZO.-": [0, 20, 24, 25, 26, 27, 28, 29, 30, 2],
    "A<null_1>C": [0, 5, 31, 23, 2],
    "A<eos>C<pad>D": [0, 5, 2, 23, 1, 13, 2],
    "M\nK\tT": [0, 20, 15, 11, 2],
    "<mask><mask>": [0, 32, 32, 2],
    "": [0, 2],
}


@pytest.mark.parametrize("text", KNOWN)
def test_ids_are_the_published_ones(text: str) -> None:
    assert TOKENIZER.encode(text) == KNOWN[text]


def test_vocabulary_is_the_published_file(golden: Path) -> None:
    assert "\n".join(ESM) == (golden / "esm" / "esm2_tiny" / "vocab.txt").read_text()


@pytest.mark.parametrize(
    ("text", "run", "each"),
    [
        ("mktv", [0, 3, 2], [0, 3, 3, 3, 3, 2]),
        ("AJ*A", [0, 5, 3, 5, 2], [0, 5, 3, 3, 5, 2]),
        ("AAJJAA", [0, 5, 5, 3, 5, 5, 2], [0, 5, 5, 3, 3, 5, 5, 2]),
        ("MKtV", [0, 20, 15, 3, 7, 2], [0, 20, 15, 3, 7, 2]),
        ("A J", [0, 5, 3, 2], [0, 5, 3, 2]),
    ],
)
def test_unknown_letters(text: str, run: list[int], each: list[int]) -> None:
    """transformers makes a run of unknown letters one token, which changes the length; that has to be asked for."""
    assert TOKENIZER.encode(text, unknown="run") == run
    assert TOKENIZER.encode(text, unknown="each") == each
    with pytest.raises(ValueError, match="not in the vocabulary"):
        TOKENIZER.encode(text)


@steady
@given(st.lists(st.sampled_from([*"MKTAJXmkt*-1|<>_ \t\n", "<mask>", "<cls>", "<null_1>", "</s>"])).map("".join))
def test_published_is_what_transformers_does(text: str) -> None:
    assert TOKENIZER.published(text) == PUBLISHED(text).input_ids == TOKENIZER.encode(text, unknown="run")


@steady
@given(st.text(st.characters(exclude_characters="<")), st.sampled_from(["each", "run"]))
def test_an_unknown_letter_never_becomes_another_token(text: str, policy: str) -> None:
    known = {ESM.index(letter) for letter in text if letter in ESM}
    assert set(TOKENIZER.residues(text, unknown=policy)) <= known | {TOKENIZER.unknown_id}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("MKJV", "'J' at position 3"),
        ("MKv", "'v' at position 3.*upper"),
        ("MK*", r"'\*' at position 3.*stop codon"),
        ("MÅ", "'Å' at position 2"),
        ("M|K", r"'\|' at position 2 .*\(LAGVSERTIDPKQNFYMHWCXBUZO\.-, <mask>\)\. .*single chains"),
    ],
)
def test_the_complaint_names_letter_and_place(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TOKENIZER.encode(text)


@steady
@given(st.lists(st.sampled_from(ESM)).map("".join))
def test_decode_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == f"<cls>{text}<eos>"


def test_decode_refuses_foreign_ids() -> None:
    with pytest.raises(ValueError, match=r"\[33\] are outside the vocabulary of 33"):
        TOKENIZER.decode(torch.tensor([0, 33]))


def test_residues_are_letters_without_gaps() -> None:
    assert TOKENIZER.residue_ids == tuple(range(4, 29))
    assert TOKENIZER.residue_text(TOKENIZER.encode("M-K.<mask>T")) == "MKT"
    assert (TOKENIZER.start_id, TOKENIZER.end_id, TOKENIZER.unknown_id, TOKENIZER.mask_id) == (0, 2, 3, 32)


def test_a_policy_that_is_none() -> None:
    with pytest.raises(ValueError, match="unknown='drop' is not a policy; choose 'error', 'each' or 'run'"):
        TOKENIZER.encode("MJ", unknown="drop")


@steady
@given(st.lists(st.text("LAGVSERTIDPKQNFYMHWCXBUZO.-"), min_size=1, max_size=5))
def test_packing_strings_equals_encoding_each(texts: list[str]) -> None:
    batch = TOKENIZER.pack(texts)
    assert [row.tolist() for row in batch.split(batch.tokens)] == [TOKENIZER.encode(text) for text in texts]
