"""``plm annotate``: which annotations a model expects of each protein."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from plm.cli import options
from plm.cli.job import Job

if TYPE_CHECKING:
    from torch import Tensor

    from plm.outputs import Writer
    from plm.outputs.rows import RowsWriter
    from plm.sequences import Reading
    from plm.terms import Terms

LISTS = ("csv", "tsv", "jsonl")
VECTORS = ("safetensors", "npz", "h5", "bio-h5", "parquet")
TOP = 10


@click.command()
@options.takes_sequences(
    click.option(
        "--terms", "table", metavar="TABLE", help="What each output stands for: index, GO id, name (TSV, CSV)."
    ),
    click.option("--partial-terms", is_flag=True, help="The table has no term for some of the outputs."),
    click.option("--top", type=click.IntRange(min=1), metavar="N", help=f"List the N most probable.  [default: {TOP}]"),
    click.option(
        "--min-probability", "least", type=options.NumberRange(0, 1), metavar="P", help="List all from this one on."
    ),
    click.option("--all", "everything", is_flag=True, help="List all."),
    options.pad_to,
    click.option(
        "--format", "layout", type=click.Choice(LISTS + VECTORS), help="Layout of the output, whatever its suffix."
    ),
)
def annotate(
    job: Job,
    table: str | None,
    partial_terms: bool,
    top: int | None,
    least: float | None,
    everything: bool,
    pad_to: int | None,
    layout: str | None,
) -> int:
    """Predict Gene Ontology annotations.

    ProteinBERT's probability of each annotation, by the index of its output. Which term an index of the published model
    stands for is not public: without a table of your own (--terms) there are no names.

    INPUT is what `plm embed` takes. The output lists the most probable of each protein (.csv, .tsv, .jsonl), or holds
    all probabilities in one vector per protein (.safetensors, .npz, .h5, .parquet).

    \b
      plm annotate proteins.fasta -m proteinbert -o annotations.csv
      plm annotate proteins.fasta -m proteinbert --terms go.tsv --min-probability 0.5 -o annotations.csv
      plm annotate proteins.fasta -m proteinbert --pad-to 512 -o probabilities.h5
    """
    chosen = {"--top": top, "--min-probability": least, "--all": everything or None}
    given = [option for option, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} choose what is listed: give one of them.")
    if partial_terms and table is None:
        raise click.UsageError("--partial-terms is of a table: give it with --terms.")
    job.keep_stdout_free("annotations")
    job.keep_input(terms=table)

    from plm.terms import read_terms

    terms = None if table is None else read_terms(table)
    reading = job.read()

    from plm.outputs import LAYOUTS as OF_VECTORS
    from plm.outputs import LayoutError, open_writer
    from plm.outputs.rows import LAYOUTS, layout_of, open_rows

    suffixes = [suffix for name in LISTS for suffix in LAYOUTS[name].suffixes]
    if layout is None and (job.output == "-" or job.output.lower().endswith(tuple(suffixes))):
        layout = layout_of(job.output, LISTS)
    elif layout is None:
        suffixes += [suffix for name in VECTORS if name in OF_VECTORS for suffix in OF_VECTORS[name].suffixes]
        if not job.output.lower().endswith(tuple(suffixes)):
            known = ", ".join(suffixes)
            raise click.UsageError(f"{job.output} is not named like a layout of annotations; use {known}, or --format.")
    listed = layout in LISTS
    if not listed and (odd := [*given, *(["--terms"] if table else [])]):
        raise click.UsageError(f"{', '.join(odd)} is of a list, and {job.output} holds whole vectors: write .csv.")

    def open_list(reading: "Reading", provenance: Mapping[str, object]) -> "RowsWriter":
        columns = ("id", "index", "probability") if terms is None else ("id", "index", "term", "name", "probability")
        return open_rows(
            job.output,
            str(layout),
            ids=reading.ids,
            columns=columns,
            provenance=provenance,
            overwrite=job.overwrite,
        )

    def open_vectors(reading: "Reading", channels: int, provenance: Mapping[str, object]) -> "Writer":
        return open_writer(
            job.output,
            format=layout,
            ids=reading.ids,
            lengths=reading.lengths,
            channels=channels,
            pooled=True,
            layer=None,
            provenance=provenance,
            overwrite=job.overwrite,
        )

    try:  # what cannot be written fails before a model is loaded
        open_list(reading, {}) if listed else open_vectors(reading, 1, {})
    except LayoutError as error:
        raise click.UsageError(str(error)) from None

    from plm.annotation import annotate_rows, annotating, ranked

    model = job.load(annotating)
    count = annotating(model).config.annotations
    if terms is not None:
        terms.check(count, partial=partial_terms)
    reading, rows = job.encode(model, reading, pad_to=pad_to)
    provenance = {**job.provenance(model, reading), "pad_to": pad_to}
    results = annotate_rows(model, rows, pad_to=pad_to, max_tokens=job.max_tokens)
    if not listed:
        vectors = open_vectors(reading, count, {**provenance, "annotations": count})
        return job.report(model, reading, job.write(reading, vectors, results, vectors.write))
    if not given:
        top = TOP
    told = "all" if everything else f"top {top}" if top else f"probability of at least {least:g}"
    about = {"listed": told, "terms": table, "terms_sha256": terms and terms.sha256, "partial_terms": partial_terms}
    output = open_list(reading, {**provenance, **about})
    without = []

    def put(index: int, found: "Tensor") -> None:
        order = ranked(found, top=top, least=least or 0.0)
        texts = found[order].numpy().astype(str)  # the shortest decimals of float32
        output.write(index, [row_of(reading.ids[index], i, float(p), terms) for i, p in zip(order, texts, strict=True)])
        if not order:
            without.append(index)

    seconds = job.write(reading, output, results, put)
    if without:
        job.note(f"{len(without):,} of {len(reading.ids):,} proteins have no annotation with a {told}, and no row")
    return job.report(model, reading, seconds)


def row_of(id: str, index: int, probability: float, terms: "Terms | None") -> dict[str, object]:
    """One line of a list."""
    row: dict[str, object] = {"id": id, "index": index, "probability": probability}
    if terms is not None:
        term = terms.get(index)
        row |= {"term": term and term.id, "name": term and term.name}
    return row
