"""The vocabularies of the T5 family: published ids, tasks, pairs, sentinels, and what the checkpoint's files add."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import T5Tokenizer

from plm.tokens import UNCONFIRMED, Tokenizer, checked
from plm.vocabularies import (
    ankh3_tokenizer,
    ankh_tokenizer,
    esm_tokenizer,
    prostt5_tokenizer,
    prott5_tokenizer,
    t5_tokenizer,
)

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
MAKE = {
    "prot_t5_xl_uniref50": prott5_tokenizer,
    "IgT5": prott5_tokenizer,
    "ProstT5": prostt5_tokenizer,
    "ankh_v1_v2": ankh_tokenizer,
    "ankh3": ankh3_tokenizer,
}
EXAMPLES: dict[str, dict[str, Any]] = {name: json.loads((GOLDEN / name / "examples.json").read_text()) for name in MAKE}
CASES = [
    (name, case["text"], case["input_ids"])
    for name, examples in EXAMPLES.items()
    for case in examples.get("cases", []) + examples.get("confirmed_cases", [])
]
steady = settings(deadline=None, derandomize=True)  # the same verdict in every run, on a busy machine as well
# What an Ankh3 folder could say. The layout is published, the order within 3 to 6 and within 27 to 30 is not.
ANKH3_PIECES = ("<pad>", "</s>", "<unk>", "[NLU]", "[S2S]", "[NLG]", "[CLM]", *"LAGSVERTIDPKNFQYHMCW", *"XUBZ")


def full_ankh3() -> Tokenizer:
    return checked(ankh3_tokenizer(), ANKH3_PIECES, "spiece.model")


@pytest.mark.parametrize(("name", "text", "ids"), CASES)
def test_published_ids(name: str, text: str, ids: list[int]) -> None:
    assert MAKE[name]().published(text) == ids


@pytest.mark.parametrize(("name", "text", "ids"), [case for case in CASES if 2 not in case[2]])
def test_encode_gives_the_published_ids_of_all_that_is_known_with_and_without_spaces(
    name: str, text: str, ids: list[int]
) -> None:
    tokenizer = MAKE[name]()
    assert tokenizer.encode(text) == tokenizer.encode("".join(text.split())) == ids
    assert tokenizer.decode(ids) == "".join(text.split()) + "</s>"


@pytest.mark.parametrize("name", ["prot_t5_xl_uniref50", "ProstT5", "ankh_v1_v2"])
def test_the_whole_published_vocabulary(name: str) -> None:
    ids = {piece.removeprefix("▁"): i for piece, i in EXAMPLES[name]["vocab"].items()}
    assert dict(enumerate(MAKE[name]().vocabulary)) == {i: text for text, i in ids.items()}


def test_every_id_of_ankh3_that_is_known() -> None:
    known = {**EXAMPLES["ankh3"]["confirmed_vocab"], **EXAMPLES["ankh3"]["derived_vocab"]}
    vocabulary = ankh3_tokenizer().vocabulary
    assert {text: i for i, text in enumerate(vocabulary) if not UNCONFIRMED.fullmatch(text)} == known
    assert [i for i, text in enumerate(vocabulary) if text == f"<id_{i}>"] == [3, 4, 5, 6]
    assert [i for i, text in enumerate(vocabulary) if text == f"?{i}"] == [27, 28, 29, 30]


def test_published_batch_and_decoding() -> None:
    tokenizer, examples = prott5_tokenizer(), EXAMPLES["prot_t5_xl_uniref50"]
    batch = tokenizer.pack(["PRTEINX", "SEQWENCE"])
    assert batch.pad(batch.tokens).tolist() == examples["batch"]["input_ids"]
    decode = examples["decode"]
    assert tokenizer.decode(decode["ids"]) == decode["raw"].replace(" ", "") == "<pad>MKT</s>"
    assert tokenizer.residue_text(decode["ids"]) == decode["skip"].replace(" ", "") == "MKT"


def transformers_tokenizer(tokenizer: Tokenizer) -> T5Tokenizer:
    """ProtT5's pieces with the word marker, its sentinels, and whatever else the vocabulary has as added tokens."""
    marked = ["▁" + text if len(text) == 1 else text for text in tokenizer.vocabulary[:128]]
    published = T5Tokenizer(vocab=[(piece, -1.0) for piece in marked], extra_ids=100)
    published.add_tokens(list(tokenizer.vocabulary[128:]))
    return published


PEERS = {"prott5": transformers_tokenizer(prott5_tokenizer()), "prostt5": transformers_tokenizer(prostt5_tokenizer())}
SNIPPETS = [
    *"MKTAJXmkdvj*-1|<>_ \t\n",
    "<extra_id_0>",
    "<extra_id_19>",
    "</s>",
    "<mask>",
    "<AA2fold>",
    "<unk>",
    "<pad>",
]


@steady
@given(st.lists(st.sampled_from(SNIPPETS), max_size=10).map("".join))
def test_published_is_what_transformers_does(text: str) -> None:
    assert prott5_tokenizer().published(text) == PEERS["prott5"](text).input_ids
    assert prostt5_tokenizer().published(text) == PEERS["prostt5"](text).input_ids


def ankh_peer() -> tokenizers.Tokenizer:
    """Ankh's tokenizer.json as transformers 4.25 writes it, without the marker before the first word."""
    vocabulary = ankh_tokenizer().vocabulary
    peer = tokenizers.Tokenizer(models.Unigram([(text, -1.0) for text in vocabulary], unk_id=2, byte_fallback=False))
    peer.normalizer = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    peer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    peer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    peer.add_special_tokens([text for text in vocabulary if len(text) > 1])
    return peer


ANKH_PEER = ankh_peer()


@steady
@given(st.lists(st.sampled_from([text for text in SNIPPETS if text not in "\t\n"]), max_size=10).map("".join))
def test_published_ankh_ids_with_spaces_and_fused_unknowns(text: str) -> None:
    assert ankh_tokenizer().published(text) == ANKH_PEER.encode(text).ids


def test_published_ankh_takes_a_space_for_a_letter() -> None:
    assert ankh_tokenizer().published("M K T") == [19, 2, 14, 2, 11, 1]
    assert ankh_tokenizer().encode("M K T") == [19, 14, 11, 1]


@pytest.mark.parametrize("make", [*dict.fromkeys(MAKE.values()), full_ankh3, lambda: t5_tokenizer(40)])
def test_every_token_comes_back(make: Any) -> None:
    tokenizer: Tokenizer = make()
    for i, text in enumerate(tokenizer.vocabulary):
        assert tokenizer.encode(text) == [i, 1]
        assert tokenizer.decode([i]) == text


@steady
@given(st.data(), st.sampled_from([*MAKE.values(), full_ankh3]))
def test_round_trip(data: st.DataObject, make: Any) -> None:
    tokenizer: Tokenizer = make()
    letters = [tokenizer.vocabulary[i] for i in tokenizer.residue_ids]
    texts = data.draw(st.lists(st.text(letters), min_size=1, max_size=4))
    batch = tokenizer.pack(texts)
    assert [tokenizer.decode(row) for row in batch.split(batch.tokens)] == [text + "</s>" for text in texts]
    assert [tokenizer.residue_text(row) for row in batch.split(batch.tokens)] == texts
    spaced = [tokenizer.residues(" ".join(text)) for text in texts]
    assert spaced == [tokenizer.residues(text) for text in texts]


@pytest.mark.parametrize("policy", ["each", "run"])
@steady
@given(st.text(st.characters(exclude_characters="<[")))
def test_an_unknown_letter_never_becomes_another_token(policy: str, text: str) -> None:
    """A byte table that marks what it lacks with 255 would make it Ankh3's <extra_id_0>."""
    tokenizer = full_ankh3()
    known = {tokenizer.vocabulary.index(letter) for letter in text if letter in tokenizer.vocabulary}
    assert set(tokenizer.residues(text, unknown=policy)) <= known | {tokenizer.unknown_id}
    kept = [letter for letter in text if not letter.isspace()]
    assert policy == "run" or len(tokenizer.residues(text, unknown=policy)) == len(kept)


def test_the_last_id_of_a_byte_is_a_token_like_any_other() -> None:
    tokenizer = ankh3_tokenizer()
    assert tokenizer.sentinel(0) == 255
    assert tokenizer.encode("M<extra_id_0>A<extra_id_224>") == [24, 255, 8, 31, 1]
    assert tokenizer.pack(["<extra_id_0>"]).tokens.tolist() == [255, 1]


def test_sentinels_count_down() -> None:
    for tokenizer, count in [(prott5_tokenizer(), 100), (ankh_tokenizer(), 116), (ankh3_tokenizer(), 225)]:
        size = len(tokenizer.vocabulary) - 1
        assert [tokenizer.sentinel(i) for i in range(count)] == [size - i for i in range(count)]
        with pytest.raises(ValueError, match=rf"<extra_id_{count}> is not in the vocabulary, which has {count}"):
            tokenizer.sentinel(count)
    with pytest.raises(ValueError, match="has 0 such tokens"):
        esm_tokenizer().sentinel(0)


def test_a_pair_is_two_chains_around_the_end_token() -> None:
    tokenizer = prott5_tokenizer()
    assert tokenizer.encode("VQL|EVV") == tokenizer.published("V Q L </s> E V V") == [6, 16, 4, 1, 9, 6, 6, 1]
    assert tokenizer.residues("VQL|EVV") == tokenizer.residues("V Q L | E V V") == bytes([6, 16, 4, 1, 9, 6, 6])
    assert tokenizer.residues("|")[0] == tokenizer.separator_id == tokenizer.end_id


@pytest.mark.parametrize("make", [ankh_tokenizer, ankh3_tokenizer, prostt5_tokenizer, esm_tokenizer])
def test_models_of_single_chains_say_so(make: Any) -> None:
    with pytest.raises(ValueError, match=r"'\|' at position 3 .*single chains"):
        make().encode("VL|EV")
    with pytest.raises(ValueError, match="no separator token"):
        _ = make().separator_id


def test_translation_tasks_have_their_own_letters() -> None:
    tokenizer = prostt5_tokenizer()
    assert tokenizer.encode("MKT", task="aa2fold") == tokenizer.published("<AA2fold> M K T") == [149, 19, 14, 11, 1]
    assert tokenizer.encode("dvq", task="fold2aa") == tokenizer.published("<fold2AA> d v q") == [148, 135, 131, 141, 1]
    assert tokenizer.frame("aa2fold") == (bytes([149]), bytes([1]))
    assert tokenizer.residues("MKT", task="aa2fold") == tokenizer.residues("M K T", task="aa2fold")
    batch = tokenizer.pack(["dv", "q"], task="fold2aa")
    assert batch.tokens.tolist() == [148, 135, 131, 1, 148, 141, 1]
    assert batch.lengths == (4, 3)


def test_a_state_is_125_ids_behind_its_letter() -> None:
    tokenizer = prostt5_tokenizer()
    states = tokenizer.tasks["fold2aa"].letters or ""
    assert len(states) == 20
    assert [i - 125 for i in tokenizer.residues(states)] == list(tokenizer.residues(states.upper()))


@pytest.mark.parametrize(
    ("text", "task", "complaint"),
    [
        ("MKd", "aa2fold", "'d' at position 3 is not in the letters of task 'aa2fold'.*3Di states.*task='fold2aa'"),
        ("M K d", "aa2fold", "'d' at position 5"),
        ("dvQ", "fold2aa", r"'Q' at position 3 .*Foldseek.*\.lower\(\).*task='aa2fold'"),
        ("DVQ", "fold2aa", "'D' at position 1"),
        ("dxv", "fold2aa", r"'x' at position 2 .*\(algvsredtipkfqnymhwc\)\.$"),
        ("MxK", "aa2fold", "'x' at position 2 .*upper case"),
        ("MJ", None, r"'J' at position 2 is not in the vocabulary"),
        ("MKT*", "aa2fold", "'[*]' at position 4.*stop codon"),
        ("M", "nlu", "task='nlu' is unknown; choose from 'aa2fold', 'fold2aa'"),
    ],
)
def test_complaints_of_prostt5(text: str, task: str | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prostt5_tokenizer().encode(text, task=task)


def test_a_letter_of_the_other_task_can_be_unknown() -> None:
    assert prostt5_tokenizer().encode("MdvK", task="aa2fold", unknown="each") == [149, 19, 2, 2, 14, 1]
    assert prostt5_tokenizer().encode("MdvK", task="aa2fold", unknown="run") == [149, 19, 2, 14, 1]


def test_a_model_without_tasks_says_so() -> None:
    for tokenizer in (ankh_tokenizer(), prott5_tokenizer(), esm_tokenizer()):
        with pytest.raises(ValueError, match="task='nlu' is unknown; this model has no tasks"):
            tokenizer.residues("MKT", task="nlu")


def test_tasks_of_ankh3_wait_for_the_file() -> None:
    tokenizer = ankh3_tokenizer()
    with pytest.raises(ValueError, match=r"needs the id of \[NLU\].*tokenizer\.json or spiece\.model beside"):
        tokenizer.encode("MKT", task="nlu")
    with pytest.raises(ValueError, match=r"the id of \[S2S\]"):
        tokenizer.frame("s2s")
    with pytest.raises(ValueError, match=r"'X' at position 2.*tokenizer\.json or spiece\.model"):
        tokenizer.encode("MX")
    assert tokenizer.decode([3, 24, 27, 1]) == "<id_3>M?27</s>"
    assert tokenizer.residue_text([3, 24, 27, 1]) == "M"


def test_the_file_completes_ankh3() -> None:
    tokenizer = full_ankh3()
    assert tokenizer.vocabulary == ANKH3_PIECES + ankh3_tokenizer().vocabulary[31:]
    assert tokenizer.encode("MKX", task="nlu") == tokenizer.published("[NLU]MKX") == [3, 24, 18, 27, 1]
    assert tokenizer.frame("s2s") == (bytes([4]), bytes([1]))
    assert checked(tokenizer, tokenizer.vocabulary, "again") == tokenizer
    with pytest.raises(ValueError, match=r"'O' at position 1 is not in the vocabulary \(LAGSVERTIDPKNFQYHMCWXUBZ\)\.$"):
        tokenizer.encode("O")


def test_a_published_vocabulary_may_be_marked_shorter_or_silent() -> None:
    tokenizer = prostt5_tokenizer()
    marked = ["▁" + text if len(text) == 1 else text for text in tokenizer.vocabulary[:28]]
    for pieces in (marked, tokenizer.vocabulary, [*marked, *[""] * 100, *tokenizer.vocabulary[128:]], []):
        assert checked(tokenizer, pieces, "spiece.model") == tokenizer


def test_every_disagreement_is_named() -> None:
    pieces = list(ankh_tokenizer().vocabulary)
    pieces[3], pieces[4] = pieces[4], pieces[3]
    with pytest.raises(ValueError) as error:
        checked(ankh_tokenizer(), [*pieces, "[NLU]"], "folder/tokenizer.json")
    assert "folder/tokenizer.json is not the vocabulary of 144 tokens" in str(error.value)
    assert "id 3 is 'L', wanted 'A'; id 4 is 'A', wanted 'L'; id 144 is '[NLU]', beyond the last" in str(error.value)


def test_a_file_cannot_name_a_token_twice() -> None:
    pieces = [*ANKH3_PIECES[:27], "▁L", "X", "X", "▁"]
    with pytest.raises(ValueError, match=r"id 27 is 'L', which is also id 7; id 29 is 'X', which is also id 28\. Use"):
        checked(ankh3_tokenizer(), pieces, "spiece.model")


def test_the_vocabulary_is_chosen_by_its_size() -> None:
    for make in MAKE.values():
        assert t5_tokenizer(len(make().vocabulary)) == make()
    small = t5_tokenizer(48)
    assert small.vocabulary[:28] == ankh_tokenizer().vocabulary[:28]
    assert [small.sentinel(i) for i in range(20)] == list(range(47, 27, -1))
    assert len(t5_tokenizer(28).vocabulary) == 28
    assert t5_tokenizer(20).vocabulary == t5_tokenizer(28).vocabulary[:20]
    assert t5_tokenizer(300).vocabulary == t5_tokenizer(28).vocabulary


def test_no_start_and_no_mask() -> None:
    tokenizer = ankh_tokenizer()
    assert tokenizer.frame() == (b"", bytes([1]))
    assert tokenizer.end_id == 1 and tokenizer.unknown_id == 2
    for name in ("start", "mask"):
        with pytest.raises(ValueError, match=f"no {name} token"):
            getattr(tokenizer, f"{name}_id")
    with pytest.raises(ValueError, match="'<' at position 2"):
        tokenizer.encode("M<mask>")


def test_rare_letters() -> None:
    assert prott5_tokenizer().rare == prostt5_tokenizer().rare == "UZOB"
    assert ankh_tokenizer().rare == ankh3_tokenizer().rare == ""
    assert prott5_tokenizer().encode("UZOB") == [26, 27, 25, 24, 1]
