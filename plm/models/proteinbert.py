"""ProteinBERT: a local track of residues and a global track of annotations, joined by convolutions and attention.

Brandes et al. 2022, doi:10.1093/bioinformatics/btac020. Numbers follow nadavbra/protein_bert@83198c9 (Keras), of which
the published checkpoint is an instance: exact GELU, layer norms with eps 1e-3, no masks.

Padding is part of the published function: ``<PAD>`` has an embedding like any letter, is convolved, normalised and
attended to, so one protein has other numbers for every padded length. What is computed here is what is asked for:
tokens as they stand, or (with ``lengths``) every protein as if it stood alone without padding.

Letters: b proteins, t tokens, n packed tokens, c local channels, g global channels, h heads, d key size, e value size,
a annotations, v vocabulary, l blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.layers import Linear, PackedWeight
from plm.packing import Packed
from plm_kernels import LocalBlock, convolution, global_attention, local_block, pack_filters, taps_first

PAD = 25


@dataclass(frozen=True)
class Config:
    """Sizes of one checkpoint; ``dilation`` is that of the wide convolution, the one thing that no shape tells."""

    vocabulary: int
    annotations: int
    layers: int
    channels: int
    global_channels: int
    heads: int
    key_size: int
    kernel: int = 9
    dilation: int = 5
    norm_eps: float = 1e-3

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "norm_eps"}
        if wrong := [f"{k} {v!r}" for k, v in sizes.items() if type(v) is not int or v < 1]:
            raise ValueError(f"sizes must be whole numbers of at least 1; got {', '.join(wrong)}")
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number from 0 to 1; got {self.norm_eps!r}")
        if self.global_channels % self.heads:
            raise ValueError(
                "global_channels must be a multiple of heads, as the heads' values end to end are a global vector; "
                f"got {self.global_channels} and {self.heads}"
            )

    @property
    def value_size(self) -> int:
        return self.global_channels // self.heads

    @property
    def widest(self) -> int:
        """Channels of the widest activation of a residue."""
        return max(self.global_channels, self.heads * self.key_size, self.channels)

    @property
    def max_length(self) -> None:
        """No limit: nothing in the network knows a position."""
        return

    @property
    def local_slices(self) -> dict[str, slice]:
        """Where each part of `Output.local_representations` lies: "block1.mid", "block1", ..., "letters"."""
        return _slices([*self._stages(self.channels), ("letters", self.vocabulary)])

    @property
    def global_slices(self) -> dict[str, slice]:
        """Where each part of `Output.global_representations` lies: "annotations_in", "block1.mid", "block1", ...,
        "annotations". What people call the 512-wide embedding is the last block's."""
        first, last = ("annotations_in", self.global_channels), ("annotations", self.annotations)
        return _slices([first, *self._stages(self.global_channels), last])

    def _stages(self, width: int) -> list[tuple[str, int]]:
        return [(f"block{i}{stage}", width) for i in range(1, self.layers + 1) for stage in (".mid", "")]


def _slices(parts: list[tuple[str, int]]) -> dict[str, slice]:
    found, start = {}, 0
    for name, width in parts:
        found[name] = slice(start, start + width)
        start += width
    return found


@dataclass(frozen=True)
class Output:
    """What one forward pass gives; None where it was not asked for."""

    local: Tensor  # [b, t, c]
    global_: Tensor  # [b, g]
    local_logits: Tensor | None = None  # [b, t, v]
    annotation_logits: Tensor | None = None  # [b, a]
    local_states: tuple[Tensor, ...] | None = None  # 2 l + 1 of [b, t, c]: embeddings, then two of every block
    global_states: tuple[Tensor, ...] | None = None  # 2 l + 1 of [b, g], likewise
    attentions: tuple[Tensor, ...] | None = None  # l of [b, h, t]: what each head of a block looks at

    @property
    def local_representations(self) -> Tensor:
        """``[b, t, 2 l c + v]``: the original's "all-seq-layers", that is its norms' outputs and probabilities of
        letters, without the embeddings. `Config.local_slices` names the parts. Needs ``hidden_states``."""
        if self.local_states is None or self.local_logits is None:
            raise ValueError("local representations need hidden_states=True and local_logits=True")
        return torch.cat([*self.local_states[1:], self.local_logits.softmax(-1)], -1)

    @property
    def global_representations(self) -> Tensor:
        """``[b, (2 l + 1) g + a]``: the original's "all-global-layers", ending in probabilities of annotations.
        `Config.global_slices` names the parts. Needs ``hidden_states``."""
        if self.global_states is None or self.annotation_logits is None:
            raise ValueError("global representations need hidden_states=True and annotation_logits=True")
        return torch.cat([*self.global_states, self.annotation_logits.sigmoid()], -1)


class Encoded(NamedTuple):
    """Packed proteins, encoded each on its own length or padded."""

    hidden: Tensor  # [n, c]
    global_: Tensor  # [b, g]


class Convolution(nn.Module):
    """``[b, t, c] -> [b, t, c]``, with zeros beyond both ends, then GELU."""

    def __init__(self, config: Config, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.zeros(config.channels, config.channels, config.kernel))
        self.bias = nn.Parameter(torch.zeros(config.channels))
        self.packed = PackedWeight(pack_filters)
        self.turned = PackedWeight(taps_first, "cuda")

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed.of(x, self.weight)
        return convolution(x, self.weight, self.bias, "gelu", dilation=self.dilation, packed=packed)

    def taps(self, x: Tensor) -> Tensor:
        """The filters ``[k, c, c]`` of one tap after the other, kept while nobody changes them."""
        turned = self.turned.of(x, self.weight)
        return taps_first(self.weight) if turned is None else turned


class GlobalAttention(nn.Module):
    """The global vector asks, all residues answer: ``[b, g], [b, t, c] -> [b, g]``. No biases, no output projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = config.key_size**-0.5
        self.query = Linear(config.global_channels, config.heads * config.key_size, bias=False)
        self.key = Linear(config.channels, config.heads * config.key_size, bias=False)
        self.value = Linear(config.channels, config.heads * config.value_size, bias=False)

    def forward(self, y: Tensor, x: Tensor, keep: Tensor | None, attentions: bool) -> tuple[Tensor, Tensor | None]:
        """Also the weights ``[b, h, t]``, if they are wanted."""
        b, t, c = x.shape
        rows = x.reshape(b * t, c)
        q = self.query(y, "tanh").view(b, self.heads, -1)
        k = self.key(rows, "tanh").view(b, t, self.heads, -1)
        v = self.value(rows, "gelu").view(b, t, self.heads, -1)
        mixed, weights = global_attention(q, k, v, scale=self.scale, keep=keep, weights=attentions)
        return mixed.flatten(1), weights


class Block(nn.Module):
    """Both tracks, post-norm. The local one reads the global vector, and the global one the new local states."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, g = config.channels, config.global_channels
        self.to_local = Linear(g, c)
        self.narrow = Convolution(config, 1)
        self.wide = Convolution(config, config.dilation)
        self.local_norm1 = nn.LayerNorm(c, config.norm_eps)
        self.local_dense = Linear(c, c)
        self.local_norm2 = nn.LayerNorm(c, config.norm_eps)
        self.global_dense1 = Linear(g, g)
        self.attention = GlobalAttention(config)
        self.global_norm1 = nn.LayerNorm(g, config.norm_eps)
        self.global_dense2 = Linear(g, g)
        self.global_norm2 = nn.LayerNorm(g, config.norm_eps)

    def forward(self, x: Tensor, y: Tensor, keep: Tensor | None, global_: bool, attentions: bool) -> "States":
        """``global_``: whether the global track goes on as well; ``attentions``: whether what it looks at is told."""
        local_mid, x = self.local(x, self.to_local(y, "gelu"), keep)
        if not global_:
            return States(local_mid, x, y, y, None)
        mixed, weights = self.attention(y, x, keep, attentions)
        global_mid = self.global_norm1(y + self.global_dense1(y, "gelu") + mixed)
        y = self.global_norm2(global_mid + self.global_dense2(global_mid, "gelu"))
        return States(local_mid, x, global_mid, y, weights)

    def local(self, x: Tensor, z: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The local track after each of its norms, in one kernel where there is one; z ``[b, c]`` is for all tokens."""

        def steps() -> tuple[Tensor, Tensor]:
            kept = x if keep is None else x * keep[:, :, None]
            mid = self.local_norm1(kept + z[:, None] + self.narrow(kept) + self.wide(kept))
            return mid, self.local_norm2(mid + self.local_dense(mid.flatten(0, 1), "gelu").view_as(x))

        return local_block(x, z, lambda: self.local_weights(x), steps, keep=keep)

    def local_weights(self, x: Tensor) -> LocalBlock:
        """What ``local`` multiplies ``x`` with."""
        narrow, wide, dense, norm1, norm2 = self.narrow, self.wide, self.local_dense, self.local_norm1, self.local_norm2
        filters = (narrow.taps(x), narrow.bias, wide.taps(x), wide.bias, wide.dilation)
        return LocalBlock(
            *filters, norm1.weight, norm1.bias, norm1.eps, dense.weight, dense.bias, norm2.weight, norm2.bias, norm2.eps
        )


class States(NamedTuple):
    """What a block gives: both tracks after each of its norms, and what its global attention looks at."""

    local_mid: Tensor  # [b, t, c]
    local: Tensor
    global_mid: Tensor  # [b, g]
    global_: Tensor
    attention: Tensor | None  # [b, h, t]


class ProteinBERT(nn.Module):
    """Both tracks with the two heads of pre-training. Call it with tokens ``[b, t]``, pads included."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.channels)
        self.annotations_in = Linear(config.annotations, config.global_channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.lm_head = Linear(config.channels, config.vocabulary)
        self.annotation_head = Linear(config.global_channels, config.annotations)

    def forward(
        self,
        tokens: Tensor,
        annotations: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        local_logits: bool = True,
        annotation_logits: bool = True,
    ) -> Output:
        """Run both tracks and the heads.

        Args:
            tokens: ``[b, t]`` ids, ``<PAD>`` (25) behind each protein.
            annotations: ``[b, a]``, 1 for what is known of a protein; None means that nothing is.
            lengths: ``[b]`` tokens of each protein. With it, what stands behind them does not exist: a protein gets the
                numbers that it gets alone without padding. Without it pads are tokens, as in the original.
            hidden_states: keep the states after every norm.
            attentions: keep the weights of the global attention.
            local_logits, annotation_logits: set to False to skip a head; that of the annotations is the widest product.

        Raises: ValueError for annotations of another shape, or lengths that are not those of the rows.
        """
        out = self.tracks(tokens, annotations, lengths=lengths, hidden_states=hidden_states, attentions=attentions)
        return replace(
            out,
            local_logits=self.logits(out.local.flatten(0, 1)).unflatten(0, tokens.shape) if local_logits else None,
            annotation_logits=self.annotation_head(out.global_) if annotation_logits else None,
        )

    def encode(
        self,
        batch: Packed,
        *,
        annotations: Tensor | None = None,
        layer: int | None = None,
        pad_to: int | None = None,
        global_: bool = True,
    ) -> Encoded:
        """Both tracks without any head, up to block ``layer`` (0 are the embeddings) or to the end.

        Args:
            pad_to: None gives each protein the numbers that it gets alone and without padding. A number gives those of
                the original at this ``seq_len``, its pads included.
            global_: set to False to spare the last global state; the first one of the block is given in its place.

        Raises: ValueError for a sequence longer than ``pad_to``; as ``forward``.
        """
        tokens, lengths = padded(batch, pad_to)
        out = self.tracks(tokens, annotations, lengths=lengths, layer=layer, global_=global_)
        return Encoded(out.local[batch.sequence, batch.positions], out.global_)

    def represent(self, batch: Packed, *, annotations: Tensor | None = None, pad_to: int | None = None) -> Encoded:
        """The original's "hidden layers as outputs" ``[n, 2 l c + v]`` and ``[b, (2 l + 1) g + a]``; see `Output`.

        Arguments and errors as those of ``encode``.
        """
        tokens, lengths = padded(batch, pad_to)
        out = self(tokens, annotations, lengths=lengths, hidden_states=True)
        return Encoded(out.local_representations[batch.sequence, batch.positions], out.global_representations)

    def tracks(
        self,
        tokens: Tensor,
        annotations: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        layer: int | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        global_: bool = True,
    ) -> Output:
        """What comes before the heads; arguments as those of ``forward`` and ``encode``."""
        if layer is not None and not 0 <= layer <= len(self.blocks):
            raise ValueError(f"layer must be from 0 to {len(self.blocks)}; got {layer}")
        keep = self.kept(tokens, lengths)
        x, y = self.embed(tokens), self.embed_annotations(annotations, len(tokens))
        local, both, maps = [x], [y], []
        blocks = self.blocks[:layer]
        for i, block in enumerate(blocks):
            states = block(x, y, keep, global_ or i + 1 < len(blocks), attentions)
            x, y = states.local, states.global_
            if hidden_states:
                local += [states.local_mid, x]
                both += [states.global_mid, y]
            if attentions:
                maps.append(states.attention)
        return Output(
            local=x,
            global_=y,
            local_states=tuple(local) if hidden_states else None,
            global_states=tuple(both) if hidden_states else None,
            attentions=tuple(maps) if attentions else None,
        )

    def kept(self, tokens: Tensor, lengths: Tensor | Sequence[int] | None) -> Tensor | None:
        """Where the proteins are, ``[b, t]`` bool; None if they fill the rows, or if pads are tokens."""
        if lengths is None:
            return None
        lengths = torch.as_tensor(lengths, device=tokens.device)
        if lengths.shape != tokens.shape[:1] or not bool(((lengths > 0) & (lengths <= tokens.shape[1])).all()):
            raise ValueError(
                f"lengths must be {len(tokens)} numbers from 1 to {tokens.shape[1]}, one per row of tokens; got "
                f"{lengths.tolist()}"
            )
        if int(lengths.min()) == tokens.shape[1]:
            return None
        return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]

    def embed_annotations(self, annotations: Tensor | None, count: int) -> Tensor:
        """The first global states ``[b, g]``. Of all-zero annotations only the bias is left, so nothing is multiplied
        (but where gradients are wanted zeros that are given are: then the weights have zeros for gradients, and none if
        no annotations are given).

        Raises: ValueError for another shape than ``[b, a]``.
        """
        wanted = (count, self.config.annotations)
        if annotations is not None and annotations.shape != wanted:
            raise ValueError(
                f"annotations must have shape {[*wanted]}, one row per protein; got {[*annotations.shape]}"
            )
        if annotations is None or not (torch.is_grad_enabled() or annotations.any()):
            return F.gelu(self.annotations_in.bias).expand(count, -1)
        return self.annotations_in(annotations.to(self.annotations_in.bias.dtype), "gelu")  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """Logits of letters from local states: ``[n, c] -> [n, v]``."""
        return self.lm_head(x)  # type: ignore[no-any-return]


def padded(batch: Packed, pad_to: int | None) -> tuple[Tensor, Tensor | None]:
    """What ``forward`` takes: tokens ``[b, t]``, and unless pads are meant the lengths ``[b]``.

    Raises: ValueError for a sequence longer than ``pad_to``.
    """
    width = batch.max_length if pad_to is None else pad_to
    if batch.max_length > width:
        raise ValueError(f"a sequence has {batch.max_length} tokens, more than pad_to={pad_to}; pad to more")
    tokens = F.pad(batch.pad(batch.tokens, PAD), (0, width - batch.max_length), value=PAD)
    return tokens, None if pad_to is not None else torch.tensor(batch.lengths, device=tokens.device)


def pretraining_loss(
    out: Output, tokens: Tensor, annotations: Tensor, *, annotation_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of pre-training in nats, and its two parts: (letters + annotation_weight * annotations, both).

    Pads are no targets, nor are the annotations of a protein that has none. The means are over all positions and all
    proteins all the same, as Keras takes them.

    Args:
        tokens: ``[b, t]`` true ids, where the network was given noisy ones.
        annotations: ``[b, a]`` true annotations, 0 or 1.

    Raises: ValueError if the output lacks one of the two logits.
    """
    if out.local_logits is None or out.annotation_logits is None:
        raise ValueError("the loss of pre-training needs local_logits=True and annotation_logits=True")
    annotations = annotations.to(out.annotation_logits.dtype)
    letters = F.cross_entropy(out.local_logits.transpose(1, 2), tokens.long(), reduction="none")
    known = F.binary_cross_entropy_with_logits(out.annotation_logits, annotations, reduction="none").mean(-1)
    letters = (letters * (tokens != PAD)).mean()
    known = (known * annotations.any(-1)).mean()
    return letters + annotation_weight * known, letters, known
