"""W3: effects of mutations. All single substitutions by masked marginals, and some by likelihood with ProGen2."""

from functools import partial
from random import Random
from typing import Any

import torch
from arithmetic import flops
from inputs import protein
from measuring import Contest, Contestant, Run, Settings, Workload, against
from peers.esm import config_of, published, transformers_masked
from peers.progen2 import SIZES, likelihood, peer
from torch import Tensor

import plm
from plm.mutations import mutated, single_substitutions
from workloads.writing import TINY, weights

Scan = tuple[str, list[str]]
"""A wild type and names of its substitutions."""


def masked(settings: Settings, model: str, dtype: str, length: int) -> Contest:
    """One pass for each residue, which alone is hidden."""
    length = 12 if settings.quick else length
    folder, wild_type = published(model, settings.quick), protein(length, Random(2))
    probe = protein(10, Random(3))

    def hub() -> Run:
        scores = transformers_masked(folder, dtype)
        return lambda scan: [torch.tensor(scores(*scan))]

    def own(dtype: str) -> Run:
        net = plm.load(folder, dtype=dtype, device="cpu")
        return lambda scan: [torch.tensor(plm.variants(net, *scan, how="masked-marginals"))]

    everyone = {
        "transformers tuned": Contestant(hub, dtype),
        f"plm {dtype}": Contestant(partial(own, dtype), dtype),
    }
    return Contest(
        contestants=everyone,
        inputs=(wild_type, single_substitutions(wild_type)),
        units=19 * length,
        flops=flops(config_of(model, settings.quick), [length + 2] * length),
        errors=against((probe, single_substitutions(probe)), lambda scan: own("float64")(scan), everyone),
        notes={"residues": length, "passes": length},
    )


def by_likelihood(settings: Settings, dtype: str, length: int) -> Contest:
    """The 19 substitutions of the middle residue; plm reads once what a variant shares with the wild type."""
    size, length = (TINY, 12) if settings.quick else (SIZES["small"], length)
    wild_type = protein(length, Random(2))

    def scan(wild_type: str) -> Scan:
        middle = 19 * (len(wild_type) // 2)
        return wild_type, single_substitutions(wild_type)[middle : middle + 19]

    def one_by_one(score: Any) -> Run:
        def run(scan: Scan) -> list[Tensor]:
            own, *found = (score(text) for text in (scan[0], *mutated(*scan)))
            return [torch.tensor(found) - own]

        return run

    def gptj() -> Run:
        theirs = peer("GPT-J", weights(size)[0], size, getattr(torch, dtype))
        model = plm.load(weights(size)[1], dtype=dtype, device="cpu")
        return one_by_one(lambda text: likelihood(theirs, model, text))

    def whole() -> Run:
        model = plm.load(weights(size)[1], dtype=dtype, device="cpu")
        return one_by_one(lambda text: plm.score(model, text)[0].total)

    def own(dtype: str) -> Run:
        model = plm.load(weights(size)[1], dtype=dtype, device="cpu")
        return lambda scan: [torch.tensor(plm.variants(model, *scan))]

    everyone = {
        "GPT-J, one by one": Contestant(gptj, dtype),
        "whole variants, one by one": Contestant(whole, dtype),
        f"plm {dtype}": Contestant(partial(own, dtype), dtype),
    }
    return Contest(
        contestants=everyone,
        inputs=scan(wild_type),
        units=19,
        errors=against(scan(protein(12, Random(3))), lambda some: own("float64")(some), everyone),
        notes={"residues": length, "variants": 19},
    )


WORKLOADS = (
    Workload(
        "W3 esm2-8m masked-marginals float32",
        "score all single substitutions of a protein of 198 residues by masked marginals",
        partial(masked, model="esm2-8m", dtype="float32", length=198),
        unit="variants",
        minutes=0.9,
    ),
    Workload(
        "W3 progen2-small likelihood float32",
        "score the 19 substitutions of a residue of a protein of 60 by likelihood in both directions",
        partial(by_likelihood, dtype="float32", length=60),
        unit="variants",
        ceiling=None,
        minutes=0.8,
    ),
)
