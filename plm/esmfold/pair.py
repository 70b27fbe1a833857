"""The pair track: what is known of every pair of residues, ``[l, l, c]``, and how triangles of them agree.

Jumper et al. 2021, algorithms 11 to 15, as in openfold@4b41059 and transformers 5.23.

The tensor of pairs is the only large one. So it is worked on row by row: every part below takes ``rows``, how many rows
it may hold at a time, and adds what it finds in place (unless gradients are wanted). Letters: l residues, r rows,
c channels, h heads, d head size.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from plm.layers import Linear
from plm_kernels import add_gated, empty_sides, pair_norm, triangle_attention, triangle_norm, write_sides

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
        return pair_norm(x, self.weight, self.bias, self.eps)

    def of_channels(self, x: Tensor, length: int) -> Tensor:
        """Of the first l columns of a matrix of pairs for each channel, ``[c, r, w]``: ``[r * l, c]``."""
        return triangle_norm(x, length, self.weight, self.bias, self.eps)


def normed(norm: Norm, z: Tensor, rows: int) -> Callable[[Rows], Tensor]:
    """Some rows of pairs under their norm, ``[r * l, c]``: once if all are worked on at a time, else whenever asked."""
    whole = norm(z).flatten(0, 1) if rows >= len(z) else None
    return lambda some: norm(z[some]).flatten(0, 1) if whole is None else whole


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
        x_of = normed(self.norm, z, rows)
        sides = empty_sides(2 * c, length, like=self.sides.weight)  # a product of matrices for each channel
        for some in chunks(length, rows):
            x = x_of(some)
            write_sides(sides[:, some], self.sides(x), partial(self.side_gates, x))
        a, b = sides.chunk(2)
        heard = z.clone() if torch.is_grad_enabled() else z

        def hear(block: Rows, product: Tensor) -> None:
            for some in chunks(product.shape[1], rows):
                here = slice(block.start + some.start, block.start + some.stop)
                y = self.out(self.product_norm.of_channels(product[:, some], length))
                add_gated(heard[here], y, partial(self.gate, x_of(here)))

        for block in chunks(length, max(rows, PRODUCT_ROWS)):
            hear(block, a[:, block] @ b.mT if self.outgoing else a[:, :, block].mT @ b)  # [c, r, l]
        return heard


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
        x_of = normed(self.norm, pairs, rows)
        bias = self.bias.weight.new_empty(self.heads, length, length)
        for some in chunks(length, rows):
            bias[:, some] = self.bias(x_of(some)).T.unflatten(1, (-1, length))

        def found(some: Rows) -> Tensor:
            x = x_of(some)
            q, k, v = self.qkv(x).view(-1, length, 3, self.heads, c // self.heads).unbind(2)  # [r, l, h, d] each
            mixed = triangle_attention(q, k, v, bias, partial(self.gate, x), scale=self.scale)
            return self.out(mixed).view(-1, length, c)  # type: ignore[no-any-return]

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
