"""The vocabulary that lies beside published weights: ``tokenizer.json``, ``spiece.model`` or ``vocab.txt``.

Only the text of every id is read. Scores, normalisers and the rest of what such files hold do not matter where every
residue is one letter. The reader of ``spiece.model`` follows the wire format of protocol buffers
(protobuf.dev/programming-guides/encoding) and SentencePiece's ``sentencepiece_model.proto``: field 1 of the file is
one piece each time that it comes, and field 1 of a piece is its text.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from plm_weights.errors import CheckpointError

# The largest vocabulary of a protein model has 256 tokens, and its largest file, ProtT5's spiece.model, 238 kB.
_MOST_BYTES = 1 << 23
_MOST_IDS = 1 << 16

_VARINT, _LENGTH, _FIXED = 0, 2, {1: 8, 5: 4}


def published_vocabulary(folder: Path) -> tuple[tuple[str, ...], Path] | None:
    """The text of every id, and the file that says so; None where there is no such file.

    Of several files the first counts: ``tokenizer.json``, ``spiece.model`` (with the ``added_tokens.json`` beside it),
    ``vocab.txt``. An id of which the file is silent has an empty text.

    Raises:
        CheckpointError: the file is torn, foreign or hostile, with its name and the reason.
    """
    readers: dict[str, Callable[[Path], dict[int, str]]] = {
        "tokenizer.json": _tokenizer_json,
        "spiece.model": _spiece_model,
        "vocab.txt": _vocab_txt,
    }
    for name, read in readers.items():
        path = folder / name
        if path.is_file():
            texts = read(path)
            if not texts:
                raise CheckpointError(f"{path} has no tokens; fetch it again")
            return tuple(texts.get(i, "") for i in range(max(texts) + 1)), path
    return None


def _tokenizer_json(path: Path) -> dict[int, str]:
    """``model.vocab`` is a list of [text, score] (Unigram) or an object of ids by text (WordPiece, WordLevel, BPE)."""
    root = _json_object(path)
    model = root.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        pairs = [(entry[0] if isinstance(entry, list) and entry else None, i) for i, entry in enumerate(vocab)]
    elif isinstance(vocab, dict):
        pairs = list(vocab.items())
    else:
        raise CheckpointError(f"{path} has no model.vocab; wanted a tokenizer.json of the tokenizers library")
    added = root.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CheckpointError(f"{path}: added_tokens must be a list of objects with id and content")
    return _texts([*pairs, *((token.get("content"), token.get("id")) for token in added)], path)


def _spiece_model(path: Path) -> dict[int, str]:
    """The pieces, whose place is their id, and tokens that were added later."""
    pairs: list[tuple[object, object]] = []
    try:
        for field, piece in _fields(memoryview(_read(path))):
            if field == 1:
                if len(pairs) == _MOST_IDS:
                    raise ValueError(f"more than {_MOST_IDS} pieces")
                texts = [bytes(text).decode() for inner, text in _fields(piece) if inner == 1]
                pairs.append((texts[-1] if texts else "", len(pairs)))  # of a repeated field, the last one counts
    except ValueError as error:
        raise CheckpointError(f"{path} is torn or not a SentencePiece model: {error}. Fetch it again.") from None
    if (added := path.with_name("added_tokens.json")).is_file():
        pairs += _json_object(added).items()
    return _texts(pairs, path)


def _vocab_txt(path: Path) -> dict[int, str]:
    """One token per line; the number of the line, from 0, is its id."""
    try:
        lines = _read(path).decode().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from None
    return _texts([(line.strip(), i) for i, line in enumerate(lines)], path)


def _texts(pairs: list[tuple[object, object]], path: Path) -> dict[int, str]:
    """Texts by id, without the empty ones. Raises: CheckpointError for an odd pair, or an id that has two texts."""
    texts: dict[int, str] = {}
    for text, i in pairs:
        if not isinstance(text, str) or type(i) is not int or not 0 <= i < _MOST_IDS:
            raise CheckpointError(
                f"{path}: token {text!r:.60} has id {i!r:.60}; wanted a text and a number from 0 to {_MOST_IDS - 1}"
            )
        if text and texts.setdefault(i, text) != text:
            raise CheckpointError(f"{path}: id {i} is both {texts[i]!r:.60} and {text!r:.60}")
    return texts


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the fields of one protobuf message that have a length: texts and messages within it.

    Raises: ValueError where the bytes are not such a message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        size = 0
        if kind == _LENGTH:
            size, at = _varint(data, at)
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind} before byte {at}")
        if number == 0 or at + size > len(data):
            raise ValueError(f"field {number} would end at byte {at + size} of {len(data)}")
        if kind == _LENGTH:
            yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, seven bits per byte and the lowest first, and the place behind it."""
    number = 0
    for i, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, at + i + 1
    raise ValueError(f"a number without an end at byte {at}")


def _json_object(path: Path) -> Mapping[str, object]:
    data = _read(path)
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} must hold one JSON object; it holds a {type(root).__name__}")
    return root


def _read(path: Path) -> bytes:
    """The whole file. Raises: CheckpointError if it cannot be read, or is larger than any vocabulary."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise CheckpointError(f"{path} has more than {_MOST_BYTES} bytes; that is no vocabulary")
    return data
