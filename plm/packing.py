"""One batch as one row of tokens: no padding, no mask, no batch axis.

Letters: n packed tokens, b sequences, t tokens of the longest sequence.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences laid end to end.

    Attributes:
        tokens: ``[n]`` int64, special tokens included.
        lengths: tokens per sequence, kept on the host so that no device is asked for them.
        offsets: ``[b + 1]`` int32 on the device of ``tokens``: where each sequence starts, then ``n``.
        positions: ``[n]`` int64, place of each token within its sequence, from 0.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    offsets: Tensor
    positions: Tensor

    @classmethod
    def from_ids(cls, rows: Iterable[Sequence[int] | Tensor], device: torch.device | str = "cpu") -> Self:
        """Pack one row of token ids per sequence (lists, or 1-D integer tensors)."""
        rows = list(rows)
        if not rows:
            raise ValueError("a batch needs at least one sequence; got none")
        if empty := [i for i, row in enumerate(rows) if len(row) == 0]:
            raise ValueError(f"every sequence needs at least one token; rows {empty} are empty")
        tokens = torch.cat([torch.as_tensor(row, dtype=torch.int64) for row in rows])
        return cls.from_tokens(tokens, tuple(len(row) for row in rows)).to(device)

    @classmethod
    def from_tokens(cls, tokens: Tensor, lengths: tuple[int, ...]) -> Self:
        """Name the sequences in tokens ``[n]`` that already lie end to end."""
        if tokens.dim() != 1 or sum(lengths) != len(tokens):
            raise ValueError(
                f"lengths add up to {sum(lengths)}; tokens have shape {[*tokens.shape]}, wanted [{sum(lengths)}]"
            )
        offsets = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        starts = torch.repeat_interleave(offsets[:-1].long(), offsets.diff(), output_size=len(tokens))
        positions = torch.arange(len(tokens)) - starts
        return cls(tokens.long(), lengths, offsets.to(tokens.device), positions.to(tokens.device))

    @classmethod
    def from_padded(cls, ids: Tensor, mask: Tensor) -> Self:
        """Pack the tokens of ids ``[b, t]`` where mask ``[b, t]`` is true, on whichever side the padding lies."""
        if ids.shape != mask.shape or ids.dim() != 2:
            raise ValueError(f"ids and mask must share one shape [b, t]; got {[*ids.shape]} and {[*mask.shape]}")
        keep = mask.bool()
        return cls.from_tokens(ids[keep], tuple(keep.sum(-1).tolist()))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @cached_property
    def sequence(self) -> Tensor:
        """``[n]`` int64: which sequence each token belongs to."""
        counts = torch.tensor(self.lengths)
        return torch.repeat_interleave(counts, output_size=len(self.tokens)).to(self.tokens.device)

    @property
    def first(self) -> Tensor:
        """``[b]`` index of each sequence's first token."""
        return self.offsets[:-1].long()

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut ``[n, ...]`` into one view per sequence."""
        return list(x.split(self.lengths))

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """Lay ``[n, ...]`` out as ``[b, t, ...]``, filled with ``value`` behind each sequence."""
        padded = x.new_full((len(self), self.max_length, *x.shape[1:]), value)
        padded[self.sequence, self.positions] = x
        return padded

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        if self.tokens.device == torch.device(device):
            return self
        moved = (x.to(device, non_blocking=True) for x in (self.tokens, self.offsets, self.positions))
        tokens, offsets, positions = moved
        return type(self)(tokens, self.lengths, offsets, positions)


def batches(lengths: Sequence[int], max_tokens: int, *, padded: bool = False) -> Iterator[list[int]]:
    """Indices of sequences, longest first, in batches of at most ``max_tokens`` tokens.

    A sequence longer than the budget gets a batch of its own. Longest first, so that a job that will not fit
    fails at its start and the estimate of the time left only improves.

    ``padded``: each costs as many tokens as the longest of its batch, and one of less than half of it starts the next.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else lengths[i]
        cost = longest if padded else lengths[i]
        if batch and (tokens + cost > max_tokens or (padded and 2 * lengths[i] < longest)):
            yield batch
            batch, tokens, cost = [], 0, lengths[i]
        batch.append(i)
        tokens += cost
    if batch:
        yield batch


def in_order(pairs: Iterable[tuple[int, Tensor]], count: int) -> list[Tensor]:
    """Results that came as (index, tensor) in any order, as a list in input order."""
    found = dict(pairs)
    return [found[i] for i in range(count)]
