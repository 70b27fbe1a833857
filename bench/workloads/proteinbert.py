"""W8: global vectors and means over residues with ProteinBERT's published sizes.

The original takes part where ``PLM_BENCH_KERAS`` names a Python that has it (`bench/peers/proteinbert_keras.py`). It
pads all to 512, so it has a workload in which all do.
"""

import os
from functools import cache, partial

import torch
from inputs import proteins
from measuring import Contest, Contestant, Missing, Run, Settings, Workload, against
from peers.proteinbert import BATCH, MACS, Keras, run_naive, twins, vectors
from torch import Tensor


class Original:
    """Its vectors stay in its process, and its weights are its own random ones: it is timed and not compared."""

    def __init__(self) -> None:
        if "PLM_BENCH_KERAS" not in os.environ:
            raise Missing("PLM_BENCH_KERAS does not name a Python with tensorflow and protein-bert")
        self.peer = Keras(os.environ["PLM_BENCH_KERAS"])
        self.process = self.peer.process

    def __call__(self, sequences: list[str]) -> list[Tensor]:
        self.peer.run(sequences)
        return []

    def close(self) -> None:
        self.peer.close()


def embedding(settings: Settings, dtype: str, count: int, width: int | None) -> Contest:
    """Proteins with Swiss-Prot's lengths; with ``width`` padded to it and none longer."""
    count = 3 if settings.quick else 1000 if settings.full else count
    sequences = proteins("swiss_prot", count, min(BATCH, count // 2))
    sequences = [sequence[: 510 if width else None] for sequence in sequences]
    tokens = count * width if width else sum(len(sequence) + 2 for sequence in sequences)
    naive = cache(lambda: twins(getattr(torch, dtype)))

    def plain(tuned: bool) -> Run:
        model, own = naive()

        def run(sequences: list[str]) -> list[Tensor]:
            rows = [own.tokenizer.encode(sequence) for sequence in sequences]
            order = sorted(range(len(rows)), key=lambda i: -len(rows[i])) if tuned else range(len(rows))
            return run_naive(model, rows, order, width)

        return run

    def own(dtype: str) -> Run:
        model = twins(getattr(torch, dtype))[1]
        return lambda sequences: vectors(model, sequences, width)

    everyone = {"naive, file order": Contestant(partial(plain, False), dtype)}
    if width is None:
        everyone["naive, sorted"] = Contestant(partial(plain, True), dtype)
    elif dtype == "float32":
        everyone["original"] = Contestant(Original, dtype)
    everyone[f"plm {dtype}"] = Contestant(partial(own, dtype), dtype)
    # One length: a naive version that pads to the longest of a batch gives other numbers than a protein has alone.
    probe = ["MKTVRQERLKSIVRILERSK", "KALTARQQEVFDLIRDHISQ"]

    def errors(runs: dict[str, Run]) -> dict[str, float]:
        compared = {name: run for name, run in runs.items() if name != "original"}
        if "original" in runs:
            runs["original"](probe)
        return against(probe, own("float64"), everyone)(compared)

    return Contest(
        contestants=everyone,
        inputs=sequences,
        units=count,
        flops=2 * MACS * tokens,
        errors=errors,  # type: ignore[arg-type]
        notes={"tokens": tokens},
    )


def workload(dtype: str, width: int | None) -> Workload:
    how = f"all padded to {width}" if width else "without pads"
    return Workload(
        f"W8 proteinbert {width or 'own-lengths'} {dtype}",
        f"embed 64 random proteins with Swiss-Prot's lengths, {how}, strings in, vectors out",
        partial(embedding, dtype=dtype, count=64, width=width),
        unit="proteins",
        minutes=0.5,
    )


WORKLOADS = tuple(workload(dtype, width) for dtype in ("float32", "bfloat16") for width in (None, 512))
