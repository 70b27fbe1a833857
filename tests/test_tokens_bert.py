"""The vocabulary of ProtBert and IgBert: published ids, pairs of chains, hidden residues."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from plm.tokens import Tokenizer
from plm.vocabularies import BERT, bert_tokenizer

FOLDER = Path(__file__).parent / "golden" / "tokenizers" / "prot_bert_bfd"
EXAMPLES = json.loads((FOLDER / "examples.json").read_text())
CARD = EXAMPLES["igbert_card_batch"]
PUBLISHED = BertTokenizer(str(FOLDER / "vocab.txt"), do_lower_case=False)
TOKENIZER = bert_tokenizer()
steady = settings(deadline=None, derandomize=True)  # the same verdict in every run, on a busy machine as well
LETTERS = "LAGVESIKRDTPNQFYMHCWXUBZO"


@pytest.mark.parametrize("case", EXAMPLES["cases"], ids=lambda case: case["text"])
def test_published_ids(case: dict[str, list[int]]) -> None:
    text, ids = str(case["text"]), case["input_ids"]
    assert TOKENIZER.published(text) == ids
    assert [BERT[i] for i in ids] == case["tokens"]
    if 1 not in ids:
        assert TOKENIZER.encode(text) == TOKENIZER.encode("".join(text.split())) == ids


def test_ids_of_the_igbert_card() -> None:
    for text, ids, mask in zip(CARD["texts"], CARD["input_ids"], CARD["attention_mask"], strict=True):
        ids = ids[: sum(mask)]
        pair = text.replace(" ", "").replace("[SEP]", "|")
        assert TOKENIZER.published(text) == TOKENIZER.encode(text) == TOKENIZER.encode(pair) == ids
    batch = TOKENIZER.pack([text.replace(" ", "").replace("[SEP]", "|") for text in CARD["texts"]])
    assert batch.pad(batch.tokens).tolist() == CARD["input_ids"]


def test_vocabulary_is_the_published_file() -> None:
    assert list(BERT) == (FOLDER / "vocab.txt").read_text().split("\n")[:30]
    assert {text: i for i, text in enumerate(BERT)} == EXAMPLES["vocab"]


@steady
@given(st.lists(st.sampled_from([*"MKTAJXmkt*-1|<>_[] \t\n", *BERT[:5], "<mask>", "</s>"]), max_size=10).map("".join))
def test_published_is_what_transformers_does(text: str) -> None:
    assert TOKENIZER.published(text) == PUBLISHED(text).input_ids


@steady
@given(st.text(LETTERS), st.text(LETTERS))
def test_round_trip(heavy: str, light: str) -> None:
    ids = TOKENIZER.encode(f"{heavy}|{light}")
    assert ids == TOKENIZER.published(f"{' '.join(heavy)} [SEP] {' '.join(light)}")
    assert TOKENIZER.decode(ids) == f"[CLS]{heavy}[SEP]{light}[SEP]"
    assert TOKENIZER.residue_text(ids) == heavy + light
    assert TOKENIZER.encode(heavy) == [2, *TOKENIZER.residues(heavy), 3]


@pytest.mark.parametrize("text", ["AC[MASK]FG", "AC<mask>FG", "A C <mask> F G"])
def test_two_spellings_of_the_mask(text: str) -> None:
    assert TOKENIZER.encode(text) == [2, 6, 23, 4, 19, 7, 3]


def test_roles() -> None:
    ids = (TOKENIZER.unknown_id, TOKENIZER.start_id, TOKENIZER.end_id, TOKENIZER.separator_id, TOKENIZER.mask_id)
    assert ids == (1, 2, 3, 3, 4)
    assert TOKENIZER.residue_ids == tuple(range(5, 30))
    assert TOKENIZER.frame() == (bytes([2]), bytes([3]))
    assert TOKENIZER.rare == "UZOB"


def test_unknown_letters() -> None:
    assert TOKENIZER.encode("MJjT", unknown="each") == [2, 21, 1, 1, 15, 3]
    assert TOKENIZER.encode("MJjT", unknown="run") == [2, 21, 1, 15, 3]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("MKt", r"'t' at position 3 .*\[MASK\].*call \.upper\(\)"),
        ("VQL|EV*", "'[*]' at position 7 .*stop codon"),
        ("M-K", "'-' at position 2"),
    ],
)
def test_complaints(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TOKENIZER.encode(text)


def test_a_vocabulary_of_bytes() -> None:
    with pytest.raises(ValueError, match=r"may have 256 tokens.*got 257"):
        Tokenizer(tuple(f"<{i}>" for i in range(257)), "<1>", "<2>")
    with pytest.raises(ValueError, match="more than once: A, C"):
        Tokenizer((*"ACDCA", "</s>"), "</s>", "A")
