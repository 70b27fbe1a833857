"""On which device and in which dtype a network is kept."""

import torch

from plm.families import Family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
EIGHT_BIT = "int8"  # not what is computed in: linear weights are kept in 8 bits, and all else is bfloat16


def kept_in(family: Family, name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of a network that computes in ``dtype``."""

    def among(modules: frozenset[str]) -> bool:
        return any(f"{name}.".startswith(f"{module}.") for module in modules)

    if among(family.always_float32):
        return torch.float32
    if among(family.float32_at_least):
        return torch.promote_types(dtype, torch.float32)
    half = stored.itemsize == 2 and dtype == torch.float32
    return stored if half and among(family.halves) else dtype


def choose_device(device: str | torch.device | None) -> torch.device:
    """What "auto" (or None) means here, or the device that was asked for.

    Raises: ValueError if this machine or this torch does not have it.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used: {reason}. Choose 'auto', 'cpu', 'cuda' or 'mps'."
        ) from None
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """What "auto" (or None) means on ``device``, or the dtype that was asked for."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(
            f"dtype {dtype!r} is unknown; choose 'auto', {', '.join(map(repr, (*DTYPES, EIGHT_BIT)))} or a torch.dtype "
            "of these"
        )
    return chosen
