"""Loading a model: what was chosen on the command line, and what the library says about it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TextIO

import click

from plm.cli.errors import usage

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> "torch.device":
    """The device of a name. Raises: click.BadParameter if this machine does not have it."""
    from plm.placement import choose_device

    with usage("--device"):
        return choose_device(name)


def use_threads(count: int | None) -> None:
    """Let torch have so many from now to the end of the command, however that ends."""
    from plm.processor import threads

    click.get_current_context().with_resource(threads(count))


@contextmanager
def while_loading(dtype: str, quiet: bool) -> Iterator[None]:
    """Print what the library says of licence and vocabulary as a note, unless all is to be ``quiet``.

    Raises: click.BadParameter for a dtype that some models do not take.
    """
    from plm.loading import Notice

    refused = usage("--dtype") if dtype in ("float16", "float32-bfloat16", "fp32-bf16", "int8") else nullcontext()
    with warnings.catch_warnings(record=True) as caught, refused:
        warnings.simplefilter("always", Notice)
        yield
    for warning in caught:
        if not issubclass(warning.category, Notice):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not quiet:
            note(str(warning.message))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """A scope in which what the library warns of is a note, or nothing in a ``--quiet`` command."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category.__module__.partition(".")[0] not in ("plm", "plm_kernels"):
                others(message, category, filename, lineno, file, line)
            elif not ((context := click.get_current_context(silent=True)) and context.params.get("quiet")):
                note(str(message))

        warnings.showwarning = show
        yield


def note(text: str) -> None:
    """Tell people what they should know about what was done."""
    click.echo(f"Note: {text}", err=True)
