"""Random ProGen2s of the published sizes: in transformers' GPT-J and CodeGen, and in ours through the official files.

The three have one architecture and differ in how they store the projection to queries, keys and values: GPT-J has a
matrix of each, CodeGen one matrix in four shards and ProGen2 one in eight, both with queries, values and keys in each
shard (salesforce/progen@c27a419, progen2/models/progen/modeling_progen.py). transformers 5 has no ProGen2, and the
original's code does not run in it. Neither of its two classes has an SDPA form: ``attn_implementation="sdpa"`` is
refused, and a CPU leaves eager attention alone.

The loops are those that users write: ``generate`` with its cache, and likelihood.py of the original.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CodeGenConfig, CodeGenForCausalLM, GenerationConfig, GPTJConfig, GPTJForCausalLM

import plm
from plm.loading import Model

Kind = Literal["GPT-J", "CodeGen"]
ENDS = [2, 3, 4]  # <|eos|> and the terminals
RESIDUES = range(5, 30)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
PEERS: dict[Kind, tuple[Any, Any]] = {
    "GPT-J": (GPTJConfig, GPTJForCausalLM),
    "CodeGen": (CodeGenConfig, CodeGenForCausalLM),
}


@dataclass(frozen=True)
class Size:
    """A row of the published table; ``n_positions`` bounds prompt and text together."""

    n_layer: int
    n_embd: int
    n_head: int
    rotary_dim: int
    n_positions: int = 1024
    vocab_size: int = 32

    @property
    def matrices(self) -> int:
        """Numbers in the matrices that every step reads: not the embedding, of which it reads a row, and no biases."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd


SIZES = {
    "small": Size(12, 1024, 16, 32),
    "medium": Size(27, 1536, 16, 48),
    "oas": Size(27, 1536, 16, 48),
    "base": Size(27, 1536, 16, 48, n_positions=2048),
    "large": Size(32, 2560, 32, 64, vocab_size=51200),
    "BFD90": Size(32, 2560, 32, 64, vocab_size=51200),
    "xlarge": Size(32, 4096, 16, 64),
}


def settings(size: Size) -> dict[str, Any]:
    """What the ``config.json`` of the three have in common."""
    return {
        **vars(size),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def random_weights(size: Size) -> dict[str, Tensor]:
    """GPT-J's tensors by their names in float32, drawn with the published initial spread of 0.02."""
    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(**settings(size))).state_dict()  # type: ignore[no-any-return]


def fused(state: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same with one projection of ``count`` shards per layer, each of which has its heads' q, then v, then k."""
    found = {
        name: x for name, x in state.items() if not name.endswith(("q_proj.weight", "v_proj.weight", "k_proj.weight"))
    }
    for name, q in state.items():
        if name.endswith("q_proj.weight"):
            parts = (q, state[name.replace("q_proj", "v_proj")], state[name.replace("q_proj", "k_proj")])
            shards = torch.stack([x.reshape(count, -1, x.shape[1]) for x in parts], 1)  # [shard, kind, row, c]
            found[name.replace("q_proj", "qkv_proj")] = shards.reshape(-1, q.shape[1])
    return found


def peer(kind: Kind, state: dict[str, Tensor], size: Size, dtype: torch.dtype, device: str = "cpu") -> Any:
    """GPT-J or CodeGen with these weights."""
    configuration, model = PEERS[kind]
    theirs = model(configuration(**settings(size)))
    theirs.load_state_dict(state if kind == "GPT-J" else fused(state, 4), assign=True)
    return theirs.eval().to(device, dtype)


def official(state: dict[str, Tensor], size: Size, folder: Path) -> Path:
    """A folder as the authors' archives unpack."""
    save_file(fused(state, 8), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**settings(size), "model_type": "progen"}))
    return folder


def prompts(count: int, length: int) -> list[list[int]]:
    """The first terminal and random residues."""
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(RESIDUES.start, RESIDUES.stop, (count, length - 1), generator=generator)
    return [[3, *row] for row in letters.tolist()]


def hub_writer(theirs: Any, rows: Sequence[Sequence[int]], new: int, samples: int, cached: bool = True) -> Tensor:
    """Ids ``[texts, t]`` from transformers: the most probable tokens, or ``samples`` of each prompt."""
    ids = torch.tensor(rows, device=theirs.device)
    drawn = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples > 1 else {"do_sample": False}
    length = ids.shape[1] + new
    settings = GenerationConfig(
        min_length=length, max_length=length, eos_token_id=2, pad_token_id=0, suppress_tokens=ENDS, use_cache=cached,
        **drawn,
    )  # fmt: skip
    with torch.inference_mode():
        written: Tensor = theirs.generate(ids, settings, attention_mask=torch.ones_like(ids))
    return written


def own_writer(ours: Model, rows: Sequence[Sequence[int]], new: int, samples: int, **how: Any) -> list[plm.Sample]:
    """The same from plm."""
    length = len(rows[0]) + new
    found = plm.generate(
        ours, rows, num_samples=samples, temperature=1 if samples > 1 else 0, min_length=length, max_length=length,
        likelihood=False, seed=0, max_tokens=len(rows) * samples * length, **how,
    )  # fmt: skip
    return [sample for some in found for sample in some]


@torch.inference_mode()
def likelihood(theirs: Any, model: Model, text: str) -> float:
    """As likelihood.py: "1" + text + "2" in both directions, a pass for each."""
    total, letters = 0.0, slice(5, 30)
    for written in (f"1{text}2", f"2{text[::-1]}1"):
        ids = torch.tensor([model.tokenizer.encode(written)])
        logits = theirs(ids, use_cache=False).logits[0, :-2, letters].float()
        total -= torch.nn.functional.cross_entropy(logits, ids[0, 1:-1] - 5, reduction="sum").item()
    return total / 2
