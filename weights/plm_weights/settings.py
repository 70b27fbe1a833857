"""Reading settings out of a ``config.json`` that somebody else wrote: every value is checked for its type.

A key that is absent or null has its default, because ``save_pretrained`` may leave keys out that have theirs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from plm_weights.errors import CheckpointError

T = TypeVar("T", int, bool, float, str)


def read_object(path: Path) -> dict[str, object]:
    """The one JSON object of a file. Raises: CheckpointError naming the file."""
    try:
        settings = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold one JSON object; it holds a {type(settings).__name__}")
    return settings


def read_value(given: Mapping[Any, object], key: str, kind: type[T], default: T | None = None) -> T:
    """A value of one type. Raises: CheckpointError if it is of another, or missing without a default."""
    value = given.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"the configuration has no {key}")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise CheckpointError(f"{key} is {_shown(value)} in the configuration, wanted {kind.__name__}")
    return value


def read_size(given: Mapping[Any, object], key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number of at least ``least``. Raises: CheckpointError."""
    value = read_value(given, key, int, default)
    if value < least:
        raise CheckpointError(f"{key} is {value} in the configuration, wanted {least} or more")
    return value


def require(given: Mapping[Any, object], key: str, *allowed: object) -> None:
    """Refuse a checkpoint whose setting is none of ``allowed``. Raises: CheckpointError."""
    if given.get(key) not in allowed:
        wanted = " or ".join(repr(value) for value in allowed if value is not None)
        raise CheckpointError(f"{key} is {_shown(given.get(key))} in the configuration; only {wanted} is supported")


def _shown(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
