"""Compile attention's kernels for a GPU that is not there, as launches of given shapes would. Run as a script.

The arguments are the cases, as JSON, and the GPU's compute capability: 90 is an H200, 80 an A100.

A process that interprets kernels cannot compile them, so this is one of its own. Unlike ``kernel_compile.py`` it lets
Triton's launcher specialise the arguments, with a driver that is not there: the three kernels of a call with its
backward pass are compiled as autograd launches them, while `kernel_compile.compiled` takes one launch of one kernel.
Prints, as JSON, a row per kernel with what the assembler used: registers per thread, bytes that were spilled from them,
bytes of memory shared by a program.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from plm_kernels.gpu import attention as gpu
from plm_kernels.gpu import attention_backward

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
rows: list[dict[str, Any]] = []


class Absent:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[2]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def used(kernel: Any) -> dict[str, int]:
    """Of the assembled code: REG, STACK and SHARED. What does not fit in registers lies on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(word.split(":", 1) for word in text.split() if word.count(":") == 1 and word[-1].isdigit())
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"]), "shared": kernel.metadata.shared}


def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """Compile what would be launched."""
    kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
    mma = "wgmma" if "wgmma" in kernel.asm["ptx"] else "mma" if "mma.sync" in kernel.asm["ptx"] else "fma"
    rows.append({"kernel": self.__name__, **used(kernel), "products": mma, "warps": kernel.metadata.num_warps})
    return kernel


def compile_case(head_size: int, dtype: str, bias: bool, causal: bool, backward: bool) -> None:
    """The kernels of one call on packed queries, keys and values of 16 heads."""
    qkv = torch.zeros(300, 3, 16, head_size, dtype=getattr(torch, dtype), requires_grad=backward)
    table = torch.zeros(16, 257, requires_grad=backward) if bias else None
    offsets = torch.tensor([0, 100, 300], dtype=torch.int32)
    first = len(rows)
    out = gpu.attention(*qkv.unbind(1), offsets, scale=1.0, causal=causal, table=table, key_offsets=offsets)
    if backward:
        out.sum().backward()
    for row in rows[first:]:
        row |= {"head_size": head_size, "dtype": dtype, "bias": bias, "causal": causal}


if __name__ == "__main__":
    driver.set_active(Absent())
    attention_backward.capability = lambda x: int(sys.argv[2]) // 10
    compile_only, JITFunction.run = JITFunction.run, record
    for case in json.loads(sys.argv[1]):
        compile_case(*case)
    json.dump(rows, sys.stdout)
