"""``plm generate``: sequences that a model writes."""

import secrets
from collections.abc import Iterator, Mapping
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


@click.command()
@options.takes_sequences(
    click.option("--num-samples", type=AT_LEAST_1, default=1, show_default=True, help="Sequences for each prompt."),
    click.option("--length", type=AT_LEAST_1, help="Residues of a completed sequence, its prompt included."),
    click.option("--max-length", type=AT_LEAST_1, help="Tokens that are written at most, the start token counted."),
    click.option("--min-length", type=AT_LEAST_1, help="Tokens before which none ends, the start token counted."),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=1.0,
        show_default=True,
        help="Above 1 more random, below 1 less; 0 takes the most probable token.",
    ),
    click.option("--top-k", type=AT_LEAST_1, help="Draw among so many tokens, the most probable."),
    click.option(
        "--top-p",
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
    click.option("--ban", "banned", multiple=True, metavar="TOKEN", help="Never write it, as X. May be repeated."),
    click.option("--residues-only", is_flag=True, help="Write nothing but residues."),
    options.task,
    click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout of the output, whatever its suffix."),
)
def generate(job: Job, task: str | None, layout: str | None, **settings: Any) -> int:
    """Write sequences that follow from others.

    A model with a decoder goes on where a sequence stops, says what stands in its gaps (M_AYL, or
    M<extra_id_0>AYL), or translates between amino acids and 3Di states (ProstT5, --task aa2fold or fold2aa).

    INPUT is what `plm embed` takes. The output is FASTA (.fasta), or a table with log-likelihoods (.csv, .tsv, .jsonl).
    The same --seed gives the same samples; the one that was used is in the summary.

    \b
      plm generate starts.fasta -m ankh3-large --length 200 --num-samples 10 --seed 1 -o new.fasta
      plm generate M_AYIAKQ_QISF -m ankh3-large --temperature 0
      plm generate proteins.fasta -m prostt5 --task aa2fold --temperature 0 --num-beams 3 -o states.fasta
    """
    settings["early_stopping"] = EARLY_STOPPING[settings["early_stopping"]]
    job.keep_stdout_free("sequences")
    if job.seed is None and settings["temperature"] > 0:
        job = replace(job, seed=secrets.randbelow(2**32))
    reading = job.read(task, prompts=True)

    from plm.generation import chooser, plan, stream
    from plm.outputs.rows import layout_of, open_rows

    with usage():
        layout = layout or layout_of(job.output, FORMATS)
        how = chooser(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            num_samples=settings["num_samples"],
            num_beams=settings["num_beams"],
            length_penalty=settings["length_penalty"],
            early_stopping=settings["early_stopping"],
        )

    def open_output(reading: "Reading", provenance: Mapping[str, object]) -> "RowsWriter":
        return open_rows(
            job.output, layout, ids=reading.ids, columns=COLUMNS, provenance=provenance, overwrite=job.overwrite
        )

    open_output(reading, {})  # what cannot be written fails before a model is loaded
    model = job.load()
    if task is not None:
        choose_task(model, task)
    with usage():
        reading, prompts = job.prepare(model, reading, task, lambda sequences: plan(model, sequences, task))
    writer = open_output(reading, {**job.provenance(model, reading), "task": task, **settings})

    def results() -> Iterator[tuple[int, list["Sample"]]]:
        with usage():  # bounds that contradict a prompt, which are found before anything is written
            yield from stream(
                model,
                prompts,
                num_samples=settings["num_samples"],
                bounds=(settings["min_length"], settings["max_length"], settings["length"]),
                chooser=how,
                beams=(settings["num_beams"], settings["length_penalty"], settings["early_stopping"]),
                repetition_penalty=settings["repetition_penalty"],
                banned=settings["banned"],
                residues_only=settings["residues_only"],
                seed=job.seed,
                max_tokens=job.max_tokens,
            )

    counts = {"prompts": len(prompts), "samples": 0, "tokens": 0}

    def put(index: int, samples: list["Sample"]) -> None:
        writer.write(index, [row(reading.ids[index], i, sample) for i, sample in enumerate(samples, 1)])
        counts["samples"] += len(samples)
        counts["tokens"] += sum(len(sample.log_probs) for sample in samples)

    return job.report(model, reading, job.write(reading, writer, results(), put), counts, seed=job.seed)


def row(prompt: str, number: int, sample: "Sample") -> dict[str, object]:
    """What the output says of a sample."""
    return {
        "id": f"{prompt}_{number}",
        "prompt": prompt,
        "sample": number,
        "sequence": sample.sequence,
        "ll_sum": sample.ll_sum,
        "ll_mean": sample.ll_mean,
        "stopped_by": sample.stopped_by,
        "filled": sample.filled,
    }
