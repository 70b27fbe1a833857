"""How much memory is free, so that what would not fit is refused before it is begun."""

from pathlib import Path

import torch

_GROUPS = (  # of a container: what it may use, and what it uses
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        found += [1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"]
    for limit, used in _GROUPS:
        if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
            found.append(max(0, int(text) - int(used.read_text())))
    return min(found, default=None)


def gigabytes(count: int) -> str:
    """``1.6 GB``, or ``12 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6)):,} MB"
