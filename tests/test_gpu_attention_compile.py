"""Attention's kernels compile for GPUs that are not there, and fit their registers and shared memory."""

import json
from pathlib import Path
from typing import Any

import pytest
from kernel_compile import needs_compiler, printed_by

pytest.importorskip("triton")
pytestmark = needs_compiler


def compile_for(capability: int, cases: list[tuple[object, ...]], cache: Path) -> list[dict[str, Any]]:
    """What became of each kernel. No GPU is needed for it."""
    found: list[dict[str, Any]] = json.loads(
        printed_by("compile_attention.py", cache, json.dumps(cases), str(capability))
    )
    return found


def test_it_compiles_for_an_h200(tmp_path: Path) -> None:
    """All three kernels, at the head size of T5 and ESM-2, with little spilled."""
    rows = compile_for(90, [(64, "bfloat16", True, False, True), (64, "bfloat16", False, True, False)], tmp_path)
    assert [row["kernel"] for row in rows] == ["attend", "by_queries", "by_keys", "attend"]
    for row in rows:
        assert row["products"] == "wgmma", row
        # 0 with Triton 3.6. Another compiler may differ by some bytes; hundreds would say that tiles are too large.
        assert row["stack"] <= 64, row
        assert row["shared"] <= 227 * 1024, row


def test_it_compiles_for_an_a100(tmp_path: Path) -> None:
    """Its products keep both factors in registers, so tiles of the backward pass are smaller with a bias."""
    cases = [
        (64, "bfloat16", True, False, True),
        (64, "bfloat16", False, False, True),
        (64, "float16", True, True, True),
    ]
    for row in compile_for(80, cases, tmp_path):
        assert row["products"] == "mma", row
        assert row["stack"] <= 64, row  # 8 at most with Triton 3.6; tiles of 64 had up to 4,792
        assert row["shared"] <= 163 * 1024, row
