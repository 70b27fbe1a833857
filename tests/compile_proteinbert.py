"""ProteinBERT's kernels compiled for an H100 or H200 that need not be there; prints what the assembler says, as JSON.

Run as a script: a process that interprets kernels cannot compile them.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plm_kernels import LocalBlock
from plm_kernels.gpu import convolution, global_attention

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
NUMBERS = {int: "i32", float: "fp32"}


class Launches:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.given = kernel, {}

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: self.given.update(zip(self.kernel.arg_names, args, strict=False), **kwargs)


def compiled(launched: Launches) -> dict[str, int]:
    kernel, given = launched.kernel, launched.given
    options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, known = given[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or (known and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else NUMBERS[type(value)]
        if isinstance(value, Tensor) or (known and type(value) is int and value % 16 == 0):  # as the launcher finds out
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "kernel.ptx").write_text(made.asm["ptx"])
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [assembler, "-v", "-arch=sm_90a", path, "-o", f"{path}.o"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared": made.metadata.shared,
        "tensor cores": made.asm["ptx"].count("wgmma.mma_async"),
        "asynchronous copies": made.asm["ptx"].count("cp.async.cg"),
    }


def main() -> None:
    """The published sizes, with a mask, which is more than without."""
    local = Launches(convolution.local_block_kernel)
    dense = Launches(convolution.dense_block_kernel)
    attention = Launches(global_attention.global_attention_kernel)
    convolution.local_block_kernel = local
    convolution.dense_block_kernel = dense
    global_attention.global_attention_kernel = attention
    found = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for launched in (local, dense, attention):
            launched.given = {}
        b, t, c, h = 2, 41, 128, 4
        filters, square, row = (torch.empty(*shape, dtype=dtype) for shape in ((9, c, c), (c, c), (c,)))
        weights = LocalBlock(filters, row, filters, row, 5, row, row, 1e-3, square, row, row, row, 1e-3)
        keep = torch.ones(b, t, dtype=torch.bool)
        convolution.local_block(torch.empty(b, t, c, dtype=dtype), torch.empty(b, c, dtype=dtype), weights, keep)
        q, k, v = (torch.empty(*shape, dtype=dtype) for shape in ((b, h, 64), (b, t, h, 64), (b, t, h, 128)))
        global_attention.global_attention(q, k, v, 0.125, keep, True)
        for launched, kernel in ((local, "local"), (dense, "dense"), (attention, "attention")):
            if launched.given:
                found[f"{kernel} {name}"] = compiled(launched)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
