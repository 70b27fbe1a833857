"""W4: antibody pairs with IgBert's shape, strings in and the model card's vector per pair out."""

from functools import cache, partial

import torch
from measuring import Contest, Contestant, Run, Settings, Workload, against
from peers.bert import Pairs, antibodies, run_transformers, twins
from torch import Tensor

import plm

PROBE: Pairs = [("EVQLVESGGGLVQPGG", "DIQMTQSPSSLSAS"), ("QVQLQESGPG", "EIVLTQSPATLS")]


def embedding(settings: Settings, dtype: str, count: int) -> Contest:
    """Real antibodies; all 24 that there are if that is asked for."""
    layers = 2 if settings.quick else 30
    pairs = antibodies(2 if settings.quick else 24 if settings.full else count)
    tokens = [len(heavy) + len(light) + 3 for heavy, light in pairs]

    theirs = cache(lambda: twins(getattr(torch, dtype), layers)[:2])

    def hub(tuned: bool) -> Run:
        model, tokenizer = theirs()

        def run(pairs: Pairs) -> list[Tensor]:
            order = sorted(range(len(pairs)), key=lambda i: -len("".join(pairs[i]))) if tuned else range(len(pairs))
            return run_transformers(model, tokenizer, pairs, order)

        return run

    def own(dtype: str) -> Run:
        model = twins(getattr(torch, dtype), layers)[2]
        return lambda pairs: plm.embed(model, pairs, pool="card")

    everyone = {
        "transformers common" if dtype == "bfloat16" else "transformers default": Contestant(
            partial(hub, False), dtype
        ),
        "transformers tuned": Contestant(partial(hub, True), dtype),
        f"plm {dtype}": Contestant(partial(own, dtype), dtype),
    }
    return Contest(
        contestants=everyone,
        inputs=pairs,
        units=len(pairs),
        flops=layers * sum(t * 24 * 1024**2 + 4 * t * t * 1024 for t in tokens),
        errors=against(PROBE, lambda pairs: own("float64")(pairs), everyone),
        notes={"layers": layers, "tokens": sum(tokens)},
    )


WORKLOADS = tuple(
    Workload(
        f"W4 igbert {dtype}",
        f"embed {count} antibody pairs of about 240 tokens, strings in, vectors out",
        partial(embedding, dtype=dtype, count=count),
        unit="pairs",
        minutes=1.4,
    )
    for dtype, count in (("float32", 4), ("bfloat16", 8))
)
