"""What this processor is good at, and on how many threads torch uses it."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# What multiplies in bfloat16, by its name: the private function by which torch tells, and the flag of Linux.
UNITS = {
    "AMX": ("_is_amx_tile_supported", "amx_bf16"),
    "AVX512-BF16": ("_is_avx512_bf16_supported", "avx512_bf16"),
}
CPUINFO = Path("/proc/cpuinfo")
MOST_THREADS = 1024  # no machine has more cores, and with very many OpenMP ends the process


def bfloat16_unit() -> str | None:
    """What multiplies in bfloat16 on this CPU: "AMX", "AVX512-BF16", "ARM BF16"; None where nothing does.

    Without one oneDNN widens every number, and float32 is 2.6 times (AVX-512) to 5 times (AVX2) as fast; with
    AVX512-BF16 bfloat16 is 1.9 times as fast as float32 (see bench/RESULTS.md).
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "ARM BF16" if _onednn_takes_bfloat16() and "bf16" in cpu_flags() else None
    for name, (function, flag) in UNITS.items():
        probe = getattr(torch.cpu, function, None)
        if bool(probe()) if probe is not None else flag in cpu_flags():
            return name
    return None


def _onednn_takes_bfloat16() -> bool:
    """Whether this torch was built with kernels for it: where it was not, an ARM's instructions are of no use."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def cpu_flags() -> frozenset[str]:
    """What the processor can do, in the words of Linux; nothing on other systems."""
    if not CPUINFO.exists():
        return frozenset()
    lines = CPUINFO.read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads on the CPU within this scope, and as many as before behind it; None: no change.

    The number is the whole process's, as torch keeps it: what other threads of Python compute meanwhile has it too.

    Raises: ValueError for what is no whole number from 1 to 1024.
    """
    if count is None:
        yield
        return
    if type(count) is not int or not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads must be at least 1 and at most {MOST_THREADS}, a whole number; got {count!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
