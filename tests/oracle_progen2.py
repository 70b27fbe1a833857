"""The original ProGen2 as tiny random twins of its two relatives in transformers, GPT-J and CodeGen; how all are run.

The three have one architecture, and name and store alike all but the projection to queries, keys and values: GPT-J has
a matrix of each, CodeGen one matrix in four shards, ProGen2 one in eight. A shard holds queries, values and keys, in
this order (salesforce/progen@c27a419, progen2/models/progen/modeling_progen.py). No key map of ours is at work in a
twin; its matrices are cut and put together here.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from oracle_esm import CleanFloat64
from parity import Outputs, unpad, unpad_maps
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.codegen import modeling_codegen
from transformers.models.gptj import modeling_gptj

import plm
from plm.models import progen2
from plm.models.progen2 import ProGen2
from plm.packing import Packed

GOLDEN = Path(__file__).parent / "golden" / "progen2"
CASES = ("bin_fp16_large_vocab", "half_rotary_buffers", "hub_port_asymmetric_vocab")
Relative = Literal["gptj", "codegen"]
CLASSES: dict[Relative, tuple[type[Any], type[Any], Any]] = {
    "gptj": (transformers.GPTJConfig, transformers.GPTJForCausalLM, modeling_gptj),
    "codegen": (transformers.CodeGenConfig, transformers.CodeGenForCausalLM, modeling_codegen),
}


@dataclass(frozen=True)
class Twin:
    """Sizes of a model that runs in milliseconds, and the seed of its weights.

    ``rotated`` is what a config.json says, which may be more than a head has. ``outputs`` are the rows of the head; a
    port leaves fewer than the embedding has, and names its sizes otherwise.
    """

    layers: int
    heads: int
    head_size: int
    rotated: int
    feed_forward: int | None = None
    vocabulary: int = 32
    outputs: int = 32
    norm_eps: float = 1e-5
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"{self.layers}x{self.heads}x{self.head_size}-{self.feed_forward}-{self.vocabulary}to{self.outputs}"
        return f"{sizes}-{self.rotated}turned"

    @property
    def channels(self) -> int:
        return self.heads * self.head_size

    def settings(self) -> dict[str, Any]:
        """A ``config.json`` as the official ones are, or as a port's."""
        settings: dict[str, Any] = {
            "model_type": "progen",
            "activation_function": "gelu_new",
            "n_head": self.heads,
            "n_layer": self.layers,
            "n_positions": 80,
            "rotary_dim": self.rotated,
            "layer_norm_epsilon": self.norm_eps,
        }
        if self.feed_forward is not None:
            settings["n_inner"] = self.feed_forward
        if self.vocabulary == self.outputs:
            return settings | {"n_embd": self.channels, "vocab_size": self.vocabulary}
        rows = {"vocab_size_emb": self.vocabulary, "vocab_size_lm_head": self.outputs}
        return settings | {"embed_dim": self.channels} | rows


def relative(twin: Twin, kind: Relative) -> Any:
    """GPT-J or CodeGen with random weights, in the form that gives attention maps."""
    configuration, model, _ = CLASSES[kind]
    config = configuration(
        vocab_size=twin.vocabulary,
        n_positions=80,
        n_embd=twin.channels,
        n_layer=twin.layers,
        n_head=twin.heads,
        rotary_dim=min(twin.rotated, twin.head_size),
        n_inner=twin.feed_forward,
        activation_function="gelu_new",
        layer_norm_epsilon=twin.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return randomise(model(config), twin.seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter of ours or theirs so that each one matters: no norm is the identity, no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm.weight" in name or ("ln_" in name and name.endswith("weight")):
            noise = 1 + 0.2 * noise
        elif noise.dim() == 1:
            noise *= 0.2
        elif "wte" not in name and "embed" not in name:
            noise *= 1.4 / math.sqrt(noise.shape[1])
        parameter.copy_(noise)
    return model


def published(tensors: Mapping[str, Tensor], twin: Twin) -> dict[str, Tensor]:
    """A relative's tensors under the names and in the order of ProGen2's; those of its gradients as well."""
    split = tuple(f"attn.{kind}_proj.weight" for kind in ("q", "k", "v", "qkv"))
    found = {name: x for name, x in tensors.items() if not name.endswith(split)}
    for name in ("lm_head.weight", "lm_head.bias"):
        found[name] = found[name][: twin.outputs]
    for i in range(twin.layers):
        attention = f"transformer.h.{i}.attn."
        q, v, k = (x.reshape(8, -1, twin.channels) for x in queries_values_keys(tensors, attention))
        found[f"{attention}qkv_proj.weight"] = torch.stack((q, v, k), 1).reshape(-1, twin.channels)
    return {name: x.contiguous() for name, x in found.items()}


def queries_values_keys(tensors: Mapping[str, Tensor], attention: str) -> tuple[Tensor, ...]:
    """The three matrices of one layer, each of all heads in their natural order."""
    if (fused := tensors.get(f"{attention}qkv_proj.weight")) is not None:
        channels = fused.shape[1]
        return fused.reshape(4, 3, channels // 4, channels).unbind(1)
    return tuple(tensors[f"{attention}{kind}_proj.weight"] for kind in "qvk")


def save(theirs: Any, twin: Twin, folder: Path, *, masks: bool = False) -> Path:
    """A folder as it could be on the hub; with ``masks`` as the official ones are, a ``.bin`` of one shared mask."""
    folder.mkdir(exist_ok=True)
    state = published(dict(theirs.named_parameters()), twin)
    state = {name: x.detach().clone() for name, x in state.items()}
    if masks:
        mask, low = torch.ones(80, 80, dtype=torch.bool).tril()[None, None], torch.tensor(-1e9)
        for i in range(twin.layers):
            state |= {f"transformer.h.{i}.attn.bias": mask, f"transformer.h.{i}.attn.masked_bias": low}
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(twin.settings()))
    return folder


def load(folder: Path, dtype: str) -> ProGen2:
    net = plm.load(folder, dtype=dtype).net
    assert isinstance(net, ProGen2)
    return net


def in_float64(model: Any, kind: Relative) -> Any:
    """A float64 copy, its tables of sines and cosines made again by its own formula. Run it under ``CleanFloat64``."""
    wide = copy.deepcopy(model).double()
    torch.set_default_dtype(torch.float64)
    try:
        with CleanFloat64():
            for module in wide.modules():
                if hasattr(module, "embed_positions"):
                    table = CLASSES[kind][2].create_sinusoidal_positions(module.max_positions, module.pos_embd_dim)
                    assert table.dtype == torch.float64
                    module.embed_positions = table
    finally:
        torch.set_default_dtype(torch.float32)
    return wide


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[b, t]``."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return nn.utils.rnn.pad_sequence(ids, True, 0, side), nn.utils.rnn.pad_sequence(ones, True, 0, side)


def given(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a relative reads: positions are counted from each sequence's first token, wherever the padding is."""
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def run_hub(model: Any, ids: Tensor, mask: Tensor, outputs: int) -> Outputs:
    """All that a relative gives, its cache included, without padding and the columns that a port leaves out."""
    out = model(**given(ids, mask), output_hidden_states=True, output_attentions=True, use_cache=True)
    keep = mask.bool()
    found = {f"hidden_states.{i}": unpad(x, keep) for i, x in enumerate(out.hidden_states)}
    found["attentions"] = unpad_maps(torch.stack(out.attentions, 1), keep)
    found["logits"] = unpad(out.logits[..., :outputs], keep)
    for i, layer in enumerate(out.past_key_values.layers):
        found[f"keys.{i}"] = unpad(layer.keys.transpose(1, 2), keep)
        found[f"values.{i}"] = unpad(layer.values.transpose(1, 2), keep)
    return found


@torch.no_grad()
def run_ours(net: ProGen2, batch: Packed) -> Outputs:
    """The same of our network: keys (turned) and values ``[t, h, d]`` as a cache would take them from ``read``."""
    out = net(batch, hidden_states=True, attentions=True)
    assert torch.equal(out.hidden, out.hidden_states[-1])
    found: Outputs = {f"hidden_states.{i}": batch.split(x) for i, x in enumerate(out.hidden_states)}
    found |= {"attentions": out.attentions, "logits": batch.split(out.logits)}
    mix = progen2.self_attention(batch, net.config.head_size**-0.5, None)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found[f"keys.{layer}"], found[f"values.{layer}"] = batch.split(k), batch.split(v)
        return mix(q, k, v)

    assert torch.equal(net.read(batch.tokens, batch.positions, attend), out.hidden)
    return found


def truth_of(model: Any, kind: Relative, ids: Tensor, mask: Tensor, outputs: int) -> Outputs:
    """``run_hub`` in float64 throughout."""
    with CleanFloat64():
        return run_hub(in_float64(model, kind), ids, mask, outputs)
