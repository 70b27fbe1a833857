"""Vocabularies as literal tables, and a tokenizer that looks bytes up in one.

A protein's letters become ids by one table look-up per byte, at the speed of memory, because every residue token is a
single letter. Tokens of several letters (``<mask>``) and spaces take a slower path with the same result.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plm.packing import Packed

# facebookresearch/esm@2b36991, esm/data.py and constants.py; the same for ESM-1b, ESM-1v and ESM-2
ESM = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")

_ABSENT = 255


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back for a vocabulary of single letters and ``<...>`` tokens.

    ``start`` and ``end`` are put around every sequence. Whitespace separates tokens, nothing more; case matters.
    """

    vocabulary: tuple[str, ...]
    start: str
    end: str
    unknown: str
    mask: str
    _table: bytes = field(init=False, repr=False, compare=False)
    _letters: bytes = field(init=False, repr=False, compare=False)
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        letters = "".join(token for token in self.vocabulary if len(token) == 1)
        table = bytearray([_ABSENT]) * 256
        for letter in letters:
            table[ord(letter)] = ids[letter]
        longer = sorted((t for t in self.vocabulary if len(t) > 1), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longer)) + r"|\s+|.", re.DOTALL)
        for name, value in {
            "_ids": ids,
            "_letters": letters.encode(),
            "_table": bytes(table),
            "_pattern": pattern,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def start_id(self) -> int:
        return self._ids[self.start]

    @property
    def end_id(self) -> int:
        return self._ids[self.end]

    @property
    def mask_id(self) -> int:
        return self._ids[self.mask]

    @property
    def unknown_id(self) -> int:
        return self._ids[self.unknown]

    def encode(self, text: str, *, unknown: str = "error") -> list[int]:
        """Ids of one sequence, start and end tokens included.

        Args:
            unknown: what to do with a character outside the vocabulary. "error" raises; "each" gives one unknown
                token per character, so that lengths are kept; "run" gives one for a whole run of unknown characters,
                as transformers' ``EsmTokenizer`` does (the length changes).

        Raises:
            ValueError: a character outside the vocabulary, with its position.
        """
        return [self.start_id, *self.residues(text, unknown=unknown), self.end_id]

    def residues(self, text: str, *, unknown: str = "error") -> bytes:
        """Ids of one sequence, one byte each, without start and end tokens."""
        raw = text.encode("utf-8", "surrogatepass")
        if not raw.translate(None, self._letters):
            return raw.translate(self._table)
        return bytes(self._by_pattern(text, unknown))

    def _by_pattern(self, text: str, unknown: str) -> list[int]:
        if unknown not in ("error", "each", "run"):
            raise ValueError(f"unknown={unknown!r} is not a policy; choose 'error', 'each' or 'run'")
        ids: list[int] = []
        in_run = False
        for match in self._pattern.finditer(text):
            token = match.group()
            known = self._ids.get(token)
            if known is not None:
                ids.append(known)
            elif not token.isspace():
                if unknown == "error":
                    raise ValueError(self._complaint(text, match.start()))
                if unknown == "each" or not in_run:
                    ids.append(self.unknown_id)
            in_run = known is None and not token.isspace()
        return ids

    def _complaint(self, text: str, at: int) -> str:
        letter = text[at]
        hint = ""
        if letter.islower() and letter.upper() in self._ids:
            hint = " Sequences are upper case: call .upper() on them."
        elif letter == "*":
            hint = " '*' is a stop codon: cut the sequence there."
        letters = self._letters.decode()
        return f"character {letter!r} at position {at + 1} is not in the vocabulary ({letters}, <mask>).{hint}"

    def pack(self, sequences: Sequence[str], *, unknown: str = "error") -> Packed:
        """Sequences as one batch, each with start and end tokens."""
        rows = [self.residues(text, unknown=unknown) for text in sequences]
        return self.pack_residues(rows)

    def pack_residues(self, rows: Sequence[bytes]) -> Packed:
        """``pack`` of rows that ``residues`` made."""
        start, end = bytes([self.start_id]), bytes([self.end_id])
        stream = bytearray(start + (end + start).join(rows) + end)
        tokens = torch.frombuffer(stream, dtype=torch.uint8)
        return Packed.from_tokens(tokens, tuple(len(row) + 2 for row in rows))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, nothing left out: ``decode(encode(x)) == "<cls>" + x + "<eos>"`` for x without spaces.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        numbers = [int(i) for i in ids]
        if wrong := [i for i in numbers if not 0 <= i < len(self.vocabulary)]:
            raise ValueError(f"ids {wrong[:5]} are outside the vocabulary of {len(self.vocabulary)} tokens")
        return "".join(self.vocabulary[i] for i in numbers)


def esm_tokenizer() -> Tokenizer:
    """The tokenizer of ESM-1b, ESM-1v and ESM-2."""
    return Tokenizer(ESM, start="<cls>", end="<eos>", unknown="<unk>", mask="<mask>")
