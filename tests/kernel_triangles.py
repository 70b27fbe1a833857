"""Parts of ESMFold's pair track with every kernel forced, beside what PyTorch makes of them."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor, nn

from plm.esmfold import pair
from plm_kernels import Activation

SIZES = (1, 5, 17, 33)  # residues: one, and no multiples of a tile
Part = Callable[[], nn.Module]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def gate_of(logits: Tensor) -> Callable[[Activation], Tensor]:
    """As a linear layer gives it."""
    return lambda activation: torch.sigmoid(logits) if activation == "sigmoid" else logits


def force_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that could be a kernel's is one from now on; the names of those that were."""
    served: list[str] = []

    def serve(name: str, x: Tensor, backend: str, kernel: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        if backend == "torch":
            return plain()
        served.append(name)
        return kernel()

    for module in ("triangle_attention", "triangle_multiplication"):
        monkeypatch.setattr(import_module(f"plm_kernels.{module}"), "serve", serve)
    monkeypatch.setattr(pair, "empty_sides", partial(pair.empty_sides, backend="triton"))
    return served


def random_part(part: Part, dtype: torch.dtype) -> nn.Module:
    """With weights that let every channel count."""
    found, generator = part().to(torch.float64), torch.Generator().manual_seed(1)
    for weight in found.parameters():
        weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * weight.shape[-1] ** -0.5
    return found.to(dtype).to(DEVICE).requires_grad_(False)


def updates(
    part: Part, length: int, channels: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """What a part adds to float32 pairs: by kernels, by PyTorch in this dtype, and in truth; and kernels' names."""
    z = normal(length, length, channels, dtype=torch.float32)
    net = random_part(part, dtype)
    with torch.inference_mode():
        truth = net.double()(z.double(), length) - z
        plain = net.to(dtype)(z.clone(), rows) - z
        with monkeypatch.context() as patch:
            served = force_kernels(patch)
            ours = net(z.clone(), rows) - z
    return ours, plain, truth, served
