"""ESM-1b, ESM-1v and ESM-2: bidirectional pre-norm encoders of protein sequences, on packed tokens.

Rives et al. 2021 (ESM-1b), Meier et al. 2021 (ESM-1v), Lin et al. 2023 (ESM-2). The three differ in two places:
ESM-2 turns queries and keys by their position, ESM-1b and ESM-1v add a learned vector per position; and ESM-1b alone
normalises the embeddings. Numbers follow fair-esm 2.0.0 (facebookresearch/esm@2b36991) to the last epsilon.

Letters: n packed tokens, b sequences, t tokens of a sequence, h heads, d head size, c channels, v vocabulary, l layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.layers import LayerNorm, Linear, PackedWeight
from plm.packing import Packed
from plm_kernels import Turns, attention, attention_weights, linear, product, rotate_half_

VOCABULARY = 33
CLS, PAD, EOS, MASK = 0, 1, 2, 32
TRAINED_MASKED = 0.15 * 0.8  # share of tokens that were <mask> in training


@dataclass(frozen=True)
class Config:
    """Sizes of one checkpoint, and which heads it carries.

    ``learned_positions`` counts the rows of the position table, of which the first two are never used (fairseq
    starts at padding index + 1); None means rotary positions.
    """

    layers: int
    channels: int
    heads: int
    feed_forward: int
    learned_positions: int | None
    norm_before: bool
    token_dropout: bool
    norm_eps: float
    lm_head: bool = True
    contact_head: bool = False
    pooler: bool = False
    sequence_labels: int | None = None
    token_labels: int | None = None

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(
                f"channels must be a multiple of heads; got {self.channels} channels and {self.heads} heads"
            )

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def widest(self) -> int:
        """Channels of the widest activation."""
        return self.feed_forward

    @property
    def max_length(self) -> int | None:
        """Most tokens per sequence, start and end tokens included; None if only memory limits it."""
        return None if self.learned_positions is None else self.learned_positions - 2


@dataclass(frozen=True)
class Output:
    """What one forward pass gives; None where it was not asked for or the checkpoint has no such head."""

    hidden: Tensor  # [n, c] after the final norm
    logits: Tensor | None = None  # [n, v]
    hidden_states: tuple[Tensor, ...] | None = None  # l + 1 of [n, c]: embeddings, residual stream, last one normed
    attentions: list[Tensor] | None = None  # per sequence [l, h, t, t]
    contacts: list[Tensor] | None = None  # per sequence [t - 2, t - 2], probabilities
    pooled: Tensor | None = None  # [b, c]
    sequence_logits: Tensor | None = None  # [b, labels]
    token_logits: Tensor | None = None  # [n, labels]


class Attention(nn.Module):
    """Bidirectional self-attention; rotary over the whole head where ``turns`` are given."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = config.head_size**-0.5
        self.qkv = Linear(config.channels, 3 * config.channels)
        self.out = Linear(config.channels, config.channels)

    def forward(self, x: Tensor, batch: Packed, turns: Turns | None, watch: "Watch | None") -> Tensor:
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=1)  # [n, 2, h, d], [n, 1, h, d]
        # The scale is on the queries and not on their products, as in the originals: the same roundings.
        if turns is None:
            q, k = qk.unbind(1)
            q = q * self.scale
        else:
            q, k = rotate_half_(qk, turns, self.scale)
        if watch is not None:
            watch(q, k)
        mixed = attention(q, k, v.squeeze(1), batch.offsets, scale=1.0, max_length=batch.max_length)
        return self.out(mixed.flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.channels, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = LayerNorm(config.channels, config.norm_eps)
        self.up = Linear(config.channels, config.feed_forward)
        self.down = Linear(config.feed_forward, config.channels)

    def forward(self, x: Tensor, batch: Packed, turns: Turns | None, watch: "Watch | None") -> Tensor:
        x, normed = self.feed_forward_norm.add(x, self.attention(self.attention_norm(x), batch, turns, watch))
        return x + self.down(self.up(normed, "gelu"))  # type: ignore[no-any-return]


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary; the decoder is the token embedding, with a bias of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = Linear(config.channels, config.channels)
        self.norm = LayerNorm(config.channels, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        self.packed = PackedWeight()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.norm(self.dense(x, "gelu"))
        packed = self.packed.of(x, embedding)
        return product(x, embedding, self.bias) if packed is None else linear(x, packed, self.bias)


class SequenceClassifier(nn.Module):
    """Labels per sequence from its first token, as ``EsmForSequenceClassification`` of transformers."""

    def __init__(self, config: Config, labels: int) -> None:
        super().__init__()
        self.dense = Linear(config.channels, config.channels)
        self.out = Linear(config.channels, labels)

    def forward(self, first: Tensor) -> Tensor:
        return self.out(torch.tanh(self.dense(first)))  # type: ignore[no-any-return]


class ContactHead(nn.Module):
    """Residue contacts by logistic regression on every attention map of every layer (Rao et al. 2020).

    Each map is made symmetric and freed of its background by average product correction (APC). Both are sums over
    maps, so the head is accumulated layer by layer: two ``[t, t]`` matrices per sequence, never ``[l h, t, t]``.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.layers * config.heads))
        self.bias = nn.Parameter(torch.zeros(1))

    def accumulate(self, logits: Tensor, layer: int, maps: Tensor) -> Tensor:
        """Add one layer's attention maps ``[h, t, t]`` of one sequence to its contact logits ``[t - 2, t - 2]``."""
        maps = maps[:, 1:-1, 1:-1].to(logits.dtype)  # residues to residues; rows are not normalised again
        weight = self.weight[0].view(-1, len(maps))[layer].to(logits.dtype)
        kept = weight.nonzero()[:, 0]  # the published regressions are sparse
        maps, weight = maps[kept], weight[kept]
        direct = torch.einsum("h,hij->ij", weight, maps)
        sums = maps.sum(-1) + maps.sum(-2)  # row sums of the symmetric map, [h, t - 2]
        background = torch.einsum("h,hi,hj->ij", weight / sums.sum(-1), sums, sums)
        return logits + direct + direct.T - background

    def forward(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits + self.bias.to(logits.dtype))


class Watch:
    """Reads attention maps on their way through the layers, to keep them or to sum them into contacts."""

    def __init__(self, batch: Packed, keep: bool, contact_head: ContactHead | None, like: Tensor) -> None:
        self.batch = batch
        self.layer = 0
        self.head = contact_head
        self.maps: list[list[Tensor]] | None = [[] for _ in batch.lengths] if keep else None
        precise = torch.promote_types(like.dtype, torch.float32)
        sizes = batch.lengths if contact_head is not None else ()
        self.logits = [like.new_zeros(max(t - 2, 0), max(t - 2, 0), dtype=precise) for t in sizes]

    def __call__(self, q: Tensor, k: Tensor) -> None:
        for i, (queries, keys) in enumerate(zip(self.batch.split(q), self.batch.split(k), strict=True)):
            maps = attention_weights(queries, keys, scale=1.0)
            if self.maps is not None:
                self.maps[i].append(maps)
            if self.head is not None:
                self.logits[i] = self.head.accumulate(self.logits[i], self.layer, maps)
        self.layer += 1


class ESM(nn.Module):
    """The encoder with the heads its checkpoint carries. Call it with a ``Packed`` batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.embed = nn.Embedding(VOCABULARY, c)
        if config.learned_positions is not None:
            self.positions = nn.Embedding(config.learned_positions, c)
        else:
            self.frequencies: Tensor
            self.register_buffer("frequencies", default_frequencies(config.head_size).to(self.embed.weight.device))
        if config.norm_before:
            self.norm_before = LayerNorm(c, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(c, config.norm_eps)
        self.lm_head = MaskedLMHead(config) if config.lm_head else None
        self.contact_head = ContactHead(config) if config.contact_head else None
        self.pooler = Linear(c, c) if config.pooler else None
        labels, token_labels = config.sequence_labels, config.token_labels
        self.sequence_classifier = None if labels is None else SequenceClassifier(config, labels)
        self.token_classifier = None if token_labels is None else Linear(c, token_labels)

    def forward(
        self,
        batch: Packed,
        *,
        hidden_states: bool = False,
        attentions: bool = False,
        contacts: bool = False,
        logits: bool = True,
    ) -> Output:
        """Run the encoder and the heads.

        Args:
            hidden_states: keep the embeddings and every layer's output, as the originals number them.
            attentions: keep every attention map; ``l h t^2`` numbers per sequence.
            contacts: contact probabilities between residues (the first and last token are taken off).
            logits: set to False to skip the masked-language-model head.

        Raises:
            ValueError: a sequence longer than ``config.max_length``, or contacts of a checkpoint without that head.
        """
        if contacts and self.contact_head is None:
            raise ValueError(
                "this checkpoint has no contact head (ESM-1v was published without one); use ESM-1b or ESM-2"
            )
        x, turns = self.embed_tokens(batch), self.turns(batch)
        contact_head = self.contact_head if contacts else None
        watch = Watch(batch, attentions, contact_head, x) if attentions or contacts else None
        states = [x]
        for block in self.blocks:
            x = block(x, batch, turns, watch)
            if hidden_states:
                states.append(x)
        x = self.norm(x)
        first = x[batch.first] if self.pooler or self.sequence_classifier else x
        return Output(
            hidden=x,
            logits=self.lm_head(x, self.embed.weight) if logits and self.lm_head else None,
            hidden_states=(*states[:-1], x) if hidden_states else None,
            attentions=[torch.stack(maps) for maps in watch.maps] if watch and watch.maps is not None else None,
            contacts=[contact_head(logit) for logit in watch.logits] if watch and contact_head else None,
            pooled=torch.tanh(self.pooler(first)) if self.pooler else None,
            sequence_logits=self.sequence_classifier(first) if self.sequence_classifier else None,
            token_logits=self.token_classifier(x) if self.token_classifier else None,
        )

    def encode(self, batch: Packed, *, layer: int | None = None) -> Output:
        """The encoder alone, up to ``layer`` (0 are the embeddings) or to its end: ``hidden`` is the state there."""
        x, turns = self.embed_tokens(batch), self.turns(batch)
        for block in self.blocks[:layer]:
            x = block(x, batch, turns, None)
        return Output(hidden=x if layer is not None and layer < self.config.layers else self.norm(x))

    def turns(self, batch: Packed) -> Turns | None:
        """How far each token is turned; None where positions are learned."""
        if self.config.learned_positions is not None:
            return None
        return Turns.at(batch.positions, self.frequencies, self.embed.weight.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """What the masked-language-model head makes of encoder output: ``[n, c] -> [n, v]``."""
        if self.lm_head is None:
            raise ValueError("this checkpoint has no language-model head")
        return self.lm_head(x, self.embed.weight)  # type: ignore[no-any-return]

    def embed_tokens(self, batch: Packed) -> Tensor:
        """Token vectors ``[n, c]`` with token dropout's rescaling, positions, and ESM-1b's norm."""
        x: Tensor = self.embed(batch.tokens)
        if self.config.token_dropout:
            masked = batch.tokens == MASK
            counts = torch.zeros_like(batch.offsets[1:]).index_add_(0, batch.sequence, masked.int())
            precise = torch.promote_types(x.dtype, torch.float32)
            share = counts.to(precise) / batch.offsets.diff()  # start and end tokens count, as in the originals
            factor = (1 - TRAINED_MASKED) / (1 - share)
            x = x.masked_fill(masked[:, None], 0) * factor.to(x.dtype)[batch.sequence, None]
        if self.config.max_length is not None:
            if batch.max_length > self.config.max_length:
                raise ValueError(
                    f"a sequence has {batch.max_length} tokens; this checkpoint's position table ends at "
                    f"{self.config.max_length} ({self.config.max_length - 2} residues). Cut it, or use ESM-2."
                )
            x = x + self.positions(batch.positions + 2)
        if self.config.norm_before:
            x = self.norm_before(x)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module, but never round the rotary frequencies (see ``default_frequencies``)."""
        frequencies = self.frequencies if self.config.learned_positions is None else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if frequencies is not None and not frequencies.is_meta:
            self.frequencies = frequencies.to(self.frequencies.device)
        return self


def default_frequencies(head_size: int) -> Tensor:
    """Radians per position for each rotated pair, ``[d / 2]``, rounded to float16 as in every published ESM-2 file.

    ESM-2 was trained in half precision and its files store these rounded values; exact ones change the logits
    (transformers pull request 19587).
    """
    # On the CPU: to make it on the device "meta" torch would import its compiler.
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return (1 / 10000**exponents).half().float()


def zero_mask_row(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """ESM-1's rule for the ``<mask>`` embedding: fair-esm zeroes it on loading ("for token drop"), ESM-2 keeps it.

    The row is never an input; being tied to the decoder it would otherwise change the logit of ``<mask>``.
    Source: fair-esm ``esm/pretrained.py``, ``_load_model_and_alphabet_core_v1``.
    """
    if config.learned_positions is None:
        return state
    embedding = state["embed.weight"].clone()
    embedding[MASK] = 0
    return {**state, "embed.weight": embedding}


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the tokens whose label is not -100: logits ``[n, v]``, labels ``[n]``."""
    return F.cross_entropy(logits, labels)


def classification_loss(logits: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """The losses of transformers' two ESM classifiers.

    Args:
        logits: ``[b, k]`` per sequence or ``[n, k]`` per token.
        labels: integers ``[b]`` (-100 is left out), or floats ``[b]`` / ``[b, k]``.
        problem: "regression", "single_label_classification" or "multi_label_classification"; None chooses as
            transformers does: one output is regression, integer labels are one class each, others many.
    """
    if problem is None:
        integer = not labels.is_floating_point()
        several = "single_label_classification" if integer else "multi_label_classification"
        problem = "regression" if logits.shape[-1] == 1 else several
    if problem == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).squeeze(-1))
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels)
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    raise ValueError(
        f"problem {problem!r} is unknown; choose 'regression', 'single_label_classification' or "
        "'multi_label_classification'"
    )


def initialise(net: ESM, generator: torch.Generator) -> None:
    """Fill a network for training from scratch: normal(0, 0.02) matrices, zero biases, norms at one."""
    for name, parameter in net.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
