"""A tokenizer that looks bytes up in a table; the tables are in `vocabularies.py`.

A protein's letters become ids by one table look-up per byte, at the speed of memory, because every residue token is a
single letter. Tokens of several letters (``<mask>``) and spaces take a slower path with the same result. One letter is
one id, always: where the published tokenizers swallow letters or want spaces between them, ``published`` shows how.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from string import punctuation

import torch
from torch import Tensor

from plm.packing import Packed

UNCONFIRMED = re.compile(r"<id_\d+>|\?\d+")
"""Texts that stand for a prefix or for a letter which only the checkpoint's own files tell; ``checked`` puts it in."""


@dataclass(frozen=True)
class Task:
    """What a model can be asked for.

    Attributes:
        prefix: the token in front of the sequence that asks for it.
        letters: the letters that it takes, where the vocabulary has others too.
        hint: what to tell somebody who gave those others.
    """

    prefix: str
    letters: str | None = None
    hint: str = ""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back for a vocabulary of single letters and longer tokens such as ``<mask>``.

    Whitespace separates tokens, nothing more; case matters. A vocabulary has at most 256 tokens, so that the ids of
    residues are bytes.

    Attributes:
        vocabulary: the text of every id.
        end, start: what stands behind and before every sequence.
        unknown: what stands for a letter outside the vocabulary, if the caller wants that; None where nothing does.
        mask: what hides a residue; ``<mask>`` is accepted as its spelling everywhere.
        separator: what stands between the two chains of a pair; ``|`` in text.
        tasks: the tasks by the names that callers use.
        rare: letters that have ids, but that the published recipes all replace by X. ``encode`` leaves them alone.
        words: the published tokenizer knows a residue only as a word of its own ("M K T").
        pieces: the published tokenizer is a SentencePiece model, to which a space is a symbol like any other.
        guessed: nobody published a vocabulary of this size, and no file beside the weights told it.
        framed: ``encode`` puts ``start`` and ``end`` around a text. Else texts bring them along, as ProGen2's "1MK2"
            does, and only what works on plain residues adds them.
        extensible: fine-tuned checkpoints have tokens of their own behind the last of the vocabulary.
    """

    vocabulary: tuple[str, ...]
    end: str
    unknown: str | None
    start: str | None = None
    mask: str | None = None
    separator: str | None = None
    tasks: Mapping[str, Task] = field(default_factory=dict, hash=False)
    rare: str = ""
    words: bool = False
    pieces: bool = False
    guessed: bool = False
    framed: bool = True
    extensible: bool = False

    def __post_init__(self) -> None:
        if len(self.vocabulary) > 256:
            raise ValueError(f"a vocabulary may have 256 tokens, one per value of a byte; got {len(self.vocabulary)}")
        if twice := sorted(token for token, count in Counter(self.vocabulary).items() if count > 1):
            raise ValueError(f"tokens that the vocabulary has more than once: {', '.join(twice)}")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocabulary)}

    @cached_property
    def _spellings(self) -> dict[str, int]:
        """``_ids``, and what else a token may be written as."""
        other = {"<mask>": self.mask, "|": self.separator}
        return {**self._ids, **{text: self._ids[token] for text, token in other.items() if token is not None}}

    @cached_property
    def _letters(self) -> str:
        return "".join(text for text in self._spellings if len(text) == 1 and text.isascii())

    @cached_property
    def _table(self) -> bytes:
        """The id of every byte. It is only asked about bytes that are letters of the vocabulary."""
        return bytes(self._spellings.get(chr(byte), 0) for byte in range(256))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longer = sorted((text for text in self._spellings if len(text) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longer)) + r"|\s+|.", re.DOTALL)

    @property
    def start_id(self) -> int:
        return self._id_of("start")

    @property
    def end_id(self) -> int:
        return self._id_of("end")

    @property
    def mask_id(self) -> int:
        return self._id_of("mask")

    @property
    def unknown_id(self) -> int:
        return self._id_of("unknown")

    @property
    def separator_id(self) -> int:
        return self._id_of("separator")

    def _id_of(self, role: str) -> int:
        token = getattr(self, role)
        if token is None:
            raise ValueError(f"this model's vocabulary has no {role} token")
        return self._ids[token]

    @cached_property
    def residue_ids(self) -> tuple[int, ...]:
        """Ids of all letters, ProstT5's structure states among them, and without the gaps of ESM (``.``, ``-``)."""
        return tuple(i for i, token in enumerate(self.vocabulary) if len(token) == 1 and token.isalpha())

    def sentinel(self, i: int) -> int:
        """Id of ``<extra_id_i>``, which stands for the hidden span number ``i``."""
        if (token := f"<extra_id_{i}>") not in self._ids:
            count = sum(token.startswith("<extra_id_") for token in self.vocabulary)
            raise ValueError(f"{token} is not in the vocabulary, which has {count} such tokens, counted from 0")
        return self._ids[token]

    def frame(self, task: str | None = None) -> tuple[bytes, bytes]:
        """Ids before and after the residues.

        Raises: ValueError for an unknown task, or if its prefix is in the checkpoint's own files alone.
        """
        before = b"" if self.start is None else bytes([self.start_id])
        if task is not None:
            prefix = self._task(task).prefix
            if prefix not in self._ids:
                raise ValueError(
                    f"task={task!r} needs the id of {prefix}, which only the checkpoint's own vocabulary tells: "
                    "put its tokenizer.json or spiece.model beside the weights, or ask for no prefix with task='none'"
                )
            before += bytes([self._ids[prefix]])
        return before, bytes([self.end_id])

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            choice = f"choose from {', '.join(map(repr, self.tasks))}" if self.tasks else "this model has no tasks"
            raise ValueError(f"task={name!r} is unknown; {choice}")
        return self.tasks[name]

    def encode(self, text: str, *, task: str | None = None, unknown: str = "error") -> list[int]:
        """Ids of one sequence, with what stands before and after it (unless texts bring that along: see ``framed``).

        Args:
            task: what the model is asked for, one of ``tasks``. Its prefix comes first, and only its letters are taken.
            unknown: what to do with a character outside the vocabulary. "error" raises; "each" gives one unknown
                token per character, so that lengths are kept; "run" gives one for a whole run of unknown characters,
                as transformers' ``EsmTokenizer`` does (the length changes).

        Raises:
            ValueError: a character outside the vocabulary or the task's letters, with its position.
        """
        before, after = self.frame(task) if self.framed else (b"", b"")
        return [*before, *self.residues(text, task=task, unknown=unknown), *after]

    def residues(self, text: str, *, task: str | None = None, unknown: str = "error") -> bytes:
        """Ids of one sequence, one byte each, without what stands before and after it."""
        own = None if task is None else self._task(task).letters
        letters = self._letters if own is None else own
        raw = text.encode("utf-8", "surrogatepass")
        if not raw.translate(None, letters.encode()):
            return raw.translate(self._table)
        return bytes(self._by_pattern(text, letters, task, unknown))

    def _by_pattern(self, text: str, letters: str, task: str | None, unknown: str) -> list[int]:
        if unknown not in ("error", "each", "run"):
            raise ValueError(f"unknown={unknown!r} is not a policy; choose 'error', 'each' or 'run'")
        ids: list[int] = []
        in_run = False
        for match in self._pattern.finditer(text):
            token = match.group()
            known = self._spellings.get(token) if len(token) > 1 or token in letters else None
            if known is not None:
                ids.append(known)
            elif not token.isspace():
                if unknown == "error":
                    raise ValueError(self._complaint(text, match.start(), letters, task))
                if unknown == "each" or not in_run:
                    ids.append(self.unknown_id)
            in_run = known is None and not token.isspace()
        return ids

    def _complaint(self, text: str, at: int, letters: str, task: str | None) -> str:
        where = "the vocabulary" if task is None else f"the letters of task {task!r}"
        wanted = letters if self.mask is None else f"{letters}, {self.mask}"
        hint = self._hint(text, at, letters, task)
        return f"character {text[at]!r} at position {at + 1} is not in {where} ({wanted}).{hint and ' ' + hint}"

    def _hint(self, text: str, at: int, letters: str, task: str | None) -> str:
        letter = text[at]
        if task is not None and letter in self._ids:
            return self._task(task).hint
        if letter.islower() and letter.upper() in letters:
            return "Sequences are upper case: call .upper() on them."
        if letter == "*":
            return "'*' is a stop codon: cut the sequence there."
        if letter == "|":
            return "'|' stands between the chains of a pair, and this model takes single chains."
        if letter in "BJOZ" and self.unknown == "<OTHER>":
            return "Write <OTHER> in its place: ProteinBERT's own code reads it so."
        if letter in "XUZOB" and any(UNCONFIRMED.fullmatch(token) for token in self.vocabulary):
            return "Its id may be in the checkpoint's tokenizer.json or spiece.model: put it beside the weights."
        return ""

    def pack(self, sequences: Sequence[str], *, task: str | None = None, unknown: str = "error") -> Packed:
        """Sequences as one batch, each with what stands before and after it."""
        return self.pack_residues([self.residues(text, task=task, unknown=unknown) for text in sequences], task=task)

    def pack_residues(self, rows: Sequence[bytes], *, task: str | None = None) -> Packed:
        """``pack`` of rows that ``residues`` made."""
        before, after = self.frame(task)
        stream = bytearray(before + (after + before).join(rows) + after)
        tokens = torch.frombuffer(stream, dtype=torch.uint8)
        added = len(before) + len(after)
        return Packed.from_tokens(tokens, tuple(len(row) + added for row in rows))

    def published(self, text: str) -> list[int]:
        """Ids that the published (transformers) tokenizer makes of this very text, which has to be ASCII.

        What it does not know it passes over in silence, and a whole run of it becomes one unknown token: "MKT" is one
        unknown to ProtBert, M and one unknown to ProtT5, and the K of "M K" one unknown and K to Ankh. ProGen2's leaves
        out what it does not know.
        """
        if self.unknown is None:
            return [self._ids[token] for token in self._pattern.findall(text) if token in self._ids]
        ids = [] if self.start is None else [self.start_id]
        # Tokens of several letters, and ProstT5's added lower case, are found anywhere in a text.
        special = sorted((t for t in self.vocabulary if len(t) > 1 or t.islower()), key=len, reverse=True)
        for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, special))})", text)):
            parts = [part] if i % 2 else re.findall(self._cut, part)  # re.split puts what it split at between the rest
            ids += [self._ids.get(token, self.unknown_id) for token in parts]
        return [*ids, self.end_id]

    @property
    def _cut(self) -> str:
        """How the published tokenizer cuts what lies between special tokens: its group is what can be known."""
        known = re.escape("".join(token for token in self.vocabulary if len(token) == 1))
        if self.words and self.pieces:
            return rf"((?<!\S)[{known}])|\S+"
        if self.words:
            signs = re.escape(punctuation)
            return rf"([{signs}]|[^\s{signs}]+)"
        return rf"([{known}])|\s*[^\s{known}]+|\s+" if self.pieces else rf"([{known}])|[^\s{known}]+"

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, nothing left out: ``decode(encode(x)) == "<cls>" + x + "<eos>"`` for x without spaces.

        Raises: ValueError for an id outside the vocabulary.
        """
        return "".join(self._tokens(ids))

    def residue_text(self, ids: Sequence[int] | Tensor) -> str:
        """The residue letters among token ids, in order. Raises: ValueError for an id outside the vocabulary."""
        return "".join(token for token in self._tokens(ids) if len(token) == 1 and token.isalpha())

    def _tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        numbers = [int(i) for i in ids]
        if wrong := [i for i in numbers if not 0 <= i < len(self.vocabulary)]:
            raise ValueError(f"ids {wrong[:5]} are outside the vocabulary of {len(self.vocabulary)} tokens")
        return [self.vocabulary[i] for i in numbers]


def checked(tokenizer: Tokenizer, pieces: Sequence[str], where: str) -> Tokenizer:
    """The tokenizer with what a published vocabulary adds, once the two are known to agree.

    Args:
        pieces: the text of every id in the published vocabulary, with or without SentencePiece's word marker. It may
            end early, as a ``spiece.model`` does before the sentinels; an empty text says nothing about its id.
        where: what to call that vocabulary in errors.

    Raises:
        ValueError: the two disagree, with every id where they do.
    """
    vocabulary = list(tokenizer.vocabulary)
    faults = []
    for i, piece in enumerate(pieces):
        text = piece.removeprefix("▁") or piece
        if not text:
            continue
        if i == len(vocabulary) and tokenizer.extensible:
            vocabulary.append(text)
        elif i >= len(vocabulary):
            faults.append(f"id {i} is {text!r}, beyond the last of the table")
        elif vocabulary[i] == text:
            continue
        elif not UNCONFIRMED.fullmatch(vocabulary[i]):
            faults.append(f"id {i} is {text!r}, wanted {vocabulary[i]!r}")
        elif text in vocabulary:
            faults.append(f"id {i} is {text!r}, which is also id {vocabulary.index(text)}")
        else:
            vocabulary[i] = text
    if faults:
        raise ValueError(
            f"{where} is not the vocabulary of {len(vocabulary)} tokens that this kind of model was published with: "
            f"{'; '.join(faults)}. Use the files of one checkpoint together."
        )
    return replace(tokenizer, vocabulary=tuple(vocabulary), guessed=False)
