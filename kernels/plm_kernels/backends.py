"""Which implementation serves a call: a Triton kernel where one can run, else plain PyTorch; and which one it was.

A kernel that cannot be compiled or launched here costs one warning; from then on PyTorch does its work.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Backend = Literal["auto", "torch", "triton"]

KERNELS: Mapping[str, str] = {
    "gate": "gates",
    "norm": "norms",
    "rotary": "rotary",
    "attention": "attention",
    "attention backward": "attention_backward",
}
"""What has a Triton kernel, by name, and the module of ``plm_kernels.gpu`` that holds it."""


class KernelWarning(UserWarning):
    """A Triton kernel does not work here, and PyTorch does its work."""


_broken: dict[str, str] = {}


@cache
def triton_available() -> bool:
    """Whether Triton is installed. Nothing is imported for it."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets its kernels in Python, on tensors of any device: slow, and right for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def broken() -> Mapping[str, str]:
    """Kernels that failed in this process, and why."""
    return _broken


def serve(name: str, x: Tensor, backend: Backend, kernel: Callable[[], T], plain: Callable[[], T]) -> T:
    """The result of ``kernel`` (Triton) or of ``plain`` (PyTorch), whichever ``backend`` asks for.

    "auto" is Triton for tensors on a CUDA device without gradients, where Triton is installed and this kernel has not
    failed before; what it must not do, because its inputs do not fit it, is decided before.

    Raises: ValueError for an unknown backend; whatever the kernel raises, if "triton" was asked for by name.
    """
    if backend == "torch":
        return plain()
    if backend == "triton":
        return kernel()
    if backend != "auto":
        raise ValueError(f"backend {backend!r} is unknown; choose 'auto', 'torch' or 'triton'")
    if not x.is_cuda or torch.is_grad_enabled() or name in _broken or not triton_available():
        return plain()
    return attempt(name, kernel, plain)


def attempt(name: str, kernel: Callable[[], T], plain: Callable[[], T]) -> T:
    """``kernel()``; if it fails for another reason than memory, a warning, and ``plain()`` now and from now on."""
    try:
        return kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail with errors of many classes
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _broken[name] = reason
        warnings.warn(f"the Triton kernel {name!r} does not work here, PyTorch is used: {reason}", KernelWarning, 3)
        return plain()


def picks() -> dict[str, str]:
    """What "auto" means for each kernel on CUDA tensors in this process, in words."""
    if not triton_available():
        return dict.fromkeys(KERNELS, "torch (Triton is not installed)")
    return {name: f"torch ({_broken[name]})" if name in _broken else "triton" for name in KERNELS}
