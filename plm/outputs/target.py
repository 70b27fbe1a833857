"""Where outputs go: a file, a folder or stdout, each appearing whole or not at all.

Everything is written to a temporary neighbour first. `commit` makes it durable and gives it the wanted name in one
step; `discard` removes it. An existing target is untouched until `commit`.
"""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARKER = "provenance.json"  # lies in every folder of ours


class OutputError(ValueError):
    """An output that cannot be written or read. The message says which, why and what to do."""


class LayoutError(OutputError):
    """A layout that there is not, or that cannot hold what is asked for: a mistake in the call, not of the disk."""


class FileTarget:
    """One file, written at `temporary` and renamed to `path`."""

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool, size: int) -> None:
        """Refuse what would fail after hours: an existing target, a missing or closed folder, too little space.

        `size` is the least number of bytes that will be written.
        """
        self.path = Path(os.path.realpath(path))  # so that a symbolic link is written through, not replaced
        folder = self.path.parent
        self.temporary = folder / f".plm-{secrets.token_hex(6)}.part"
        with explained(self):
            if not folder.is_dir():
                raise OutputError(f"cannot write {self.path}: {folder} is not a folder; create it first")
            with suppress(FileNotFoundError):
                self.path.stat()  # unlike exists(), also finds a name that is too long
                self.check_existing(overwrite)
        try:
            tempfile.TemporaryFile(dir=folder).close()  # tells more than the folder's mode: /proc, say, claims to take
        except OSError as error:
            reason = f"{folder} takes no new files ({error.strerror}); choose another folder"
            raise OutputError(f"cannot write {self.path}: {reason}") from error
        if (free := shutil.disk_usage(folder).free) < size:
            wanted = f"{size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            raise OutputError(f"cannot write {self.path}: {wanted}; pool, store float16, or choose another disk")

    def check_existing(self, overwrite: bool) -> None:
        if not self.path.is_file():
            raise OutputError(f"cannot write {self.path}: it is not an ordinary file; choose another name")
        if not overwrite:
            raise OutputError(f"{self.path} exists already; choose another name or pass overwrite=True (--overwrite)")

    def commit(self) -> None:
        synchronise(self.temporary)
        self.temporary.replace(self.path)

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)


class FolderTarget(FileTarget):
    """One folder of ``.pt`` files and a `MARKER`. Only a folder of just these is ever replaced: model weights are
    ``.pt`` files too."""

    def check_existing(self, overwrite: bool) -> None:
        if not self.path.is_dir():
            raise OutputError(f"cannot write {self.path}: it is a file, and esm-pt needs a folder; choose another name")
        names = {file.name for file in self.path.iterdir()}
        if names and not overwrite:
            raise OutputError(f"{self.path} is not empty; choose another folder or pass overwrite=True (--overwrite)")
        if names and (MARKER not in names or not all(name.endswith(".pt") for name in names - {MARKER})):
            raise OutputError(f"{self.path} was not written by plm or holds other files; choose another folder")

    def commit(self) -> None:
        for file in self.temporary.iterdir():
            synchronise(file)
        if not self.path.exists():
            self.temporary.replace(self.path)
            return
        # No portable call swaps two folders: for a moment the old one stands aside, and comes back if that fails.
        aside = self.temporary.with_suffix(".old")
        self.path.replace(aside)
        try:
            self.temporary.replace(self.path)
        except BaseException:
            aside.replace(self.path)
            raise
        shutil.rmtree(aside)

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


class StandardOutput:
    """stdout, which gets the finished bytes at once, so that a failed run prints none."""

    path = Path("-")

    def __init__(self) -> None:
        self.temporary = Path(tempfile.gettempdir()) / f"plm-{secrets.token_hex(6)}.part"

    def commit(self) -> None:
        with self.temporary.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)


Target = FileTarget | StandardOutput


def synchronise(path: Path) -> None:
    """Put a file on the disk itself: a rename may otherwise survive a power cut that its data did not."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def explained(target: Target) -> Iterator[None]:
    """Turn the system's errors while writing into one that names the target. A closed pipe stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OutputError(f"cannot write {target.path}: {reason}; nothing was left behind") from error
