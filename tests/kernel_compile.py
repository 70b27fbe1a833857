"""Triton kernels compiled for a GPU that is not there: the compiler and the assembler of its wheel need none.

A process that interprets kernels cannot compile them, so tests have scripts do it (``compile_*.py``), by `printed_by`.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}  # fmt: skip
NUMBERS = {int: "i32", float: "fp32"}


def triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0,)


needs_compiler = pytest.mark.skipif(triton_version() < (3, 4), reason="older compilers are called otherwise")


def printed_by(script: str, cache: Path, *arguments: str) -> str:
    """What a script of this folder prints, in a process that compiles. ``cache``: a folder, of Triton's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel."""

    registers: int  # of a thread
    spilled: int  # bytes that did not fit in them
    shared: int  # bytes of a program
    bytes_at_once: int  # that one instruction moves between memory and a thread, at most
    tensor_cores: int  # instructions that multiply there
    asynchronous_copies: int  # instructions that copy to shared memory without waiting


def compiled(module: ModuleType, kernel: str, call: Callable[[], object]) -> Compiled:
    """The kernel of that name as ``call`` launches it, on tensors of any device, which torch has aligned."""
    from triton.runtime.jit import JITFunction

    class Recorder:
        def __init__(self) -> None:
            self.launches: list[Any] = []

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: self.launches.append((args, kwargs))

    functions = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    recorders = {name: Recorder() for name in functions}
    vars(module).update(recorders)  # all of them: no other can be launched either
    try:
        call()
    finally:
        vars(module).update(functions)
    function, ((args, kwargs), *_) = functions[kernel], recorders[kernel].launches
    return assemble(function, {**dict(zip(function.arg_names, args, strict=False)), **kwargs})


def assemble(function: Any, arguments: dict[str, Any]) -> Compiled:
    """Compile with arguments as the launcher would specialise them: constants, ones and multiples of 16 are known."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        whole = type(value) is int and not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None or (whole and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = NUMBERS[type(value)]
        if isinstance(value, Tensor) or (signature[parameter.name] == "i32" and whole and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    said = assembler_says(ptx)
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    moves = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+) ", ptx)
    at_once = max(int(count or 1) * int(bits) // 8 for count, bits in moves)
    products, copies = ptx.count("wgmma.mma_async"), ptx.count("cp.async.cg")
    return Compiled(int(registers), spilled, kernel.metadata.shared, at_once, products, copies)


def assembler_says(ptx: str) -> str:
    """What ``ptxas -v`` reports."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "kernel.ptx").write_text(ptx)
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [assembler, "-v", "-arch=sm_90a", path, "-o", f"{path}.o"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
