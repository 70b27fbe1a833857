"""Score single substitutions with a ProGen2 of random weights: the wild type's prefix shared, against one by one.

    python bench/variants.py

The twin is shaped as progen2-small. One by one are `plm.score`, each variant alone; GPT-J of transformers with the same
weights, one pass for each direction; and the same as likelihood.py of the original runs it, which takes a pass for the
sum and another for the mean. All score every substitution at a few sites; the scores are compared before anything is
timed. A full scan shares more, for it reads the wild type once.
"""

import argparse
from collections.abc import Callable

import torch
from common import machine, print_json, race, ratio
from transformers import GPTJConfig, GPTJForCausalLM

import plm
from plm.loading import Model, Origin
from plm.models.progen2 import Config, ProGen2
from plm.mutations import RESIDUES, mutated, single_substitutions
from plm.vocabularies import progen2_tokenizer


def twins(layers: int) -> tuple[GPTJForCausalLM, Model]:
    """transformers' model, and ours with the same weights."""
    torch.manual_seed(0)
    config = Config(32, 32, layers, 1024, 16, 32, 4096, 1024)
    net = ProGen2(config).requires_grad_(False).eval()
    theirs = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=32,
            n_positions=1024,
            n_embd=1024,
            n_layer=layers,
            n_head=16,
            rotary_dim=32,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    state = {"transformer.wte.weight": net.embed.weight}
    for i, block in enumerate(net):
        parts = dict(zip("qvk", block.attention.qvk.weight.chunk(3), strict=True))
        modules = {"ln_1": block.norm, "mlp.fc_in": block.feed_forward.up, "mlp.fc_out": block.feed_forward.down}
        here = {f"attn.{name}_proj.weight": part for name, part in parts.items()}
        here |= {"attn.out_proj.weight": block.attention.out.weight}
        here |= {f"{name}.{kind}": x for name, module in modules.items() for kind, x in module.state_dict().items()}
        state |= {f"transformer.h.{i}.{name}": x for name, x in here.items()}
    state |= {f"transformer.ln_f.{kind}": x for kind, x in net.norm.state_dict().items()}
    state |= {f"lm_head.{kind}": x for kind, x in net.lm_head.state_dict().items()}
    theirs.load_state_dict(state)
    origin = Origin("progen2-small-shaped", "progen2", "random weights", None, (), "", "")
    return theirs, Model(net, progen2_tokenizer(), origin)


@torch.inference_mode()
def likelihood(theirs: GPTJForCausalLM, model: Model, text: str, passes: int) -> float:
    """As likelihood.py: "1" + text + "2" in both directions, with so many passes for each."""
    total, letters = 0.0, slice(5, 30)
    for written in (f"1{text}2", f"2{text[::-1]}1"):
        ids = torch.tensor([model.tokenizer.encode(written)])
        for _ in range(passes):
            logits = theirs(ids, use_cache=False).logits[0, :-2, letters]
        total -= torch.nn.functional.cross_entropy(logits, ids[0, 1:-1] - 5, reduction="sum").item()
    return total / 2


def measure(length: int, sites: int, layers: int, rounds: int) -> dict[str, object]:
    theirs, ours = twins(layers)
    random = torch.Generator().manual_seed(0)
    wild_type = "".join(RESIDUES[i] for i in torch.randint(20, (length,), generator=random))
    scan = single_substitutions(wild_type)
    names = [scan[19 * (site * length // sites) + i] for site in range(sites) for i in range(19)]
    texts = mutated(wild_type, names)

    def one_by_one(score: Callable[[str], float]) -> list[float]:
        own = score(wild_type)
        return [score(text) - own for text in texts]

    runners: dict[str, Callable[[], list[float]]] = {
        "GPT-J, as likelihood.py": lambda: one_by_one(lambda text: likelihood(theirs, ours, text, 2)),
        "GPT-J, one pass each way": lambda: one_by_one(lambda text: likelihood(theirs, ours, text, 1)),
        "plm.score, one by one": lambda: one_by_one(lambda text: plm.score(ours, text)[0].total),
        "plm.variants": lambda: plm.variants(ours, wild_type, names),
    }
    outputs = {who: torch.tensor(run()) for who, run in runners.items()}  # and so every contestant is warm
    distance = max((x - outputs["plm.score, one by one"]).abs().max().item() for x in outputs.values())
    # Sums over 2 * length log-probabilities in float32, each with an error of at most 1e-6; 2e-5 in all were measured.
    assert distance < 2 * length * 1e-6, f"the contestants disagree by {distance:.2g}"
    times = race(runners, rounds)
    whole, shared = 2 * (length + 2) * len(names), (length - 1) * len(names)
    print(
        f"\n{len(names)} substitutions of {length} residues, {layers} layers, {rounds} rounds; agree to {distance:.0e};"
        f" {shared:,} tokens and 2 x {length + 1} of the wild type, for {whole:,} of whole variants"
    )
    rows = {}
    for who, taken in times.items():
        speedup, low, high = ratio(taken, times["plm.variants"])
        rows[who] = {"seconds": [round(t, 3) for t in taken], "ratio": speedup, "low": low, "high": high}
        each = min(taken) / len(names)
        print(f"  {who:25s} {each * 1e3:7.1f} ms per variant   plm.variants is {speedup:5.2f}x [{low:.2f}, {high:.2f}]")
    return {"length": length, "variants": len(names), "layers": layers, "tokens": shared, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Single substitutions by likelihood, with and without sharing.")
    parser.add_argument("--length", type=int, default=120)
    parser.add_argument("--sites", type=int, default=4, help="each with its 19 substitutions")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(machine())
    print_json(benchmark="variants", measured=[measure(args.length, args.sites, args.layers, args.rounds)])


if __name__ == "__main__":
    main()
