"""Embed 300 yeast proteins with the small model that ships with plm, and draw them: what `make demo` runs.

    python examples/demo.py --output demo

Writes `yeast.safetensors` (one mean-pooled vector per protein) and `yeast.png` (their two principal components,
coloured by the share of charged residues, which the first component follows).
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import plm
from plm.outputs import open_writer
from plm.sequences import read_records

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROTEINS = Path(__file__).with_name("data") / "yeast_300.fasta.gz"


def charged_share(sequence: str) -> float:
    """Share of residues that are charged at neutral pH, of either sign."""
    return sum(sequence.count(letter) for letter in "DEKR") / len(sequence)


def principal_components(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components ``[b, 2]`` of vectors ``[b, c]``, and each one's share of variance ``[2]``."""
    centred = x - x.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    variances = values**2
    return left[:, :2] * values[:2], variances[:2] / variances.sum()


def draw(path: Path, points: Tensor, shares: Tensor, charged: list[float], title: str) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 5.4), layout="constrained")
    dots = axes.scatter(*points.T.tolist(), c=charged, cmap="viridis", s=22, linewidths=0)
    figure.colorbar(dots, ax=axes, label="share of charged residues (D, E, K, R)", format="{x:.0%}")
    axes.set(xlabel=f"PC 1 ({shares[0]:.0%} of variance)", ylabel=f"PC 2 ({shares[1]:.0%})", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed 300 yeast proteins and draw them.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the two files")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    records = read_records(str(PROTEINS)).records
    sequences = [record.sequence for record in records]
    model = plm.load("plm-mini")
    start = time.perf_counter()
    vectors = plm.embed(model, sequences, pool="mean")
    seconds = time.perf_counter() - start

    target = folder / "yeast.safetensors"
    origin = model.checkpoint
    provenance = {"plm": plm.__version__, "model": origin.name, "sha256": origin.sha256(), "pooling": "mean"}
    lengths = [len(sequence) for sequence in sequences]
    with open_writer(
        target, ids=[record.id for record in records], lengths=lengths, channels=len(vectors[0]), pooled=True,
        layer=model.net.config.layers, provenance=provenance, overwrite=True,
    ) as writer:  # fmt: skip
        for i, vector in enumerate(vectors):
            writer.write(i, vector)

    points, shares = principal_components(torch.stack(vectors))
    title = f"{len(records)} yeast proteins, {origin.name} (mean over residues)"
    draw(folder / "yeast.png", points, shares, [charged_share(sequence) for sequence in sequences], title)

    residues = sum(lengths)
    print(
        f"{len(records)} proteins, {residues:,} residues in {seconds:.1f} s ({residues / seconds:,.0f} residues/s) "
        f"on {model.device} in {str(model.dtype).removeprefix('torch.')} with {origin.name}"
    )
    print(f"wrote {target} and {folder / 'yeast.png'}")


if __name__ == "__main__":
    main()
