"""Published checkpoints: safe reading, two-way key maps, registry and download. Knows no module class."""

from plm_weights.errors import CheckpointError, DownloadError, KeyMapError, UnknownModelError
from plm_weights.keymap import Drop, KeyMap, Row, Tied, check, explain, export_weights, import_weights
from plm_weights.read import (
    TensorSource,
    open_tensors,
    read_fair_esm,
    write_fair_esm,
    write_proteinbert,
    write_safetensors,
    write_torch,
)

__all__ = [
    "CheckpointError",
    "DownloadError",
    "Drop",
    "KeyMap",
    "KeyMapError",
    "Row",
    "TensorSource",
    "Tied",
    "UnknownModelError",
    "check",
    "explain",
    "export_weights",
    "import_weights",
    "open_tensors",
    "read_fair_esm",
    "write_fair_esm",
    "write_proteinbert",
    "write_safetensors",
    "write_torch",
]
