"""Compile the element-wise kernels at the sizes of published models, and print what the assembler says of each."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType

import torch
from kernel_compile import compiled

from plm_kernels.gpu import gates, norms, rotary

Launch = tuple[str, ModuleType, str, Callable[[], object]]


def launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Name, module, kernel, and a call that launches it: of ESM-2 small and large, Ankh3, ProGen2."""
    for c in (320, 1280, 5120):
        x, weight = torch.zeros(33, c, dtype=dtype), torch.zeros(c, dtype=dtype)
        layer = lambda x=x, w=weight: norms.norm(x, x, w, w, 1e-5, centred=True, keep_sum=True)  # noqa: E731
        yield f"layer norm {c}", norms, "norm_kernel", layer
    x, weight = torch.zeros(33, 1536, dtype=dtype), torch.zeros(1536, dtype=dtype)
    for name, delta in (("rms norm", None), ("rms norm of a sum", x)):
        rms = lambda d=delta: norms.norm(x, d, weight, None, 1e-6, centred=False, keep_sum=d is not None)  # noqa: E731
        yield f"{name} 1536", norms, "norm_kernel", rms
    y = torch.zeros(33, 2 * 3840, dtype=dtype)
    for activation in ("gelu", "gelu_tanh", "silu"):
        yield f"{activation} 3840", gates, "gated_kernel", lambda a=activation: gates.gated(y, a)
    for h, d in ((20, 16), (20, 24), (20, 64), (40, 128)):
        yield f"halves {h} x {d}", rotary, "rotary_kernel", turning(h, d, d // 2, 1, False, dtype)
    for h, d, r in ((16, 64, 16), (16, 96, 24)):
        yield f"pairs {h} x {d}", rotary, "rotary_kernel", turning(h, d, r, 2, True, dtype)


def turning(h: int, d: int, r: int, keys: int, interleaved: bool, dtype: torch.dtype) -> Callable[[], object]:
    x, cos = torch.zeros(33, 3, h, d, dtype=dtype), torch.zeros(33, 1, r, dtype=dtype)
    return lambda: rotary.rotate_(x[:, 0], x[:, keys], cos, cos, scale=d**-0.5, interleaved=interleaved)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        for name, module, kernel, call in launches(dtype):
            found = asdict(compiled(module, kernel, call))
            print(json.dumps({"name": f"{name} {dtype}", **found}))
