"""What comes out of a reading: records, or faults."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Case = Literal["upper", "capitals", "lower", "keep"]
OnStop = Literal["error", "X", "skip"]
Duplicates = Literal["suffix", "error", "first"]
Empty = Literal["error", "skip"]
Naming = Literal["first-word", "header", "accession", "index"]

TOKEN = re.compile(rb"(<\w+>)")  # <mask> and its kin; the group keeps them when text is split
FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Record:
    """One sequence. `id` is unique within its reading, `header` is what the source called it, `line` is where it begins
    (1-based; 0 for a literal sequence), `number` counts the records of the source from 1, those left out included."""

    id: str
    sequence: str
    header: str
    line: int
    number: int

    @property
    def chains(self) -> tuple[str, ...]:
        """The sequence alone, heavy and light chain, or the chains of a complex."""
        return tuple(self.sequence.replace(":", "|").split("|"))

    @property
    def length(self) -> int:
        """Residues, of all chains if there are several; a token such as ``<mask>`` is one."""
        return len(TOKEN.sub(b"X", self.sequence.encode())) - len(self.chains) + 1


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and what to do. `line` and `record` are 1-based; 0 where there is none."""

    reason: str
    hint: str
    line: int = 0
    record: int = 0
    id: str = ""

    def __str__(self) -> str:
        places = [f"line {self.line}"] * (self.line > 0) + [f"record {self.record} {self.id!r}"] * (self.record > 0)
        return f"{', '.join(places)}: {self.reason}" if places else self.reason


class InputError(ValueError):
    """Bad sequences or files. `faults` holds all that was found; the message shows the first ten."""

    def __init__(self, source: str, faults: Iterable[Fault]) -> None:
        self.source, self.faults = source, tuple(faults)
        shown, count = self.faults[:FAULTS_SHOWN], len(self.faults)
        lines = [f"{source}: {shown[0]}"] if count == 1 else [f"{source}: {count} faults", *map(str, shown)]
        if count > FAULTS_SHOWN:
            lines.append(f"... and {count - FAULTS_SHOWN} more")
        hints = dict.fromkeys(f"What to do: {fault.hint}" for fault in shown)
        super().__init__("\n".join(["\n  ".join(lines), *hints]))


@dataclass(frozen=True)
class Reading:
    """What was read: the name of the source, its records in input order, one sentence for each kind of change, and what
    a policy left out."""

    source: str
    records: list[Record]
    changes: list[str]
    failed: list[Fault]

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.records]

    @property
    def lengths(self) -> list[int]:
        return [record.length for record in self.records]
