"""The way of every verb that takes sequences: read, load, encode, then write results while they are computed.

Each step fails as early as it can: bad sequences before torch is imported, a target that cannot be written before a
model is loaded, a sequence that the model does not take before anything is computed.
"""

import hashlib
import json
import re
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
from plm.sequences import Duplicates, InputError, Naming, OnStop, Reading, read_records

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from plm.loading import Model, Origin, WeightFile
    from plm.outputs import Writer


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
    seed: int | None
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

    def read(self) -> Reading:
        """Read the input, and say on stderr what was changed in it. Raises: InputError; click.UsageError."""
        if self.output and _is_same_file(self.input, self.output):
            raise click.UsageError(f"{self.output} is the input; --overwrite would destroy it. Choose another output.")
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
        return reading

    def load(self) -> "Model":
        """Load the model. Raises: click.BadParameter for the device; CheckpointError."""
        import torch

        from plm.loading import load

        device = usable_device(self.device)
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return load(self.model, device=device, dtype=self.dtype, revision=self.revision, offline=self.offline)

    def encode(self, model: "Model", reading: Reading) -> tuple[Reading, list[bytes]]:
        """The records that the model works on, and for each its residues as the model numbers them.

        Raises: InputError with all that the model does not take, and where that is in the input.
        """
        from plm.running import encode

        records, limit = reading.records, model.net.config.max_length
        try:
            return reading, encode(model, [record.sequence for record in records])
        except InputError as error:
            found = [(records[fault.record - 1], fault) for fault in error.faults]
        faults = [replace(fault, line=record.line, record=record.number, id=record.id) for record, fault in found]
        skipped = set()
        if limit is not None and self.too_long == "skip":
            skipped = {record.number for record, _ in found if record.length > limit - 2}
        if errors := [fault for fault in faults if fault.record not in skipped]:
            raise InputError(reading.source, errors)
        rest = [record for record in records if record.number not in skipped]
        return self.encode(model, replace(reading, records=rest, failed=[*reading.failed, *faults]))

    def provenance(self, model: "Model", reading: Reading) -> dict[str, Any]:
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
            "sha256": _hashes(origin),
            "licence": origin.licence,
            "citation": origin.citation,
            "dtype": _name(model.dtype),
            "device": str(model.device),
            "seed": self.seed,
            **_describe_input(self.input, literal=all(record.line == 0 for record in reading.records)),
            "changes": reading.changes,
            "sequences": len(reading.records),
        }

    def write(
        self, model: "Model", reading: Reading, writer: "Writer", results: Iterable[tuple[int, "Tensor"]]
    ) -> Code:
        """Write results while they come, then report. With no sequence left, no output is made."""
        from tqdm import tqdm

        start = perf_counter()
        if reading.records:
            # In residues, and by the mean rate so far: the longest come first, so the estimate errs on the long side.
            bar = tqdm(
                total=sum(reading.lengths),
                unit=" residues",
                unit_scale=True,
                smoothing=0,
                leave=False,
                dynamic_ncols=True,
                disable=self.quiet or not sys.stderr.isatty(),
            )
            with bar, writer:
                for index, result in results:
                    writer.write(index, result)
                    bar.update(reading.records[index].length)
        self._report(model, reading, perf_counter() - start)
        return Code.SOME_FAILED if reading.failed else Code.DONE

    def _report(self, model: "Model", reading: Reading, seconds: float) -> None:
        for fault in reading.failed:
            click.echo(f"Failed: {fault}", err=True)
        origin, proteins, residues = model.checkpoint, len(reading.records), sum(reading.lengths)
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
                "changes": reading.changes,
                "failed": [{"id": fault.id, "reason": str(fault)} for fault in reading.failed],
            }
            click.echo(json.dumps(summary))
        if not self.quiet:
            name = f"{origin.name}@{origin.revision[:8]}" if origin.revision else origin.name
            done = f"{_count(proteins, 'protein')}, {_count(residues, 'residue')} in {seconds:.1f} s"
            how = f"{speed:,.0f} residues/s on {model.device} in {_name(model.dtype)} with {name}"
            where = f" -> {output}" if output not in (None, "-") else ""
            failed = f"; {len(reading.failed):,} failed" if reading.failed else ""
            click.echo(f"{done}, {how}{where}{failed}", err=True)


def usable_device(name: str) -> "torch.device":
    """The device of a name. Raises: click.BadParameter if this machine does not have it."""
    from plm.loading import choose_device

    try:
        return choose_device(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None


def _hashes(origin: "Origin") -> dict[str, str]:
    """The sha256 of every weight file. The hub's cache names large files by it, and `fetch` has compared the two."""
    fetched = not Path(origin.source).expanduser().exists()

    def sha256(file: "WeightFile") -> str:
        name = file.path.resolve().name
        return name if fetched and re.fullmatch("[0-9a-f]{64}", name) else file.sha256

    return {file.name: sha256(file) for file in origin.files}


def _is_same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:  # one of them is no file: stdin, a literal sequence, an output yet to be written
        return False


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
