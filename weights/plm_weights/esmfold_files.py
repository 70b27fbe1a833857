"""The two files of an ESMFold as its authors published it: the folding trunk, and the ESM-2 that it stands on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from plm_weights import esm, esmfold
from plm_weights.errors import CheckpointError
from plm_weights.read import TensorSource, open_tensors, read_fair_esm

# What its configuration calls the language model, and fair-esm's file of it (facebookresearch/esm@2b36991,
# esm/esmfold/v1/esmfold.py)
STEMS = {
    "esm2_8M": "esm2_t6_8M_UR50D",
    "esm2_35M": "esm2_t12_35M_UR50D",
    "esm2_150M": "esm2_t30_150M_UR50D",
    "esm2_650M": "esm2_t33_650M_UR50D",
    "esm2_3B": "esm2_t36_3B_UR50D",
    "esm2_15B": "esm2_t48_15B_UR50D",
}
URL = "https://dl.fbaipublicfiles.com/fair-esm/models"
PREFIXES = ("encoder.sentence_encoder.", "encoder.")  # which fair-esm takes off when it loads


def joined(tensors: TensorSource) -> TensorSource:
    """The authors' file with the language model's tensors behind ``esm.``, and its configuration as ``stem`` of the
    extras, from the file of fair-esm beside it (and its contact regression, where there is one).

    Its head for masked tokens is left out of the configuration: folding has no use for it.

    Raises: CheckpointError if there is no such file, or several, or if it is no ESM-2.
    """
    (path,) = tensors.files
    stem = read_fair_esm(find_stem(path, tensors))
    try:
        config = esm.fair_config(stem.extras, stem.meta)
        if config["learned_positions"] is not None:
            raise CheckpointError("it is an ESM-1, and ESMFold stands on an ESM-2")
    except CheckpointError as error:
        raise CheckpointError(f"{stem.files[0]}, taken for the language model of {path.name}: {error}") from None
    names = {f"esm.{without_prefix(name)}": name for name in stem}
    return TensorSource(
        meta=tensors.meta | {name: stem.meta[theirs] for name, theirs in names.items()},
        extras={**tensors.extras, "stem": {**config, "lm_head": False}},
        files=tensors.files + stem.files,
        read=lambda name: stem[names[name]] if name in names else tensors[name],
    )


def trunk_among(files: Sequence[Path]) -> Path | None:
    """The one of several ``.pt`` files that holds a folding trunk, if it is one; the others are what it stands on."""
    if len(files) < 2 or any(file.suffix != ".pt" for file in files):
        return None
    trunks = []
    for file in files:
        with suppress(CheckpointError):  # another file may be whatever it is
            trunks += [file] if esmfold.recognise(open_tensors(file).meta) == "original" else []
    return trunks[0] if len(trunks) == 1 else None


def find_stem(path: Path, tensors: TensorSource) -> Path:
    """The file beside an authors' file that holds its language model: by the published name, or the only other one."""
    cfg = tensors.extras.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else None
    kind = model.get("esm_type") if isinstance(model, dict) else None
    name = f"{STEMS.get(str(kind), STEMS['esm2_3B'])}.pt"
    if (published := path.with_name(name)).is_file():
        return published
    others = [
        file for file in sorted(path.parent.glob("*.pt"))
        if file != path and not file.stem.endswith("-contact-regression")
    ]  # fmt: skip
    if len(others) == 1:
        return others[0]
    told = f"several other files ({', '.join(file.name for file in others)})" if others else "no other .pt file"
    raise CheckpointError(
        f"{path} holds a folding trunk without its language model, which its authors published in a file of its own; "
        f"beside it there is no {name}, and {told}. Put {name} there ({URL}/{name})."
    )


def without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
