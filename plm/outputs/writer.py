"""What all layouts share: what a file will hold, and the books over what has been written."""

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plm.outputs.target import OutputError, Target, explained

Array = NDArray[np.floating[Any]]
# bfloat16 is no numpy dtype: such tensors are stored as float32, which holds them exactly.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Contents:
    """What an output will hold: known before any work, so that headers can be written and space be checked first."""

    ids: tuple[str, ...]
    lengths: tuple[int, ...]  # residues of each sequence
    channels: int
    dtype: str  # a key of DTYPES
    pooled: bool  # one row [c] per sequence instead of [length, c]
    layer: int
    provenance: str  # a JSON object

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of the embedding of one sequence: [c] or [length, c]."""
        return (self.channels,) if self.pooled else (self.lengths[index], self.channels)

    @property
    def rows(self) -> int:
        """Rows of all embeddings together."""
        return len(self.lengths) if self.pooled else sum(self.lengths)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def size(self) -> int:
        """Bytes of all embeddings together."""
        return self.rows * self.channels * self.numpy_dtype.itemsize


class Embeddings(NamedTuple):
    """What `read_embeddings` returns, in input order: arrays [length, c] or [c]."""

    ids: list[str]
    arrays: list[Array]
    provenance: dict[str, Any]


class Writer(ABC):
    """Writes one output, whole or not at all. Use as a context manager, opened *before* the embeddings are computed.

    Sequences may be written in any order, each exactly once. The target appears when the ``with`` block ends without an
    error; after any exception (Ctrl-C among them) no trace is left and an existing target is as it was.
    """

    per_residue: ClassVar[bool] = True  # whether the layout can hold [length, c]

    def __init__(self, target: Target, contents: Contents) -> None:
        self.target, self.contents = target, contents
        self._written = np.zeros(len(contents.ids), dtype=bool)

    def write(self, index: int, tensor: Tensor) -> None:
        """Write the embedding of sequence `index` (its place in `ids`): [length, c], or [c] if pooled; any float dtype.

        Raises:
            ValueError: a wrong index or shape, a second writing, or values that are not finite.
            OutputError: the disk is full or gone.
        """
        contents = self.contents
        if not 0 <= index < len(contents.ids) or self._written[index]:
            state = "was written before" if 0 <= index < len(contents.ids) else f"is not in 0..{len(contents.ids) - 1}"
            raise ValueError(f"sequence {index} {state}")
        name, shape = f"sequence {index} {contents.ids[index]!r}", contents.shape(index)
        if tensor.shape != shape:
            raise ValueError(f"{name}: an embedding of shape {[*tensor.shape]}, wanted {[*shape]}")
        array = tensor.detach().to("cpu", DTYPES[contents.dtype]).contiguous().numpy()
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: the embedding is not finite in {contents.dtype}; use a wider dtype")
        with explained(self.target):
            self._put(index, array.astype(contents.numpy_dtype, copy=False))
        self._written[index] = True

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
            names = ", ".join(repr(self.contents.ids[index]) for index in missing[:5])
            raise ValueError(f"{len(missing)} of {len(self._written)} sequences were not written, among them {names}")

    @abstractmethod
    def _begin(self) -> None:
        """Open the temporary target and write what is known already."""

    @abstractmethod
    def _put(self, index: int, array: Array) -> None:
        """Store one checked embedding."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is left and close."""

    @abstractmethod
    def _abandon(self) -> None:
        """Close after a failure; the temporary target is removed next."""


def require(module: str, extra: str) -> Any:
    """Import an optional library, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        message = f"this layout needs {library}: pip install {library} (or plm with its extra, 'plm-torch[{extra}]')"
        raise OutputError(message) from error


def safe_names(ids: Iterable[str], limit: int | None = None) -> list[str]:
    """Unique names for keys and files: no slash, backslash or control character, no leading dot, at most `limit` bytes.

    They differ in more than case, because some file systems do not see that.
    """
    names: list[str] = []
    seen: set[str] = set()
    for id in ids:
        clean = re.sub(r"[/\\\x00-\x1f\x7f]|^\.|^$", "_", id).encode()[:limit].decode(errors="ignore")
        name, number = clean, 1
        while name.casefold() in seen:
            number += 1
            name = f"{clean}.{number}"
        seen.add(name.casefold())
        names.append(name)
    return names
