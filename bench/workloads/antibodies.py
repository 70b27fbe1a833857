"""esm-cpp's own workload: logits of single antibody-like sequences with ESM-2, on one core and on all."""

import os
from functools import partial

from arithmetic import flops
from inputs import proteins
from measuring import Contest, Settings, Workload, against
from peers.esm import config_of, published
from peers.esm_cpp import contestants, exact

OWN = ("float32", "bfloat16", "float32-bfloat16")


def logits(settings: Settings, model: str, count: int, threads: int) -> Contest:
    """``count`` of the 256 sequences, spread over their lengths; all if that is asked for."""
    count = 3 if settings.quick else 256 if settings.full else count
    sequences, config = proteins("antibodies", count), config_of(model, settings.quick)
    folder = published(model, settings.quick)
    tokens = [len(sequence) + 2 for sequence in sequences]
    everyone = contestants(folder, OWN, threads)
    head = 2 * (config.channels + 33) * config.channels
    return Contest(
        contestants=everyone,
        inputs=sequences,
        units=sum(tokens),
        flops=flops(config, tokens) + head * sum(tokens),
        errors=against(proteins("antibodies", 2), exact(folder), everyone),
        notes={"sequences": len(sequences), "tokens": sum(tokens), "longest": max(tokens)},
    )


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workload(model: str, count: int, label: str, minutes: float, memory: bool = False) -> Workload:
    threads = 1 if label == "one-thread" else CORES
    what = f"logits of {count} of esm-cpp's 256 antibody-like sequences (mean 127 tokens), strings in"
    prepare = partial(logits, model=model, count=count, threads=threads)
    name = f"antibodies {model} {label}"
    return Workload(name, what, prepare, unit="tokens", minutes=minutes, threads=threads, memory=memory)


WORKLOADS = (
    workload("esm2-8m", 256, "all-threads", 1.0),
    workload("esm2-8m", 64, "one-thread", 0.6),
    workload("esm2-150m", 16, "all-threads", 1.5, memory=True),
    workload("esm2-150m", 8, "one-thread", 0.9),
    workload("esm2-650m", 2, "all-threads", 1.1),
    workload("esm2-650m", 2, "one-thread", 1.1),
)
