"""All that needs a GPU, in under nine minutes: is it right, how exact is it, and how fast.

    python bench/device.py                                # on a CUDA device, everything, into bench/results/device
    python bench/device.py --output FOLDER                # or there
    python bench/device.py --only parity suite            # some phases
    python bench/device.py --only suite --workloads rest --output OTHER   # what of the suite does not fit beside it
    python bench/device.py --device cpu --quick           # a rehearsal: kernels interpreted, tiny sizes

The phases, each in a process of its own with a share of the time:

    environment   device, driver, versions, clocks, and what the machine can do at most (products, copies, launches)
    kernels       tests/test_gpu_*.py, and whole networks at published widths with Triton's kernels and without
    parity        stored truths of the originals in float64 against this device in every dtype; alone = in a batch
    suite         times and memory at published sizes, against peers in the same process and run

``device.json`` and ``device.md`` in the folder are whole after every fact, so that a run which is killed leaves what it
had found. Nothing is installed or downloaded; what is not there is listed as missing. Exit code 0: everything that was
asked for ran to its end and every check passed; 1: not so; 2: the arguments are wrong.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from on_device import report
from on_device.job import Job, read_facts

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "bench" / "results" / "device"
# Seconds of nine minutes. What a phase leaves goes to those after it.
SHARES = {"environment": 45, "kernels": 160, "parity": 65, "suite": 255}
CHECKING = ("kernels", "parity")
PARTS = {"kernels": 6, "parity": 6}  # processes on a GPU: compiling kernels is work for the CPU
WRITING = 15  # seconds for the last report, and before it to stop a phase that does not stop by itself
GRACE = 4  # seconds between asking a process to stop and stopping it


def environment(device: str) -> dict[str, str]:
    """Variables for a phase: this checkout is what is imported, and the hub is never asked."""
    folders = [ROOT / name for name in ("", "kernels", "weights", "bench", "tests")]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rehearsal = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    return {**os.environ, **settings, **rehearsal}


def share(phase: str, phases: list[str], left: float) -> float:
    """Seconds for a phase, of ``left`` for it and those after it."""
    rest = phases[phases.index(phase) :]
    return left * SHARES[phase] / sum(SHARES[name] for name in rest)


class Run:
    """One run: what was found so far, and where it is written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.time() + 60 * args.minutes - WRITING
        self.facts: list[report.Fact] = []
        self.state = dict.fromkeys(args.only, "not run")
        self.children: list[subprocess.Popen[bytes]] = []
        self.lines: list[Path] = []  # of the phase that is running

    def write(self) -> None:
        settings = {"device": self.args.device, "quick": self.args.quick, "minutes": self.args.minutes}
        report.write(self.args.output, [*self.facts, *collected(self.lines)], self.state, settings)

    def phase(self, name: str) -> None:
        """Run one phase to its end, or until its time is over."""
        seconds = share(name, self.args.only, self.deadline - time.time())
        if seconds < 1:
            self.state[name] = "no time left"
            return
        self.state[name], until = "running", time.time() + seconds
        parts = PARTS.get(name, 1) if self.args.device != "cpu" else 1
        with tempfile.TemporaryDirectory() as folder, (self.args.output / f"{name}.log").open("wb") as log:
            self.lines = [Path(folder) / f"{part}.jsonl" for part in range(parts)]
            self.children = [self.start(name, part, until, log) for part in range(parts)]
            told = 0
            while self.running() and time.time() < until + GRACE:
                time.sleep(0.2)
                told = self.say(told)
            late = self.running()
            self.stop()
            self.say(told)
            found, self.lines = collected(self.lines), []
        ended = sum(fact["kind"] == "end" for fact in found) == parts
        codes = sorted({child.returncode for child in self.children})
        self.state[name] = "complete" if ended else "out of time" if late else f"stopped with codes {codes}"
        self.facts += found
        self.write()

    def start(self, name: str, part: int, until: float, log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-u", __file__, "--phase", name, "--part", str(part), str(len(self.lines))]
        command += ["--until", str(until), "--lines", str(self.lines[part])]
        command += ["--device", self.args.device, "--output", str(self.args.output)]
        command += ["--quick"] * self.args.quick + ["--workloads", *self.args.workloads]
        variables = environment(self.args.device)
        if len(self.lines) > 1:  # each would take all cores, and wait for the others
            variables["OMP_NUM_THREADS"] = "2"
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True)

    def say(self, told: int) -> int:
        """Print and write what has come since ``told`` facts were there; how many there are now."""
        found = collected(self.lines)
        if len(found) > told:
            for fact in found[told:]:
                print(report.line(fact), flush=True)
            self.write()
        return len(found)

    def running(self) -> bool:
        return any(child.poll() is None for child in self.children)

    def stop(self) -> None:
        """End the phase that is running, with all that it started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for child in self.children:
                if child.poll() is None:
                    os.killpg(child.pid, sign)
            patience = time.time() + GRACE
            while self.running() and time.time() < patience:
                time.sleep(0.05)
        for child in self.children:  # and what outlived the process that started it
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def interrupted(self, sign: int, frame: object) -> None:
        self.stop()
        self.state = {k: "interrupted" if v == "running" else v for k, v in self.state.items()}
        self.write()
        sys.exit(1)


def collected(lines: Sequence[Path]) -> list[report.Fact]:
    """All facts of a phase, in the order in which they were told."""
    return sorted((fact for path in lines for fact in read_facts(path)), key=lambda fact: fact["at"])


def work(args: argparse.Namespace) -> None:
    """One phase, in a process of its own, which ends itself if nobody else does."""
    signal.alarm(max(1, round(args.until - time.time()) + 2 * GRACE))
    job = Job(args.phase, args.device, args.quick, args.until, args.lines, *args.part, args.workloads)
    importlib.import_module(f"on_device.{args.phase}").run(job)
    job.tell("end", args.phase)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All that needs a GPU: correctness, parity and speed.")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="FOLDER", help="where device.json and device.md go"
    )
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", choices=SHARES, default=[*SHARES], metavar="PHASE", help=", ".join(SHARES))
    parser.add_argument(
        "--workloads", nargs="*", default=[], metavar="WORD", help="of the suite, by words of their names, or: rest"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal, no measurement")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = [name for name in SHARES if name in args.only]
    if args.device == "cpu" and not args.quick:
        parser.error("on a CPU the published sizes take hours: add --quick for a rehearsal (CPUs: bench/suite.py)")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.phase:
        work(args)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    signal.signal(signal.SIGTERM, run.interrupted)
    signal.signal(signal.SIGINT, run.interrupted)
    run.write()
    for name in args.only:
        print(f"== {name}", flush=True)
        run.phase(name)
    run.write()
    print("\n" + report.summary(run.facts, run.state))
    return 0 if report.passed(run.facts, run.state) else 1


if __name__ == "__main__":
    sys.exit(main())
