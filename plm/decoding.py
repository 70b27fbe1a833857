"""The loops that write: one token at a time for every text of a batch, by drawing or by beam search.

Texts that are finished leave the batch at once. A text depends on its prompt, its settings and its own stream of random
numbers; never on what is written beside it.

Letters: p prompts, r rows (texts being written), k beams, v vocabulary, t tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plm.layers import weights_unchanged
from plm.models.t5 import EOS, START, T5
from plm.packing import Packed
from plm.sampling import Rules

Stop = Literal["end", "length"]
LOW = -1e9  # the score of a beam that does not exist


@dataclass(frozen=True)
class Request:
    """A prompt and the bounds of what is written to it. Lengths are in tokens and count the start token."""

    ids: Sequence[int]
    min_length: int
    max_length: int
    allowed: Tensor  # [v], true where a token may be written

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.min_length > self.max_length:
            raise ValueError(
                "max_length counts the start token, so it must be at least 2, and min_length must not be above it; got "
                f"max_length={self.max_length}, min_length={self.min_length}"
            )
        if self.allowed.sum() - self.allowed[EOS].long() < 1:
            raise ValueError("every token but the end is banned; allow some")


@dataclass(frozen=True)
class Text:
    """Token ids from the start token to the last one, and the log-probability of each but the first.

    Log-probabilities are the model's own, before any rule, temperature or cut.
    """

    ids: tuple[int, ...]
    log_probs: Tensor = field(compare=False)
    stopped_by: Stop


Choose = Callable[[Tensor, Tensor], Tensor]
"""Logits ``[r, v]`` and uniform numbers ``[r]`` to tokens ``[r]``."""


@torch.inference_mode()
@weights_unchanged()
def write(
    net: T5, requests: Sequence[Request], choose: Choose, rules: Rules, uniform: Tensor, rows_per_prompt: int
) -> list[list[Text]]:
    """``rows_per_prompt`` texts to each prompt. ``uniform`` is ``[r, longest max_length]``, rows prompt by prompt."""
    bounds = Bounds(net, requests, rows_per_prompt)
    longest = int(bounds.longest.max())
    prompts = Packed.from_ids([request.ids for request in requests], bounds.device)
    state = net.begin(prompts, rows_per_prompt, longest - 1)
    count, device = len(uniform), bounds.device
    live = Live(
        torch.arange(count, device=device),
        torch.full((count, longest), START, device=device),
        torch.zeros(count, longest, device=device),
        uniform.to(device),
        bounds.allowed,
        bounds.shortest,
        bounds.longest,
    )
    texts: dict[int, Text] = {}
    for t in range(1, longest):
        logits = net.step(live.written[:, t - 1], state).float()
        tokens = choose(rules(logits, live.written[:, :t], live.allowed, t >= live.shortest), live.uniform[:, t])
        live.written[:, t] = tokens
        live.log_probs[:, t] = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        going = (tokens != EOS) & (t + 1 < live.longest)
        if not going.all():
            ended = Live(*(x[~going].cpu() for x in live))
            for row, ids, values in zip(ended.row.tolist(), ended.written, ended.log_probs, strict=True):
                texts[row] = text(ids, values, t + 1)
            if len(texts) == count:
                break
            live = Live(*(x[going] for x in live))
            state.keep(going.nonzero()[:, 0])
    return [[texts[row] for row in range(i, i + rows_per_prompt)] for i in range(0, count, rows_per_prompt)]


class Live(NamedTuple):
    """The texts that are still being written, a row of every tensor for each."""

    row: Tensor  # [r], its number among all texts
    written: Tensor  # [r, t]
    log_probs: Tensor  # [r, t]
    uniform: Tensor  # [r, t]
    allowed: Tensor  # [r, v]
    shortest: Tensor  # [r]
    longest: Tensor  # [r]


@torch.inference_mode()
@weights_unchanged()
def beam_search(
    net: T5,
    requests: Sequence[Request],
    rules: Rules,
    beams: int,
    *,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[list[Text]]:
    """The ``beams`` best texts that beam search finds to each prompt, best first.

    The search of transformers 5.23, decision by decision: of the ``2 k`` best continuations of all beams, those that
    end are finished if they are among the first ``k``, and the best ``k`` others go on. A finished text is worth its
    summed log-probability over its length (without the start token) to the power of ``length_penalty``.

    Args:
        early_stopping: True stops a prompt at ``k`` finished texts. False stops when the best beam, were it finished
            now, would be no better than the worst of ``k`` finished texts; "never" when even at its greatest length.

    Raises: ValueError for another ``early_stopping``.
    """
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never'; got {early_stopping!r}")
    bounds = Bounds(net, requests, beams)
    device, longest = bounds.device, int(bounds.longest.max())
    state = net.begin(Packed.from_ids([request.ids for request in requests], device), beams, longest - 1)
    written = torch.full((len(requests), beams, longest), START, device=device)
    log_probs = torch.zeros(len(requests), beams, longest, device=device)
    scores = torch.full((len(requests), beams), LOW, device=device)
    scores[:, 0] = 0  # all beams begin alike, so only the first one counts
    results = [Finished(request, beams, length_penalty, early_stopping) for request in requests]
    searched = list(range(len(requests)))  # the prompts that are not settled yet
    for t in range(1, longest):
        rows = bounds.rows_of(searched, beams)
        own = net.step(written[:, :, t - 1].flatten(), state).float().log_softmax(-1)
        ruled = rules(own, written[:, :, :t].flatten(0, 1), bounds.allowed[rows], t >= bounds.shortest[rows])
        total = scores[:, :, None] + ruled.unflatten(0, (-1, beams))  # [p, k, v]
        best, place = total.flatten(1).topk(2 * beams)  # of each beam's continuations one ends, so k of these go on
        beam, token = place // total.shape[-1], place % total.shape[-1]
        written, log_probs = chosen(written, beam), chosen(log_probs, beam)
        written[:, :, t], log_probs[:, :, t] = token, own.view(len(own) // beams, -1).gather(1, place)
        ends = (token == EOS) | (t + 1 >= bounds.longest[rows].view(-1, beams)[:, :1])
        scores, going = (best + ends * LOW).topk(beams)
        still = []
        for i, p in enumerate(searched):
            for j in ends[i, :beams].nonzero()[:, 0].tolist():
                results[p].add(float(best[i, j]), text(written[i, j].cpu(), log_probs[i, j].cpu(), t + 1))
            if not results[p].settled(t, float(scores[i, 0])):
                still.append(i)
        if not still:
            break
        kept = torch.tensor(still, device=device)
        going, scores = going[kept], scores[kept]
        written, log_probs = chosen(written[kept], going), chosen(log_probs[kept], going)
        state.keep((kept[:, None] * beams + beam[kept].gather(1, going)).flatten())
        searched = [searched[i] for i in still]
    return [[each for _, each in result.best] for result in results]


def chosen(x: Tensor, which: Tensor) -> Tensor:
    """Rows ``which`` ``[p, m]`` of each prompt's ``[p, k, t]``."""
    return x.gather(1, which[:, :, None].expand(-1, -1, x.shape[-1]))


class Finished:
    """The best finished texts of one prompt."""

    def __init__(
        self, request: Request, beams: int, length_penalty: float, early_stopping: bool | Literal["never"]
    ) -> None:
        self.request, self.beams = request, beams
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.best: list[tuple[float, Text]] = []

    def add(self, log_prob: float, text: Text) -> None:
        worth = log_prob / float((len(text.ids) - 1) ** self.length_penalty)
        self.best = sorted([*self.best, (worth, text)], key=lambda each: -each[0])[: self.beams]

    def settled(self, t: int, running: float) -> bool:
        """Whether nothing better can come after ``t`` tokens, the best beam having the log-probability ``running``."""
        if t + 1 >= self.request.max_length:
            return True
        if len(self.best) < self.beams:
            return False
        if self.early_stopping is True:
            return True
        farthest = self.early_stopping == "never" and self.length_penalty > 0
        reach = self.request.max_length - 1 if farthest else t
        return running / float(reach**self.length_penalty) <= self.best[-1][0]


class Bounds:
    """The limits of every row, on the device."""

    def __init__(self, net: T5, requests: Sequence[Request], rows_per_prompt: int) -> None:
        self.device = net.embed.weight.device

        def rows(values: Tensor) -> Tensor:
            return values.repeat_interleave(rows_per_prompt, 0).to(self.device)

        self.shortest = rows(torch.tensor([request.min_length for request in requests]))
        self.longest = rows(torch.tensor([request.max_length for request in requests]))
        self.allowed = rows(torch.stack([request.allowed for request in requests]))

    def rows_of(self, prompts: Sequence[int], rows_per_prompt: int) -> Tensor:
        """Rows of these prompts."""
        first = torch.tensor(prompts, device=self.device)[:, None] * rows_per_prompt
        return (first + torch.arange(rows_per_prompt, device=self.device)).flatten()


def text(written: Tensor, log_probs: Tensor, length: int) -> Text:
    """The first ``length`` tokens of a row as a text."""
    ids = tuple(written[:length].tolist())
    return Text(ids, log_probs[1:length].clone(), "end" if ids[-1] == EOS else "length")
