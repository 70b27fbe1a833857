"""How the next token is chosen: pure functions of its logits ``[r, v]``, row by row.

Letters: r rows (texts being written), v vocabulary, t tokens written so far.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Greedy:
    """The most probable token."""

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """``[r, v] -> [r]``; ``uniform`` is not used."""
        return logits.argmax(-1)


@dataclass(frozen=True)
class Sampler:
    """A token drawn from ``softmax(logits / temperature)``, cut to the most probable: by ``top_k``, then by ``top_p``.

    ``top_p`` keeps the smallest set of tokens whose probabilities reach it, as transformers does (and in its order).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, or 0 for the most probable token; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}")

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """``[r, v] -> [r]``: the token where the cumulative distribution passes ``uniform`` ``[r]``, each in [0, 1)."""
        cumulative = self.probabilities(logits).cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from, ``[r, v]`` in float64."""
        logits = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(-1)
            outside = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            outside[:, -1] = False  # the most probable token always stays
            logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
        return logits.softmax(-1)


@dataclass(frozen=True)
class Rules:
    """What may be written next, whatever its probability.

    Attributes:
        ends: ids of the tokens that end a text.
        repetition_penalty: above 1 it divides positive logits of tokens that the text has, those it was begun with
            included, and multiplies negative ones (Keskar et al. 2019).
        no_repeat: tokens of which no run of so many comes twice in a text (transformers' ``no_repeat_ngram_size``);
            lifted where it would leave no token at all.
    """

    ends: tuple[int, ...]
    repetition_penalty: float = 1.0
    no_repeat: int | None = None

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, 1 for none; got {self.repetition_penalty}")
        if self.no_repeat is not None and self.no_repeat < 1:
            raise ValueError(f"no_repeat must be at least 1, or None to allow repeats; got {self.no_repeat}")

    def __call__(
        self, logits: Tensor, written: Tensor, allowed: Tensor, may_end: Tensor, length: Tensor | None = None
    ) -> Tensor:
        """Logits ``[r, v]`` with -inf for what may not be written.

        ``written`` is ``[r, t]``, of which each row has ``length`` ``[r]`` tokens (None: all), and behind them only
        tokens that it has already. ``allowed`` is ``[r, v]``, true where a token is allowed, ``may_end`` ``[r]``.
        """
        if self.repetition_penalty != 1:
            # An embedding may have more rows than the head has columns: such a token of a prompt has a spare column.
            width = max(logits.shape[-1], int(written.max()) + 1)
            spare = torch.nn.functional.pad(logits, (0, width - logits.shape[-1]))
            seen = spare.gather(-1, written)
            seen = torch.where(seen > 0, seen / self.repetition_penalty, seen * self.repetition_penalty)
            logits = spare.scatter(-1, written, seen)[:, : logits.shape[-1]]
        logits = logits.masked_fill(~allowed, -torch.inf)
        for end in self.ends:
            logits[:, end] = logits[:, end].masked_fill(~may_end, -torch.inf)
        if self.no_repeat is not None:
            length = torch.full_like(written[:, 0], written.shape[1]) if length is None else length
            fresh = logits.masked_fill(repeats(written, length, self.no_repeat, logits.shape[-1]), -torch.inf)
            stuck = (fresh == -torch.inf).all(-1, keepdim=True)
            logits = torch.where(stuck, logits, fresh)
        return logits


def repeats(written: Tensor, length: Tensor, size: int, vocabulary: int) -> Tensor:
    """Which tokens ``[r, v]`` would complete a run of ``size`` tokens that the text ``[r, t]`` has already."""
    banned = torch.zeros(len(written), vocabulary + 1, dtype=torch.bool, device=written.device)
    if written.shape[1] < size:
        return banned[:, :-1]
    runs = written.unfold(1, size, 1)  # [r, t - size + 1, size]
    last = length[:, None] + torch.arange(1 - size, 0, device=written.device)
    tail = written.gather(1, last.clamp(min=0))  # [r, size - 1], the newest tokens
    same = (runs[..., :-1] == tail[:, None]).all(-1)
    whole = torch.arange(runs.shape[1], device=written.device) + size <= length[:, None]
    enough = length[:, None] >= size
    completes = torch.where(same & whole & enough, runs[..., -1].clamp(max=vocabulary), vocabulary)
    return banned.scatter(1, completes, True)[:, :-1]


def streams(seed: int, names: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Uniform numbers ``[len(names), length]`` in [0, 1): a stream for each (prompt, sample).

    A stream depends on the seed and on its own name alone, so a sample is the same whatever else is being written.
    """
    draws = []
    for prompt, sample in names:
        digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        draws.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(draws)
