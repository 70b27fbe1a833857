"""The original BERT as tiny random twins, built and saved by transformers' own code; and how ours is loaded and run.

No key map of ours is at work in a twin: transformers names its tensors itself, and only random numbers are put in. Its
BERT has no float32 steps, so that ``.double()`` makes a truth of it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from parity import Outputs, unpad, unpad_maps
from torch import Tensor, nn

from plm.models.bert import BERT, Config
from plm.packing import Packed
from plm_weights import bert as published
from plm_weights import import_weights, open_tensors
from plm_weights.fetch import weight_files

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

GOLDEN = Path(__file__).parent / "golden" / "bert"
CASES = ("igbert_tiny", "protbert_tiny")


@dataclass(frozen=True)
class Twin:
    """Sizes of a model that runs in milliseconds, and the seed of its weights."""

    layers: int
    channels: int
    heads: int
    feed_forward: int
    positions: int = 111
    types: int = 2
    norm_eps: float = 1e-12
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.layers}x{self.heads}x{self.channels // self.heads}-{self.feed_forward}"


def hub_twin(twin: Twin, kind: type[Any] = transformers.BertForPreTraining, **arguments: Any) -> Any:
    """One of transformers' BERT classes with random weights, in the form that gives attention maps."""
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=twin.channels,
        num_hidden_layers=twin.layers,
        num_attention_heads=twin.heads,
        intermediate_size=twin.feed_forward,
        max_position_embeddings=twin.positions,
        type_vocab_size=twin.types,
        layer_norm_eps=twin.norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return randomise(kind(config, **arguments), twin.seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter so that each one matters: no norm is the identity, no bias is zero, no pair is alike.

    The row of ``[PAD]`` too, which transformers only starts at zero: a stored one is used as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("LayerNorm.weight"):
            noise = 1 + 0.2 * noise
        elif noise.dim() == 1:
            noise *= 0.2
        else:
            noise *= 0.7 if "embeddings" in name else 1.2 / math.sqrt(noise.shape[1])
        parameter.copy_(noise)
    return model


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[b, t]``, padding on the right: on the left it would move BERT's positions."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return nn.utils.rnn.pad_sequence(ids, True), nn.utils.rnn.pad_sequence(ones, True)


@torch.no_grad()
def run_hub(model: Any, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Outputs:
    """All that one of transformers' classes gives, without padding."""
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    out = model(**given, output_hidden_states=True, output_attentions=True)
    keep = mask.bool()
    found = {f"hidden_states.{i}": unpad(x, keep) for i, x in enumerate(out.hidden_states)}
    found["attentions"] = unpad_maps(torch.stack(out.attentions, 1), keep)
    match model:
        case transformers.BertForPreTraining():
            found["logits"] = unpad(out.prediction_logits, keep)
            found["relation_logits"] = list(out.seq_relationship_logits)
            found["pooled"] = list(model.bert(**given).pooler_output)
        case transformers.BertForMaskedLM():
            found["logits"] = unpad(out.logits, keep)
        case transformers.BertModel() if out.pooler_output is not None:
            found["pooled"] = list(out.pooler_output)
    return found


@torch.no_grad()
def run_ours(net: BERT, batch: Packed, types: Tensor | None = None) -> Outputs:
    """All that our network gives."""
    out = net(batch, types=types, hidden_states=True, attentions=True)
    found: Outputs = {f"hidden_states.{i}": batch.split(x) for i, x in enumerate(out.hidden_states)}
    found["attentions"] = out.attentions
    if out.logits is not None:
        found["logits"] = batch.split(out.logits)
    per_sequence = {"pooled": out.pooled, "relation_logits": out.relation_logits}
    return found | {name: list(x) for name, x in per_sequence.items() if x is not None}


def load_bert(folder: Path, dtype: torch.dtype) -> BERT:
    """Our network from a folder in any published form."""
    tensors = open_tensors(weight_files(folder)[0])
    return build_bert(tensors, tensors.meta, json.loads((folder / "config.json").read_text()), dtype)


def build_bert(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Tensor], settings: Mapping[str, object], dtype: torch.dtype
) -> BERT:
    """Our network from published tensors (``meta`` names and shapes) and the settings of their ``config.json``."""
    assert published.recognise(meta) == "hub"
    config = published.hub_config(settings, meta)
    with torch.device("meta"):
        net = BERT(Config(**config))
    state = import_weights(published.key_map(meta, config), tensors, net.state_dict())
    net.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return net.eval()


def save_legacy(model: Any, folder: Path) -> None:
    """As files converted from TensorFlow are: gamma and beta, the buffers of transformers before 4.31, the embedding
    once more as the decoder, and a pickle older than the zip form."""
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
        if name != "cls.predictions.decoder.bias"
    }
    counts = torch.arange(model.config.max_position_embeddings)[None]
    state["bert.embeddings.position_ids"] = counts
    state["bert.embeddings.token_type_ids"] = torch.zeros_like(counts)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_bin_shards(model: Any, folder: Path) -> None:
    """``.bin`` shards and their index."""
    state = model.state_dict()
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
        shard = f"pytorch_model-{number:05}-of-00003.bin"
        torch.save({name: state[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    total = sum(x.numel() * x.element_size() for x in state.values())
    told = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(told)


def save_parallel(model: Any, folder: Path) -> None:
    """As saved from inside ``DataParallel``."""
    torch.save({f"module.{name}": x for name, x in model.state_dict().items()}, folder / "pytorch_model.bin")


FORMS: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "safetensors shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "bin": lambda model, folder: torch.save(model.state_dict(), folder / "pytorch_model.bin"),
    "bin shards": save_bin_shards,
    "legacy bin": save_legacy,
    "parallel bin": save_parallel,
}
