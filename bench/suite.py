"""The benchmark suite: `make bench` runs it on the machine it finds.

    python bench/suite.py                                   # everything, into bench/results/<machine>.json and .md
    python bench/suite.py --only W1 W5                      # by words of the workloads' names, which --list shows
    python bench/suite.py --only esm2-150m --rounds 9 --output elsewhere
    python bench/suite.py --resume                          # only what is not in the results yet

The file is written after each workload: who interrupts the suite keeps what was measured, and the file says what is
missing. `bench/README.md` says how things are measured and what the table means.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import machine, machine_name
from measuring import (
    Contest,
    Contestant,
    Missing,
    Run,
    Settings,
    Workload,
    against,
    give_back_memory,
    measure,
    own_peak,
    relative,
)
from reporting import Results, load, missed, save, table
from workloads import WORKLOADS

__all__ = [
    "Contest", "Contestant", "Missing", "Results", "Run", "Settings", "Workload", "against", "load", "measure",
    "relative", "save", "table",
]  # fmt: skip

RESULTS = Path(__file__).with_name("results")


def chosen(every: dict[str, Workload], only: Sequence[str]) -> dict[str, Workload]:
    """Those whose name, or a word of it, is among ``only``; all if that is empty.

    Raises: SystemExit if a word fits none.
    """
    words = {name: {name, *name.split()} for name in every}
    unknown = [word for word in only if not any(word in mine for mine in words.values())]
    if unknown:
        raise SystemExit(f"no workload is called {', '.join(unknown)}; --list shows them all")
    return {name: each for name, each in every.items() if not only or words[name] & set(only)}


def begin(path: Path, names: Sequence[str], settings: Settings, resume: bool) -> Results:
    """Results in which everything that is to be run is marked as pending; what else is there stays."""
    old = load(path) or {"workloads": {}}
    kept = {
        name: each for name, each in old["workloads"].items() if name not in names or (resume and "contestants" in each)
    }
    pending = {name: kept.get(name, {"pending": True}) for name in names}
    here = {"machine": machine(), "device": settings.device, "quick": settings.quick, "full": settings.full}
    return {**here, "date": time.strftime("%Y-%m-%d"), "workloads": kept | pending}


def run(
    some: Mapping[str, Workload],
    settings: Settings,
    path: Path,
    *,
    resume: bool = False,
    memory: str = "some",
    minutes: float = float("inf"),
) -> Results:
    """Measure them one after the other. One that fails is a line in the results, not the end.

    Args:
        memory: whose peaks are measured: "all", "some" (the workloads that say so) or "none".
        minutes: none begins after these, or if by its own estimate it would end later.
    """
    began = time.perf_counter()
    results = begin(path, [*some], settings, resume)
    todo = {name: each for name, each in some.items() if "pending" in results["workloads"][name]}

    def explain(found: Mapping[str, Any]) -> list[str]:
        return [] if settings.quick else [target.ours for target in missed(found)]

    peaks = {"all": lambda each: True, "some": lambda each: each.memory, "none": lambda each: False}
    print(f"{len(todo)} workloads, about {sum(each.minutes for each in todo.values()):.0f} minutes; into {path}.json")
    for name, workload in todo.items():
        if (time.perf_counter() - began) / 60 + workload.minutes > minutes:
            print(f"\n{name}: no time is left for it; go on with --resume", flush=True)
            continue
        print(f"\n{name}: {workload.what}", flush=True)
        try:
            found: dict[str, Any] = measure(workload, settings, memory=peaks[memory](workload), explain=explain)
            print(f"  {found['rounds']} rounds, {found['took']:.0f} s", flush=True)
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        give_back_memory()  # networks of 650 M parameters in float64 are among it
        results["workloads"][name] = found
        save(results, path)
    return results


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="All benchmarks on this machine.")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--only", nargs="+", default=[], metavar="WORD", help="workloads by name or by a word of it")
    found.add_argument("--rounds", type=int, help="instead of each workload's own")
    found.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    found.add_argument("--full", action="store_true", help="as many proteins as the protocol says (hours on a CPU)")
    found.add_argument("--quick", action="store_true", help="tiny models and one round, to see that all works")
    found.add_argument("--resume", action="store_true", help="leave out what is in the results already")
    found.add_argument(
        "--memory", choices=("all", "some", "none"), default="some", help="measure peaks, a process each"
    )
    found.add_argument("--minutes", type=float, default=45, help="after which no workload begins (default 45)")
    found.add_argument("--list", action="store_true", help="name the workloads and stop")
    found.add_argument("--peak", nargs=2, metavar=("WORKLOAD", "CONTESTANT"), help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    settings = Settings(args.device, args.quick, args.full, args.rounds)
    every = {each.name: each for each in WORKLOADS if args.device in each.devices}
    if args.peak:
        workload, name = args.peak
        print(own_peak(every[workload], name, settings))
        return 0
    some = chosen(every, args.only)
    if args.list:
        for name, each in some.items():
            print(f"{name:34s} {each.minutes:4.1f} min   {each.what}")
        return 0
    kind = "-quick" if args.quick else "-full" if args.full else ""
    path = args.output / f"{machine_name(args.device)}{kind}"
    minutes = float("inf") if args.full else args.minutes
    results = run(some, settings, path, resume=args.resume, memory=args.memory, minutes=minutes)
    print(f"\n{table(results)}")
    return int(any("failed" in results["workloads"][name] for name in some))


if __name__ == "__main__":
    sys.exit(main())
