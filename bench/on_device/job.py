"""What a phase is told, and how it tells what it found: a line of JSON for each fact, as soon as it is known.

A fact has a ``kind`` (what table it belongs to), a ``name``, and ``ok`` if it is a check: True, False, or None where it
could not be made. A phase that dies leaves every line it has written.
"""

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Fact = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One phase: on which device, at which sizes, until when (seconds since the epoch), and where its lines go.

    Compiling kernels is work for the CPU, so on a GPU some phases are ``parts`` processes; this is number ``part``.
    """

    phase: str
    device: str
    quick: bool
    until: float
    lines: Path
    part: int = 0
    parts: int = 1
    workloads: Sequence[str] = ()  # of the suite, by words of their names; none: what fits into nine minutes

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def left(self) -> float:
        """Seconds that remain."""
        return self.until - time.time()

    def mine(self, things: Sequence[T]) -> Sequence[T]:
        """Those of some things to do that are for this part."""
        return things[self.part :: self.parts]

    def tell(self, kind: str, name: str, **found: Any) -> None:
        """Write a fact down."""
        with self.lines.open("a") as file:
            file.write(
                json.dumps({"phase": self.phase, "at": time.time(), "kind": kind, "name": name, **plain(found)}) + "\n"
            )

    def attempt(self, kind: str, name: str, work: Callable[[], T]) -> T | None:
        """What ``work`` gives. If it fails that is a fact, and the phase goes on."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.tell(kind, name, ok=False, error=describe(error))
            forget(error)
            return None


def describe(error: BaseException) -> str:
    """An error in a line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


def forget(error: BaseException) -> None:
    """Let go of the tensors that an error's traceback holds, and of what the device's allocator keeps of them."""
    error.__traceback__ = None
    with suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def plain(x: Any) -> Any:
    """The same in what JSON has: no NaN, five significant digits."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else str(x)
    return x if x is None or isinstance(x, bool | int | str) else str(x)


def read_facts(path: Path) -> list[Fact]:
    """The lines that are whole."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
