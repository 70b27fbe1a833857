"""Brings the files of a checkpoint onto this machine, once, and proves that they are the published ones.

Files of the hub go where huggingface_hub keeps them (see `hub`). The authors' own files are used from where fair-esm or
protein_bert left them (torch's hub folder, ``~/proteinbert_models``), and else go to ``originals`` in the folder that
`home` names; what was in an archive has a folder of its own there, and the archive is not kept.
"""

import logging
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import torch

from plm_weights.archives import unpack
from plm_weights.download import Progress, download, home, is_offline, verify
from plm_weights.errors import CheckpointError, DownloadError, UnknownModelError
from plm_weights.hub import cached, from_hub, weight_files
from plm_weights.registry import Checkpoint, File, Form, find

__all__ = ["Progress", "download", "fetch", "home", "is_here", "original_path", "row_of", "weight_files"]

_LOG = logging.getLogger(__name__)
_SEE_HUB = "unknown: see its page on the hub"


def fetch(
    source: Checkpoint | str,
    *,
    revision: str | None = None,
    offline: bool = False,
    form: Form | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Where the files of a checkpoint lie, after downloading those that are missing.

    ``source`` is a row, a name of the registry or a hub id; ``revision`` defaults to the row's, else to ``main``.
    Without a ``form`` it is the one that the row prefers, or for a ``revision`` the hub's; where that cannot be had,
    files of the other form on this machine take its place, unless a ``revision`` was asked for. Of the hub's files only
    one set of weights is downloaded, safetensors if there is one, and the network is not asked for what lies complete
    in the cache at a commit. ``cache_dir`` replaces the hub's cache, or the folder of original files. ``progress`` is
    for original files; huggingface_hub draws its own.

    Returns: the folder with ``config.json`` and the weights (or with a SavedModel), or of original files of ESM and
    ProteinBERT the ``.pt`` file, beside which its contact regression lies, and the pickle.
    Raises: DownloadError; UnknownModelError if the name is neither in the registry nor of the form organisation/name.
    """
    row = row_of(source) if isinstance(source, str) else source
    if form == "original" and revision is not None:
        raise ValueError(f"original files have no revisions, got {revision!r}: leave it out or use the hub form.")
    if row.folder is not None and form != "original":
        return Path(__file__).parent / row.folder
    first: Form = form or ("hub" if revision is not None else row.preferred)

    def attempt(form: Form, offline: bool, cache_dir: Path | None = None) -> Path:
        if form == "hub":
            return from_hub(row, revision, offline, cache_dir)
        return _from_authors(row, offline, cache_dir, progress)

    try:
        return attempt(first, offline, cache_dir)
    except DownloadError as error:
        with suppress(DownloadError):
            if revision is None and form is None:
                other: Form = "original" if first == "hub" else "hub"
                path = attempt(other, offline=True)
                folder = path if path.is_dir() else path.parent
                _LOG.warning("%s The %s files in %s are used instead.", error, other, folder)
                return path
        raise


def row_of(name: str) -> Checkpoint:
    """The registry's row, or for an unknown hub id one that knows only its address. A hub id means the hub's form.

    Raises: UnknownModelError.
    """
    try:
        row = find(name)
        return replace(row, preferred="hub") if name.casefold() == (row.hub or "").casefold() else row
    except UnknownModelError:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise
        return Checkpoint(name=name, family="unknown", licence=_SEE_HUB, citation=_SEE_HUB, hub=name)


def original_path(row: Checkpoint, cache_dir: Path | None = None) -> Path:
    """Where the authors' own files lie, or would: the first file, or the folder of what was in an archive."""
    if row.archive:
        return (cache_dir or home() / "originals") / row.name
    first = row.originals[0].name
    left = (Path(torch.hub.get_dir()) / "checkpoints", Path("~/proteinbert_models").expanduser())
    there = (folder for folder in left if (folder / first).is_file())
    return (cache_dir or next(there, home() / "originals")) / first


def is_here(row: Checkpoint) -> bool:
    """Whether a set of its weights lies on this machine; it is verified when it is loaded."""
    if row.folder is not None:
        return bool(weight_files(Path(__file__).with_name(row.folder)))
    if row.preferred == "original":
        path = original_path(row)
        files = [path.with_name(file.name) for file in row.originals]
        if weight_files(path) if row.archive else all(file.is_file() for file in files):
            return True
    return row.hub is not None and cached(row.hub, row.revision or "main") is not None


def _from_authors(
    row: Checkpoint, offline: bool, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    if not row.originals:
        raise DownloadError(f"{row.name} has no original files on record: use the hub form.")
    path = original_path(row, cache_dir)
    files = {path / file.name if row.archive else path.with_name(file.name): file for file in row.originals}
    for lacking, file in files.items():
        if lacking.is_file():
            continue
        if is_offline(offline):
            raise DownloadError(
                f"{lacking} is missing and the network is switched off (offline, HF_HUB_OFFLINE). "
                f"Run once with the network, or put the file of {row.archive or file.url} there."
            )
        if row.archive:
            _download_archive(row, path, progress)
            break
        _download_from_any(row, file, lacking, progress)
    for there, file in files.items():
        verify(there, file.size, file.sha256)
    return path


def _download_from_any(row: Checkpoint, file: File, path: Path, progress: Progress | None) -> None:
    """From the first of its addresses that has it; all go on with the same piece."""
    addresses, faults = [file.url or "", *file.mirrors], []
    for address, following in zip(addresses, [*addresses[1:], None], strict=True):
        try:
            download(replace(file, url=address), path, progress=progress)
            return
        except DownloadError as error:
            faults.append(str(error))
            if following:
                _LOG.warning("%s Next is %s.", error, following)
    raise _by_hand(row, file.name, addresses, f"put it into {path.parent} as {path.name}", faults)


def _by_hand(row: Checkpoint, what: str, addresses: list[str], place: str, faults: list[str]) -> DownloadError:
    """What is said where no address has a file: each with its reason, and how to do without the network."""
    hosts = " or ".join(dict.fromkeys(urlsplit(address).netloc for address in addresses))
    head = f"{what} of {row.name} could not be downloaded from {hosts}:"
    return DownloadError("\n  ".join([head, *faults]) + f"\nIf you can get it in another way, {place}.")


def _download_archive(row: Checkpoint, folder: Path, progress: Progress | None) -> None:
    """The row's originals into a folder of their own. A torn archive is not kept, as no hash would find it out."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    archive, names = folder.with_name(f"{row.name}.tar.gz"), [file.name for file in row.originals]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{row.name}.archive.lock")):
        if all((folder / name).is_file() for name in names):  # by another process, while this one waited
            return
        try:
            download(File(archive.name, url=row.archive), archive, progress=progress)
        except DownloadError as error:
            place = f"unpack it and put {', '.join(names)} into {folder}"
            raise _by_hand(row, archive.name, [row.archive or ""], place, [str(error)]) from error
        needed, free = sum(file.size or 0 for file in row.originals), shutil.disk_usage(archive.parent).free
        if needed > free:
            raise DownloadError(f"{archive} unpacks to {needed:,} bytes, {free:,} are left: make room and run again.")
        try:
            unpack(archive, folder, names)
        except CheckpointError:
            archive.unlink()
            raise
        archive.unlink()
