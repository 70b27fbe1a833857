"""Encoding by CUDA graphs, where telling a GPU what to do takes longer than doing it: small networks, small batches.

A graph is recorded for each size of a batch that comes a second time. Sizes are rounded up to buckets: tokens to one of
four per octave (16, ..., 64, 80, 96, 112, 128, 160, ...), which is up to 25 % more and 10 % on average; segments and
the longest of them to powers of two, which costs nothing but empty programs. Pads behind the sequences are segments of
their own, so no backend of attention meets a token without one, and no sequence meets a pad. A graph reads the tokens
and where segments start, and nothing else: how long each is, only the device knows. Every batch of a bucket is computed
in its size, recorded or not, so numbers do not depend on what was asked before.

Nothing here has run on a GPU yet. Letters: n packed tokens, c channels.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from plm.layers import Linear, unchanged
from plm.models.bert import BERT
from plm.models.esm import ESM
from plm.models.progen2 import ProGen2
from plm.models.t5 import T5
from plm.packing import Packed
from plm.recording import GraphWarning, Record, Weights, cuda_graphs, weights_of
from plm_kernels import RelativeBias, is_batch_invariant
from plm_kernels.packed_attention import choose_backend

Encoder = ESM | BERT | T5 | ProGen2
KEPT = 32  # graphs of one network; of more sizes the one that was not wanted for longest is forgotten
LARGEST, SMALLEST = 16_384, 512  # tokens: a graph of more would save little, and of a network for less nothing
# To launch a layer's 15 or so kernels takes about 100 us, in which an H200 at half its speed computes 4e10 operations,
# two per token and parameter. Both are estimates.
WORK_PER_LAYER = 2e10

_off: ContextVar[bool] = ContextVar("graphs_off", default=False)


@contextmanager
def graphs_off() -> Iterator[None]:
    """A scope in which no encoder's pass is recorded or repeated."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


class Bucket(NamedTuple):
    """What is computed, and what decides how: a graph for each."""

    tokens: int
    segments: int  # sequences, pads, and empty ones
    longest: int  # tokens of a segment at most
    layer: int | None
    invariant: bool  # whether in a ``batch_invariant`` scope


@dataclass(frozen=True, eq=False)
class OnDevice(Packed):
    """A batch whose lengths only the device knows: ``lengths`` is empty, and there is nothing to split or to pad."""

    longest: int = 0

    @classmethod
    def of(cls, tokens: Tensor, offsets: Tensor, longest: int) -> Self:
        """Segments, some of them empty, of tokens ``[n]`` that all belong to one."""
        place = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        start = offsets[torch.searchsorted(offsets[1:], place, right=True)]
        return cls(tokens, (), offsets, (place - start).long(), longest)

    @property
    def max_length(self) -> int:
        return self.longest

    @cached_property
    def sequence(self) -> Tensor:
        place = torch.arange(len(self.tokens), dtype=torch.int32, device=self.tokens.device)
        return torch.searchsorted(self.offsets[1:], place, right=True)


class Graphs:
    """The recorded passes of one network's encoder. They belong to a model; copies and pickles of it start without.

    ``record`` is what makes them, on any device: CUDA graphs on CUDA unless told otherwise.
    """

    def __init__(self, record: Record | None = None) -> None:
        self.given, self.record = record, record
        self.lock = Lock()  # buffers are written and read by one caller at a time
        self.limit: int | None = None
        self.broken: str | None = None
        self.weights: Weights | None = None
        self.seen: tuple[object, nn.Module] | None = None  # of whom, and in which scope of ``weights_unchanged``
        self.able = False
        self.clear()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def clear(self) -> None:
        """Forget all passes, and free their memory."""
        # Where a result lies and what repeats the pass; None where it came only once.
        self.passes: OrderedDict[Bucket, tuple[Tensor, Callable[[], None]] | None] = OrderedDict()
        self.record = self.given
        self.stream: Any = None

    def hidden(self, net: nn.Module, batch: Packed, layer: int | None = None) -> Tensor:
        """``net.encode(batch, layer=layer).hidden``, ``[n, c]``, by a graph where that pays."""
        if isinstance(net, Encoder) and self.pays(net, batch):
            with self.lock, torch.cuda.device_of(batch.tokens):
                if self.ready(net, batch):
                    return self.padded(net, batch, layer)
        return net.encode(batch, layer=layer).hidden  # type: ignore[operator, no-any-return]

    def pays(self, net: Encoder, batch: Packed) -> bool:
        """Whether a pass over this batch would be bound by launches, and can be recorded here."""
        if not (self.given or batch.tokens.is_cuda) or self.broken or _off.get():
            return False
        if not torch.is_inference_mode_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return False
        if self.limit is None:
            self.limit = most_tokens(net)
        longest = net.config.max_length
        return rounded_up(len(batch.tokens)) <= self.limit and (longest is None or batch.max_length <= longest)

    def ready(self, net: Encoder, batch: Packed) -> bool:
        """Whether there is a place to compute in; what other weights were recorded with is forgotten first."""
        if (scope := unchanged()) is None or self.seen != (scope, net):
            self.seen = None if scope is None else (scope, net)
            weights = weights_of(net)
            if weights != self.weights:
                self.clear()
                self.weights, self.able, self.limit = weights, recordable(net), most_tokens(net)
        assert self.limit is not None
        if self.weights is None or not self.able or rounded_up(len(batch.tokens)) > self.limit:
            return False
        stream = torch.cuda.current_stream(batch.tokens.device) if batch.tokens.is_cuda else None
        if self.record is None or self.stream != stream:
            if self.passes:
                return False  # another stream's work might run beside a graph
            self.record, self.stream = self.given or cuda_graphs(), stream
        if not self.passes:
            self.tokens = batch.tokens.new_zeros(self.limit)
            self.offsets = batch.offsets.new_zeros(self.limit + 1)
        return True

    def padded(self, net: Encoder, batch: Packed, layer: int | None) -> Tensor:
        """The pass in the size of the batch's bucket: at first as it is, then recorded, from then on repeated."""
        count, bucket = len(batch.tokens), bucket_of(net, batch, layer)
        self.fill(batch, bucket)
        known, found = bucket in self.passes, self.passes.pop(bucket, None)

        def work() -> Tensor:
            segments = OnDevice.of(self.tokens[: bucket.tokens], self.offsets[: bucket.segments + 1], bucket.longest)
            return net.encode(segments, layer=bucket.layer).hidden

        if known and found is None:
            try:
                assert self.record is not None
                with torch.cuda.device_of(batch.tokens):  # the current one is what is recorded
                    found = self.record(work)
            except torch.OutOfMemoryError:
                self.clear()
                return net.encode(batch, layer=layer).hidden
            except Exception as error:  # libraries fail with errors of many classes
                self.broken = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                self.clear()
                warnings.warn(f"no CUDA graph could be recorded, passes are launched: {self.broken}", GraphWarning, 3)
                return net.encode(batch, layer=layer).hidden
        result, run = found or (work(), None)
        self.passes[bucket] = found
        while len(self.passes) > KEPT:
            self.passes.popitem(last=False)
        if run is None:
            return result[:count]
        run()
        return result[:count].clone()

    def fill(self, batch: Packed, bucket: Bucket) -> None:
        """Lay out the batch, its pads, and where segments start. The device is asked for nothing."""
        count, sequences = len(batch.tokens), len(batch)
        self.tokens[:count] = batch.tokens
        self.tokens[count : bucket.tokens] = 0  # a token in every vocabulary, and in none the mask
        self.offsets[: sequences + 1] = batch.offsets
        pads = self.offsets[sequences + 1 : bucket.segments + 1]
        torch.arange(1, len(pads) + 1, out=pads)
        pads.mul_(bucket.longest).add_(count).clamp_(max=bucket.tokens)


def most_tokens(net: nn.Module) -> int:
    """Up to how many tokens a pass is taken to be bound by its launches; 0 of networks that compute for long anyway."""
    if not isinstance(net, Encoder):
        return 0
    stack = net.encoder.blocks if isinstance(net, T5) else net.blocks
    parameters = sum(parameter.numel() for parameter in stack.parameters())
    tokens = power_of_two(int(len(stack) * WORK_PER_LAYER / max(parameters, 1)))
    return min(tokens, LARGEST) if tokens >= SMALLEST else 0


def recordable(net: Encoder) -> bool:
    """Whether attention asks the device for nothing: the dense one for CUDA does."""
    narrower = (layer.products for layer in net.modules() if isinstance(layer, Linear) and layer.products)
    dtype = next(narrower, net.embed.weight.dtype)  # that of queries, which layers of the blocks give
    like = net.embed.weight.new_empty(0, net.config.heads, net.config.head_size, dtype=dtype)
    return choose_backend(like, RelativeBias(like.new_zeros(1, 1)) if isinstance(net, T5) else None) != "dense"


def bucket_of(net: Encoder, batch: Packed, layer: int | None) -> Bucket:
    """The sizes that a batch is computed in."""
    tokens, longest = rounded_up(len(batch.tokens)), power_of_two(batch.max_length)
    longest = min(longest, tokens, net.config.max_length or tokens)  # positions must not leave their table
    pads = -(-(tokens - len(batch.tokens)) // longest)
    last = layer is None or layer >= net.config.layers
    return Bucket(
        tokens, power_of_two(len(batch) + pads), longest, None if last else layer, invariant=is_batch_invariant()
    )


def rounded_up(tokens: int) -> int:
    """The next of four sizes per octave, in multiples of 16: at most 25 % more from 64 on."""
    step = max(16, 1 << max((tokens - 1).bit_length() - 3, 0))
    return -(-tokens // step) * step


def power_of_two(count: int) -> int:
    """The next one."""
    return 1 << max(count - 1, 0).bit_length()
