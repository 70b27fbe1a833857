"""Triton kernels compiled for a GPU that is not there: the compiler and the assembler of its wheel need none.

Run as a script, because a process that interprets kernels cannot compile them.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel."""

    registers: int  # of a thread
    spilled: int  # bytes that did not fit in them
    shared: int  # bytes of a program
    bytes_at_once: int  # that one instruction moves between memory and a thread, at most


def compiled(module: ModuleType, kernel: str, call: Callable[[], object]) -> Compiled:
    """The kernel of that name as ``call`` launches it, on tensors of any device, which torch has aligned."""
    function, launches = getattr(module, kernel), []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append((args, kwargs))

    setattr(module, kernel, Recorder())
    try:
        call()
    finally:
        setattr(module, kernel, function)
    (args, kwargs), *_ = launches
    return assemble(function, {**dict(zip(function.arg_names, args, strict=False)), **kwargs})


def assemble(function: Any, arguments: dict[str, Any]) -> Compiled:
    """Compile with arguments as the launcher would specialise them: constants, ones and multiples of 16 are known."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
        known = not parameter.do_not_specialize
        if isinstance(value, Tensor) or (signature[parameter.name] == "i32" and known and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=TARGET, options=options)
    ptx = kernel.asm["ptx"]
    said = assembler_says(ptx)
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    moves = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+) ", ptx)
    at_once = max(int(count or 1) * int(bits) // 8 for count, bits in moves)
    return Compiled(int(registers), spilled, kernel.metadata.shared, at_once)


def assembler_says(ptx: str) -> str:
    """What ``ptxas -v`` reports."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "kernel.ptx").write_text(ptx)
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [assembler, "-v", "-arch=sm_90a", path, "-o", f"{path}.o"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
