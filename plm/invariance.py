"""Whether a model can promise the bits of a sequence, whatever stands beside it in a batch."""

import torch

from plm_kernels import RelativeBias, packing_available
from plm_kernels.backends import triton_available
from plm_kernels.packed_attention import invariant_backend

HALVES = (torch.float16, torch.bfloat16)


def check_promise(family: str, heads: int, head_size: int, device: torch.device, dtype: torch.dtype | str) -> None:
    """Raises: ValueError with the reason why a model of this kind, so loaded, could not keep it."""
    if reason := why_not(family, device, dtype):
        raise ValueError(f"batch_invariant cannot be promised: {reason}")
    if device.type == "cuda":
        assert isinstance(dtype, torch.dtype)
        q = torch.empty(0, heads, head_size, dtype=dtype, device=device)
        invariant_backend(q, RelativeBias(q.new_zeros(1, 1)) if family == "t5" else None)


def why_not(family: str, device: torch.device, dtype: torch.dtype | str) -> str | None:
    """The reason, without a look at attention; None if there is none. ``dtype`` may be a name that is no dtype's."""
    name = str(dtype).removeprefix("torch.")
    if family == "esmfold":
        return "an ESMFold folds every protein alone, so it changes nothing there: leave it out"
    if family == "proteinbert":
        return "a ProteinBERT convolves and attends with kernels that see the whole batch; leave it out"
    if device.type == "cpu":
        if dtype != torch.float32:
            reason = f"on a CPU only float32 keeps it; in {name} the order of sums depends on the number of rows"
            return f"{reason}; use dtype='float32'"
        return None if packing_available() else "this torch lacks oneDNN's packed products"
    if device.type != "cuda":
        return f"there are no kernels for {device.type}; use CUDA, or float32 on a CPU"
    if dtype not in (torch.float32, *HALVES):
        return f"on CUDA it takes float32, bfloat16 or float16, not {name}"
    return None if triton_available() else "its products on CUDA need Triton: pip install triton"
