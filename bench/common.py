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


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gemm_ceiling(dtype: torch.dtype, size: int = 2048, tries: int = 8) -> float:
    """Best FLOP/s of a square matrix product here and now."""
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(tries))


def copy_ceiling(tries: int = 8) -> float:
    """Best bytes/s of a large copy, read and write counted."""
    a = torch.empty(64 << 20, dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a)) for _ in range(tries))


def read_ceiling(tries: int = 4) -> float:
    """Best bytes/s of reading memory that fits into no cache."""
    a = torch.ones(1 << 27)
    return a.numel() * 4 / min(seconds(a.sum) for _ in range(tries))


def race(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; the order turns by one each round. Let each run once before."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(contestants[name]))
    return times


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
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **packages,
    }


def print_json(**fields: object) -> None:
    """The last line of every benchmark, for programs."""
    print(json.dumps({**fields, "machine": machine(), "date": time.strftime("%Y-%m-%d")}))
