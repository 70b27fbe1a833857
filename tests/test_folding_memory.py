"""How ``plm.fold`` gets by with little memory: what it expects to need, and what it does if that was too little."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import plm
from plm import folding
from plm.esmfold.chains import Chains
from plm.esmfold.config import Config, StructureConfig
from plm.esmfold.memory import needed, rows_within
from plm.esmfold.model import ESMFold, Prediction
from plm.folding import fold, fold_rows, read_proteins
from plm.sequences import InputError

ROOT = Path(__file__).parents[1]
ALL20 = "MKTWYFHRDENQSCGPAVIL"
SPACING = 2**-18  # of float32 from 32 to 64, beyond which no number here lies
CPU_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 137438953472 bytes."
ERRORS = [RuntimeError(CPU_FULL), RuntimeError("could not create a primitive"), torch.OutOfMemoryError("CUDA ...")]
# One block of the published sizes, in a process of its own, as memory is counted by process.
PEAK = """
import re, sys, torch
from pathlib import Path
from plm.esmfold.chains import read_chains
from plm.esmfold.config import Config, StructureConfig
from plm.esmfold.memory import needed
from plm.esmfold.model import FLOAT32_AT_LEAST, ESMFold
from plm.models import esm

length, rows, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
stem = dict(layers=1, channels=64, heads=2, feed_forward=64, learned_positions=None, norm_before=False)
stem |= dict(token_dropout=True, norm_eps=1e-5, lm_head=False, contact_head=False)
structure = StructureConfig(384, 128, 2, 12, 16, 4, 8, 1, 128, 2)
net = ESMFold(Config(stem, 1, 1024, 128, 32, 32, 32, 4, 128, structure), esm.ESM(esm.Config(**stem))).to(dtype)
for name in FLOAT32_AT_LEAST:
    getattr(net, name).float()
for weight in net.parameters():
    weight.data.normal_(0, 0.02)

def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def fold(length):
    with torch.inference_mode():
        net.fold_one(read_chains("A" * length), torch.randn(length, 64), 2, rows)

torch.set_num_threads(1)
fold(16)  # packs weights, and loads code
before = memory("VmRSS")
fold(length)
print(needed(net, length, rows), memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def single(golden: Path) -> plm.Model:
    return plm.load(golden / "esmfold" / "a_hub_layout", dtype="float64")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize(("rows", "dtype"), [(8, "float32"), (48, "float32"), (48, "bfloat16")])
def test_the_estimate_is_what_a_process_takes(rows: int, dtype: str) -> None:
    """Within a factor of 1.5: measured 0.74 to 1.29 times with 128 to 384 residues, as the allocator keeps some."""
    path = ":".join(map(str, (ROOT, ROOT / "kernels", ROOT / "weights")))
    command = [sys.executable, "-c", PEAK, "192", str(rows), dtype]
    run = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    expected, taken = map(int, run.stdout.split())
    assert taken / 1.5 < expected < taken * 1.5


def test_rows_are_what_fits(published: ESMFold) -> None:
    """Into what is free: half as many would fit as well, and twice as many would not. On a CPU also into its caches."""
    for length in (64, 500, 2000):
        most = rows_within(published, length, None)
        assert most == min(length, (16 << 20) // (4 * 128 * 4 * length))
        for share in (0.2, 0.5, 0.9):
            free = int(needed(published, length, 1) * (1 - share) + needed(published, length, most) * share)
            rows = rows_within(published, length, free)
            assert needed(published, length, rows) <= free
            assert rows == most or needed(published, length, 2 * rows + 1) > free
    assert rows_within(published, 500, 0) == 1  # at least
    assert rows_within(published, 100_000, None) == 1


@pytest.fixture(scope="module")
def published() -> ESMFold:
    """One block of the published sizes, without its weights."""
    stem = {"layers": 1, "channels": 64, "heads": 2, "feed_forward": 64}
    structure = StructureConfig(384, 128, 8, 12, 16, 4, 8, 1, 128, 2)
    config = Config(stem, 1, 1024, 128, 32, 32, 32, 4, 128, structure)
    with torch.device("meta"):
        net = ESMFold(config, torch.nn.Identity())
    net.embed.to_empty(device="cpu")
    return net


class Small:
    """A device on which so many rows fit at a time, in place of ``ESMFold.fold_one``; of the longest ones, none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, error: RuntimeError, longest: int = 99) -> None:
        self.tried: list[tuple[int, int]] = []
        whole = ESMFold.fold_one

        def fold_one(net: ESMFold, chains: Chains, states: Tensor, passes: int, some: int) -> Prediction:
            self.tried.append((chains.length, some))
            if some > rows or chains.length > longest:
                raise error
            return whole(net, chains, states, passes, some)

        monkeypatch.setattr(ESMFold, "fold_one", fold_one)


@pytest.mark.parametrize("error", ERRORS)
def test_smaller_pieces_when_memory_runs_out(
    single: plm.Model, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    (whole,) = fold(single, ALL20)
    small = Small(monkeypatch, 2, error)
    (found,) = fold(single, ALL20)
    assert small.tried == [(20, 20), (20, 5), (20, 1)]
    assert found.settings["chunk"] == 1
    assert (found.positions - whole.positions).abs().max() <= SPACING


def test_what_does_not_fit_is_named_and_the_others_are_folded(
    single: plm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small(monkeypatch, 99, RuntimeError(CPU_FULL), longest=15)
    failed: dict[int, Exception] = {}
    proteins = read_proteins(["MKV", ALL20, "WYCQ"])
    assert [i for i, _ in fold_rows(single, proteins, chunk=8, on_failure=failed.__setitem__)] == [2, 0]
    assert list(failed) == [1] and isinstance(failed[1], MemoryError)
    message = r"MKTWYFHRDENQ\.\.\.: 20 residues .* memory of cpu, tried with 8, 2, 1 rows at a time; cut it into"
    with pytest.raises(MemoryError, match=message):
        fold(single, ["MKV", ALL20], chunk=8)


def test_other_errors_are_not_taken_for_a_lack_of_memory(single: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fold(single, ALL20)
    assert len(small.tried) == 1


def test_a_batch_that_the_language_model_cannot_read_is_read_one_by_one(
    single: plm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = fold(single, [ALL20, "MKV"])
    whole, read = ESMFold.stem_states, []

    def stem_states(net: ESMFold, batch: plm.Packed) -> Tensor:
        read.append(len(batch))
        if len(batch) > 1:
            raise RuntimeError(CPU_FULL)
        return whole(net, batch)

    monkeypatch.setattr(ESMFold, "stem_states", stem_states)
    found = fold(single, [ALL20, "MKV"])
    assert read == [2, 1, 1]
    for one, other in zip(found, alone, strict=True):
        assert (one.positions - other.positions).abs().max() <= SPACING


def test_what_cannot_fit_is_refused_before_it_is_begun(single: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system kills a process that takes more than there is: no error would come."""
    net = single.net
    assert isinstance(net, ESMFold)
    monkeypatch.setattr(folding, "free_memory", lambda device: needed(net, 10, rows=1))
    begun = Small(monkeypatch, 99, RuntimeError("begun"))
    with pytest.raises(InputError) as caught:
        fold(single, [ALL20, "MKV", "MK:VL"])
    assert [fault.record for fault in caught.value.faults] == [1, 3]
    assert "29 residues with linkers need about" in caught.value.faults[1].reason
    assert begun.tried == []
    failed: dict[int, Exception] = {}
    proteins = read_proteins([ALL20, "MKV", "MK:VL"])
    assert [i for i, _ in fold_rows(single, proteins, on_failure=failed.__setitem__)] == [1]
    assert sorted(failed) == [0, 2] and all(isinstance(error, MemoryError) for error in failed.values())


def test_rows_that_were_asked_for_are_guarded_as_well(published: ESMFold) -> None:
    """By memory, and by the 32 bits with which some kernels count; not by a CPU's caches."""
    assert rows_within(published, 300, None, wanted=250) == 250
    assert rows_within(published, 300, needed(published, 300, 20), wanted=250) <= 20
    assert rows_within(published, 5000, None, wanted=5000) == rows_within(published, 5000, None, wanted=10**6) < 5000


def test_what_cannot_fit_is_not_read_by_the_language_model(single: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    proteins = read_proteins([ALL20 * 4, ALL20])
    between = needed(single.net, 40, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(folding, "free_memory", lambda device: between)
    read: list[int] = []
    stem_states = folding.stem_states
    monkeypatch.setattr(folding, "stem_states", lambda net, some: read.append(len(some)) or stem_states(net, some))
    failed: dict[int, Exception] = {}
    found = dict(fold_rows(single, proteins, recycles=0, on_failure=failed.__setitem__))
    assert found.keys() == {1} and failed.keys() == {0} and read == [1]
    with pytest.raises(MemoryError, match="80 residues with linkers need about"):
        dict(fold_rows(single, proteins, recycles=0))


@pytest.mark.parametrize(
    "told",
    [
        "MPS backend out of memory (...)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ...",
        "DefaultCPUAllocator: not enough memory: you tried",
        None,
    ],
)
def test_every_way_of_running_out_is_known(
    single: plm.Model, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold_one, tried = ESMFold.fold_one, []

    def full(net: ESMFold, chains: Chains, states: Tensor, passes: int, rows: int) -> Prediction:
        tried.append(rows)
        if rows > 2:
            raise MemoryError if told is None else RuntimeError(told)
        return fold_one(net, chains, states, passes, rows)

    monkeypatch.setattr(ESMFold, "fold_one", full)
    (structure,) = fold(single, ALL20, recycles=0, chunk=8)
    assert structure.settings["chunk"] == 2 and tried == [8, 2]
