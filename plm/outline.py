"""Networks without numbers: shapes and names, to be filled from a file or only looked at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Unfilled(TorchFunctionMode):
    """Leave what ``torch.nn.init`` is asked to fill as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


@contextmanager
def outlines() -> Iterator[None]:
    """A scope in which networks are made on the device ``meta``, and nothing is drawn for their weights.

    Drawing random numbers on ``meta`` gives none, but torch imports its compiler for it, which takes longer than
    loading a small model.
    """
    with torch.device("meta"), _Unfilled():
        yield
