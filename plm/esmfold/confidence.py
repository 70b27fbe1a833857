"""How sure ESMFold is: of every atom (pLDDT), of every pair (PAE), and of the whole (pTM)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from plm.esmfold.config import Config
from plm.esmfold.pair import chunks
from plm.layers import Linear

ATOMS, LEVELS = 37, 50
ERRORS, FARTHEST = 64, 31.0  # bins of the aligned error, and the last edge in Ångström
WIDTH = FARTHEST / (ERRORS - 2)  # Ångström
MOST = (ERRORS - 0.5) * WIDTH  # what the last bin stands for, one beyond the last edge


class PairErrors(NamedTuple):
    """Errors of residue j once residue i is aligned: row i, column j."""

    expected: Tensor  # [l, l] Ångström
    tm: float  # 0 to 1, of the best row


class AtomConfidence(nn.Module):
    """Logits of 50 levels of accuracy (lDDT) for 37 kinds of atoms: ``[l, c] -> [l, 37, 50]``. There are no
    activations between its layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, hidden = config.structure.channels, config.confidence_channels
        self.norm = nn.LayerNorm(c)
        self.first = Linear(c, hidden)
        self.second = Linear(hidden, hidden)
        self.out = Linear(hidden, ATOMS * LEVELS)

    def forward(self, states: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.norm(states)))).unflatten(-1, (ATOMS, LEVELS))  # type: ignore[no-any-return]


def accuracy(logits: Tensor) -> Tensor:
    """Expected lDDT, 0 to 1, from logits ``[..., 50]`` of equal ranges."""
    middles = (torch.arange(LEVELS, dtype=logits.dtype, device=logits.device) + 0.5) / LEVELS
    return logits.softmax(-1) @ middles


def pair_errors(head: Linear, z: Tensor, rows: int) -> PairErrors:
    """Expected aligned errors and predicted TM-score from pairs ``[l, l, p]``, some rows at a time.

    Zhang and Skolnick 2004 (the score), Jumper et al. 2021, supplement 1.9.7 (its prediction).
    """
    length = len(z)
    precise = torch.promote_types(head.weight.dtype, torch.float32)
    middles = (torch.arange(ERRORS, dtype=precise, device=z.device) + 0.5) * WIDTH
    near = 1.24 * (max(length, 19) - 15) ** (1 / 3) - 1.8
    closeness = 1 / (1 + (middles / near).square())
    expected = z.new_empty(length, length, dtype=precise)
    best = z.new_empty(length, dtype=precise)
    for some in chunks(length, rows):
        shares = head(z[some].flatten(0, 1).to(head.weight.dtype)).to(precise).softmax(-1).unflatten(0, (-1, length))
        expected[some] = shares @ middles
        best[some] = (shares @ closeness).sum(-1) / (length + 1e-8)
    return PairErrors(expected, float(best.detach().max()))
