"""``plm embed``: a vector per residue or per protein."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from plm.cli import options
from plm.cli.errors import usage
from plm.cli.job import Job, choose_task

if TYPE_CHECKING:
    from torch import Tensor

    from plm.embedding import Layer, Pool
    from plm.loading import Model
    from plm.outputs import Writer
    from plm.sequences import Reading

# Written out, because asking the library would import torch.
FORMATS = ("safetensors", "npz", "h5", "bio-h5", "parquet", "esm-pt", "csv", "tsv", "jsonl")
STORED = ("float32", "float16", "float64")
POOLS = ("mean", "max", "cls", "card", "global", "none")


def _layer(context: click.Context, option: click.Parameter, value: str) -> "Layer":
    if value == "all":
        return "all"
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'all'.", context, option) from None


@click.command()
@options.takes_sequences(
    click.option(
        "--pool",
        type=click.Choice(POOLS),
        default="none",
        show_default=True,
        help=(
            "One vector per protein; card counts what is between two chains as a residue, as IgBert's card does; "
            "global is ProteinBERT's own."
        ),
    ),
    click.option("--per-chain", is_flag=True, help="Write the chains of a pair apart, as ID:heavy and ID:light."),
    click.option(
        "--layer",
        callback=_layer,
        default="-1",
        metavar="NUMBER|all",
        show_default=True,
        help="0 are the embeddings, -1 the last layer; all (ProteinBERT): its norms and outputs side by side.",
    ),
    options.task,
    options.pad_to,
    options.batch_invariant,
    click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix."),
    click.option("--store", type=click.Choice(STORED), default=STORED[0], show_default=True, help="What is written."),
)
def embed(
    job: Job,
    pool: str,
    per_chain: bool,
    layer: "Layer",
    task: str | None,
    pad_to: int | None,
    layout: str | None,
    store: str,
) -> int:
    """Turn proteins into vectors.

    One vector per residue, or one per protein with --pool.

    INPUT is a file of FASTA, CSV, TSV or one sequence per line (also .gz, .bz2, .xz), a sequence itself, or "-" for
    stdin. Antibodies are pairs of chains, HEAVY|LIGHT, or stand in two columns of a table.

    \b
      plm embed proteins.fasta.gz -m esm2-650m -o out.h5
      plm embed proteins.fasta -m ankh3-large --pool mean -o out.parquet
      plm embed pairs.csv --heavy-column vh --light-column vl -m igbert -o out.h5
      plm embed proteins.fasta -m proteinbert --pool global --pad-to 512 -o out.parquet
      plm embed MKTAYIAKQRQISFVK -m plm-mini --pool mean
    """
    pooling: Pool | None = None if pool == "none" else pool  # type: ignore[assignment]  # click has checked it
    if job.output == "-" and pooling is None:
        raise click.UsageError(
            "a vector per residue needs a file: add -o out.safetensors (or .npz, .h5), or --pool mean."
        )
    job.keep_stdout_free("embeddings")
    reading = job.read(task)

    def open_output(reading: "Reading", channels: int, layer: "Layer", provenance: Mapping[str, object]) -> "Writer":
        entries = by_chain(reading) if per_chain else reading
        return open_writer(
            job.output,
            format=layout or ("csv" if job.output == "-" else None),
            ids=entries.ids,
            lengths=entries.lengths,
            channels=channels,
            dtype=store,
            pooled=pooling is not None,
            layer=None if layer == "all" else layer,
            provenance=provenance,
            overwrite=job.overwrite,
        )

    from plm.context import check_padding
    from plm.embedding import channels, check_pool, embed_rows, layer_number, split_chains
    from plm.outputs import LayoutError, open_writer
    from plm.running import need_language_model

    def check(model: "Model") -> None:
        need_language_model(model)
        with usage("--layer"):
            layer_number(model, layer)
        with usage("--pool"):
            check_pool(model, pooling, per_chain)
        with usage("--pad-to"):
            check_padding(model, pad_to)

    try:
        # What cannot be written fails before a model is loaded.
        open_output(reading, 1, "all" if layer == "all" else 0, {"pooling": pooling})
    except LayoutError as error:
        raise click.UsageError(str(error)) from None
    model = job.load(check)
    number = layer_number(model, layer)
    task = choose_task(model, task)
    reading, rows = job.encode(model, reading, task, pad_to=pad_to)
    about = {
        "layer": number,
        "pooling": pooling,
        "per_chain": per_chain,
        "task": task,
        "pad_to": pad_to,
        "stored": store,
    }
    width = channels(model, number, pooling)
    writer = open_output(reading, width, number, {**job.provenance(model, reading), **about})
    results = embed_rows(
        model,
        rows,
        layer=number,
        pool=pooling,
        task=task,
        per_chain=per_chain,
        pad_to=pad_to,
        max_tokens=job.max_tokens,
    )

    def put_chains(index: int, result: "Tensor") -> None:
        chains = split_chains(model, result, rows[index], pooling)
        for i, chain in enumerate(chains):
            writer.write(index * len(chains) + i, chain)  # the reader has made sure that all have as many

    return job.report(model, reading, job.write(reading, writer, results, put_chains if per_chain else writer.write))


def by_chain(reading: "Reading") -> "Reading":
    """Every chain of a pair as a record of its own. Single chains stay what they are."""
    records = [
        replace(record, id=f"{record.id}:{name}", sequence=chain) if len(record.chains) == 2 else record
        for record in reading.records
        for name, chain in zip(("heavy", "light"), record.chains, strict=False)
    ]
    return replace(reading, records=records)
