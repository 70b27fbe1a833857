"""``plm models``: what can be loaded by name."""

import json
from typing import TYPE_CHECKING

import click

from plm.cli import options
from plm.cli.table import table

if TYPE_CHECKING:
    from plm_weights.registry import Checkpoint

HEAD = ("NAME", "FAMILY", "PARAMETERS", "LICENCE", "HERE", "NOTE")
WIDTH = 120


@click.command()
@options.as_json
def models(as_json: bool) -> int:
    """List the models that are known by name.

    A hub id (organisation/name), a folder or a file works as a model, too. --json tells sources and citations.
    """
    from plm.loading import available

    rows = [describe(row) for row in available()]
    click.echo(json.dumps(rows, indent=1) if as_json else table([HEAD, *map(line, rows)], WIDTH))
    return 0


def describe(row: "Checkpoint") -> dict[str, object]:
    """What people want to know of a checkpoint before they load it."""
    from plm_weights.fetch import is_here

    return {
        "name": row.name,
        "aliases": row.aliases,
        "family": row.family,
        "parameters": row.parameters,
        "licence": row.licence,
        "citation": row.citation,
        "source": (row.archive or row.originals[0].url if row.preferred == "original" else row.hub) or "comes with plm",
        "revision": row.revision,
        "note": row.note,
        "pairs": row.pairs,
        "here": is_here(row),
    }


def line(row: dict[str, object]) -> tuple[str, ...]:
    parameters = row["parameters"]
    count = f"{parameters / 1e6:,.1f} M" if isinstance(parameters, int) else "-"
    here = "yes" if row["here"] else "no"
    return str(row["name"]), str(row["family"]), count, str(row["licence"]), here, str(row["note"])
