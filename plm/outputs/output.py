"""One output in the making, and the books over what has been written to it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from plm.outputs.target import Target, explained


class Output(ABC):
    """Writes one output, whole or not at all. Use as a context manager, opened *before* the results are computed.

    Sequences may be written in any order, each exactly once. The target appears when the ``with`` block ends without an
    error; after any exception (Ctrl-C among them) no trace is left and an existing target is as it was.
    """

    def __init__(self, target: Target, ids: Sequence[str]) -> None:
        self.target, self.ids = target, ids
        self._written = np.zeros(len(ids), dtype=bool)

    def _check_free(self, index: int) -> None:
        """Raises: ValueError if there is no sequence `index`, or if it was written before."""
        if not 0 <= index < len(self.ids) or self._written[index]:
            state = "was written before" if 0 <= index < len(self.ids) else f"is not in 0..{len(self.ids) - 1}"
            raise ValueError(f"sequence {index} {state}")

    def __enter__(self) -> Self:
        try:
            with explained(self.target):
                self._begin()
        except BaseException:
            self.target.discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if error is None:
                self._check_complete()
                with explained(self.target):
                    self._finish()
                    finished = True
                    self.target.commit()
        finally:
            try:
                if not finished:
                    self._abandon()
            finally:
                self.target.discard()

    def _check_complete(self) -> None:
        missing = np.flatnonzero(~self._written)
        if len(missing):
            names = ", ".join(repr(self.ids[index]) for index in missing[:5])
            raise ValueError(f"{len(missing)} of {len(self._written)} sequences were not written, among them {names}")

    @abstractmethod
    def _begin(self) -> None:
        """Open the temporary target and write what is known already."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is left and close."""

    @abstractmethod
    def _abandon(self) -> None:
        """Close after a failure; the temporary target is removed next."""
