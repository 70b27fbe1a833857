"""What the benchmarks share: the proteins, the machine's own ceiling, and ratios taken round by round.

This machine may be shared and noisy, so nothing here trusts an absolute time: contestants run in turn, and what is
reported is the median over rounds of the ratio within a round, with a bootstrap interval.
"""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from plm.sequences import read_records

PROTEINS = Path(__file__).parents[1] / "examples" / "data" / "yeast_300.fasta.gz"


def proteins(count: int, longest: int = 1022, seed: int = 0) -> list[str]:
    """A fixed sample of yeast proteins in file order."""
    sequences = [record.sequence for record in read_records(str(PROTEINS)).records]
    return random.Random(seed).sample([s for s in sequences if len(s) <= longest], count)


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


def gemm_ceiling(dtype: torch.dtype, size: int = 2048, tries: int = 8) -> float:
    """Best FLOP/s of a square matrix product here and now."""
    a = torch.randn(size, size).to(dtype)
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


def race(contestants: Mapping[str, Callable[[], object]], rounds: int, tries: int = 1) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; the order turns by one each round. Let each run once before.

    A run during which other programs took more than a twentieth of the processors is repeated, ``tries`` runs in all,
    and the least disturbed one counts; how many were still disturbed is printed.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    disturbed = 0
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs: list[tuple[float, float]] = []
            while len(runs) < tries and (not runs or min(runs)[0] > 0.05):
                before, start = others_seconds(), time.perf_counter()
                taken = seconds(contestants[name])
                passed = (time.perf_counter() - start) * (os.cpu_count() or 1)
                runs.append(((others_seconds() - before) / passed, taken))
            share, taken = min(runs)
            disturbed += share > 0.05
            times[name].append(taken)
    if disturbed:
        print(f"  ! {disturbed} of {rounds * len(names)} runs shared the processors with other programs")
    return times


def others_seconds() -> float:
    """Processor time that other programs have had since the machine started, where the system tells (Linux); else 0."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text().split("\n")[0].split()[1:9])
    busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def ratio(slow: Sequence[float], fast: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median over rounds of slow / fast, and the 95 % bootstrap interval of that median."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = {name: version(name) for name in ("torch", "transformers", "fair-esm")}
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **packages,
    }


def print_json(**fields: object) -> None:
    """The last line of every benchmark, for programs."""
    print(json.dumps({**fields, "machine": machine(), "date": time.strftime("%Y-%m-%d")}))
