"""Kernels compile for an H200, fit its registers and its shared memory, and move 16 bytes at a time. No GPU is needed.

Attention's are compiled by tests/test_gpu_attention.py, through its own call and backward pass.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernel_compile import needs_compiler, printed_by

Found = dict[str, Any]
"""Of a kernel, the name and the fields of `kernel_compile.Compiled`."""


def elementwise(kernel: Found) -> None:
    assert kernel["spilled"] == 0
    # 65,536 registers and 2,048 threads to a multiprocessor: half of them are there with 64.
    assert kernel["registers"] <= 72
    assert kernel["shared"] <= 8192
    # Of a head of 24 each half has 12 channels, three times 8 bytes in half precision.
    assert kernel["bytes_at_once"] == (8 if kernel["name"] == "halves 20 x 24 torch.bfloat16" else 16)


def triangles(kernel: Found) -> None:
    attention = kernel["name"].startswith("attention")
    assert kernel["spilled"] == 0 and kernel["bytes_at_once"] == 16
    # Of 65,536 registers and 2,048 threads to a multiprocessor: 16 warps of attention fit, and 24 of the others.
    assert kernel["registers"] <= (128 if attention else 80)
    # And of its 227 KiB two programs of attention, or three of the others.
    assert kernel["shared"] <= (65_536 if attention else 32_768)


def proteinbert(kernel: Found) -> None:
    """Products of half precision on tensor cores, copies that do not wait."""
    half_local = kernel["name"] == "local torch.bfloat16"
    assert kernel["asynchronous_copies"] > 0
    assert kernel["shared"] <= 227 * 1024
    # Of 255 registers some spill between the loops of the local block in half precision, which hold none of it.
    assert kernel["spilled"] <= (600 if half_local else 0)
    assert kernel["tensor_cores"] > 0 or not half_local


@needs_compiler
@pytest.mark.parametrize(("check", "count"), [(elementwise, 28), (triangles, 16), (proteinbert, 5)])
def test_kernels_compile_for_sm_90(check: Callable[[Found], None], count: int, tmp_path: Path) -> None:
    found = [json.loads(line) for line in printed_by(f"compile_{check.__name__}.py", tmp_path).splitlines()]
    assert len(found) == count
    for kernel in found:
        print(kernel)  # for whoever reads of a failure
        check(kernel)
