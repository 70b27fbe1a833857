"""What plm costs before it works and while it works: import time, and peak memory against protein length.

    python bench/footprint.py

Import time is the difference between `import torch` and `import plm` with its public names resolved, each in fresh
processes that run in turn. Memory is the peak resident set of a process that embeds one protein with ESM-2 8M's shape
(random weights, float32), less that of one that embeds ten residues.
"""

import argparse
import statistics
import subprocess
import sys

from common import machine, print_json

IMPORTS = {
    "torch": "import torch",
    "plm": "import plm; plm.load, plm.embed, plm.Packed",
    "transformers": "from transformers import EsmModel, EsmTokenizer",
}
PEAK = """
import resource, random, sys, torch
from plm.loading import Model, Origin
from plm.models.esm import ESM, Config
from plm.vocabularies import esm_tokenizer
import plm
torch.manual_seed(0)
net = ESM(Config(6, 320, 20, 1280, None, False, True, 1e-5)).eval()
model = Model(net, esm_tokenizer(), Origin("esm2-8m", "esm", "random weights", None, (), "", ""))
protein = "".join(random.Random(0).choices("LAGVSERTIDPKQNFYMHWC", k=int(sys.argv[1])))
plm.embed(model, protein)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


def import_seconds(code: str) -> float:
    return float(run(f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Import time and peak memory.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 5000, 10000, 20000])
    args = parser.parse_args()
    print(machine())
    for code in IMPORTS.values():
        import_seconds(code)  # once to fill the file cache
    seconds = {name: [import_seconds(code) for name_, code in IMPORTS.items() if name_ == name] for name in IMPORTS}
    for _ in range(args.rounds - 1):
        for name, code in IMPORTS.items():
            seconds[name].append(import_seconds(code))
    more = {name: [a - b for a, b in zip(times, seconds["torch"], strict=True)] for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"import {name:12s} {statistics.median(times):6.2f} s, {statistics.median(more[name]):+.2f} s over torch")
    base = float(run(PEAK, "10"))
    peaks = {length: float(run(PEAK, str(length))) - base for length in args.lengths}
    for length, megabytes in peaks.items():
        print(
            f"{length:7,} residues: {megabytes:8.1f} MiB at the peak, {1024 * megabytes / length:.1f} KiB per residue"
        )
    print_json(benchmark="footprint", import_seconds=seconds, base_mib=base, peak_mib=peaks)


if __name__ == "__main__":
    main()
