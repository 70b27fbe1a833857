"""Embed antibody pairs with an IgBert of random weights, strings in and one vector per pair out, against transformers.

    python bench/igbert.py

The twin has IgBert's width and a quarter of its depth (8 of 30 layers); the pairs are real antibodies. transformers is
used as the model card does, with SDPA and in batches of 8: in file order, and sorted by length ("tuned"). The vectors
are the card's (see `plm.embed`, pool "card") and are compared before anything is timed.
"""

import argparse
from collections.abc import Callable

import torch
from common import gemm_ceiling, machine, print_json, race, ratio
from peers.bert import antibodies, run_transformers, twins
from torch import Tensor

import plm


def measure(dtype: torch.dtype, count: int, layers: int, rounds: int) -> dict[str, object]:
    theirs, tokenizer, ours = twins(dtype, layers)
    pairs = antibodies(count)
    tokens = [len(heavy) + len(light) + 3 for heavy, light in pairs]
    by_length = sorted(range(count), key=lambda i: -tokens[i])
    runners: dict[str, Callable[[], list[Tensor]]] = {
        "transformers, file order": lambda: run_transformers(theirs, tokenizer, pairs, range(count)),
        "transformers tuned": lambda: run_transformers(theirs, tokenizer, pairs, by_length),
        "plm": lambda: plm.embed(ours, pairs, pool="card"),
    }
    outputs = {who: torch.stack(run()) for who, run in runners.items()}  # and so every contestant is warm
    expected = outputs["transformers tuned"]
    distance = max(((x - expected).norm() / expected.norm()).item() for x in outputs.values())
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    before = gemm_ceiling(dtype)
    times = race(runners, rounds)
    ceiling = max(before, gemm_ceiling(dtype))
    work = layers * sum(t * 24 * 1024**2 + 4 * t * t * 1024 for t in tokens)
    short = str(dtype).removeprefix("torch.")
    print(
        f"\n{short}, {count} pairs, {sum(tokens):,} tokens, {layers} layers, {rounds} rounds; agree to {distance:.0e}"
    )
    rows = {}
    for who, taken in times.items():
        speedup, low, high = ratio(taken, times["plm"])
        rows[who] = {"seconds": [round(t, 3) for t in taken], "ratio": speedup, "low": low, "high": high}
        print(
            f"  {who:25s} {count / min(taken):7.2f} pairs/s  {work / min(taken) / ceiling:4.0%} of ceiling   ", end=""
        )
        print(f"plm is {speedup:5.2f}x [{low:.2f}, {high:.2f}]")
    return {"dtype": short, "pairs": count, "layers": layers, "ceiling": ceiling, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Antibody pairs against transformers.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(machine())
    measured = [measure(getattr(torch, dtype), args.pairs, args.layers, args.rounds) for dtype in args.dtypes]
    print_json(benchmark="igbert", measured=measured)


if __name__ == "__main__":
    main()
