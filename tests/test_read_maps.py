"""Torch files are mapped: what a network keeps of them lies in memory once, as pages of the file itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import FORMATS, save

from plm_weights import open_tensors

ROOT = Path(__file__).parents[1]
LARGE = 2**14  # numbers, more than a page
# What the program has in memory of its own and of files, and the most that it ever had, in bytes.
MEASURED = """
import json, sys
import torch
def memory():
    lines = [line.split() for line in open("/proc/self/status")]
    kinds = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].startswith(("Rss", "VmHWM"))}
    return {"own": kinds["RssAnon"], "files": kinds["RssFile"], "most": kinds["VmHWM"]}
"""


def measured(program: str, small: Path, large: Path) -> dict[str, int]:
    """What ``work`` of a program on a large file has added to its memory, once it has done it on a small one.

    What it gives is kept.
    """
    code = f"{MEASURED}{program}\nwork(sys.argv[1]); before = memory(); kept = work(sys.argv[2]); after = memory()\n"
    code += "print(json.dumps({kind: after[kind] - before[kind] for kind in after}))"
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "weights"))
    command = [sys.executable, "-c", code, str(small), str(large)]
    run = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert isinstance(found, dict)
    return found


@FORMATS
@pytest.mark.parametrize("count", [10, LARGE], ids=["small", "large"])
def test_writing_into_a_tensor_does_not_change_the_file(legacy: bool, count: int, tmp_path: Path) -> None:
    path = save({"a": torch.ones(count), "half": torch.ones(count + 1).half()}, tmp_path / "x.pt", legacy)
    source, content = open_tensors(path), path.read_bytes()
    for tensor in source.values():
        tensor[:] = 7
        assert tensor.eq(7).all()
    assert path.read_bytes() == content and all(tensor.eq(1).all() for tensor in source.values())


def test_a_tensor_can_be_saved_without_the_rest_of_the_file(tmp_path: Path) -> None:
    """A view of one large map would bring all of it along."""
    path = save({"a": torch.ones(LARGE), "b": torch.zeros(8 * LARGE)}, tmp_path / "x.pt", False)
    alone = save({"a": open_tensors(path)["a"]}, tmp_path / "y.pt", False)
    assert alone.stat().st_size < 4 * LARGE + 2**12


def test_tensors_outlive_their_source_and_their_file(tmp_path: Path) -> None:
    path = save({"a": torch.arange(LARGE)}, tmp_path / "x.pt", False)
    tensor = open_tensors(path)["a"]
    path.unlink()
    assert torch.equal(tensor, torch.arange(LARGE))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by files only on Linux")
def test_nothing_is_in_memory_twice(tmp_path: Path) -> None:
    """All tensors of a file, looked at and kept: pages of the file, and at most 1 % of its size besides."""
    paths = [save({f"{i}": torch.ones(n) for i in range(8)}, tmp_path / f"{n}.pt", False) for n in (LARGE, 2**22)]
    work = """
from plm_weights import open_tensors
def work(path):
    tensors = dict(open_tensors(path))
    assert all(tensor.aminmax() == (1, 1) for tensor in tensors.values())
    return tensors
"""
    size, found = paths[1].stat().st_size, measured(work, *paths)
    # Measured: 8 kB of its own, and 134 MB of the file.
    assert found["own"] < 0.01 * size < 0.99 * size < found["files"]
    assert found["most"] < 1.01 * size
