"""The command line: one module per verb, which reads its options, calls the verb and writes what came out.

torch is imported by the commands when they run, so that ``--help`` and usage errors come at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence

import click

import plm
from plm.cli.annotate import annotate
from plm.cli.contacts import contacts
from plm.cli.convert import convert
from plm.cli.doctor import doctor
from plm.cli.embed import embed
from plm.cli.errors import Code, code_of, message_of
from plm.cli.fold import fold
from plm.cli.generate import generate
from plm.cli.loading import warnings_as_notes
from plm.cli.models import models
from plm.cli.score import score
from plm.cli.variants import variants
from plm.cli.verify import verify

EPILOG = """\b
Exit codes: 0 all done, 2 usage, 3 some sequences failed (each is listed),
4 bad input or output, 5 model, weights or network, 6 out of memory,
130 interrupted. PLM_DEBUG=1 shows the traceback of an error.
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(plm.__version__)
def cli() -> None:
    """Protein language models: embeddings, scores, new sequences and more from published checkpoints."""


for command in (models, embed, contacts, score, variants, generate, annotate, fold, convert, verify, doctor):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Data goes to stdout or ``--output``, all else to stderr."""
    if threading.current_thread() is threading.main_thread():
        # What a batch system sends before it kills: clean up as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with warnings_as_notes(), cli.make_context("plm", list(sys.argv[1:] if argv is None else argv)) as context:
            return int(cli.invoke(context))
    except click.exceptions.Exit as finished:  # --help and --version
        return finished.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BaseException as error:
        code = code_of(error)
        if code is None or os.environ.get("PLM_DEBUG"):
            raise
        if code is Code.CLOSED_PIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        else:
            click.echo(f"Error: {message_of(error)}", err=True)
        return code
