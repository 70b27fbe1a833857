"""``plm contacts``: contact maps as arrays, or drawn."""

import json

import click

from plm.cli.job import Job
from plm.cli.options import takes_sequences

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
    if job.output is None or job.output == "-":
        raise click.UsageError("contact maps need a file: add -o maps.npz, or -o map.png to draw one.")
    layout = layout or job.output.rpartition(".")[2].lower()
    if layout not in FORMATS:
        raise click.UsageError(f"{job.output}: name it .npz, .safetensors or .png, or choose with --format.")
    sequences = job.read()
    if layout == "png" and len(sequences.records) != 1:
        raise click.UsageError(f"a PNG shows one protein, the input has {len(sequences.records):,}: write .npz.")

    from plm.cli.maps import open_maps
    from plm.contact_maps import contact_rows
    from plm_weights.errors import CheckpointError

    open_maps(job.output, layout, sequences.ids, sequences.lengths, "", job.overwrite)  # fails before a model is loaded
    model = job.load()
    sequences = job.encode(model, sequences)
    try:
        results = contact_rows(model, sequences.rows, max_tokens=job.max_tokens)
    except ValueError as error:  # the input is good, the model has no contact head
        raise CheckpointError(str(error)) from None
    provenance = json.dumps(job.provenance(model, sequences))
    writer = open_maps(job.output, layout, sequences.ids, sequences.lengths, provenance, job.overwrite)
    return job.write(model, sequences, writer, results)
