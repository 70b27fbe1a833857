"""One step of writing as a CUDA graph: a launch per step in place of a launch per operation.

A graph repeats what was recorded, so everything it touches must lie where it lay and have the shape it had. Here every
row keeps its prompt and its text side by side in a place of its own, and lengths are numbers on the device. There is a
graph for each bucket of rows and of tokens, recorded when a call first needs it; nothing is compiled. A model keeps
them for the next call that wants as much room, unless their keys and values are large. A prompt is read once for its
texts, but each of them keeps a copy of its keys and values.

Letters: r rows (texts being written), h heads, d head size, t tokens, l layers.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from plm.cache import Room
from plm.models.progen2 import ProGen2
from plm.recording import GraphWarning, Record, Weights, cuda_graphs, launched, weights_of
from plm_kernels import attention_part, is_batch_invariant

TOKENS = 128  # a graph attends to a multiple of so many tokens


def graph_tokens(room: Room) -> int:
    """Tokens that each row has room for."""
    return -(-(room.prompt_tokens + room.text_tokens) // TOKENS) * TOKENS


class StaticDecoding:
    """Keys and values ``[l, r, h, t, d]`` of prompts and texts, and the length ``[r]`` of each row, on the device.

    Its operations never ask the device for a number, whatever the lengths are.
    """

    def __init__(self, room: Room, layers: int, heads: int, head_size: int, scale: float, like: Tensor) -> None:
        capacity = room.prompt_tokens + room.text_tokens
        shape = (layers, room.texts, heads, graph_tokens(room), head_size)
        self.keys, self.values = (like.new_zeros(shape) for _ in range(2))
        self.lengths = torch.zeros(room.texts, dtype=torch.int64, device=like.device)
        self.scale, self.capacity = scale, capacity
        self.known: list[int] = []  # the same lengths, of the rows in use, on the host
        self.prompts: list[int] = []  # how many of a row's tokens are its prompt's
        self.rows, self.tokens = room.texts, shape[3]  # what a step computes
        self.joining: Sequence[int] = ()

    def fits(self, room: Room) -> bool:
        """Whether this is as much room, and what was recorded in it holds."""
        return len(self.lengths) == room.texts and self.keys.shape[3] == graph_tokens(room)

    def begin(self, room: Room) -> None:
        """Forget all texts, as if this had just been made."""
        for store in (self.keys, self.values, self.lengths):
            store.zero_()
        self.known, self.prompts, self.joining = [], [], ()
        self.capacity = room.prompt_tokens + room.text_tokens

    def join(self, lengths: Sequence[int], counts: Sequence[int]) -> range:
        """Rows for ``counts`` texts to prompts of these lengths; the prompts' numbers, for ``put``."""
        first = len(self.known)
        new = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
        self.known, self.prompts = self.known + new, self.prompts + new
        if len(self.known) > len(self.lengths) or max(self.known) > self.capacity:
            raise ValueError(f"{len(self.known)} rows of up to {max(self.known)} tokens; there is room for fewer")
        self.lengths[first : len(self.known)] = torch.tensor(self.known[first:], device=self.lengths.device)
        self.joining = lengths
        starts = [first + sum(counts[:i]) for i in range(len(counts) + 1)]
        self.places = [slice(start, stop) for start, stop in pairwise(starts)]
        return range(len(lengths))

    def put(self, layer: int, taken: range, keys: Tensor, values: Tensor) -> None:
        """Copy what a layer made of the prompts that join, ``[n, h, d]`` end to end, into all rows of each."""
        for store, x in ((self.keys, keys), (self.values, values)):
            pieces = x.split(list(self.joining))
            for prompt in taken:
                piece = pieces[prompt].transpose(0, 1)
                store[layer, self.places[prompt], :, : piece.shape[1]] = piece

    def repeat(self, row: int, count: int) -> None:
        """Rows for ``count`` more texts to the prompt of a row; what is remembered of it is copied."""
        first, length = len(self.known), self.prompts[row]
        self.join([length], [count])
        for store in (self.keys, self.values):
            store[:, first : first + count, :, :length] = store[:, row, None, :, :length]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.lengths.device)
        for store in (self.keys, self.values):
            store[:, : len(rows)] = store[:, chosen]
        self.lengths[: len(rows)] = self.lengths[chosen]
        self.known = [self.known[row] for row in rows]
        self.prompts = [self.prompts[row] for row in rows]

    def check_room(self) -> None:
        """Raises: ValueError if a row has no room for another token."""
        if max(self.known, default=0) >= self.capacity:
            raise ValueError(f"the cache is full: it was begun with room for {self.capacity} tokens")

    def positions(self, device: torch.device) -> Tensor:
        """Place ``[r]`` of each row's newest token."""
        return self.lengths[: self.rows].clone()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the newest token's k and v ``[r, h, d]``, then attend with its q to all that the row has."""
        here = self.lengths[: self.rows]
        row = torch.arange(self.rows, device=here.device)
        keys, values, given = self.keys[layer, : self.rows], self.values[layer, : self.rows], q.dtype
        q, k, v = (x.to(keys.dtype) for x in (q, k, v))  # narrower where only products are in bfloat16
        keys[row, :, here], values[row, :, here] = k, v
        keys, values = keys[:, :, : self.tokens], values[:, :, : self.tokens]
        unseen = torch.arange(self.tokens, device=here.device) > here[:, None]
        mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill(unseen, -torch.inf)
        found, _ = attention_part(q[:, :, None], keys, values, scale=self.scale, mask=mask[:, None, None])
        return found[:, :, 0].to(given)

    def advance(self) -> None:
        """All layers have the newest token. Rows that are not in use stay within their places."""
        self.lengths[: self.rows].add_(1).clamp_(max=self.keys.shape[3] - 1)


@dataclass
class Recorded:
    """A step for so many rows and tokens: where its tokens go in, where its logits come out, and how to run it."""

    tokens: Tensor
    logits: Tensor
    run: Callable[[], None]


@dataclass
class Graphed:
    """A ProGen2 whose steps are recorded once for each size and then repeated; else it is the network it is given.

    One that is used again for as much room, on the same weights, repeats what it has. One caller at a time.
    """

    net: ProGen2
    record: Record = field(default_factory=cuda_graphs)
    steps: dict[tuple[int, int], Recorded] = field(default_factory=dict)
    state: StaticDecoding | None = None
    recorded_with: tuple[Weights | None, object, bool] | None = None

    @property
    def embed(self) -> torch.nn.Embedding:
        return self.net.embed

    def room(self, room: Room) -> StaticDecoding:
        config = self.net.config
        scale, like = config.head_size**-0.5, self.net.embed.weight
        stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
        now = (weights_of(self.net), stream, is_batch_invariant())
        if self.state is None or now[0] is None or now != self.recorded_with or not self.state.fits(room):
            self.steps, self.state = {}, None  # the memory of these goes first
            self.state = StaticDecoding(room, config.layers, config.heads, config.head_size, scale, like)
            self.recorded_with = now
        else:
            self.state.begin(room)
        return self.state

    @property
    def bytes(self) -> int:
        """Of its keys and values, which stay where they are while it is kept."""
        return 0 if self.state is None else self.state.keys.nbytes + self.state.values.nbytes

    def join(self, state: StaticDecoding, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        self.net.join(state, prompts, counts)

    def step(self, tokens: Tensor, state: StaticDecoding) -> Tensor:
        """As ``ProGen2.step``, computed for the next larger numbers of rows and of tokens."""
        state.check_room()
        rows = min(1 << (len(tokens) - 1).bit_length(), len(state.lengths))
        width = min(-(-(max(state.known) + 1) // TOKENS) * TOKENS, state.keys.shape[3])
        if (rows, width) not in self.steps:
            with torch.cuda.device_of(state.lengths):  # the current one is what is recorded
                self.steps[rows, width] = self.recorded(state, rows, width)
        step = self.steps[rows, width]
        step.tokens[: len(tokens)] = tokens
        step.run()
        state.known = [length + 1 for length in state.known]
        return step.logits[: len(tokens)].clone()

    def recorded(self, state: StaticDecoding, rows: int, width: int) -> Recorded:
        """Run a step, for libraries to choose their kernels, put back what it changed, and record it.

        Where it cannot be recorded that costs a warning, and this and all later steps are launched each time.
        """
        tokens = torch.zeros(rows, dtype=torch.int64, device=state.lengths.device)
        before = state.lengths.clone()

        def work() -> Tensor:
            state.rows, state.tokens = rows, width
            return self.net.step(tokens, state)

        if state.lengths.is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            state.lengths.copy_(before)
        try:
            logits, run = self.record(work)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # libraries fail with errors of many classes
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            warnings.warn(f"no CUDA graph could be recorded, steps are launched: {reason}", GraphWarning, 3)
            state.lengths.copy_(before)
            self.record = launched
            logits, run = self.record(work)
        state.lengths.copy_(before)
        return Recorded(tokens, logits, run)
