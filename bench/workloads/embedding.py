"""W1 and W2: embeddings with ESM-2, of proteins of all lengths and of one length."""

from functools import partial
from random import Random

from inputs import padded, protein, proteins
from measuring import Contest, Settings, Workload, against
from peers.esm import BATCH, config_of, embedders, exact, flops, published

PROBE = (20, 33, 47)  # residues of the proteins whose vectors are compared with float64
MIXED = "float32-bfloat16"


def swiss_prot(
    settings: Settings, model: str, dtype: str, count: int, ways: tuple[str, ...], own: tuple[str, ...]
) -> Contest:
    """``count`` proteins with Swiss-Prot's lengths; all 1,000 if that is asked for."""
    count = 3 if settings.quick else 1000 if settings.full else count
    sequences = proteins("swiss_prot", count, BATCH)
    if settings.quick:
        sequences = [sequence[:40] for sequence in sequences]
    return contest(settings, model, dtype, sequences, ways, own)


def uniform(
    settings: Settings, model: str, dtype: str, shape: tuple[int, int], ways: tuple[str, ...], own: tuple[str, ...]
) -> Contest:
    """So many proteins of so many tokens, start and end included."""
    count, tokens = (2, 20) if settings.quick else shape
    rng = Random(0)
    return contest(settings, model, dtype, [protein(tokens - 2, rng) for _ in range(count)], ways, own)


def contest(
    settings: Settings, model: str, dtype: str, sequences: list[str], ways: tuple[str, ...], own: tuple[str, ...]
) -> Contest:
    folder, rng = published(model, settings.quick), Random(1)
    contestants = embedders(folder, dtype, ways=ways, own=own, device=settings.device)
    tokens = [len(sequence) + 2 for sequence in sequences]
    return Contest(
        contestants=contestants,
        inputs=sequences,
        units=sum(map(len, sequences)),
        flops=flops(config_of(model, settings.quick), tokens),
        errors=against([protein(length, rng) for length in PROBE], exact(folder), contestants),
        notes={
            "proteins": len(sequences),
            "tokens": sum(tokens),
            "tokens with pads": padded(tokens),
            "with pads if sorted": padded(sorted(tokens)),
        },
    )


def w1(model: str, dtype: str, count: int, ways: str, own: str, **how: float) -> Workload:
    what = f"embed {count} random proteins with Swiss-Prot's lengths, strings in, mean vectors out"
    prepare = partial(
        swiss_prot, model=model, dtype=dtype, count=count, ways=tuple(ways.split()), own=tuple(own.split())
    )
    return Workload(f"W1 {model} {dtype}", what, prepare, **how)  # type: ignore[arg-type]


def w2(model: str, dtype: str, shape: tuple[int, int], **how: float) -> Workload:
    prepare = partial(uniform, model=model, dtype=dtype, shape=shape, ways=("tuned",), own=(dtype,))
    name = "{}x{}".format(*shape)
    what = f"embed {name} tokens: no pads, so packing gives nothing"
    return Workload(f"W2 {model} {name} {dtype}", what, prepare, unit="residues", **how)  # type: ignore[arg-type]


WORKLOADS = (
    w1("esm2-8m", "float32", 48, "default tuned fair-esm", "float32"),
    w1("esm2-8m", "bfloat16", 48, "default common tuned fair-esm", f"bfloat16 {MIXED}"),
    w1("esm2-150m", "float32", 16, "default tuned fair-esm", "float32"),
    w1("esm2-150m", "bfloat16", 16, "common tuned", f"bfloat16 {MIXED}"),
    w1("esm2-650m", "bfloat16", 8, "common tuned", f"bfloat16 {MIXED}"),
    w2("esm2-8m", "bfloat16", (8, 256)),
    w2("esm2-150m", "float32", (1, 350)),
    w2("esm2-150m", "bfloat16", (1, 350)),
    w2("esm2-150m", "bfloat16", (8, 256)),
    w2("esm2-150m", "bfloat16", (1, 2048)),
)
