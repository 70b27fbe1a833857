"""How much memory is said to be free: of a machine, of a container, of a GPU."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import plm
from plm import memory, writing
from plm.models.progen2 import Config, ProGen2
from plm.vocabularies import progen2_tokenizer

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\nHugePages_Total:       0\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without containers, and folders in which there may be one of either kind."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    groups = [(tmp_path / f"v{2 - i}", *names) for i, (_, *names) in enumerate(memory.GROUPS)]
    monkeypatch.setattr(memory, "GROUPS", groups)
    return tmp_path


def container(folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_of_a_machine(system: Path) -> None:
    """What is available, not what is free: the rest holds files that can be read again."""
    assert memory.free_memory(CPU) == 9000 * 1024
    (system / "meminfo").write_text("MemTotal:       16000 kB\n")
    assert memory.free_memory(CPU) is None
    (system / "meminfo").unlink()
    assert memory.free_memory(CPU) is None, "a system that does not tell"


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_of_a_container(system: Path, kind: str) -> None:
    """Its limit less what it uses; but for files that were read earlier, a checkpoint for one."""
    if kind == "v2":
        container(system / kind, memory__max="5000000\n", memory__current="4500000\n", memory__stat="anon 9\n")
        stat, line = system / kind / "memory.stat", "anon 500000\ninactive_file 3000000\nactive_file 100\n"
    else:
        container(system / kind, memory__limit_in_bytes="5000000\n", memory__usage_in_bytes="4500000\n")
        stat, line = system / kind / "memory.stat", "inactive_file 7\ntotal_inactive_file 3000000\n"
    assert memory.free_memory(CPU) == 500_000
    stat.write_text(line)
    assert memory.free_memory(CPU) == 3_500_000
    limit = next(path for path in (system / kind).iterdir() if "max" in path.name or "limit" in path.name)
    limit.write_text("99000000\n")
    assert memory.free_memory(CPU) == 9000 * 1024, "the machine has less"
    limit.write_text("max\n")
    assert memory.free_memory(CPU) == 9000 * 1024
    limit.write_text("1000\n")
    assert memory.free_memory(CPU) == 0


def test_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has freed and keeps is used again before more is asked for."""
    told: dict[str, Any] = {"mem_get_info": (7, 80), "memory_reserved": 50, "memory_allocated": 20}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 7 + 30


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 MB"), (1_499_999, "1 MB"), (12_300_000, "12 MB"), (999e6, "999 MB"), (1.55e9, "1.6 GB")]
)
def test_in_words(count: float, text: str) -> None:
    assert memory.gigabytes(int(count)) == text


def test_as_many_texts_at_a_time_as_a_gibibyte_holds() -> None:
    """98,304 bytes are ProGen2-small's keys and values for a token; padding takes little of it."""
    config = Config(32, 32, 12, 1024, 16, 32, 4096, 1024)
    with torch.device("meta"):
        net = ProGen2(config)
    model = plm.Model(net, progen2_tokenizer(), tiny.origin("progen2"))
    tokens = writing.default_max_tokens(model, writing.Settings())
    assert 0.97 * (1 << 30) < tokens * 2 * 12 * 1024 * 4 <= 1 << 30
