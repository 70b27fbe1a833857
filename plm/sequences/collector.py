"""The policies: what is done with each record, and the books on it."""

import itertools
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import get_args

from plm.sequences.letters import ALLOWED, GAPS, SPACES, Problem, find_problem
from plm.sequences.records import TOKEN, Case, Duplicates, Empty, Fault, InputError, Naming, OnStop, Reading, Record

NUL_IN_HEADER = Problem("NUL byte in the header", "the file is damaged or not text: fetch it again")
POLICIES = {"case": Case, "on_stop": OnStop, "duplicates": Duplicates, "empty": Empty, "naming": Naming}


@dataclass
class Collector:
    """Applies the policies record by record and keeps the books."""

    case: Case
    on_stop: OnStop
    strip_gaps: bool
    duplicates: Duplicates
    empty: Empty
    naming: Naming
    prompts: bool = False
    complexes: bool = False
    seen: int = 0
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    failed: list[Fault] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # id -> the next suffix to try when it comes again

    def __post_init__(self) -> None:
        for name, choices in POLICIES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")

    def finish(self, source: str) -> Reading:
        if not self.seen and not self.faults:
            self.faults.append(Fault("no sequence in it", "give at least one sequence"))
        self.faults += self._mixed()
        if self.faults:
            raise InputError(source, sorted(self.faults, key=lambda fault: fault.line))
        changes = [what.format(count) for what, count in self.changes.items()]
        return Reading(source, self.records, self.notes + changes, self.failed)

    def text(self, raw: bytes) -> str:
        """Headers and table cells as text. Old files are Latin-1, in which every byte is a character."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.changes["{:,} lines that are not UTF-8 read as Latin-1"] += 1
            return raw.decode("latin-1")

    def add(self, header: str, pieces: list[bytes], line: int = 0, first: int = 0) -> None:
        """Take one record, which begins at `line` and whose residues begin at line `first`."""
        self.seen += 1
        name = self._name(header)
        raw = b"".join(pieces)
        sequence = raw.translate(None, SPACES)
        if self.complexes:
            sequence = sequence.replace(b"|", b":")  # a pair is a complex as well
        if len(sequence) != len(raw):
            self.changes["spaces removed in {:,} sequences"] += 1
        problem = NUL_IN_HEADER if "\0" in header else None
        if not problem and (not sequence or sequence.translate(None, ALLOWED[self.case])):  # few have more than letters
            sequence = self._tidy(sequence)
            problem = find_problem(sequence, self.case, self.prompts, self.complexes)
        if problem:
            if problem.position >= 0 and first:
                line = self._line_of(problem.position, sequence, pieces, first)
            policy = {"empty": self.empty, "stop": self.on_stop, "other": "error"}[problem.kind]
            faults = self.failed if policy == "skip" else self.faults
            faults.append(Fault(problem.reason, problem.hint, line, self.seen, name))
            return
        if name in self.ids and self.duplicates == "suffix":
            self.changes["{:,} repeated ids made unique with a suffix (.2, .3, ...)"] += 1
            name = self._unique(name)
        if name not in self.ids:
            self.ids[name] = 2
            self.records.append(Record(name, sequence.decode("ascii"), header, line, self.seen))
        elif self.duplicates == "first":
            self.changes["{:,} records with a repeated id left out"] += 1
        else:
            hint = "rename it, or use --duplicates suffix or --duplicates first"
            self.faults.append(Fault("this id was used before", hint, line, self.seen, name))

    def _mixed(self) -> list[Fault]:
        """A fault for each record of the rarer kind, if there are single chains as well as pairs."""
        pairs = [record for record in self.records if "|" in record.sequence]
        if len(pairs) in (0, len(self.records)):
            return []
        few, reason = pairs, "a pair among single chains"
        if len(pairs) >= len(self.records) - len(pairs):
            few, reason = (
                [record for record in self.records if "|" not in record.sequence],
                "a single chain among pairs",
            )
        hint = "give all records as pairs HEAVY|LIGHT, or none"
        return [Fault(reason, hint, record.line, record.number, record.id) for record in few]

    def _name(self, header: str) -> str:
        words = header.split(maxsplit=1)
        if not words or self.naming == "index":
            return str(self.seen)
        if self.naming == "header":
            return header
        fields = words[0].split("|")  # sp|P12345|NAME_YEAST
        return fields[1] if self.naming == "accession" and len(fields) > 1 and fields[1] else words[0]

    def _unique(self, name: str) -> str:
        while (candidate := f"{name}.{self.ids[name]}") in self.ids:
            self.ids[name] += 1  # remembered, so that many equal ids stay linear
        return candidate

    def _tidy(self, sequence: bytes) -> bytes:
        """Do the changes that the policies allow, and count them."""
        if self.strip_gaps and (gaps := sequence.count(b"-") + sequence.count(b".")):
            self.changes["{:,} gaps (- or .) removed"] += gaps
            sequence = sequence.translate(None, GAPS)
        between = self._between
        if sequence.endswith(b"*") or b"*" + between in sequence:
            self.changes["terminal stops (*) removed from {:,} sequences"] += 1
            sequence = between.join(chain.rstrip(b"*") for chain in sequence.split(between))
        sequence = self._recase(sequence)
        if self.on_stop == "X" and b"*" in sequence:
            self.changes["{:,} inner stops (*) read as X"] += sequence.count(b"*")
            sequence = sequence.replace(b"*", b"x" if self.case == "lower" else b"X")
        return sequence

    def _recase(self, sequence: bytes) -> bytes:
        """All letters in the wanted case, those of tokens as they were."""
        lower = self.case == "lower"
        change = bytes.lower if lower else bytes.upper
        if self.case in ("keep", "capitals") or sequence == change(sequence):
            return sequence
        parts = TOKEN.split(sequence)
        parts[::2] = map(change, parts[::2])
        recased = b"".join(parts)
        if changed := sum(map(operator.ne, sequence, recased)):
            what = "uppercase letters lower-cased" if lower else "lowercase letters upper-cased"
            self.changes[f"{{:,}} {what}"] += changed
        return recased

    @property
    def _between(self) -> bytes:
        """What stands between two chains."""
        return b":" if self.complexes else b"|"

    def _line_of(self, position: int, sequence: bytes, pieces: list[bytes], first: int) -> int:
        """The line that holds a position of the tidied `sequence`, whose `pieces` begin at line `first`."""
        dropped = SPACES + GAPS if self.strip_gaps else SPACES
        kept = [piece.translate(None, dropped) for piece in pieces]
        given = b"".join(kept).replace(b"|", self._between).split(self._between)
        tidied, before = sequence.split(self._between), sequence.count(self._between, 0, position)
        # The stops that the chains before it ended with; else 0
        position += sum(map(len, given[:before])) - sum(map(len, tidied[:before]))
        return next(line for line, end in enumerate(itertools.accumulate(map(len, kept)), first) if position < end)
