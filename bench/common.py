"""What the benchmarks share: the proteins, the machine and its own ceilings, and ratios taken round by round.

This machine may be shared and noisy, so nothing here trusts an absolute time: contestants run in turn, and what is
reported is the median over rounds of the ratio within a round, with a bootstrap interval.
"""

import atexit
import json
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from plm.processor import bfloat16_unit
from plm.sequences import read_records

PROTEINS = Path(__file__).parents[1] / "examples" / "data" / "yeast_300.fasta.gz"


def proteins(count: int, longest: int = 1022, seed: int = 0) -> list[str]:
    """A fixed sample of yeast proteins in file order."""
    sequences = [record.sequence for record in read_records(str(PROTEINS)).records]
    return random.Random(seed).sample([s for s in sequences if len(s) <= longest], count)


PACKAGES = ("torch", "triton", "transformers", "fair-esm", "numpy")
FLAGS = re.compile(r"avx|amx|fma$|f16c|sve|asimd|bf16|i8mm")  # of a processor: what decides the speed of a product

clock = time.perf_counter


def one_thread() -> None:
    """Work in a single thread from now on and count its processor time, into which other programs hardly come."""
    global clock
    torch.set_num_threads(1)
    clock = time.process_time


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, with all that it leaves to a GPU."""
    settle()
    start = clock()
    work()
    settle()
    return clock() - start


def settle() -> None:
    """Wait for a GPU that has been used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gemm_ceiling(dtype: torch.dtype, size: int = 2048, tries: int = 8, device: str = "cpu") -> float:
    """Best FLOP/s of a square matrix product here and now; on a GPU take a ``size`` of 8,192."""
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(tries))


def copy_ceiling(tries: int = 8, device: str = "cpu") -> float:
    """Best bytes/s of a large copy, read and write counted."""
    a = torch.empty(64 << 20 if device == "cpu" else 1 << 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a)) for _ in range(tries))


def read_ceiling(tries: int = 4, device: str = "cpu") -> float:
    """Best bytes/s of reading memory that fits into no cache."""
    a = torch.ones(1 << 27, device=device)
    return a.numel() * 4 / min(seconds(a.sum) for _ in range(tries))


def race(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    tries: int = 1,
    *,
    timer: Callable[[Callable[[], object]], float] = seconds,
    window: float = 0.0,
    budget: float = float("inf"),
    fewest: int = 3,
    processes: Sequence[int] = (),
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; the order turns by one each round. Let each run once before.

    A run during which other programs took more than a twentieth of the processors is repeated, ``tries`` runs in all,
    and the least disturbed one counts; how many were still disturbed is printed.

    Args:
        timer: the seconds of one piece of work.
        window: work of fewer seconds is repeated until as many have passed, and its median counts.
        budget: seconds after which no round begins, once there were ``fewest``.
        processes: ids of processes that belong to the contestants.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    disturbed, began = 0, time.perf_counter()

    def sample(name: str) -> float:
        runs = [timer(contestants[name])]
        while sum(runs) < window:
            runs.append(timer(contestants[name]))
        return statistics.median(runs)

    for turn in range(rounds):
        gone = time.perf_counter() - began
        if turn >= fewest and gone + gone / turn > budget:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs: list[tuple[float, float]] = []
            while len(runs) < tries and (not runs or min(runs)[0] > 0.05):
                before, start = others_seconds(processes), time.perf_counter()
                taken = sample(name)
                passed = (time.perf_counter() - start) * (os.cpu_count() or 1)
                runs.append(((others_seconds(processes) - before) / passed, taken))
            share, taken = min(runs)
            disturbed += share > 0.05
            times[name].append(taken)
    if disturbed:
        print(f"  ! {disturbed} of {sum(map(len, times.values()))} runs shared the processors with other programs")
    return times


def others_seconds(processes: Iterable[int] = ()) -> float:
    """Processor time that other programs have had since the machine started, where the system tells (Linux); else 0.

    ``processes``: ids of those that are none of the others.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text().split("\n")[0].split()[1:9])
    ticks = user + nice + system + interrupts + soft + stolen
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # its name may hold blanks
        ticks -= int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def ratio(slow: Sequence[float], fast: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median over rounds of slow / fast, and the 95 % bootstrap interval of that median."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


@cache
def scratch() -> Path:
    """A folder for random weights, which goes when this process does; those that it starts share it."""
    if "PLM_BENCH_SCRATCH" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="plm-bench-")
        os.environ["PLM_BENCH_SCRATCH"] = folder.name
        atexit.register(folder.cleanup)
    return Path(os.environ["PLM_BENCH_SCRATCH"])


def cpu(field: str) -> str:
    """What Linux says of the first processor; "" if it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def versions() -> dict[str, str | None]:
    """Of the packages that take part; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Of this repository, with "+" behind it if files have changed since; None where git does not tell."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        told = subprocess.run(
            [*git, "describe", "--always", "--dirty=+", "--abbrev=12"], capture_output=True, text=True
        )
    except OSError:
        return None
    return told.stdout.strip() or None


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    flags = cpu("flags") or cpu("Features")
    return {
        "cpu": cpu("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in flags.split() if FLAGS.match(flag)],
        "threads": torch.get_num_threads(),
        "bfloat16": bfloat16_unit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "python": platform.python_version(),
        "commit": commit(),
        **versions(),
    }


def machine_name(device: str = "cpu") -> str:
    """A file name for it: the GPU, or the processor and its number of cores."""
    here = machine()
    what = str(here["gpu"]) if device == "cuda" else f"{here['cpu']} {here['cores']} cores"
    what = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bprocessor\b|@.*?GHz", " ", what, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")


def print_json(**fields: object) -> None:
    """The last line of every benchmark, for programs."""
    print(json.dumps({**fields, "machine": machine(), "date": time.strftime("%Y-%m-%d")}))
