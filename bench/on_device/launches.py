"""Which Triton kernels run, how often, and what the compiler made of them."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

Launches = dict[str, dict[str, int]]
"""From ``module.function`` to ``launches`` and, on a GPU, the most ``registers``, ``spills`` and ``shared`` bytes."""


@contextmanager
def watched() -> Iterator[Launches]:
    """Count the launches of this library's kernels, compiled or interpreted, inside the scope."""
    found: Launches = {}
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield found
        return
    classes = (JITFunction, InterpretedFunction)
    originals = [cls.run for cls in classes]

    def counted(original: Any) -> Any:
        def run(self: Any, *args: Any, **options: Any) -> Any:
            result = original(self, *args, **options)
            note(found, self.fn, result)
            return result

        return run

    for cls, original in zip(classes, originals, strict=True):
        cls.run = counted(original)
    try:
        yield found
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.run = original


def note(found: Launches, function: Any, kernel: Any) -> None:
    if not function.__module__.startswith("plm_kernels."):
        return
    entry = found.setdefault(f"{function.__module__.rpartition('.')[2]}.{function.__name__}", {"launches": 0})
    entry["launches"] += 1
    with suppress(AttributeError):  # an interpreted kernel has none of these
        for name, value in (
            ("registers", kernel.n_regs),
            ("spills", kernel.n_spills),
            ("shared", kernel.metadata.shared),
        ):
            entry[name] = max(entry.get(name, 0), value or 0)
