"""Train a small ESM-2 from scratch on protein FASTA files, as `plm-mini` was made.

    python examples/pretrain.py --train chains.fasta.gz more.fasta.gz --held-out yeast_proteome.fasta.gz --output mini

Masked language modelling with the published recipe (Devlin et al. 2019, Lin et al. 2023): of 15 % of the residues, 80 %
become <mask>, 10 % a random residue, 10 % stay; the loss is taken on those. Batches are packed, so no step computes on
padding. The result is a folder in the hub's format (config.json, model.safetensors in float16, vocab.txt, log.jsonl).

Runs are seeded, and stopping them is safe: every step draws its batch and its masks from (seed, step) alone, and
`state.pt` holds the rest. The same command continues where it was stopped.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from plm.models.esm import ESM, MASK, Config, initialise, masked_lm_loss
from plm.packing import Packed, batches
from plm.sequences import read_records
from plm.vocabularies import ESM as VOCABULARY
from plm.vocabularies import esm_tokenizer
from plm_weights import esm as published
from plm_weights import export_weights, write_safetensors

RESIDUES = torch.arange(4, 24)  # the 20 amino acids
TOKENIZER = esm_tokenizer()


# ---------------------------------------------------------------------------------------------------------- data


def read_chains(paths: Sequence[Path]) -> list[str]:
    """Distinct chains of the 20 amino acids and X, of at least 20 residues. Other letters (B, U, Z, O) become X."""
    others = str.maketrans("BUZOJ", "XXXXX")
    found: dict[str, None] = {}
    for path in paths:
        for record in read_records(str(path), on_stop="X", strip_gaps=True, empty="skip").records:
            found[record.sequence.translate(others)] = None
    return [chain for chain in found if len(chain) >= 20]


def without_relatives(chains: Sequence[str], held_out: Sequence[str], word: int = 8, share: float = 0.05) -> list[str]:
    """Chains of which fewer than ``share`` of the 8-letter words occur anywhere in the held-out proteins.

    Chance alone puts a word of 8 residues there once in ten thousand; copies and close relatives share far more.
    """
    words = {protein[i : i + word] for protein in held_out for i in range(len(protein) - word + 1)}
    return [
        chain
        for chain in chains
        if sum(chain[i : i + word] in words for i in range(len(chain) - word + 1)) < share * len(chain)
    ]


def training_batches(rows: Sequence[bytes], tokens: int, crop: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (row, start of the crop) for ever: each epoch takes the chains in a new order.

    What is left at the end of an epoch and does not fill a batch waits for the next epoch's order.
    """
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        order = list(range(len(rows)))
        rng.shuffle(order)
        batch: list[tuple[int, int]] = []
        filled = 0
        for i in order:
            length = min(len(rows[i]), crop) + 2
            if filled + length > tokens:
                yield sorted(batch, key=lambda at: len(rows[at[0]]))
                batch, filled = [], 0
            batch.append((i, rng.randint(0, max(0, len(rows[i]) - crop))))
            filled += length
        epoch += 1


@dataclass(frozen=True)
class Masked:
    """A batch with some residues hidden: ``chosen [m]`` are their places, ``labels [m]`` what stood there."""

    batch: Packed
    chosen: Tensor
    labels: Tensor


def mask(batch: Packed, generator: torch.Generator, share: float = 0.15, only_mask: bool = False) -> Masked:
    """Hide 15 % of the residues: 80 % as <mask>, 10 % as a random residue, 10 % as themselves (or all as <mask>)."""
    tokens = batch.tokens.clone()
    n = len(tokens)
    chosen = ((tokens >= 4) & (tokens < 24) & (torch.rand(n, generator=generator) < share)).nonzero()[:, 0]
    labels = tokens[chosen]
    fate = torch.rand(len(chosen), generator=generator)
    other = RESIDUES[torch.randint(len(RESIDUES), (len(chosen),), generator=generator)]
    shown = torch.where(fate < 0.8, MASK, torch.where(fate < 0.9, other, labels))
    tokens[chosen] = MASK if only_mask else shown
    return Masked(Packed(tokens, batch.lengths, batch.offsets, batch.positions), chosen, labels)


# --------------------------------------------------------------------------------------------------- loss, measures


def logits_of(net: ESM, masked: Masked) -> Tensor:
    """Logits ``[m, v]`` at the hidden residues; the head runs nowhere else."""
    assert net.lm_head is not None
    hidden: Tensor = net(masked.batch, logits=False).hidden
    logits: Tensor = net.lm_head(hidden[masked.chosen], net.embed.weight)
    return logits.float()


def held_out_batches(proteins: Sequence[str], count: int, seed: int) -> list[Masked]:
    """A fixed sample of whole held-out proteins with a fixed 15 % of their residues masked."""
    few = [p for p in proteins if len(p) <= 1022]
    few = random.Random(seed).sample(few, min(count, len(few)))
    rows = [TOKENIZER.residues(p) for p in few]
    generator = torch.Generator().manual_seed(seed)
    groups = batches([len(row) + 2 for row in rows], 8192)
    return [mask(TOKENIZER.pack_residues([rows[i] for i in group]), generator, only_mask=True) for group in groups]


@torch.no_grad()
def perplexity(net: ESM, held_out: Sequence[Masked]) -> float:
    """exp of the mean negative log-likelihood (nats, float32) of the masked residues."""
    total = sum(masked_lm_loss(logits_of(net, m), m.labels).item() * len(m.labels) for m in held_out)
    return math.exp(total / sum(len(m.labels) for m in held_out))


def frequency_perplexity(rows: Sequence[bytes], held_out: Sequence[Masked]) -> float:
    """The same of a model that always predicts the amino-acid frequencies of the training chains."""
    counts = torch.zeros(len(VOCABULARY), dtype=torch.float64)
    for row in rows:
        counts += torch.bincount(torch.frombuffer(bytearray(row), dtype=torch.uint8), minlength=len(VOCABULARY))
    frequencies = counts[RESIDUES] / counts[RESIDUES].sum()
    labels = torch.cat([m.labels for m in held_out])
    return math.exp(-frequencies.log()[labels - 4].mean().item())


# ------------------------------------------------------------------------------------------------------------ run


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def save_hub(net: ESM, folder: Path) -> None:
    """Write the network as the hub publishes ESM-2: float16 weights, float32 rotary frequencies."""
    exported = export_weights(published.hub_rows(rotary=True, contact_head=False), net.state_dict())
    for name, text in published.hub_files(asdict(net.config), "float16").items():
        (folder / name).write_text(text)
    halves = {k: v if k.endswith("inv_freq") else v.half() for k, v in exported.items()}
    write_safetensors(folder / "model.safetensors", halves, {"format": "pt"})


def save_state(path: Path, state: dict[str, object]) -> None:
    """Replace the file in one move, so that a stop at any moment leaves a whole one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(args: argparse.Namespace) -> None:
    held_out_proteins = read_chains([args.held_out])
    chains = without_relatives(read_chains(args.train), held_out_proteins)
    rows = [TOKENIZER.residues(chain) for chain in chains]
    held_out = held_out_batches(held_out_proteins, args.held_out_count, args.seed)
    print(f"{len(rows)} training chains of {sum(map(len, rows))} residues; {args.held_out_count} held-out proteins")

    config = Config(
        layers=args.layers, channels=args.channels, heads=args.heads, feed_forward=4 * args.channels,
        learned_positions=None, norm_before=False, token_dropout=True, norm_eps=1e-5,
    )  # fmt: skip
    net = ESM(config)
    initialise(net, torch.Generator().manual_seed(args.seed))
    matrices = [p for p in net.parameters() if p.dim() >= 2]
    others = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.peak, betas=(0.9, 0.98), eps=1e-8)

    args.output.mkdir(parents=True, exist_ok=True)
    state_path, log_path = args.output / "state.pt", args.output / "log.jsonl"
    start, trained_seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        start, trained_seconds = state["step"], state["seconds"]
        print(f"continuing at step {start}")

    def log(step: int, loss: float, seconds: float) -> None:
        entry = {
            "step": step,
            "loss": round(loss, 4),
            "seconds": round(seconds),
            "perplexity": perplexity(net.eval(), held_out),
        }
        net.train()
        with log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    bf16 = torch.cpu._is_amx_tile_supported() if args.dtype == "auto" else args.dtype == "bfloat16"
    uniform, frequencies = float(len(RESIDUES)), frequency_perplexity(rows, held_out)
    print(f"{sum(p.numel() for p in net.parameters())} parameters; bfloat16: {bf16}")
    print(f"held-out perplexity: uniform {uniform:.2f}, amino-acid frequencies {frequencies:.2f}")
    stream = training_batches(rows, args.batch_tokens, args.crop, args.seed)
    began, running = time.monotonic() - trained_seconds, math.nan
    for step, at in zip(range(args.steps), stream, strict=False):
        if step < start:
            continue
        batch = TOKENIZER.pack_residues([rows[i][first : first + args.crop] for i, first in at])
        masked = mask(batch, torch.Generator().manual_seed(args.seed * 1_000_003 + step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            logits = logits_of(net, masked)
        loss = masked_lm_loss(logits, masked.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if done % args.every == 0 or done == args.steps:
            seconds = time.monotonic() - began
            log(done, running, seconds)
            tensors = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_path, {**tensors, "step": done, "seconds": seconds})
    save_hub(net, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small ESM-2 from scratch.")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="FASTA files to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="FASTA file that is only ever measured on")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an unfinished run in it continues")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--every", type=int, default=250, help="steps between measurements and saved states")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--crop", type=int, default=256, help="longest stretch of a chain in one batch, residues")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=240)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--held-out-count", type=int, default=256)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
