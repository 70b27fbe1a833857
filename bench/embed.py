"""Embed real proteins with ESM-2, strings in and mean-pooled vectors out, against transformers and fair-esm.

    python bench/embed.py                                         # 8M and 150M, float32 and bfloat16, 48 proteins
    python bench/embed.py --models esm2-8m --rounds 7

Weights are random (the published shapes decide the time), and the same in all contestants, whom `peers/esm.py`
describes: before anything is timed, the vectors of all are compared. The suite runs the same with random proteins.
"""

import argparse

import torch
from arithmetic import flops
from common import copy_ceiling, gemm_ceiling, machine, print_json, proteins, race, ratio
from peers.esm import config_of, embedders, published
from torch import Tensor


def compare(results: dict[str, list[Tensor]]) -> float:
    """Largest relative distance of any contestant's vectors from those of tuned transformers."""
    expected = torch.stack(results["transformers tuned"])
    return max(((torch.stack(found) - expected).norm() / expected.norm()).item() for found in results.values())


def measure(name: str, dtype: str, count: int, rounds: int) -> dict[str, object]:
    sequences = proteins(count)
    first, own = "default" if dtype == "float32" else "common", f"plm {dtype}"
    contestants = embedders(published(name), dtype, ways=(first, "tuned", "fair-esm"), own=(dtype,))
    runs = {who: each.build() for who, each in contestants.items()}
    distance = compare({who: run(sequences) for who, run in runs.items()})  # and so every contestant is warm
    bound = 1e-4 if dtype == "float32" else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    before = gemm_ceiling(getattr(torch, dtype))
    times = race({who: lambda run=run: run(sequences) for who, run in runs.items()}, rounds)
    ceiling = max(before, gemm_ceiling(getattr(torch, dtype)))
    residues, needed = sum(map(len, sequences)), flops(config_of(name), [len(s) + 2 for s in sequences])
    print(f"\n{name}, {dtype}: {count} yeast proteins, {residues:,} residues, {rounds} rounds")
    print(f"all agree to {distance:.0e}; GEMM {ceiling / 1e9:,.0f} GFLOP/s, copy {copy_ceiling() / 1e9:.1f} GB/s")
    rows = {}
    for who, taken in times.items():
        best = min(taken)
        speedup, low, high = ratio(taken, times[own])
        rows[who] = {"seconds": [round(t, 3) for t in taken], "ratio": speedup, "low": low, "high": high}
        print(
            f"  {who:22s} {residues / best:10,.0f} residues/s  {needed / best / ceiling:4.0%} of ceiling   "
            f"plm is {speedup:5.2f}x [{low:.2f}, {high:.2f}]"
        )
    return {"model": name, "dtype": dtype, "proteins": count, "residues": residues, "ceiling": ceiling, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Embedding speed against transformers and fair-esm.")
    parser.add_argument("--models", nargs="+", default=["esm2-8m", "esm2-150m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--proteins", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    runs = [(name, dtype) for name in args.models for dtype in args.dtypes]
    print_json(benchmark="embed", measured=[measure(*run, args.proteins, args.rounds) for run in runs])


if __name__ == "__main__":
    main()
