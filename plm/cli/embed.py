"""``plm embed``: a vector per residue or per protein."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from plm.cli.job import Job
from plm.cli.options import takes_sequences

if TYPE_CHECKING:
    from plm.embedding import Pool
    from plm.outputs import Writer
    from plm.sequences import Reading

# Written out, because asking the library would import torch.
FORMATS = ("safetensors", "npz", "h5", "bio-h5", "parquet", "esm-pt", "csv", "tsv", "jsonl")
STORED = ("float32", "float16", "float64")
POOLS = ("mean", "max", "cls", "card", "none")


@click.command()
@takes_sequences(
    click.option("--pool", type=click.Choice(POOLS), default="none", show_default=True, help="One vector per protein."),
    click.option("--layer", type=int, default=-1, show_default=True, help="0 are the embeddings, -1 the last layer."),
    click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix."),
    click.option("--store", type=click.Choice(STORED), default=STORED[0], show_default=True, help="What is written."),
)
def embed(job: Job, pool: str, layer: int, layout: str | None, store: str) -> int:
    """Turn proteins into vectors.

    One vector per residue, or one per protein with --pool.

    INPUT is a file of FASTA, CSV, TSV or one sequence per line (also .gz, .bz2, .xz), a sequence itself, or "-" for
    stdin.

    \b
      plm embed proteins.fasta.gz -m esm2-650m -o out.h5
      plm embed proteins.fasta -m esm2-650m --pool mean -o out.parquet
      plm embed MKTAYIAKQRQISFVK -m plm-mini --pool mean
    """
    pooling: Pool | None = None if pool == "none" else pool  # type: ignore[assignment]  # click has checked it
    output = job.output or "-"
    if output == "-" and pooling is None:
        raise click.UsageError(
            "a vector per residue needs a file: add -o out.safetensors (or .npz, .h5), or --pool mean."
        )
    if output == "-" and job.as_json:
        raise click.UsageError("with --json the summary goes to stdout: give the embeddings a file with -o.")
    reading = job.read()

    def open_output(reading: "Reading", channels: int, layer: int, provenance: Mapping[str, object]) -> "Writer":
        return open_writer(
            output,
            format=layout or ("csv" if output == "-" else None),
            ids=reading.ids,
            lengths=reading.lengths,
            channels=channels,
            dtype=store,
            pooled=pooling is not None,
            layer=layer,
            provenance=provenance,
            overwrite=job.overwrite,
        )

    from plm.embedding import embed_rows, layer_number
    from plm.outputs import LayoutError, open_writer

    try:
        open_output(reading, 1, 0, {"pooling": pooling})  # what cannot be written fails before a model is loaded
    except LayoutError as error:
        raise click.UsageError(str(error)) from None
    model = job.load()
    try:
        number = layer_number(model, layer)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--layer") from None
    reading, rows = job.encode(model, reading)
    provenance = {**job.provenance(model, reading), "layer": number, "pooling": pooling, "stored": store}
    writer = open_output(reading, model.net.config.channels, number, provenance)
    results = embed_rows(model, rows, layer=number, pool=pooling, max_tokens=job.max_tokens)
    return job.write(model, reading, writer, results)
