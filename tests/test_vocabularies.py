"""Vocabulary files as they are published, torn and hostile, read and compared with the tables."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models
from transformers import BertTokenizer, T5Tokenizer

from plm.tokens import checked
from plm.vocabularies import ANKH, BERT, ESM, PROSTT5, PROTT5, ankh_tokenizer, prostt5_tokenizer, prott5_tokenizer
from plm_weights.errors import CheckpointError
from plm_weights.vocabularies import published_vocabulary

MARKED = [f"▁{text}" if len(text) == 1 else text for text in PROTT5[:28]]
CONTROL, UNKNOWN, NORMAL = 3, 2, 1


def varint(number: int) -> bytes:
    head = b""
    while number > 127:
        head += bytes([number & 127 | 128])
        number >>= 7
    return head + bytes([number])


def message(number: int, content: bytes) -> bytes:
    """A field that has a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def spiece(pieces: list[str]) -> bytes:
    """A SentencePiece model: its pieces with score and type, then settings of every wire type."""
    kinds = {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN}
    model = b""
    for text in pieces:
        score = varint(2 << 3 | 5) + b"\x00\x00\x80\xbf"
        kind = varint(3 << 3) + varint(kinds.get(text, NORMAL))
        model += message(1, message(1, text.encode()) + score + kind)
    negative = varint(41 << 3) + varint((1 << 64) - 1)  # bos_id -1, as protobuf writes negative numbers
    trainer = varint(4 << 3) + varint(len(pieces)) + negative + message(31, b"[NLU]")
    normalizer = message(1, b"nmt_nfkc") + message(2, bytes(range(256)) * 4)
    return model + message(2, trainer) + message(3, normalizer) + varint(200 << 3 | 1) + bytes(8)


def read(folder: Path) -> list[str]:
    found = published_vocabulary(folder)
    assert found is not None
    return list(found[0])


def refused(folder: Path, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        published_vocabulary(folder)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def test_nothing_there(tmp_path: Path) -> None:
    assert published_vocabulary(tmp_path) is None
    (tmp_path / "added_tokens.json").write_text("{}")
    (tmp_path / "vocab.txt").mkdir()
    assert published_vocabulary(tmp_path) is None


def test_spiece_model(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece(MARKED))
    assert published_vocabulary(tmp_path) == (tuple(MARKED), tmp_path / "spiece.model")
    assert checked(prott5_tokenizer(), read(tmp_path), "spiece.model") == prott5_tokenizer()


def test_spiece_model_by_sentencepiece_itself(tmp_path: Path) -> None:
    """The layout of Ankh3: special tokens, then the task prefixes, then letters by frequency."""
    library = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["LLLLLAAAAGGGSSV"] * 20))
    library.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=10, model_type="char", bos_id=-1,
        pad_id=0, eos_id=1, unk_id=2, user_defined_symbols=["[NLU]", "[S2S]"], add_dummy_prefix=False,
    )  # fmt: skip
    trained = library.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert read(tmp_path) == [trained.id_to_piece(i) for i in range(trained.get_piece_size())]


def test_added_tokens_lie_beside_the_spiece_model(tmp_path: Path) -> None:
    """ProstT5: between the pieces and the added tokens are the sentinels, which no file has."""
    (tmp_path / "spiece.model").write_bytes(spiece(MARKED))
    write_json(tmp_path / "added_tokens.json", {text: i for i, text in enumerate(PROSTT5) if i >= 128})
    assert read(tmp_path) == [*MARKED, *[""] * 100, *PROSTT5[128:]]
    assert checked(prostt5_tokenizer(), read(tmp_path), "spiece.model") == prostt5_tokenizer()


def test_tokenizer_json_by_the_tokenizers_library(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.Unigram([(text, -1.0) for text in ANKH[:28]], unk_id=2))
    tokenizer.add_special_tokens(list(ANKH[28:]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert published_vocabulary(tmp_path) == (ANKH, tmp_path / "tokenizer.json")


def test_tokenizer_json_by_transformers(tmp_path: Path) -> None:
    pieces = [*MARKED, *PROTT5[28:]]
    T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces]).save_pretrained(tmp_path / "t5")
    assert read(tmp_path / "t5") == pieces
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(BERT))
    BertTokenizer(str(vocab), do_lower_case=False).save_pretrained(tmp_path / "bert")
    assert published_vocabulary(tmp_path / "bert") == (BERT, tmp_path / "bert" / "tokenizer.json")


@pytest.mark.parametrize("kind", [models.WordPiece, models.WordLevel])
def test_vocabularies_that_are_objects(tmp_path: Path, kind: type) -> None:
    ids = {text: i for i, text in reversed(list(enumerate(BERT)))}
    tokenizers.Tokenizer(kind(ids, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert read(tmp_path) == list(BERT)


def test_vocab_txt(tmp_path: Path, golden: Path) -> None:
    assert read(golden / "tokenizers" / "prot_bert_bfd") == list(BERT)
    assert read(golden / "esm" / "esm2_tiny") == list(ESM)
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(["A", "", "C", ""]).encode())
    assert read(tmp_path) == ["A", "", "C"]


def test_the_order_of_preference(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("A\n")
    assert read(tmp_path) == ["A"]
    (tmp_path / "spiece.model").write_bytes(spiece(["B"]))
    assert read(tmp_path) == ["B"]
    write_json(tmp_path / "tokenizer.json", {"model": {"vocab": [["C", 0.0]]}})
    assert read(tmp_path) == ["C"]


def test_letters_in_another_order_are_caught(tmp_path: Path) -> None:
    """ProtT5 and Ankh3 order their letters differently: a folder with the other's file would be read as gibberish."""
    (tmp_path / "spiece.model").write_bytes(spiece(["<pad>", "</s>", "<unk>", "▁L", "▁A", *MARKED[5:]]))
    pieces, path = published_vocabulary(tmp_path) or ((), tmp_path)
    with pytest.raises(ValueError, match="id 3 is 'L', wanted 'A'; id 4 is 'A', wanted 'L'") as error:
        checked(ankh_tokenizer(), pieces, str(path))
    assert str(tmp_path / "spiece.model") in str(error.value)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_a_file_torn_anywhere_is_refused_or_ends_early(tmp_path: Path, name: str) -> None:
    """A protobuf that ends between two fields is whole; its table is then shorter, never different."""
    whole = spiece(MARKED)
    if name == "tokenizer.json":
        whole = json.dumps({"model": {"vocab": [[piece, 0.0] for piece in MARKED]}}).encode()
    path = tmp_path / name
    refusals = 0
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        try:
            pieces = read(tmp_path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refusals += 1
        else:
            assert name == "spiece.model" and pieces == MARKED[: len(pieces)]
    assert refusals >= len(whole) - len(MARKED) - 2


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.tuples(st.integers(0, 300), st.integers(0, 255)))
def test_any_bytes_give_a_table_or_a_checkpoint_error(tmp_path: Path, change: bytes | tuple[int, int]) -> None:
    """Random bytes, and a real file with one byte changed."""
    content = bytearray(change if isinstance(change, bytes) else spiece(MARKED[:20]))
    if not isinstance(change, bytes):
        content[change[0]] = change[1]
    for name in ("tokenizer.json", "spiece.model", "vocab.txt"):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            assert all(isinstance(text, str) for text in read(tmp_path))
        except CheckpointError as error:
            assert str(path) in str(error)
        path.unlink()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no tokens"),
        (message(2, b""), "has no tokens"),
        (b"\xff" * 11, "a number without an end at byte 0"),
        (b"\x0a", "a number without an end at byte 1"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "field 1 would end at byte 9223372036854775817 of 10"),
        (b"\x0b", "wire type 3"),
        (b"\x0d\x00", "field 1 would end at byte 5 of 2"),
        (b"\x02\x00", "field 0"),
        (message(1, message(1, b"\xff")), "utf-8"),
        (message(1, b"\x0a\x05A"), "field 1 would end at byte 7 of 3"),
        (b"version https://git-lfs.github.com/spec/v1\n", "torn or not a SentencePiece model: wire type 6"),
        (message(1, b"") * ((1 << 16) + 1), "more than 65536 pieces"),
        (bytes((1 << 23) + 1), "more than 8388608 bytes"),
    ],
)
def test_hostile_spiece_models(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    refused(tmp_path, complaint)


def test_of_a_repeated_text_the_last_one_counts(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(message(1, message(1, b"A") + message(1, b"C")) + message(7, b"?"))
    assert read(tmp_path) == ["C"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold one JSON object; it holds a list"),
        ("{}", "has no model.vocab"),
        ('{"model": []}', "has no model.vocab"),
        ('{"model": {"vocab": []}}', "has no tokens"),
        ('{"model": {"vocab": [["A", 0.0], []]}}', "token None has id 1"),
        ('{"model": {"vocab": [[5, 0.0]]}}', "token 5 has id 0"),
        ('{"model": {"vocab": {"A": -1}}}', "token 'A' has id -1"),
        ('{"model": {"vocab": {"A": true}}}', "token 'A' has id True"),
        ('{"model": {"vocab": {"A": 65536}}}', "wanted a text and a number from 0 to 65535"),
        ('{"model": {"vocab": {"A": 0, "C": 0}}}', "id 0 is both 'A' and 'C'"),
        ('{"model": {"vocab": {"A": 0}}, "added_tokens": [{"id": 0, "content": "C"}]}', "id 0 is both 'A' and 'C'"),
        ('{"model": {"vocab": {"A": 0}}, "added_tokens": [{"id": 0}]}', "token None has id 0"),
        ('{"model": {"vocab": {"A": 0}}, "added_tokens": {"A": 0}}', "added_tokens must be a list"),
        ('{"model": {"vocab": {"A": 0}}, "added_tokens": ["A"]}', "added_tokens must be a list"),
        ('{"model": {"vocab": {"A": ' + "1" * 5000 + "}}}", "is not JSON"),
    ],
)
def test_foreign_tokenizer_json(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    refused(tmp_path, complaint)


@pytest.mark.parametrize("content", ["[]", '{"a": "b"}', '{"C": 0}', "{"])
def test_foreign_added_tokens(tmp_path: Path, content: str) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece(["A"]))
    (tmp_path / "added_tokens.json").write_text(content)
    refused(tmp_path, str(tmp_path))


def test_vocab_txt_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"A\n\xff\n")
    refused(tmp_path, r"vocab\.txt is not UTF-8")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop a superuser, who may run this."""
    (tmp_path / "vocab.txt").write_text("A\n")

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    refused(tmp_path, r"vocab\.txt cannot be read: Permission denied")
