"""A random T5 in the shape of Ankh3-large, half as wide and a quarter as deep, in transformers' classes and in ours.

Ankh3-large has 48 encoder and 24 decoder layers of 1,536 channels, 16 heads of 64 and a feed-forward of 3,840. The twin
keeps the heads' size, the gated SiLU, the buckets and the vocabulary. Depth is the same factor for all contestants;
at half the width attention weighs twice as much beside the linear layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

import plm
from plm import running
from plm.loading import Model, Origin
from plm.models.t5 import T5, Config
from plm.vocabularies import ankh3_tokenizer
from plm_weights import import_weights
from plm_weights.t5 import hub_config, key_map

FULL_WIDTH = 1536
WAYS = ("transformers eager", "transformers tuned", "plm")


def config_of(width: int, layers: int, decoder_layers: int) -> Config:
    """Our configuration of the twin."""
    heads, feed_forward = width * 16 // FULL_WIDTH, width * 3840 // FULL_WIDTH
    return Config(256, layers, decoder_layers, width, heads, 64, feed_forward, "gated-silu", 64)


def twins(dtype: torch.dtype, width: int, layers: int, decoder_layers: int) -> tuple[Any, Model]:
    """Both with the same weights, which went through our key map."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 256, "d_model": width, "d_kv": 64, "num_heads": width * 16 // FULL_WIDTH,
        "d_ff": width * 3840 // FULL_WIDTH, "num_layers": layers, "num_decoder_layers": decoder_layers,
        "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 64, "dropout_rate": 0.0,
    }  # fmt: skip
    theirs = T5ForConditionalGeneration(T5Config(**settings)).eval().to(dtype)
    theirs.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    stored = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name}
    config = hub_config({**settings, "tie_word_embeddings": True}, stored)
    with torch.device("meta"):
        net = T5(Config(**config))
    state = import_weights(key_map(stored, config), stored, net.state_dict())
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    origin = Origin("ankh3-shaped", "t5", "random weights", None, (), "", "")
    return theirs, Model(net.eval(), ankh3_tokenizer(), origin)


def contestant(way: str, theirs: Any, ours: Model, ids: Tensor) -> Callable[[], Tensor]:
    """A function that encodes ids ``[b, t]`` to ``[b, t, c]``."""
    if way == "plm":
        return lambda: encode(ours, ids)
    attention = "eager" if way == "transformers eager" else "sdpa"

    def run() -> Tensor:
        theirs.set_attn_implementation(attention)
        with torch.inference_mode():
            hidden: Tensor = theirs.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return hidden

    return run


def encode(model: Model, ids: Tensor) -> Tensor:
    size = max(1, running.default_max_tokens(model) // ids.shape[1])
    with torch.inference_mode():
        batches = [plm.Packed.from_ids(list(some)) for some in ids.split(size)]
        return torch.cat([model.net.encode(batch).hidden for batch in batches]).unflatten(0, ids.shape)


def prompts(batch: int, longest: int = 128) -> list[list[int]]:
    """Residue ids with the end token, from half the longest length to all of it."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(longest, longest // 2, batch).long().tolist()
    return [[*torch.randint(3, 23, (length,), generator=generator).tolist(), 1] for length in lengths]


def run_generate(theirs: Any, rows: list[list[int]], new: int) -> Tensor:
    """Greedy ids ``[b, 1 + new]`` of transformers, with the end banned."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    settings = GenerationConfig(
        min_length=new + 1, max_length=new + 1, do_sample=False, num_beams=1, eos_token_id=1, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    with torch.inference_mode():
        written: Tensor = theirs.generate(ids, settings, attention_mask=mask)
    return written


def run_own(ours: Model, rows: list[list[int]], new: int) -> list[plm.Sample]:
    """The same from plm."""
    found = plm.generate(ours, rows, temperature=0, min_length=new + 1, max_length=new + 1)
    return [sample for (sample,) in found]
