"""A folder with a few files per protein and an index, filled one protein at a time and gone on with after a break.

Every file appears whole or not at all, and holds a fingerprint of all that decides what is in it: who finds the wanted
fingerprint in a file need not make it again.

    pandas.read_csv("out/fold.csv")                     # id, file, length, chains, mean_plddt, ptm, ...
"""

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

from plm.outputs.target import FileTarget, OutputError, explained
from plm.outputs.writer import safe_names

COLUMNS = ("id", "file", "length", "chains", "mean_plddt", "ptm", "seconds", "fingerprint")
INDEX = "fold.csv"
UNFIT = re.compile(r'[<>:"|?*\s]')  # what some file systems do not take in names, and shells take for something else
NAME_BYTES = 200  # file systems take 255, suffix and temporary names included
# How a file of each kind ends: one that was cut off by other hands than ours is not whole.
ENDS = {".pdb": b"END\n", ".cif": b"#\n", ".json": b"}\n", ".png": b"IEND\xaeB`\x82"}
# Where a file of each kind has its fingerprint.
PLACES = {
    ".pdb": rb"^REMARK   6 fingerprint (\w+)\n",
    ".cif": rb"\n_plm\.fingerprint (\w+)\n",
    ".json": rb'"fingerprint": "(\w+)"',
    ".png": rb'"fingerprint": "(\w+)"',
}
PEEK = 65_536  # bytes at either end of a file, where fingerprints are
PAUSE = 5.0  # seconds between two times that the index is written, for it grows with every protein
SHOWN = 5

Row = Mapping[str, object]


class ProteinFolder:
    """Files are named after ids, as far as these can be file names; ``names`` has an entry for each id."""

    def __init__(self, path: str | os.PathLike[str], ids: Sequence[str], *, overwrite: bool) -> None:
        """Refuse what would fail after hours. Nothing is made before ``filling``.

        Raises: OutputError if the folder is none, cannot be made, or holds a `fold.csv` that is none of ours.
        """
        self.path, self.overwrite = Path(path), overwrite
        self.names = dict(zip(ids, safe_names([UNFIT.sub("_", id) for id in ids], NAME_BYTES), strict=True))
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(
                f"cannot write {self.path}: it is a file, and proteins need a folder; choose another name"
            )
        # Raises where no file can be made.
        FileTarget(self.path / INDEX if self.path.exists() else self.path, overwrite=True, size=0)
        self._rows = self._read_index()
        self._unwritten, self._next_write = False, 0.0
        self._found: dict[Path, tuple[str, bool]] = {}

    def renamed(self) -> list[str]:
        """``id -> name`` for every id that is no file name, or that another one hides where case does not count."""
        return [f"{id} -> {name}" for id, name in self.names.items() if id != name]

    def file(self, id: str, suffix: str) -> Path:
        return self.path / f"{self.names[id]}{suffix}"

    def has(self, id: str, suffix: str, fingerprint: str) -> bool:
        """Whether the file is there and whole, and has the fingerprint in it."""
        return self._look(id, suffix) == (fingerprint, True)

    def stale(self, id: str, fingerprint: str) -> list[Path]:
        """The files of a protein, of every kind, that hold another fingerprint."""
        paths = {suffix: self.file(id, suffix) for suffix in ENDS}
        return [path for suffix, path in paths.items() if self._look(id, suffix)[0] not in ("", fingerprint)]

    def remove_stale(self, id: str, fingerprint: str) -> None:
        """Remove these, so that no two runs are mixed. What holds no fingerprint is none of ours, and stays."""
        for path in self.stale(id, fingerprint):
            path.unlink(missing_ok=True)
            del self._found[path]
            if self.row(id).get("file") == path.name:
                del self._rows[self.names[id]]
                self._unwritten = True

    def _look(self, id: str, suffix: str) -> tuple[str, bool]:
        """The fingerprint in a file ("" if there is none), and whether it is whole. Each file is read once."""
        path = self.file(id, suffix)
        if path not in self._found:
            head = end = b""
            if path.is_file():
                with path.open("rb") as file:
                    head = file.read(PEEK)
                    file.seek(max(0, path.stat().st_size - PEEK))
                    end = file.read()
            found = re.search(PLACES[suffix], head) or re.search(PLACES[suffix], end)
            self._found[path] = found[1].decode() if found else "", end.endswith(ENDS[suffix])
        return self._found[path]

    def check_free(self, wanted: Iterable[tuple[str, str, str]]) -> None:
        """Raises: OutputError naming the files of ``wanted`` (id, suffix, fingerprint) that hold something else, and
        those beside them that other runs have left."""
        if self.overwrite:
            return
        found: dict[str, None] = {}  # a set in order
        for id, suffix, fingerprint in wanted:
            if self.file(id, suffix).exists() and not self.has(id, suffix, fingerprint):
                found[self.file(id, suffix).name] = None
            found.update((path.name, None) for path in self.stale(id, fingerprint))
        if odd := list(found):
            more = f" and {len(odd) - SHOWN:,} more" if len(odd) > SHOWN else ""
            raise OutputError(
                f"{self.path} holds {', '.join(odd[:SHOWN])}{more}, made from another sequence, model or setting, or "
                "not by plm fold; choose another folder or pass --overwrite"
            )

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Make the folder, and leave it with an index of all that was added, whatever happens."""
        self.path.mkdir(exist_ok=True)
        try:
            yield
        except BaseException:
            with suppress(OutputError):  # a full disk was told of already
                self.write_index()
            raise
        self.write_index()

    def write(self, id: str, suffix: str, content: bytes) -> None:
        """A file of a protein, in the place of any other."""
        self._found.pop(self.file(id, suffix), None)
        write_whole(self.file(id, suffix), content)

    def draw(self, id: str, suffix: str, draw: Callable[[Path], None]) -> None:
        """The same for what ``draw`` writes to a path."""
        self._found.pop(self.file(id, suffix), None)
        fill_whole(self.file(id, suffix), draw)

    def row(self, id: str) -> dict[str, str]:
        """What the index says of a protein; nothing if it says nothing."""
        return self._rows.get(self.names[id], {})

    def add_row(self, row: Row) -> None:
        """Say of a protein what `COLUMNS` name. The index is written anew at once, or after `PAUSE`, or at the end."""
        self._rows[self.names[str(row["id"])]] = {name: str(row[name]) for name in COLUMNS}
        self._unwritten = True
        if monotonic() >= self._next_write:
            self.write_index()

    def write_index(self) -> None:
        """In input order; then what earlier runs with other inputs have left here. Nothing if it is as it was."""
        if not self._unwritten:
            return
        names = list(dict.fromkeys([*self.names.values(), *self._rows]))
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows[name] for name in names if name in self._rows)
        write_whole(self.path / INDEX, text.getvalue().encode())
        self._unwritten, self._next_write = False, monotonic() + PAUSE

    def _read_index(self) -> dict[str, dict[str, str]]:
        path = self.path / INDEX
        if not path.exists():
            return {}
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) == COLUMNS:
                rows = [row for row in table if row["file"] and (self.path / row["file"]).is_file()]
                return {Path(row["file"]).stem: row for row in rows}
        if not self.overwrite:
            raise OutputError(f"{path} was not written by plm fold; choose another folder or pass --overwrite")
        return {}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears when it is complete. Raises: OutputError."""
    fill_whole(path, lambda temporary: temporary.write_bytes(content), len(content))


def fill_whole(path: Path, fill: Callable[[Path], object], size: int = 0) -> None:
    """The same for what ``fill`` writes to a path."""
    target = FileTarget(path, overwrite=True, size=size)
    try:
        with explained(target):
            fill(target.temporary)
            target.commit()
    finally:
        target.discard()
