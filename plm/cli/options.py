"""Options that several verbs share, in the order in which ``--help`` shows them."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from math import isnan
from typing import Any

import click

from plm.cli.job import Job

Option = Callable[[Callable[..., int]], Callable[..., int]]

NO_MODEL = (
    "choose a model with -m: esm2-650m is the usual one, esm2-8m a small one, plm-mini (which comes with plm) is for "
    "trying things out. `plm models` lists all; a hub id, a folder or a file works as well."
)
NO_FOLDING_MODEL = "choose a model with -m: esmfold. A hub id, a folder or a file works as well."
# Written out, because asking the library would import torch.
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
COMPUTED = (*DTYPES, "float32-bfloat16", "fp32-bf16")
LOADED = (*COMPUTED, "int8")


def _model_given(context: click.Context, option: click.Parameter, value: str | None) -> str:
    if value is None:
        raise click.UsageError(NO_FOLDING_MODEL if context.info_name == "fold" else NO_MODEL, context)
    return value


def _hide_downloads(context: click.Context, option: click.Parameter, quiet: bool) -> bool:
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    return quiet


model = click.option(
    "-m", "--model", callback=_model_given, metavar="NAME", help="Name, hub id, folder or file.  [required]"
)
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, ...")
dtype = click.option(
    "--dtype",
    type=click.Choice(LOADED),
    default="auto",
    show_default=True,
    help=(
        "auto: bfloat16 on CUDA, else float32. float32-bfloat16 (fp32-bf16): the layers' products in bfloat16, all "
        "else float32. int8: linear weights in 8 bits, all else bfloat16."
    ),
)
threads = click.option(
    "--threads", type=click.IntRange(min=1, max=1024), help="Threads on the CPU; else as many as torch takes by itself."
)
revision = click.option("--revision", help="Commit or branch on the hub.")
offline = click.option("--offline", is_flag=True, help="Use only what is on this machine.")
quiet = click.option("-q", "--quiet", is_flag=True, callback=_hide_downloads, help="On stderr only what went wrong.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
pad_to = click.option(
    "--pad-to",
    type=click.IntRange(min=3),
    help="ProteinBERT: tokens of each protein with pads. 512 is the original at seq_len 512; default: no pads.",
)
batch_invariant = click.option(
    "--batch-invariant",
    is_flag=True,
    help="Same bits alone or in any batch: on CUDA at a cost; float32 on a CPU has it.",
)
task = click.option("--task", help="What the model is asked for: nlu, s2s (Ankh3), aa2fold, fold2aa (ProstT5), none.")

_INPUT_AND_OUTPUT: tuple[Option, ...] = (
    click.argument("input"),
    model,
    click.option("-o", "--output", default="-", help="File or folder; - is stdout, the default."),
    click.option("--overwrite", is_flag=True, help="Replace the output, once the new one is complete."),
)
_HOW: tuple[Option, ...] = (
    device,
    dtype,
    click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens per batch: memory, not results."),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), help="Of the samples that generate draws; kept in every output."
    ),
    threads,
    revision,
    offline,
    click.option("--column", help="Column of a CSV or TSV that holds the sequences."),
    click.option("--heavy-column", help="Column that holds the heavy chains of pairs; takes --light-column as well."),
    click.option("--light-column", help="Column that holds their light chains."),
    click.option("--id-column", help="Column that holds their ids."),
    click.option(
        "--id",
        "naming",
        type=click.Choice(("first-word", "header", "accession", "index")),
        default="first-word",
        show_default=True,
        help="What of a header is the id.",
    ),
    click.option(
        "--on-stop",
        type=click.Choice(("error", "X", "skip")),
        default="error",
        show_default=True,
        help="A * inside a sequence.",
    ),
    click.option("--strip-gaps", is_flag=True, help="Remove - and . (aligned FASTA)."),
    click.option(
        "--duplicates",
        type=click.Choice(("suffix", "error", "first")),
        default="suffix",
        show_default=True,
        help="An id that comes again.",
    ),
    click.option("--skip-empty", is_flag=True, help="Leave out records without residues, and pairs without a chain."),
    click.option(
        "--too-long",
        type=click.Choice(("error", "skip")),
        default="error",
        show_default=True,
        help="A sequence that is longer than the model takes.",
    ),
    quiet,
    as_json,
)


class NumberRange(click.FloatRange):
    """A range of numbers, in which click itself lets NaN lie."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if isnan(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


def takes_sequences(*own: Option) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a verb the input, the output and all options of `Job`, as its first argument, and options of its own."""

    def decorate(verb: Callable[..., int]) -> Callable[..., int]:
        def command(**given: Any) -> int:
            names = [field.name for field in dataclasses.fields(Job) if field.name in given]
            job = Job(**{name: given.pop(name) for name in names})
            return verb(job, **given)

        command.__name__, command.__doc__ = verb.__name__, verb.__doc__  # click's name and help of it
        return functools.reduce(lambda done, option: option(done), reversed((*_INPUT_AND_OUTPUT, *own, *_HOW)), command)

    return decorate
