"""Sequence completion as on Ankh3's model card, against transformers' ``generate``: tokens per second.

    python bench/complete.py

Greedy, prompts of up to 128 residues, 128 new tokens, batches of 1 and of 16 prompts of different lengths; prompts are
encoded within the time. The model is the Ankh3-shaped twin of `peers/t5.py` with random weights. The end is banned, as
on the card. In float32 both must write the same tokens.

At batch 1 every weight of the decoder is read once per token, so no program is faster than the memory allows: the share
of that bound is printed. Where the weights fit into the processor's cache, the work around each operation counts.
"""

import argparse

import torch
from common import machine, print_json, race, ratio, read_ceiling
from peers.t5 import prompts, run_generate, run_own, twins
from torch import Tensor


def measure(dtype: torch.dtype, batch: int, width: int, new: int, rounds: int) -> dict[str, object]:
    theirs, ours = twins(dtype, width, 12, 6)
    rows = prompts(batch, 128)

    def transformers() -> Tensor:
        return run_generate(theirs, rows, new)

    def own() -> Tensor:
        return torch.tensor([sample.ids for sample in run_own(ours, rows, new)])

    same = (transformers() == own()).float().mean().item()  # and so both are warm
    assert dtype != torch.float32 or same == 1, f"only {same:.1%} of the tokens are the same"
    times = race({"transformers": transformers, "plm": own}, rounds)
    speedup, low, high = ratio(times["transformers"], times["plm"])
    decoder = ours.net.need_decoder()
    weights = sum(p.numel() * p.itemsize for name, p in decoder.named_parameters() if ".kv." not in name)
    bound = read_ceiling() / weights  # steps per second at which every weight is read once from memory
    short = str(dtype).removeprefix("torch.")
    print(f"\n{short}, {batch} prompts, {width} channels, {rounds} rounds; {same:.1%} of the tokens are the same")
    tokens = {who: batch * new / min(taken) for who, taken in times.items()}
    for who, speed in tokens.items():
        print(f"  {who:14s} {speed:8,.1f} tokens/s, {speed / batch / bound:4.0%} of the bandwidth bound")
    print(f"  plm is {speedup:.2f}x [{low:.2f}, {high:.2f}]; the decoder has {weights / 1e6:.0f} MB of weights")
    return {
        "dtype": short, "batch": batch, "width": width, "new": new, "tokens_per_second": tokens, "same": same,
        "ratio": speedup, "low": low, "high": high, "bound": bound,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Completion against transformers' generate.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--widths", nargs="+", type=int, default=[384, 768])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(machine())
    runs = [(getattr(torch, d), batch, width) for width in args.widths for d in args.dtypes for batch in args.batches]
    measured = [measure(*run, args.new, args.rounds) for run in runs]
    print_json(benchmark="complete", measured=measured)


if __name__ == "__main__":
    main()
