"""``plm score``: how probable a model finds each protein."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from plm.cli import options
from plm.cli.errors import usage
from plm.cli.job import Job, choose_task

if TYPE_CHECKING:
    from plm.loading import Model
    from plm.outputs.rows import RowsWriter
    from plm.scoring import How, Score
    from plm.sequences import Reading

FORMATS = ("csv", "tsv", "jsonl")
HOW = ("auto", "pseudo-likelihood", "single-pass", "likelihood", "forward", "backward")
COLUMNS = ("id", "residues", "log_likelihood", "mean")
DIRECTIONS = ("forward", "backward")


@click.command()
@options.takes_sequences(
    click.option(
        "--how",
        type=click.Choice(HOW),
        default="auto",
        show_default=True,
        help=(
            "pseudo-likelihood, auto for most: a pass per residue, which alone is hidden; single-pass, auto for "
            "ProteinBERT, hides none. "
            "likelihood, auto for ProGen2: the average of forward (N to C) and backward (C to N)."
        ),
    ),
    options.task,
    options.pad_to,
    options.batch_invariant,
    click.option("--per-residue", is_flag=True, help="List the logarithm for every residue, too (jsonl only)."),
    click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix."),
)
def score(job: Job, how: "How", task: str | None, pad_to: int | None, per_residue: bool, layout: str | None) -> int:
    """Tell how probable a model finds proteins.

    Natural logarithms of probabilities: log_likelihood is their sum over the residues, mean their average. A likelihood
    has the sum of each direction, too: forward, backward.

    INPUT is what `plm embed` takes. The output has a row per protein (.csv, .tsv, .jsonl).

    \b
      plm score proteins.fasta -m esm2-650m -o scores.csv
      plm score pairs.csv --heavy-column vh --light-column vl -m igbert
      plm score proteins.fasta -m progen2-medium -o scores.csv
      plm score MKTAYIAKQRQISFVK -m plm-mini --per-residue
    """
    job.keep_stdout_free("scores")
    reading = job.read(task)

    from plm.context import check_padding
    from plm.outputs.rows import layout_of, open_rows
    from plm.running import need_language_model
    from plm.scoring import choose_how, score_rows

    def check(model: "Model") -> None:
        need_language_model(model)
        choose_how(model, how)
        with usage("--pad-to"):
            check_padding(model, pad_to)

    with usage():
        layout = layout or layout_of(job.output, FORMATS[2:] if per_residue else FORMATS)
    if per_residue and layout != "jsonl":
        raise click.UsageError(f"{layout} holds a number per protein; write --per-residue as jsonl.")

    def open_output(reading: "Reading", how: "How", provenance: Mapping[str, object]) -> "RowsWriter":
        columns = (*COLUMNS, *DIRECTIONS) if how == "likelihood" else COLUMNS
        columns = (*columns, "per_residue") if per_residue else columns
        return open_rows(
            job.output, layout, ids=reading.ids, columns=columns, provenance=provenance, overwrite=job.overwrite
        )

    open_output(reading, how, {})  # what cannot be written fails before a model is loaded
    model = job.load(check)
    task = choose_task(model, task)
    how = choose_how(model, how)
    reading, rows = job.encode(model, reading, task, hidden=False, pad_to=pad_to)
    writer = open_output(reading, how, {**job.provenance(model, reading), "how": how, "task": task, "pad_to": pad_to})

    def put(index: int, found: "Score") -> None:
        row: dict[str, object] = {
            "id": reading.ids[index],
            "residues": len(found.per_residue),
            "log_likelihood": found.total,
            "mean": found.mean,
        }
        if found.forward is not None and found.backward is not None:
            row |= {"forward": found.forward.total, "backward": found.backward.total}
        if per_residue:
            # The shortest decimals of float32 would be spoilt by a way through float64.
            row["per_residue"] = [float(text) for text in found.per_residue.numpy().astype(str)]
        writer.write(index, [row])

    results = score_rows(model, rows, how=how, task=task, pad_to=pad_to, max_tokens=job.max_tokens)
    return job.report(model, reading, job.write(reading, writer, results, put))
