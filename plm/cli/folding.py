"""The work of `plm fold`: what is left to be done, and doing it."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
import torch

from plm.cli.folded import beyond_pdb, confidence_of, confidence_text, fingerprint, first_numbers, structure_text
from plm.cli.job import Job
from plm.esmfold.chains import READ_AS_X, Chains
from plm.esmfold.cost import operations
from plm.folding import Chunk, fold_rows, folding_network, hide, random_hidden, read_proteins
from plm.loading import Model
from plm.memory import gigabytes
from plm.outputs.proteins import COLUMNS, ProteinFolder, fill_whole
from plm.outputs.target import OutputError
from plm.plots import draw_confidence
from plm.report import MARK, Row, Shown, write_report
from plm.sequences import Fault, InputError, Reading
from plm.structures import Numbering, Structure

if TYPE_CHECKING:
    from tqdm import tqdm

REPORT = "report.html"
SHOWN = 5


@dataclass(frozen=True)
class How:
    """What was asked for; the names are those of the options."""

    layout: str
    plot: bool
    json: bool
    chunk: Chunk
    recycles: int
    hide: float | None
    seed: int | None
    max_tokens: int | None
    linker: str
    residue_gap: int
    numbering: Numbering

    @property
    def settings(self) -> dict[str, object]:
        """What decides what a file looks like, and is not in the structure's own settings."""
        drawn = {} if self.hide is None else {"hide": self.hide, "seed": self.seed}
        return {"numbering": self.numbering, **drawn}

    def read(self, texts: list[str]) -> list[Chains]:
        """The proteins of residues ``A:B``. Raises: InputError with all that cannot be folded, or not be written."""
        proteins = read_proteins(texts, linker=self.linker, residue_gap=self.residue_gap)
        told = ((i, beyond_pdb(one, self.numbering)) for i, one in enumerate(proteins if self.layout == "pdb" else ()))
        if faults := [Fault(*reason, record=i + 1) for i, reason in told if reason]:
            raise InputError("sequences", faults)
        if self.hide is None:
            return proteins
        return [
            hide(protein, random_hidden(protein, self.hide, seeded(f"{self.seed} {text}")))
            for protein, text in zip(proteins, texts, strict=True)
        ]


@dataclass
class Run:
    """Proteins on their way into a folder: ``proteins`` are those of the reading's records."""

    job: Job
    model: Model
    reading: Reading
    proteins: list[Chains]
    how: How
    folder: ProteinFolder
    folded: list[int] = field(default_factory=list)
    failed: list[Fault] = field(default_factory=list)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return self.job.provenance(self.model, self.reading)

    @cached_property
    def config(self) -> dict[str, Any]:
        return asdict(folding_network(self.model).config)

    @cached_property
    def marks(self) -> list[str]:
        """The fingerprint of each protein."""
        return [self.mark(i) for i in range(len(self.proteins))]

    @cached_property
    def left(self) -> list[int]:
        """The proteins whose files were not there, or not whole, when this was first asked."""
        return [i for i in range(len(self.proteins)) if not self.is_there(i)]

    @property
    def done(self) -> list[int]:
        """The proteins whose files are there."""
        return sorted({*range(len(self.proteins))} - {*self.left} | {*self.folded})

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files of a protein; a picture can be drawn from them."""
        return f".{self.how.layout}", *([".json"] if self.how.json else [])

    def mark(self, i: int) -> str:
        """The fingerprint of protein ``i``. What joins chains decides nothing where there is one."""
        how, several = self.how, ":" in self.reading.records[i].sequence
        joined = {"linker": how.linker, "residue_gap": how.residue_gap} if several else {}
        settings = {**how.settings, **joined, "recycles": how.recycles, "dtype": self.provenance["dtype"]}
        return fingerprint(self.reading.records[i].sequence, self.provenance["sha256"], self.config, settings)

    def is_there(self, i: int) -> bool:
        return all(self.folder.has(self.reading.ids[i], suffix, self.marks[i]) for suffix in self.suffixes)

    def check(self) -> None:
        """Say what will not be done again. Raises: OutputError if other files are in the way."""
        suffixes = (*self.suffixes, *([".png"] if self.how.plot else []))
        self.folder.check_free(
            (id, suffix, mark) for id, mark in zip(self.reading.ids, self.marks, strict=True) for suffix in suffixes
        )
        if renamed := self.folder.renamed():
            more = f" and {len(renamed) - SHOWN:,} more" if len(renamed) > SHOWN else ""
            self.job.note(f"files are named otherwise than ids: {', '.join(renamed[:SHOWN])}{more}")
        if skipped := len(self.marks) - len(self.left):
            many = "1 protein is" if skipped == 1 else f"{skipped:,} proteins are"
            self.job.note(f"{many} in {self.folder.path} already, and not folded again")

    def fold(self) -> float:
        """Fold what is left, and write each protein at once. Returns: seconds that it took."""
        start = perf_counter()
        try:
            with self.folder.filling():
                for i in self.done:
                    self.folder.remove_stale(self.reading.ids[i], self.marks[i])
                    self.finish(i)
                work = self.work()
                with self.job.bar(sum(work.values()), "FLOP") as bar:
                    self.fold_left(work, bar)
        except KeyboardInterrupt:
            state = f"{len(self.done):,} of {len(self.marks):,} proteins are in {self.folder.path}"
            click.echo(f"{state}; the same command goes on with the others.", err=True)
            raise
        return perf_counter() - start

    def work(self) -> dict[int, int]:
        """What each protein that is left costs, in floating-point operations."""
        config = folding_network(self.model).config
        return {i: operations(config, self.proteins[i].length, self.how.recycles + 1) for i in self.left}

    def fold_left(self, work: Mapping[int, int], bar: "tqdm[None]") -> None:
        """Fold what costs ``work``, and tell of it as it is done."""
        before, spent = perf_counter(), 0.0
        total = rest = sum(work.values())

        def failed(number: int, error: Exception) -> None:
            """Neither its work nor its time says anything of the others."""
            nonlocal before, total, rest
            i = self.left[number]
            record = self.reading.records[i]
            self.failed.append(Fault(str(error), "", record.line, record.number, record.id))
            total, rest = total - work[i], rest - work[i]
            bar.total = total
            before = perf_counter()

        proteins = [self.proteins[i] for i in self.left]
        stream = fold_rows(
            self.model,
            proteins,
            recycles=self.how.recycles,
            chunk=self.how.chunk,
            max_tokens=self.how.max_tokens,
            on_failure=failed,
        )
        for number, structure in stream:
            i, seconds = self.left[number], perf_counter() - before
            try:
                self.write(i, structure)
            except ValueError as error:  # coordinates that a PDB file has no room for
                if isinstance(error, OutputError):
                    raise
                failed(number, error)
                continue
            self.folded.append(i)
            self.finish(i, seconds)
            spent, rest = spent + perf_counter() - before, rest - work[i]  # drawing takes its time, too
            bar.update(work[i])
            if not self.job.quiet and not sys.stderr.isatty():
                left = duration(rest / (total - rest) * spent)
                click.echo(f"{self.reading.ids[i]}: {self.about(i)}, {seconds:.1f} s; about {left} left", err=True)
            before = perf_counter()

    def write(self, i: int, structure: Structure) -> None:
        """The files of a protein, the structure last: where it is, the others are. Those of other runs go first."""
        id, mark, how = self.reading.ids[i], self.marks[i], self.how
        text = structure_text(structure, how.layout, how.numbering, mark, how.settings)
        self.folder.remove_stale(id, mark)
        if how.json:
            told = confidence_text(id, structure, how.layout, mark, how.settings, self.provenance)
            self.folder.write(id, ".json", told.encode())
        self.folder.write(id, f".{how.layout}", text.encode())

    def finish(self, i: int, seconds: float | None = None) -> None:
        """The picture of a protein whose files are there, and its row in the index."""
        id, mark, record = self.reading.ids[i], self.marks[i], self.reading.records[i]
        if self.folder.row(id).get("fingerprint") != mark or seconds is not None:
            file = self.folder.file(id, f".{self.how.layout}")
            plddt, ptm = confidence_of(file.read_text("utf-8"))
            took = "" if seconds is None else f"{seconds:.2f}"  # nobody knows any more
            values = (id, file.name, record.length, len(record.chains), plddt, ptm, took, mark)
            self.folder.add_row(dict(zip(COLUMNS, values, strict=True)))
        if self.how.plot and not self.folder.has(id, ".png", mark):
            told = json.loads(self.folder.file(id, ".json").read_text("utf-8"))
            metadata = {"Description": json.dumps({"fingerprint": mark, **self.provenance})}
            self.folder.draw(
                id,
                ".png",
                lambda path: draw_confidence(
                    told["plddt"],
                    told["pae"],
                    path,
                    chains={name: len(sequence) for name, sequence in told["chains"].items()},
                    title=id,
                    subtitle=f"{self.about(i)}, {told['settings']['model']}",
                    metadata=metadata,
                ),
            )

    def about(self, i: int) -> str:
        """What people want to know first of a protein."""
        row, record = self.folder.row(self.reading.ids[i]), self.reading.records[i]
        chains = f" in {len(record.chains)} chains" if len(record.chains) > 1 else ""
        residues = "1 residue" if record.length == 1 else f"{record.length:,} residues"
        return f"{residues}{chains}, mean pLDDT {row['mean_plddt']}, pTM {row['ptm']}"

    def results(self) -> list[dict[str, object]]:
        """The index as numbers, of the proteins of this input."""
        rows = [self.folder.row(self.reading.ids[i]) for i in self.done]
        kinds = {"length": int, "chains": int, "mean_plddt": float, "ptm": float, "seconds": float}
        return [
            {name: kinds[name](value) if value and name in kinds else value or None for name, value in row.items()}
            for row in rows
        ]

    def report(self) -> str | None:
        """The page of all proteins that are there. Returns: its path."""
        if not self.how.plot or not self.done:
            return None
        rows = [
            Row(record.id, record.length, len(record.chains), float(row["mean_plddt"]), float(row["ptm"]))
            for record in (self.reading.records[i] for i in self.done)
            for row in [self.folder.row(record.id)]
        ]
        path = self.folder.path / REPORT
        structures = "1 structure" if len(rows) == 1 else f"{len(rows):,} structures"
        subtitle = f"{structures} by {self.model.checkpoint.name}, plm {self.provenance['plm']}"

        def fill(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                title = Path(self.reading.source).name
                write_report(file, rows, map(self.shown, self.done), title=title, subtitle=subtitle)

        fill_whole(path, fill)
        proteins = "1 protein" if len(rows) == 1 else f"{len(rows):,} proteins"
        self.job.note(f"{path} shows {proteins} in {gigabytes(path.stat().st_size)}")
        return str(path)

    def shown(self, i: int) -> Shown:
        """A protein as its files have it."""
        id, layout = self.reading.ids[i], self.how.layout
        told = json.loads(self.folder.file(id, ".json").read_text("utf-8"))
        text = self.folder.file(id, f".{layout}").read_text("utf-8")
        starts = first_numbers(self.proteins[i], self.how.numbering)
        return Shown(id, self.about(i), text, layout, told["chains"], told["plddt"], told["pae"], starts)


def check_report(folder: ProteinFolder) -> None:
    """Raises: OutputError if the page would replace one that is not ours."""
    path = folder.path / REPORT
    if path.exists() and not folder.overwrite and MARK.encode() not in path.read_bytes()[:1000]:
        raise OutputError(f"{path} was not written by plm fold; choose another folder or pass --overwrite")


def with_unknown_letters(job: Job, reading: Reading) -> Reading:
    """The reading, with a word on the letters that are read as X, which gets no atoms."""
    count = sum(chain.count(letter) for record in reading.records for chain in record.chains for letter in READ_AS_X)
    if not count:
        return reading
    letters = f"{', '.join(READ_AS_X[:-1])} or {READ_AS_X[-1]}"
    change = f"{count:,} {'letter' if count == 1 else 'letters'} {letters} read as X, as the model's authors do"
    job.note(change)
    return replace(reading, changes=[*reading.changes, change])


def seeded(text: str) -> torch.Generator:
    """Random numbers that a text alone decides."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    return torch.Generator().manual_seed(seed)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
