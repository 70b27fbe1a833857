"""Which implementation serves a call: a Triton kernel where one can run, else plain PyTorch; and which one it was.

A kernel that cannot be compiled or launched here costs one warning; from then on PyTorch does its work.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

T = TypeVar("T")
Backend = Literal["auto", "torch", "triton"]
_BACKENDS = get_args(Backend)

KERNELS: Mapping[str, str] = {
    "gate": "gates",
    "norm": "norms",
    "rotary": "rotary",
    "attention": "attention",
    "attention backward": "attention_backward",
    "global_attention": "global_attention",
    "local_block": "convolution",
    "triangle_attention": "triangle_attention",
    "pair_norm": "triangle_multiplication",
    "triangle_sides": "triangle_multiplication",
    "add_gated": "triangle_multiplication",
    "matmul": "matmul",
}
"""What has a Triton kernel, by name, and the module of ``plm_kernels.gpu`` that holds it."""


_WHEN = {"matmul": "torch (triton in a batch_invariant scope)"}


class KernelWarning(UserWarning):
    """A kernel does not work here, and another, or plain PyTorch, does its work."""


_broken: dict[str, str] = {}
_preferred: ContextVar[Backend] = ContextVar("preferred", default="auto")


@contextmanager
def prefer(backend: Backend) -> Iterator[None]:
    """A scope in which "auto" means this backend, so that a whole network can be run on one of them.

    With "triton" a kernel runs on tensors of any device (on a CPU Triton must interpret) and may fail; what has
    gradients or does not fit a kernel is PyTorch's as ever.

    Raises: ValueError for an unknown backend.
    """
    token = _preferred.set(_known(backend))
    try:
        yield
    finally:
        _preferred.reset(token)


def _known(backend: Backend) -> Backend:
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose 'auto', 'torch' or 'triton'")
    return backend


def preferred() -> Backend:
    """What "auto" means in this scope: itself, unless ``prefer`` was entered."""
    return _preferred.get()


@cache
def triton_available() -> bool:
    """Whether Triton is installed. Nothing is imported for it."""
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):  # a finder that forbids it, or half a module of that name
        return False


def interpreted() -> bool:
    """Whether Triton interprets its kernels in Python, on tensors of any device: slow, and right for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def broken() -> Mapping[str, str]:
    """Kernels that failed in this process, and why."""
    return _broken


def serve(
    name: str,
    x: Tensor,
    backend: Backend,
    kernel: Callable[[], T],
    plain: Callable[[], T],
    fits: Callable[[], bool] = lambda: True,
) -> T:
    """The result of ``kernel`` (Triton) or of ``plain`` (PyTorch), whichever ``backend`` asks for.

    "auto" is Triton for tensors on a CUDA device without gradients, where Triton is installed and this kernel has not
    failed before, or what ``prefer`` says. Inputs for which ``fits`` says no are PyTorch's to compute or to refuse,
    whatever was asked for: a wrong argument is no fault of a kernel. Nobody asks it where PyTorch serves anyway.

    Raises: ValueError for an unknown backend; whatever the kernel raises, if "triton" was asked for by name.
    """
    wanted = _known(backend)
    if wanted == "auto":
        wanted = "torch" if _preferred.get() == "triton" and torch.is_grad_enabled() else _preferred.get()
    if wanted == "torch":
        return plain()
    if wanted == "triton":
        return kernel() if fits() else plain()
    if not x.is_cuda or torch.is_grad_enabled() or name in _broken or not triton_available() or not fits():
        return plain()
    return attempt(name, kernel, plain)


def attempt(name: str, kernel: Callable[[], T], plain: Callable[[], T], told: str | None = None) -> T:
    """``kernel()``; if it fails for another reason than memory, a warning, and ``plain()`` now and from now on.

    ``told``: how the warning begins, where this is no Triton kernel.
    Raises: torch.OutOfMemoryError, also for what Triton's launcher says in a RuntimeError. More shared memory than the
        device has ("out of resource") is another matter: that kernel never runs.
    """
    try:
        return kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail with errors of many classes
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _broken[name] = reason
        told = told or f"the Triton kernel {name!r} does not work here, PyTorch is used"
        warnings.warn(f"{told}: {reason}", KernelWarning, 3)
        return plain()


def picks(device: str = "cuda") -> dict[str, str]:
    """What "auto" means for each kernel on tensors of a device of this type in this process, in words."""
    if (wanted := preferred()) != "auto":
        return dict.fromkeys(KERNELS, f"{wanted} (preferred)")
    if device != "cuda":
        return dict.fromkeys(KERNELS, "torch")
    if not triton_available():
        return dict.fromkeys(KERNELS, "torch (Triton is not installed)")
    return {name: f"torch ({_broken[name]})" if name in _broken else _WHEN.get(name, "triton") for name in KERNELS}
