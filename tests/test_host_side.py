"""What the host does around the forward pass: nothing per residue in Python, and little per protein in torch.

Steps are counted and not timed: instructions of Python in this library's own files, and calls of torch.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import plm
from plm import running

OURS = str(Path(plm.__file__).parent)
VERBS: dict[str, Callable[[plm.Model, list[str]], object]] = {
    "rows": lambda model, proteins: plm.embed(model, proteins, max_tokens=10**6),
    "means": lambda model, proteins: plm.embed(model, proteins, pool="mean", max_tokens=10**6),
    "card": lambda model, proteins: plm.embed(model, proteins, pool="card", max_tokens=10**6),
    "single pass": lambda model, proteins: plm.score(model, proteins, how="single-pass", max_tokens=10**6),
}


class Calls(TorchDispatchMode):
    """Counts the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def instructions(work: Callable[[], object]) -> int:
    """How many of Python's the library's own functions run."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def proteins(count: int, length: int) -> list[str]:
    return [("MKTAYIAKQRQISFVKSHF" * 5)[i % 7 : i % 7 + length] for i in range(count)]


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("length", [36])
def test_no_python_per_residue(name: str, length: int) -> None:
    """The same number of instructions for proteins of four times the length. A pair has a separator to be found."""
    model = tiny.igbert(positions=90)
    for shape in ("{}", "{}|{}"):
        short, long = ([shape.format(text, text) for text in proteins(9, size)] for size in (length // 4, length))
        VERBS[name](model, short)  # what is done once
        counts = [instructions(lambda given=given: VERBS[name](model, given)) for given in (short, long)]
        assert 0 < counts[0] == counts[1], counts


def test_a_loop_over_residues_would_be_seen() -> None:
    """This file is not the library's, but what it calls back is."""
    model = tiny.igbert(positions=90)
    table = model.tokenizer
    table.residue_text(table.encode("M"))  # what is done once
    short, long = (instructions(lambda size=size: table.residue_text(table.encode("M" * size))) for size in (9, 36))
    assert long > short + 27


@pytest.mark.parametrize(("name", "most"), [("rows", 4), ("means", 6), ("single pass", 8)])
def test_calls_of_torch_per_protein(name: str, most: int) -> None:
    """Twice as many proteins cost so many more calls each, in one batch: a copy, views, a mean; in a score also where
    the residues of a pair could stand. None of it looks at a protein for what is not finite, or moves it alone."""
    model = tiny.igbert(positions=90)
    VERBS[name](model, proteins(2, 9))  # what is done once
    counts = []
    for count in (20, 40):
        with Calls() as calls:
            VERBS[name](model, proteins(count, 9))
        counts.append(calls.counts)
    more = {call: (n - counts[0][call]) / 20 for call, n in counts[1].items() if n != counts[0][call]}
    assert sum(more.values()) <= most, more
    assert not {"isfinite", "aminmax", "split_with_sizes", "_to_copy"} & set(more), more


def test_a_batch_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def watched(x: Tensor) -> bool:
        looked.append(x.numel())
        return True

    monkeypatch.setattr(running, "is_finite", watched)
    plm.embed(tiny.igbert(), proteins(12, 8), max_tokens=40)
    assert looked == [4 * 8 * 32] * 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_protein_that_is_not_finite_is_named(bad: float) -> None:
    model = tiny.igbert()
    with torch.no_grad():
        model.net.embed.weight[model.tokenizer.encode("W")[1]] = bad
    texts = ["MKTAYIAK", "MKT", "MKWT", "AYIAKQ"]
    with pytest.raises(FloatingPointError, match="sequence 3 gave a NaN or an infinity in float32"):
        plm.embed(model, texts)


@pytest.mark.parametrize("shapes", [[(3, 4)], [(3, 4), (1, 4), (7, 4)], [(), ()], [(2, 4), (2, 4)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_come_over_in_one_copy(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """And are each other's neighbours no longer: whoever keeps one does not keep the batch."""
    whole = [torch.randn(2 * shape[0], *shape[1:]).to(dtype)[::2] if shape else torch.randn(()) for shape in shapes]
    with Calls() as calls:
        found = running.on_host(whole)
    assert calls.counts["cat"] == 1 and calls.counts["_to_copy"] == (dtype == torch.bfloat16 and bool(shapes[0]))
    for x, y in zip(found, whole, strict=True):
        assert torch.equal(x, y.to(x.dtype)) and x.dtype == torch.promote_types(y.dtype, torch.float32)
        assert x.untyped_storage().nbytes() == x.numel() * x.itemsize and x.is_contiguous()
        assert x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 4), (2, 2), (5, 0, 2), (0,), ()])
def test_positions(lengths: tuple[int, ...]) -> None:
    batch = plm.Packed.from_tokens(torch.arange(sum(lengths)), lengths)
    assert batch.positions.tolist() == [i for length in lengths for i in range(length)]
    assert batch.positions.dtype == torch.int64 and batch.offsets.dtype == torch.int32
