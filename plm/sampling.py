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

    ``end`` is the id of the end token. A ``repetition_penalty`` above 1 divides positive logits of tokens that the text
    has, the start token included, and multiplies negative ones (Keskar et al. 2019).
    """

    end: int
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, 1 for none; got {self.repetition_penalty}")

    def __call__(self, logits: Tensor, written: Tensor, allowed: Tensor, may_end: Tensor) -> Tensor:
        """Logits ``[r, v]`` with -inf for what may not be written.

        ``written`` is ``[r, t]``, ``allowed`` ``[r, v]`` true where a token is allowed, ``may_end`` ``[r]``.
        """
        if self.repetition_penalty != 1:
            seen = logits.gather(-1, written)
            seen = torch.where(seen > 0, seen / self.repetition_penalty, seen * self.repetition_penalty)
            logits = logits.scatter(-1, written, seen)
        logits = logits.masked_fill(~allowed, -torch.inf)
        logits[:, self.end] = logits[:, self.end].masked_fill(~may_end, -torch.inf)
        return logits


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
