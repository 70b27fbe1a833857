"""Random proteins with the lengths of real ones; as a program it writes the lengths, `lengths.json`.

    python bench/inputs.py

Lengths follow published quantiles, residues the composition of Swiss-Prot, so that no data licence is needed and anyone
makes the same inputs. Swiss-Prot: quantiles of a random subset of 500 entries. ProteinGym: quantiles of its 217
substitution assays. Antibodies: 256 sequences as in esm-cpp's own benchmark, mean 126 and at most 249 tokens with start
and end, most of them single variable domains and some of two.
"""

import json
import random
from functools import cache
from itertools import pairwise
from math import exp, log
from pathlib import Path

LENGTHS = Path(__file__).with_name("lengths.json")

# Share of proteins that are at most so long. The ends, which are not published, are set.
SWISS_PROT = {
    0.0: 30, 0.01: 57, 0.05: 83, 0.10: 109, 0.25: 180, 0.50: 293, 0.75: 426, 0.90: 617, 0.95: 839, 0.99: 1423,
    1.0: 2200,
}  # fmt: skip
PROTEINGYM = {0.0: 37, 0.25: 69, 0.50: 245, 0.75: 536, 0.90: 856, 1.0: 3423}

# Per cent, as UniProtKB/Swiss-Prot publishes them with each release.
COMPOSITION = {
    "A": 8.25, "R": 5.53, "N": 4.06, "D": 5.46, "C": 1.38, "Q": 3.93, "E": 6.72, "G": 7.07, "H": 2.27, "I": 5.91,
    "L": 9.65, "K": 5.80, "M": 2.41, "F": 3.86, "P": 4.74, "S": 6.65, "T": 5.36, "W": 1.10, "Y": 2.92, "V": 6.86,
}  # fmt: skip


def at_quantile(quantiles: dict[float, int], share: float) -> int:
    """The length below which lies ``share`` of all, interpolated between logarithms."""
    for (low, shorter), (high, longer) in pairwise(quantiles.items()):
        if share <= high:
            return round(exp(log(shorter) + (share - low) / (high - low) * log(longer / shorter)))
    raise ValueError(f"share must be from 0 to 1; got {share}")


def antibody_lengths(count: int = 256) -> list[int]:
    """Variable domains of 105 to 131 residues, and every 19th with a second one."""
    rng = random.Random(0)
    domains = [rng.triangular(105, 131, 119) for _ in range(count)]
    return [min(247, round(each + (rng.uniform(108, 125) if i % 19 == 0 else 0))) for i, each in enumerate(domains)]


def all_lengths() -> dict[str, list[int]]:
    """Sorted lengths by name."""
    return {
        "swiss_prot": [at_quantile(SWISS_PROT, (i + 0.5) / 1000) for i in range(1000)],
        "proteingym": [at_quantile(PROTEINGYM, (i + 0.5) / 217) for i in range(217)],
        "antibodies": sorted(antibody_lengths()),
    }


@cache
def stored() -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(LENGTHS.read_text())
    return found


def lengths(name: str, count: int | None = None, group: int = 1) -> list[int]:
    """``count`` lengths spread over the sorted ones (None: all), in an arbitrary but fixed order.

    They are taken in groups of ``group`` neighbours, so that whoever sorts and pads batches of that size has as few
    pads as with all of them.
    """
    every = stored()[name]
    count = len(every) if count is None else count
    groups = max(1, count // group)
    starts = [int((i + 0.5) * len(every) / groups) - group // 2 for i in range(groups)]
    found = [every[start + i] for start in starts for i in range(min(group, count))]
    random.Random(count).shuffle(found)
    return found


def protein(length: int, rng: random.Random) -> str:
    return "".join(rng.choices([*COMPOSITION], [*COMPOSITION.values()], k=length))


def proteins(name: str, count: int | None = None, group: int = 1) -> list[str]:
    """Random proteins of these lengths, the same each time."""
    rng = random.Random(0)
    return [protein(length, rng) for length in lengths(name, count, group)]


def padded(tokens: list[int], size: int = 8) -> int:
    """Tokens with the pads of batches of ``size`` in the given order."""
    return sum(len(some) * max(some) for some in (tokens[i : i + size] for i in range(0, len(tokens), size)))


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in all_lengths().items()]
    LENGTHS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
