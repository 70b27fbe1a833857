"""Variants by name: what a name such as ``A24T:K30E`` makes of a wild type, and all single substitutions of one.

| name               | means                                                                    |
|--------------------|--------------------------------------------------------------------------|
| `A24T`             | T in place of A at position 24                                           |
| `K30del`           | without K30                                                              |
| `A24_T26del`       | without A24 to T26                                                       |
| `A24_K25insGG`     | GG between A24 and K25                                                   |
| `A24delinsGG`      | GG in place of A24; `A24_T26delinsGG` in place of A24 to T26             |
| `A24T:K30E`        | both; `,` and `/` join as well                                           |
| `MKTAY...`         | the whole sequence of the variant: letters alone                         |
| `WT`, `_wt`, empty | the wild type, which wins over the whole sequence WT                     |

Substitutions are written as in ProteinGym and fair-esm's data, changes of length as HGVS writes them, in one-letter
code. Positions are those of the wild type, whatever else a variant changes. Those of a pair run on from the heavy to
the light chain; a pair that changes its length is given whole, as ``HEAVY|LIGHT``.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from plm.sequences import Fault, InputError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
WILD_TYPE = ("", "wt", "_wt")
HOW_TO_WRITE = (
    "write A24T, K30del, A24_T26del, A24_K25insGG or A24_T26delinsGG, several joined by ':', or the whole sequence"
)
_JOINTS = re.compile("[:,/]")
_PLACE = r"([A-Za-z])(-?\d+)"
_CHANGE = re.compile(rf"{_PLACE}(?:_{_PLACE})?(?:([A-Za-z*])|(del)?(?:ins([A-Za-z]+))?)")
_WHOLE = re.compile(r"[A-Za-z|]+")


class Problem(NamedTuple):
    """What is wrong with a variant and what to do; None where the numbering may be at fault."""

    reason: str
    hint: str | None


class Change(NamedTuple):
    """``new`` in place of what stands at ``start`` up to ``stop``, both counted from 0; nothing, for an insertion."""

    start: int
    stop: int
    new: str


def mutated(wild_type: str, variants: Sequence[str], offset: int = 1) -> list[str]:
    """The sequence of every variant; ``offset`` is the number of the wild type's first residue.

    Raises:
        InputError: with every variant that cannot be read or does not fit the wild type (position, what is there, and
            what the name says).
    """
    texts, faults = read(wild_type, variants, offset)
    if faults:
        raise InputError("variants", faults)
    return texts


def read(wild_type: str, variants: Sequence[str], offset: int = 1) -> tuple[list[str], list[Fault]]:
    """``mutated``, and all faults instead of an error: what a variant with one became is not to be used."""
    bar, letters = wild_type.find("|"), wild_type.replace("|", "")
    texts: list[str] = []
    problems: list[tuple[int, Problem]] = []
    for i, variant in enumerate(variants):
        name = variant.strip()
        if name.lower() in WILD_TYPE:
            texts.append(wild_type)
        elif _WHOLE.fullmatch(name):
            texts.append(name)
        else:
            changes, found = _read(name, letters, offset)
            text = letters
            for change in sorted(changes, reverse=True):
                text = text[: change.start] + change.new + text[change.stop :]
            if bar >= 0:
                if len(text) != len(letters):
                    found.append(Problem("a change of length in a pair", "give the whole pair HEAVY|LIGHT"))
                text = f"{text[:bar]}|{text[bar:]}"
            texts.append(text)
            problems += [(i, problem) for problem in found]
    misfit = any(problem.hint is None for _, problem in problems)
    hint = _numbering(letters, variants, offset) if misfit else ""
    return texts, [Fault(each.reason, each.hint or hint, record=i + 1, id=variants[i]) for i, each in problems]


def single_substitutions(wild_type: str, offset: int = 1) -> list[str]:
    """Names of all variants with one residue replaced by another of the twenty, position by position."""
    letters = wild_type.replace("|", "")
    return [f"{old}{i}{new}" for i, old in enumerate(letters, offset) for new in RESIDUES if new != old]


def _read(name: str, letters: str, offset: int) -> tuple[list[Change], list[Problem]]:
    """The changes of one name, and what is wrong with it."""
    changes, problems = [], []
    for part in _JOINTS.split(name):
        match = _CHANGE.fullmatch(part.strip())
        if match is None or not any(match.groups()[4:]):
            problems.append(Problem(f"{part.strip()!r} is no change of a sequence", HOW_TO_WRITE))
            continue
        first, number, last, end, residue, deleted, inserted = match.groups()
        misfits = [_misfit(*place, letters, offset) for place in ((first, number), (last, end)) if place[0]]
        if any(misfits):
            problems += [misfit for misfit in misfits if misfit]
            continue
        start = int(number) - offset
        stop = int(end or number) - offset + 1
        if residue == "*":
            problems.append(Problem(f"{part.strip()} stops the protein", "give the sequence that is left instead"))
        elif stop <= start or (last and residue):
            problems.append(Problem(f"{part.strip()!r} is no change of a sequence", HOW_TO_WRITE))
        elif inserted and not deleted and stop != start + 2:
            problems.append(Problem(f"{part.strip()} does not insert between neighbours", "write A24_K25insGG"))
        elif inserted and not deleted:
            changes.append(Change(start + 1, start + 1, inserted))
        else:
            changes.append(Change(start, stop, residue or inserted or ""))
    for one, other in pairwise(sorted(changes)):
        if one.stop > other.start or one[:2] == other[:2]:
            reason = f"position {other.start + offset} is changed twice"
            problems.append(Problem(reason, "name every change of a variant once"))
    return changes, problems


def _misfit(residue: str, number: str, letters: str, offset: int) -> Problem | None:
    """What is wrong with a residue at a place of the wild type."""
    at = int(number) - offset
    if not 0 <= at < len(letters):
        last = offset + len(letters) - 1
        return Problem(f"position {number} is outside the wild type, which has {offset} to {last}", None)
    if letters[at] != residue:
        return Problem(f"position {number} is {letters[at]} in the wild type; the variant says {residue}", None)
    return None


def _numbering(letters: str, variants: Sequence[str], offset: int) -> str:
    """What to do where variants do not fit: another number for the first residue, if all would fit then."""
    places = {(residue, int(number)) for variant in variants for residue, number in re.findall(_PLACE, variant)}
    lowest, highest = (pick(number for _, number in places) for pick in (min, max))
    fitting = [
        other
        for other in range(highest - len(letters) + 1, lowest + 1)
        if all(letters[number - other] == residue for residue, number in places)
    ]
    if len(fitting) == 1 and len(places) > 2:  # two places fit somewhere by chance
        return (
            f"all fit if the number of the first residue is {fitting[0]}: offset={fitting[0]} (--offset {fitting[0]})"
        )
    return f"check the sequence, and the number of its first residue, which is {offset} (offset, --offset)"
