"""The way of every verb that takes sequences: read, load, encode, then write results while they are computed.

Each step fails as early as it can: bad sequences before torch is imported, a target that cannot be written before a
model is loaded, a sequence that the model does not take before anything is computed.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

import plm
from plm.cli.errors import Code
from plm.sequences import TOKEN, Duplicates, Fault, Naming, OnStop, Record, read_records

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from plm.loading import Model
    from plm.outputs import Writer


@dataclass(frozen=True)
class Sequences:
    """The input: records to work on, one row of bytes for each (a byte per residue: letters, or ids once encoded), what
    the reader changed, and what was left out for which reason."""

    records: list[Record]
    rows: list[bytes]
    changes: list[str]
    failed: list[Fault]

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.records]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line; the names are those of the options."""

    input: str
    model: str
    output: str | None
    overwrite: bool
    device: str
    dtype: str
    max_tokens: int | None
    revision: str | None
    offline: bool
    column: str | None
    id_column: str | None
    naming: Naming
    on_stop: OnStop
    strip_gaps: bool
    duplicates: Duplicates
    skip_empty: bool
    too_long: str
    quiet: bool
    as_json: bool

    def read(self) -> Sequences:
        """Read the input, and say on stderr what was changed in it. Raises: InputError."""
        reading = read_records(
            self.input,
            column=self.column,
            id_column=self.id_column,
            on_stop=self.on_stop,
            strip_gaps=self.strip_gaps,
            duplicates=self.duplicates,
            empty="skip" if self.skip_empty else "error",
            id=self.naming,
        )
        if not self.quiet:
            for change in reading.changes:
                click.echo(f"Note: {change}", err=True)
        rows = [record.sequence.encode() for record in reading.records]
        return Sequences(reading.records, rows, reading.changes, reading.failed)

    def load(self) -> "Model":
        """Load the model. Raises: click.BadParameter for the device; CheckpointError."""
        if not self.shows_progress:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
        from plm.loading import load

        device = usable_device(self.device)
        return load(self.model, device=device, dtype=self.dtype, revision=self.revision, offline=self.offline)

    def encode(self, model: "Model", sequences: Sequences) -> Sequences:
        """Residues as the model numbers them. Raises: InputError with all that the model does not take."""
        from plm.running import encode

        limit = model.net.config.max_length
        if limit is not None and self.too_long == "skip":
            sequences = _skip_longer(sequences, limit - 2, model.checkpoint.name)
        rows = encode(model, [record.sequence for record in sequences.records], sequences.ids)
        return replace(sequences, rows=rows)

    def provenance(self, model: "Model", sequences: Sequences) -> dict[str, Any]:
        """What goes into every output: how each number in it came about."""
        import torch

        origin = model.checkpoint
        return {
            "plm": plm.__version__,
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": origin.name,
            "source": origin.source,
            "revision": origin.revision,
            "sha256": origin.sha256(),
            "licence": origin.licence,
            "citation": origin.citation,
            "dtype": _name(model.dtype),
            "device": str(model.device),
            **_describe_input(self.input, literal=all(record.line == 0 for record in sequences.records)),
            "changes": sequences.changes,
            "sequences": len(sequences.records),
        }

    def write(
        self, model: "Model", sequences: Sequences, writer: "Writer", results: Iterable[tuple[int, "Tensor"]]
    ) -> Code:
        """Write results while they come, then report. With no sequence left, no output is made."""
        from tqdm import tqdm

        start = perf_counter()
        if sequences.records:
            # In residues, and by the mean rate so far: the longest come first, so the estimate errs on the long side.
            bar = tqdm(
                total=sum(sequences.lengths),
                unit=" residues",
                unit_scale=True,
                smoothing=0,
                leave=False,
                dynamic_ncols=True,
                disable=not self.shows_progress,
            )
            with bar, writer:
                for index, result in results:
                    writer.write(index, result)
                    bar.update(len(sequences.rows[index]))
        self._report(model, sequences, perf_counter() - start)
        return Code.SOME_FAILED if sequences.failed else Code.DONE

    @property
    def shows_progress(self) -> bool:
        return sys.stderr.isatty() and not self.quiet

    def _report(self, model: "Model", sequences: Sequences, seconds: float) -> None:
        for fault in sequences.failed:
            click.echo(f"Failed: {fault}", err=True)
        origin, proteins, residues = model.checkpoint, len(sequences.records), sum(sequences.lengths)
        speed, output = residues / max(seconds, 1e-9), self.output if proteins else None
        if self.as_json:
            summary = {
                "proteins": proteins,
                "residues": residues,
                "seconds": round(seconds, 3),
                "residues_per_second": round(speed, 1),
                "device": str(model.device),
                "dtype": _name(model.dtype),
                "model": origin.name,
                "revision": origin.revision,
                "output": output,
                "changes": sequences.changes,
                "failed": [{"id": fault.id, "reason": str(fault)} for fault in sequences.failed],
            }
            click.echo(json.dumps(summary))
        if not self.quiet:
            name = f"{origin.name}@{origin.revision[:8]}" if origin.revision else origin.name
            done = f"{_count(proteins, 'protein')}, {_count(residues, 'residue')} in {seconds:.1f} s"
            how = f"{speed:,.0f} residues/s on {model.device} in {_name(model.dtype)} with {name}"
            where = f" -> {output}" if output not in (None, "-") else ""
            failed = f"; {len(sequences.failed):,} failed" if sequences.failed else ""
            click.echo(f"{done}, {how}{where}{failed}", err=True)


def usable_device(name: str) -> "torch.device":
    """The device of a name. Raises: click.BadParameter if this machine does not have it."""
    from plm.loading import choose_device

    try:
        return choose_device(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None


def _skip_longer(sequences: Sequences, limit: int, model: str) -> Sequences:
    records, failed = [], list(sequences.failed)
    for number, record in enumerate(sequences.records, 1):
        length = len(TOKEN.sub(b"X", record.sequence.encode()))  # <mask> is one residue
        if length <= limit:
            records.append(record)
        else:
            reason = f"{length:,} residues; {model} takes at most {limit:,}"
            failed.append(Fault(reason, "cut it into domains", record.line, number, record.id))
    return replace(sequences, records=records, failed=failed)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _describe_input(source: str, literal: bool) -> dict[str, str | None]:
    if literal:
        return {"input": "literal sequence", "input_sha256": None}
    if source == "-" or not Path(source).is_file():  # a pipe, which cannot be read again
        return {"input": source, "input_sha256": None}
    with Path(source).open("rb") as file:
        return {"input": source, "input_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
