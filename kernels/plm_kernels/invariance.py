"""A scope in which a row's numbers depend on the row alone: a sequence has the same bits alone or in any batch.

It is for CUDA, where libraries choose another kernel for another number of rows. On a CPU nothing changes: there
float32 on packed weights has this property already (see ``plm_kernels.linear``), and bfloat16 does not get it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """On CUDA, multiply and attend with kernels whose tiles never depend on the batch. Without gradients.

    ``on=False`` leaves things as they are, also within such a scope. Not yet measured on a GPU. A cost is to be
    expected: one tile for all numbers of rows leaves multiprocessors idle when rows are few, and these products do not
    use all that cuBLAS knows of a GPU; float32 is multiplied without tensor cores.
    """
    token = _invariant.set(on or _invariant.get())
    try:
        yield
    finally:
        _invariant.reset(token)


def is_batch_invariant() -> bool:
    """Whether such a scope has been entered."""
    return _invariant.get()
