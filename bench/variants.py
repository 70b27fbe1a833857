"""Score single substitutions with a ProGen2 of random weights: the wild type's prefix shared, against one by one.

    python bench/variants.py

The sizes are progen2-small's, unless told otherwise. One by one are `plm.score`, each variant alone, and GPT-J of
transformers with the same weights, one pass for each direction; likelihood.py of the original takes two, one for the
sum and one for the mean. `plm.score` of all at once shares nothing but batches. All score every substitution at a few
sites, and the scores are compared before anything is timed. A full scan shares more, for it reads the wild type once.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, one_thread, print_json, race, ratio
from peers.progen2 import SIZES, likelihood, official, peer, random_weights

import plm
from plm.loading import Model
from plm.mutations import RESIDUES, mutated, single_substitutions


def all_at_once(model: Model, wild_type: str, texts: list[str]) -> list[float]:
    own, *found = (score.total for score in plm.score(model, [wild_type, *texts]))
    return [total - own for total in found]


def measure(size: str, dtype: str, length: int, sites: int, rounds: int, tries: int) -> dict[str, object]:
    state = random_weights(SIZES[size])
    theirs = peer("GPT-J", state, SIZES[size], getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        ours = plm.load(official(state, SIZES[size], Path(folder)), dtype=dtype, device="cpu")
    random = torch.Generator().manual_seed(0)
    wild_type = "".join(RESIDUES[i] for i in torch.randint(20, (length,), generator=random))
    scan = single_substitutions(wild_type)
    names = [scan[19 * ((2 * site + 1) * length // (2 * sites)) + i] for site in range(sites) for i in range(19)]
    texts = mutated(wild_type, names)

    def one_by_one(score: Callable[[str], float]) -> list[float]:
        own = score(wild_type)
        return [score(text) - own for text in texts]

    runners: dict[str, Callable[[], list[float]]] = {
        "GPT-J, one by one": lambda: one_by_one(lambda text: likelihood(theirs, ours, text)),
        "plm.score, one by one": lambda: one_by_one(lambda text: plm.score(ours, text)[0].total),
        "plm.score, all at once": lambda: all_at_once(ours, wild_type, texts),
        "plm.variants": lambda: plm.variants(ours, wild_type, names),
    }
    outputs = {who: torch.tensor(run()) for who, run in runners.items()}  # and so every contestant is warm
    distance = max((x - outputs["plm.score, one by one"]).abs().max().item() for x in outputs.values())
    # Sums over 2 * length log-probabilities in float32, each with an error of at most 1e-6; 2e-5 in all were measured.
    assert dtype != "float32" or distance < 2 * length * 1e-6, f"the contestants disagree by {distance:.2g}"
    times = race(runners, rounds, tries)
    whole, shared = 2 * (length + 2) * len(names), (length - 1) * len(names)
    print(f"\nprogen2-{size}, {dtype}, {len(names)} substitutions of {length} residues, {rounds} rounds")
    print(f"  {shared:,} tokens and 2 x {length + 1} of the wild type, for {whole:,} of whole variants")
    print(f"  scores agree to {distance:.0e}")
    rows = {}
    for who, taken in times.items():
        speedup, low, high = ratio(taken, times["plm.variants"])
        rows[who] = {"seconds": [round(t, 3) for t in taken], "ratio": speedup, "low": low, "high": high}
        each = min(taken) / len(names)
        print(f"  {who:25s} {each * 1e3:7.1f} ms per variant   plm.variants is {speedup:5.2f}x [{low:.2f}, {high:.2f}]")
    return {"length": length, "variants": len(names), "size": size, "dtype": dtype, "tokens": shared, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Single substitutions by likelihood, with and without sharing.")
    parser.add_argument("--length", type=int, default=120)
    parser.add_argument("--sites", type=int, default=2, help="each with its 19 substitutions")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=1, help="runs at most until one is undisturbed by other programs")
    parser.add_argument("--one-thread", action="store_true", help="and its processor time, for a busy machine")
    args = parser.parse_args()
    if args.one_thread:
        one_thread()
    print(machine())
    measured = [measure(args.size, dtype, args.length, args.sites, args.rounds, args.tries) for dtype in args.dtypes]
    print_json(benchmark="variants", measured=measured)


if __name__ == "__main__":
    main()
