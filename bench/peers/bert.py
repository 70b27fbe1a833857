"""An IgBert with random weights, in transformers and in plm, and the recipe of its model card.

transformers takes SDPA and batches of 8: in file order, and sorted by length ("tuned"). The vectors are the card's (see
`plm.embed`, pool "card").
"""

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer

from plm.loading import Model, Origin
from plm.models.bert import BERT, Config
from plm.vocabularies import bert_tokenizer
from plm_weights import import_weights
from plm_weights.bert import VOCABULARY, hub_config, key_map

ANTIBODIES = Path(__file__).parents[2] / "examples" / "data" / "antibodies.csv"
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
