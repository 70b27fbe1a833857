"""Checkpoints that were published as a tar archive: only their known files are unpacked, flat, and only if all is well.

A member's name never becomes a path: a wanted file is written under its own bare name. An archive with a member that
would leave the folder, or that is a link or a device, is refused as a whole, wanted or not.
"""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from plm_weights.errors import CheckpointError

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
WANTED = (CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *WEIGHTS)
LONGEST_READ = 2**20  # bytes; tar files are read in pieces of 16 kB, and names longer than this are no names
MOST_MEMBERS = 10_000  # tarfile remembers them all
_GZIP, _TAR, _TAR_AT = b"\x1f\x8b", b"ustar", 257
# What a torn archive (gzip says EOFError) or a hostile header makes of the modules below: a date or a number out of
# range, names that follow each other without end.
ERRORS = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError),
    *(ValueError, OverflowError, RecursionError),
)


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, or compressed by gzip, by what it starts with."""
    with path.open("rb") as file:
        head = file.read(_TAR_AT + len(_TAR))
    return head[:2] == _GZIP or head[_TAR_AT:] == _TAR


def unpacked(archive: Path, cache: Path) -> Path:
    """The folder within ``cache`` that holds the files of ``archive``, which is unpacked there once.

    Raises: as ``unpack``.
    """
    state = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache / f"{archive.name.partition('.')[0]}-{key}"
    if not any((folder / name).is_file() for name in WEIGHTS):
        unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path, wanted: Collection[str] = WANTED) -> tuple[Path, ...]:
    """Write the ``wanted`` files of ``archive`` into ``folder``, the weights last; other files in it are passed over.

    Nothing appears in ``folder`` before the archive has been read to its end, checksum included. What an interrupted
    run left behind is replaced by the next. Several processes may call it at once.

    Returns: the files written.
    Raises: CheckpointError naming the archive and the reason: it is torn, no archive, has none of the weights, a member
    that is not a plain file or folder or that would leave the folder (the error names it), two of the same name, or
    claims more bytes than the disk has free.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    part = folder.with_name(f"{folder.name}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            names = _extract(archive, part, wanted)
            folder.mkdir(exist_ok=True)
            for name in names:
                (part / name).replace(folder / name)
        except ERRORS as error:
            raise CheckpointError(
                f"{archive} cannot be unpacked: {error}. If it may be torn, fetch it again."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return tuple(folder / name for name in names)


def _extract(archive: Path, folder: Path, wanted: Collection[str]) -> list[str]:
    """The wanted members as files of ``folder``; their names, the weights last."""
    found: list[str] = []
    place = -1
    with archive.open("rb") as file, _Bounded(_plain(file)) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for count, member in enumerate(tar):
            if member.offset <= place or count == MOST_MEMBERS:
                raise ValueError(f"its members have no end (after {count:,}, at {member.name!r})")
            place = member.offset
            _refuse(member, folder)
            name = PurePosixPath(member.name).name
            if not member.isfile() or name not in wanted:
                continue
            if name in found:
                raise ValueError(f"it has two files {name}, of which {member.name!r} is the second")
            tar.extract(member.replace(name=name, deep=False), folder, filter="data")
            with (folder / name).open("rb+") as written:
                os.fsync(written.fileno())
            found.append(name)
        stream.read(LONGEST_READ)  # the zeros behind the last member, and gzip's checksum
        if stream.read(1):
            raise ValueError(f"more than {LONGEST_READ:,} bytes follow its last member")
    if not set(WEIGHTS) & set(found):
        raise ValueError(f"it has no {' and no '.join(WEIGHTS)}")
    return sorted(found, key=lambda name: name in WEIGHTS)


def _refuse(member: tarfile.TarInfo, folder: Path) -> None:
    """Raises: ValueError, or tarfile's own FilterError where the name leaves the folder."""
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"its member {member.name!r} is a link or a device, which no checkpoint needs")
    if member.name.startswith("/"):  # of which the filter would only cut off the slash
        raise ValueError(f"its member {member.name!r} has an absolute name")
    tarfile.data_filter(member, str(folder))
    # A member that is passed over has to be decompressed, so its claim counts as well.
    free = shutil.disk_usage(folder).free
    if not 0 <= member.size <= free:
        raise ValueError(
            f"its member {member.name!r} claims {member.size:,} bytes, {folder.parent} has {free:,} left: make room"
        )


def _plain(file: BinaryIO) -> io.RawIOBase:
    """The tar archive in a file that may be compressed."""
    compressed = file.read(len(_GZIP)) == _GZIP
    file.seek(0)
    return cast(io.RawIOBase, gzip.GzipFile(fileobj=file) if compressed else file)


class _Bounded(io.BufferedReader):
    """A stream that refuses to be read in pieces so large that only a hostile header asks for them, at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST_READ:
            raise ValueError(f"one of its headers claims to be {size or 0:,} bytes long")
        return super().read(size)
