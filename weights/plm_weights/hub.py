"""Checkpoints of the hub, which lie where huggingface_hub keeps them.

``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they always do.
"""

import json
import logging
import re
from pathlib import Path

from plm_weights.checkpoints import Checkpoint, File
from plm_weights.download import is_offline, verify
from plm_weights.errors import CheckpointError, DownloadError
from plm_weights.saved_model import data_files

_LOG = logging.getLogger(__name__)
_COMPANIONS = (
    "config.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# In order of preference. An index lists the shards of a set.
_VARIABLES = "variables/variables.index"  # of a Keras SavedModel
_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("weights.pkl", _VARIABLES),
)
# What belongs to those whose names begin alike.
_SHARDS = {
    "model": ("model-*-of-*.safetensors",),
    "pytorch_model": ("pytorch_model-*-of-*.bin",),
    "weights": (),
    "variables": ("saved_model.pb", "variables/variables.data-*-of-*"),
}
_ADVICE = {
    "GatedRepoError": "Accept its terms on the hub and set HF_TOKEN.",
    "RepositoryNotFoundError": "Look at the spelling; for a private repository set HF_TOKEN.",
    "RevisionNotFoundError": "Look at the revision.",
}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of the first complete set of weights in a folder in hub form, its index first; empty if there is none.

    Raises: CheckpointError if an index is unreadable or names a file outside the folder.
    """
    for first in (folder / name for name in _WEIGHTS):
        if first.is_file():
            listed = {".json": _shards, ".index": data_files}.get(first.suffix)
            files = (first, *(listed(first) if listed else ()))
            if all(file.is_file() for file in files):
                return files
    return ()


def cached(hub: str, revision: str, cache_dir: Path | None = None) -> Path | None:
    """The snapshot of a repository in the cache, if there is one with a complete set of weights."""
    from huggingface_hub import try_to_load_from_cache

    for known in ("config.json", _VARIABLES):
        file = try_to_load_from_cache(hub, known, cache_dir=cache_dir, revision=revision)
        if isinstance(file, str) and weight_files(folder := Path(file).parents[known.count("/")]):
            return folder
    return None


def from_hub(row: Checkpoint, revision: str | None, offline: bool, cache_dir: Path | None) -> Path:
    """The folder of a snapshot, downloaded unless it is here, verified. Arguments and errors as those of ``fetch``."""
    from huggingface_hub import constants, snapshot_download

    if row.hub is None:
        raise DownloadError(f"{row.name} is not on the hub: use the original form.")
    wanted = revision or row.revision or "main"
    known = {file.name: file for file in row.files} if wanted == row.revision else {}
    where = f"{row.hub}@{wanted}"
    folder = cached(row.hub, wanted, cache_dir)
    if folder is None and is_offline(offline):
        raise DownloadError(
            f"{where} is not in {cache_dir or constants.HF_HUB_CACHE} and the network is switched off (offline, "
            f"HF_HUB_OFFLINE). With the network, run: hf download {row.hub} --revision {wanted}"
        )
    # A branch may have moved, a commit cannot.
    if not is_offline(offline) and not (folder and re.fullmatch("[0-9a-f]{40}", wanted)):
        for kind, shards in _SHARDS.items():
            names = [name for name in _WEIGHTS if name.startswith(kind)]
            try:
                folder = Path(
                    snapshot_download(
                        row.hub,
                        revision=wanted,
                        cache_dir=cache_dir,
                        allow_patterns=[*_COMPANIONS, *names, *shards],
                    )
                )
            except Exception as error:  # which errors it raises differs between its releases
                reason = str(error).partition("\n")[0]
                advice = _ADVICE.get(type(error).__name__, "Look at the connection; HF_ENDPOINT chooses a mirror.")
                raise DownloadError(f"{where} could not be downloaded: {reason}. {advice}") from error
            if weight_files(folder):
                break
        else:
            raise DownloadError(f"{where} has no complete set of weights: none of {', '.join(_WEIGHTS)}.")
        if not known:
            _LOG.warning("%s: no hashes are on record for this revision; its files are taken as they came.", where)
    assert folder is not None
    for path in (*(folder / name for name in _COMPANIONS), *weight_files(folder)):
        file = known.get(path.name, File(path.name))
        if path.is_file():
            verify(path, file.size, file.sha256)
    return folder


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}): delete it and run again.") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(map(str, outside))}.")
    return tuple(index.with_name(name) for name in names)
