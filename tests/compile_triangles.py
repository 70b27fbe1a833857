"""Compile ESMFold's kernels at the published sizes, and print what the assembler says of each."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType

import torch
from kernel_compile import compiled

from plm_kernels.gpu import triangle_attention, triangle_multiplication

Launch = tuple[str, ModuleType, str, Callable[[], object]]
CHANNELS, HEADS, HEAD_SIZE = 128, 4, 32


def launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Name, module, kernel, and a call that launches it, of a short and a longer protein; lengths fill no tile."""
    for length in (50, 99):
        q, k, v = torch.zeros(3, length, 3, HEADS, HEAD_SIZE, dtype=dtype).unbind(2)
        bias, gate = torch.zeros(HEADS, length, length, dtype=dtype), torch.zeros(3 * length, CHANNELS, dtype=dtype)
        attention = lambda q=q, k=k, v=v, bias=bias, gate=gate: triangle_attention.triangle_attention(  # noqa: E731
            q, k, v, bias, gate, HEAD_SIZE**-0.5
        )
        yield f"attention {length}", triangle_attention, "attend", attention
    module, weight = triangle_multiplication, torch.zeros(CHANNELS, dtype=dtype)
    z, product = torch.zeros(50, 50, CHANNELS), torch.zeros(CHANNELS, 50, 64, dtype=dtype)
    for name, x in (("pairs", z), ("turned pairs", z.transpose(0, 1)[:7])):
        yield f"norm of {name}", module, "norm", lambda x=x: module.pair_norm(x, weight, weight, 1e-5)
    turned = product[..., :50].permute(1, 2, 0)
    yield "norm of a product", module, "norm", lambda: module.pair_norm(turned, weight, weight, 1e-5, padded=True)
    residues, wide = torch.zeros(1, 50, 1024), torch.zeros(1024, dtype=dtype)
    yield "norm of residues", module, "norm", lambda: module.pair_norm(residues, wide, wide, 1e-5)
    x, sides = torch.zeros(2500, CHANNELS, dtype=dtype), torch.zeros(CHANNELS, 64, 64, dtype=dtype)
    yield "sides", module, "sides", lambda: module.write_sides(sides[:, :50], x, x, 50)
    yield "sum", module, "add", lambda: module.add_gated(z.transpose(0, 1), x, x)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        for name, module, kernel, call in launches(dtype):
            print(json.dumps({"name": f"{name} {dtype}", **asdict(compiled(module, kernel, call))}))
