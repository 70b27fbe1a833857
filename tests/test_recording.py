"""Recording, with as much of CUDA as it asks for: there is no GPU here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from plm.recording import ONE_AT_A_TIME, cuda_graphs


class Cuda:
    """Which device and stream are current, and what was captured on which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.current, self.made = 0, "default", 0
        self.captured: list[str] = []
        self.fails = ""  # "begin" or "end"
        for name in ("Stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": None}))

    def Stream(self, device: int) -> Any:  # as torch calls it
        self.made += 1
        return f"stream {self.made} of device {device}"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch 2.6 to 2.13 do: a stream is put back only if all went well."""
        assert capture_error_mode == "thread_local" and ONE_AT_A_TIME.locked()
        before, self.current = self.current, stream
        if self.fails == "begin":
            raise RuntimeError("cannot begin")
        try:
            yield
        finally:
            if self.fails == "end":
                raise RuntimeError("cannot end")
        self.captured.append(self.current)
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_stream_for_each_recorder_and_device(cuda: Cuda) -> None:
    first, second = cuda_graphs(), cuda_graphs()
    for device, record in ((0, first), (0, first), (1, first), (1, second)):
        cuda.device = device
        record(lambda: torch.zeros(1))
    one = "stream 1 of device 0"
    assert cuda.captured == [one, one, "stream 2 of device 1", "stream 3 of device 1"]
    assert cuda.current == "default" and not ONE_AT_A_TIME.locked()


@pytest.mark.parametrize("fails", ["", "end"])
def test_the_works_own_error_is_raised(cuda: Cuda, fails: str) -> None:
    def work() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cuda.fails = fails
    with pytest.raises(torch.OutOfMemoryError):
        cuda_graphs()(work)
    assert cuda.current == "default" and not ONE_AT_A_TIME.locked()


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_a_capture_that_fails_leaves_no_stream_behind(cuda: Cuda, fails: str) -> None:
    cuda.fails = fails
    with pytest.raises(RuntimeError, match=f"cannot {fails}"):
        cuda_graphs()(lambda: torch.zeros(1))
    assert cuda.current == "default" and not ONE_AT_A_TIME.locked()
