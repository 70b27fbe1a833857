"""The algorithms of FAESM and of esm-efficient (ESME) for ESM-2, on torch's own FlashAttention for packed sequences.

Neither package can be imported beside transformers 5, and both need a build of flash-attn. So these are not their
releases but what those do to a batch, written anew: the same operations on the same tensors in the same order, with
``flash_attn_varlen`` replaced by ``torch.nn.attention.varlen.varlen_attn``, which is FlashAttention-2 as well.

Read at pengzhangzhi/faesm@38c6a7f and uci-cbcl/esm-efficient@91a9348. Both run the linear layers on real tokens alone,
have a product each for queries, keys and values, and leave norms, GELU and residuals to PyTorch:

- FAESM embeds the padded batch, takes the pads out once, stacks q, k and v into one tensor (a copy), turns q and k
  there in place with flash-attn's Triton kernel (here this library's, which does the same), and pads the result again;
- ESME packs from the start, works out the positions anew in every layer, gathers cosines and sines for each token, and
  turns q and k by a concatenation and two products; its residuals are divided by a factor, which for ESM-2 is one.

Two things differ, in their favour or for the comparison: ESME leaves out ESM-2's rescaling of the embeddings, which is
put in (one product), and both get this library's weights, rounded like its own. Letters: n packed tokens, b sequences,
t tokens of the longest, h heads, d head size, c channels.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plm_kernels
from plm.models.esm import ESM, MASK, PAD, TRAINED_MASKED
from plm_kernels import Turns, reference, rotary_half

Flash = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
"""q, k, v ``[n, h, d]``, offsets ``[b + 1]``, tokens of the longest sequence, scale -> ``[n, h, d]``."""


def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float) -> Tensor:
    """FlashAttention-2 of torch. Where it takes no scale of its own, that is put into the queries."""
    from torch.nn.attention.varlen import varlen_attn

    if "scale" in inspect.signature(varlen_attn).parameters:
        return varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale)  # type: ignore[return-value]
    return varlen_attn(q * (scale * q.shape[-1] ** 0.5), k, v, offsets, offsets, longest, longest)


def by_reference(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float) -> Tensor:
    """The same by the formula, on any device: for tests and rehearsals."""
    return reference.attention(q, k, v, offsets, scale=scale)


def turned_in_place(qk: Tensor, turns: Turns) -> None:
    """q and k of qk ``[n, 2, h, d]`` turned where they lie, by one kernel if this library has it."""
    in_place = getattr(plm_kernels, "rotate_half_", None)
    turned = in_place(qk, turns, 1.0) if in_place else rotary_half(qk.flatten(1, 2), turns).chunk(2, dim=1)
    for old, new in zip(qk.unbind(1), turned, strict=True):
        if new.data_ptr() != old.data_ptr():
            old.copy_(new)


class Projections(nn.Module):
    """Queries, keys and values by a product each."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        weights, biases = qkv.weight.chunk(3), qkv.bias.chunk(3)
        self.weights = nn.ParameterList(nn.Parameter(x.clone(), requires_grad=False) for x in weights)
        self.biases = nn.ParameterList(nn.Parameter(x.clone(), requires_grad=False) for x in biases)

    def forward(self, x: Tensor, heads: int) -> list[Tensor]:
        """``[n, c]`` to three of ``[n, h, d]``."""
        pairs = zip(self.weights, self.biases, strict=True)
        return [F.linear(x, weight, bias).unflatten(-1, (heads, -1)) for weight, bias in pairs]


class Peer(nn.Module):
    """An ESM-2 with the weights of ours. The layers around attention are the same in both."""

    def __init__(self, net: ESM, flash: Flash = varlen) -> None:
        super().__init__()
        self.net, self.flash, self.heads = net, flash, net.config.heads
        self.projections = nn.ModuleList(Projections(block.attention.qkv) for block in net.blocks)

    def feed_forward(self, block: nn.Module, x: Tensor) -> Tensor:
        up = F.linear(block.feed_forward_norm(x), block.up.weight, block.up.bias)
        return F.linear(F.gelu(up), block.down.weight, block.down.bias)

    def out(self, block: nn.Module, mixed: Tensor) -> Tensor:
        return F.linear(mixed.flatten(-2), block.attention.out.weight, block.attention.out.bias)


class FAESM(Peer):
    """ids ``[b, t]`` and mask ``[b, t]`` to ``[b, t, c]``."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(-1, dtype=torch.int32)
        offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(lengths.max())
        places = mask.flatten().nonzero().flatten()
        x = self.embed(ids, mask).flatten(0, 1)[places]
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).flatten()[places]
        turns = Turns.at(position, self.net.frequencies, x.dtype)
        for block, projections in zip(self.net.blocks, self.projections, strict=True):
            q, k, v = projections(block.attention_norm(x), self.heads)
            qkv = torch.stack((q * block.attention.scale, k, v), dim=1)  # [n, 3, h, d]
            turned_in_place(qkv[:, :2], turns)
            x = x + self.out(block, self.flash(*qkv.unbind(1), offsets, longest, 1.0))
            x = x + self.feed_forward(block, x)
        x = self.net.norm(x)
        padded = x.new_zeros(ids.numel(), x.shape[-1])
        padded[places] = x
        return padded.unflatten(0, ids.shape)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As transformers: masked tokens are zero, the rest are scaled by the share that is masked."""
        x = self.net.embed(ids)
        masked = ids == MASK
        share = masked.sum(-1) / mask.sum(-1)
        x = x.masked_fill(masked[..., None], 0)
        x = (x * ((1 - TRAINED_MASKED) / (1 - share))[:, None, None]).to(x.dtype)
        return x * mask[..., None].to(x.dtype)


class ESME(Peer):
    """tokens ``[n]``, offsets ``[b + 1]`` and the longest length to ``[n, c]``."""

    def forward(self, tokens: Tensor, offsets: Tensor, longest: int) -> Tensor:
        x = self.embed(tokens, offsets)
        angles = torch.outer(torch.arange(longest, device=tokens.device).float(), self.net.frequencies).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # [t, d], kept by theirs between batches
        for block, projections in zip(self.net.blocks, self.projections, strict=True):
            q, k, v = projections(block.attention_norm(x), self.heads)
            q, k = (self.turn(each, cos, sin, offsets) for each in (q, k))
            mixed = self.flash(q, k, v, offsets, longest, block.attention.scale)
            x = x + self.out(block, mixed) / 1.0
            x = x + self.feed_forward(block, x) / 1.0
        return self.net.norm(x)

    def embed(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        x = self.net.embed(tokens)
        masked = tokens == MASK
        lengths = offsets.diff()
        sequence = torch.repeat_interleave(lengths.long(), output_size=len(tokens))
        share = torch.zeros_like(lengths).index_add_(0, sequence, masked.int()) / lengths
        x = x.masked_fill(masked[:, None], 0)
        return x * ((1 - TRAINED_MASKED) / (1 - share)).to(x.dtype)[sequence, None]

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor) -> Tensor:
        """Positions from offsets, a gather, a concatenation and two products: all of it for q and for k."""
        lengths = offsets.diff().long()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        position = torch.arange(len(x), device=x.device) - offsets[:-1][sequence]
        first, second = x.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
        return x * cos[position][:, None] + other * sin[position][:, None]


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """ids and mask ``[b, t]`` of rows of tokens, which is where FAESM starts."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
