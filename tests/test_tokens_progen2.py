"""The tokenizer of ProGen2: the ids of the published one, and an error where that drops a letter in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Published

from plm.tokens import checked
from plm.vocabularies import PROGEN2, progen2_tokenizer

EXPECTED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "progen2" / "half_rotary_buffers" / "expected.json").read_text()
)
TAGS = ("<|pf03668|>", "<|pf12365|>", "<|pf00005|>")


def published(*added: str) -> Published:
    """As its tokenizer.json says: bytes without a merge, no unknown token, and added tokens that are found anywhere."""
    tokenizer = Published(models.BPE({token: i for i, token in enumerate(PROGEN2)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*PROGEN2[:3], *added)])
    return tokenizer


def test_the_table_of_ids() -> None:
    ours = progen2_tokenizer()
    assert len(ours.vocabulary) == 30 and "J" not in ours.vocabulary
    assert (ours.start_id, ours.end_id) == (3, 4)
    assert ours.residue_ids == tuple(range(5, 30))
    assert ours.encode("1ACDZ2") == [3, 5, 7, 8, 29, 4]


@pytest.mark.parametrize("case", EXPECTED["tokenizer_encode"], ids=lambda case: repr(case["text"]))
def test_published_ids(case: dict[str, Any]) -> None:
    ours, text = progen2_tokenizer(), case["text"]
    assert ours.published(text) == case["ids"]
    if "".join(ours.decode(case["ids"])) == text:  # nothing was dropped
        assert ours.encode(text) == case["ids"]


@pytest.mark.parametrize("case", EXPECTED["tokenizer_decode"], ids=lambda case: str(case["ids"]))
def test_published_texts(case: dict[str, Any]) -> None:
    """Ids behind the last token vanish from the published text; ours says that there is none."""
    ours, ids = progen2_tokenizer(), case["ids"]
    if max(ids) < 30:
        assert ours.decode(ids) == case["text_with_special"]
    else:
        with pytest.raises(ValueError, match=r"ids \[30, 31\] are outside the vocabulary of 30 tokens"):
            ours.decode(ids)
    assert ours.decode([i for i in ids if 2 < i < 30]) == case["text"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*PROGEN2, *TAGS, *"Jacz*-. \n|<>_0"]), max_size=12).map("".join))
def test_ids_of_any_text_are_those_of_the_tokenizers_library(text: str) -> None:
    assert progen2_tokenizer().published(text) == published().encode(text).ids
    own = checked(progen2_tokenizer(), (*PROGEN2, *TAGS), "tokenizer.json")
    assert own.published(text) == published(*TAGS).encode(text).ids


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1MJG2", r"'J' at position 3"),
        ("1MG*2", r"'\*' at position 4 .*stop codon"),
        ("1M-G2", r"'-' at position 3"),
        ("1M.G2", r"'\.' at position 3"),
        ("1mgh2", r"'m' at position 2 .*call \.upper\(\)"),
        ("1MG_2", r"'_' at position 4"),
        ("1MG3", r"'3' at position 4"),
        ("1MÄ2", r"'Ä' at position 3"),
        ("<|pf03668|>1M", r"'<' at position 1"),
        ("1M<mask>2", r"'<' at position 3"),
    ],
)
def test_what_the_original_drops_is_an_error(text: str, says: str) -> None:
    """There it shifts every position behind it, and the digits of a family's tag become ends of a protein."""
    with pytest.raises(ValueError, match=says):
        progen2_tokenizer().encode(text)


@pytest.mark.parametrize("unknown", ["each", "run"])
def test_there_is_no_unknown_token(unknown: str) -> None:
    with pytest.raises(ValueError, match="no unknown token"):
        progen2_tokenizer().encode("1MJ2", unknown=unknown)


def test_a_tag_is_one_token_where_the_checkpoint_has_it() -> None:
    own = checked(progen2_tokenizer(), (*PROGEN2, *TAGS), "tokenizer.json")
    assert own.encode("<|pf12365|>1MK2") == [31, 3, 16, 14, 4]
    assert own.decode([31, 3, 16, 14, 4]) == "<|pf12365|>1MK2"
    assert own.residue_ids == progen2_tokenizer().residue_ids


def test_tokens_of_its_own_come_behind_the_published_ones() -> None:
    """A gap, another letter in a place, or a text that is there already."""
    for pieces, says in (
        ((*PROGEN2[:13], "J", *PROGEN2[14:]), "id 13 is 'J', wanted 'I'"),
        ((*PROGEN2, "", "<|a|>"), r"id 31 is '<\|a\|>', beyond the last"),
        ((*PROGEN2, "A"), "more than once: A"),
    ):
        with pytest.raises(ValueError, match=says):
            checked(progen2_tokenizer(), pieces, "tokenizer.json")
