"""``plm doctor``: what this machine has, and what plm makes of it.

People ask the doctor when something is broken, so a probe that fails is a line of the answer.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

import plm
from plm.cli import options
from plm.cli.table import table

EXTRAS = ("h5py", "pyarrow", "matplotlib", "triton")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1
GRAPHED = ("esm2-8m", "esm2-35m", "esm2-150m", "esm2-650m", "igbert", "ankh-base", "progen2-small")  # to name a few
OVERHEAD = 1.3  # a batch and the program itself, over the weights; an estimate


@click.command()
@options.as_json
def doctor(as_json: bool) -> int:
    """Report what this machine has.

    Versions, processor, devices, memory, which models fit into it, and caches.
    """
    found = {name: attempt(probe) for name, probe in PROBES.items()}
    click.echo(json.dumps(found, indent=1) if as_json else table([(name, in_words(found[name])) for name in found]))
    return 0


def attempt(probe: Callable[[], object]) -> object:
    """What the probe finds, or why it finds nothing."""
    try:
        return probe()
    except Exception as error:
        return f"unknown: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def in_words(found: object) -> str:
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, list | tuple):
        return ", ".join(map(str, found)) or "none"
    return str(found)


def torch_version() -> str:
    import torch

    return torch.__version__


def extras() -> list[str]:
    """Optional libraries, with their versions."""
    lines = []
    for name in EXTRAS:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    return lines


def cpu() -> str:
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch uses {level}"


def cpu_features() -> list[str]:
    """Of the instructions that matter for speed, those which this processor has (Linux)."""
    from plm.processor import CPUINFO, cpu_flags

    if not (flags := cpu_flags()):
        raise OSError(f"{CPUINFO} tells nothing")
    return [flag for flag in CPU_FLAGS if flag in flags]


def cpu_dtypes() -> str:
    """How each dtype is multiplied in on this processor, and which are the fastest."""
    import torch

    from plm.placement import fast_dtypes
    from plm.processor import bfloat16_unit
    from plm_kernels import packing_available

    def packed(dtype: torch.dtype) -> str:
        return "packed by oneDNN" if packing_available(dtype) else "as torch multiplies (not packed)"

    unit = bfloat16_unit() or "no instructions for it, so slower than float32"
    fastest = ", then ".join(fast_dtypes(torch.device("cpu")))
    how = f"float32 {packed(torch.float32)}; bfloat16 {packed(torch.bfloat16)}: {unit}"
    return f"{how}; fastest: {fastest}; auto: float32"


def packed_weights() -> bool:
    from plm_kernels import packing_available

    return packing_available()


def varlen() -> bool:
    from plm_kernels.packed_attention import varlen_available

    return varlen_available()


def cuda() -> list[str]:
    import torch

    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{device.name} ({gigabytes(device.total_memory)})" for device in devices]


def cuda_dtypes() -> str:
    import torch

    from plm.placement import fast_dtypes

    if not torch.cuda.is_available():
        return "none: no CUDA device"
    return f"fastest: {', then '.join(fast_dtypes(torch.device('cuda')))}; auto: bfloat16"


def kernels() -> list[str] | str:
    """What does the work of each kernel on CUDA."""
    import torch

    from plm_kernels import attention_choice, picks

    if not torch.cuda.is_available():
        return "none: no CUDA device"
    found = picks()
    biased, plain = (attention_choice("cuda", torch.bfloat16, 64, bias=bias) for bias in (True, False))
    if plain != biased:
        found["attention"] = f"{found['attention']} with a bias or in float32, else torch's {plain}"
    return [f"{name}: {pick}" for name, pick in found.items()]


def encoder_graphs() -> str:
    """Up to how many tokens a batch is recorded and repeated."""
    import torch

    from plm.encoder_graphs import most_tokens
    from plm.previews import preview

    if not torch.cuda.is_available():
        return "none: no CUDA device"
    limits = {name: most_tokens(model.net) for name in GRAPHED if (model := preview(name))}
    return "batches up to " + ", ".join(f"{limit:,} tokens ({name})" for name, limit in limits.items() if limit)


def mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def memory_limit() -> int:
    """Bytes that a process may use: what the machine has, or less in a container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, CGROUP_LIMITS):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def fitting(memory: int, bytes_per_number: int) -> list[str]:
    """Models of the registry whose weights fit into so many bytes; one that states no size is small."""
    from plm.loading import available

    return [row.name for row in available() if (row.parameters or 0) * bytes_per_number * OVERHEAD <= memory]


def fitting_cpu() -> list[str]:
    return fitting(memory_limit(), 8 if packed_weights() else 4)  # float32, which lies there packed as well


def fitting_cuda() -> list[str]:
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return fitting(max(sizes), 2) if sizes else []


def hub_cache() -> str:
    from huggingface_hub import constants

    return folder(Path(constants.HF_HUB_CACHE))


def own_cache() -> str:
    from plm_weights.fetch import home

    return folder(home())


def torch_cache() -> str:
    import torch

    return folder(Path(torch.hub.get_dir()))


def folder(path: Path) -> str:
    """A folder, which may not be there yet, and the room on its disk."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    writable = "" if os.access(there, os.W_OK) else ", not writable"
    return f"{path} ({gigabytes(shutil.disk_usage(there).free)} free{writable})"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


PROBES: dict[str, Callable[[], object]] = {
    "plm": lambda: plm.__version__,
    "python": platform.python_version,
    "platform": platform.platform,
    "torch": torch_version,
    "huggingface-hub": lambda: version("huggingface-hub"),
    "extras": extras,
    "cpu": cpu,
    "cpu features": cpu_features,
    "packed weights (oneDNN)": packed_weights,
    "cpu dtypes": cpu_dtypes,
    "cuda": cuda,
    "cuda dtypes": cuda_dtypes,
    "varlen attention in torch": varlen,
    "kernels on the gpu": kernels,
    "encoder graphs": encoder_graphs,
    "mps": mps,
    "memory": lambda: gigabytes(memory_limit()),
    "fit on the cpu (float32)": fitting_cpu,
    "fit on the gpu (bfloat16)": fitting_cuda,
    "hub cache": hub_cache,
    "plm cache": own_cache,
    "torch hub cache": torch_cache,
}
