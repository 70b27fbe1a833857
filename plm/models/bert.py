"""BERT: the bidirectional post-norm encoder of ProtBert, ProtBert-BFD, IgBert and IgBert_unpaired, on packed tokens.

Devlin et al. 2019 (the architecture), Elnaggar et al. 2021 (ProtBert), Kenlay et al. 2024 (IgBert). Numbers follow
transformers 5.23 models/bert, of which the four checkpoints are instances.

Letters: n packed tokens, b sequences, t tokens of a sequence, h heads, d head size, c channels, v vocabulary, l layers.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.layers import LayerNorm, Linear, PackedWeight
from plm.packing import Packed
from plm_kernels import attention, attention_weights, linear, product

Maps = list[list[Tensor]]
"""Attention maps ``[h, t, t]``, per layer and sequence."""


@dataclass(frozen=True)
class Config:
    """Sizes of one checkpoint, and which heads it carries.

    ``positions`` counts the rows of the position table, all of them used; ``types`` those of the token types.
    ``relation_head`` tells from the pooled sequence whether its second part follows the first (BERT's next-sentence
    prediction).

    ``norm_eps`` would be zero in float16, but no norm computes in it: ``nn.LayerNorm`` keeps its statistics, to which
    eps is added, in float32 where its input has less.
    """

    vocabulary: int
    layers: int
    channels: int
    heads: int
    feed_forward: int
    positions: int
    types: int
    norm_eps: float = 1e-12
    lm_head: bool = True
    pooler: bool = False
    relation_head: bool = False

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(
                f"channels must be a multiple of heads; got {self.channels} channels and {self.heads} heads"
            )
        if self.relation_head and not self.pooler:
            raise ValueError("a relation head reads what a pooler makes; got a relation head without a pooler")

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def widest(self) -> int:
        """Channels of the widest activation."""
        return self.feed_forward

    @property
    def max_length(self) -> int:
        """Most tokens per sequence, ``[CLS]`` and ``[SEP]`` included."""
        return self.positions


@dataclass(frozen=True)
class Output:
    """What one forward pass gives; None where it was not asked for or the checkpoint has no such head."""

    hidden: Tensor  # [n, c] of the last layer
    logits: Tensor | None = None  # [n, v]
    hidden_states: tuple[Tensor, ...] | None = None  # l + 1 of [n, c]: normed embeddings, then each layer's output
    attentions: list[Tensor] | None = None  # per sequence [l, h, t, t]
    pooled: Tensor | None = None  # [b, c]
    relation_logits: Tensor | None = None  # [b, 2]: the second part follows the first, or does not


class Attention(nn.Module):
    """Bidirectional self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = config.head_size**-0.5
        self.qkv = Linear(config.channels, 3 * config.channels)
        self.out = Linear(config.channels, config.channels)

    def forward(self, x: Tensor, batch: Packed, maps: Maps | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [n, h, d] each
        if maps is not None:
            pairs = zip(batch.split(q), batch.split(k), strict=True)
            maps.append([attention_weights(queries, keys, scale=self.scale) for queries, keys in pairs])
        mixed = attention(q, k, v, batch.offsets, scale=self.scale, max_length=batch.max_length)
        return self.out(mixed.flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Post-norm residual block: what is normalised is the sum."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = LayerNorm(config.channels, config.norm_eps)
        self.up = Linear(config.channels, config.feed_forward)
        self.down = Linear(config.feed_forward, config.channels)
        self.feed_forward_norm = LayerNorm(config.channels, config.norm_eps)

    def forward(self, x: Tensor, batch: Packed, maps: Maps | None) -> Tensor:
        x = self.attention_norm(x, self.attention(x, batch, maps))
        return self.feed_forward_norm(x, self.down(self.up(x, "gelu")))  # type: ignore[no-any-return]


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary; the decoder is the token embedding, with a bias of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = Linear(config.channels, config.channels)
        self.norm = LayerNorm(config.channels, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.packed = PackedWeight()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.norm(self.dense(x, "gelu"))
        packed = self.packed.of(x, embedding)
        return product(x, embedding, self.bias) if packed is None else linear(x, packed, self.bias)


class BERT(nn.Module):
    """The encoder with the heads its checkpoint carries. Call it with a ``Packed`` batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.embed = nn.Embedding(config.vocabulary, c)
        self.positions = nn.Embedding(config.positions, c)
        self.types = nn.Embedding(config.types, c)
        self.embed_norm = LayerNorm(c, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.lm_head = MaskedLMHead(config) if config.lm_head else None
        self.pooler = Linear(c, c) if config.pooler else None
        self.relation_head = Linear(c, 2) if config.relation_head else None

    def forward(
        self,
        batch: Packed,
        *,
        types: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        logits: bool = True,
    ) -> Output:
        """Run the encoder and the heads.

        Args:
            types: token types ``[n]``; None means 0 throughout, in both chains of a pair as well, as IgBert was trained
                (a tokenizer that is given two texts would number the second one 1).
            hidden_states: keep the embeddings and every layer's output, as the originals number them.
            attentions: keep every attention map; ``l h t^2`` numbers per sequence.
            logits: set to False to skip the masked-language-model head.

        Raises:
            ValueError: a sequence longer than ``config.max_length``, or types of another shape than the tokens.
        """
        out = self.encode(batch, types=types, hidden_states=hidden_states, attentions=attentions)
        pooled = torch.tanh(self.pooler(out.hidden[batch.first])) if self.pooler else None
        return replace(
            out,
            logits=self.lm_head(out.hidden, self.embed.weight) if logits and self.lm_head else None,
            pooled=pooled,
            relation_logits=self.relation_head(pooled) if self.relation_head else None,
        )

    def encode(
        self,
        batch: Packed,
        *,
        types: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        layer: int | None = None,
    ) -> Output:
        """Run the encoder without any head, up to ``layer`` (0 are the embeddings) or to its end.

        Other arguments and errors as ``forward``.
        """
        x = self.embed_tokens(batch, types)
        maps: Maps | None = [] if attentions else None
        states = [x]
        for block in self.blocks[:layer]:
            x = block(x, batch, maps)
            if hidden_states:
                states.append(x)
        return Output(
            hidden=x,
            hidden_states=tuple(states) if hidden_states else None,
            attentions=None if maps is None else [torch.stack(layers) for layers in zip(*maps, strict=True)],
        )

    def logits(self, x: Tensor) -> Tensor:
        """What the masked-language-model head makes of encoder output: ``[n, c] -> [n, v]``."""
        if self.lm_head is None:
            raise ValueError("this checkpoint has no language-model head")
        return self.lm_head(x, self.embed.weight)  # type: ignore[no-any-return]

    def embed_tokens(self, batch: Packed, types: Tensor | None = None) -> Tensor:
        """Normed sum of the vectors of token, position and type, ``[n, c]``."""
        if batch.max_length > self.config.max_length:
            raise ValueError(
                f"a sequence has {batch.max_length} tokens; this checkpoint's position table ends at "
                f"{self.config.max_length} ({self.config.max_length - 2} residues). Cut it, or use ProtT5 or ESM-2."
            )
        if types is not None and types.shape != batch.tokens.shape:
            raise ValueError(
                f"types must have one number per packed token, shape {[*batch.tokens.shape]}; got {[*types.shape]}"
            )
        kind = self.types.weight[0] if types is None else self.types(types)
        return self.embed_norm(self.embed(batch.tokens) + kind + self.positions(batch.positions))  # type: ignore[no-any-return]


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the tokens whose label is not -100: logits ``[n, v]``, labels ``[n]``."""
    return F.cross_entropy(logits, labels)
