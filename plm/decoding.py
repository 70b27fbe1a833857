"""The loop that writes: one token at a time for every text of a batch.

Texts that are finished leave the batch at once, and others that wait take their places. A text depends on its prompt,
its settings and its own stream of random numbers; never on what is written beside it.

Letters: r rows (texts being written), v vocabulary, t tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from plm.cache import Room, State
from plm.layers import weights_unchanged
from plm.sampling import Rules

Stop = Literal["end", "length"]
Name = tuple[int, int]
"""Which text: the number of its prompt, and which of the texts to that prompt."""
Share = tuple[int, range]
"""Some of the texts to a prompt: its number, and which of its samples."""
Choose = Callable[[Tensor, Tensor], Tensor]
"""Logits ``[r, v]`` and uniform numbers ``[r]`` to tokens ``[r]``."""
Draw = Callable[[Sequence[Name], int], Tensor]
"""Uniform numbers ``[r, t]`` for texts of so many tokens: each text's own stream."""


class Network(Protocol):
    """What a network must do to be written with; ``plm.models.t5`` and ``plm.models.progen2`` do it."""

    @property
    def embed(self) -> nn.Embedding: ...
    def room(self, room: Room) -> Any: ...
    def join(self, state: Any, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> None: ...
    def step(self, tokens: Tensor, state: Any) -> Tensor: ...


@dataclass(frozen=True)
class Request:
    """A prompt and the bounds of what is written to it. Lengths are in tokens and count ``start``.

    ``ids`` are read first. Texts begin with ``start``: a decoder's start token, or where prompt and text are one
    sequence the prompt itself. ``forced`` says which token stands at which place, counted from 0.
    """

    ids: Sequence[int]
    min_length: int
    max_length: int
    allowed: Tensor  # [v], true where a token may be written
    start: Sequence[int] = (0,)
    forced: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_length <= len(self.start) or self.min_length > self.max_length:
            counted = "the start token" if len(self.start) == 1 else f"the {len(self.start)} tokens that are given"
            raise ValueError(
                f"max_length counts {counted}, so it must be at least {len(self.start) + 1}, and min_length must not "
                f"be above it; got max_length={self.max_length}, min_length={self.min_length}"
            )


@dataclass(frozen=True)
class Text:
    """Token ids from the start to the last one, and the log-probability of each that was written.

    Log-probabilities are the model's own, before any rule, temperature or cut.
    """

    ids: tuple[int, ...]
    log_probs: Tensor = field(compare=False)
    stopped_by: Stop


@dataclass(frozen=True)
class Step:
    """One more token of every text that was being written, and the texts that are finished with it."""

    names: Sequence[Name]
    tokens: Sequence[int]
    log_probs: Sequence[float]
    finished: Mapping[Name, Text]


class Live(NamedTuple):
    """The texts that are being written, a row of every tensor for each."""

    written: Tensor  # [r, t], filled up with the first token
    log_probs: Tensor  # [r, t]
    uniform: Tensor  # [r, t]
    forced: Tensor  # [r, t], -1 where nothing is
    allowed: Tensor  # [r, v]
    length: Tensor  # [r] tokens so far
    start: Tensor  # [r] tokens that were given
    shortest: Tensor  # [r]
    longest: Tensor  # [r]


def write(
    net: Network, requests: Sequence[Request], choose: Choose, rules: Rules, draw: Draw, samples: int, rows: int
) -> list[list[Text]]:
    """``samples`` texts to each prompt, of which ``rows`` are written at a time."""
    texts: dict[Name, Text] = {}
    for step in steps(net, requests, choose, rules, draw, samples, rows):
        texts |= step.finished
    return [[texts[prompt, sample] for sample in range(samples)] for prompt in range(len(requests))]


@torch.inference_mode()
def steps(
    net: Network, requests: Sequence[Request], choose: Choose, rules: Rules, draw: Draw, samples: int, rows: int
) -> Iterator[Step]:
    """``write``, one step of it at a time. In the order of ``requests``, as far as there is room.

    Nothing is computed before it is asked for, so the loop can rest between two steps; the network must not change.
    """
    if not requests:
        return
    waiting = deque((prompt, range(samples)) for prompt in range(len(requests)))
    for request in requests:
        refuse_silence(request, rules)
    room = room_for(requests, samples, rows)
    state, scope = net.room(room), object()
    names: list[Name] = []
    live: Live | None = None
    while waiting or names:
        with weights_unchanged(scope):
            if new := admitted(waiting, rows, names):
                names = names + join(net, state, requests, new, names)
                added = names[-sum(len(each) for _, each in new) :]
                joined = begin(net, [requests[prompt] for prompt, _ in added], draw(added, room_width(requests)))
                live = joined if live is None else Live(*map(torch.cat, zip(live, joined, strict=True)))
            assert live is not None
            tokens, log_probs, ended = one_more(net, state, live, choose, rules)
            finished = {}
            now = names
            if any(ended):
                gone = [row for row, end in enumerate(ended) if end]
                finished = {names[row]: text_of(live, row, rules) for row in gone}
                kept = [row for row, end in enumerate(ended) if not end]
                live = Live(*(x[torch.tensor(kept, dtype=torch.long, device=x.device)] for x in live))
                state.keep(kept)
                names = [names[row] for row in kept]
        yield Step(now, tokens, log_probs, finished)


def refuse_silence(request: Request, rules: Rules) -> None:
    """Raises: ValueError if nothing may be written but the end."""
    if not request.allowed.index_fill(0, torch.tensor(rules.ends), False).any():
        raise ValueError("every token but the end is banned; allow some")


def room_width(requests: Sequence[Request]) -> int:
    """Tokens of the longest text."""
    return max(request.max_length for request in requests)


def room_for(requests: Sequence[Request], samples: int, rows: int) -> Room:
    """What the cache must hold while ``rows`` texts are written at a time. The last token of a text is never read.

    Where not all texts are written at once, a prompt's samples may join at different times, and each time it has a
    place of its own.
    """
    at_once = min(rows, samples * len(requests))
    return Room(
        texts=at_once,
        text_tokens=max(request.max_length - len(request.start) for request in requests),
        prompts=min(len(requests), at_once) if at_once == samples * len(requests) else at_once,
        prompt_tokens=max(len(request.ids) for request in requests),
    )


def admitted(waiting: deque[Share], rows: int, busy: Sequence[Name]) -> list[Share]:
    """Who joins now: once a quarter of the rows is free, as many texts as there is room for.

    Reading prompts one by one would take longer than a few rows that rest.
    """
    some: list[Share] = []
    free = rows - len(busy)
    if busy and free < max(1, rows // 4):
        return some
    while waiting and free:
        prompt, samples = waiting.popleft()
        some.append((prompt, samples[:free]))
        if rest := samples[free:]:
            waiting.appendleft((prompt, rest))
        free -= len(some[-1][1])
    return some


def join(net: Network, state: Any, requests: Sequence[Request], new: list[Share], busy: Sequence[Name]) -> list[Name]:
    """Give rows to texts. A prompt that texts are being written to is not read again but copied.

    Returns: whose rows they are, in their order.
    """
    rows = {prompt: row for row, (prompt, _) in enumerate(busy)}
    unread = [share for share in new if share[0] not in rows]
    known = [share for share in new if share[0] in rows]
    if unread:
        net.join(state, [requests[prompt].ids for prompt, _ in unread], [len(samples) for _, samples in unread])
    for prompt, samples in known:
        state.repeat(rows[prompt], len(samples))
    return [(prompt, sample) for prompt, samples in (*unread, *known) for sample in samples]


def begin(net: Network, requests: Sequence[Request], uniform: Tensor) -> Live:
    """Rows for texts that have not been begun, one for each of ``requests``."""
    device, width = net.embed.weight.device, uniform.shape[1]
    written = torch.tensor([[*each.start, *[each.start[0]] * (width - len(each.start))] for each in requests])
    forced = torch.full_like(written, -1)
    for row, request in enumerate(requests):
        for place, token in request.forced.items():
            forced[row, place] = token
    start = torch.tensor([len(each.start) for each in requests])
    live = Live(
        written=written,
        log_probs=torch.zeros(written.shape),
        uniform=uniform,
        forced=forced,
        allowed=torch.stack([each.allowed for each in requests]),
        length=start.clone(),
        start=start,
        shortest=torch.tensor([each.min_length for each in requests]),
        longest=torch.tensor([each.max_length for each in requests]),
    )
    return Live(*(x.to(device) for x in live))


def one_more(
    net: Network, state: State, live: Live, choose: Choose, rules: Rules
) -> tuple[list[int], list[float], list[bool]]:
    """Write one token to every row. Returns: the tokens, their log-probabilities, and whether a text ends there."""
    row = torch.arange(len(live.length), device=live.length.device)
    logits = net.step(live.written[row, live.length - 1], state).float()
    ruled = rules(logits, live.written, live.allowed, live.length >= live.shortest, live.length)
    must = live.forced[row, live.length]
    tokens = torch.where(must >= 0, must, choose(ruled, live.uniform[row, live.length]))
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    live.written[row, live.length] = tokens
    live.log_probs[row, live.length] = log_probs
    live.length.add_(1)
    ends = torch.isin(tokens, torch.tensor(rules.ends, device=tokens.device)) | (live.length >= live.longest)
    return tokens.tolist(), log_probs.tolist(), ends.tolist()


def text_of(live: Live, row: int, rules: Rules) -> Text:
    """A row that is finished."""
    start, length = int(live.start[row]), int(live.length[row])
    ids = tuple(live.written[row, :length].tolist())
    log_probs = live.log_probs[row, start:length].cpu().clone()
    return Text(ids, log_probs, "end" if ids[-1] in rules.ends else "length")
