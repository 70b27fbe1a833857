"""``plm variants``: how well models like variants of a protein."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from plm.cli import options
from plm.cli.assays import Table, read_scan, read_table
from plm.cli.errors import usage
from plm.cli.job import Job, choose_task

if TYPE_CHECKING:
    from plm.cli.drawing import DrawnScan
    from plm.loading import Model
    from plm.outputs.rows import RowsWriter
    from plm.variant_effects import How

FORMATS = ("csv", "tsv", "jsonl")
HOW = ("auto", "masked-marginals", "wt-marginals", "pseudo-ppl", "pseudo-ppl-published", "likelihood")
LINES_SHOWN = 5
ENSEMBLES = {"esm1v-all": tuple(f"esm1v-{i}" for i in range(1, 6))}
# Options of verbs that take sequences, which this one does not have.
UNUSED: dict[str, Any] = {
    **dict.fromkeys(("seed", "column", "heavy_column", "light_column", "id_column")),
    "naming": "first-word",
    "on_stop": "error",
    "duplicates": "suffix",
    "too_long": "error",
    "strip_gaps": False,
    "skip_empty": False,
}


def _models_given(context: click.Context, option: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise click.UsageError(options.NO_MODEL, context)
    models = [each for name in names for each in ENSEMBLES.get(name.casefold(), (name,))]
    if twice := [name for i, name in enumerate(models) if name in models[:i]]:
        raise click.BadParameter(f"{twice[0]} is given twice; an ensemble has different models.", context, option)
    return tuple(models)


@click.command()
@click.argument("input")
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    callback=_models_given,
    metavar="NAME",
    help="Name, hub id, folder or file. Repeated, or esm1v-all: an ensemble, with the mean of its models.  [required]",
)
@click.option("-o", "--output", default="-", help="File; - is stdout, the default.")
@click.option("--overwrite", is_flag=True, help="Replace the output, once the new one is complete.")
@click.option("--sequence", help="The wild type of all variants: a literal sequence, or a file with one.")
@click.option("--sequence-column", help="Column that holds the wild type of each variant (ProteinGym: target_seq).")
@click.option("--scan", is_flag=True, help="INPUT is the wild type; score all of its single substitutions.")
@click.option("--mutant-column", help="Column that holds the variants.  [default: mutant]")
@click.option("--offset", type=int, default=1, show_default=True, help="Number of the wild type's first residue.")
@click.option(
    "--how",
    type=click.Choice(HOW),
    default="auto",
    show_default=True,
    help=(
        "auto: likelihood for ProGen2, wt-marginals for ProteinBERT, else masked-marginals. "
        "pseudo-ppl and likelihood take any length."
    ),
)
@options.task
@options.pad_to
@options.batch_invariant
@click.option("--assay-column", help="Column of measured values: say how the scores rank them (Spearman).")
@click.option("--heatmap", metavar="PNG", help="Draw the single substitutions, too. With -o scan.png nothing else.")
@click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix.")
@options.device
@options.dtype
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens per batch: memory, not results.")
@options.threads
@options.revision
@options.offline
@options.quiet
@options.as_json
def variants(
    models: tuple[str, ...],
    sequence: str | None,
    sequence_column: str | None,
    scan: bool,
    mutant_column: str | None,
    offset: int,
    how: "How",
    task: str | None,
    pad_to: int | None,
    assay_column: str | None,
    heatmap: str | None,
    layout: str | None,
    **given: Any,
) -> int:
    """Score variants of a protein.

    A difference of natural logarithms: above 0, the model prefers the variant to the wild type.

    INPUT is a CSV or TSV with a column of variants, such as A24T, A24T:K30E, K30del or whole sequences. The output has
    all of its columns, and one for each model (.csv, .tsv, .jsonl). With --scan, INPUT is the wild type.

    \b
      plm variants assay.csv -m esm1v-all --sequence wild_type.fasta --offset 24 -o scored.csv
      plm variants DMS.csv -m progen2-medium --sequence-column target_seq --assay-column DMS_score -o scored.csv
      plm variants --scan MKTAYIAKQRQISFVK -m plm-mini -o scan.csv --heatmap scan.png
    """
    job = Job(model=models[0], **UNUSED, **given)
    drawing = job.output if layout is None and job.output.lower().endswith(".png") else heatmap
    if drawing != heatmap and heatmap is not None:
        raise click.UsageError(f"{job.output} and {heatmap} are pictures: give -o a table, or leave --heatmap out.")
    if drawing is not None and not drawing.lower().endswith(".png"):
        raise click.UsageError(f"--heatmap {drawing} is not named like a picture: give a name that ends in .png.")
    columns = {"--mutant-column": mutant_column, "--assay-column": assay_column}
    beside = {"--sequence": sequence, "--sequence-column": sequence_column} | columns
    if scan and (odd := [option for option, value in beside.items() if value is not None]):
        raise click.UsageError(f"with --scan the input is the wild type: leave out {', '.join(odd)}.")
    if not scan and (sequence is None) == (sequence_column is None):
        raise click.UsageError("give the wild type with --sequence or --sequence-column, or as the input with --scan.")
    job.keep_stdout_free("scores")
    job.keep_input(sequence=sequence)
    if scan:
        table = read_scan(job.input, offset)
    else:
        table = read_table(job.input, sequence, sequence_column, mutant_column, offset)
    job.note(*table.changes)
    measured = None if assay_column is None else table.assay.numbers(assay_column)
    table.check()
    if drawing is not None and len(table.groups) > 1:
        raise click.UsageError(f"a heat map shows one wild type; the input has {len(table.groups):,}.")

    from plm.context import check_padding
    from plm.outputs.rows import layout_of
    from plm.running import need_language_model
    from plm.variant_effects import choose_how

    def check(model: "Model") -> None:
        need_language_model(model)
        with usage("--how"):
            choose_how(model, how)
        with usage("--pad-to"):
            check_padding(model, pad_to)

    if layout is None and drawing != job.output:
        with usage():
            layout = layout_of(job.output, FORMATS)
    open_outputs(job, table, layout, drawing, [], {})  # what cannot be written fails before a model is loaded
    for name in models:
        replace(job, model=name).foresee(check)
    start = perf_counter()
    scores: dict[str, list[float]] = {}
    ways, sources = set(), []
    for name in models:
        model = replace(job, model=name).load(check)
        ways.add(way := choose_how(model, how))
        if len(ways) > 1:
            raise click.UsageError(f"{' and '.join(sorted(ways))} have no common scale: choose models of one kind.")
        chosen, column = choose_task(model, task), model.checkpoint.name
        table.check_free([column, *scores])
        scores[column] = score_table(job, model, table, way, chosen, pad_to)
        sources.append(job.provenance(model, table.reading))
    if len(models) > 1:
        table.check_free(["mean"])
        scores["mean"] = [fmean(each) for each in zip(*scores.values(), strict=True)]
    about: dict[str, object] = {"how": way, "task": chosen, "pad_to": pad_to, "offset": offset}
    about["wild_types"] = list(table.groups)
    provenance = {**sources[0], **about, **({"ensemble": sources} if len(models) > 1 else {})}
    with ExitStack() as stack:
        rows, picture = open_outputs(job, table, layout, drawing, list(scores), provenance)
        for output in (rows, picture):
            if output is not None:
                stack.enter_context(output)
        for i, (cells, *values) in enumerate(zip(table.assay.rows, *scores.values(), strict=True)):
            if rows is not None:
                rows.write(i, [dict(zip(rows.columns, [*cells, *values], strict=True))])
            if picture is not None:
                picture.write(i, values[-1])
    seconds = perf_counter() - start
    told: dict[str, object] = {}
    if measured is not None:
        told = {"spearman": correlate(job, table, str(assay_column), measured, scores), "assay_column": assay_column}
    if len(models) > 1:
        several = replace(model.checkpoint, name=" + ".join(list(scores)[:-1]), revision=None)
        model = replace(model, checkpoint=several)
    return job.report(model, table.reading, seconds, {"variants": len(table.assay.rows)}, about=told)


def open_outputs(
    job: Job,
    table: Table,
    layout: str | None,
    drawing: str | None,
    columns: Sequence[str],
    provenance: Mapping[str, object],
) -> "tuple[RowsWriter | None, DrawnScan | None]":
    """The table with new columns, unless the output is a picture; and the picture of the last of them, if wanted."""
    from plm.cli.drawing import DrawnScan
    from plm.outputs.rows import open_rows

    rows = picture = None
    if drawing != job.output:
        assert layout is not None
        rows = open_rows(
            job.output,
            layout,
            ids=table.assay.variants,
            columns=[*table.assay.columns, *columns],
            provenance=provenance,
            overwrite=job.overwrite,
        )
    if drawing is not None:
        picture = DrawnScan(drawing, table, provenance, overwrite=job.overwrite)
    return rows, picture


def score_table(
    job: Job, model: "Model", table: Table, how: "How", task: str | None, pad_to: int | None
) -> list[float]:
    """A score for every row of the table, in its order.

    Raises: InputError with every variant that the model or ``how`` does not take, before anything is computed.
    """
    from plm.variant_effects import encode, variant_rows

    def each(wild_type: str, names: list[str]) -> tuple[bytes, list[bytes]]:
        return encode(model, wild_type, names, how=how, offset=table.offset, task=task, pad_to=pad_to)

    encoded = table.each(each)
    scores = [0.0] * len(table.assay.rows)
    with job.bar(len(scores), "variants") as bar:
        for places, (wild_type, rows) in zip(table.groups.values(), encoded, strict=True):
            found = variant_rows(model, wild_type, rows, how=how, task=task, pad_to=pad_to, max_tokens=job.max_tokens)
            for i, score in found:
                scores[places[i]] = score
                bar.update()
    return scores


def correlate(
    job: Job, table: Table, column: str, measured: Sequence[float], scores: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Spearman's correlation of every column of scores with measured values, which is also said on stderr."""
    from plm.ranks import spearman

    known = [i for i, value in enumerate(measured) if isfinite(value)]
    if missing := [line for line, value in zip(table.assay.lines, measured, strict=True) if not isfinite(value)]:
        some = ", ".join(map(str, missing[:LINES_SHOWN])) + (", ..." if len(missing) > LINES_SHOWN else "")
        job.note(f"{len(missing):,} rows without a number in {column!r} are not in the correlation: lines {some}")
    found = {name: spearman([each[i] for i in known], [measured[i] for i in known]) for name, each in scores.items()}
    for name, value in found.items() if not job.quiet else ():
        click.echo(f"Spearman of {name} with {column}: {value:.4f} over {len(known):,} variants", err=True)
    return found
