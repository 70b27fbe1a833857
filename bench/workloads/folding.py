"""W7: a block of ESMFold's trunk at its real sizes; a fold has 48 of them, four times."""

from functools import cache, partial

import torch
from measuring import Contest, Contestant, Run, Settings, Workload, against
from peers.fold import flops, inputs, run_ours, run_theirs, twins
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def block(settings: Settings, dtype: str, length: int) -> Contest:
    """Sequence states ``[l, 1024]`` and pair states ``[l, l, 128]`` to the same."""
    length = 12 if settings.quick else length
    precision = getattr(torch, dtype)
    theirs = cache(lambda: twins(precision)[0])

    def hub(chunk: int | None) -> Run:
        model = theirs()
        return lambda states: run_theirs(model, *states, chunk)

    def own() -> Run:
        model = twins(precision)[1]
        return lambda states: run_ours(model, *states)

    def exact(states: Pair) -> Pair:
        s, z = states
        return run_ours(twins(torch.float64)[1], s.double(), z.double())

    everyone = {
        "transformers default": Contestant(partial(hub, None), dtype),
        "transformers, chunks of 64": Contestant(partial(hub, 64), dtype),
        f"plm {dtype}": Contestant(own, dtype),
    }
    return Contest(
        contestants=everyone,
        inputs=inputs(length, precision),
        units=1,
        flops=flops(length),
        errors=against(inputs(24, precision), exact, everyone),
        notes={"residues": length},
    )


WORKLOADS = tuple(
    Workload(
        f"W7 esmfold-block {length} float32",
        f"one of 48 blocks of ESMFold's trunk at {length} residues",
        partial(block, dtype="float32", length=length),
        unit="blocks",
        minutes=1.0 if length == 256 else 0.4,
        memory=length == 256,
    )
    for length in (128, 256)
)
