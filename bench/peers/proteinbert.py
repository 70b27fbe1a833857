"""A ProteinBERT of published sizes and random weights: a naive PyTorch version, the original, and plm.

The naive version is what one writes from the paper in an afternoon: ``nn.Conv1d`` between transposes, one product per
layer, the annotations multiplied although all are zero, both heads. It is right: its vectors are compared with ours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.process import Peer
from plm import running
from plm.loading import Model, Origin
from plm.models.proteinbert import PAD, Config, ProteinBERT
from plm.packing import Packed, in_order
from plm.vocabularies import proteinbert_tokenizer

PUBLISHED = Config(26, 8943, layers=6, channels=128, global_channels=512, heads=4, key_size=64)
BATCH = 32
MACS = 6 * (2 * 9 * 128 * 128 + 128 * 128 + 4 * 128 * 64 + 4 * 128 * 128)  # multiplications per token


class NaiveBlock(nn.Module):
    def __init__(self, c: int = 128, g: int = 512, heads: int = 4, key: int = 64) -> None:
        super().__init__()
        self.to_local = nn.Linear(g, c)
        self.narrow = nn.Conv1d(c, c, 9, padding="same")
        self.wide = nn.Conv1d(c, c, 9, padding="same", dilation=5)
        self.local_norm1 = nn.LayerNorm(c, 1e-3)
        self.local_dense = nn.Linear(c, c)
        self.local_norm2 = nn.LayerNorm(c, 1e-3)
        self.global_dense1 = nn.Linear(g, g)
        self.query = nn.Parameter(torch.empty(heads, g, key))
        self.key = nn.Parameter(torch.empty(heads, c, key))
        self.value = nn.Parameter(torch.empty(heads, c, g // heads))
        self.global_norm1 = nn.LayerNorm(g, 1e-3)
        self.global_dense2 = nn.Linear(g, g)
        self.global_norm2 = nn.LayerNorm(g, 1e-3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        columns = x.transpose(1, 2)
        narrow = F.gelu(self.narrow(columns)).transpose(1, 2)
        wide = F.gelu(self.wide(columns)).transpose(1, 2)
        x = self.local_norm1(x + F.gelu(self.to_local(y))[:, None] + narrow + wide)
        x = self.local_norm2(x + F.gelu(self.local_dense(x)))
        q = torch.tanh(torch.einsum("bg,hgk->bhk", y, self.query))
        k = torch.tanh(torch.einsum("btc,hck->bhtk", x, self.key))
        v = F.gelu(torch.einsum("btc,hcv->bhtv", x, self.value))
        weights = (torch.einsum("bhk,bhtk->bht", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = torch.einsum("bht,bhtv->bhv", weights, v).flatten(1)
        y = self.global_norm1(y + F.gelu(self.global_dense1(y)) + mixed)
        return x, self.global_norm2(y + F.gelu(self.global_dense2(y)))


class Naive(nn.Module):
    """The whole model, with softmax and sigmoid, as the original is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(26, 128)
        self.annotations_in = nn.Linear(8943, 512)
        self.blocks = nn.ModuleList(NaiveBlock() for _ in range(6))
        self.lm_head = nn.Linear(128, 26)
        self.annotation_head = nn.Linear(512, 8943)

    def forward(self, tokens: Tensor, annotations: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = self.embed(tokens), F.gelu(self.annotations_in(annotations))
        for block in self.blocks:
            x, y = block(x, y)
        return x, y, self.lm_head(x).softmax(-1), self.annotation_head(y).sigmoid()


def twins(dtype: torch.dtype) -> tuple[Naive, Model]:
    """The naive network and ours with the same random weights."""
    torch.manual_seed(0)
    naive = Naive().requires_grad_(False).eval()
    for name, weight in naive.named_parameters():
        if weight.dim() == 3 and ".weight" not in name:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    state = dict(naive.state_dict())
    for i in range(PUBLISHED.layers):
        for part in ("query", "key", "value"):
            weight = state.pop(f"blocks.{i}.{part}")
            state[f"blocks.{i}.attention.{part}.weight"] = weight.transpose(1, 2).flatten(0, 1).contiguous()
    net = ProteinBERT(PUBLISHED).requires_grad_(False)
    net.load_state_dict(state)
    origin = Origin("proteinbert-shaped", "proteinbert", "random weights", None, (), "", "")
    return naive.to(dtype), Model(net.to(dtype).eval(), proteinbert_tokenizer(), origin)


def run_naive(naive: Naive, rows: Sequence[list[int]], order: Sequence[int], width: int | None) -> list[Tensor]:
    """Global vectors and means over residues, one of ``[512 + 128]`` per protein."""
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            padded = width or max(len(rows[i]) for i in some)
            tokens = torch.tensor([rows[i] + [PAD] * (padded - len(rows[i])) for i in some])
            x, y, _, _ = naive(tokens, torch.zeros(len(some), 8943, dtype=naive.embed.weight.dtype))
            for i, local, global_ in zip(some, x, y, strict=True):
                found[i] = torch.cat([global_, local[1 : len(rows[i]) - 1].mean(0)]).float()
    return [found[i] for i in range(len(rows))]


def vectors(model: Model, sequences: Sequence[str], pad_to: int | None) -> list[Tensor]:
    """Global vectors and means over residues, both of one pass; see `run_naive`."""
    rows = running.encode(model, list(sequences))

    def forward(batch: Packed, members: Sequence[int]) -> list[Tensor]:
        out = cast(ProteinBERT, model.net).encode(batch, pad_to=pad_to)
        locals_ = (part[1:-1].float().mean(0) for part in batch.split(out.hidden))
        return [torch.cat([y.float(), x]) for y, x in zip(out.global_, locals_, strict=True)]

    return in_order(running.run(model, rows, forward, pad_to=pad_to), len(rows))


class Keras(Peer):
    """The original in another Python."""

    def __init__(self, python: str) -> None:
        super().__init__(Path(python), Path(__file__).with_name("proteinbert_keras.py"))

    def run(self, sequences: Sequence[str]) -> float:
        """Its own count of seconds; a race takes those that pass here."""
        return float(self.ask(sequences=list(sequences)))
