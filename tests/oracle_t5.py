"""The original T5 as tiny random twins, built and saved by transformers' own code; and how both are run.

No key map of ours is at work in a twin: transformers names its tensors itself, and only random numbers are put in.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from oracle_bert import save_bin_shards, save_parallel
from oracle_esm import CleanFloat64
from parity import Outputs, unpad, unpad_maps
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5EncoderModel, T5ForConditionalGeneration

from plm.models.t5 import T5
from plm.packing import Packed

GOLDEN = Path(__file__).parent / "golden" / "t5"
CASES = ("ankh3_tiny", "prott5_tiny")


@dataclass(frozen=True)
class Twin:
    """Sizes of a model that runs in milliseconds, what its config.json says of its head, and the weights' seed."""

    layers: int
    decoder_layers: int
    channels: int
    heads: int
    head_size: int
    feed_forward: int
    activation: Literal["relu", "gated-gelu", "gated-silu"]
    tie: Literal["true", "false", "null", "absent"] = "absent"
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    vocabulary: int = 40
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"{self.layers}+{self.decoder_layers}x{self.heads}x{self.head_size}of{self.channels}"
        return f"{sizes}-{self.activation}-{self.tie}-{self.buckets}of{self.max_distance}"

    @property
    def tied(self) -> bool:
        return self.tie != "false"

    def settings(self) -> dict[str, Any]:
        """A ``config.json`` as the hub's are."""
        settings: dict[str, Any] = {
            "model_type": "t5",
            "vocab_size": self.vocabulary,
            "num_layers": self.layers,
            "num_decoder_layers": self.decoder_layers,
            "d_model": self.channels,
            "num_heads": self.heads,
            "d_kv": self.head_size,
            "d_ff": self.feed_forward,
            "feed_forward_proj": self.activation,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.norm_eps,
            "dropout_rate": 0.1,
            "output_past": True,
            "n_positions": 512,
        }
        if self.tie != "absent":
            settings["tie_word_embeddings"] = json.loads(self.tie)
        return settings


def hub_twin(twin: Twin, kind: type[Any] = T5ForConditionalGeneration) -> Any:
    """One of transformers' T5 classes with random weights, in the form that gives attention maps."""
    config = transformers.T5Config(**twin.settings(), attn_implementation="eager")
    model = kind(config)
    if kind is T5ForConditionalGeneration and not twin.tied:  # transformers 5 ties every new one
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return randomise(model, twin.seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter of ours or theirs so that each one matters, and no softmax is flat or a single one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.2 * noise
        elif "bias" in name:
            noise *= 0.8
        elif "shared" not in name and "embed" not in name:
            noise *= 1.4 / math.sqrt(noise.shape[1])
        if name.endswith(("Attention.q.weight", "cross.q.weight")):
            noise *= model.config.d_kv**-0.5 if hasattr(model.config, "d_kv") else model.config.head_size**-0.5
        if name.endswith("qkv.weight"):
            noise[: len(noise) // 3] *= model.config.head_size**-0.5
        parameter.copy_(noise)
    return model


def in_float64(model: Any) -> Any:
    """A float64 copy. Its norms keep to float64 under ``CleanFloat64``."""
    return copy.deepcopy(model).double()


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[b, t]``."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return nn.utils.rnn.pad_sequence(ids, True, 0, side), nn.utils.rnn.pad_sequence(ones, True, 0, side)


@torch.no_grad()
def run_hub(model: Any, ids: Tensor, mask: Tensor, decoder: tuple[Tensor, Tensor] | None = None) -> Outputs:
    """All that an encoder gives, and with the decoder's ids and mask what that gives as well, without padding."""
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given |= {"output_hidden_states": True, "output_attentions": True}
    keep = mask.bool()
    if decoder is None:
        out = (model if isinstance(model, T5EncoderModel) else model.encoder)(**given)
        return numbered("encoder", out.hidden_states, keep) | {
            "encoder.attentions": unpad_maps(torch.stack(out.attentions, 1), keep)
        }
    written = decoder[1].bool()
    out = model(**given, decoder_input_ids=decoder[0], decoder_attention_mask=decoder[1], use_cache=False)
    cross = zip(torch.stack(out.cross_attentions, 1), written, keep, strict=True)
    return {
        **numbered("encoder", out.encoder_hidden_states, keep),
        "encoder.attentions": unpad_maps(torch.stack(out.encoder_attentions, 1), keep),
        **numbered("decoder", out.decoder_hidden_states, written),
        "decoder.attentions": unpad_maps(torch.stack(out.decoder_attentions, 1), written),
        "cross.attentions": [maps[..., rows, :][..., columns] for maps, rows, columns in cross],
        "logits": unpad(out.logits, written),
    }


def numbered(stack: str, states: Sequence[Tensor], keep: Tensor) -> Outputs:
    return {f"{stack}.{i}": unpad(x, keep) for i, x in enumerate(states)}


@torch.no_grad()
def run_ours(net: T5, batch: Packed, decoder: Packed | None = None) -> Outputs:
    """The same of our network."""
    out = net.encode(batch, hidden_states=True, attentions=True)
    assert torch.equal(out.hidden, out.hidden_states[-1])
    found: Outputs = {f"encoder.{i}": batch.split(x) for i, x in enumerate(out.hidden_states)}
    found["encoder.attentions"] = out.attentions
    if decoder is None:
        return found
    out = net(batch, decoder=decoder, hidden_states=True, attentions=True)
    assert torch.equal(out.hidden, out.hidden_states[-1])
    assert torch.equal(out.encoder_hidden, torch.cat(found[f"encoder.{net.config.layers}"]))
    found |= {f"decoder.{i}": decoder.split(x) for i, x in enumerate(out.hidden_states)}
    found |= {"decoder.attentions": out.attentions, "cross.attentions": out.cross_attentions}
    return found | {"logits": decoder.split(out.logits)}


def truth_of(model: Any, *inputs: Any) -> Outputs:
    """``run_hub`` in float64 throughout."""
    with CleanFloat64():
        return run_hub(in_float64(model), *inputs)


def save(model: Any, twin: Twin, folder: Path, form: str = "safetensors") -> Path:
    """A folder as it could be on the hub, its tensors in one of ``FORMS``."""
    folder.mkdir(exist_ok=True)
    FORMS[form](model, folder)
    (folder / "config.json").write_text(json.dumps(twin.settings()))
    return folder


def unique(model: Any) -> dict[str, Tensor]:
    """Every tensor once, as safetensors files have them."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def save_named(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Any, Path], object]:
    """A whole ``.bin`` file with other names, or without some."""
    return lambda model, folder: torch.save(change(model.state_dict()), folder / "pytorch_model.bin")


def without_shared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if name not in ("shared.weight", "decoder.embed_tokens.weight")}


FORMS: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": lambda model, folder: save_file(unique(model), folder / "model.safetensors", {"format": "pt"}),
    "safetensors shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "bin": save_named(lambda state: state),
    "bin shards": save_bin_shards,
    "bin, parallel": save_parallel,
    "bin, of a classifier": save_named(lambda state: {f"transformer.{name}": x for name, x in state.items()}),
    "bin, of an adapter": save_named(lambda state: {f"base_model.model.{name}": x for name, x in state.items()}),
    "bin, no shared": save_named(without_shared),
}
