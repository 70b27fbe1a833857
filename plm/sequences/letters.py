"""Which characters a sequence may hold, and what is wrong with the others."""

import re
import string
from typing import Literal, NamedTuple

from plm.sequences.records import Case

SPACES = b" \t\v\f\r\n"
GAPS = b"-."
PROMPT_SIGNS = "_12"  # residues to be filled in, and the two ends of a protein
# All letters pass: which of B J O U X Z a model knows is its tokenizer's affair.
LETTERS: dict[Case, str] = {"upper": "A-Z", "capitals": "A-Z", "lower": "a-z", "keep": "A-Za-z"}
ALLOWED: dict[Case, bytes] = {
    "upper": string.ascii_uppercase.encode(),
    "capitals": string.ascii_uppercase.encode(),
    "lower": string.ascii_lowercase.encode(),
    "keep": string.ascii_letters.encode(),
}
# A token, to step over it, or (group 1) a character that does not belong here
NOT_ALLOWED = {case: re.compile(rb"<\w+>|([^%b|])" % letters.encode()) for case, letters in LETTERS.items()}
HINTS = {
    "*": "a stop inside a sequence: --on-stop X reads it as X, --on-stop skip leaves the sequence out",
    "-": "gaps of an alignment: --strip-gaps removes them",
    ".": "gaps of an alignment: --strip-gaps removes them",
    "_": "residues to be filled in: only the prompts of `plm generate` have them",
    ":": "chains are joined by : for `plm fold` alone, which folds them together",
    "\0": "a NUL byte: the file is damaged or not text, fetch it again",
}
IN_CAPITALS = "write residues in capitals: small letters mean insertions in an alignment, and masked regions elsewhere"


class Problem(NamedTuple):
    """`position` is 0-based in the whole sequence; -1 if it is not at a residue. Policies look at the `kind`."""

    reason: str
    hint: str
    kind: Literal["empty", "stop", "other"] = "other"
    position: int = -1


def find_problem(sequence: bytes, case: Case, prompts: bool = False, complexes: bool = False) -> Problem | None:
    """The first thing that is wrong with a tidied sequence, or None.

    Prompts may hold ``PROMPT_SIGNS``, complexes any number of chains.
    """
    if not sequence:
        hint = "give it residues, remove it, or leave such records out with --skip-empty"
        return Problem("empty sequence", hint, "empty")
    if problem := (_missing_chain(sequence) if complexes else _no_pair(sequence)):
        return problem
    signs = (b":" if complexes else b"|") + (PROMPT_SIGNS.encode() if prompts else b"")
    if not sequence.translate(None, ALLOWED[case] + signs):
        return None
    found = next((match for match in NOT_ALLOWED[case].finditer(sequence) if match[1] and match[1] not in signs), None)
    if not found:
        return None
    at = found.start()
    # All before it is ASCII, so the position in bytes is the position in characters.
    character = sequence[at:].decode(errors="replace")[0]
    code = "" if character.isascii() else f" (U+{ord(character):04X})"  # some look like a Latin letter
    marks = "with : between chains" if complexes else "and <mask> or | where the model has them"
    hint = HINTS.get(character, f"sequences hold the letters {LETTERS[case]}, {marks}")
    if case == "capitals" and character.islower():
        hint = IN_CAPITALS
    reason = f"{character!r}{code} at position {_place(sequence, at, complexes)}"
    return Problem(reason, hint, "stop" if character == "*" else "other", at)


def _no_pair(sequence: bytes) -> Problem | None:
    chains = sequence.split(b"|")
    if len(chains) > 2:
        return Problem(f"{len(chains)} chains", "a pair is HEAVY|LIGHT: two chains with one | between them")
    if missing := [name for name, chain in zip(("heavy", "light"), chains, strict=False) if not chain]:
        hint = "a pair is HEAVY|LIGHT: give it both chains, or leave such records out with --skip-empty"
        return Problem(f"no {' and no '.join(missing)} chain", hint, "empty")
    return None


def _missing_chain(sequence: bytes) -> Problem | None:
    chains = sequence.split(b":")
    missing = [str(number) for number, chain in enumerate(chains, 1) if not chain]
    if not missing:
        return None
    hint = "chains are written A:B: give each residues, or leave such records out with --skip-empty"
    return Problem(f"chain {', '.join(missing)} of {len(chains)} is empty", hint, "empty")


def _place(sequence: bytes, at: int, complexes: bool) -> str:
    """A position as people count: from 1, and within its chain where there are several."""
    if complexes and b":" in sequence:
        return f"{at - sequence.rfind(b':', 0, at)} of chain {sequence.count(b':', 0, at) + 1}"
    bar = sequence.find(b"|")
    if bar < 0:
        return str(at + 1)
    return f"{at + 1} of the heavy chain" if at < bar else f"{at - bar} of the light chain"
