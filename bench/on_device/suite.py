"""Times, memory and errors at published sizes, against peers in the same process and the same run.

In order of weight, so that a run which is cut short has what matters; what does not fit beside the other phases waits
for a call of its own. The targets are those of the protocol for an H200; a miss comes with a profile of what the time
went into.
"""

import gc
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import (
    Contest,
    Contestant,
    Run,
    Settings,
    Workload,
    device_peak,
    measure,
    operations,
    without_gradients,
)
from reporting import below

from on_device.contests import wrong
from on_device.encoders import ankh3, device_workload, end_to_end, marginals, protein_bert, swiss_prot, w1, w2, w4
from on_device.job import Job
from on_device.others import t5_workload, w5, w7
from on_device.timing import once
from plm_kernels import backends


@dataclass(frozen=True)
class Entry:
    """A workload, and about how many seconds it takes on an H200: it does not begin with less left."""

    workload: Workload
    seconds: float
    end_to_end: bool = False  # timed by the clock, with what the host does


@dataclass(frozen=True)
class Target:
    """``least``: how many times as fast as ``of``; or of "ceiling" the share, of "speed" the units per second, of
    "seconds" how many at most."""

    workload: str
    of: str
    least: float


MARGINALS = device_workload(
    "masked marginals 198", "all substitutions of 198 residues", lambda s: marginals(s, 198), unit="variants"
)
W8 = device_workload(
    "W8 proteinbert", "embed 256 proteins, from strings", lambda s: protein_bert(s, 256), unit="proteins"
)
SUITE = (
    # The targets of the project,
    Entry(w1("esm2-650m", 256, "pkbtcFE"), 35),
    Entry(t5_workload(512), 6),
    Entry(t5_workload(1024), 6),
    Entry(t5_workload(2048), 6),
    Entry(w5("base", 64, 512, peer=False), 30),
    # those of the protocol,
    Entry(end_to_end("esm2-650m", 500, peers=False), 14, True),
    Entry(end_to_end("esm2-8m", 256), 12, True),
    Entry(ankh3("W1 128", swiss_prot(128), 16, "pkt"), 20),
    Entry(ankh3("8x1024", [1024] * 8, 8, "pkt"), 16),
    Entry(end_to_end("esm2-150m", 256), 14, True),
    Entry(MARGINALS, 12, True),
    Entry(w7(512, "bfloat16"), 8),
    Entry(w7(256, "float32"), 8),
    Entry(w4(512), 10),
    # and what each of the other workloads has first.
    Entry(w1("esm2-150m", 256, "pktcFE"), 16),
    Entry(w5("small", 1, 512, peer=False), 12),
    Entry(W8, 10, True),
    Entry(w2("esm2-650m", (32, 512)), 10),
)  # fmt: skip
"""What fits into nine minutes beside the other phases, by these estimates."""
REST = (
    Entry(w5("base", 64, 144), 35),
    Entry(w1("esm2-8m", 1000, "pkbtcFEe"), 15),
    Entry(w2("esm2-650m", (8, 256)), 8),
    Entry(w2("esm2-650m", (4, 2048)), 8),
    Entry(w2("esm2-650m", (1, 350)), 8),
    Entry(w2("esm2-150m", (8, 256)), 6),
    Entry(w7(256, "bfloat16"), 8),
    Entry(w1("esm2-650m", 32, "pfd", "bfloat16"), 25),
    Entry(w5("base", 1, 128), 25),
    Entry(w5("small", 64, 512, peer=False), 15),
)  # fmt: skip
"""What a second call runs: ``--only suite --workloads rest``."""
STARTING = 10  # seconds, roughly, in which the suite's process imports what it needs
TARGETS = (
    Target("W1 esm2-650m device-only 256", "ceiling", 0.65),
    Target("W1 esm2-650m device-only 256", "transformers tuned", 1.5),
    Target("W1 esm2-650m device-only 256", "transformers common", 4.0),
    Target("W1 esm2-650m end-to-end 500", "speed", 347_800),
    *(Target(f"T5 attention {length}", "SDPA with the bias at hand", 2.0) for length in (512, 1024, 2048)),
    Target("W5 progen2-base 64x512", "speed", 32_000),
    Target("W1 esm2-150m end-to-end 256", "transformers tuned", 5.0),
    Target("W1 esm2-8m end-to-end 256", "transformers tuned", 20.0),
    Target("ankh3-large encoder W1 128", "transformers tuned", 2.0),
    Target("ankh3-large encoder 8x1024", "transformers tuned", 3.0),
    Target("W4 igbert pairs", "transformers tuned", 1.5),
    Target("masked marginals 198", "seconds", 0.12),
    Target("W7 esmfold block 256 float32", "transformers", 3.0),
    Target("W7 esmfold block 512 bfloat16", "transformers", 3.0),
)


def run(job: Job) -> None:
    torch.set_grad_enabled(False)
    device = "cuda" if job.on_gpu else "cpu"
    settings = Settings(device=device, quick=job.quick, rounds=1 if job.quick else None)
    chosen, left_out = asked(job.workloads)
    for entry in left_out:
        job.tell(
            "missing", entry.workload.name, why="needs a call of its own: --only suite --workloads rest --output OTHER"
        )
    for word in unknown(job.workloads):
        job.tell("check", f"--workloads {word}", ok=False, error=f"no workload has this word: {', '.join(names())}")
    for entry in chosen:
        name = entry.workload.name
        if not job.quick and job.left() < entry.seconds:
            job.tell("missing", name, why=f"{job.left():.0f} s were left, and it takes about {entry.seconds:.0f}")
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            job.attempt("race", name, lambda entry=entry: contest(job, entry, settings))
        for told in {str(each.message) for each in said if each.category.__module__.startswith("plm")}:
            job.tell("warning", name, why=told)
        gc.collect()
        if job.on_gpu:
            torch.cuda.empty_cache()
    if broken := dict(backends.broken()):
        job.tell(
            "check",
            "every kernel works in the suite",
            ok=False,
            error="; ".join(f"{k}: {v}" for k, v in broken.items()),
        )


def asked(words: Sequence[str]) -> tuple[list[Entry], list[Entry]]:
    """Workloads to run, by words of their names ("rest": all of `REST`), and what a call without words leaves out."""
    if not words:
        return [*SUITE], [*REST]
    found = [each for each in (*SUITE, *REST) if {*each.workload.name.split()} & {*words}]
    return found + [each for each in REST if "rest" in words and each not in found], []


def unknown(words: Sequence[str]) -> list[str]:
    known = {"rest", *(word for name in names() for word in name.split())}
    return [word for word in words if word not in known]


def names() -> list[str]:
    return [each.workload.name for each in (*SUITE, *REST)]


def contest(job: Job, entry: Entry, settings: Settings) -> None:
    """Measure one workload, then what memory each takes, the targets, and a profile of ours."""
    began, name, runs = time.time(), entry.workload.name, {}
    prepared: list[Contest] = []

    def prepare(settings: Settings) -> Contest:
        found = entry.workload.prepare(settings)
        contestants = {who: watched(runs, who, each) for who, each in found.contestants.items()}
        prepared.append(replace(found, contestants=contestants))
        return prepared[0]

    timer = {} if entry.end_to_end else {"timer": once}
    result = measure(replace(entry.workload, prepare=prepare), settings, memory=False, **timer)
    works = {who: without_gradients(run, prepared[0].inputs) for who, run in runs.items()}
    for who, row in result["contestants"].items():
        row["peak_mib"] = device_peak(works[who]) if job.on_gpu else None
    faults = wrong(result)
    job.tell(
        "race", name, ok=not faults, took=time.time() - began, result=result,
        **({"error": "; ".join(faults)} if faults else {}),
    )  # fmt: skip
    for who, why in result["missing"].items():
        job.tell("missing", f"{name}: {who}", why=why)
    shares = profile(works["plm"]) if job.on_gpu and "plm" in works and not job.quick else {}
    if shares:
        job.tell("profile", name, **shares)
    for target in TARGETS:
        if target.workload == name and not job.quick and "plm" in result["contestants"]:
            judge(job, target, result, shares)


def watched(runs: dict[str, Run], name: str, contestant: Contestant) -> Contestant:
    """The same, which leaves what it built in ``runs``."""

    def build() -> Run:
        runs[name] = contestant.build()
        return runs[name]

    return replace(contestant, build=build)


def profile(work: Callable[[], object]) -> dict[str, Any]:
    """Which kernels the device's time goes into, and the share of the time in which it has any."""
    seconds = once(work)
    try:
        found = operations(work, "cuda")
    except Exception as error:  # profilers need rights that some machines do not give
        return {"kernels": f"no profile: {type(error).__name__}"}
    total = sum(taken for _, taken, _ in found)
    if not total:
        return {}
    top = [f"{name[:60]} {taken / total:.0%} ({count}x)" for name, taken, count in found[:8]]
    return {
        "busy": min(1.0, total / seconds),
        "kernels": "; ".join(top),
        "launches": sum(count for _, taken, count in found if taken),
    }


def judge(job: Job, target: Target, result: Mapping[str, Any], shares: Mapping[str, Any]) -> None:
    """Whether a target was reached, which the median decides; if not, by how much and what the time goes into."""
    own, remark = result["contestants"]["plm"], ""
    if target.of == "ceiling":
        found, wanted, text = own["of_ceiling"], f"at least {target.least:.0%} of the ceiling of products", "{:.0%}"
    elif target.of == "speed":
        found, wanted, text = own["speed"], f"at least {target.least:,.0f} {result['unit']}/s", "{:,.0f}"
    elif target.of == "seconds":
        found, wanted, text = own["median"], f"at most {target.least} s", "{:.3g} s"
    else:
        found, low, _ = own["ratios"].get(target.of, (None, 0.0, 0.0))
        wanted, text, remark = f"at least {target.least} times {target.of}", "{:.2f}", below(low, target.least)
    if found is None:
        job.tell("target", target.workload, wanted=wanted, found="not measured", why="")
        return
    reached = found <= target.least if target.of == "seconds" else found >= target.least
    gap = found / target.least if target.of == "seconds" else target.least / found
    told = text.format(found) + (f", reached{remark}" if reached else f", missed by a factor of {gap:.2f}")
    busy = f"the device is busy {shares['busy']:.0%} of the time; " if "busy" in shares else ""
    why = "" if reached else busy + str(shares.get("kernels", "no profile"))
    job.tell("target", target.workload, wanted=wanted, found=told, reached=reached, why=why)
