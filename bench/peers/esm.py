"""ESM-2 with random weights of the published shapes: in transformers, in fair-esm and in plm, from one file.

Three ways to use transformers, as its users do:

    default   as on the model card: float32, batches of 8 in file order (SDPA is its default attention)
    common    the same in bfloat16
    tuned     batches of 8 sorted by length, in the dtype of the comparison

fair-esm runs as its own `esm-extract` batches: sorted, at most 4,096 tokens with padding.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import scratch
from measuring import Contestant, Run
from torch import Tensor

import plm
from plm.conversion import to_transformers
from plm.models.esm import ESM, Config, initialise
from plm.vocabularies import ESM as VOCABULARY
from plm_weights.registry import find

BATCH = 8
TINY = Config(2, 64, 4, 256, None, False, True, 1e-5, contact_head=True)


def config_of(name: str, quick: bool = False) -> Config:
    """The published shape; for rehearsals a tiny one."""
    row = find(name)
    assert row.config is not None
    return TINY if quick else Config(**row.config)  # type: ignore[arg-type]


def published(name: str, quick: bool = False) -> Path:
    """A folder with random weights as the hub publishes an ESM-2, made once."""
    folder = scratch() / f"{name}{'-tiny' if quick else ''}"
    if not folder.exists():
        net = ESM(config_of(name, quick))
        initialise(net, torch.Generator().manual_seed(0))
        to_transformers(net.state_dict(), net.config, folder)
    return folder


def by_length(sequences: Sequence[str]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))


def in_file_order(sequences: Sequence[str]) -> list[int]:
    return list(range(len(sequences)))


def transformers_model(folder: Path, dtype: str, device: str = "cpu", name: str = "EsmModel", **how: Any) -> Any:
    """One of their classes, with SDPA, their default. It says nothing of heads in the file that it leaves alone."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, name).from_pretrained(folder, dtype=getattr(torch, dtype), **how)
    return model.eval().requires_grad_(False).to(device)


def transformers_tokenizer() -> Any:
    from transformers import EsmTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(VOCABULARY))
        return EsmTokenizer(str(path))


def run_transformers(
    model: Any, tokenizer: Any, sequences: Sequence[str], order: Sequence[int], size: int = BATCH
) -> list[Tensor]:
    """The loop that people write: tokenize a batch, run it, average over the residues."""
    vectors: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), size):
            some = order[start : start + size]
            batch = tokenizer([sequences[i] for i in some], padding=True, return_tensors="pt").to(model.device)
            hidden = model(**batch).last_hidden_state
            for i, rows in zip(some, hidden, strict=True):
                vectors[i] = rows[1 : len(sequences[i]) + 1].float().mean(0).cpu()
    return [vectors[i] for i in range(len(sequences))]


FAIR_NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.out": "self_attn.out_proj",
    "feed_forward_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}


def fair_model(ours: ESM, dtype: str) -> tuple[Any, Any]:
    """fair-esm's class, filled with the same weights, and what makes its batches."""
    import esm as fair_esm

    config, state = ours.config, ours.state_dict()
    alphabet = fair_esm.data.Alphabet.from_architecture("ESM-1b")
    theirs = fair_esm.model.esm2.ESM2(config.layers, config.channels, config.heads, alphabet, token_dropout=True)
    filled = theirs.state_dict()
    filled["embed_tokens.weight"] = filled["lm_head.weight"] = state["embed.weight"]
    for part in ("weight", "bias"):
        filled[f"emb_layer_norm_after.{part}"] = state[f"norm.{part}"]
        for i in range(config.layers):
            for name, tensor in zip("qkv", state[f"blocks.{i}.attention.qkv.{part}"].chunk(3), strict=True):
                filled[f"layers.{i}.self_attn.{name}_proj.{part}"] = tensor
            for mine, name in FAIR_NAMES.items():
                filled[f"layers.{i}.{name}.{part}"] = state[f"blocks.{i}.{mine}.{part}"]
    for i in range(config.layers):
        filled[f"layers.{i}.self_attn.rot_emb.inv_freq"] = state["frequencies"]
    theirs.load_state_dict(filled)
    return theirs.eval().requires_grad_(False).to(getattr(torch, dtype)), alphabet.get_batch_converter()


def run_fair(model: Any, converter: Any, sequences: Sequence[str], budget: int = 4096) -> list[Tensor]:
    """As esm-extract: sorted by length, as many as fit with padding into 4,096 tokens."""
    vectors: dict[int, Tensor] = {}
    batch: list[int] = []
    layers, device = model.num_layers, model.embed_tokens.weight.device

    def flush() -> None:
        _, _, tokens = converter([(str(i), sequences[i]) for i in batch])
        hidden = model(tokens.to(device), repr_layers=[layers])["representations"][layers]
        for i, rows in zip(batch, hidden, strict=True):
            vectors[i] = rows[1 : len(sequences[i]) + 1].float().mean(0).cpu()
        batch.clear()

    with torch.inference_mode():
        for i in reversed(by_length(sequences)):
            if batch and (len(sequences[i]) + 1) * (len(batch) + 1) > budget:
                flush()
            batch.append(i)
        flush()
    return [vectors[i] for i in range(len(sequences))]


def embedders(
    folder: Path, dtype: str, *, ways: Sequence[str], own: Sequence[str], device: str = "cpu", size: int = BATCH
) -> dict[str, Contestant]:
    """Everyone who embeds: strings in, mean vectors out.

    Args:
        ways: of "default" (always float32), "common", "tuned" and "fair-esm", in ``dtype``.
        own: dtypes of plm.
        size: proteins in a batch of transformers.
    """

    @cache
    def theirs(dtype: str) -> tuple[Any, Any]:
        return transformers_model(folder, dtype, device, add_pooling_layer=False), transformers_tokenizer()

    def hub(dtype: str, order: Callable[[Sequence[str]], list[int]]) -> Run:
        model, tokenizer = theirs(dtype)
        return lambda sequences: run_transformers(model, tokenizer, sequences, order(sequences), size)

    def fair() -> Run:
        model, converter = fair_model(plm.load(folder, device="cpu", dtype="float32").net, dtype)
        model.to(device)
        return lambda sequences: run_fair(model, converter, sequences)

    def own_run(dtype: str) -> Run:
        model = plm.load(folder, dtype=dtype, device=device)
        return lambda sequences: plm.embed(model, sequences, pool="mean")

    every = {
        "default": Contestant(lambda: hub("float32", in_file_order), "float32"),
        "common": Contestant(lambda: hub(dtype, in_file_order), dtype),
        "tuned": Contestant(lambda: hub(dtype, by_length), dtype),
        "fair-esm": Contestant(fair, dtype),
    }
    found = {way if way == "fair-esm" else f"transformers {way}": every[way] for way in ways}
    return found | {f"plm {name}": Contestant(lambda name=name: own_run(name), name) for name in own}


def exact(folder: Path) -> Callable[[Sequence[str]], list[Tensor]]:
    """Mean vectors in float64."""
    return lambda sequences: plm.embed(plm.load(folder, dtype="float64", device="cpu"), sequences, pool="mean")


def transformers_masked(folder: Path, dtype: str, size: int = 32) -> Callable[[str, Sequence[str]], list[float]]:
    """Masked marginals as scripts compute them: a copy per hidden residue, in batches of 32, the whole head on top."""
    model, tokenizer = transformers_model(folder, dtype, name="EsmForMaskedLM"), transformers_tokenizer()

    def scores(wild_type: str, substitutions: Sequence[str]) -> list[float]:
        ids = tokenizer(wild_type, return_tensors="pt")["input_ids"].repeat(len(wild_type), 1)
        places = torch.arange(len(wild_type))
        ids[places, places + 1] = tokenizer.mask_token_id
        with torch.inference_mode():
            parts = [
                model(input_ids=some).logits[torch.arange(len(some)), here + 1].float().log_softmax(-1)
                for some, here in zip(ids.split(size), places.split(size), strict=True)
            ]
        found = torch.cat(parts)
        wanted = [
            (int(name[1:-1]) - 1, *tokenizer.convert_tokens_to_ids([name[0], name[-1]])) for name in substitutions
        ]
        place, old, new = torch.tensor(wanted).unbind(1)
        return (found[place, new] - found[place, old]).tolist()  # type: ignore[no-any-return]

    return scores
