"""Brings the files of a checkpoint onto this machine, once, and proves that they are the published ones.

Files of the hub go where huggingface_hub keeps them: ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and
``HF_HUB_OFFLINE`` mean what they always do. The authors' own files are used from torch's hub folder if fair-esm left
them there, and else go to ``originals`` in the folder that `home` names; what was in an archive has a folder of its
own there, and the archive is not kept.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from plm_weights.archives import unpack
from plm_weights.errors import CheckpointError, DownloadError, UnknownModelError
from plm_weights.registry import Checkpoint, File, Form, find

Progress = Callable[[int, int | None], None]
"""Called with the bytes there and the bytes in all, or None where the server does not say."""

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
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARDS = {"model": "model-*-of-*.safetensors", "pytorch_model": "pytorch_model-*-of-*.bin"}
_ADVICE = {
    "GatedRepoError": "Accept its terms on the hub and set HF_TOKEN.",
    "RepositoryNotFoundError": "Look at the spelling; for a private repository set HF_TOKEN.",
    "RevisionNotFoundError": "Look at the revision.",
}
_SEE_HUB = "unknown: see its page on the hub"
_CHUNK = 1 << 20
_SECONDS = 30.0  # without a byte, after which a connection counts as broken


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

    Returns: the folder with ``config.json`` and the weights, or of ESM's original files the ``.pt`` file, beside which
    its contact regression lies.
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
            return _from_hub(row, revision, offline, cache_dir)
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


def home() -> Path:
    """This library's cache: ``PLM_HOME``, else ``plm`` in ``XDG_CACHE_HOME``, else ``~/.cache/plm``."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PLM_HOME") or caches / "plm")


def original_path(row: Checkpoint, cache_dir: Path | None = None) -> Path:
    """Where the authors' own files lie, or would: the ``.pt`` file, or the folder of what was in an archive."""
    if row.archive:
        return (cache_dir or home() / "originals") / row.name
    torch_hub, first = Path(torch.hub.get_dir()) / "checkpoints", row.originals[0].name
    return (cache_dir or (torch_hub if (torch_hub / first).is_file() else home() / "originals")) / first


def is_here(row: Checkpoint) -> bool:
    """Whether a set of its weights lies on this machine; it is verified when it is loaded."""
    from huggingface_hub import try_to_load_from_cache

    if row.folder is not None:
        return bool(weight_files(Path(__file__).with_name(row.folder)))
    if row.archive and weight_files(original_path(row)):
        return True
    config = try_to_load_from_cache(row.hub or "", "config.json", revision=row.revision or "main")
    return isinstance(config, str) and bool(weight_files(Path(config).parent))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of the first complete set of weights in a folder in hub form, its index first; empty if there is none.

    Raises: CheckpointError if an index is unreadable or names a file outside the folder.
    """
    for first in (folder / name for name in _WEIGHTS):
        if first.is_file():
            files = (first, *_shards(first)) if first.suffix == ".json" else (first,)
            if all(file.is_file() for file in files):
                return files
    return ()


def download(file: File, path: Path, *, progress: Progress | None = None, tries: int = 5, pause: float = 1.0) -> None:
    """Downloads ``file.url`` to ``path``, which appears only when it is whole and its hash is right.

    What an interrupted run received stays in ``<path>.part``, and the next one goes on from there. ``tries`` counts
    failures in a row without a new byte, between which it waits ``pause`` seconds, then twice as long, and so on.

    Raises: DownloadError.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    assert file.url is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with WeakFileLock(path.with_name(f"{path.name}.lock")):
        failures = 0
        while not path.exists():  # another process may have finished it while this one waited for the lock
            before = _size(part)
            try:
                digest = _receive(file, part, progress)
            except _Broken as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures >= tries:
                    raise DownloadError(
                        f"{file.url} failed {tries} times, at last with: {error}. Look at the connection and run "
                        f"again: {_size(part):,} bytes are kept in {part}."
                    ) from error
                time.sleep(pause * 2 ** (failures - 1))
                continue
            if file.sha256 and digest not in file.sha256:
                part.unlink()
                if before:  # perhaps only the older piece was bad
                    continue
                raise DownloadError(f"{_mismatch(file.url, digest, file.sha256)} What came was deleted.")
            part.replace(path)
            _remember(path, digest)


class _Broken(Exception):
    """The network failed in a way that another try may mend."""


def _receive(file: File, part: Path, progress: Progress | None) -> str:
    """Appends to ``part`` what it lacks and returns the sha256 of the whole."""
    assert file.url is not None
    done = _size(part)
    try:
        response = urlopen(Request(file.url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=_SECONDS)
    except HTTPError as error:
        if error.code == 416:  # nothing is left to send, or the piece belongs to another file: the hash will tell
            if error.headers.get("Content-Range") == f"bytes */{done}":
                return _sha256(part)
            part.unlink()
            raise _Broken("the piece that lay here was longer than the file") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"HTTP {error.code} {error.reason}") from error
        raise DownloadError(f"{file.url} answered HTTP {error.code} {error.reason}: it may have moved.") from error
    except (OSError, HTTPException) as error:
        raise _Broken(str(error)) from error
    with response:
        resumed = response.status == 206
        done = done if resumed else 0
        length = response.headers.get("Content-Length")
        total = file.size if length is None else done + int(length)
        if file.size not in (None, total):
            raise DownloadError(f"{file.url} has {total:,} bytes, the published file {file.size:,}: it was replaced.")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - done > free:
            raise DownloadError(f"{file.url} needs {total - done:,} bytes, {part.parent} has {free:,} left: make room.")
        digest = hashlib.sha256()
        with part.open("r+b" if resumed else "wb") as out:
            while piece := out.read(_CHUNK) if resumed else b"":
                digest.update(piece)
            while piece := _read(response.read):
                out.write(piece)
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
            out.flush()
            os.fsync(out.fileno())
        if total is not None and done < total:
            raise _Broken(f"the connection closed after {done:,} of {total:,} bytes")
    return digest.hexdigest()


def _read(read: Callable[[int], bytes]) -> bytes:
    try:
        return read(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _Broken(str(error)) from error


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
        if _is_offline(offline):
            raise DownloadError(
                f"{lacking} is missing and the network is switched off (offline, HF_HUB_OFFLINE). "
                f"Run once with the network, or put the file of {row.archive or file.url} there."
            )
        if row.archive:
            _download_archive(row, path, progress)
            break
        download(file, lacking, progress=progress)
    for there, file in files.items():
        _verify(there, file.size, file.sha256)
    return path


def _download_archive(row: Checkpoint, folder: Path, progress: Progress | None) -> None:
    """The row's originals into a folder of their own. A torn archive is not kept, as no hash would find it out."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    archive, names = folder.with_name(f"{row.name}.tar.gz"), [file.name for file in row.originals]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{row.name}.archive.lock")):
        if all((folder / name).is_file() for name in names):  # by another process, while this one waited
            return
        download(File(archive.name, url=row.archive), archive, progress=progress)
        needed, free = sum(file.size or 0 for file in row.originals), shutil.disk_usage(archive.parent).free
        if needed > free:
            raise DownloadError(f"{archive} unpacks to {needed:,} bytes, {free:,} are left: make room and run again.")
        try:
            unpack(archive, folder, names)
        except CheckpointError:
            archive.unlink()
            raise
        archive.unlink()


def _from_hub(row: Checkpoint, revision: str | None, offline: bool, cache_dir: Path | None) -> Path:
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    if row.hub is None:
        raise DownloadError(f"{row.name} is not on the hub: use the original form.")
    wanted = revision or row.revision or "main"
    known = {file.name: file for file in row.files} if wanted == row.revision else {}
    where = f"{row.hub}@{wanted}"
    config = try_to_load_from_cache(row.hub, "config.json", cache_dir=cache_dir, revision=wanted)
    folder = Path(config).parent if isinstance(config, str) else None
    cached = folder is not None and bool(weight_files(folder))
    if not cached and _is_offline(offline):
        raise DownloadError(
            f"{where} is not in {cache_dir or constants.HF_HUB_CACHE} and the network is switched off (offline, "
            f"HF_HUB_OFFLINE). With the network, run: hf download {row.hub} --revision {wanted}"
        )
    # A branch may have moved, a commit cannot.
    if not _is_offline(offline) and not (cached and re.fullmatch("[0-9a-f]{40}", wanted)):
        for kind in _SHARDS:
            names = [name for name in _WEIGHTS if name.startswith(kind)]
            try:
                folder = Path(
                    snapshot_download(
                        row.hub,
                        revision=wanted,
                        cache_dir=cache_dir,
                        allow_patterns=[*_COMPANIONS, *names, _SHARDS[kind]],
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
            _verify(path, file.size, file.sha256)
    return folder


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}): delete it and run again.") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(map(str, outside))}.")
    return [index.with_name(name) for name in names]


def _verify(path: Path, size: int | None, hashes: tuple[str, ...]) -> None:
    """Compares a file with what was published; a file already compared is not read again until it changes.

    The hub's cache names a large file by the sha256 that the hub promised, which serves where the registry knows none.
    """
    real = path.resolve()
    if size is not None and _size(real) != size:
        raise DownloadError(f"{path} has {_size(real):,} bytes, published are {size:,}: delete {real} and run again.")
    hashes = hashes or ((real.name,) if re.fullmatch("[0-9a-f]{64}", real.name) else ())
    if not hashes or any(_stamp(real) == _recalled(sha256) for sha256 in hashes):
        return
    digest = _sha256(real)
    if digest not in hashes:
        raise DownloadError(f"{_mismatch(str(path), digest, hashes)} Delete {real} and run again.")
    _remember(real, digest)


def _stamp(path: Path) -> list[object]:
    """What changes when a file does."""
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def _recalled(sha256: str) -> object:
    with suppress(OSError, ValueError):
        return json.loads((home() / "verified" / f"{sha256}.json").read_text())
    return None


def _remember(path: Path, sha256: str) -> None:
    with suppress(OSError):  # a cache that cannot be written costs only time
        (home() / "verified").mkdir(parents=True, exist_ok=True)
        (home() / "verified" / f"{sha256}.json").write_text(json.dumps(_stamp(path)))


def _mismatch(name: str, digest: str, hashes: tuple[str, ...]) -> str:
    return f"{name} is not the published file: its sha256 is {digest}, not {' or '.join(hashes)}."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_offline(offline: bool) -> bool:
    from huggingface_hub import constants

    return offline or constants.HF_HUB_OFFLINE
