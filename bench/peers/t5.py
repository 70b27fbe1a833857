"""A random T5 in the shape of Ankh3-large, half as wide and a quarter as deep, in transformers' classes and in ours.

Ankh3-large has 48 encoder and 24 decoder layers of 1,536 channels, 16 heads of 64 and a feed-forward of 3,840. The twin
keeps the heads' size, the gated SiLU, the buckets and the vocabulary. Depth is the same factor for all contestants;
at half the width attention weighs twice as much beside the linear layers.
"""

from typing import Any

import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from plm.loading import Model, Origin
from plm.models.t5 import T5, Config
from plm.vocabularies import ankh3_tokenizer
from plm_weights import import_weights
from plm_weights.t5 import hub_config, key_map

FULL_WIDTH = 1536


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


def flops(config: Config, lengths: list[int]) -> float:
    """Multiplications and additions of the encoder."""
    inner = config.heads * config.head_size
    linear = 2 * (4 * config.channels * inner + 3 * config.channels * config.feed_forward)
    return config.layers * sum(t * linear + 4 * t * t * inner for t in lengths)
