"""How one workload is measured: everyone checked against float64, raced in rounds, weighed, and compared with ceilings.

A workload says what is to be done, and prepares a contest: its inputs and the contestants, each of whom builds what it
needs when its turn comes. So a process of its own can build one contestant alone and tell its memory, and a peer that
is not installed is listed as missing.
"""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import commit, copy_ceiling, cpu, gemm_ceiling, others_seconds, race, ratio, read_ceiling, seconds, settle
from torch import Tensor

import plm

Run = Callable[[Any], Any]
"""Inputs to outputs, in input order: the whole work once."""
Timer = Callable[[Callable[[], object]], float]

SUITE = Path(__file__).with_name("suite.py")
OURS = "plm"  # the names of our contestants begin so
COMPUTED_IN = {"float32-bfloat16": "bfloat16"}  # whose products are of another dtype than its name
LONG = 10.0  # seconds of a round from which on the first one counts: what it warms up is nothing beside the work


class Missing(Exception):
    """A contestant cannot take part, and why."""


@dataclass(frozen=True)
class Settings:
    """How a run of the suite was asked for."""

    device: str = "cpu"
    quick: bool = False  # tiny shapes and one round: a rehearsal
    full: bool = False  # the protocol's own counts, where the default on a CPU takes fewer
    rounds: int | None = None


@dataclass(frozen=True)
class Contestant:
    """Someone who can do the work. ``dtype`` also picks the ceiling of products; 8 bits have none."""

    build: Callable[[], Run]
    dtype: str = "float32"
    bytes: float | None = None  # that one run reads from memory at least, for the ceiling "read"


@dataclass(frozen=True)
class Contest:
    """A workload made concrete.

    Attributes:
        contestants: by name; of those that begin with "plm" the ratios are taken.
        inputs: what every run is given.
        units: of the workload in ``inputs``: residues, tokens, pairs.
        flops: that ``inputs`` need; pads and what a contestant does in vain are not counted.
        errors: relative error of each run, which also warms all up; raises AssertionError if one is wrong.
        notes: for the results, as they are.
    """

    contestants: Mapping[str, Contestant]
    inputs: Any
    units: float
    flops: float | None = None
    errors: Callable[[Mapping[str, Run]], Mapping[str, float]] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """A row of the suite. ``rounds`` is the most, ``budget`` the seconds after which no round begins."""

    name: str
    what: str
    prepare: Callable[[Settings], Contest]
    unit: str = "residues"
    ceiling: str | None = "gemm"  # "gemm", "read", or None
    rounds: int = 7
    budget: float = 30.0
    minutes: float = 1.0  # that it takes in all on two cores with AVX-512, roughly
    threads: int | None = None  # None: as many as torch takes
    memory: bool = False  # whether peaks are measured unless all or none are asked for
    devices: tuple[str, ...] = ("cpu",)


def measure(
    workload: Workload,
    settings: Settings,
    *,
    timer: Timer = seconds,
    memory: bool = True,
    explain: Callable[[Mapping[str, Any]], Iterable[str]] = lambda found: (),
) -> dict[str, Any]:
    """Everything about one workload, as numbers for JSON; `bench/README.md` says what each of them is.

    ``explain`` names from what was found those whose time is to be split by operations: who missed a target.
    """
    began, before = time.perf_counter(), state_of_machine()
    with plm.threads(workload.threads), ExitStack() as stack:
        contest = workload.prepare(settings)
        runs, missing = built(contest.contestants)
        if not runs:
            raise Missing(f"nobody can take part: {missing}")
        for run in runs.values():
            stack.callback(getattr(run, "close", lambda: None))  # processes of peers end
        work = {name: without_gradients(run, contest.inputs) for name, run in runs.items()}
        with torch.inference_mode():  # and not before: weights that are made in it are inference tensors
            errors = dict(contest.errors(runs)) if contest.errors else {}
        ceilings = ceilings_of(workload, contest, runs, settings)
        times, others = raced(work, runs, workload, settings, timer)
        again = ceilings_of(workload, contest, runs, settings)
        ceilings = {name: max(best, again[name]) for name, best in ceilings.items()}
        rows = {name: row(name, times, contest, workload.ceiling, ceilings) for name in runs}
        for name, each in rows.items():
            each["error"] = errors.get(name)
            each["peak_mib"] = peak(workload.name, name, settings, work[name]) if memory else None
        found = {
            "workload": workload.name, "what": workload.what, "unit": workload.unit, "units": contest.units,
            "flops": contest.flops, "threads": torch.get_num_threads(), "rounds": len(next(iter(times.values()), [])),
            "notes": dict(contest.notes), "ceiling": ceilings, "contestants": rows, "missing": missing,
            "others": others,
        }  # fmt: skip
        found["profile"] = {name: profile(work[name], settings.device) for name in sorted(set(explain(found)))}
    ended = {"state": [before, state_of_machine()], "took": time.perf_counter() - began}
    return found | ended | {"date": time.strftime("%Y-%m-%d"), "commit": commit()}


def without_gradients(run: Run, inputs: Any) -> Callable[[], object]:
    """The work of a run, for a race."""

    def work() -> object:
        with torch.inference_mode():
            return run(inputs)

    return work


def built(contestants: Mapping[str, Contestant]) -> tuple[dict[str, Run], dict[str, str]]:
    """Those who can take part, and why the others cannot."""
    runs, missing = {}, {}
    for name, contestant in contestants.items():
        try:
            runs[name] = contestant.build()
        except (Missing, ImportError) as error:
            missing[name] = str(error)
    return runs, missing


def raced(
    work: Mapping[str, Callable[[], object]],
    runs: Mapping[str, Run],
    workload: Workload,
    settings: Settings,
    timer: Timer,
) -> tuple[dict[str, list[float]], float]:
    """Seconds by contestant and round, and the share of the processors that other programs had meanwhile."""
    most = settings.rounds or (1 if settings.quick else workload.rounds)
    window = 0.0 if settings.quick else 0.25 if settings.device == "cuda" else 1.0
    processes = [run.process.pid for run in runs.values() if hasattr(run, "process")]
    start, before = time.perf_counter(), others_seconds(processes)
    times = race(work, 1, timer=timer, processes=processes)
    counts = settings.quick or sum(taken[0] for taken in times.values()) > LONG
    budget = float("inf") if settings.rounds else workload.budget - (time.perf_counter() - start) * counts
    later = race(
        work, most - counts, timer=timer, window=window, budget=budget, fewest=3 - counts, processes=processes
    )  # fmt: skip
    passed = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others = (others_seconds(processes) - before) / passed
    return {name: times[name] * counts + later[name] for name in work}, others


def row(
    name: str,
    times: Mapping[str, Sequence[float]],
    contest: Contest,
    ceiling: str | None,
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """What one contestant's times say. Ratios are of ours alone: how many times as fast as each other."""
    contestant, middle = contest.contestants[name], statistics.median(times[name])
    dtype = COMPUTED_IN.get(contestant.dtype, contestant.dtype)
    work, best = (contestant.bytes, "read") if ceiling == "read" else (contest.flops, dtype)
    share = work / middle / ceilings[best] if ceiling and work and best in ceilings else None
    others = [other for other in times if not other.startswith(OURS)] if name.startswith(OURS) else []
    return {
        "dtype": contestant.dtype, "seconds": list(times[name]), "median": middle, "speed": contest.units / middle,
        "of_ceiling": share, "ratios": {other: ratio(times[other], times[name]) for other in others},
    }  # fmt: skip


def ceilings_of(workload: Workload, contest: Contest, runs: Mapping[str, Run], settings: Settings) -> dict[str, float]:
    """FLOP/s of a square product by dtype, or bytes/s of memory; here and now, with the workload's threads."""
    if workload.ceiling == "read":
        return {"read": read_ceiling(device=settings.device), "copy": copy_ceiling(device=settings.device)}
    if workload.ceiling != "gemm":
        return {}
    size = 256 if settings.quick else 8192 if settings.device == "cuda" else 2048
    dtypes = {COMPUTED_IN.get(each.dtype, each.dtype) for each in (contest.contestants[name] for name in runs)}
    return {
        dtype: gemm_ceiling(getattr(torch, dtype), size, device=settings.device) for dtype in sorted(dtypes - {"int8"})
    }


def relative(found: Any, expected: Sequence[Tensor]) -> float:
    """Root mean square of the difference over that of what was expected, of all tensors together."""
    ours = torch.cat([x.detach().to("cpu", torch.float64).flatten() for x in found])
    theirs = torch.cat([x.to("cpu", torch.float64).flatten() for x in expected])
    assert ours.shape == theirs.shape, f"{len(ours)} numbers where {len(theirs)} were expected"
    return float((ours - theirs).norm() / theirs.norm())


BOUNDS = {"float32": 1e-3, "float32-bfloat16": 5e-2, "bfloat16": 5e-2, "float16": 1e-2, "int8": 0.5}
"""Errors that only a mistake explains. In float32 the least exact contestant, esm-cpp, has 2e-4 of the 650M. In
bfloat16 vectors have 3e-3 to 9e-3 and logits up to 1.6e-2; esm-cpp's logits in 8 bits have 4e-2."""


def against(
    probe: Any, truth: Callable[[Any], Sequence[Tensor]], contestants: Mapping[str, Contestant]
) -> Callable[[Mapping[str, Run]], dict[str, float]]:
    """The errors of everyone's outputs on the few inputs ``probe``, against ``truth`` in float64."""

    def errors(runs: Mapping[str, Run]) -> dict[str, float]:
        expected = truth(probe)
        found = {name: relative(run(probe), expected) for name, run in runs.items()}
        wrong = {name: error for name, error in found.items() if not error < BOUNDS[contestants[name].dtype]}
        assert not wrong, f"these are not right, by their errors against float64: {wrong}"
        return found

    return errors


def operations(work: Callable[[], object], device: str) -> list[tuple[str, float, int]]:
    """Name, seconds and count of every operation of one run, on CUDA of every kernel; those that take most first."""
    on_cuda = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as recorded:
        work()
        settle()
    found = [
        (each.key, (each.self_device_time_total if on_cuda else each.self_cpu_time_total) / 1e6, each.count)
        for each in recorded.key_averages()
    ]
    return sorted(found, key=lambda each: -each[1])


def profile(work: Callable[[], object], device: str, count: int = 8) -> list[tuple[str, float]]:
    """The operations that take most of one run, and their share of the time of all."""
    found = operations(work, device)
    total = sum(taken for _, taken, _ in found) or 1
    return [(name, taken / total) for name, taken, _ in found[:count]]


def peak(workload: str, name: str, settings: Settings, work: Callable[[], object]) -> float | None:
    """MiB at the peak of one run: on CUDA what `device_peak` finds, on a CPU (Linux) the resident set of a process.

    That process builds this contestant alone and prints what `own_peak` finds.
    """
    if settings.device == "cuda":
        return device_peak(work)
    if not Path("/proc/self/clear_refs").exists():
        return None
    flags = [f"--{flag}" for flag in ("quick", "full") if getattr(settings, flag)]
    told = subprocess.run(
        [sys.executable, str(SUITE), "--peak", workload, name, *flags], capture_output=True, text=True
    )  # fmt: skip
    if told.returncode:
        print(f"  ! no peak of {name}: {told.stderr.strip().splitlines()[-1:]}")
        return None
    return float(told.stdout.split()[-1])


def device_peak(work: Callable[[], object]) -> float:
    """MiB of torch's memory on CUDA that a run takes at its peak beyond what lay there before: weights and inputs of
    all contestants, who share a process."""
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    settle()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def own_peak(workload: Workload, name: str, settings: Settings) -> float:
    """MiB at the peak of one run in this process: libraries, weights and work, but not what building took."""
    with plm.threads(workload.threads):
        contest = workload.prepare(settings)
        run = contest.contestants[name].build()
        give_back_memory()
        process = run.process.pid if hasattr(run, "process") else os.getpid()
        Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak counts from here
        without_gradients(run, contest.inputs)()
        mib = run.children_mib() if hasattr(run, "children_mib") else resident(process, "VmHWM") / 1024
    getattr(run, "close", lambda: None)()
    return float(mib)


def give_back_memory() -> None:
    """To the system, what building a model has freed."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


def resident(process: int, field: str) -> int:
    """kB, as Linux says it of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def state_of_machine() -> dict[str, float | None]:
    """Load average of the last minute, and the clock of the first core in MHz where Linux tells it."""
    clock = cpu("cpu MHz")
    return {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "mhz": float(clock) if clock else None}
