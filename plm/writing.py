"""Settings of writing, and the work that prompts and settings make together.

Letters: r rows (texts being written), t tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from plm import running
from plm.beams import beam_search
from plm.cache import Room, cache_dtype
from plm.decoding import Network, Request, Step, Text, room_for, steps
from plm.graphs import Graphed, graph_tokens
from plm.loading import Model
from plm.memory import free_memory, gigabytes
from plm.models.progen2 import ProGen2
from plm.models.t5 import T5
from plm.packing import batches
from plm.prompts import Prompt, allowed, forced_places, lengths, writer
from plm.sampling import Greedy, Rules, Sampler, streams

KEPT_BYTES = 1 << 30  # of keys and values that a model keeps, with the steps recorded in them, for the next call
Early = bool | Literal["never"]


@dataclass(frozen=True)
class Settings:
    """How to write, whatever the prompts; the arguments of ``generate`` by their names.

    Raises: ValueError for settings that contradict each other.
    """

    num_samples: int = 1
    max_length: int | None = None
    min_length: int | None = None
    length: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: Early = False
    repetition_penalty: float = 1.0
    no_repeat: int | None = None
    banned: Iterable[str | int] = ()
    forced: Mapping[int, str | int] = field(default_factory=dict, hash=False)
    residues_only: bool = False
    likelihood: bool = True
    cuda_graphs: bool = True
    seed: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        self.choose()
        Rules((), self.repetition_penalty, self.no_repeat)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {self.max_tokens}")

    def choose(self) -> Greedy | Sampler:
        """How tokens are chosen."""
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping is not False):
            raise ValueError("length_penalty and early_stopping are of a beam search: give num_beams above 1")
        if self.num_samples < 1 or self.num_beams < 1:
            raise ValueError(
                f"num_samples and num_beams must be at least 1; got {self.num_samples} and {self.num_beams}"
            )
        if self.num_beams > 1 and self.temperature != 0:
            raise ValueError(
                "beam search draws nothing: give temperature=0 with num_beams, or num_beams=1 to draw samples"
            )
        if 1 < self.num_beams < self.num_samples:
            raise ValueError(
                f"{self.num_beams} beams hold no {self.num_samples} samples; give num_beams={self.num_samples}"
            )
        if self.temperature == 0:
            if self.top_k is not None or self.top_p != 1:
                raise ValueError("with temperature=0 the most probable token is taken; leave out top_k and top_p")
            if self.num_samples > 1 and self.num_beams == 1:
                raise ValueError(
                    f"without drawing, all {self.num_samples} samples would be the same; raise the temperature"
                )
            return Greedy()
        return Sampler(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Job:
    """Prompts and settings, ready to be worked on."""

    model: Model
    prompts: Sequence[Prompt]
    how: Settings
    requests: list[Request]
    rules: Rules
    seed: int
    rows: int  # texts at a time

    @classmethod
    def of(cls, model: Model, prompts: Sequence[Prompt], how: Settings) -> "Job":
        """Raises: ValueError for bounds that contradict a prompt; MemoryError."""
        banned = (how.banned,) if isinstance(how.banned, str) else tuple(how.banned)
        only = how.residues_only or how.length is not None
        limit = model.net.config.max_length
        requests = []
        for each in prompts:
            shortest, longest = lengths(each, limit, (how.min_length, how.max_length, how.length))
            places = forced_places(model, each, how.forced, longest)
            may = allowed(model, each, banned, only)
            requests.append(Request(each.ids, shortest, longest, may, each.start, places))
        if how.num_beams > 1 and not isinstance(model.net, T5):
            raise ValueError("beam search is for models with an encoder and a decoder: leave out num_beams")
        if how.num_beams > 1 and how.no_repeat is not None:
            raise ValueError("no_repeat is not for beam search: leave it out, or use a repetition_penalty")
        ends = prompts[0].ends if prompts else ()
        seed = int(torch.randint(2**31, ()).item()) if how.seed is None else how.seed
        rules = Rules(ends, how.repetition_penalty, how.no_repeat)
        rows = fitting_rows(model, requests, how) if requests else 1
        return cls(model, prompts, how, requests, rules, seed, rows)

    def steps(self, order: Sequence[int], rows: int) -> Iterator[Step]:
        """The loop that writes, over prompts in this order; its names are those of all prompts."""
        order = list(order)
        net = network(self.model, self.how)

        def draw(names: Sequence[tuple[int, int]], length: int) -> Tensor:
            return streams(self.seed, [(order[prompt], number) for prompt, number in names], length)

        some = [self.requests[i] for i in order]
        for step in steps(net, some, self.how.choose(), self.rules, draw, self.how.num_samples, rows):
            names = [(order[prompt], number) for prompt, number in step.names]
            done = {(order[prompt], number): text for (prompt, number), text in step.finished.items()}
            yield replace(step, names=names, finished=done)
        if isinstance(net, Graphed) and net.bytes <= KEPT_BYTES:
            self.model.steps.give_back(net)

    def searched(self) -> Iterator[tuple[int, list[Text]]]:
        """Beam search, batch by batch: (prompt, its best texts)."""
        how, net = self.how, self.model.net
        assert isinstance(net, T5)  # which ``of`` has made sure
        costs = [len(request.ids) + how.num_beams * request.max_length for request in self.requests]

        def work(batch: list[int]) -> list[list[Text]]:
            return beam_search(
                net,
                [self.requests[i] for i in batch],
                self.rules,
                how.num_beams,
                length_penalty=how.length_penalty,
                early_stopping=how.early_stopping,
            )

        budget = default_max_tokens(self.model, how) if how.max_tokens is None else how.max_tokens
        for batch, texts in running.halved(self.model, batches(costs, budget), work):
            yield from ((i, found[: how.num_samples]) for i, found in zip(batch, texts, strict=True))

    def room(self, rows: int | None = None) -> tuple[Room, int]:
        """What the cache holds, and its bytes."""
        room = room_for(self.requests, self.how.num_samples, rows or self.rows)
        return room, cache_bytes(self.model, self.how, room)


def network(model: Model, how: Settings) -> Network:
    """What takes the steps: on CUDA a ProGen2's recorded ones, unless it is asked not to record."""
    net = writer(model)
    if not graphed(model, how) or not isinstance(net, ProGen2):
        return net
    kept = model.steps.take()
    return kept if kept is not None and kept.net is net else Graphed(net)


def graphed(model: Model, how: Settings) -> bool:
    """Not under autocast: what is recorded there would stay as it was when the scope has ended."""
    able = model.device.type == "cuda" and isinstance(model.net, ProGen2)
    return how.cuda_graphs and able and not torch.is_autocast_enabled("cuda")


def cache_bytes(model: Model, how: Settings, room: Room) -> int:
    """Bytes of all keys and values."""
    net = writer(model)
    if graphed(model, how):  # a row's prompt lies beside its text
        room = Room(room.texts, graph_tokens(room), prompts=0, prompt_tokens=0)
    layers = net.config.decoder_layers if isinstance(net, T5) else net.config.layers
    return room.bytes(layers, net.config.heads, net.config.head_size, cache_dtype(net.embed.weight))


def fitting_rows(model: Model, requests: Sequence[Request], how: Settings) -> int:
    """How many texts to write at a time: as many as ``max_tokens`` asks for, or fit well into memory.

    Raises: MemoryError if they would not fit into what is free, with the number that would.
    """
    longest = max(len(request.ids) + request.max_length - len(request.start) for request in requests)
    budget = default_max_tokens(model, how) if how.max_tokens is None else how.max_tokens
    wanted = max(1, min(budget // longest, how.num_samples * len(requests)))
    free = free_memory(model.device)
    if free is None:
        return wanted
    rows = next(
        (n for n in range(wanted, 0, -1) if cache_bytes(model, how, room_for(requests, how.num_samples, n)) <= free), 0
    )
    if rows == wanted or (rows and how.max_tokens is None):
        return rows
    needed = cache_bytes(model, how, room_for(requests, how.num_samples, wanted))
    hint = f"{rows} at a time would: give max_tokens={rows * longest}" if rows else "give a smaller max_length"
    raise MemoryError(
        f"keys and values of {wanted} texts of up to {longest:,} tokens take {gigabytes(needed)}, and "
        f"{gigabytes(free)} are free on {model.device}; {hint}"
    )


def default_max_tokens(model: Model, how: Settings) -> int:
    """Tokens of prompts and texts at a time: as many as keep their keys and values within a gibibyte or so.

    On CUDA it is a quarter of what is free, as more texts at a time cost next to nothing there.
    """
    many = 1 << 10  # of which padding is a small part
    room = Room(texts=1, text_tokens=many, prompts=0, prompt_tokens=0)
    size = cache_bytes(model, replace(how, cuda_graphs=False), room) // many
    if model.device.type == "cuda":
        return max(1_024, (free_memory(model.device) or 0) // 4 // size)
    return max(1_024, min(16_384, (1 << 30) // size))
