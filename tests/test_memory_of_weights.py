"""What a loaded model takes of memory: pages of its file, which the system may drop, and as little as can be besides.

A checkpoint of 235 MB, of which 99 % are linear weights. Own memory is what no file backs; the rest is counted with the
files, whose pages were never written to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_read_maps import measured

from plm.conversion import to_plm, to_transformers
from plm.models.esm import ESM, Config

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by files only on Linux")
WORK = """
import plm
def work(path):
    model = plm.load(path, dtype="{dtype}")
    {then}
    return model
"""
PREDICT = 'plm.embed(model, "MKTAYIAK", pool="mean")'
# Shares of the file: own memory once loaded, and once something was predicted. In the hub's form queries, keys and
# values are three tensors, a quarter of a layer, which become one. Weights laid out by oneDNN are a copy, in bfloat16
# of half the size; what is no linear layer, and what torch keeps for itself, stays below 5 %.
CASES = [
    ("plm", "float32", "", 0.0),
    ("plm", "float32", PREDICT, 1.0),
    ("plm", "float32-bfloat16", PREDICT, 0.5),
    ("plm", "bfloat16", "", 0.5),
    ("hub", "float32", "", 0.25),
    ("hub", "float32-bfloat16", PREDICT, 0.75),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name, layers, channels in (("small", 1, 40), ("large", 3, 1280)):
        config = Config(layers, channels, 20, 4 * channels, None, False, True, 1e-5)
        with torch.device("meta"):
            net = ESM(config)
        state = {name: torch.zeros(x.shape) for name, x in net.state_dict().items()}
        to_plm(state, config, folder / "plm" / name)
        to_transformers(state, config, folder / "hub" / name)
    return folder


@pytest.mark.parametrize(("form", "dtype", "then", "share"), CASES)
def test_memory(form: str, dtype: str, then: str, share: float, folders: Path) -> None:
    size = (folders / form / "large" / "model.safetensors").stat().st_size
    assert 2.3e8 < size < 2.5e8
    small, large = (folders / form / name for name in ("small", "large"))
    found = measured(WORK.format(dtype=dtype, then=then or "pass"), small, large)
    assert share * 0.95 - 0.01 < found["own"] / size < share + 0.05, found
    if dtype != "bfloat16":  # parameters are the file's own pages, but for those that were joined
        assert found["files"] > (0.7 if form == "hub" else 0.95) * size
    # At no time is there more than what stays and one tensor besides: the widest has 26 MB, 11 % of all.
    assert found["most"] < found["own"] + found["files"] + 0.25 * size
