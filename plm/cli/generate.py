"""``plm generate``: sequences that a model writes."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from plm.cli import options
from plm.cli.errors import usage
from plm.cli.job import Job, choose_task

if TYPE_CHECKING:
    from plm.generation import Sample
    from plm.outputs.rows import RowsWriter
    from plm.sequences import Reading

FORMATS = ("fasta", "csv", "tsv", "jsonl")
COLUMNS = ("id", "prompt", "sample", "sequence", "ll_sum", "ll_mean", "stopped_by", "filled")
EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}
AT_LEAST_1 = click.IntRange(min=1)


def places(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[int, str]:
    """``45:C`` as a position and a residue. Raises: click.BadParameter."""
    found = {}
    for text in given:
        position, _, residue = text.partition(":")
        if not position.isdecimal() or not residue:
            raise click.BadParameter(f"{text!r} is not POSITION:RESIDUE, as 45:C")
        if int(position) in found:
            raise click.BadParameter(f"position {position} is given twice")
        found[int(position)] = residue.upper()
    return found


@click.command()
@options.takes_sequences(
    click.option("--num-samples", type=AT_LEAST_1, default=1, show_default=True, help="Sequences for each prompt."),
    click.option("--length", type=AT_LEAST_1, help="Residues of a completed sequence, its prompt included."),
    click.option(
        "--max-length",
        type=AT_LEAST_1,
        help="Tokens at most, the start token counted; ProGen2 counts the prompt with its terminal.",
    ),
    click.option("--min-length", type=AT_LEAST_1, help="Tokens before which none ends, counted alike."),
    click.option(
        "--temperature",
        "--t",
        type=click.FloatRange(min=0),
        default=1.0,
        show_default=True,
        help="Above 1 more random, below 1 less; 0 takes the most probable token.",
    ),
    click.option("--top-k", type=AT_LEAST_1, help="Draw among so many tokens, the most probable."),
    click.option(
        "--top-p",
        "--p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Draw among the most probable tokens that together are so probable.",
    ),
    click.option(
        "--num-beams", type=AT_LEAST_1, default=1, show_default=True, help="Beam search; takes --temperature 0."
    ),
    click.option(
        "--length-penalty", type=float, default=1.0, show_default=True, help="Beam search: above 1 favours long texts."
    ),
    click.option(
        "--early-stopping",
        type=click.Choice(list(EARLY_STOPPING)),
        default="no",
        show_default=True,
        help="Beam search: yes stops once as many texts as beams have ended, never when none can become better.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Above 1 disfavours tokens that are in the text.",
    ),
    click.option("--no-repeat", type=AT_LEAST_1, help="No run of so many tokens comes twice in a text."),
    click.option(
        "--force",
        "forced",
        multiple=True,
        metavar="POSITION:RESIDUE",
        callback=places,
        help="Write it there, as 45:C (ProGen2). Positions count from 1, in the order of writing. May be repeated.",
    ),
    click.option("--ban", "banned", multiple=True, metavar="TOKEN", help="Never write it, as X. May be repeated."),
    click.option("--residues-only", is_flag=True, help="Write nothing but residues."),
    click.option(
        "--likelihood/--no-likelihood",
        default=True,
        show_default=True,
        help="Score what ProGen2 wrote, from both ends; else ll_sum and ll_mean are of the tokens that were written.",
    ),
    options.task,
    click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix."),
)
def generate(job: Job, task: str | None, layout: str | None, **settings: Any) -> int:
    """Write sequences that follow from others.

    ProGen2 goes on from the prompt: residues, or 1 and residues, from N to C; 2 and residues, from C to N; 1 or 2 alone
    from nothing. A model with a decoder goes on where a sequence stops, says what stands in its gaps (M_AYL, or
    M<extra_id_0>AYL), or translates between amino acids and 3Di states (ProstT5, --task aa2fold or fold2aa).

    INPUT is what `plm embed` takes. The output is FASTA (.fasta), or a table with log-likelihoods (.csv, .tsv, .jsonl);
    of ProGen2 they are of the whole protein, averaged over reading it from both ends.
    The same --seed gives the same samples; the one that was used is in the summary.

    \b
      plm generate 1 -m progen2-medium --num-samples 10 --t 0.8 --p 0.9 --max-length 300 --seed 1 -o new.fasta
      plm generate starts.fasta -m ankh3-large --length 200 --num-samples 10 --seed 1 -o new.fasta
      plm generate M_AYIAKQ_QISF -m ankh3-large --temperature 0
      plm generate proteins.fasta -m prostt5 --task aa2fold --temperature 0 --num-beams 3 -o states.fasta
    """
    settings["early_stopping"] = EARLY_STOPPING[settings["early_stopping"]]
    job.keep_stdout_free("sequences")
    if job.seed is None and settings["temperature"] > 0:
        job = replace(job, seed=secrets.randbelow(2**32))
    reading = job.read(task, prompts=True)

    from plm.generation import written
    from plm.memory import gigabytes
    from plm.outputs.rows import layout_of, open_rows
    from plm.prompts import plan, writer
    from plm.writing import Job as Work
    from plm.writing import Settings

    with usage():
        layout = layout or layout_of(job.output, FORMATS)
        how = Settings(**settings, seed=job.seed, max_tokens=job.max_tokens)

    def open_output(reading: "Reading", provenance: Mapping[str, object]) -> "RowsWriter":
        return open_rows(
            job.output, layout, ids=reading.ids, columns=COLUMNS, provenance=provenance, overwrite=job.overwrite
        )

    open_output(reading, {})  # what cannot be written fails before a model is loaded
    model = job.load(writer)
    if task is not None:
        choose_task(model, task)
    with usage():
        reading, prompts = job.prepare(model, reading, task, lambda sequences: plan(model, sequences, task))
        work = Work.of(model, prompts, how)  # bounds that contradict a prompt are found before anything is written
    if prompts:
        room, size = work.room()
        job.note(
            f"keys and values of up to {room.texts:,} {'text' if room.texts == 1 else 'texts'} of {room.text_tokens:,} "
            f"tokens and {room.prompts:,} {'prompt' if room.prompts == 1 else 'prompts'} take {gigabytes(size)}"
        )
    if any(prompt.reverse for prompt in prompts):
        job.note(
            "prompts that begin with 2 are written from C to N; the sequences here read from N to C, as all others"
        )
    output = open_output(reading, {**job.provenance(model, reading), "task": task, **settings})

    counts = {"prompts": len(prompts), "samples": 0, "tokens": 0}

    def put(index: int, samples: list["Sample"]) -> None:
        output.write(index, [row(reading.ids[index], i, sample) for i, sample in enumerate(samples, 1)])
        counts["samples"] += len(samples)
        counts["tokens"] += sum(len(sample.log_probs) for sample in samples)

    return job.report(
        model, reading, job.write(reading, output, written(model, prompts, how), put), counts, seed=job.seed
    )


def row(prompt: str, number: int, sample: "Sample") -> dict[str, object]:
    """What the output says of a sample. The likelihood of a protein without residues has no mean."""
    return {
        "id": f"{prompt}_{number}",
        "prompt": prompt,
        "sample": number,
        "sequence": sample.protein,
        "ll_sum": sample.ll_sum,
        "ll_mean": sample.ll_mean if sample.score is None or sample.sequence else None,
        "stopped_by": sample.stopped_by,
        "filled": sample.filled,
    }
