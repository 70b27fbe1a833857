"""Downloads of single files, whole or not at all, and the proof that a file is the published one."""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from plm_weights.checkpoints import File
from plm_weights.errors import DownloadError

Progress = Callable[[int, int | None], None]
"""Called with the bytes there and the bytes in all, or None where the server does not say."""

_CHUNK = 1 << 20
_SECONDS = 30.0  # without a byte, after which a connection counts as broken


def home() -> Path:
    """This library's cache: ``PLM_HOME``, else ``plm`` in ``XDG_CACHE_HOME``, else ``~/.cache/plm``."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PLM_HOME") or caches / "plm")


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
                        f"{file.url} failed {tries} times, at last with: {error}. {_run_again(part)}"
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
        if isinstance(reason := getattr(error, "reason", None), socket.gaierror):  # as far from the network: no retry
            told = f"the name of its host, or of a proxy, cannot be resolved ({reason.strerror})"
            raise DownloadError(f"{file.url} is out of reach: {told}. {_run_again(part)}") from error
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


def _run_again(part: Path) -> str:
    kept = f": {_size(part):,} bytes are kept in {part}" if _size(part) else ""
    return f"Look at the connection and run again{kept}."


def _read(read: Callable[[int], bytes]) -> bytes:
    try:
        return read(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _Broken(str(error)) from error


def verify(path: Path, size: int | None, hashes: tuple[str, ...]) -> None:
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


def is_offline(offline: bool) -> bool:
    from huggingface_hub import constants

    return offline or constants.HF_HUB_OFFLINE
