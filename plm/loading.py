"""From a name or a path to a model: find the files, prove the key map on headers, then read the weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from plm.models import esm
from plm.tokens import Tokenizer, esm_tokenizer
from plm_weights import CheckpointError, DownloadError, KeyMap, TensorSource, UnknownModelError, import_weights
from plm_weights import esm as published_esm
from plm_weights.fetch import fetch, weight_files
from plm_weights.read import open_tensors, read_fair_esm
from plm_weights.registry import CHECKPOINTS, Checkpoint, find

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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


@dataclass(frozen=True)
class Model:
    """A network in eval mode with its tokenizer and its origin."""

    net: esm.ESM
    tokenizer: Tokenizer
    checkpoint: Origin

    @property
    def device(self) -> torch.device:
        return self.net.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.embed.weight.dtype


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose header has been read: its tensors, and how they become a network's."""

    tensors: TensorSource
    layout: published_esm.Layout
    config: esm.Config
    rows: KeyMap

    def state(self, want: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the network's names, as stored; proven complete before data is read.

        Raises: KeyMapError with every disagreement.
        """
        if "frequencies" in want and not published_esm.stores_frequencies(self.tensors.meta):
            filled = import_weights(self.rows, self.tensors, {k: v for k, v in want.items() if k != "frequencies"})
            return {**filled, "frequencies": esm.default_frequencies(self.config.head_size)}
        return import_weights(self.rows, self.tensors, want)


def available() -> list[Checkpoint]:
    """The registry: every published checkpoint that ``load`` knows by name."""
    return list(CHECKPOINTS)


def load(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    offline: bool = False,
) -> Model:
    """Load a model for prediction.

    Args:
        source: a registry name ("plm-mini", "esm2-650m"; see ``available``), a hub id ("facebook/esm2_t6_8M_UR50D"), or
            a folder or file in any published form. What it holds is read from the files, never from their names.
        device: "auto" takes CUDA where there is one, else the CPU.
        dtype: "auto" is float32 on a CPU and bfloat16 on CUDA; or a name, or a ``torch.dtype``.
        revision: commit or branch on the hub; a registry name brings its own.
        offline: use only what is already on this machine.

    Raises:
        UnknownModelError: no such name, with near ones.
        DownloadError: the files could not be fetched.
        CheckpointError: the files are torn, foreign, hostile or incomplete.
    """
    at = choose_device(device)
    precision = choose_dtype(dtype, at)
    path, row = locate(source, revision=revision, offline=offline)
    opened = open_checkpoint(path)
    net = build(opened, at, precision)
    origin = Origin(
        name=row.name if row else path.stem,
        family="esm",
        source=row.hub or row.name if row else str(source),
        revision=revision or (row.revision if row else None),
        files=tuple(WeightFile(file) for file in opened.tensors.files),
        licence=row.licence if row else "unknown: see where the files came from",
        citation=row.citation if row else "unknown: see where the files came from",
    )
    return Model(net, esm_tokenizer(), origin)


def build(opened: Opened, device: torch.device, dtype: torch.dtype) -> esm.ESM:
    """The network of an opened checkpoint, filled and in eval mode."""
    with torch.device("meta"):
        net = esm.ESM(opened.config)
    state = opened.state(net.state_dict())
    if opened.layout == "fair":
        state = esm.zero_mask_row(state, opened.config)
    for name in list(state):  # one at a time, so that a cast or a move holds a single tensor twice
        precision = torch.float32 if name == "frequencies" else dtype
        state[name] = state[name].to(device, precision)
    net.load_state_dict(state, assign=True)
    return net.eval()


def locate(source: str | Path, *, revision: str | None = None, offline: bool = False) -> tuple[Path, Checkpoint | None]:
    """The folder or file of ``source``, downloaded if need be, and its registry row if it was asked for by name."""
    path = Path(source).expanduser()
    if path.exists():
        return path, None
    name = str(source)
    try:
        row = find(name)
    except UnknownModelError:
        if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
            if "/" in name or path.suffix:
                raise CheckpointError(f"no such file or folder: {name}") from None
            raise
        return fetch(name, revision=revision, offline=offline), None
    return fetch(row, revision=revision, offline=offline), row


def open_checkpoint(path: Path) -> Opened:
    """Read the header of the checkpoint at a folder or file, and find its layout, configuration and key map.

    Raises: CheckpointError if there is none, if it is of no known family, or if its configuration does not make sense.
    """
    weights = find_weights(path)
    settings = read_config(weights.parent) if weights.suffix not in (".pt", ".pth") else None
    tensors = open_tensors(weights) if settings is not None else read_fair_esm(weights)
    layout = published_esm.detect(tensors.meta)
    if layout != "fair" and settings is None:
        raise CheckpointError(f"{weights} needs a config.json beside it; there is none")
    if layout == "plm":
        config = own_config(settings or {}, weights.parent)
    elif layout == "hub":
        config = esm.Config(**published_esm.hub_config(settings or {}, tensors.meta))
    else:
        config = esm.Config(**published_esm.fair_config(tensors.extras, tensors.meta))
    rotary = config.learned_positions is None
    rows = published_esm.key_map(tensors.meta, rotary=rotary, contact_head=config.contact_head)
    return Opened(tensors, layout, config, rows)


def find_weights(path: Path) -> Path:
    """The weight file (or shard index) that ``path`` means."""
    if path.is_file():
        return path
    if files := weight_files(path):
        return files[0]
    originals = [file for file in sorted(path.glob("*.pt")) if not file.stem.endswith("-contact-regression")]
    if len(originals) == 1:
        return originals[0]
    several = (
        f"several .pt files ({', '.join(file.name for file in originals)}); name one" if originals else "no weights"
    )
    raise CheckpointError(
        f"{path} has {several}. Wanted: model.safetensors or pytorch_model.bin (whole, or shards with their index) "
        "beside a config.json, or a fair-esm .pt file."
    )


def read_config(folder: Path) -> dict[str, object] | None:
    """``config.json`` of a folder, or None."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold one JSON object; it holds a {type(settings).__name__}")
    return settings


def own_config(settings: Mapping[str, object], folder: Path) -> esm.Config:
    """The configuration in this library's own form, as ``plm.convert(to="plm")`` writes it."""
    values = settings.get("config")
    try:
        return esm.Config(**values)  # type: ignore[arg-type]  # wrong names and sizes raise here
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def choose_device(device: str | torch.device) -> torch.device:
    """What "auto" means here, or the device that was asked for.

    Raises: ValueError if this machine or this torch does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used: {reason}. Choose 'auto', 'cpu', 'cuda' or 'mps'."
        ) from None
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """What "auto" means on ``device``, or the dtype that was asked for."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(
            f"dtype {dtype!r} is unknown; choose 'auto', {', '.join(map(repr, DTYPES))} or a torch.dtype of these"
        )
    return chosen


__all__ = ["CheckpointError", "DownloadError", "Model", "UnknownModelError", "available", "load"]
