"""ESMFold's kernels compile for an H200, fit its registers, and move 16 bytes at a time."""

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
    script = Path(__file__).with_name("compile_triangles.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * 8
    for kernel in found:
        attention = kernel["name"].startswith("attention")
        assert kernel["spilled"] == 0 and kernel["bytes_at_once"] == 16, kernel
        # Of 65,536 registers and 2,048 threads to a multiprocessor: 16 warps of attention fit, and 24 of the others.
        assert kernel["registers"] <= (128 if attention else 80), kernel
        # And of its 227 KiB two programs of attention, or three of the others.
        assert kernel["shared"] <= (65_536 if attention else 32_768), kernel
