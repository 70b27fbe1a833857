"""Times, memory and errors at published sizes, against peers in the same process and the same run.

In order of weight, so that a run which is cut short has what matters. The targets are those of the protocol for an
H200; a miss comes with a profile of what the time went into.
"""

import gc
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import Contest, Contestant, Run, Settings, Workload, measure

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
    "W8 proteinbert", "embed 500 proteins, from strings", lambda s: protein_bert(s, 500), unit="proteins"
)
SUITE = (
    Entry(w1("esm2-650m", 256, "pkbtcFE"), 35),
    Entry(t5_workload(512), 6),
    Entry(t5_workload(1024), 6),
    Entry(t5_workload(2048), 6),
    Entry(w5("base", 64, 512, peer=False), 30),
    Entry(end_to_end("esm2-650m", 1000, peers=False), 20, True),
    Entry(end_to_end("esm2-8m", 500), 20, True),
    Entry(w1("esm2-150m", 500, "pkbtcFE"), 20),
    Entry(ankh3("W1 128", swiss_prot(128), 16, "pkbtc"), 30),
    Entry(w2("esm2-650m", (32, 512)), 10),
    Entry(end_to_end("esm2-150m", 500), 25, True),
    Entry(w5("base", 64, 144), 35),
    Entry(w5("small", 1, 512, peer=False), 12),
    Entry(MARGINALS, 12, True),
    Entry(w7(256, "bfloat16"), 8),
    Entry(w7(512, "bfloat16"), 8),
    Entry(w4(1024), 15),
    Entry(W8, 15, True),
    Entry(w1("esm2-8m", 1000, "pkbtcFEe"), 15),
    Entry(w2("esm2-650m", (8, 256)), 8),
    Entry(w2("esm2-650m", (4, 2048)), 8),
    Entry(w2("esm2-650m", (1, 350)), 8),
    Entry(w2("esm2-150m", (8, 256)), 6),
    Entry(ankh3("8x1024", [1024] * 8, 8, "pkt"), 20),
    Entry(w1("esm2-650m", 32, "pfd", "bfloat16"), 25),
    Entry(w5("base", 1, 128), 25),
    Entry(w5("small", 64, 512, peer=False), 15),
    Entry(w7(256, "float32"), 10),
)  # fmt: skip
TARGETS = (
    Target("W1 esm2-650m device-only 256", "ceiling", 0.65),
    Target("W1 esm2-650m device-only 256", "transformers tuned", 1.5),
    Target("W1 esm2-650m device-only 256", "transformers common", 4.0),
    Target("W1 esm2-650m end-to-end 1000", "speed", 347_800),
    *(Target(f"T5 attention {length}", "SDPA with the bias at hand", 2.0) for length in (512, 1024, 2048)),
    Target("W5 progen2-base 64x512", "speed", 32_000),
    Target("W1 esm2-150m end-to-end 500", "transformers tuned", 5.0),
    Target("W1 esm2-8m end-to-end 500", "transformers tuned", 20.0),
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
    for entry in SUITE:
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
    inputs = prepared[0].inputs
    for who, work in runs.items():
        if who in result["contestants"]:
            result["contestants"][who]["peak_mib"] = peak(work, inputs) if job.on_gpu else None
    faults = wrong(result)
    job.tell(
        "race", name, ok=not faults, took=time.time() - began, result=result,
        **({"error": "; ".join(faults)} if faults else {}),
    )  # fmt: skip
    for who, why in result["missing"].items():
        job.tell("missing", f"{name}: {who}", why=why)
    shares = profile(runs["plm"], inputs) if job.on_gpu and "plm" in runs and not job.quick else {}
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


@torch.inference_mode()
def peak(work: Callable[[Any], object], inputs: Any) -> float:
    """MiB that a run takes at its peak beyond what lay on the device before: weights and inputs of all."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.inference_mode()
def profile(work: Callable[[Any], object], inputs: Any) -> dict[str, Any]:
    """Which kernels the device's time goes into, and the share of the time in which it has any."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    seconds = once(lambda: work(inputs))
    try:
        with profiler(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            work(inputs)
            torch.cuda.synchronize()
        events = [each for each in seen.key_averages() if each.device_time_total > 0]
    except Exception as error:  # profilers need rights that some machines do not give
        return {"kernels": f"no profile: {type(error).__name__}"}
    events.sort(key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in events)
    if not total:
        return {}
    top = [f"{each.key[:60]} {each.self_device_time_total / total:.0%} ({each.count}x)" for each in events[:8]]
    return {
        "busy": min(1.0, total / 1e6 / seconds),
        "kernels": "; ".join(top),
        "launches": sum(e.count for e in events),
    }


def judge(job: Job, target: Target, result: Mapping[str, Any], shares: Mapping[str, Any]) -> None:
    """Whether a target was reached; if not, by how much and what the time goes into."""
    own = result["contestants"]["plm"]
    if target.of == "ceiling":
        found, wanted, text = own["of_ceiling"], f"at least {target.least:.0%} of the ceiling of products", "{:.0%}"
    elif target.of == "speed":
        found, wanted, text = own["speed"], f"at least {target.least:,.0f} {result['unit']}/s", "{:,.0f}"
    elif target.of == "seconds":
        found, wanted, text = own["median"], f"at most {target.least} s", "{:.3g} s"
    else:
        interval = own["ratios"].get(target.of)
        found, wanted, text = interval and interval[0], f"at least {target.least} times {target.of}", "{:.2f}"
    if found is None:
        job.tell("target", target.workload, wanted=wanted, found="not measured", why="")
        return
    reached = found <= target.least if target.of == "seconds" else found >= target.least
    gap = found / target.least if target.of == "seconds" else target.least / found
    told = text.format(found) + (", reached" if reached else f", missed by a factor of {gap:.2f}")
    busy = f"the device is busy {shares['busy']:.0%} of the time; " if "busy" in shares else ""
    why = "" if reached else busy + str(shares.get("kernels", "no profile"))
    job.tell("target", target.workload, wanted=wanted, found=told, reached=reached, why=why)
