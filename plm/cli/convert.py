"""``plm convert``: a checkpoint in another published form, or the key map that leads there."""

import json
from typing import TYPE_CHECKING

import click

from plm.cli import options
from plm.cli.table import table

if TYPE_CHECKING:
    from plm.conversion import Form

FORMS = ("plm", "transformers", "original")


@click.command()
@click.argument("source")
@click.argument("target", required=False)
@click.option(
    "--to",
    "form",
    type=click.Choice(FORMS),
    default="plm",
    show_default=True,
    help=(
        "original: fair-esm's .pt, pytorch_model.bin, or of ProteinBERT weights.pkl with config.json; ESMFold has none."
    ),
)
@click.option("--dtype", type=click.Choice(options.DTYPES[1:]), help="Store the weights so; else as they are stored.")
@click.option("--explain", is_flag=True, help="Print where each tensor of SOURCE goes, and write nothing.")
@options.revision
@options.offline
@options.quiet
@options.as_json
def convert(
    source: str,
    target: str | None,
    form: "Form",
    dtype: str | None,
    explain: bool,
    revision: str | None,
    offline: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Write a checkpoint in another form.

    The weights of SOURCE (name, hub id, folder or file) go to TARGET, tensor for tensor. TARGET is a folder; for
    `--to original` it may be a .pt file.
    """
    if explain:
        print_key_map(source, revision, offline, as_json)
        return 0
    if target is None:
        raise click.UsageError("TARGET is missing: give a folder (for --to original, a .pt file will do as well).")
    from plm.conversion import convert

    files = convert(source, target, to=form, dtype=dtype, revision=revision, offline=offline)
    if as_json:
        click.echo(json.dumps({"source": source, "to": form, "files": [str(file) for file in files]}))
    if not quiet:
        click.echo(f"{source} -> {', '.join(map(str, files))}", err=True)
    return 0


def print_key_map(source: str, revision: str | None, offline: bool, as_json: bool) -> None:
    """Where each published tensor goes inside this library, and how; only the header of the file is read."""
    from plm.loading import locate, open_checkpoint
    from plm_weights import explain

    path, _ = locate(source, revision=revision, offline=offline)
    lines = explain(open_checkpoint(path).rows)
    if as_json:
        click.echo(json.dumps([{"published": name, "plm": ours, "how": how} for name, ours, how in lines], indent=1))
    else:
        click.echo(table([("PUBLISHED", "PLM", "HOW"), *(line for row in lines for line in _split(row))]))


def _split(row: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """A line for each tensor of a row that reads several (queries, keys and values are one here)."""
    first, *others = row[0].split(", ")
    return [(first, *row[1:]), *((f"+ {name}", "", "") for name in others)]
