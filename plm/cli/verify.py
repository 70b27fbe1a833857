"""``plm verify``: does this checkpoint give the published numbers on this machine?"""

import json

import click

from plm.cli import options
from plm.cli.errors import Code
from plm.cli.loading import usable_device, use_threads, while_loading


@click.command()
@click.argument("source")
@options.device
@click.option(
    "--dtype", type=click.Choice(options.COMPUTED), default="float32", show_default=True, help="In what to compute."
)
@options.threads
@options.revision
@options.offline
@options.quiet
@options.as_json
def verify(
    source: str,
    device: str,
    dtype: str,
    threads: int | None,
    revision: str | None,
    offline: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check a model against published numbers.

    SOURCE is a name, hub id, folder or file. Where transformers, fair-esm or protein-bert (and TensorFlow) is
    installed, it is compared with, too.

    The exit code is 5 if a number is out of its tolerance, or if there is none to compare with.
    """
    import plm

    at = usable_device(device)
    use_threads(threads)
    with while_loading(dtype, quiet):
        report = plm.verify(source, device=at, dtype=dtype, revision=revision, offline=offline)
    click.echo(json.dumps(report.as_dict(), indent=1) if as_json else str(report))
    return Code.DONE if report.passed else Code.BAD_MODEL
