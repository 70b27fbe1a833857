"""T5: an encoder of protein sequences and a decoder that writes them, on packed tokens.

Ankh, Ankh2 and Ankh3 (Elnaggar et al. 2023; Alsamkary et al. 2025), ProtT5 (Elnaggar et al. 2022), ProstT5 (Heinzinger
et al. 2024) and IgT5 (Kenlay et al. 2024) differ in their sizes, in the activation, and in whether the head is the
embedding. The architecture is that of Raffel et al. 2020: norms without mean or bias, linear layers without bias,
attention without a scale, and no positions but a learned bias on each distance. Numbers follow transformers 5.23.

Letters: n packed tokens (m of the encoder), b sequences, h heads, d head size, c channels, v vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.cache import Cache, Decoding, Memory, Room, steps
from plm.layers import Linear, PackedWeight
from plm.packing import Packed
from plm_kernels import Gate, RelativeBias, add_rms_norm, attention, attention_weights, gated, linear, product, rms_norm

PAD, EOS, START = 0, 1, 0  # the decoder begins with padding
Activation = Literal["relu", "gated-gelu", "gated-silu"]
GATES: Mapping[Activation, Gate] = {"gated-gelu": "gelu_tanh", "gated-silu": "silu"}
Maps = list[list[Tensor]]  # attention maps [h, t, t] by layer and sequence


@dataclass(frozen=True)
class Config:
    """Sizes of one checkpoint. ``heads * head_size`` need not be ``channels``; no decoder layers: an encoder alone.

    ``tied``: the head is the embedding, and what goes into it is scaled by ``channels ** -0.5``.
    """

    vocabulary: int
    layers: int
    decoder_layers: int
    channels: int
    heads: int
    head_size: int
    feed_forward: int
    activation: Activation
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    tied: bool = True

    @property
    def widest(self) -> int:
        """Channels of the widest activation: both halves of a gated one lie beside their product."""
        return self.feed_forward * (1 if self.activation == "relu" else 3)

    @property
    def outputs(self) -> int:
        """Tokens that the decoder chooses from."""
        return self.vocabulary

    max_length = None  # most tokens per sequence: only memory limits it (``n_positions`` in published files is ignored)


@dataclass(frozen=True)
class Output:
    """What one pass gives; None where it was not asked for. States are numbered as transformers numbers them."""

    hidden: Tensor  # [n, c] after the final norm: of the decoder if there was one, else of the encoder
    logits: Tensor | None = None  # [n, v]
    hidden_states: tuple[Tensor, ...] | None = (
        None  # layers + 1 of [n, c]: embeddings, residual stream, last one normed
    )
    attentions: list[Tensor] | None = None  # per sequence [layers, h, t, t]
    cross_attentions: list[Tensor] | None = None  # per sequence [layers, h, t, s]
    encoder_hidden: Tensor | None = None  # [m, c]


class Norm(nn.Module):
    """Root-mean-square norm. The mean square is taken in float32 at least."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``x + delta``, and its norm."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class PositionBias(nn.Module):
    """A value per head for each bucket of distances; one table serves all layers of a stack."""

    def __init__(self, config: Config, causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.buckets, config.heads))
        self.reach, self.buckets, self.causal = config.max_distance, config.buckets, causal
        self.numbers: Tensor | None = None  # bucket [2 reach + 1] of each distance

    def forward(self) -> RelativeBias:
        """The bias by distance, in float32 at least."""
        if self.numbers is None or self.numbers.device != self.weight.device:
            # On the CPU, whose logarithms are those of the originals; once, as a recorded pass cannot wait for it.
            with torch.inference_mode(False):
                distance = torch.arange(-self.reach, self.reach + 1)
                self.numbers = bucket(distance, self.buckets, self.reach, self.causal).to(self.weight.device)
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        return RelativeBias(self.weight.to(precise)[self.numbers].T.contiguous())


def bucket(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Bucket of each distance ``key - query``: one each for the nearest, then ever wider ones up to ``max_distance``.

    An encoder's upper half of buckets is for keys after the query; a decoder has none of those. Source: Raffel et al.
    2020, and for the rounding (float32, truncated) transformers.
    """
    after = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        buckets //= 2
        after = (distance > 0) * buckets
        distance = distance.abs()
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return after + torch.where(distance < exact, distance, wide)


class SelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_size
        self.qkv = Linear(config.channels, 3 * inner, bias=False)
        self.out = Linear(inner, config.channels, bias=False)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [n, h, d]
        return self.out(attend(q, k, v).flatten(-2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_size
        self.q = Linear(config.channels, inner, bias=False)
        self.kv = Linear(config.channels, 2 * inner, bias=False)
        self.out = Linear(inner, config.channels, bias=False)

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder looks at: two of ``[m, h, d]``."""
        keys, values = self.kv(encoded).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return keys, values

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        return self.out(attend(q).flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """One hidden layer; gated, ``up`` holds the activated half over the linear half."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation = config.activation
        halves = 1 if config.activation == "relu" else 2
        self.up = Linear(config.channels, halves * config.feed_forward, bias=False)
        self.down = Linear(config.feed_forward, config.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return self.down(self.up(x, "relu"))  # type: ignore[no-any-return]
        return self.down(gated(self.up(x), GATES[self.activation]))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = Norm(config.channels, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = Norm(config.channels, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        x, normed = self.feed_forward_norm.add(x, self.attention(self.attention_norm(x), attend))
        return x + self.feed_forward(normed)  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = Norm(config.channels, config.norm_eps)
        self.attention = SelfAttention(config)
        self.cross_norm = Norm(config.channels, config.norm_eps)
        self.cross = CrossAttention(config)
        self.feed_forward_norm = Norm(config.channels, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], look: Callable[[Tensor], Tensor]
    ) -> Tensor:
        x, normed = self.cross_norm.add(x, self.attention(self.attention_norm(x), attend))
        x, normed = self.feed_forward_norm.add(x, self.cross(normed, look))
        return x + self.feed_forward(normed)  # type: ignore[no-any-return]


Block = TypeVar("Block", EncoderBlock, DecoderBlock)


class Stack(nn.Module, Generic[Block]):
    """The blocks of an encoder or of a decoder, with the bias that all of them add and the norm behind them."""

    def __init__(self, config: Config, block: type[Block], layers: int, causal: bool) -> None:
        super().__init__()
        self.relative_bias = PositionBias(config, causal)
        self.blocks = nn.ModuleList(block(config) for _ in range(layers))
        self.norm = Norm(config.channels, config.norm_eps)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]


class T5(nn.Module):
    """Encoder and decoder. ``encode`` a batch for embeddings; call it with a decoder's batch for logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.channels)
        self.encoder = Stack(config, EncoderBlock, config.layers, causal=False)
        self.decoder = (
            Stack(config, DecoderBlock, config.decoder_layers, causal=True) if config.decoder_layers else None
        )
        has_head = config.decoder_layers and not config.tied
        self.lm_head = Linear(config.channels, config.vocabulary, bias=False) if has_head else None
        self.tied_head = PackedWeight()

    def encode(
        self, batch: Packed, *, hidden_states: bool = False, attentions: bool = False, layer: int | None = None
    ) -> Output:
        """The encoder alone, up to ``layer`` (0 are the embeddings) or to its end.

        Args:
            hidden_states: keep the embeddings and every layer's output.
            attentions: keep every attention map; ``layers h t^2`` numbers per sequence.
        """
        bias = self.encoder.relative_bias()
        maps: Maps | None = [] if attentions else None
        attend = self_attention(batch, bias, causal=False, maps=maps)
        x = self.embed(batch.tokens)
        states = [x]
        for block in islice(self.encoder, layer):
            x = block(x, attend)
            states = [*states, x] if hidden_states else states
        if layer is None or layer == self.config.layers:
            x = self.encoder.norm(x)
        return Output(
            hidden=x, hidden_states=(*states[:-1], x) if hidden_states else None, attentions=by_sequence(maps)
        )

    def forward(
        self, batch: Packed, *, decoder: Packed | None = None, hidden_states: bool = False, attentions: bool = False
    ) -> Output:
        """Encode ``batch``, and run the decoder over its own tokens, which begin with ``<pad>`` (see ``shift_right``).

        Args:
            decoder: as many sequences as ``batch`` has.
            hidden_states, attentions: as ``encode``, of the decoder.

        Raises:
            ValueError: the checkpoint has no decoder, or the two batches do not fit each other.
        """
        stack = self.need_decoder()
        if decoder is None:
            raise ValueError("give decoder=Packed(...), the decoder's own tokens, or call encode(batch) for embeddings")
        if len(decoder) != len(batch):
            raise ValueError(
                f"the encoder has {len(batch)} sequences and the decoder {len(decoder)}; one each is needed"
            )
        encoded = self.encode(batch).hidden
        maps: Maps | None = [] if attentions else None
        cross_maps: Maps | None = [] if attentions else None
        attend = self_attention(decoder, stack.relative_bias(), causal=True, maps=maps)
        x = self.embed(decoder.tokens)
        states = [x]
        for block in stack:
            look = cross_attention(decoder, batch, *block.cross.keys_values(encoded), maps=cross_maps)
            x = block(x, attend, look)
            states = [*states, x] if hidden_states else states
        x = stack.norm(x)
        return Output(
            hidden=x,
            logits=self.logits(x),
            hidden_states=(*states[:-1], x) if hidden_states else None,
            attentions=by_sequence(maps),
            cross_attentions=by_sequence(cross_maps),
            encoder_hidden=encoded,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Decoder output ``[n, c] -> [n, v]``."""
        if self.lm_head is not None:
            return self.lm_head(x)  # type: ignore[no-any-return]
        x = x * self.config.channels**-0.5
        packed = self.tied_head.of(x, self.embed.weight)
        return product(x, self.embed.weight, None) if packed is None else linear(x, packed, None)

    def room(self, room: Room) -> Decoding:
        """A cache of this size, in which nothing is yet. Raises: ValueError if the checkpoint has no decoder."""
        stack, config, like = self.need_decoder(), self.config, self.embed.weight
        distance = torch.arange(1 - room.text_tokens, 1, device=like.device)
        bias = stack.relative_bias().at(distance).contiguous()
        outer, inner = (config.decoder_layers,), (config.heads, room.text_tokens, config.head_size)
        cache = Cache((*outer, room.texts, *inner), scale=1.0, like=like, bias=bias)
        inner = (config.heads, steps(room.prompt_tokens), config.head_size)
        return Decoding(cache, Memory((*outer, room.prompts, *inner), scale=1.0, like=like))

    def join(self, state: Decoding, prompts: Sequence[Sequence[int] | Tensor], counts: Sequence[int]) -> None:
        """Encode prompts, and get ready to write ``counts`` texts to each, behind those that are there."""
        batch = Packed.from_ids(prompts, self.embed.weight.device)
        encoded = self.encode(batch).hidden
        taken = state.join(batch.lengths, counts)
        for layer, block in enumerate(self.need_decoder()):
            state.memory.put(layer, taken, *block.cross.keys_values(encoded))

    def begin(self, prompts: Packed, rows_per_prompt: int, capacity: int) -> Decoding:
        """A cache for just these prompts, encoded, and ``rows_per_prompt`` texts of ``capacity`` tokens to each."""
        state = self.room(Room(len(prompts) * rows_per_prompt, capacity, len(prompts), prompts.max_length))
        self.join(state, prompts.split(prompts.tokens), [rows_per_prompt] * len(prompts))
        return state

    def step(self, tokens: Tensor, state: Decoding) -> Tensor:
        """The newest token of each text ``[r]`` in, logits of the next ``[r, v]`` out. ``state`` remembers the rest."""
        stack = self.need_decoder()
        state.check_room()
        x = self.embed(tokens)
        for layer, block in enumerate(stack):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                return state.cache.attend(layer, q, k, v)[0].to(q.dtype)

            def look(q: Tensor, layer: int = layer) -> Tensor:
                found = state.memory.attend(layer, q)
                assert found is not None  # an encoder's prompt has a token at least
                return found[0].to(q.dtype)

            x = block(x, attend, look)
        state.cache.advance()
        return self.logits(stack.norm(x))

    def need_decoder(self) -> Stack[DecoderBlock]:
        if self.decoder is None:
            raise ValueError(
                "this checkpoint is an encoder alone; use one with a decoder to write or to score sequences"
            )
        return self.decoder


def self_attention(
    batch: Packed, bias: RelativeBias, *, causal: bool, maps: Maps | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How a stack attends to its own tokens; into ``maps`` goes one list of maps per layer, if wanted."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if maps is not None:
            pairs = zip(batch.split(q), batch.split(k), strict=True)
            maps.append([attention_weights(a, b, scale=1.0, causal=causal, bias=bias.dense(len(a))) for a, b in pairs])
        return attention(q, k, v, batch.offsets, scale=1.0, causal=causal, bias=bias, max_length=batch.max_length)

    return attend


def cross_attention(
    decoder: Packed, encoder: Packed, keys: Tensor, values: Tensor, *, maps: Maps | None
) -> Callable[[Tensor], Tensor]:
    """How a decoder's layer attends to the encoder's tokens: there is no bias between the two."""

    def look(q: Tensor) -> Tensor:
        if maps is not None:
            pairs = zip(decoder.split(q), encoder.split(keys), strict=True)
            maps.append([attention_weights(a, b, scale=1.0) for a, b in pairs])
        return attention(
            q,
            keys,
            values,
            decoder.offsets,
            scale=1.0,
            max_length=decoder.max_length,
            key_offsets=encoder.offsets,
            max_key_length=encoder.max_length,
        )

    return look


def by_sequence(maps: Maps | None) -> list[Tensor] | None:
    """Maps by layer and sequence as one ``[layers, h, t, t]`` per sequence."""
    return None if maps is None else [torch.stack(layers) for layers in zip(*maps, strict=True)]


def shift_right(labels: list[int]) -> list[int]:
    """The decoder's tokens that predict ``labels``: ``<pad>`` first, the last one left out, ``-100`` as ``<pad>``."""
    return [START, *(PAD if label == -100 else label for label in labels[:-1])]


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the tokens whose label is not -100: logits ``[n, v]``, labels ``[n]``."""
    return F.cross_entropy(logits, labels)
