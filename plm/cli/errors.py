"""Exit codes, and which error ends in which."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click


class Code(IntEnum):
    """What a shell script learns from ``plm``."""

    DONE = 0
    USAGE = 2  # click's own
    SOME_FAILED = 3
    BAD_INPUT = 4  # or an output that cannot be written
    BAD_MODEL = 5  # or weights, or network
    OUT_OF_MEMORY = 6
    INTERRUPTED = 130  # 128 + SIGINT
    CLOSED_PIPE = 141  # 128 + SIGPIPE


def code_of(error: BaseException) -> Code | None:
    """The exit code for an error that users can meet; None for a bug, whose traceback is wanted."""
    from plm.sequences import InputError

    if isinstance(error, KeyboardInterrupt):
        return Code.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return Code.CLOSED_PIPE
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _tells_of_memory(error)):
        return Code.OUT_OF_MEMORY
    if isinstance(error, InputError | OSError):
        return Code.BAD_INPUT
    if isinstance(error, FloatingPointError):
        return Code.BAD_MODEL
    if isinstance(error, ValueError):
        from plm_weights.errors import CheckpointError  # late, for it imports torch

        return Code.BAD_MODEL if isinstance(error, CheckpointError) else Code.BAD_INPUT
    return None


@contextmanager
def usage(option: str | None = None) -> Iterator[None]:
    """Turn what the library says of a setting into a usage error, which names the option.

    What it says of sequences and of checkpoints stays what it is.
    """
    from plm.sequences import InputError

    try:
        yield
    except ValueError as error:
        if isinstance(error, InputError) or code_of(error) is not Code.BAD_INPUT:
            raise
        raise (click.BadParameter(str(error), param_hint=option) if option else click.UsageError(str(error))) from None


def message_of(error: BaseException) -> str:
    """One or a few lines for people."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if code_of(error) == Code.OUT_OF_MEMORY:
        return f"out of memory: {str(error).splitlines()[0]}\nWhat to do: a smaller --max-tokens, --dtype or model"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _tells_of_memory(error: RuntimeError) -> bool:
    from plm.running import out_of_memory  # late, for it imports torch

    return out_of_memory(error)
