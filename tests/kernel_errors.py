"""How far a kernel may be from the formula, which in float64 is the truth and in its own dtype the noise floor."""

from typing import Any

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)

# Triton's interpreter cuts digits off where a GPU rounds to bfloat16 (3.6 does).
ROUNDS_BFLOAT16 = DEVICE.type == "cuda"


def error(x: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference."""
    return (x.double() - truth).square().mean().sqrt().item()


# exp and the quotient of a float32 are ex2.approx and div.full on a GPU: up to two units in the last place off each,
# says NVIDIA's PTX ISA. Evenly spread that is 2 / sqrt(3) units for one, 1.6 for both; a unit is two roundings' largest
# error. PyTorch's own and the interpreter's are rounded properly.
APPROXIMATE = 3.3 if DEVICE.type == "cuda" else 0.0


def allowed(formula: Tensor, truth: Tensor, *, exponentials: bool = False) -> float:
    """Twice the error of the formula in the same dtype.

    Of fewer than a hundred numbers the largest alone may make the error, by luck none: then at least twice the largest
    error of one rounding. In float64 the formula is its own truth, and four such roundings are allowed. Numbers that
    are cut off have twice the error of rounded ones, wherever that happens.

    ``exponentials``: the kernel takes some, and divides by them. In float32 a GPU does so approximately.
    """
    exact = formula.dtype == torch.float64
    rounding = torch.finfo(formula.dtype).eps / 2 * truth.square().mean().sqrt().item()
    floor = max(error(formula, truth), rounding) if exact or truth.numel() < 100 else error(formula, truth)
    cut = formula.dtype == torch.bfloat16 and not ROUNDS_BFLOAT16
    approximate = APPROXIMATE if exponentials and formula.dtype == torch.float32 else 0
    return (4 if exact or cut else 2) * floor + approximate * rounding


def steps_apart(x: Tensor, y: Tensor) -> float:
    """The largest difference in steps of their dtype; near zero, where its steps get finer, in millionths."""
    y = y.double()
    return ((x.double() - y).abs() / (torch.finfo(x.dtype).eps * y.abs() + 1e-6)).max().item()


class Fences:
    """Whatever ``torch.empty`` gives lies between numbers that nobody may touch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Tensor] = []
        self.empty = torch.empty
        monkeypatch.setattr(torch, "empty", self)

    def __call__(self, rows: int, columns: int, **how: Any) -> Tensor:
        wide = self.empty(rows + 64, columns, **how).fill_(7)
        self.made.append(wide)
        return wide[32:-32].fill_(9)

    def stand(self) -> bool:
        """Whether something was made, every number of it was written, and none around it."""
        around = all(bool((x[:32] == 7).all() and (x[-32:] == 7).all()) for x in self.made)
        return bool(self.made) and around and not any(bool((x[32:-32] == 9).all(0).any()) for x in self.made)
