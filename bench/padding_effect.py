"""Draw how much a ProteinBERT's pads change its embeddings, to `padding_effect.png`.

    python bench/padding_effect.py [--model NAME] [--fasta FILE] [--proteins 60]

Every protein is embedded on its own length, and padded to 512 and to 1,024 tokens. What is drawn is the distance of the
padded embedding from the own one against the share of pads: of the global vector, and of the residues' rows. The dashed
line is the median distance between two different proteins, or residues of them, on their own lengths: what a distance
is worth.

Without ``--model`` the weights are random, drawn as Keras draws them for a model that is to be trained: the figure then
shows what the architecture does with pads, not what training made of it.
"""

import argparse
import random
from itertools import pairwise
from pathlib import Path

import torch
from common import PROTEINS
from torch import Tensor

import plm
from plm.loading import Origin
from plm.models.proteinbert import Config, ProteinBERT
from plm.sequences import read_records
from plm.vocabularies import proteinbert_tokenizer

PLOT = Path(__file__).with_name("padding_effect.png")
PUBLISHED = Config(26, 8943, layers=6, channels=128, global_channels=512, heads=4, key_size=64)
LENGTHS = {512: "tab:blue", 1024: "tab:orange"}  # of the original's own episodes


@torch.no_grad()
def random_model(seed: int = 0) -> plm.Model:
    """The published sizes, initialised as Keras does it: Glorot's uniform numbers, zero biases, norms that do nothing.

    Of a weight with three axes, Keras takes the first for the size of a window.
    """
    net = ProteinBERT(PUBLISHED)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        outputs, inputs, *window = weight.shape
        fans = (inputs + outputs) * (window[0] if window else 1)
        if ".attention." in name:  # all heads lie in the rows
            fans = inputs * PUBLISHED.heads + outputs
        limit = 0.05 if name == "embed.weight" else (6 / fans) ** 0.5
        weight.copy_(limit * (2 * torch.rand(weight.shape, generator=generator) - 1))
    origin = Origin("random weights", "proteinbert", "random", None, (), "none", "none")
    return plm.Model(net.requires_grad_(False).eval(), proteinbert_tokenizer(), origin)


def distances(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Relative L2 of all rows together, and the mean cosine distance of the rows, of ``b`` from ``a`` ``[n, c]``."""
    return float((a - b).norm() / a.norm()), float(1 - torch.cosine_similarity(a, b).mean())


def embeddings(model: plm.Model, sequences: list[str], pad_to: int | None = None) -> dict[str, list[Tensor]]:
    """Rows ``[n, c]`` of each protein: one of the whole, and one per residue."""
    both = plm.embed(model, sequences, pool="global", pad_to=pad_to)
    return {"global vector": [x[None] for x in both], "residue rows": plm.embed(model, sequences, pad_to=pad_to)}


def measure(model: plm.Model, sequences: list[str]) -> tuple[dict[str, dict[int, Tensor]], dict[str, Tensor]]:
    """For each kind of rows and padded length ``[proteins, 3]``: share of pads, relative L2, cosine distance; and for
    each kind the median relative L2 and cosine distance between different proteins."""
    own = embeddings(model, sequences)
    found: dict[str, dict[int, Tensor]] = {kind: {} for kind in own}
    for pad_to in LENGTHS:
        fitting = [i for i, sequence in enumerate(sequences) if len(sequence) <= pad_to - 2]
        padded = embeddings(model, [sequences[i] for i in fitting], pad_to)
        for kind, rows in padded.items():
            shares = [1 - (len(sequences[i]) + 2) / pad_to for i in fitting]
            pairs = zip(shares, [distances(own[kind][i], x) for i, x in zip(fitting, rows, strict=True)], strict=True)
            found[kind][pad_to] = torch.tensor([(share, *each) for share, each in pairs])
    between = {}
    for kind, each in own.items():
        cut = [(a[: len(b)], b[: len(a)]) for a, b in pairwise(each)]
        between[kind] = torch.tensor([distances(a, b) for a, b in cut]).median(0).values
    return found, between


def draw(found: dict[str, dict[int, Tensor]], between: dict[str, Tensor], subtitle: str) -> None:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(8.4, 6), sharex=True, sharey="row", layout="constrained")
    for column, (kind, by_length) in enumerate(found.items()):
        for row, what in enumerate(("relative L2 distance", "cosine distance")):
            axes = grid[row, column]
            for pad_to, numbers in by_length.items():
                axes.scatter(
                    100 * numbers[:, 0], numbers[:, 1 + row], s=14, alpha=0.8, linewidths=0, color=LENGTHS[pad_to],
                    label=f"padded to {pad_to:,}",
                )  # fmt: skip
            axes.axhline(
                float(between[kind][row]), color="0.4", linestyle="--", linewidth=1, label="between two proteins"
            )
            axes.set(xlim=(-2, 102), ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(f"{what}\nfrom the own length")
            if row == 0:
                axes.set_title(kind, fontsize=11)
            else:
                axes.set_xlabel("pads, % of all tokens")
    grid[0, 0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(subtitle, fontsize=11)
    figure.savefig(PLOT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="What padding does to ProteinBERT's embeddings.")
    parser.add_argument("--model", help="a name, folder or file that plm.load takes; without it, random weights")
    parser.add_argument("--fasta", default=str(PROTEINS))
    parser.add_argument("--proteins", type=int, default=60)
    asked = parser.parse_args()
    model = plm.load(asked.model) if asked.model else random_model()
    known = set("ACDEFGHIKLMNPQRSTUVWXY")
    read = [record.sequence for record in read_records(asked.fasta).records]
    fitting = [sequence for sequence in read if len(sequence) <= max(LENGTHS) - 2 and set(sequence) <= known]
    sequences = random.Random(0).sample(fitting, min(asked.proteins, len(fitting)))
    left = len(read) - len(fitting)
    print(f"{len(sequences)} of {len(read)} proteins, drawn without {left} that are too long or have other letters")
    found, between = measure(model, sequences)
    for kind, by_length in found.items():
        for pad_to, numbers in by_length.items():
            share, l2, cosine = numbers.median(0).values.tolist()
            told = f"median of {len(numbers)} proteins, {share:.0%} pads: relative L2 {l2:.3f}, cosine {cosine:.4f}"
            print(f"{kind}, padded to {pad_to}: {told}")
        l2, cosine = between[kind].tolist()
        print(f"{kind} of two proteins: relative L2 {l2:.3f}, cosine {cosine:.4f}")
    weights = model.checkpoint.name if asked.model else "random weights of the published sizes"
    draw(found, between, f"What pads change in a ProteinBERT: {weights}, {len(sequences)} proteins")


if __name__ == "__main__":
    main()
