"""Where the numbers come from, and what this machine can do at most."""

import inspect
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch import Tensor

from on_device.job import Job
from on_device.timing import seconds

PACKAGES = ("torch", "triton", "transformers", "fair-esm", "safetensors", "einops", "numpy", "click", "pytest")
SMI = (
    "name,driver_version,vbios_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,"
    "temperature.gpu,memory.used,memory.total,clocks_event_reasons.active"
)


def installed() -> dict[str, str]:
    """Versions, or "missing"."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def smi() -> dict[str, str]:
    """Clocks and reasons for throttling as the driver tells them; nothing is set."""
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"not usable ({type(error).__name__})"}
    return dict(zip(SMI.split(","), (x.strip() for x in told.splitlines()[0].split(",")), strict=False))


def varlen_signature() -> str:
    """What torch's own FlashAttention for packed sequences takes here; its arguments differ between versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "missing"
    return ", ".join(inspect.signature(varlen_attn).parameters)


def run(job: Job) -> None:
    job.tell("machine", "packages", **installed())
    job.tell("machine", "python", version=platform.python_version(), system=platform.platform())
    job.tell("machine", "varlen_attn", takes=varlen_signature())
    if job.on_gpu:
        if not torch.cuda.is_available():
            job.tell("check", "a CUDA device", ok=False, error="torch finds none")
            return
        about = torch.cuda.get_device_properties(0)
        job.tell(
            "machine", "device", name=about.name, gib=about.total_memory / 2**30, units=about.multi_processor_count,
            capability=f"{about.major}.{about.minor}", cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
            tf32_products=torch.backends.cuda.matmul.allow_tf32, tf32_convolutions=torch.backends.cudnn.allow_tf32,
        )  # fmt: skip
        job.tell("machine", "clocks before", **smi())
    for name, work in ceilings(job).items():
        job.attempt("ceiling", name, work)
    if job.on_gpu:
        job.tell("machine", "clocks after", **smi())


def ceilings(job: Job) -> dict[str, Callable[[], None]]:
    size = 128 if job.quick else 8192

    def products(dtype: torch.dtype, size: int = size) -> None:
        """On random numbers: zeros are faster than anything real."""
        a, b = (torch.randn(size, size, device=job.device).to(dtype) for _ in range(2))
        taken = seconds(lambda: a @ b, 10)
        told = str(dtype).removeprefix("torch.")
        job.tell("ceiling", f"product, {told}", size=size, per_second=2 * size**3 / median(taken), unit="FLOP/s")

    def copies() -> None:
        a = torch.empty((1 << 20) if job.quick else (4 << 30), dtype=torch.uint8, device=job.device).random_()
        b = torch.empty_like(a)
        taken = seconds(lambda: b.copy_(a), 10)
        job.tell("ceiling", "copy", per_second=2 * a.numel() / median(taken), unit="B/s, read and written")

    def launches() -> None:
        x = torch.zeros(256, device=job.device)

        def many() -> None:
            for _ in range(100):
                x.add_(1)

        eager = median(seconds(many, 10)) / 100
        found = {"eager_us": 1e6 * eager}
        if job.on_gpu:
            found["graph_us"] = 1e6 * median(seconds(recorded(many), 10)) / 100
        job.tell("ceiling", "launch", **found)

    return {
        "product, bfloat16": lambda: products(torch.bfloat16),
        "product, float32": lambda: products(torch.float32, size // 2),
        "copy": copies,
        "launch": launches,
    }


def recorded(work: Callable[[], object]) -> Callable[[], Tensor | None]:
    """The same work as a CUDA graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
