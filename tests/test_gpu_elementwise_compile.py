"""The element-wise kernels compile for an H200, fit its registers, and move 16 bytes at a time."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0,)


@pytest.mark.skipif(triton_version() < (3, 4), reason="older compilers are called otherwise")
def test_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    """In another process: in this one kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_elementwise.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * 14
    for kernel in found:
        name = kernel["name"]
        assert kernel["spilled"] == 0, name
        # 65,536 registers and 2,048 threads to a multiprocessor: half of them are there with 64.
        assert kernel["registers"] <= 72, name
        assert kernel["shared"] <= 8192, name
        # Of a head of 24 each half has 12 channels, three times 8 bytes in half precision.
        assert kernel["bytes_at_once"] == (8 if name == "halves 20 x 24 torch.bfloat16" else 16), name
