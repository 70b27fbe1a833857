"""W1 and W2: embeddings with ESM-2, of proteins of all lengths and of one length."""

from collections.abc import Mapping
from functools import partial
from random import Random
from typing import Any

from arithmetic import flops
from inputs import padded, protein, proteins
from measuring import Contest, Contestant, Run, Settings, Workload, against
from peers.esm import BATCH, config_of, embedders, exact, published, transformers_tokenizer

from plm.vocabularies import esm_tokenizer

PROBE = (20, 33, 47)  # residues of the proteins whose vectors are compared with float64
MIXED = "float32-bfloat16"
TOKENIZER = esm_tokenizer()


def swiss_prot(
    settings: Settings, model: str, dtype: str, count: int, ways: tuple[str, ...], own: tuple[str, ...]
) -> Contest:
    """``count`` proteins with Swiss-Prot's lengths; all 1,000 on a GPU, or if that is asked for."""
    count = 3 if settings.quick else 1000 if settings.full or settings.device == "cuda" else count
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


def w1(model: str, dtype: str, count: int, ways: str, own: str, **how: Any) -> Workload:
    what = "embed random proteins with Swiss-Prot's lengths, strings in, mean vectors out"
    names = {"ways": tuple(ways.split()), "own": tuple(own.split())}
    return Workload(
        f"W1 {model} {dtype}",
        what,
        partial(swiss_prot, model=model, dtype=dtype, count=count, **names),
        devices=("cpu", "cuda"),
        **how,
    )


def w2(model: str, dtype: str, shape: tuple[int, int], minutes: float) -> Workload:
    prepare = partial(uniform, model=model, dtype=dtype, shape=shape, ways=("tuned",), own=(dtype,))
    name = "{}x{}".format(*shape)
    what = f"embed {name} tokens: no pads, so packing gives nothing"
    return Workload(f"W2 {model} {name} {dtype}", what, prepare, minutes=minutes, devices=("cpu", "cuda"))


def tokenizers(settings: Settings) -> Contest:
    """Residues to ids: shown separately, because it may take longer than the model."""
    sequences = proteins("swiss_prot", 8 if settings.quick else None)

    def hub() -> Run:
        tokenizer = transformers_tokenizer()
        return lambda sequences: tokenizer(sequences)["input_ids"]

    def fair() -> Run:
        import esm

        alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
        return lambda sequences: [alphabet.encode(sequence) for sequence in sequences]

    def own() -> Run:
        return lambda sequences: [TOKENIZER.residues(sequence) for sequence in sequences]

    def errors(runs: Mapping[str, Run]) -> dict[str, float]:
        ids = {
            name: [[i for i in row if i > 3] for row in run(sequences)] for name, run in runs.items()
        }  # residues alone
        assert all(each == ids["plm"] for each in ids.values()), "the ids differ"
        return dict.fromkeys(ids, 0.0)

    everyone = {"transformers": Contestant(hub), "fair-esm": Contestant(fair), "plm": Contestant(own)}
    return Contest(everyone, sequences, sum(map(len, sequences)), errors=errors, notes={"proteins": len(sequences)})


WORKLOADS = (
    Workload(
        "W1 tokenizer", "token ids of 1,000 proteins with Swiss-Prot's lengths", tokenizers, ceiling=None, minutes=0.6
    ),
    w1("esm2-8m", "float32", 32, "default tuned fair-esm", "float32", minutes=0.7),
    w1("esm2-8m", "bfloat16", 32, "default common tuned fair-esm", f"bfloat16 {MIXED}", minutes=1.4, memory=True),
    w1("esm2-150m", "float32", 16, "default tuned", "float32", minutes=2.6),
    w1("esm2-150m", "bfloat16", 16, "common tuned", f"bfloat16 {MIXED}", minutes=2.8),
    w1("esm2-650m", "bfloat16", 4, "tuned", f"bfloat16 {MIXED}", minutes=2.0),
    w2("esm2-8m", "bfloat16", (8, 256), 0.3),
    w2("esm2-150m", "bfloat16", (1, 350), 0.4),
    w2("esm2-150m", "bfloat16", (4, 256), 0.5),
    w2("esm2-150m", "bfloat16", (1, 2048), 0.8),
)
