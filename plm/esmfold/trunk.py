"""One block of the folding trunk: residues ``[l, c]`` and pairs ``[l, l, p]``, pre-norm (Lin et al. 2023, A.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.esmfold.config import Config
from plm.esmfold.pair import (
    Norm,
    PairToSequence,
    PairTransition,
    SequenceToPair,
    TriangleAttention,
    TriangleMultiplication,
)

# Linear layers of residues are torch's own: they hold 95 % of the trunk's weights and take 2 % of its time, so a packed
# second copy (see `plm.layers`) would cost 2.7 GB for nothing.


class SequenceAttention(nn.Module):
    """Gated attention between residues, with a bias from their pairs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.channels
        self.heads = c // config.head_size
        self.scale = config.head_size**-0.5
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        self.gate = nn.Linear(c, c)
        self.out = nn.Linear(c, c)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)  # [h, l, d] each
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], bias[None], scale=self.scale)[0]
        return self.out(mixed.transpose(0, 1).flatten(1) * torch.sigmoid(self.gate(x)))  # type: ignore[no-any-return]


class SequenceTransition(nn.Module):
    """A feed-forward of every residue by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Residues read their pairs, then pairs their residues and each other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        pair, size = config.pair, config.pair_head_size
        self.pair_to_sequence = PairToSequence(pair, config.channels // config.head_size)
        self.attention_norm = Norm(config.channels)
        self.attention = SequenceAttention(config)
        self.transition = SequenceTransition(config.channels)
        self.sequence_to_pair = SequenceToPair(config.channels, pair)
        self.outgoing = TriangleMultiplication(pair, outgoing=True)
        self.incoming = TriangleMultiplication(pair, outgoing=False)
        self.starting = TriangleAttention(pair, size, ending=False)
        self.ending = TriangleAttention(pair, size, ending=True)
        self.pair_transition = PairTransition(pair)

    def forward(self, s: Tensor, z: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Residues ``[l, c]`` and pairs ``[l, l, p]``, which may be overwritten; ``rows`` of pairs at a time."""
        s = s + self.attention(self.attention_norm(s), self.pair_to_sequence(z, rows))
        s = s + self.transition(s)
        z = self.sequence_to_pair(z, s, rows)
        z = self.outgoing(z, rows)
        z = self.incoming(z, rows)
        z = self.starting(z, rows)
        z = self.ending(z, rows)
        return s, self.pair_transition(z, rows)
