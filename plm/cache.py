"""What a decoder remembers while it writes: its own keys and values, and those of the prompts behind them.

All of it belongs to the caller and is allocated once. A prompt is remembered once, however many texts are written to
it. Texts that are finished leave, and those behind them move up; new ones join at the end.

On a CPU keys and values are kept in float32 at least: with one query to each, half-precision kernels take longer
than those of float32, though they have half as much to read.

Letters: r rows (texts being written), p prompts, h heads, d head size, t tokens, l layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plm_kernels import attention_part, merge_parts, padded_keys, runs

STEP = 16  # prompts are remembered in multiples of so many tokens
GROUP = (
    4  # texts of one prompt look at it in multiples of so many: from there on a row's bits do not depend on how many
)


@dataclass(frozen=True)
class Room:
    """How much a cache holds: texts of so many tokens, and the prompts of so many tokens that they follow."""

    texts: int
    text_tokens: int
    prompts: int
    prompt_tokens: int

    def bytes(self, layers: int, heads: int, head_size: int, dtype: torch.dtype) -> int:
        """Of all keys and values."""
        tokens = self.texts * padded_keys(self.text_tokens, head_size) + self.prompts * steps(self.prompt_tokens)
        return 2 * layers * tokens * heads * head_size * dtype.itemsize


def steps(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of ``STEP``."""
    return -(-tokens // STEP) * STEP


def cache_dtype(like: Tensor) -> torch.dtype:
    """In what keys and values are kept beside weights like these."""
    return torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype


class Slots:
    """Keys and values ``[l, slots, h, capacity, d]``, of which the first ``len(lengths)`` slots are taken."""

    def __init__(self, shape: tuple[int, int, int, int, int], scale: float, like: Tensor) -> None:
        self.keys, self.values = (like.new_zeros(shape, dtype=cache_dtype(like)) for _ in range(2))
        self.scale, self.lengths = scale, list[int]()

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return self.keys.shape[3]

    def take(self, lengths: Iterable[int]) -> range:
        """The next free slots. Raises: ValueError if there are not so many, or none is as large."""
        first, more = len(self.lengths), list(lengths)
        if first + len(more) > self.keys.shape[1] or max(more, default=0) > self.capacity:
            raise ValueError(
                f"{len(more)} more of up to {max(more, default=0)} tokens; the cache was begun with room for "
                f"{self.keys.shape[1]} of {self.capacity} tokens, and {first} are there"
            )
        self.lengths += more
        return range(first, first + len(more))

    def move(self, chosen: Sequence[int]) -> None:
        """Go on with these slots, in this order."""
        if list(chosen) == sorted(set(chosen)):  # each moves up or stays, so none is overwritten before it has moved
            for new, old in enumerate(chosen):
                if new != old:
                    here = slice(self.lengths[old])
                    for store in (self.keys, self.values):
                        store[:, new, :, here] = store[:, old, :, here]
        else:
            here = slice(max(self.lengths))
            for store in (self.keys, self.values):
                store[:, : len(chosen), :, here] = store[:, chosen, :, here]
        self.lengths = [self.lengths[old] for old in chosen]


class Cache(Slots):
    """The texts' own tokens, a slot for each row. Rows that joined together have equally many.

    They are attended to with padding behind them, so that a row has the same bits whatever rows are beside it.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], scale: float, like: Tensor, bias: Tensor | None = None
    ) -> None:
        """``bias`` ``[h, capacity]`` is added to the scaled logits by distance; its last value is the query's own."""
        layers, rows, heads, capacity, size = shape
        super().__init__((layers, rows, heads, padded_keys(capacity, size), size), scale, like)
        self.text_tokens = capacity
        own = self.keys.new_zeros(1, capacity) if bias is None else bias.to(self.keys.dtype)
        padding = own.new_full((len(own), self.keys.shape[3]), -torch.inf)
        self.mask = torch.cat((own, padding), -1)[None, :, None]  # [1, h or 1, 1, t]
        self.views, self.views_at = list[View](), list[int]()

    @property
    def capacity(self) -> int:
        """Tokens that a text has room for, padding aside."""
        return self.text_tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest token's k and v ``[r, h, d]``, then attend with its q to all that the row has.

        Returns: what it gathers ``[r, h, d]``, and the logarithm of its weights' sum ``[r, h]``.
        """
        if self.views_at != self.lengths:
            self.views, self.views_at = [*self._views()], [*self.lengths]
        pieces = (split(x, [view.rows for view in self.views]) for x in (q, k, v))
        parts = []
        for view, queries, newest, value in zip(self.views, *pieces, strict=True):
            view.newest_keys[layer].copy_(newest)
            view.newest_values[layer].copy_(value)
            queries = queries[:, :, None].to(self.keys.dtype)
            keys, values = view.keys[layer], view.values[layer]
            parts.append(attention_part(queries, keys, values, scale=self.scale, mask=view.mask))
        return tuple(x.squeeze(2) for x in joined(parts))  # type: ignore[return-value]

    def _views(self) -> "Iterator[View]":
        """What this step touches. Cut once for all layers: in a small network cutting takes longer than arithmetic."""
        start = 0
        for count, length in runs(self.lengths):
            rows, here = slice(start, start + count), slice(padded_keys(length + 1, self.keys.shape[-1]))
            first = self.text_tokens - 1 - length
            keys, values = self.keys[:, rows], self.values[:, rows]
            yield View(
                count,
                keys[:, :, :, length].unbind(),
                values[:, :, :, length].unbind(),
                keys[:, :, :, here].unbind(),
                values[:, :, :, here].unbind(),
                self.mask[..., first : first + here.stop],
            )
            start += count

    def advance(self) -> None:
        """All layers have the newest token."""
        self.lengths = [length + 1 for length in self.lengths]


@dataclass(frozen=True)
class View:
    """Rows of one length: where their newest token goes and what they attend to, layer by layer."""

    rows: int
    newest_keys: Sequence[Tensor]  # each [rows, h, d]
    newest_values: Sequence[Tensor]
    keys: Sequence[Tensor]  # each [rows, h, t, d], with padding behind
    values: Sequence[Tensor]
    mask: Tensor  # [1, h or 1, 1, t]


class Memory(Slots):
    """The prompts, a slot for each, and how many rows look at it. Rows lie prompt by prompt."""

    def __init__(self, shape: tuple[int, int, int, int, int], scale: float, like: Tensor) -> None:
        super().__init__(shape, scale, like)
        self.counts: list[int] = []
        self.calls: list[Call] = []

    def join(self, lengths: Sequence[int], counts: Sequence[int]) -> range:
        """Take slots for prompts of these lengths, looked at by so many rows each; ``put`` fills them."""
        taken = self.take(lengths)
        self.counts += counts
        self._plan()
        return taken

    def put(self, layer: int, taken: range, keys: Tensor, values: Tensor) -> None:
        """Remember what a layer made of the prompts that took these slots: ``[n, h, d]``, end to end."""
        lengths = self.lengths[taken.start : taken.stop]
        for store, x in ((self.keys, keys), (self.values, values)):
            for slot, piece in zip(taken, x.split(lengths), strict=True):
                store[layer, slot, :, : len(piece)] = piece.transpose(0, 1)
                store[layer, slot, :, len(piece) : steps(len(piece))] = 0  # padding has no weight, but must be finite

    def attend(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Attend with the newest token of each row: q ``[r, h, d]`` to what ``Cache.attend`` returns.

        None where all prompts are empty.
        """
        if not any(self.lengths):
            return None
        queries = q if self.order is None else q.index_select(0, self.order)
        parts = []
        for call, some in zip(self.calls, split(queries, [call.rows for call in self.calls]), strict=True):
            some = some.unflatten(0, (call.prompts, -1)).transpose(1, 2)  # [p, h, rows of each, d]
            if call.tokens:
                keys, values = call.keys[layer], call.values[layer]
                mixed, sums = attention_part(some.to(keys.dtype), keys, values, scale=self.scale, mask=call.mask)
            else:
                mixed = torch.zeros_like(some, dtype=self.keys.dtype)
                sums = mixed.new_full(mixed.shape[:-1], -torch.inf)
            parts.append((mixed.transpose(1, 2).flatten(0, 1), sums.transpose(1, 2).flatten(0, 1)))
        mixed, sums = joined(parts)
        return (
            (mixed, sums) if self.back is None else (mixed.index_select(0, self.back), sums.index_select(0, self.back))
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in ascending order of their prompts. A prompt without rows leaves."""
        owner = [prompt for prompt, count in enumerate(self.counts) for _ in range(count)]
        counts = torch.bincount(
            torch.tensor([owner[row] for row in rows], dtype=torch.long), minlength=len(self.counts)
        )
        self.counts = counts.tolist()
        if 0 in self.counts:
            self.move([prompt for prompt, count in enumerate(self.counts) if count])
            self.counts = [count for count in self.counts if count]
        self._plan()

    def _plan(self) -> None:
        """One call for neighbours of one padded length and with equally many rows, padding among these included.

        A prompt is padded to a multiple of ``STEP`` tokens and its rows to one of ``GROUP`` also when it is alone, so
        that a text does not depend on the others.
        """
        device = self.keys.device
        padded = [-(-count // GROUP) * GROUP for count in self.counts]
        self.calls, slot = [], 0
        for prompts, (tokens, rows) in runs(zip(map(steps, self.lengths), padded, strict=True)):
            slots = slice(slot, slot + prompts)
            lengths = torch.tensor(self.lengths[slots])
            padding = lengths[:, None] <= torch.arange(tokens)
            mask = torch.zeros(padding.shape, dtype=self.keys.dtype).masked_fill(padding, -torch.inf)
            keys, values = (store[:, slots, :, :tokens].unbind() for store in (self.keys, self.values))
            self.calls.append(Call(prompts, tokens, prompts * rows, keys, values, mask[:, None, None].to(device)))
            slot += prompts
        self.order: Tensor | None = None  # [rows with padding]: the row that each query is of
        self.back: Tensor | None = None  # [r]: where each row's answer is
        if padded != self.counts:
            order, back, start = list[int](), list[int](), 0
            for count, width in zip(self.counts, padded, strict=True):
                back += range(len(order), len(order) + count)
                order += [*range(start, start + count), *[start] * (width - count)]
                start += count
            self.order, self.back = torch.tensor(order, device=device), torch.tensor(back, device=device)


@dataclass(frozen=True)
class Call:
    """Prompts that are attended to at once: how many, their padded tokens, queries in all, and what they look at."""

    prompts: int
    tokens: int
    rows: int
    keys: Sequence[Tensor]  # [p, h, t, d] of each layer
    values: Sequence[Tensor]
    mask: Tensor  # [p, 1, 1, t], 0 or -inf for padding


class State(Protocol):
    """What a network that goes on from its prompts asks of a cache while it writes; ``Decoding`` for one."""

    def join(self, lengths: Sequence[int], counts: Sequence[int]) -> range: ...
    def repeat(self, row: int, count: int) -> None: ...
    def put(self, layer: int, taken: range, keys: Tensor, values: Tensor) -> None: ...
    def positions(self, device: torch.device) -> Tensor: ...
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...
    def advance(self) -> None: ...
    def check_room(self) -> None: ...
    def keep(self, rows: Sequence[int]) -> None: ...


@dataclass
class Decoding:
    """Texts on their way: what they have written, and the prompts that they look at or go on from."""

    cache: Cache
    memory: Memory

    def join(self, lengths: Sequence[int], counts: Sequence[int]) -> range:
        """Room for prompts of these lengths and so many texts to each; the prompts' slots, for ``memory.put``."""
        self.cache.take([0] * sum(counts))
        return self.memory.join(lengths, counts)

    def repeat(self, row: int, count: int) -> None:
        """Room for ``count`` more texts to the prompt of a row; what is remembered of it is copied."""
        ends = torch.tensor(self.memory.counts).cumsum(0)
        old = int(torch.searchsorted(ends, row, right=True))
        (new,) = self.join([self.memory.lengths[old]], [count])
        here = slice(steps(self.memory.lengths[old]))
        for store in (self.memory.keys, self.memory.values):
            store[:, new, :, here] = store[:, old, :, here]

    def put(self, layer: int, taken: range, keys: Tensor, values: Tensor) -> None:
        """Remember what a layer made of the prompts that took these slots."""
        self.memory.put(layer, taken, keys, values)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the newest token's k and v ``[r, h, d]``, then attend with its q to the prompt and to the text."""
        own, prompt = self.cache.attend(layer, q, k, v), self.memory.attend(layer, q)
        return (own[0] if prompt is None else merge_parts(prompt, own)).to(q.dtype)

    def advance(self) -> None:
        """All layers have the newest token."""
        self.cache.advance()

    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Go on with these rows, prompt by prompt. In inference mode if it began there."""
        rows = [int(row) for row in rows]
        self.cache.move(rows)
        self.memory.keep(rows)

    def positions(self, device: torch.device) -> Tensor:
        """Place ``[r]`` of each row's newest token, where prompt and text are one sequence."""
        prompts = [
            length for length, count in zip(self.memory.lengths, self.memory.counts, strict=True) for _ in range(count)
        ]
        return torch.tensor([*map(sum, zip(prompts, self.cache.lengths, strict=True))], device=device)

    def check_room(self) -> None:
        """Raises: ValueError if a row has no room for another token."""
        if max(self.cache.lengths, default=0) >= self.cache.capacity:
            raise ValueError(f"the cache is full: it was begun with room for {self.cache.capacity} tokens")


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Pieces of so many rows."""
    return (x,) if len(sizes) == 1 else x.split(sizes)


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows of several calls one after another."""
    if len(parts) == 1:
        return parts[0]
    mixed, sums = zip(*parts, strict=True)
    return torch.cat(mixed), torch.cat(sums)
