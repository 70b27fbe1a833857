"""The original ESMFold as tiny random twins, built and saved by transformers' own class; how theirs and ours are run.

No key map of ours is at work in a twin. The two published forms that transformers 5 does not write (the hub's file of
2022 and the authors' own) are made of what it has in memory by renaming.
"""

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from oracle_esm import CleanFloat64
from parity import Outputs
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.esm.openfold_utils import loss, rigid_utils

import plm
from plm.esmfold.chains import Chains
from plm.esmfold.confidence import MOST
from plm.esmfold.config import Config
from plm.esmfold.geometry import atoms, group_frames, rotation
from plm.esmfold.model import ESMFold, Prediction
from plm.esmfold.residues import tables
from plm.models import esm
from plm_weights import KeyMap, import_weights
from plm_weights.esmfold import hub_config, key_map

INV_FREQ = "self.rotary_embeddings.inv_freq"
MASK = 32
# The hub's names of a layer of the language model, and the authors'.
AUTHORS = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}


@dataclass(frozen=True)
class Twin:
    """Sizes of a model that runs in milliseconds, and the seed of its weights. ``stem_*`` is its ESM-2."""

    stem_layers: int
    stem_heads: int
    stem_channels: int
    blocks: int
    heads: int
    channels: int
    pair_heads: int
    pair: int
    bins: int
    layers: int  # of the structure module, as all below
    structure_channels: int
    structure_pair: int
    structure_heads: int
    head_size: int
    query_points: int
    value_points: int
    transitions: int
    angle_blocks: int
    angle_channels: int
    scale: int = 10
    passes: int = 2
    confidence: int = 7
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.blocks}blocks-{self.heads}heads-{self.layers}layers-{self.transitions}transitions"

    def settings(self) -> dict[str, Any]:
        """A ``config.json`` with the keys of the hub's."""
        structure = {
            "sequence_dim": self.structure_channels,
            "pairwise_dim": self.structure_pair,
            "ipa_dim": self.head_size,
            "resnet_dim": self.angle_channels,
            "num_heads_ipa": self.structure_heads,
            "num_qk_points": self.query_points,
            "num_v_points": self.value_points,
            "dropout_rate": 0.1,
            "num_blocks": self.layers,
            "num_transition_layers": self.transitions,
            "num_resnet_blocks": self.angle_blocks,
            "num_angles": 7,
            "trans_scale_factor": self.scale,
            "epsilon": 1e-8,
            "inf": 1e5,
        }
        trunk = {
            "num_blocks": self.blocks,
            "sequence_state_dim": self.channels,
            "pairwise_state_dim": self.pair,
            "sequence_head_width": self.channels // self.heads,
            "pairwise_head_width": self.pair // self.pair_heads,
            "position_bins": self.bins,
            "max_recycles": self.passes,
            "chunk_size": None,
            "structure_module": structure,
        }
        folding = {"esm_type": "tiny", "fp16_esm": False, "lddt_head_hid_dim": self.confidence, "trunk": trunk}
        return {
            "model_type": "esm",
            "vocab_size": 33,
            "hidden_size": self.stem_channels,
            "num_hidden_layers": self.stem_layers,
            "num_attention_heads": self.stem_heads,
            "intermediate_size": 4 * self.stem_channels,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
            "mask_token_id": MASK,
            "position_embedding_type": "rotary",
            "max_position_embeddings": 1026,
            "emb_layer_norm_before": False,
            "token_dropout": True,
            "is_folding_model": True,
            "esmfold_config": folding,
        }


def hub_twin(twin: Twin) -> Any:
    """transformers' ESMFold with random weights."""
    settings = {name: value for name, value in twin.settings().items() if name != "model_type"}
    return randomise(transformers.EsmForProteinFolding(transformers.EsmConfig(**settings)), twin.seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter so that each one matters, those that training starts at zero as well.

    The language model's are numbers of half precision, as published; its rotary frequencies such as no formula gives.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "esm_s_combine":
            noise *= 0.7
        elif noise.dim() == 1:
            noise = 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise  # of a norm, or a bias
        else:
            noise *= 0.7 if "embed" in name or "disto.weight" in name else 0.9 / math.sqrt(noise.shape[1])
        parameter.copy_(noise.half() if name.startswith("esm.") else noise)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_((buffer * 1.1).half())
    return model


def hub_file(model: Any) -> dict[str, Tensor]:
    """The tensors as in the hub's file: the language model in half precision, frequencies once for each layer."""
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    frequencies = state.pop("esm.rotary_embeddings.inv_freq")
    for layer in range(model.config.num_hidden_layers):
        state[f"esm.encoder.layer.{layer}.attention.{INV_FREQ}"] = frequencies.clone()
    state = {k: x.half() if k.startswith("esm.") else x for k, x in state.items()}
    return state | {"esm.embeddings.position_ids": torch.arange(1026)[None]}


def authors_file(model: Any) -> dict[str, Tensor]:
    """The tensors as the authors' two files have them, ESM-2's behind ``esm.``, with its masked-language-model head."""
    found: dict[str, Tensor] = {}
    for name, x in hub_file(model).items():
        if name == "esm.embeddings.position_ids":
            continue
        if name.startswith("esm.encoder.layer."):
            number, _, rest = name.removeprefix("esm.encoder.layer.").partition(".")
            part, _, kind = rest.rpartition(".")
            name = f"esm.layers.{number}.{AUTHORS.get(part, 'self_attn.rot_emb')}.{kind}"
        name = name.replace("esm.embeddings.word_embeddings", "esm.embed_tokens")
        name = name.replace("esm.encoder.emb_layer_norm_after", "esm.emb_layer_norm_after")
        found[name] = x
    words = found["esm.embed_tokens.weight"]
    channels = words.shape[1]
    head = {"dense.weight": (channels, channels), "dense.bias": (channels,), "bias": (len(words),)}
    head |= {f"layer_norm.{kind}": (channels,) for kind in ("weight", "bias")}
    found |= {f"esm.lm_head.{name}": torch.randn(shape).half() for name, shape in head.items()}
    return found | {"esm.lm_head.weight": words.clone()}


def save(tensors: Mapping[str, Tensor], twin: Twin, folder: Path) -> Path:
    """A folder as it could be on the hub."""
    folder.mkdir(exist_ok=True)
    save_file({name: x.clone() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(twin.settings()))
    return folder


def load(folder: Path, dtype: str) -> ESMFold:
    net = plm.load(folder, dtype=dtype).net
    assert isinstance(net, ESMFold)
    return net


@contextlib.contextmanager
def clean_float64() -> Iterator[None]:
    """No float32 anywhere in theirs: neither by name, nor by default, nor as it remembers from another run."""
    torch.set_default_dtype(torch.float64)
    try:
        with CleanFloat64():
            forget()
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        forget()


def forget() -> None:
    for remembered in ("identity_rot_mats", "identity_trans", "identity_quats", "_get_quat"):
        getattr(rigid_utils, remembered).cache_clear()


def run_hub(model: Any, proteins: Sequence[Chains], *, recycles: int, chunk: int | None = None) -> Outputs:
    """All that theirs gives, without padding; pTM by its own function for each protein alone, as the authors have it.

    Of ``lddt_head`` the last layer, from which pLDDT is computed.
    """
    lengths = [chains.length for chains in proteins]

    def padded(rows: Sequence[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    read = model.af2_idx_to_esm_idx

    def tokens(types: Tensor, mask: Tensor) -> Tensor:  # theirs raises where residues are hidden
        hidden = [torch.zeros(c.length, dtype=torch.bool) if c.hidden is None else c.hidden for c in proteins]
        return read(types, mask).masked_fill(padded(hidden), MASK)

    model.af2_idx_to_esm_idx = tokens
    model.trunk.set_chunk_size(chunk)
    try:
        out = model(
            padded([chains.types for chains in proteins]),
            attention_mask=padded([torch.ones(length, dtype=torch.int64) for length in lengths]),
            position_ids=padded([chains.positions for chains in proteins]),
            num_recycles=recycles,
        )
    finally:
        del model.af2_idx_to_esm_idx
        model.trunk.set_chunk_size(None)
    found: Outputs = {}
    for name in ("frames", "sidechain_frames", "unnormalized_angles", "angles", "positions", "states"):
        found[name] = [x[:, :length] for x, length in zip(out[name].unbind(1), lengths, strict=True)]
    for name in ("s_s", "lm_logits", "plddt"):
        found[name] = [x[:length] for x, length in zip(out[name], lengths, strict=True)]
    for name in ("s_z", "distogram_logits", "ptm_logits", "predicted_aligned_error"):
        found[name] = [x[:length, :length] for x, length in zip(out[name], lengths, strict=True)]
    found["lddt_head"] = [x[:length] for x, length in zip(out["lddt_head"][-1], lengths, strict=True)]
    found["ptm"] = [loss.compute_tm(logits[None], max_bin=31, no_bins=64)[None] for logits in found["ptm_logits"]]
    return found


def truth_of(model: Any, proteins: Sequence[Chains], *, recycles: int) -> Outputs:
    """``run_hub`` in float64 throughout."""
    with clean_float64(), torch.no_grad():
        return run_hub(copy.deepcopy(model).double(), proteins, recycles=recycles)


def run_ours(net: ESMFold, proteins: Sequence[Chains], *, recycles: int, rows: int | None = None) -> Outputs:
    """The same of our network, under their names. What `Prediction` does not hold is computed from what it holds."""
    befores: list[Tensor] = []
    hook = net.structure.register_forward_hook(lambda module, inputs, out: befores.append(out[1]))
    try:
        predictions = list(net.fold(proteins, recycles=recycles, rows=rows, keep_pairs=True))
    finally:
        hook.remove()
    passes = len(befores) // len(proteins)
    found: Outputs = {}
    for chains, prediction, before in zip(proteins, predictions, befores[passes - 1 :: passes], strict=True):
        for name, x in named(net, chains, prediction, before).items():
            found.setdefault(name, []).append(x)
    return found


def named(net: ESMFold, chains: Chains, prediction: Prediction, before: Tensor) -> dict[str, Tensor]:
    """One protein's outputs; ``before`` are its residues before the structure module's first layer."""
    fixed, layers = tables(), prediction.layers
    torsions = [net.structure.torsions(layer.state, before) for layer in layers]
    groups = [
        group_frames(
            chains.types,
            rotation(layer.quaternion),
            layer.translation * net.config.structure.scale,
            angles,
            fixed,
        )
        for layer, (angles, _) in zip(layers, torsions, strict=True)
    ]
    assert prediction.z is not None
    return {
        "frames": torch.stack(
            [torch.cat([x.quaternion, x.translation * net.config.structure.scale], -1) for x in layers]
        ),
        "sidechain_frames": torch.stack(groups),
        "unnormalized_angles": torch.stack([raw for _, raw in torsions]),
        "angles": torch.stack([*(angles for angles, _ in torsions[:-1]), prediction.angles]),
        "positions": torch.stack([*(atoms(chains.types, x, fixed) for x in groups[:-1]), prediction.positions]),
        "states": torch.stack([layer.state for layer in layers]),
        "s_s": prediction.s,
        "s_z": prediction.z,
        "lm_logits": net.residue_head(prediction.s),
        "distogram_logits": net.distances(prediction.z),
        "ptm_logits": net.error_head(prediction.z.flatten(0, 1)).view(chains.length, chains.length, -1),
        "lddt_head": net.confidence_head(layers[-1].state),
        "plddt": prediction.plddt,
        "predicted_aligned_error": prediction.pae,
        "max_predicted_aligned_error": torch.tensor(MOST),
        "ptm": torch.tensor([prediction.ptm], dtype=torch.float64),
    }


def config_of(twin: Twin, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of our config, of a twin without blocks as well, which a ``config.json`` may not describe."""
    found = hub_config(replace(twin, blocks=max(twin.blocks, 1)).settings(), tensors)
    return found | {"blocks": twin.blocks}


def rows_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> KeyMap:
    """The key map of a file, without blocks if there are none."""
    rows = key_map(tensors, config)
    return tuple(row for row in rows if config["blocks"] or not str(row.source).lstrip("('").startswith("trunk.blocks"))


def imported(twin: Twin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, in the dtypes of the file."""
    config = config_of(twin, tensors)
    return import_weights(rows_of(tensors, config), tensors, empty(config).state_dict())


def empty(config: dict[str, Any]) -> ESMFold:
    with torch.device("meta"):
        return ESMFold(Config(**config), esm.ESM(esm.Config(**config["stem"])))


def build(twin: Twin, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> ESMFold:
    """Our network of a file's tensors. Rotary frequencies stay as they are stored."""
    net = empty(config_of(twin, tensors))
    state = imported(twin, tensors)
    frequencies = {"stem.frequencies": state["stem.frequencies"].float()}
    net.load_state_dict({name: x.to(dtype) for name, x in state.items()} | frequencies, assign=True)
    return net.eval()
