"""Embed antibody pairs with an IgBert of random weights, strings in and one vector per pair out, against transformers.

    python bench/igbert.py

The twin has IgBert's width and a quarter of its depth (8 of 30 layers); the pairs are real antibodies. transformers is
used as the model card does, with SDPA and in batches of 8: in file order, and sorted by length ("tuned"). The vectors
are the card's (see `plm.embed`, pool "card") and are compared before anything is timed.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import gemm_ceiling, machine, print_json, race, ratio
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer

import plm
from plm.loading import Model, Origin
from plm.models.bert import BERT, Config
from plm.vocabularies import bert_tokenizer
from plm_weights import import_weights
from plm_weights.bert import VOCABULARY, hub_config, key_map

ANTIBODIES = Path(__file__).parents[1] / "examples" / "data" / "antibodies.csv"
Pairs = list[tuple[str, str]]


def antibodies(count: int) -> Pairs:
    with ANTIBODIES.open() as file:
        return [(row["heavy"], row["light"]) for row in csv.DictReader(file)][:count]


def twins(dtype: torch.dtype, layers: int) -> tuple[Any, Any, Model]:
    """transformers' model and tokenizer, and ours with the same weights."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 30, "hidden_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 40000, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    theirs = BertModel(BertConfig(**settings), add_pooling_layer=False).eval().to(dtype)
    stored = theirs.state_dict()
    config = hub_config(settings, stored)
    with torch.device("meta"):
        net = BERT(Config(**config))
    state = import_weights(key_map(stored, config), stored, net.state_dict())
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(VOCABULARY))
        tokenizer = BertTokenizer(str(path), do_lower_case=False)
    origin = Origin("igbert-shaped", "bert", "random weights", None, (), "", "")
    return theirs, tokenizer, Model(net.eval(), bert_tokenizer(), origin)


def run_transformers(model: Any, tokenizer: Any, pairs: Pairs, order: Sequence[int], size: int = 8) -> list[Tensor]:
    """The card's recipe, with what replaced the methods that transformers 5 removed."""
    vectors: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), size):
            some = order[start : start + size]
            texts = [" ".join(pairs[i][0]) + " [SEP] " + " ".join(pairs[i][1]) for i in some]
            tokens = tokenizer(texts, padding=True, return_tensors="pt", return_special_tokens_mask=True)
            hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            hidden[tokens["special_tokens_mask"] == 1] = 0
            counts = (tokens["special_tokens_mask"] == 0).sum(1, keepdim=True)
            for i, vector in zip(some, hidden.float().sum(1) / counts, strict=True):
                vectors[i] = vector
    return [vectors[i] for i in range(len(pairs))]


def measure(dtype: torch.dtype, count: int, layers: int, rounds: int) -> dict[str, object]:
    theirs, tokenizer, ours = twins(dtype, layers)
    pairs = antibodies(count)
    tokens = [len(heavy) + len(light) + 3 for heavy, light in pairs]
    by_length = sorted(range(count), key=lambda i: -tokens[i])
    runners: dict[str, Callable[[], list[Tensor]]] = {
        "transformers, file order": lambda: run_transformers(theirs, tokenizer, pairs, range(count)),
        "transformers tuned": lambda: run_transformers(theirs, tokenizer, pairs, by_length),
        "plm": lambda: plm.embed(ours, pairs, pool="card"),
    }
    outputs = {who: torch.stack(run()) for who, run in runners.items()}  # and so every contestant is warm
    expected = outputs["transformers tuned"]
    distance = max(((x - expected).norm() / expected.norm()).item() for x in outputs.values())
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert distance < bound, f"the contestants disagree by {distance:.2g} (allowed {bound})"
    before = gemm_ceiling(dtype)
    times = race(runners, rounds)
    ceiling = max(before, gemm_ceiling(dtype))
    work = layers * sum(t * 24 * 1024**2 + 4 * t * t * 1024 for t in tokens)
    short = str(dtype).removeprefix("torch.")
    print(
        f"\n{short}, {count} pairs, {sum(tokens):,} tokens, {layers} layers, {rounds} rounds; agree to {distance:.0e}"
    )
    rows = {}
    for who, taken in times.items():
        speedup, low, high = ratio(taken, times["plm"])
        rows[who] = {"seconds": [round(t, 3) for t in taken], "ratio": speedup, "low": low, "high": high}
        print(
            f"  {who:25s} {count / min(taken):7.2f} pairs/s  {work / min(taken) / ceiling:4.0%} of ceiling   ", end=""
        )
        print(f"plm is {speedup:5.2f}x [{low:.2f}, {high:.2f}]")
    return {"dtype": short, "pairs": count, "layers": layers, "ceiling": ceiling, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Antibody pairs against transformers.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(machine())
    measured = [measure(getattr(torch, dtype), args.pairs, args.layers, args.rounds) for dtype in args.dtypes]
    print_json(benchmark="igbert", measured=measured)


if __name__ == "__main__":
    main()
