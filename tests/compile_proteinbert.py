"""Compile ProteinBERT's kernels at the published sizes, and print what the assembler says of each."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType

import torch
from kernel_compile import compiled

from plm_kernels import LocalBlock
from plm_kernels.gpu import convolution, global_attention

Launch = tuple[str, ModuleType, str, Callable[[], object]]


def launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Name, module, kernel, and a call that launches it, with a mask, which is more than without."""
    b, t, c, h = 2, 41, 128, 4
    filters, square, row = (torch.empty(*shape, dtype=dtype) for shape in ((9, c, c), (c, c), (c,)))
    weights = LocalBlock(filters, row, filters, row, 5, row, row, 1e-3, square, row, row, row, 1e-3)
    x, added, keep = torch.empty(b, t, c, dtype=dtype), torch.empty(b, c, dtype=dtype), torch.ones(b, t).bool()
    local = lambda: convolution.local_block(x, added, weights, keep)  # noqa: E731
    yield "local", convolution, "local_block_kernel", local
    if dtype == torch.float32:  # in half precision one kernel does both
        yield "dense", convolution, "dense_block_kernel", local
    q, k, v = (torch.empty(*shape, dtype=dtype) for shape in ((b, h, 64), (b, t, h, 64), (b, t, h, 128)))
    attention = lambda: global_attention.global_attention(q, k, v, 0.125, keep, True)  # noqa: E731
    yield "attention", global_attention, "global_attention_kernel", attention


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        for name, module, kernel, call in launches(dtype):
            print(json.dumps({"name": f"{name} {dtype}", **asdict(compiled(module, kernel, call))}))
