"""The pair track: what is known of every pair of residues, ``[l, l, c]``, and how triangles of them agree.

Jumper et al. 2021, algorithms 11 to 15, as in openfold@4b41059 and transformers 5.23.

The tensor of pairs is the only large one. So it is worked on row by row: every part below takes ``rows``, how many rows
it may hold at a time, and adds what it finds in place (unless gradients are wanted). Letters: l residues, r rows,
c channels, h heads, d head size.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.layers import Linear

Rows = slice
PRODUCT_ROWS = 64  # with fewer, a product of matrices spends more time on arranging its second factor than on itself


def chunks(length: int, rows: int) -> Iterator[Rows]:
    """``rows`` rows at a time."""
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


def add_rows(z: Tensor, rows: int, found: Callable[[Rows], Tensor]) -> Tensor:
    """``z`` with what is found for each of its rows; ``found`` must not look at rows before its own."""
    if torch.is_grad_enabled():
        return z + torch.cat([found(some) for some in chunks(len(z), rows)])
    for some in chunks(len(z), rows):
        z[some] += found(some)
    return z


class Norm(nn.LayerNorm):
    """What a part of the trunk begins with. Pairs and residues are summed in float32 at least: they are normalised in
    that, and what comes out has the precision of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class TriangleMultiplication(nn.Module):
    """Each pair (i, j) hears from all k: of (i, k) and (j, k) if outgoing, else of (k, i) and (k, j)."""

    def __init__(self, channels: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.norm = Norm(channels)
        self.sides = Linear(channels, 2 * channels)
        self.side_gates = Linear(channels, 2 * channels)
        self.gate = Linear(channels, channels)
        self.product_norm = Norm(channels)
        self.out = Linear(channels, channels)

    def forward(self, z: Tensor, rows: int) -> Tensor:
        length, _, c = z.shape
        sides = self.sides.weight.new_empty(2 * c, length, length)  # a product of matrices for each channel
        for some in chunks(length, rows):
            x = self.norm(z[some]).flatten(0, 1)
            gated = self.sides(x) * self.side_gates(x, "sigmoid")
            sides[:, some] = gated.T.unflatten(1, (-1, length))
        a, b = sides.chunk(2)

        def found(block: Rows) -> Tensor:
            product = a[:, block] @ b.mT if self.outgoing else a[:, :, block].mT @ b  # [c, r, l]
            parts = []
            for some in chunks(product.shape[1], rows):
                y = self.product_norm(product[:, some].flatten(1).T)
                gate = self.gate(self.norm(z[block][some]).flatten(0, 1), "sigmoid")
                parts.append((self.out(y) * gate).view(-1, length, c))
            return torch.cat(parts)

        return add_rows(z, max(rows, PRODUCT_ROWS), found)


class TriangleAttention(nn.Module):
    """Each pair (i, j) looks at (i, k) for all k, with a bias for (j, k); if ``ending``, the same on the transpose."""

    def __init__(self, channels: int, head_size: int, ending: bool) -> None:
        super().__init__()
        self.ending = ending
        self.heads = channels // head_size
        self.scale = head_size**-0.5
        self.norm = Norm(channels)
        self.bias = Linear(channels, self.heads, bias=False)
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.gate = Linear(channels, channels)
        self.out = Linear(channels, channels)

    def forward(self, z: Tensor, rows: int) -> Tensor:
        length, _, c = z.shape
        pairs = z.transpose(0, 1) if self.ending else z
        bias = self.bias.weight.new_empty(self.heads, length, length)
        for some in chunks(length, rows):
            bias[:, some] = self.bias(self.norm(pairs[some]).flatten(0, 1)).T.unflatten(1, (-1, length))

        def found(some: Rows) -> Tensor:
            x = self.norm(pairs[some]).flatten(0, 1)
            q, k, v = self.qkv(x).view(-1, length, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, bias[None], scale=self.scale)  # [r, h, l, d]
            gate = self.gate(x, "sigmoid")
            return self.out(mixed.transpose(1, 2).reshape(-1, c) * gate).view(-1, length, c)  # type: ignore[no-any-return]

        pairs = add_rows(pairs, rows, found)
        return pairs.transpose(0, 1) if self.ending else pairs


class PairTransition(nn.Module):
    """A feed-forward of every pair by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.up = Linear(channels, 4 * channels)
        self.down = Linear(4 * channels, channels)

    def forward(self, z: Tensor, rows: int) -> Tensor:
        def found(some: Rows) -> Tensor:
            x = self.norm(z[some])
            return self.down(self.up(x.flatten(0, 1), "relu")).view_as(x)  # type: ignore[no-any-return]

        return add_rows(z, rows, found)


class SequenceToPair(nn.Module):
    """Products and differences of two residues' vectors, q of j and k of i, to their pair."""

    def __init__(self, channels: int, pair: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.qk = Linear(channels, pair)
        self.out = Linear(pair, pair)

    def forward(self, z: Tensor, s: Tensor, rows: int) -> Tensor:
        q, k = self.qk(self.norm(s)).chunk(2, -1)  # [l, c / 2] each
        of_product, of_difference = self.out.weight.T.chunk(2)  # [c / 2, c] each
        q_part, k_part = q @ of_difference + self.out.bias, k @ of_difference

        def found(some: Rows) -> Tensor:
            # (k_i * q_j) W is q_j times rows of W that k_i scales: no product of every pair is written out
            return q @ (k[some, :, None] * of_product) + q_part - k_part[some, None]  # type: ignore[no-any-return]

        return add_rows(z, rows, found)


class PairToSequence(nn.Module):
    """A bias for the attention between residues: ``[l, l, c] -> [h, l, l]``."""

    def __init__(self, pair: int, heads: int) -> None:
        super().__init__()
        self.norm = Norm(pair)
        self.out = Linear(pair, heads, bias=False)

    def forward(self, z: Tensor, rows: int) -> Tensor:
        length = len(z)
        bias = self.out.weight.new_empty(self.out.out_features, length, length)
        for some in chunks(length, rows):
            bias[:, some] = self.out(self.norm(z[some]).flatten(0, 1)).T.unflatten(1, (-1, length))
        return bias
