"""Masked-residue perplexity of a checkpoint on proteins it has not seen, beside two baselines.

    python examples/measure.py plm-mini --held-out yeast_proteome.fasta.gz --train chains.fasta.gz more.fasta.gz

This gives the numbers of plm-mini's model card. In every protein of up to 1,022 residues a fixed 15 % of the residues
are hidden behind <mask>. Perplexity is exp of the mean negative log-likelihood per hidden residue: 20 for a model that
knows nothing. The second baseline predicts the amino-acid frequencies of the training chains; its distance from the
model is given with its standard error over proteins.
"""

import argparse
import math
from pathlib import Path

import torch
from pretrain import RESIDUES, TOKENIZER, logits_of, mask, read_chains, without_relatives

import plm
from plm.packing import batches


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity on held-out proteins.")
    parser.add_argument("model")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="files for the frequency baseline")
    args = parser.parse_args()
    proteins = read_chains([args.held_out])
    chains = without_relatives(read_chains(args.train), proteins)
    counts = torch.bincount(
        torch.frombuffer(bytearray(TOKENIZER.residues("".join(chains))), dtype=torch.uint8), minlength=33
    )
    frequencies = (counts[RESIDUES] / counts[RESIDUES].sum()).log()

    net = plm.load(args.model).net
    rows = [row for row in map(TOKENIZER.residues, proteins) if len(row) <= 1022]
    generator = torch.Generator().manual_seed(0)
    models, baselines, hidden = [], [], []  # per protein: negative log-likelihoods summed, and how many
    for group in batches([len(row) + 2 for row in rows], 8192):
        masked = mask(TOKENIZER.pack_residues([rows[i] for i in group]), generator, only_mask=True)
        with torch.inference_mode():
            log_probabilities = logits_of(net, masked).log_softmax(-1)
        own = -log_probabilities.gather(1, masked.labels[:, None])[:, 0]
        protein = masked.batch.sequence[masked.chosen]
        for values, sums in (
            (own, models),
            (-frequencies[masked.labels - 4], baselines),
            (torch.ones_like(own), hidden),
        ):
            sums.append(torch.zeros(len(group)).index_add_(0, protein, values))
    model, baseline, count = (torch.cat(sums).double() for sums in (models, baselines, hidden))

    gain = (baseline.sum() - model.sum()) / count.sum()
    error = (baseline - model - gain * count).square().sum().sqrt() / count.sum()
    print(f"{len(rows)} held-out proteins, {int(count.sum())} hidden residues")
    print(f"perplexity: uniform 20.00, frequencies {math.exp(baseline.sum() / count.sum()):.2f}, ", end="")
    print(f"{args.model} {math.exp(model.sum() / count.sum()):.2f}")
    print(f"the model is better by {gain:.4f} ± {error:.4f} nats per residue ({gain / error:.0f} standard errors)")
    print(f"better in {(model < baseline).double().mean():.0%} of the proteins")


if __name__ == "__main__":
    main()
