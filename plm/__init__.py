"""Protein language models in plain PyTorch: load a published checkpoint, get numbers about proteins.

    model = plm.load("esm2-650m")
    plm.embed(model, "MKTVRQERLKSIVRILERSKEPVSG")[0]        # [25, 1280], one row per residue

Public names are imported when first used, so that ``import plm`` costs little more than ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "plm.loading": ("LicenceNotice", "Model", "SpeedNotice", "available", "load"),
    "plm.recording": ("GraphWarning",),
    "plm.processor": ("threads",),
    "plm.packing": ("Packed",),
    "plm.embedding": ("embed",),
    "plm.annotation": ("annotate",),
    "plm.terms": ("Terms", "read_terms"),
    "plm.contact_maps": ("contacts",),
    "plm.folding": ("fold",),
    "plm.generation": ("Piece", "Sample", "generate", "stream"),
    "plm.scoring": ("Score", "score"),
    "plm.structures": ("Structure",),
    "plm.variant_effects": ("variants",),
    "plm.conversion": ("convert",),
    "plm.verification": ("Report", "verify"),
    "plm.sequences": ("InputError",),
    "plm_kernels.backends": ("KernelWarning",),
    "plm_weights.errors": ("CheckpointError", "DownloadError", "KeyMapError", "UnknownModelError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "DownloadError",
    "GraphWarning",
    "InputError",
    "KernelWarning",
    "KeyMapError",
    "LicenceNotice",
    "Model",
    "Packed",
    "Piece",
    "Report",
    "Sample",
    "Score",
    "SpeedNotice",
    "Structure",
    "Terms",
    "UnknownModelError",
    "annotate",
    "available",
    "contacts",
    "convert",
    "embed",
    "fold",
    "generate",
    "load",
    "read_terms",
    "score",
    "stream",
    "threads",
    "variants",
    "verify",
]

if TYPE_CHECKING:
    from plm.annotation import annotate
    from plm.contact_maps import contacts
    from plm.conversion import convert
    from plm.embedding import embed
    from plm.folding import fold
    from plm.generation import Piece, Sample, generate, stream
    from plm.loading import LicenceNotice, Model, SpeedNotice, available, load
    from plm.packing import Packed
    from plm.processor import threads
    from plm.recording import GraphWarning
    from plm.scoring import Score, score
    from plm.sequences import InputError
    from plm.structures import Structure
    from plm.terms import Terms, read_terms
    from plm.variant_effects import variants
    from plm.verification import Report, verify
    from plm_kernels.backends import KernelWarning
    from plm_weights.errors import CheckpointError, DownloadError, KeyMapError, UnknownModelError


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'plm' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
