"""What this CPU is good at, and on how many threads it works."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import ESM2, Plm

import plm
from plm import placement, processor
from plm.loading import SpeedNotice

FLAGS = {
    "AMX": "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile",
    "AVX512-BF16": "flags : fpu avx2 avx512f avx512_bf16",
    None: "flags : fpu avx2 avx512f avx512_vnni",
}
Machine = Callable[[str, str], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Another processor, with these lines in /proc/cpuinfo, and a torch that does not tell what it has."""

    def become(kind: str, lines: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{lines}\n")
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr("platform.machine", lambda: kind)
        for function, _ in processor.UNITS.values():
            monkeypatch.delattr(torch.cpu, function, raising=False)

    return become


@pytest.mark.parametrize("unit", FLAGS)
def test_where_torch_does_not_tell(unit: str | None, machine: Machine) -> None:
    machine("x86_64", FLAGS[unit])
    assert processor.bfloat16_unit() == unit


@pytest.mark.parametrize("unit", FLAGS)
def test_what_torch_tells_counts(unit: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the flags say: the system may not let a program use its tiles."""
    machine("x86_64", FLAGS["AMX" if unit is None else None])
    for name, (function, _) in processor.UNITS.items():
        told = unit is not None and list(processor.UNITS).index(name) >= list(processor.UNITS).index(unit)
        monkeypatch.setattr(torch.cpu, function, lambda told=told: told, raising=False)
    assert processor.bfloat16_unit() == unit


@pytest.mark.parametrize(("kind", "flags", "built", "unit"), [
    ("aarch64", "Features : fp asimd bf16", True, "ARM BF16"),
    ("aarch64", "Features : fp asimd bf16", False, None),
    ("aarch64", "Features : fp asimd", True, None),
    ("arm64", "", True, None),  # macOS
])  # fmt: skip
def test_arm(
    kind: str, flags: str, built: bool, unit: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(kind, flags)
    monkeypatch.setattr(processor, "_onednn_takes_bfloat16", lambda: built)
    assert processor.bfloat16_unit() == unit


def test_without_files_of_linux(machine: Machine, tmp_path: Path) -> None:
    machine("x86_64", "")
    assert processor.bfloat16_unit() is None
    (tmp_path / "cpuinfo").unlink()
    assert processor.cpu_flags() == frozenset() and processor.bfloat16_unit() is None


def test_this_machine() -> None:
    """The two ways agree, where there are both."""
    if processor.cpu_flags() and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        told = processor.bfloat16_unit()
        assert told is None or any(flag in processor.cpu_flags() for _, flag in processor.UNITS.values())
    assert isinstance(processor._onednn_takes_bfloat16(), bool)


def test_the_fastest_comes_first(machine: Machine) -> None:
    machine("x86_64", FLAGS["AMX"])
    assert placement.fast_dtypes(torch.device("cpu")) == ("bfloat16", "float32-bfloat16", "float32")
    machine("x86_64", FLAGS[None])
    assert placement.fast_dtypes(torch.device("cpu")) == ("float32",)
    assert placement.fast_dtypes(torch.device("mps")) == ("float32",)


@pytest.mark.parametrize(
    ("capability", "names"), [((9, 0), ("bfloat16", "float32-bfloat16", "float32")), ((7, 5), ("float16", "float32"))]
)
def test_of_a_gpu(capability: tuple[int, int], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert placement.fast_dtypes(torch.device("cuda")) == names


@pytest.mark.parametrize("unit", FLAGS)
def test_the_doctor_tells(unit: str | None, run: Plm, machine: Machine) -> None:
    machine("x86_64", FLAGS[unit])
    line = next(line for line in run("doctor").out.splitlines() if line.startswith("cpu dtypes"))
    assert "float32 packed by oneDNN" in line or "not packed" in line
    if unit is None:
        assert "no instructions for it, so slower than float32; fastest: float32" in line
    else:
        assert f": {unit}; fastest: bfloat16, then float32-bfloat16, then float32" in line


@pytest.mark.parametrize("dtype", ["bfloat16", "float32-bfloat16", torch.bfloat16])
def test_what_is_slower_than_float32_is_told(dtype: str | torch.dtype, machine: Machine, run: Plm) -> None:
    machine("x86_64", FLAGS[None])
    saved = "" if dtype == "float32-bfloat16" else "; bfloat16 halves memory"
    with pytest.warns(SpeedNotice, match=f"no instructions for bfloat16: float32 is the faster dtype here{saved}$"):
        plm.load(ESM2, dtype=dtype)
    if isinstance(dtype, str):
        pooled = ("embed", "MKT", "-m", ESM2, "--pool", "mean", "--dtype", dtype)
        assert run(*pooled).err.count("Note: this CPU has no instructions for bfloat16") == 1
        assert "Note" not in run(*pooled, "--quiet").err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in ("float32", "auto", "int8"):
            plm.load(ESM2, dtype=other)
        machine("x86_64", FLAGS["AMX"])
        plm.load(ESM2, dtype=dtype)


# ------------------------------------------------------------------------------------------------ threads


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with plm.threads(2):
        assert torch.get_num_threads() == 2
        with plm.threads(3):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 2
        with plm.threads(None):
            assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), plm.threads(2):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("count", [0, -1, 1025, 100_000, True, "4", 2.5])
def test_no_such_number_of_threads(count: int) -> None:
    """Regression: 100,000 ended the process."""
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="threads must be at least 1"), plm.threads(count):
        pass
    assert torch.get_num_threads() == before


def test_as_a_decorator() -> None:
    @plm.threads(2)
    def work() -> int:
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert work() == work() == 2 and torch.get_num_threads() == before


@pytest.mark.parametrize("verb", ["embed", "score", "variants", "verify"])
def test_threads_of_a_command(verb: str, run: Plm, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there while the model works, and gone behind the command, also behind one that fails."""
    before, seen = torch.get_num_threads(), []
    inner = plm.models.esm.ESM.embed_tokens

    def watched(*arguments: object) -> object:
        seen.append(torch.get_num_threads())
        return inner(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("plm.models.esm.ESM.embed_tokens", watched)
    ends = {"embed": ("--pool", "mean"), "score": (), "variants": ("--scan",), "verify": ()}[verb]
    source = ("plm-mini",) if verb == "verify" else ("MKT", "-m", ESM2)
    assert run(verb, *source, *ends, "--threads", "2").code == 0
    assert set(seen) == {2} and torch.get_num_threads() == before
    seen.clear()
    assert run(verb, *source, *ends).code == 0 and set(seen) == {before}
    assert run(verb, *source, *ends, "--threads", "0").code == 2
    assert run(verb, *source, *ends, "--threads", "100000").code == 2

    def broken(*arguments: object) -> object:
        raise MemoryError(f"with {torch.get_num_threads()} threads")

    monkeypatch.setattr("plm.models.esm.ESM.embed_tokens", broken)
    code, _, err = run(verb, *source, *ends, "--threads", "2")
    assert code == 6 and "with 2 threads" in err and torch.get_num_threads() == before
