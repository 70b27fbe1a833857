"""On which device and in which dtype a network is kept."""

from dataclasses import dataclass

import torch

from plm.families import Family
from plm.processor import bfloat16_unit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
EIGHT_BIT = "int8"  # not what is computed in: linear weights are kept in 8 bits, and all else is bfloat16
MIXED = "float32-bfloat16"  # kept in float32, as is all else; linear layers of the blocks and attention in bfloat16
MIXED_NAMES = (MIXED, "fp32-bf16")
NAMES = (*DTYPES, *MIXED_NAMES, EIGHT_BIT)


@dataclass(frozen=True)
class Precision:
    """What was asked for, in torch's terms: the dtype of a network, and how its linear layers differ from that."""

    dtype: torch.dtype
    products: torch.dtype | None = None  # in what those of the blocks multiply
    eight_bit: bool = False  # those beside the heads are kept in 8 bits

    @property
    def name(self) -> str:
        """What users call it."""
        return EIGHT_BIT if self.eight_bit else MIXED if self.products else str(self.dtype).removeprefix("torch.")


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
    """What "auto" (or None) means on ``device``, or the dtype that was asked for.

    Raises: ValueError for an unknown one.
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(
            f"dtype {dtype!r} is unknown; choose 'auto', {', '.join(map(repr, NAMES))} or a torch.dtype of these"
        )
    return chosen


def choose_precision(dtype: str | torch.dtype | None, device: torch.device) -> Precision:
    """``choose_dtype``, and what the names mean that stand for more than a dtype."""
    if dtype in MIXED_NAMES:
        return Precision(torch.float32, products=torch.bfloat16)
    if dtype in (EIGHT_BIT, torch.int8):
        return Precision(torch.bfloat16, eight_bit=True)
    return Precision(choose_dtype(dtype, device))


def choose_stored(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype in which weights are to be written. Raises: ValueError for an unknown one, or a way of computing."""
    if dtype in (*MIXED_NAMES, EIGHT_BIT, torch.int8):
        names = ", ".join(map(repr, DTYPES))
        raise ValueError(f"dtype {dtype!r} is how a model computes, and no file is in it; choose one of {names}")
    return choose_dtype(dtype, torch.device("cpu"))


def fast_dtypes(device: torch.device) -> tuple[str, ...]:
    """Names that ``load`` takes, the fastest first, up to float32: what is behind it is not worth its error there.

    "auto" does not go by it on a CPU: it is float32, whatever is fastest.
    """
    if device.type == "cpu":
        return ("bfloat16", MIXED, "float32") if bfloat16_unit() else ("float32",)
    if device.type == "cuda":
        half = torch.cuda.get_device_capability(device) >= (8, 0)  # before Ampere bfloat16 was emulated
        return ("bfloat16", MIXED, "float32") if half else ("float16", "float32")
    return ("float32",)
