"""The formulas, in plain PyTorch and without tricks: what every kernel of this package must equal.

Letters: n packed tokens, b sequences, t tokens of one sequence, h heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from plm_kernels.convolution import LocalBlock


@dataclass(frozen=True)
class RelativeBias:
    """A bias on attention logits that depends on the distance ``key - query`` alone.

    ``table`` is ``[h, 2 * D + 1]``: one value per head for each distance from ``-D`` to ``D``; farther
    keys share the value at the edge. Added to the scaled logits.
    """

    table: Tensor
    _bands: dict[tuple[int, bool, torch.dtype], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.table.shape[-1] % 2 == 0:
            raise ValueError(f"the table must be [h, 2 D + 1], one value per distance; got {[*self.table.shape]}")

    def at(self, distance: Tensor) -> Tensor:
        """The bias ``[h, ...]`` at distances ``[...]``."""
        reach = (self.table.shape[-1] - 1) // 2
        return self.table[:, distance.clamp(-reach, reach) + reach]

    def dense(self, length: int) -> Tensor:
        """The bias of one sequence written out, ``[h, t, t]``, rows are queries."""
        position = torch.arange(length, device=self.table.device)
        return self.at(position[None, :] - position[:, None])

    def band(self, length: int, causal: bool, dtype: torch.dtype) -> Tensor:
        """The bias of one sequence by distance, ``[h, 2 t - 1]`` from ``1 - t`` to ``t - 1``: all that ``dense`` holds.

        Where ``causal``, keys after the query have ``-inf``. Kept, because every layer of a stack asks for the same.
        """
        key = (length, causal, dtype)
        if key not in self._bands:
            distance = torch.arange(1 - length, length, device=self.table.device)
            band = self.at(distance).to(dtype)
            self._bands[key] = band.masked_fill(distance > 0, -torch.inf) if causal else band
        return self._bands[key]


def attention_weights(
    q: Tensor, k: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """``softmax(scale * q k^T + bias)`` of one sequence: q, k ``[t, h, d]`` -> ``[h, t, t]``, each row sums to 1.

    The softmax runs in float32 at least.
    """
    logits = scale * torch.einsum("qhd,khd->hqk", q, k)
    if bias is not None:
        logits = logits + bias
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    precise = torch.promote_types(q.dtype, torch.float32)
    return logits.softmax(-1, dtype=precise).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: RelativeBias | None = None,
    key_offsets: Tensor | None = None,
) -> Tensor:
    """Attention within each packed sequence, one sequence after the other: ``[n, h, d] -> [n, h, d]``.

    With ``key_offsets`` the keys and values are those of another packed batch, sequence by sequence.
    """
    queries = pairwise(offsets.tolist())
    keys = pairwise((offsets if key_offsets is None else key_offsets).tolist())
    mixed = []
    for (start, stop), (first, last) in zip(queries, keys, strict=True):
        dense = None if bias is None else bias.dense(stop - start)
        weights = attention_weights(q[start:stop], k[first:last], scale=scale, causal=causal, bias=dense)
        mixed.append(torch.einsum("hqk,khd->qhd", weights, v[first:last]))
    return torch.cat(mixed) if mixed else torch.empty_like(q)


def attention_part(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q ``[b, h, m, d]`` to k, v ``[b, h, t, d]``, and ``log(sum(exp(logits)))`` ``[b, h, m]``.

    The softmax runs in float32 at least, and so do the sums.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = (scale * q @ k.transpose(-1, -2)).to(precise)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1).to(v.dtype) @ v, logits.logsumexp(-1)


def rotary_half(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel ``i`` of x ``[n, h, d]`` with channel ``i + d/2`` by ``angles[n, i]`` (``[n, d/2]``, radians).

    The convention of GPT-NeoX, LLaMA and ESM-2 (Su et al. 2021, with the pairs split over the two halves of a head).
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel ``2 i`` with channel ``2 i + 1`` by ``angles[n, i]``; channels past ``2 * angles.shape[-1]`` stay.

    The convention of GPT-J and ProGen2, which turn only the first ``rotary_dim`` channels of each head.
    """
    turned, rest = x.split((2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]), dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(x @ weight.T + bias)``: ``[n, i] -> [n, o]``, rounded once, in float32 at least until then."""
    precise = torch.promote_types(x.dtype, torch.float32)
    y = x.to(precise) @ weight.to(precise).T
    return activation(y if bias is None else y + bias.to(precise)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the channels of ``[n, c]``; the mean in float32 at least."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (x * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``weight * (x - mean) / sqrt(variance + eps) + bias`` over the channels of ``[n, c]``, in float32 at least."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = precise - precise.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (weight * normed + bias).to(x.dtype)


def gated(x: Tensor, activation: str) -> Tensor:
    """``act(x[:, :f]) * x[:, f:]``, in float32 at least: ``[n, 2 f] -> [n, f]``.

    "gelu" is ``x`` times the normal distribution function (Hendrycks & Gimpel 2016), "gelu_tanh" their approximation
    of it, "silu" ``x`` times the logistic function.
    """
    gate, linear = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    share = {
        "gelu": 0.5 * (1 + torch.erf(gate / 2**0.5)),
        "gelu_tanh": 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
        "silu": 1 / (1 + torch.exp(-gate)),
    }[activation]
    return (gate * share * linear).to(x.dtype)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, *, dilation: int = 1) -> Tensor:
    """``y[t] = bias + sum over taps j of weight[:, :, j] @ x[t + j * dilation - left]``: ``[b, t, i] -> [b, t, o]``.

    Beyond both ends ``x`` is zero, and left is ``(k - 1) * dilation // 2``, so that an odd zero stands behind.
    """
    left = (weight.shape[-1] - 1) * dilation // 2
    rows = []
    for t in range(x.shape[1]):
        y = bias.expand(len(x), -1)
        for j, tap in enumerate(weight.unbind(-1)):
            if 0 <= t + j * dilation - left < x.shape[1]:
                y = y + x[:, t + j * dilation - left] @ tap.T
        rows.append(y)
    return torch.stack(rows, 1)


def local_block(x: Tensor, added: Tensor, weights: LocalBlock, *, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The local track of a block of ProteinBERT, whose filters are ``[k, i, o]``: ``[b, t, c]``, ``[b, c]`` -> two of
    ``[b, t, c]``, after each of the norms.

    Source: Brandes et al. 2022; nadavbra/protein_bert@83198c9, ``create_model``.
    """
    w = weights
    x = x if keep is None else torch.where(keep[:, :, None], x, 0)
    narrow = convolution(x, w.narrow.permute(2, 1, 0), w.narrow_bias)
    wide = convolution(x, w.wide.permute(2, 1, 0), w.wide_bias, dilation=w.dilation)
    mid = layer_norm(x + added[:, None] + gelu(narrow) + gelu(wide), w.gain1, w.shift1, w.eps1)
    return mid, layer_norm(mid + gelu(mid @ w.dense.T + w.dense_bias), w.gain2, w.shift2, w.eps2)


def gelu(x: Tensor) -> Tensor:
    """The exact one: x times the share of a standard normal below it."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def global_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` of one query per sequence, one sequence after the other, and the weights.

    q ``[b, h, d]``, k ``[b, t, h, d]``, v ``[b, t, h, e]`` -> ``[b, h, e]``, ``[b, h, t]``. Of a token that keep
    ``[b, t]`` is False for the weight is 0. The softmax runs in float32 at least.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    mixed, maps = [], []
    for i in range(len(q)):
        kept = torch.ones_like(k[i, :, 0, 0], dtype=torch.bool) if keep is None else keep[i]
        logits = scale * torch.einsum("hd,thd->ht", q[i], k[i, kept])
        weights = logits.softmax(-1, dtype=precise).to(q.dtype)
        mixed.append(torch.einsum("ht,the->he", weights, v[i, kept]))
        maps.append(weights.new_zeros(len(weights), len(kept)).masked_scatter(kept, weights))
    return torch.stack(mixed), torch.stack(maps)


def triangle_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None = None, *, scale: float
) -> Tensor:
    """``sigmoid(gate) * sum over k of softmax(scale * q[i, j] . k[i, k] + bias[j, k]) v[i, k]``, row by row of pairs.

    q, k, v ``[r, l, h, d]``; bias ``[h, l, l]``, the same for all rows; gate ``[r * l, h * d]`` -> ``[r * l, h * d]``.
    """
    rows = []
    for queries, keys, values in zip(q, k, v, strict=True):
        weights = attention_weights(queries, keys, scale=scale, bias=bias)
        rows.append(torch.einsum("hjk,khd->jhd", weights, values).flatten(1))
    mixed = torch.cat(rows) if rows else q.flatten(2).flatten(0, 1)
    return mixed if gate is None else mixed * torch.sigmoid(gate)


def pair_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the channels of ``[..., c]``: in float32 at least, and
    given in the weights' dtype."""
    precise = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    centred = x.to(precise) - x.to(precise).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight + bias).to(weight.dtype)


def triangle_sides(x: Tensor, gate: Tensor, length: int) -> Tensor:
    """``x * sigmoid(gate)`` with a matrix of pairs for each channel: ``[r * l, c] -> [c, r, l]``."""
    return (x * torch.sigmoid(gate)).view(-1, length, x.shape[1]).permute(2, 0, 1)


def triangle_product(a: Tensor, b: Tensor, outgoing: bool) -> Tensor:
    """What pair (i, j) hears from all k: the sum of ``a[i, k] b[j, k]``, or of ``a[k, i] b[k, j]``: ``[c, l, l]``."""
    return torch.einsum("cik,cjk->cij" if outgoing else "cki,ckj->cij", a, b)


def add_gated(z: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``z + x * sigmoid(gate)``: pairs ``[r, l, c]``, x and gate ``[r * l, c]``."""
    return z + (x * torch.sigmoid(gate)).view_as(z)
