"""Checkpoint files in, checkpoint files out: names, shapes and dtypes before data, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.numpy_pickles import NAMES, START, ArrayFile, dump
from plm_weights.pickles import LEGACY_MAGIC, StoredTensor, TorchFile
from plm_weights.saved_model import Bundle
from plm_weights.strangers import LONGEST_HEAD, stranger

SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TensorSource(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name. Each access reads the file, so take a tensor once and let it go.

    ``meta`` gives names, shapes and dtypes without reading data. ``extras`` is what else the file holds: the
    ``__metadata__`` of safetensors, the non-tensor part of a pickle (``n_annotations`` of ProteinBERT's), or the names
    of a SavedModel's variables that hold text. Tensors of safetensors and torch files are views of private memory maps:
    what is written into them does not reach the file.
    """

    meta: dict[str, Tensor] = field(repr=False)
    extras: Mapping[str, object] = field(repr=False)
    files: tuple[Path, ...]
    read: Callable[[str], Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.meta:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


def open_tensors(path: str | Path) -> TensorSource:
    """The tensors of a safetensors or ``torch.save`` file of any name, or of the shards of an ``.index.json``; of
    ProteinBERT's pickle of numpy arrays of any name, or of the ``.index`` of a Keras SavedModel or checkpoint.

    Of a pickle, the tensors are those of its ``"model"`` (fair-esm, fairseq) if it has one, else those at its top.
    ProteinBERT's are called "000", "001" and so on.

    Raises: CheckpointError if a file is missing, torn, foreign or hostile.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not there (or not a file); give a checkpoint file")
    with path.open("rb") as file:
        head = file.read(LONGEST_HEAD)
    if told := stranger(path, head):
        raise CheckpointError(f"{told}.")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".index":
        return _open_bundle(path)
    if head[8:9] == b"{":  # its header follows 8 bytes of length
        return _open_safetensors(path)
    return _open_arrays(path) if _holds_arrays(head) else _open_pickle(path)


def _holds_arrays(head: bytes) -> bool:
    """Whether a file that begins so is a pickle of ProteinBERT's, or one of numpy's that somebody took for it."""
    torchs = head.startswith(b"PK") or LEGACY_MAGIC.to_bytes(10, "little") in head[:32]
    return bool(START.match(head)) or (not torchs and bool(NAMES.search(head)))


def read_fair_esm(path: str | Path) -> TensorSource:
    """``open_tensors``, joined with the ``<stem>-contact-regression.pt`` beside the file where there is one."""
    path = Path(path)
    regression = _regression_beside(path)
    model = open_tensors(path)
    if not regression.is_file():
        return model
    head = open_tensors(regression)
    if twice := sorted(model.meta.keys() & head.meta.keys()):
        raise CheckpointError(f"{', '.join(twice)}: both in {path} and in {regression}; remove one of the two")
    return TensorSource(
        meta=model.meta | head.meta,
        extras=model.extras,
        files=model.files + head.files,
        read=lambda name: head[name] if name in head.meta else model[name],
    )


def _regression_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-contact-regression.pt")


def _open_safetensors(path: Path) -> TensorSource:
    try:
        handle = safe_open(path, framework="pt")
        with path.open("rb") as file:  # the library has checked the header, but lets a repeated name pass
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_without_repeats)
        extras = header.pop("__metadata__", {})
        meta = {}
        for name, entry in header.items():
            dtype = getattr(torch, SAFETENSORS_DTYPES.get(entry["dtype"], ""), None)
            if dtype is None:
                raise ValueError(f"{name} has dtype {entry['dtype']}, which this torch does not know")
            meta[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is torn or not a safetensors file: {error}. Fetch it again.") from error
    return TensorSource(meta, extras, (path,), handle.get_tensor)


def _open_pickle(path: Path) -> TensorSource:
    file = TorchFile(path)
    if not isinstance(file.root, dict):
        raise CheckpointError(f"{path} holds a {type(file.root).__name__}, not a dict of tensors")
    extras = dict(file.root)
    body: dict[object, object] = extras
    if isinstance(model := extras.get("model"), dict) and any(isinstance(t, StoredTensor) for t in model.values()):
        del extras["model"]
        body = model
    stored = {name: tensor for name, tensor in body.items() if isinstance(tensor, StoredTensor)}
    if body is extras:
        extras = {name: value for name, value in extras.items() if name not in stored}
    elif others := body.keys() - stored.keys():
        raise CheckpointError(f"{path}: its model holds things that are not tensors: {sorted(map(str, others))}")
    if not stored:
        raise CheckpointError(f"{path} has no tensors at its top or under 'model', only {sorted(map(str, extras))}")
    if nameless := [name for name in stored if not isinstance(name, str)]:
        raise CheckpointError(f"{path} has tensors under keys that are not names: {nameless[:5]}")
    tensors = {str(name): tensor for name, tensor in stored.items()}
    meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    named = {str(name): value for name, value in extras.items()}
    return TensorSource(meta, named, (path,), lambda name: file.read(tensors[name]))


def _open_arrays(path: Path) -> TensorSource:
    file = ArrayFile(path)
    arrays = {f"{place:03d}": array for place, array in enumerate(file.arrays)}
    meta = {name: torch.empty(array.shape, device="meta") for name, array in arrays.items()}
    return TensorSource(meta, {"n_annotations": file.annotations}, (path,), lambda name: file.read(arrays[name]))


def _open_bundle(path: Path) -> TensorSource:
    bundle = Bundle(path)
    meta = {
        name: torch.empty(variable.shape, dtype=variable.dtype, device="meta")
        for name, variable in bundle.variables.items()
    }
    return TensorSource(meta, dict.fromkeys(bundle.texts), (path, *bundle.shards), bundle.read)


def _open_shards(path: Path) -> TensorSource:
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
        places = index["weight_map"]
        if not all(isinstance(shard, str) for shard in places.values()):
            raise TypeError("its weight_map does not map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a shard index: {error}") from error

    faults: list[str] = []
    shards: dict[str, TensorSource] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard or shard.endswith(".index.json"):
            faults.append(f"{shard!r}: not the name of a checkpoint file in the folder of the index")
            continue
        try:
            shards[shard] = open_tensors(path.with_name(shard))
        except CheckpointError as error:
            faults.append(str(error))
    indexed = {(name, shard) for name, shard in places.items() if shard in shards}
    held = {(name, shard) for shard, source in shards.items() for name in source}
    faults += [f"{name}: the index says it is in {shard}, which does not have it" for name, shard in indexed - held]
    faults += [f"{name}: in {shard}, but the index does not say so" for name, shard in held - indexed]
    if faults:
        advice = "Get the shards and their index again from one revision."
        raise CheckpointError("\n  ".join([f"{path} and its shards disagree:", *sorted(faults)]) + f"\n{advice}")
    return TensorSource(
        meta={name: shards[shard].meta[name] for name, shard in places.items()},
        extras={name: value for source in shards.values() for name, value in source.extras.items()},
        files=(path, *(file for source in shards.values() for file in source.files)),
        read=lambda name: shards[places[name]][name],
    )


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = sorted({name for name, _ in pairs if [key for key, _ in pairs].count(name) > 1})
        raise ValueError(f"{', '.join(repeated)} described more than once")
    return result


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    beside: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write a safetensors file, and small files ``beside`` it by name: either all are whole or none is there.

    A tensor with two names is written twice.

    Raises: OSError naming the files.
    """
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        separate[name] = whole.clone() if whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())

    def save(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(separate, temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors makes files that nobody but their owner can read

    _write(Path(path), save, beside or {})


def write_torch(
    path: str | Path, tensors: Mapping[str, Tensor], beside: Mapping[str, str | bytes] | None = None
) -> None:
    """Write a ``torch.save`` file, and small files ``beside`` it by name: either all are whole or none is there.

    A tensor with two names is written once, under both.

    Raises: OSError naming the files.
    """
    content = {name: tensor.detach() for name, tensor in tensors.items()}
    _write(Path(path), lambda temporary: _save(content, temporary), beside or {})


def write_proteinbert(
    path: str | Path, tensors: Mapping[str, Tensor], annotations: int, beside: Mapping[str, str | bytes] | None = None
) -> None:
    """Write ProteinBERT's pickle, which its loader reads, and small files ``beside`` it by name: all or nothing.

    ``tensors`` are called "000", "001" and so on, as ``open_tensors`` calls them; no state of an optimizer is written.

    Raises: CheckpointError if one is not float32. OSError naming the files.
    """
    if others := sorted({str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"}):
        told, advice = ", ".join(others).replace("torch.", ""), "leave out dtype, or choose dtype='float32'"
        raise CheckpointError(f"{path}: ProteinBERT's pickle holds float32, and these weights are {told}: {advice}")
    arrays = [tensors[name] for name in sorted(tensors, key=int)]

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            dump(file, annotations, arrays)

    _write(Path(path), save, beside or {})


def _write(path: Path, save: Callable[[Path], None], beside: Mapping[str, str | bytes]) -> None:
    with _replacing(*map(path.with_name, beside), path) as temporaries:
        for content, temporary in zip(beside.values(), temporaries[:-1], strict=True):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        save(temporaries[-1])


def write_fair_esm(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors with fair-esm's names as its loader wants them: the model, and its contact regression beside it.

    ``config`` has the keywords of our ESM config. Either both files are whole or none is there. A tensor with two names
    stays one: fair-esm clears the ``<mask>`` row of the embedding, and with it that of the head.

    Raises: ValueError where fair-esm could not load the result: it reads the architecture and whether there is a
    contact regression off the file's name, and fixes some numbers (fair-esm 2.0.0, esm/pretrained.py, esm/model/).
    OSError naming the files.
    """
    path = Path(path)
    beside = _regression_beside(path)
    rotary = config["learned_positions"] is None
    head = {name: tensor.detach() for name, tensor in tensors.items() if name.startswith("contact_head.")}
    body = {name: tensor.detach() for name, tensor in tensors.items() if name not in head}
    faults = {
        "the name must end in .pt": path.suffix != ".pt",
        "the name must start with esm2 exactly when positions are rotary": path.stem.startswith("esm2") != rotary,
        "the name must not contain esm1v, as the model has a contact head": "esm1v" in path.stem and bool(head),
        "ESM-2 must have feed_forward = 4 * channels": rotary and config["feed_forward"] != 4 * config["channels"],
        "norm_eps must be 1e-5": config["norm_eps"] != 1e-5,
        f"{beside.name} must not be there, as the model has no contact head": beside.exists() and not head,
    }
    if any(faults.values()):
        raise ValueError(f"{path}: fair-esm could not load it: {'; '.join(why for why, bad in faults.items() if bad)}")

    arguments = argparse.Namespace(
        encoder_layers=config["layers"],
        encoder_embed_dim=config["channels"],
        encoder_ffn_embed_dim=config["feed_forward"],
        encoder_attention_heads=config["heads"],
        token_dropout=config["token_dropout"],
    )
    whole: dict[str, object]
    if rotary:
        whole = {"args": None, "cfg": {"model": arguments}, "model": body}
    else:
        arguments.arch = "roberta_large"
        arguments.max_positions = config["learned_positions"] - 2  # the table starts at padding_idx + 1 = 2
        whole = {"args": arguments, "model": body}
    contents = {beside: {"model": head}, path: whole} if head else {path: whole}
    with _replacing(*contents) as temporaries:
        for content, temporary in zip(contents.values(), temporaries, strict=True):
            _save(content, temporary)


def _save(content: object, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a full disk, while it handles the system's own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


@contextmanager
def _replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary neighbours that take the places of ``paths`` in this order, once all of them are on the disk."""
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{', '.join(map(str, paths))} could not be written: {error}") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
