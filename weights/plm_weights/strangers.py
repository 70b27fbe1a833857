"""Files that are given in place of a checkpoint: what they are, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST_HEAD = 512  # bytes by which all of them are known
LFS = b"version https://git-lfs.github.com/spec"
PAGES = (b"<!doctype html", b"<html")
HDF5 = b"\x89HDF\r\n\x1a\n"


def stranger(path: Path, head: bytes) -> str | None:
    """What a file is that begins with ``head``, if it is no checkpoint but commonly taken for one; else None."""
    if head.startswith(LFS):
        return (
            f"{path} is a pointer of Git LFS, which stands for the file: get the file itself, with `git lfs pull` or "
            "from where it can be downloaded"
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGES):
        return (
            f"{path} is a web page (HTML): its address gave a page in place of the file; find that of the file itself"
        )
    if path.name == "saved_model.pb":
        return f"{path} is the graph of a SavedModel, without its weights: give its folder, {path.parent}"
    if data := re.fullmatch(r"(.*)\.data-[0-9]{5}-of-[0-9]{5}", path.name):
        folder = path.parent.parent if path.parent.name == "variables" else path.parent
        return (
            f"{path} holds the numbers of a SavedModel or of a Keras checkpoint, without their names: give its folder, "
            f"{folder}, or {data[1]}.index beside it"
        )
    if head.startswith(HDF5) or path.suffix == ".keras":
        return (
            f"{path} is not read: Keras' .h5 and .keras files have no place here. Load it with Keras, and save it as a "
            "SavedModel, or pickle (n_annotations, model.get_weights(), None) with protocol=4"
        )
    return None
