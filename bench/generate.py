"""Writing with ProGen2 against transformers' ``generate``: tokens per second, and their share of what memory allows.

    python bench/generate.py
    python bench/generate.py --device cuda --sizes small medium xlarge --dtypes bfloat16 --cuda-graphs on

The published sizes with random weights (`peers/progen2.py`); a prompt of 16 tokens and 128 new ones, which nothing may
end. One text; 16 prompts, greedy; and 16 samples of one prompt. transformers has GPT-J and CodeGen, with their cache:

- "default": GPT-J in float32, as its model card has it;
- "tuned": of GPT-J and CodeGen the faster one in each dtype (there is no SDPA for them), and of these the fastest.

"The original's way" is what users of the hub's ports get: in transformers since 4.40 the original's code computes a
cache and never uses it, so every step reads the whole text again. It is timed as GPT-J without a cache, which does not
compute one in vain and makes its rotary tables once, so the original itself is slower. One text, two rounds.

plm writes without ``likelihood``, as the others do not score. Before anything is timed, in float32: the greedy texts
must be the same, token by token, and the log-probabilities of samples those that GPT-J gives.

Each matrix is read once per step, so no program writes faster than the memory's speed over their bytes (of a text's own
dtype; keys and values not counted): that share is printed.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import copy_ceiling, machine, one_thread, print_json, race, ratio, read_ceiling, seconds
from peers.progen2 import (
    BYTES,
    PEERS,
    SIZES,
    Kind,
    Size,
    hub_writer,
    official,
    own_writer,
    peer,
    prompts,
    random_weights,
)

import plm

WAYS = ("prompts", "samples")


def graph_settings(device: str, choice: str | None) -> dict[str, bool]:
    """The argument of ``plm.generate`` that ``--cuda-graphs`` stands for; none where nothing was chosen.

    Raises: ValueError on a CPU, which has no graphs.
    """
    if choice is None:
        return {}
    if device == "cpu":
        raise ValueError("--cuda-graphs is for --device cuda")
    return {"cuda_graphs": choice == "on"}


class Contestants:
    """Everyone who writes with one size."""

    def __init__(self, size: Size, dtypes: Sequence[str], device: str, how: dict[str, Any]) -> None:
        state = random_weights(size)
        with tempfile.TemporaryDirectory() as folder:
            official(state, size, Path(folder))
            self.ours = {dtype: plm.load(folder, dtype=dtype, device=device) for dtype in dtypes}
        self.theirs = {
            (kind, dtype): peer(kind, state, size, getattr(torch, dtype), device)
            for dtype in dtypes
            if dtype != "int8"
            for kind in PEERS
        }
        self.how = how

    def tuned(self, rows: list[list[int]]) -> dict[str, Kind]:
        """The faster of GPT-J and CodeGen in each dtype, by the better of two short runs each."""
        times = {
            key: min(seconds(lambda m=m: hub_writer(m, rows, 8, 1)) for _ in "12") for key, m in self.theirs.items()
        }
        found: dict[str, Kind] = {}
        for (kind, dtype), taken in times.items():
            if dtype not in found or taken < times[found[dtype], dtype]:
                found[dtype] = kind
        return found

    def check(self, rows: list[list[int]], new: int, samples: int) -> dict[str, float]:
        """Write once with each of ours. What it has in common with GPT-J in float32, or in its own dtype if that is not
        among the dtypes: the share of greedy tokens, or how much the log-probabilities of samples differ at most.

        Raises: AssertionError if they do not agree in float32.
        """
        found = {}
        dtype = "float32" if ("GPT-J", "float32") in self.theirs else next(dtype for _, dtype in self.theirs)
        theirs = self.theirs["GPT-J", dtype]
        wanted = hub_writer(theirs, rows, new, 1) if samples == 1 else None
        for name, ours in self.ours.items():
            written = own_writer(ours, rows, new, samples, **self.how)
            ids = torch.tensor([sample.ids for sample in written], device=theirs.device)
            if wanted is not None:
                found[name] = (ids == wanted)[:, -new:].double().mean().item()
                assert name != "float32" or found[name] == 1, f"only {found[name]:.1%} of the tokens are the same"
            else:
                with torch.inference_mode():
                    logits = theirs(ids).logits[:, -new - 1 : -1].float()
                log_probs = logits.log_softmax(-1).gather(-1, ids[:, -new:, None])[..., 0].cpu()
                own = torch.stack([sample.log_probs for sample in written])
                found[name] = (log_probs - own).abs().max().item()
                # float32 sums over 1,024 channels in two orders were off by 5e-6 at most in the tests' live oracle.
                assert name != "float32" or found[name] < 5e-5, f"log-probabilities differ by {found[name]:.1e}"
        return found


def measure(
    everyone: Contestants, size: Size, batch: int, way: str, args: argparse.Namespace, speed: float
) -> dict[str, object]:
    """Race them at one batch size and print who is how fast."""
    samples = batch if way == "samples" else 1
    rows = prompts(batch // samples, args.prompt)
    same = everyone.check(rows, args.new, samples)
    tuned = everyone.tuned(rows * samples)
    chosen = {(kind, dtype) for dtype, kind in tuned.items()} | ({("GPT-J", "float32")} & set(everyone.theirs))
    work: dict[str, Callable[[], object]] = {
        f"{kind} {dtype}": lambda m=everyone.theirs[kind, dtype]: hub_writer(m, rows, args.new, samples)
        for kind, dtype in sorted(chosen)
    }
    peers = list(work)
    for dtype, model in everyone.ours.items():
        work[f"plm {dtype}"] = lambda model=model: own_writer(model, rows, args.new, samples, **everyone.how)
    times = race(work, args.rounds, args.tries)
    fastest = min(peers, key=lambda name: sorted(times[name])[len(times[name]) // 2])
    against = {"tuned": fastest, "default": "GPT-J float32"}
    what = "greedy" if samples == 1 else f"samples of {len(rows)} prompt"
    print(f"\n{batch} texts, {what}; {args.rounds} rounds; tuned is {fastest}")
    tokens = {name: batch * args.new / min(taken) for name, taken in times.items()}
    ratios: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, best in tokens.items():
        kind, dtype = name.split()
        bound = speed / (size.matrices * BYTES[dtype])  # steps per second at which every matrix is read once
        print(f"  {name:18s} {best:8,.1f} tokens/s, {best / batch / bound:4.0%} of the bandwidth bound", end="")
        if kind == "plm":
            equal = f"{tuned[dtype]} {dtype}" if dtype in tuned else None
            others = {**against, "the same dtype": equal}
            ratios[name] = {label: ratio(times[who], times[name]) for label, who in others.items() if who in times}
            for label, (middle, low, high) in ratios[name].items():
                print(f"; {middle:.2f} [{low:.2f}, {high:.2f}] x {label}", end="")
            print(f"; {same[dtype]:.1%} the same" if samples == 1 else f"; log p within {same[dtype]:.1e}", end="")
        print()
    return {
        "batch": batch, "way": way, "tuned": fastest, "tokens_per_second": tokens, "ratios": ratios, "agree": same,
    }  # fmt: skip


def without_cache(everyone: Contestants, args: argparse.Namespace) -> dict[str, object]:
    """One text in the first dtype, against the original's way."""
    rows, dtype = prompts(1, args.prompt), next(dtype for _, dtype in everyone.theirs)
    theirs, ours = everyone.theirs["GPT-J", dtype], everyone.ours[dtype]
    work: dict[str, Callable[[], object]] = {
        "no cache": lambda: hub_writer(theirs, rows, args.new, 1, cached=False),
        "plm": lambda: own_writer(ours, rows, args.new, 1, **everyone.how),
    }
    times = race(work, 2, args.tries)
    middle, low, high = ratio(times["no cache"], times["plm"])
    tokens = {name: args.new / min(taken) for name, taken in times.items()}
    print(f"\n1 text, {dtype}, the original's way (no cache): {tokens['no cache']:,.1f} tokens/s; ", end="")
    print(f"plm {tokens['plm']:,.1f}; {middle:.1f} [{low:.1f}, {high:.1f}] x")
    return {"dtype": dtype, "tokens_per_second": tokens, "ratio": middle, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description="ProGen2 against transformers' generate.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--dtypes", nargs="+", choices=BYTES, default=["float32", "bfloat16", "int8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=16, help="tokens, the terminal included")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=1, help="runs at most until one is undisturbed by other programs")
    parser.add_argument("--one-thread", action="store_true", help="and its processor time, for a busy machine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cuda-graphs", choices=("on", "off"))
    args = parser.parse_args()
    if args.one_thread:
        one_thread()
    how = graph_settings(args.device, args.cuda_graphs)
    speed, copied = read_ceiling(device=args.device), copy_ceiling(device=args.device)
    print(machine())
    print(f"memory: {speed / 1e9:.1f} GB/s read, {copied / 1e9:.1f} GB/s copied (read and written)")
    measured = []
    for name in args.sizes:
        size = SIZES[name]
        everyone = Contestants(size, args.dtypes, args.device, how)
        print(f"\nprogen2-{name}: {size.matrices / 1e6:,.0f} M numbers in matrices")
        runs = [(batch, way) for batch in args.batches for way in WAYS if batch > 1 or way == "prompts"]
        found = [measure(everyone, size, batch, way, args, speed) for batch, way in runs]
        measured.append({"size": name, "races": found, "without_cache": without_cache(everyone, args)})
    print_json(benchmark="generate", measured=measured, read=speed, copy=copied, prompt=args.prompt, new=args.new)


if __name__ == "__main__":
    main()
