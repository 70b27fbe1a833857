"""The published checkpoints by their names, and the header (names, shapes, dtypes) of each of their files."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from plm_weights.checkpoints import Checkpoint, File, Form, bert, esm, esmfold, progen2, proteinbert, t5
from plm_weights.errors import UnknownModelError

__all__ = ["CHECKPOINTS", "Checkpoint", "File", "Form", "find", "header"]

CHECKPOINTS: tuple[Checkpoint, ...] = (
    *esm.ROWS,
    *t5.ROWS,
    *bert.ROWS,
    *progen2.ROWS,
    *proteinbert.ROWS,
    *esmfold.ROWS,
)

_BY_NAME = {name.casefold(): row for row in CHECKPOINTS for name in (row.name, *row.aliases)}
_HEADERS = Path(__file__).with_name("headers")
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}


def find(name: str) -> Checkpoint:
    """The row of a name or alias, in any case of letters.

    Raises: UnknownModelError, which lists near names.
    """
    if row := _BY_NAME.get(name.casefold()):
        return row
    near = dict.fromkeys(_BY_NAME[key].name for key in difflib.get_close_matches(name.casefold(), _BY_NAME, n=5))
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(row.name for row in CHECKPOINTS)}."
    raise UnknownModelError(
        f"no model is called {name!r}: {hint} A hub id (organisation/name), a folder or a file works as well."
    )


def header(name: str, form: Form = "hub") -> dict[str, Tensor]:
    """Every tensor of a published checkpoint on ``meta``: names, shapes and dtypes without a download.

    The original form of an ESM is what lies under ``"model"`` in the ``.pt`` file, joined with its contact regression
    if any; that of a ProGen2 is ``pytorch_model.bin`` with its causal masks, which the hub's ports have left out; that
    of ProteinBERT is its pickle, the hub's a SavedModel; that of an ESMFold is its trunk's ``.pt`` file alone.

    Raises: ValueError if no header of that form is on file.
    """
    row = find(name)
    if row.header is None:
        raise ValueError(f"{row.name} has no header on file: it ships with the library, so read its folder instead.")
    data = json.loads((_HEADERS / f"{row.header}.json").read_text())
    if form not in data:
        raise ValueError(f"{row.name} was published in the hub's form only: it has no header of the form {form!r}.")
    depths = {"{i}": data["layers"], "{j}": data.get("decoder_layers", 0), "{n}": data.get("blocks", 0)}
    return {
        stored: torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        for dtype, tensors in data[form].items()
        for key, shape in tensors.items()
        for stored in _unfold(key, depths)
    }


def _unfold(key: str, depths: Mapping[str, int]) -> list[str]:
    """A key with a hole stands for one tensor per layer of a stack: ``{i}`` of the encoder, ``{j}`` of the decoder,
    ``{n}`` of a folding trunk."""
    for hole, depth in depths.items():
        if hole in key:
            return [key.replace(hole, str(layer)) for layer in range(depth)]
    return [key]
