"""Beam search: the texts that are probable as a whole, for models with an encoder and a decoder.

Letters: p prompts, r rows (texts being written), k beams, v vocabulary, t tokens.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from plm.decoding import Request, Text, refuse_silence
from plm.layers import weights_unchanged
from plm.models.t5 import EOS, START, T5
from plm.packing import Packed
from plm.sampling import Rules

LOW = -1e9  # the score of a beam that does not exist


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
    for request in requests:
        refuse_silence(request, rules)
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
