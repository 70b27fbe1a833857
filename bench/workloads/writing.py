"""W5: writing with ProGen2, from a prompt of 16 tokens, with everything that could end a text banned.

A step reads every matrix once, so nobody writes faster than the memory's speed over their bytes: that is the ceiling.
Keys and values are not counted.
"""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import scratch
from measuring import Contest, Contestant, Run, Settings, Workload, relative
from peers.progen2 import BYTES, SIZES, Kind, Size, hub_writer, official, own_writer, peer, prompts, random_weights
from torch import Tensor

import plm
from plm.packing import Packed

PROMPT = 16
PEERS: tuple[tuple[Kind, str], ...] = tuple(
    (kind, dtype) for kind in ("GPT-J", "CodeGen") for dtype in ("float32", "bfloat16")
)
OWN = ("float32", "bfloat16", "int8")
TINY = Size(2, 128, 4, 32)


@cache
def weights(size: Size) -> tuple[dict[str, Tensor], Path]:
    """Random tensors by GPT-J's names, and the official folder of them."""
    state = random_weights(size)
    folder = scratch() / f"progen2-{size.n_layer}-{size.n_embd}"
    if not folder.exists():
        folder.mkdir()
        official(state, size, folder)
    return state, folder


class HubWriter:
    """GPT-J or CodeGen of transformers."""

    def __init__(self, kind: Kind, dtype: str, size: Size, new: int) -> None:
        self.model, self.new = peer(kind, weights(size)[0], size, getattr(torch, dtype)), new

    def __call__(self, inputs: tuple[list[list[int]], int]) -> Tensor:
        rows, samples = inputs
        return hub_writer(self.model, rows, self.new, samples)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Of all tokens of a text ``[t]`` but the first."""
        logits = self.model(ids[None]).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


class OwnWriter:
    """plm."""

    def __init__(self, dtype: str, size: Size, new: int) -> None:
        self.model, self.new = plm.load(weights(size)[1], dtype=dtype, device="cpu"), new

    def __call__(self, inputs: tuple[list[list[int]], int]) -> Any:
        rows, samples = inputs
        return torch.tensor([sample.ids for sample in own_writer(self.model, rows, self.new, samples)])

    def log_probs(self, ids: Tensor) -> Tensor:
        logits = self.model.net(Packed.from_ids([ids])).logits[:-1].double()
        return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def texts(settings: Settings, size: str, way: str, batch: int, new: int) -> Contest:
    """``batch`` texts: greedy, of as many prompts; or samples of one prompt."""
    shape, new = (TINY, 8) if settings.quick else (SIZES[size], 512 if settings.full else new)
    samples = batch if way == "samples" else 1
    rows = prompts(batch // samples, PROMPT)

    def errors(runs: Mapping[str, Run]) -> dict[str, float]:
        """Log-probabilities of the text that plm writes in float32, which GPT-J has to write as well."""
        written = {name: run((rows[:1], 1)) for name, run in runs.items()}  # and so all are warm
        assert torch.equal(written["GPT-J float32"], written["plm float32"]), "the texts differ"
        text = written["plm float32"][0]
        exact = OwnWriter("float64", shape, new).log_probs(text)
        return {name: relative([run.log_probs(text)], [exact]) for name, run in runs.items()}  # type: ignore[attr-defined]

    everyone: dict[str, Contestant] = {}
    for kind, dtype in PEERS:
        build: Any = partial(HubWriter, kind, dtype, shape, new)
        everyone[f"{kind} {dtype}"] = Contestant(build, dtype, new * shape.matrices * BYTES[dtype])
    for dtype in OWN:
        build = partial(OwnWriter, dtype, shape, new)
        everyone[f"plm {dtype}"] = Contestant(build, dtype, new * shape.matrices * BYTES[dtype])
    return Contest(
        contestants=everyone,
        inputs=(rows, samples),
        units=batch * new,
        errors=errors,
        notes={"prompt": PROMPT, "new tokens": new, "numbers in matrices": shape.matrices},
    )


WORKLOADS = (
    Workload(
        "W5 progen2-small batch-1",
        "write one text of 64 new tokens, greedy",
        partial(texts, size="small", way="prompts", batch=1, new=64),
        unit="tokens",
        ceiling="read",
        minutes=1.3,
    ),
    Workload(
        "W5 progen2-small batch-16",
        "write 16 samples of one prompt, 32 new tokens each",
        partial(texts, size="small", way="samples", batch=16, new=32),
        unit="tokens",
        ceiling="read",
        minutes=1.3,
    ),
)
