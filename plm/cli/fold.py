"""``plm fold``: structures, a file for each protein."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from plm.cli import options
from plm.cli.errors import usage
from plm.cli.job import Job

if TYPE_CHECKING:
    from plm.folding import Chunk

# Written out, because asking the library would import torch.
FORMATS = ("pdb", "cif")
NUMBERINGS = ("chain", "index")
LINKER, RESIDUE_GAP = "G" * 25, 512


def rows_at_a_time(context: click.Context, option: click.Parameter, value: str) -> "Chunk":
    """A number of rows, or "auto"."""
    if value == "auto":
        return value  # type: ignore[return-value]  # as a literal, which click does not know
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is no number of rows: give 1 or more, or auto.", context, option)
    return int(value)


@click.command()
@options.takes_sequences(
    click.option(
        "--format", "layout", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True, help="Of structures."
    ),
    click.option("--plot", is_flag=True, help="Draw pLDDT and PAE of each, and a page of all, report.html."),
    click.option(
        "--recycles", type=click.IntRange(min=0), help="Further passes.  [default: the model's, 3 of esmfold]"
    ),
    click.option(
        "--chunk",
        metavar="ROWS",
        callback=rows_at_a_time,
        default="auto",
        show_default=True,
        help="Rows of pairs at a time: memory and speed, results by rounding alone.",
    ),
    click.option("--linker", default=LINKER, show_default=True, help="Residues between chains; may be empty."),
    click.option(
        "--residue-gap",
        type=click.IntRange(0, 1_000_000),
        default=RESIDUE_GAP,
        show_default=True,
        help="How far apart the model is told that chains are.",
    ),
    click.option(
        "--numbering",
        type=click.Choice(NUMBERINGS),
        default=NUMBERINGS[0],
        show_default=True,
        help="Residues of each chain from 1; index: as the model was told, as its authors write.",
    ),
    click.option(
        "--hide",
        type=options.NumberRange(0, 1, min_open=True),
        metavar="SHARE",
        help="Hide residues from the language model, drawn with --seed: another structure for each seed.",
    ),
)
def fold(job: Job, layout: str, plot: bool, chunk: "Chunk", hide: float | None, **settings: Any) -> int:
    """Predict structures.

    INPUT is what `plm embed` takes, in capitals. Chains that fold together are written A:B; heavy and light chains in
    two columns of a table do so as well.

    The folder gets a file per protein, named after its id, with pLDDT (0 to 100) as B-factors, and the index fold.csv.
    With --json each protein has its pLDDT, PAE and pTM beside it as .json; --plot writes these, too, and draws them as
    .png. What is there already, made from the same sequence, weights and settings, is not made again: after a break,
    the same command goes on. --overwrite replaces what was made otherwise.

    \b
      plm fold proteins.fasta -m esmfold -o out/
      plm fold MKTAYIAKQRQISFVK:GSHMLEDP -m esmfold -o out/ --format cif --json
      plm fold proteins.fasta -m esmfold -o out/ --plot --recycles 8
    """
    if job.output in ("", "-"):
        raise click.UsageError("structures need a folder: add -o out/.")
    if hide is not None and job.seed is None:
        raise click.UsageError("--hide draws residues: add --seed, with which the same ones are drawn again.")
    reading = job.read(complexes=True)

    from plm.cli.folding import How, Run, check_report, with_unknown_letters
    from plm.folding import folding_network, number_of_passes, read_proteins
    from plm.outputs.proteins import ProteinFolder
    from plm.outputs.writer import require

    with usage("--linker"):
        read_proteins([], linker=settings["linker"], residue_gap=settings["residue_gap"])
    folder = ProteinFolder(job.output, reading.ids, overwrite=job.overwrite)  # fails before a model is loaded
    if plot:
        require("matplotlib", "plot")
        check_report(folder)
    model = job.load(folding_network)
    passes = number_of_passes(folding_network(model), settings.pop("recycles"))
    how = How(layout, plot, job.as_json or plot, chunk, passes - 1, hide, job.seed, job.max_tokens, **settings)
    reading, proteins = job.prepare(model, reading, None, how.read)
    reading = with_unknown_letters(job, reading)
    run = Run(job, model, reading, proteins, how, folder)
    run.check()
    seconds = run.fold() if proteins else 0.0
    counts = {"proteins": len(run.folded), "residues": sum(reading.lengths[i] for i in run.folded)}
    about = {"skipped": len(proteins) - len(run.left), "results": run.results(), "report": run.report()}
    return job.report(model, replace(reading, failed=[*reading.failed, *run.failed]), seconds, counts, about=about)
