"""ProGen2: a causal decoder that reads and writes proteins from either end, on packed tokens.

Nijkamp et al. 2023 (Cell Systems 14, 968-978). The block is that of GPT-J (Wang & Komatsuzaki 2021): one norm, then
attention and feed-forward side by side, with rotary positions on the first channels of every head. "1" stands before
the first residue and "2" behind the last; a sequence reads "1MK...2" from N to C, or "2...KM1" from C to N.

Letters: n packed tokens, b sequences, t tokens of a sequence, h heads, d head size, c channels, v vocabulary, l layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.cache import Cache, Decoding, Memory, Room, State, steps
from plm.layers import LayerNorm, Linear
from plm.packing import Packed
from plm_kernels import Turns, attention, attention_weights, rotate_pairs_

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys (both turned) and values ``[n, h, d]`` to what each token gathers, ``[n, h, d]``."""


@dataclass(frozen=True)
class Config:
    """Sizes of one checkpoint.

    ``vocabulary`` counts the rows of the embedding and ``outputs`` those of the head, which ports with tokens of their
    own leave fewer. ``rotated`` channels of each head carry the position. ``max_length`` is the most tokens that the
    checkpoint was made for, terminals included.
    """

    vocabulary: int
    outputs: int
    layers: int
    channels: int
    heads: int
    rotated: int
    feed_forward: int
    max_length: int
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"channels must be a multiple of heads; got {self.channels} and {self.heads}")
        if self.outputs > self.vocabulary:
            raise ValueError(f"a head of {self.outputs} tokens, of which the embedding has only {self.vocabulary}")
        if self.rotated % 2 or not 0 < self.rotated <= self.head_size:
            raise ValueError(
                f"rotated must be even, at least 2 and at most the head size {self.head_size}; got {self.rotated}"
            )

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def widest(self) -> int:
        """Channels of the widest activation."""
        return self.feed_forward


@dataclass(frozen=True)
class Output:
    """What one pass gives; None where it was not asked for. States are numbered as the original numbers them."""

    hidden: Tensor  # [n, c] after the final norm, or of the layer that was asked for
    logits: Tensor | None = None  # [n, v]
    hidden_states: tuple[Tensor, ...] | None = None  # l + 1 of [n, c]: embeddings, layers, the last one normed
    attentions: list[Tensor] | None = None  # per sequence [l, h, t, t]


class Attention(nn.Module):
    """Causal self-attention. One matrix makes queries, values and keys, in the order of the published files."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qvk = Linear(config.channels, 3 * config.channels, bias=False)
        self.out = Linear(config.channels, config.channels, bias=False)

    def forward(self, x: Tensor, turns: Turns, attend: Attend) -> Tensor:
        q, v, k = self.qvk(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [n, h, d] each
        mixed = attend(*rotate_pairs_(q, k, turns), v)
        return self.out(mixed.flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """One hidden layer with the GELU's tanh form."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = Linear(config.channels, config.feed_forward)
        self.down = Linear(config.feed_forward, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, "gelu_tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward read the same normed input, and both are added to the residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = LayerNorm(config.channels, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, turns: Turns, attend: Attend) -> Tensor:
        normed = self.norm(x)
        return self.attention(normed, turns, attend) + self.feed_forward(normed) + x  # type: ignore[no-any-return]


class ProGen2(nn.Module):
    """Embedding, blocks, final norm, and a head of its own with a bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.channels, config.norm_eps)
        self.lm_head = Linear(config.channels, config.outputs)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]

    def encode(
        self, batch: Packed, *, hidden_states: bool = False, attentions: bool = False, layer: int | None = None
    ) -> Output:
        """Hidden states without the head, up to ``layer`` (0 are the embeddings) or to the end.

        Args:
            hidden_states: keep the embeddings and every layer's output.
            attentions: keep every attention map; ``layers h t^2`` numbers per sequence.
        """
        maps: list[list[Tensor]] | None = [] if attentions else None
        attend = self_attention(batch, self.config.head_size**-0.5, maps)
        turns = self.turns(batch.positions)
        x = self.embed(batch.tokens)
        states = [x]
        for block in islice(self, layer):
            x = block(x, turns, attend)
            states = [*states, x] if hidden_states else states
        if layer is None or layer == self.config.layers:
            x = self.norm(x)
        return Output(
            hidden=x,
            hidden_states=(*states[:-1], x) if hidden_states else None,
            attentions=None if maps is None else [torch.stack(layers) for layers in zip(*maps, strict=True)],
        )

    def forward(self, batch: Packed, *, hidden_states: bool = False, attentions: bool = False) -> Output:
        """``encode``, and the logits of the token behind each one."""
        out = self.encode(batch, hidden_states=hidden_states, attentions=attentions)
        return Output(out.hidden, self.logits(out.hidden), out.hidden_states, out.attentions)

    def read(
        self, tokens: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Hidden states ``[n, c]`` of tokens ``[n]`` at ``positions`` ``[n]``, after the final norm.

        What they attend to is the caller's: ``attend(layer, q, k, v)``, a cache's for one.
        """
        turns, x = self.turns(positions), self.embed(tokens)
        for layer, block in enumerate(self):
            x = block(x, turns, partial(attend, layer))
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """``[n, c] -> [n, v]``."""
        return self.lm_head(x)  # type: ignore[no-any-return]

    def room(self, room: Room) -> Decoding:
        """A cache of this size, in which nothing is yet."""
        config, like, scale = self.config, self.embed.weight, self.config.head_size**-0.5
        texts = (config.layers, room.texts, config.heads, room.text_tokens, config.head_size)
        prompts = (config.layers, room.prompts, config.heads, steps(room.prompt_tokens), config.head_size)
        return Decoding(Cache(texts, scale, like), Memory(prompts, scale, like))

    def join(self, state: State, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        """Read prompts up to their last token, which ``step`` wants next, once for each of ``counts`` texts."""
        read = [ids[:-1] for ids in prompts]  # an empty one has no token to be read
        taken = state.join([len(ids) for ids in read], counts)
        if not any(read):
            return
        batch = Packed.from_ids([ids for ids in read if ids], self.embed.weight.device)
        attend = self_attention(batch, self.config.head_size**-0.5, None)

        def remember(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            state.put(layer, taken, k, v)
            return attend(q, k, v)

        self.read(batch.tokens, batch.positions, remember)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """The newest token of each text ``[r]`` in, logits of the next ``[r, v]`` out. ``state`` remembers the rest."""
        state.check_room()
        hidden = self.read(tokens, state.positions(tokens.device), state.attend)
        state.advance()
        return self.logits(hidden)

    def turns(self, positions: Tensor) -> Turns:
        """Cosines and sines for tokens at ``positions`` ``[n]``."""
        rotated, like = self.config.rotated, self.embed.weight
        pair = torch.arange(
            0, rotated, 2, dtype=torch.float64, device="cpu" if like.device.type == "mps" else like.device
        )
        return Turns.at(positions, 10_000 ** (-pair / rotated), like.dtype)


def self_attention(batch: Packed, scale: float, maps: list[list[Tensor]] | None) -> Attend:
    """How the tokens of a batch attend to those before them; into ``maps`` goes a list of maps per layer, if wanted."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if maps is not None:
            pairs = zip(batch.split(q), batch.split(k), strict=True)
            maps.append([attention_weights(a, b, scale=scale, causal=True) for a, b in pairs])
        return attention(q, k, v, batch.offsets, scale=scale, causal=True, max_length=batch.max_length)

    return attend


def lm_loss(logits: Tensor, batch: Packed) -> Tensor:
    """Mean cross-entropy in nats of every token but each sequence's first: logits ``[n, v]``, terminals included."""
    targets = batch.tokens[1:].clone()
    targets[batch.offsets[1:-1].long() - 1] = -100  # the next sequence's first token follows from nothing
    return F.cross_entropy(logits[:-1], targets)
