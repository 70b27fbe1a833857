"""The encoder of an Ankh3-shaped T5 against transformers, at one length after the other; and its memory.

    python bench/t5_encoder.py                                    # times, both dtypes
    python bench/t5_encoder.py --memory                           # peak memory, and bench/t5_memory.png

Token ids in, hidden states out, so that no tokenizer is timed. All sequences of a batch have the same length: nothing
is padded, and sorting could not help. transformers runs eager attention (all that it had for T5 until 2026) and SDPA
("tuned"); plm runs batches of its default size. Before anything is timed, all outputs are compared.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from arithmetic import flops
from common import gemm_ceiling, machine, print_json, race, ratio
from peers.t5 import WAYS, contestant, twins

PLOT = Path(__file__).with_name("t5_memory.png")


def measure(dtype: torch.dtype, length: int, batch: int, width: int, layers: int, rounds: int) -> dict[str, object]:
    theirs, ours = twins(dtype, width, layers, 1)
    ids = torch.randint(3, 23, (batch, length))
    runners = {way: contestant(way, theirs, ours, ids) for way in WAYS}
    outputs = {way: run().float() for way, run in runners.items()}  # and so every contestant is warm
    expected = outputs["transformers tuned"]
    distance = max(((x - expected).norm() / expected.norm()).item() for x in outputs.values())
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    before = gemm_ceiling(dtype)
    times = race(runners, rounds)
    ceiling = max(before, gemm_ceiling(dtype))
    short = str(dtype).removeprefix("torch.")
    print(f"\n{short}, {batch} x {length} tokens, {rounds} rounds; all agree to {distance:.0e}")
    rows = {}
    for way, taken in times.items():
        speedup, low, high = ratio(taken, times["plm"])
        share = flops(ours.net.config, [length] * batch) / min(taken) / ceiling
        rows[way] = {
            "seconds": [round(t, 3) for t in taken],
            "ratio": speedup,
            "low": low,
            "high": high,
            "share": share,
        }
        print(f"  {way:20s} {batch * length / min(taken):8,.0f} tokens/s  {share:4.0%} of ceiling   ", end="")
        print(f"plm is {speedup:5.2f}x [{low:.2f}, {high:.2f}]")
    return {"dtype": short, "length": length, "batch": batch, "width": width, "layers": layers, "results": rows}


def peak(way: str, length: int, dtype: torch.dtype) -> None:
    """Print the MiB that encoding one sequence takes at its peak. To be run in a process of its own, on Linux."""
    theirs, ours = twins(dtype, 768, 2, 1)
    contestant(way, theirs, ours, torch.randint(3, 23, (1, 16)))()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of building the models
    before = resident("VmRSS")
    contestant(way, theirs, ours, torch.randint(3, 23, (1, length)))()
    print((resident("VmHWM") - before) / 1024)


def resident(what: str) -> int:
    """KiB of this process now (VmRSS) or at the most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def memory(lengths: list[int], dtype: str) -> dict[str, dict[int, float]]:
    """MiB of each way at each length, each in a fresh process; and the picture of it."""
    found: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for way in WAYS:
        for length in lengths:
            command = [sys.executable, __file__, "--peak", way, "--lengths", str(length), "--dtypes", dtype]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[way][length] = float(told.splitlines()[-1])
        print(f"{way:20s}", "  ".join(f"{length}: {mib:,.0f} MiB" for length, mib in found[way].items()))
    draw(found, dtype)
    return found


def draw(found: dict[str, dict[int, float]], dtype: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for way, colour in zip(WAYS, ("tab:red", "tab:orange", "tab:blue"), strict=True):
        axes.plot([*found[way]], [*found[way].values()], "o-", color=colour, label=way)
    lengths = [*found["plm"]]
    last = found["plm"][lengths[-1]]
    axes.plot(lengths, [last * x / lengths[-1] for x in lengths], ":", color="grey", label="proportional to length")
    axes.set(
        xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="memory beyond the weights (MiB)",
        title=f"Encoding one sequence, Ankh3-shaped twin of 768 channels, {dtype}",
    )  # fmt: skip
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Encoder of an Ankh3-shaped T5 against transformers.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=4096, help="per batch of transformers")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak, args.lengths[0], getattr(torch, args.dtypes[0]))
    if args.memory:
        found = memory([256, 512, 1024, 2048, 4096, 8192], args.dtypes[0])
        return print_json(benchmark="t5_memory", dtype=args.dtypes[0], mib=found)
    print(machine())
    runs = [(getattr(torch, dtype), length) for dtype in args.dtypes for length in args.lengths]
    measured = [
        measure(dtype, length, max(1, args.tokens // length), args.width, args.layers, args.rounds)
        for dtype, length in runs
    ]
    return print_json(benchmark="t5_encoder", measured=measured)


if __name__ == "__main__":
    main()
