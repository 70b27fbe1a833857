"""Where a model came from, and what a user should know about it."""

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from plm_weights.fetch import original_path
from plm_weights.registry import Checkpoint

UNKNOWN = "unknown: see where the files came from"


@dataclass(frozen=True)
class WeightFile:
    """One file that weights came from; its hash is computed when asked for."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Origin:
    """Where a model came from: what to cite, and what to write into every output."""

    name: str
    family: str
    source: str
    revision: str | None
    files: tuple[WeightFile, ...] = field(repr=False)
    licence: str
    citation: str

    def sha256(self) -> dict[str, str]:
        """Hash of every weight file, by name."""
        return {file.name: file.sha256 for file in self.files}


class Notice(UserWarning):
    """Something that a user should know about what was loaded."""


class LicenceNotice(Notice):
    """These weights may not be used for every purpose."""


class SpeedNotice(Notice):
    """Another choice is faster on this machine."""


class VocabularyNotice(Notice):
    """Nobody told which token each id of this checkpoint is."""


def origin(
    path: Path, row: Checkpoint | None, family: str, revision: str | None, files: tuple[WeightFile, ...]
) -> Origin:
    """Where the files at ``path`` came from, as `locate` found them."""
    if row is None:
        return Origin(local_name(path), family, str(path), revision, files, UNKNOWN, UNKNOWN)
    if row.originals and path == original_path(row):  # the authors' own, which have no revisions
        source, revision = row.archive or row.originals[0].url, None
    else:  # a snapshot of the hub is a folder named by its commit
        source = row.hub
        revision = path.name if re.fullmatch("[0-9a-f]{40}", path.name) else revision or row.revision
    return Origin(row.name, family, source or row.name, revision, files, row.licence, row.citation)


def local_name(path: Path) -> str:
    """The name of a folder, or that of a file, unless it is what every such file is called."""
    if path.is_dir():
        whole = path.resolve()
        of_keras = whole.name == "variables" and (whole / "variables.index").is_file()
        return whole.parent.name if of_keras else whole.name
    if path.name == "variables.index":  # of a SavedModel, in its folder of variables
        return path.resolve().parents[1].name
    if path.name.partition(".")[0] in ("model", "pytorch_model", "weights"):
        return path.parent.resolve().name
    return path.stem.removesuffix(".tar")
