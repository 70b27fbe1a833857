"""``plm contacts``: contact maps as arrays, or drawn."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from plm.cli.job import Job
from plm.cli.options import takes_sequences

if TYPE_CHECKING:
    from plm.outputs import Writer
    from plm.sequences import Reading

FORMATS = ("npz", "safetensors", "png")


@click.command()
@takes_sequences(
    click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix.")
)
def contacts(job: Job, layout: str | None) -> int:
    """Predict contact maps.

    Which residues of a protein are within 8 Å of each other, as probabilities.

    INPUT is what `plm embed` takes. The output holds an array [L, L] per protein under its id (.npz, .safetensors), or
    is a drawing of the map of one protein (.png).

    \b
      plm contacts proteins.fasta -m esm2-650m -o maps.npz
      plm contacts MKTAYIAKQRQISFVKSHFSRQ -m esm2-8m -o map.png
    """
    if job.output == "-":
        raise click.UsageError("contact maps need a file: add -o maps.npz, or -o map.png to draw one.")
    layout = layout or job.output.rpartition(".")[2].lower()
    if layout not in FORMATS:
        raise click.UsageError(f"{job.output}: name it .npz, .safetensors or .png, or choose with --format.")
    reading = job.read()
    if layout == "png" and len(reading.records) != 1:
        raise click.UsageError(f"a PNG shows one protein, the input has {len(reading.records):,}: write .npz.")

    from plm.cli.drawing import DrawnMap
    from plm.contact_maps import contact_rows, predicting_contacts
    from plm.outputs.maps import LAYOUTS, open_maps

    def open_output(reading: "Reading", provenance: Mapping[str, object]) -> "Writer":
        return open_maps(
            job.output,
            LAYOUTS.get(layout, DrawnMap),
            ids=reading.ids,
            lengths=reading.lengths,
            provenance=json.dumps(provenance),
            overwrite=job.overwrite,
        )

    open_output(reading, {})  # what cannot be written fails before a model is loaded
    model = job.load(predicting_contacts)
    reading, rows = job.encode(model, reading)
    results = contact_rows(model, rows, max_tokens=job.max_tokens)
    writer = open_output(reading, job.provenance(model, reading))
    return job.report(model, reading, job.write(reading, writer, results, writer.write))
