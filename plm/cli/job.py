"""The way of every verb that takes sequences: read, load, encode, then write results while they are computed.

Each step fails as early as it can: bad sequences before torch is imported, a target that cannot be written before a
model is loaded, a sequence that the model does not take before anything is computed.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import click

import plm
from plm.cli.errors import Code, usage
from plm.cli.loading import note, usable_device, use_threads, while_loading
from plm.sequences import Duplicates, InputError, Naming, OnStop, Reading, read_records

if TYPE_CHECKING:
    from tqdm import tqdm

    from plm.loading import Model, Origin, WeightFile
    from plm.outputs import Output

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line; the names are those of the options."""

    input: str
    model: str
    output: str
    overwrite: bool
    device: str
    dtype: str
    max_tokens: int | None
    threads: int | None
    seed: int | None
    revision: str | None
    offline: bool
    column: str | None
    heavy_column: str | None
    light_column: str | None
    id_column: str | None
    naming: Naming
    on_stop: OnStop
    strip_gaps: bool
    duplicates: Duplicates
    skip_empty: bool
    too_long: str
    quiet: bool
    as_json: bool
    batch_invariant: bool = False  # which some verbs cannot promise

    def read(self, task: str | None = None, *, prompts: bool = False, complexes: bool = False) -> Reading:
        """Read the input, and say on stderr what was changed in it.

        3Di states, which ProstT5's task "fold2aa" takes, are brought to lower case. ``complexes`` are in capitals.

        Raises: InputError; click.UsageError.
        """
        self.keep_input()
        reading = read_records(
            self.input,
            column=self.column,
            heavy_column=self.heavy_column,
            light_column=self.light_column,
            id_column=self.id_column,
            case="lower" if task == "fold2aa" else "capitals" if complexes else "upper",
            prompts=prompts,
            complexes=complexes,
            on_stop=self.on_stop,
            strip_gaps=self.strip_gaps,
            duplicates=self.duplicates,
            empty="skip" if self.skip_empty else "error",
            id=self.naming,
        )
        self.note(*reading.changes)
        return reading

    def keep_input(self, **others: str | None) -> None:
        """Raises: click.UsageError if the output would replace the input, or one of other files, by their options."""
        files = {"the input": self.input, **{f"the file of --{name}": file for name, file in others.items() if file}}
        for what, file in files.items():
            if self.output != "-" and _is_same_file(file, self.output):
                raise click.UsageError(f"{self.output} is {what}; --overwrite would destroy it. Choose another output.")

    def keep_stdout_free(self, what: str) -> None:
        """Raises: click.UsageError if both the data and the summary would go to stdout."""
        if self.output == "-" and self.as_json:
            raise click.UsageError(f"with --json the summary goes to stdout: give the {what} a file with -o.")

    def load(self, check: "Callable[[Model], object]") -> "Model":
        """Load the model, once ``check`` has let pass what is known of it by name, and again as it is.

        From here to the end of the command torch has the threads that were asked for.

        Raises: click.BadParameter for the device or the dtype; click.UsageError where ``check`` raises a ValueError;
            CheckpointError.
        """
        from plm.loading import load

        device = usable_device(self.device)
        use_threads(self.threads)
        self.foresee(check)
        promised = usage() if self.batch_invariant else nullcontext()
        with while_loading(self.dtype, self.quiet), promised:
            model = load(
                self.model,
                device=device,
                dtype=self.dtype,
                revision=self.revision,
                offline=self.offline,
                batch_invariant=self.batch_invariant,
            )
        with usage():
            check(model)
        return model

    def foresee(self, check: "Callable[[Model], object]") -> None:
        """``check`` what the registry knows of the model, before anything is downloaded. Raises: click.UsageError."""
        from plm.previews import preview

        known = preview(self.model) if self.revision is None else None  # another revision may be another model
        if known is not None:
            with usage():
                check(known)

    def encode(
        self,
        model: "Model",
        reading: Reading,
        task: str | None = None,
        *,
        hidden: bool = True,
        pad_to: int | None = None,
    ) -> tuple[Reading, list[bytes]]:
        """The records that the model works on, and for each its residues as the model numbers them.

        Raises: InputError with all that the model does not take, and where that is in the input; click.BadParameter for
            pads.
        """
        from plm.context import check_padding
        from plm.running import encode

        with usage("--pad-to"):
            check_padding(model, pad_to)

        def each(sequences: list[str]) -> list[bytes]:
            return encode(model, sequences, task=task, hidden=hidden, pad_to=pad_to)

        return self.prepare(model, reading, task, each, pad_to)

    def prepare(
        self,
        model: "Model",
        reading: Reading,
        task: str | None,
        each: Callable[[list[str]], list[T]],
        pad_to: int | None = None,
    ) -> tuple[Reading, list[T]]:
        """`encode`, with what ``each`` makes of the sequences in place of the residues."""
        from plm.running import token_limit

        self._refuse_folded_states(model, reading, task)
        records, limit = reading.records, token_limit(model, pad_to)
        try:
            prepared = each([record.sequence for record in records])
        except InputError as error:
            found = [(records[fault.record - 1], fault) for fault in error.faults]
        else:
            return self._with_rare_letters(reading, model.tokenizer.rare), prepared
        faults = [replace(fault, line=record.line, record=record.number, id=record.id) for record, fault in found]
        skipped = set()
        if limit is not None and self.too_long == "skip":
            frame = sum(map(len, model.tokenizer.frame(task)))
            tokens = {record.number: record.length + len(record.chains) - 1 + frame for record, _ in found}
            skipped = {number for number, count in tokens.items() if count > limit}
        if errors := [fault for fault in faults if fault.record not in skipped]:
            raise InputError(reading.source, errors)
        rest = [record for record in records if record.number not in skipped]
        return self.prepare(
            model, replace(reading, records=rest, failed=[*reading.failed, *faults]), task, each, pad_to
        )

    def _refuse_folded_states(self, model: "Model", reading: Reading, task: str | None) -> None:
        """Raises: click.UsageError if lower case, now upper case, meant structure states to the model (ProstT5)."""
        lower = [name for name, each in model.tokenizer.tasks.items() if (each.letters or "").islower()]
        if lower and task not in lower and any("upper-cased" in change for change in reading.changes):
            raise click.UsageError(
                f"lower-case letters are structure states to {model.checkpoint.name}: give --task {lower[0]}, "
                "or residues in capitals."
            )

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
            "dtype": model.precision,
            "device": str(model.device),
            **({"batch_invariant": True} if model.batch_invariant else {}),
            "seed": self.seed,
            **_describe_input(self.input, literal=all(record.line == 0 for record in reading.records)),
            "changes": reading.changes,
            "sequences": len(reading.records),
        }

    def write(
        self, reading: Reading, output: "Output", results: Iterable[tuple[int, T]], put: Callable[[int, T], None]
    ) -> float:
        """``put`` results into the output while they come. With no sequence left, no output is made.

        Returns: seconds that it took.
        """
        start = perf_counter()
        if reading.records:
            with self.bar(sum(reading.lengths), "residues") as bar, output:
                for index, result in results:
                    put(index, result)
                    bar.update(reading.records[index].length)
        return perf_counter() - start

    def bar(self, total: int, unit: str) -> "tqdm[None]":
        """A progress bar on a terminal's stderr."""
        from tqdm import tqdm

        # By the mean rate so far: the longest come first, so the estimate errs on the long side.
        return tqdm(
            total=total,
            unit=f" {unit}",
            unit_scale=True,
            smoothing=0,
            leave=False,
            dynamic_ncols=True,
            disable=self.quiet or not sys.stderr.isatty(),
        )

    def report(
        self,
        model: "Model",
        reading: Reading,
        seconds: float,
        counts: Mapping[str, int] | None = None,
        seed: int | None = None,
        about: Mapping[str, object] | None = None,
    ) -> Code:
        """Say what was done, and what failed. ``counts`` tells how much of what; the speed is in the last of these.

        ``about`` is what else the JSON object says.
        """
        for fault in reading.failed:
            click.echo(f"Failed: {fault}", err=True)
        counts = counts or {"proteins": len(reading.records), "residues": sum(reading.lengths)}
        unit, amount = list(counts.items())[-1]
        origin, speed = model.checkpoint, amount / max(seconds, 1e-9)
        output = self.output if reading.records else None
        if self.as_json:
            summary: dict[str, object] = {
                **counts,
                "seconds": round(seconds, 3),
                f"{unit}_per_second": round(speed, 1),
                "device": str(model.device),
                "dtype": model.precision,
                "model": origin.name,
                "revision": origin.revision,
                "output": output,
                "changes": reading.changes,
                "failed": [{"id": fault.id, "reason": str(fault)} for fault in reading.failed],
            }
            click.echo(json.dumps(summary | ({} if seed is None else {"seed": seed}) | dict(about or {})))
        if not self.quiet:
            name = f"{origin.name}@{origin.revision[:8]}" if origin.revision else origin.name
            done = f"{', '.join(_count(*item) for item in counts.items())} in {seconds:.1f} s"
            how = f"{speed:,.0f} {unit}/s on {model.device} in {model.precision} with {name}"
            drawn = f", seed {seed}" if seed is not None else ""
            where = f" -> {output}" if output not in (None, "-") else ""
            failed = f"; {len(reading.failed):,} failed" if reading.failed else ""
            click.echo(f"{done}, {how}{drawn}{where}{failed}", err=True)
        return Code.SOME_FAILED if reading.failed else Code.DONE

    def _with_rare_letters(self, reading: Reading, rare: str) -> Reading:
        """The reading, with a word on the letters that have tokens but were never trained."""
        count = sum(record.sequence.count(letter) for record in reading.records for letter in rare)
        if not count:
            return reading
        change = f"{_count('letters', count)} {', '.join(rare[:-1])} or {rare[-1]} read as X, as the model's authors do"
        self.note(change)
        return replace(reading, changes=[*reading.changes, change])

    def note(self, *texts: str) -> None:
        """Tell on stderr, unless all is to be quiet."""
        for text in texts if not self.quiet else ():
            note(text)


def choose_task(model: "Model", task: str | None) -> str | None:
    """As `plm.running.choose_task`. Raises: click.BadParameter if the model has no such task."""
    from plm import running

    with usage("--task"):
        return running.choose_task(model, task)


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


def _count(what: str, number: int) -> str:
    return f"{number:,} {what.removesuffix('s') if number == 1 else what}"


def _describe_input(source: str, literal: bool) -> dict[str, str | None]:
    if literal:
        return {"input": "literal sequence", "input_sha256": None}
    if source == "-" or not Path(source).is_file():  # a pipe, which cannot be read again
        return {"input": source, "input_sha256": None}
    with Path(source).open("rb") as file:
        return {"input": source, "input_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
