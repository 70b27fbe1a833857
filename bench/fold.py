"""One block of ESMFold's trunk at its real sizes with random weights, against transformers' block.

    python bench/fold.py                                  # time and peak memory at 64, 128 and 256 residues, and a plot
    THP_MEM_ALLOC_ENABLE=1 python bench/fold.py           # the same with torch's transparent huge pages on both sides

Both blocks have the same weights, which ours get through the key map of the published files, and their outputs are
compared before anything is timed. The reference runs as it comes ("default"), and with its own chunks of 64 rows
("tuned"). Peaks are the growth of the resident set of a process of its own, weights and inputs not counted.

The allocator matters: glibc maps every tensor above 32 MiB afresh, and each of its pages is a fault. So the setting of
torch's transparent huge pages, which spares most of them, is printed with the results.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import gemm_ceiling, machine, print_json, race, ratio
from peers.fold import flops, inputs, run_ours, run_theirs, twins
from torch import Tensor


def runners(length: int, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    theirs, ours = twins(dtype)
    s, z = inputs(length, dtype)
    return {
        "transformers": lambda: run_theirs(theirs, s, z, None),
        "transformers, chunk 64": lambda: run_theirs(theirs, s, z, 64),
        "plm": lambda: run_ours(ours, s, z),
    }


def peak(who: str, length: int, dtype: str) -> float:
    """Growth of the resident set in MB while a process of its own runs the block once (on Linux)."""
    command = [sys.executable, __file__, "--peak", who, "--lengths", str(length), "--dtypes", dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def print_peak(who: str, length: int, dtype: torch.dtype) -> None:
    work = runners(length, dtype)[who]
    with torch.inference_mode():
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        work()
        print((status("VmHWM") - before) / 1024)


def status(field: str) -> int:
    """kB, as Linux says it of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@torch.inference_mode()
def measure(length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    contestants = runners(length, dtype)
    outputs = {who: run() for who, run in contestants.items()}  # and so every contestant is warm
    expected = outputs["transformers"]
    distance = max(
        ((x - y).float().norm() / y.float().norm()).item()
        for found in outputs.values()
        for x, y in zip(found, expected, strict=True)
    )
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    times = race(contestants, rounds, tries=3)
    ceiling = gemm_ceiling(dtype)
    short = str(dtype).removeprefix("torch.")
    print(f"\n{short}, {length} residues, {rounds} rounds; agree to {distance:.0e}")
    results: dict[str, Any] = {}
    for who, taken in times.items():
        speedup = ratio(taken, times["plm"])
        grown = peak(who, length, short)
        share = flops(length) / min(taken) / ceiling
        results[who] = {"seconds": taken, "ratio": speedup, "peak_mb": grown, "share_of_ceiling": share}
        told = "{:.2f} [{:.2f}, {:.2f}]".format(*speedup)
        print(f"  {who:24s} {min(taken):8.3f} s  {share:4.0%} of ceiling  peak {grown:6.0f} MB   plm is {told} times")
    return {"dtype": short, "length": length, "ceiling": ceiling, "results": results}


def plot(measured: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory by length, float32."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [each for each in measured if each["dtype"] == "float32"]
    for who in rows[0]["results"]:
        lengths = [each["length"] for each in rows]
        axes[0].plot(lengths, [min(each["results"][who]["seconds"]) for each in rows], marker="o", label=who)
        axes[1].plot(lengths, [each["results"][who]["peak_mb"] for each in rows], marker="o", label=who)
    for axis, title, unit in ((axes[0], "Time of one block", "s"), (axes[1], "Peak memory beyond weights", "MB")):
        axis.set(title=title, xlabel="residues", ylabel=unit, xscale="log", yscale="log", xticks=lengths)
        axis.set_xticks(lengths, map(str, lengths))
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="A block of ESMFold's trunk against transformers'.")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("fold.png"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.lengths[0], getattr(torch, args.dtypes[0]))
        return
    huge = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    print(machine(), f"THP_MEM_ALLOC_ENABLE={huge}")
    measured = [measure(length, getattr(torch, dtype), args.rounds) for dtype in args.dtypes for length in args.lengths]
    if len(args.lengths) > 1:
        plot(measured, args.plot)
    print_json(benchmark="fold", huge_pages=huge, measured=measured)


if __name__ == "__main__":
    main()
