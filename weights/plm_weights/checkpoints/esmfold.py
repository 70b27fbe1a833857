"""The rows of ESMFold.

The hub's files hold the language model, the authors' do not: it is ESM-2 3B's own, which is fetched with them. Size and
hash of esmfold_3B_v1.pt are those of FastPLMs' manifest; of esmfold_3B_v0.pt, the model of the paper's tables, nobody
stated any.
"""

from dataclasses import replace
from typing import Any

from plm_weights.checkpoints import Checkpoint, File, esm, spellings

_MODELS = "https://dl.fbaipublicfiles.com/fair-esm/models"
(_ESM2,) = (row for row in esm.ROWS if row.name == "esm2-3b")
_CONFIG: dict[str, Any] = {
    "stem": {**(_ESM2.config or {}), "lm_head": False, "pooler": False, "sequence_labels": None, "token_labels": None},
    "blocks": 48,
    "channels": 1024,
    "pair": 128,
    "head_size": 32,
    "pair_head_size": 32,
    "position_bins": 32,
    "passes": 4,
    "confidence_channels": 128,
    "structure": {
        "channels": 384,
        "pair": 128,
        "layers": 8,
        "heads": 12,
        "head_size": 16,
        "query_points": 4,
        "value_points": 8,
        "transitions": 1,
        "angle_channels": 128,
        "angle_blocks": 2,
        "scale": 10.0,
    },
}


def _originals(name: str, size: int | None = None, *sha256: str) -> tuple[File, ...]:
    return (File(f"{name}.pt", size, sha256, f"{_MODELS}/{name}.pt"), *_ESM2.originals)


_V1 = Checkpoint(
    name="esmfold",
    family="esmfold",
    licence="MIT",
    citation="Lin et al. 2023, Science 379, 1123-1130, doi:10.1126/science.ade2574",
    aliases=spellings("esmfold", "facebook/esmfold_v1", "esmfold-v1", "esmfold_3B_v1"),
    note="structures; trained on PDB until 2020-05 and on predicted ones",
    parameters=3_525_037_474,
    config=_CONFIG,
    hub="facebook/esmfold_v1",
    revision="75a3841ee059df2bf4d56688166c8fb459ddd97a",
    files=(
        File(
            "pytorch_model.bin",
            8_442_062_570,
            ("2ee07356b125d1e3e57503c204111fd7323347fc4735d41d3caac57c2a78e116",),
        ),
    ),
    originals=_originals(
        "esmfold_3B_v1", 2_771_653_574, "e9a52579027e77d2d2e0a18218e755821f395730e86624cab9413dc117f5ca62"
    ),
    header="esmfold",
    pairs=False,
)

ROWS: tuple[Checkpoint, ...] = (
    _V1,
    replace(
        _V1,
        name="esmfold-v0",
        aliases=("esmfold_v0", "esmfold_3B_v0"),
        note="the model of the paper's experiments",
        hub=None,
        revision=None,
        files=(),
        originals=_originals("esmfold_3B_v0"),
        preferred="original",
    ),
)
