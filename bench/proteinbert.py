"""Embed proteins with a ProteinBERT of published sizes and random weights, against a naive PyTorch version.

    python bench/proteinbert.py [--keras PYTHON]

The naive version is in `peers/proteinbert.py`; its vectors are compared with ours before anything is timed. Two
contests, in batches of 32:

- *all padded to 512*, as the original does, of proteins of at most 510 residues; with ``--keras`` against the original;
- *real lengths*: the naive version pads to the longest of a batch, in file order and sorted by length. Padding changes
  the numbers of a ProteinBERT, so it does not give what a protein has alone, which ours does.
"""

import argparse
from collections.abc import Callable, Mapping

import torch
from common import gemm_ceiling, machine, print_json, proteins, race, ratio
from peers.proteinbert import MACS, Keras, run_naive, twins, vectors
from torch import Tensor

Runners = dict[str, Callable[[], list[Tensor]]]


def measure(dtype: torch.dtype, count: int, rounds: int, keras: Keras | None) -> list[dict[str, object]]:
    naive, model = twins(dtype)
    short = proteins(count, longest=510)  # which is all that fits into 512
    rows = [model.tokenizer.encode(sequence) for sequence in short]
    fixed: Runners = {
        "naive": lambda: run_naive(naive, rows, range(count), 512),
        "plm": lambda: vectors(model, short, 512),
    }
    expected, found = (torch.stack(run()) for run in fixed.values())
    distance = ((found - expected).norm() / expected.norm()).item()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    others: dict[str, Callable[[], object]] = {}
    if keras:
        others["original"] = lambda: keras.run(short)

    real = proteins(count, longest=10**9)
    lines = [model.tokenizer.encode(sequence) for sequence in real]
    by_length = sorted(range(count), key=lambda i: -len(lines[i]))
    own: Runners = {
        "naive, file order": lambda: run_naive(naive, lines, range(count), None),
        "naive, sorted": lambda: run_naive(naive, lines, by_length, None),
        "plm": lambda: vectors(model, real, None),
    }
    short_name, needed = str(dtype).removeprefix("torch."), sum(map(len, lines))
    padded = f"{short_name}, all padded to 512, agree to {distance:.0e}"
    return [
        race_of(padded, {**fixed, **others}, count * 512, rounds, dtype),
        race_of(f"{short_name}, real lengths", own, needed, rounds, dtype),
    ]


def race_of(
    what: str, contestants: Mapping[str, Callable[[], object]], tokens: int, rounds: int, dtype: torch.dtype
) -> dict[str, object]:
    """Times of all, and how many times as fast ours is. ``tokens`` are those that have to be computed."""
    for run in contestants.values():
        run()
    before = gemm_ceiling(dtype)
    times = race(contestants, rounds, tries=3)
    ceiling = max(before, gemm_ceiling(dtype))
    print(f"\n{what}: {tokens:,} tokens, {rounds} rounds")
    results = {}
    for who, taken in times.items():
        share, versus = 2 * MACS * tokens / min(taken) / ceiling, ratio(taken, times["plm"])
        results[who] = {"seconds": [round(t, 3) for t in taken], "share_of_ceiling": share, "ratio": versus}
        told = "{:.2f} [{:.2f}, {:.2f}]".format(*versus)
        print(f"  {who:20s} {min(taken):7.3f} s  {share:4.0%} of the ceiling, counting what is needed   plm is {told}")
    return {"what": what, "tokens": tokens, "ceiling": ceiling, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description="ProteinBERT against a naive version and, if there, the original.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--proteins", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keras", metavar="PYTHON", help="a Python with tensorflow and protein-bert")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(machine())
    keras = Keras(args.keras) if args.keras else None
    measured = [
        result
        for dtype in args.dtypes
        for result in measure(getattr(torch, dtype), args.proteins, args.rounds, keras if dtype == "float32" else None)
    ]
    print_json(benchmark="proteinbert", measured=measured)


if __name__ == "__main__":
    main()
