"""How much memory is free, so that what would not fit is refused before it is begun."""

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUPS = (  # of a container: its folder, what it may use, what it uses, and what of that are files read earlier
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device or can be freed at once; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
        return torch.cuda.mem_get_info(device)[0] + kept
    found = []
    if (available := numbers(MEMINFO).get("MemAvailable:")) is not None:
        found.append(1024 * available)
    for folder, limit, used, files in GROUPS:
        most, now = folder / limit, folder / used
        if most.exists() and now.exists() and (text := most.read_text().strip()).isdigit():
            # A checkpoint that was read stays in memory as a file until the memory is wanted for something else.
            taken = int(now.read_text()) - numbers(folder / "memory.stat").get(files, 0)
            found.append(max(0, int(text) - taken))
    return min(found, default=None)


def numbers(path: Path) -> dict[str, int]:
    """A system's file of names and numbers, one to a line; empty where there is none."""
    if not path.exists():
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}


def gigabytes(count: int) -> str:
    """``1.6 GB``, or ``12 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6)):,} MB"
