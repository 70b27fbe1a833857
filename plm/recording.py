"""Recording what a GPU is told to do, so that it is told with one launch in place of hundreds.

A graph repeats what was recorded on the tensors that were there, so it holds as long as nobody replaced a weight.
"""

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Something to repeat, to its result's place and what repeats it."""
Weights = list[tuple[int, int]]


T = TypeVar("T")
ONE_AT_A_TIME = Lock()  # captures of this process: libraries under them count on it


class GraphWarning(UserWarning):
    """A CUDA graph could not be recorded, and nothing is repeated."""


def cuda_graphs() -> Record:
    """What makes CUDA graphs of work; those that one call makes share their memory, so none may run beside another.

    Work is recorded on the current device, which must be the one that it runs on. It raises what the work raises.
    """
    pool = torch.cuda.graph_pool_handle()

    @cache
    def stream_on(device: int) -> torch.cuda.Stream:
        """torch's own default is one stream, on the device that recorded first in the process: elsewhere a graph of
        it stays empty."""
        return torch.cuda.Stream(device)

    def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph, stream, failed = torch.cuda.CUDAGraph(), stream_on(torch.cuda.current_device()), None
        # torch leaves the capturing stream in place where a capture cannot be begun or ended; the outer scope does not.
        # "thread_local": what other threads ask of their devices meanwhile does not spoil it.
        with ONE_AT_A_TIME, torch.cuda.stream(stream):
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        result = work()
                    except BaseException as error:
                        failed = error
                        raise
            except Exception:
                if failed is not None:  # a capture that ends in disorder raises as well, and would hide the reason
                    raise failed from None
                raise
        return result, graph.replay

    return record


def launched(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """In place of a recording: the work itself, each time."""
    result = work().clone()

    def repeat() -> None:
        result.copy_(work())

    return result, repeat


def weights_of(net: nn.Module) -> Weights | None:
    """Where every weight lies and how often it was changed in place; None where hooks want to see each pass."""
    found = []
    for module in net.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
    return found


class Lent(Generic[T]):
    """A place for what is dear to make, lent to one caller at a time. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.kept: T | None = None
        self.lock = Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def take(self) -> T | None:
        """What lies here, which then no longer does."""
        with self.lock:
            kept, self.kept = self.kept, None
        return kept

    def give_back(self, kept: T) -> None:
        """Lay it here, in the place of what somebody else gave back before."""
        with self.lock:
            self.kept = kept
