"""Embed real proteins with ESM-2, strings in and mean-pooled vectors out, against transformers and fair-esm.

    python bench/embed.py                                         # 8M and 150M, float32 and bfloat16, 48 proteins
    python bench/embed.py --models esm2-8m --rounds 7

Weights are random (the published shapes decide the time), and the same in all contestants: before anything is timed,
the vectors of all are compared. Three ways to use transformers, as its users do:

    default   as on the model card: float32, batches of 8 in file order (SDPA is its default attention)
    common    the same in bfloat16
    tuned     batches of 8 sorted by length, in the dtype of the comparison

fair-esm runs as its own `esm-extract` batches: sorted, at most 4,096 tokens with padding.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import esm as fair_esm
import torch
from common import copy_ceiling, gemm_ceiling, machine, print_json, proteins, race, ratio
from torch import Tensor
from transformers import EsmConfig, EsmModel, EsmTokenizer

import plm
from plm.loading import Model, Origin
from plm.models.esm import ESM, Config
from plm.vocabularies import ESM as VOCABULARY
from plm.vocabularies import esm_tokenizer
from plm_weights import import_weights
from plm_weights.esm import hub_rows
from plm_weights.registry import find

Embed = Callable[[], list[Tensor]]


def by_length(sequences: Sequence[str]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))


def transformers_model(config: Config, dtype: torch.dtype) -> Any:
    """Their encoder with random weights of the published shape, seeded, and SDPA, their default."""
    torch.manual_seed(0)
    settings = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=config.channels, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=config.feed_forward, position_embedding_type="rotary",
        token_dropout=True, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    settings._attn_implementation = "sdpa"
    return EsmModel(settings, add_pooling_layer=False).eval().to(dtype)


def run_transformers(
    model: Any, tokenizer: Any, sequences: Sequence[str], order: Sequence[int], size: int = 8
) -> list[Tensor]:
    """The loop that people write: tokenize a batch, run it, average over the residues."""
    vectors: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), size):
            some = order[start : start + size]
            batch = tokenizer([sequences[i] for i in some], padding=True, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            for i, rows in zip(some, hidden, strict=True):
                vectors[i] = rows[1 : len(sequences[i]) + 1].float().mean(0)
    return [vectors[i] for i in range(len(sequences))]


def fair_model(config: Config, ours: ESM, dtype: torch.dtype) -> tuple[Any, Any]:
    """fair-esm's class, filled with the same weights."""
    alphabet = fair_esm.data.Alphabet.from_architecture("ESM-1b")
    theirs = fair_esm.model.esm2.ESM2(config.layers, config.channels, config.heads, alphabet, token_dropout=True)
    state = ours.state_dict()
    filled = theirs.state_dict()
    names = {
        "attention_norm": "self_attn_layer_norm",
        "attention.out": "self_attn.out_proj",
        "feed_forward_norm": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    }
    filled["embed_tokens.weight"] = filled["lm_head.weight"] = state["embed.weight"]
    for part in ("weight", "bias"):
        filled[f"emb_layer_norm_after.{part}"] = state[f"norm.{part}"]
        for i in range(config.layers):
            for name, tensor in zip("qkv", state[f"blocks.{i}.attention.qkv.{part}"].chunk(3), strict=True):
                filled[f"layers.{i}.self_attn.{name}_proj.{part}"] = tensor
            for mine, name in names.items():
                filled[f"layers.{i}.{name}.{part}"] = state[f"blocks.{i}.{mine}.{part}"]
    for i in range(config.layers):
        filled[f"layers.{i}.self_attn.rot_emb.inv_freq"] = state["frequencies"]
    theirs.load_state_dict(filled)
    return theirs.eval().to(dtype), alphabet.get_batch_converter()


def run_fair(model: Any, converter: Any, layers: int, sequences: Sequence[str], budget: int = 4096) -> list[Tensor]:
    """As esm-extract: sorted by length, as many as fit with padding into 4,096 tokens."""
    vectors: dict[int, Tensor] = {}
    batch: list[int] = []

    def flush() -> None:
        _, _, tokens = converter([(str(i), sequences[i]) for i in batch])
        hidden = model(tokens, repr_layers=[layers])["representations"][layers]
        for i, rows in zip(batch, hidden, strict=True):
            vectors[i] = rows[1 : len(sequences[i]) + 1].float().mean(0)
        batch.clear()

    with torch.inference_mode():
        for i in reversed(by_length(sequences)):
            if batch and (len(sequences[i]) + 1) * (len(batch) + 1) > budget:
                flush()
            batch.append(i)
        flush()
    return [vectors[i] for i in range(len(sequences))]


def flops(config: Config, sequences: Sequence[str]) -> float:
    """Multiplications and additions of the encoder: 24 c^2 per token and layer, and 4 t c per token for attention."""
    tokens = [len(s) + 2 for s in sequences]
    per_layer = 2 * (4 * config.channels + 2 * config.feed_forward) * config.channels
    return config.layers * sum(t * per_layer + 4 * t * t * config.channels for t in tokens)


def contestants(name: str, dtype: torch.dtype, sequences: Sequence[str]) -> tuple[Config, dict[str, Embed]]:
    """Every way to embed the same proteins with the same weights."""
    tokenizer = vocabulary_tokenizer()
    row = find(name)
    assert row.config is not None
    config = Config(**{**row.config, "lm_head": False, "contact_head": False})  # type: ignore[arg-type]
    tuned = transformers_model(config, dtype)
    with torch.device("meta"):
        net = ESM(config)
    rows = hub_rows(rotary=True, contact_head=False, prefix="")
    state = import_weights(rows, encoder_tensors(tuned), net.state_dict())
    net.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    model = Model(net.eval(), esm_tokenizer(), Origin(name, "esm", "random weights", None, (), "", ""))
    fair, converter = fair_model(config, net, dtype)
    file_order, sorted_order = range(len(sequences)), by_length(sequences)
    first = "default" if dtype == torch.float32 else "common"
    return config, {
        f"transformers {first}": lambda: run_transformers(tuned, tokenizer, sequences, file_order),
        "transformers tuned": lambda: run_transformers(tuned, tokenizer, sequences, sorted_order),
        "fair-esm": lambda: run_fair(fair, converter, config.layers, sequences),
        "plm": lambda: plm.embed(model, sequences, pool="mean"),
    }


def encoder_tensors(model: Any) -> dict[str, Tensor]:
    """Their state dict without what the encoder does not use, in float32 where rotary frequencies are concerned."""
    state = dict(model.state_dict())
    state.setdefault("rotary_embeddings.inv_freq", model.rotary_embeddings.inv_freq.float())
    return {name: tensor for name, tensor in state.items() if not name.startswith("contact_head")}


def compare(results: dict[str, list[Tensor]]) -> float:
    """Largest relative distance of any contestant's vectors from those of tuned transformers."""
    expected = torch.stack(results["transformers tuned"])
    return max(((torch.stack(found) - expected).norm() / expected.norm()).item() for found in results.values())


def measure(name: str, dtype: torch.dtype, count: int, rounds: int) -> dict[str, object]:
    sequences = proteins(count)
    config, runners = contestants(name, dtype, sequences)
    distance = compare({who: embed() for who, embed in runners.items()})  # and so every contestant is warm
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    before = gemm_ceiling(dtype)
    times = race(runners, rounds)
    ceiling = max(before, gemm_ceiling(dtype))
    residues = sum(map(len, sequences))
    short = str(dtype).removeprefix("torch.")
    print(f"\n{name}, {short}: {count} yeast proteins, {residues:,} residues, {rounds} rounds")
    print(f"all agree to {distance:.0e}; GEMM {ceiling / 1e9:,.0f} GFLOP/s, copy {copy_ceiling() / 1e9:.1f} GB/s")
    rows = {}
    for who, taken in times.items():
        best = min(taken)
        speedup, low, high = ratio(taken, times["plm"])
        rows[who] = {"seconds": [round(t, 3) for t in taken], "ratio": speedup, "low": low, "high": high}
        share = flops(config, sequences) / best / ceiling
        print(
            f"  {who:22s} {residues / best:10,.0f} residues/s  {share:4.0%} of ceiling   "
            f"plm is {speedup:5.2f}x [{low:.2f}, {high:.2f}]"
        )
    return {"model": name, "dtype": short, "proteins": count, "residues": residues, "ceiling": ceiling, "results": rows}


def vocabulary_tokenizer() -> Any:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(VOCABULARY))
        return EsmTokenizer(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description="Embedding speed against transformers and fair-esm.")
    parser.add_argument("--models", nargs="+", default=["esm2-8m", "esm2-150m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--proteins", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    runs = [(name, getattr(torch, dtype)) for name in args.models for dtype in args.dtypes]
    print_json(benchmark="embed", measured=[measure(*run, args.proteins, args.rounds) for run in runs])


if __name__ == "__main__":
    main()
