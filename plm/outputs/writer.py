"""What all layouts of embeddings share: what a file will hold, and what may be written to it."""

import importlib
import re
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plm.outputs.output import Output
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
    layer: int | None
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


class Writer(Output):
    """An output of embeddings."""

    per_residue: ClassVar[bool] = True  # whether the layout can hold [length, c]

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents.ids)
        self.contents = contents

    def write(self, index: int, tensor: Tensor) -> None:
        """Write the embedding of sequence `index` (its place in `ids`): [length, c], or [c] if pooled; any float dtype.

        Raises:
            ValueError: a wrong index or shape, a second writing, or values that are not finite.
            OutputError: the disk is full or gone.
        """
        contents = self.contents
        self._check_free(index)
        name, shape = f"sequence {index} {contents.ids[index]!r}", contents.shape(index)
        if tensor.shape != shape:
            raise ValueError(f"{name}: an embedding of shape {[*tensor.shape]}, wanted {[*shape]}")
        array = tensor.detach().to("cpu", DTYPES[contents.dtype]).contiguous().numpy()
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: the embedding is not finite in {contents.dtype}; use a wider dtype")
        with explained(self.target):
            self._put(index, array.astype(contents.numpy_dtype, copy=False))
        self._written[index] = True

    @abstractmethod
    def _put(self, index: int, array: Array) -> None:
        """Store one checked embedding."""


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
