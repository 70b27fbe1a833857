"""From a name or a path to a model: find the files, prove the key map on headers, then read the weights."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from plm.encoder_graphs import Graphs
from plm.families import BY_NAME, CONFIGURED, FAMILIES, Config, Family, Network
from plm.graphs import Graphed
from plm.invariance import check_promise
from plm.layers import Linear
from plm.models.t5 import T5
from plm.origins import LicenceNotice, Notice, Origin, SpeedNotice, VocabularyNotice, WeightFile, origin
from plm.outline import outlines
from plm.placement import DTYPES, EIGHT_BIT, MIXED, Precision, choose_device, choose_precision, kept_in
from plm.processor import bfloat16_unit
from plm.recording import Lent
from plm.tokens import Tokenizer, checked
from plm_kernels import attention_choice, picks
from plm_weights import (
    CheckpointError,
    DownloadError,
    KeyMap,
    KeyMapError,
    TensorSource,
    UnknownModelError,
    import_weights,
    read_fair_esm,
)
from plm_weights.archives import is_archive, unpacked
from plm_weights.esmfold_files import trunk_among
from plm_weights.fetch import fetch, home, row_of, weight_files
from plm_weights.registry import CHECKPOINTS, Checkpoint, find
from plm_weights.settings import read_object
from plm_weights.vocabularies import published_vocabulary

HEADS = ("lm_head", "annotation_head")  # linear layers that are never kept in 8 bits
ORIGINAL = ("original:", "fair-esm:")  # before a name: the authors' own files, not the hub's


@dataclass(frozen=True)
class Model:
    """A network in eval mode with its tokenizer and its origin."""

    net: Network
    tokenizer: Tokenizer
    checkpoint: Origin
    weights: str = ""  # how linear weights are kept, if not in the dtype: "int8"
    products: torch.dtype | None = None  # in what linear layers multiply, if not in the dtype: bfloat16
    batch_invariant: bool = False  # see ``load``
    # What is recorded on CUDA: passes of its encoder, and steps of its writing.
    graphs: Graphs = field(default_factory=Graphs, repr=False, compare=False)
    steps: "Lent[Graphed]" = field(default_factory=Lent, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.net.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What its parameters are kept in, those in 8 bits aside, and what it gives."""
        return self.net.embed.weight.dtype

    @property
    def precision(self) -> str:
        """The name that ``load`` takes for it."""
        return Precision(self.dtype, self.products, self.weights == EIGHT_BIT).name

    @property
    def backends(self) -> dict[str, str]:
        """What does the work of each kernel on its device, those that its family does not use included, in words."""
        found = picks(self.device.type)
        if head_size := getattr(self.net.config, "head_size", None):
            dtype = self.products or self.dtype
            biased = isinstance(self.net, T5)
            found["attention"] = attention_choice(self.device.type, dtype, head_size, bias=biased)
        return found


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose header has been read: its tensors, and how they become a network's."""

    tensors: TensorSource
    family: Family
    layout: str
    config: Config
    rows: KeyMap

    def state(self, want: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the network's names, as stored; proven complete before data is read.

        Raises: KeyMapError with every disagreement; CheckpointError naming all tensors that are not finite.
        """
        file = self.tensors.files[0]
        computed = self.family.computed(self.tensors.meta, self.config)
        try:
            stored = import_weights(self.rows, self.tensors, {k: v for k, v in want.items() if k not in computed})
        except KeyMapError as error:
            raise KeyMapError(f"{file}: {error}") from None
        if strange := [f"{k} ({v.dtype})" for k, v in sorted(stored.items()) if v.dtype not in DTYPES.values()]:
            raise CheckpointError(f"{file} has {', '.join(strange)}; wanted one of {', '.join(DTYPES)}")
        if broken := [name for name, tensor in sorted(stored.items()) if not is_finite(tensor)]:
            raise CheckpointError(f"{file} has NaN or infinite values in {', '.join(broken)}; fetch or train it again")
        return stored | computed

    def tokenizer(self) -> Tokenizer:
        """The family's own table, compared with the vocabulary beside the weights if there is one.

        Where nobody published a table of this size, the file is all there is to know.

        Raises: CheckpointError if the two disagree, or name more tokens than the embedding has rows.
        """
        weights = self.tensors.files[0]
        with naming(weights):
            table = self.family.tokenizer(self.config)
        if self.layout not in CONFIGURED:
            return table
        if (found := published_vocabulary(weights.parent)) is None:
            return table
        pieces, file = found
        with naming(file):
            if table.guessed and self.family.told_tokenizer:
                return self.family.told_tokenizer(self.config, pieces)
            tokenizer = checked(table, pieces, file.name)
            rows = getattr(self.config, "vocabulary", len(table.vocabulary))
            if len(tokenizer.vocabulary) > rows:
                raise ValueError(f"{len(tokenizer.vocabulary)} tokens, but the embedding has {rows} rows")
            return tokenizer


def available() -> list[Checkpoint]:
    """The registry: every published checkpoint that ``load`` knows by name."""
    return list(CHECKPOINTS)


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = "auto",
    dtype: str | torch.dtype | None = "auto",
    revision: str | None = None,
    offline: bool = False,
    batch_invariant: bool = False,
) -> Model:
    """Load a model for prediction.

    Args:
        source: a registry name ("plm-mini", "esm2-650m"; see ``available``), a hub id ("facebook/esm2_t6_8M_UR50D"), or
            a folder or file in any published form. What it holds is read from the files, never from their names.
            A tar archive of such a folder is unpacked into this library's cache, once.
            "original:" before a registry name ("original:esm2_t6_8M_UR50D"; of an ESM also "fair-esm:") takes the
            authors' own files, Meta's from torch's hub folder or from their addresses. Those in torch's hub folder
            also serve where the hub is out of reach. The names of ProGen2 and ProteinBERT mean the authors' files, as
            those have published hashes, and the hub ids ("hugohrban/progen2-medium", "GrimSqueaker/proteinBERT", a
            Keras SavedModel) the hub's.
        device: "auto" (or None) takes CUDA where there is one, else the CPU.
        dtype: "auto" (or None) is float32 on a CPU and bfloat16 on CUDA; or a name, or a ``torch.dtype``. "int8" keeps
            linear weights (the heads' aside) in 8 bits with a scale per output, and computes in bfloat16. On a CPU that
            writes one sequence at a time the fastest (what reads many tokens at once keeps the weights in bfloat16
            beside them); on CUDA it saves memory, not time. It rounds weights by about 0.8 % of their size, where
            bfloat16 rounds them by 0.2 %. "float32-bfloat16" (or "fp32-bf16") keeps parameters, the sum that runs
            through the layers, norms and heads in float32, and takes the products of the layers, and attention, in
            bfloat16; what writes keeps its cache, and attends to it, in float32. Of an ESMFold "auto" is float32
            everywhere, and with float32 the layers of its language model stay in the half precision in which they are
            stored, to be widened one by one; with bfloat16 its structure module and confidence stay in float32.
        revision: commit or branch on the hub; a registry name brings its own.
        offline: use only what is already on this machine.
        batch_invariant: on CUDA, ``embed``, ``score`` and ``variants`` give a sequence the same bits alone or in any
            batch (``contacts`` and what ``generate`` draws are as without; beams are searched within its scope). Its
            price there is not yet measured; there must be one, as products have one tile for all numbers of rows,
            float32 is multiplied without tensor cores, and ProGen2's variants are read whole. In float32 on a CPU it
            holds anyway, and costs nothing; the other dtypes cannot have it there.

    Warns:
        LicenceNotice: the weights may not be used commercially (Ankh).
        SpeedNotice: a CPU without instructions for bfloat16, on which float32 is the faster one.
        VocabularyNotice: a T5 with a vocabulary that nobody published, and no file beside the weights that tells it.

    Raises:
        ValueError: a T5 or an ESMFold in float16, which overflows, an ESMFold in 8 bits, or an ESMFold or a ProteinBERT
            in float32-bfloat16; or ``batch_invariant`` where it cannot be kept, with the reason.
        UnknownModelError: no such name, with near ones.
        DownloadError: the files could not be fetched.
        CheckpointError: the files are torn, foreign, hostile or incomplete, or hold a NaN or an infinity.
    """
    at = choose_device(device)
    precision = choose_precision(dtype, at)
    path, row = locate(source, revision=revision, offline=offline)
    opened = open_checkpoint(path)
    family = opened.family
    if dtype in (None, "auto"):
        precision = Precision(family.auto) if family.auto else precision
    for refused, asked, why in (
        ("float16", precision.dtype == torch.float16, family.no_float16),
        (EIGHT_BIT, precision.eight_bit, family.no_8_bits),
        (MIXED, precision.products is not None, family.no_mixed),
    ):
        if asked and why:
            raise ValueError(f"dtype {refused} cannot be used: {why}. Choose bfloat16 or float32.")
    if batch_invariant:
        heads, head_size = (getattr(opened.config, name, 1) for name in ("heads", "head_size"))
        computed: torch.dtype | str = DTYPES.get(precision.name, precision.name)
        if at.type == "cuda" and precision.products:
            computed = precision.products  # attention's; what is in float32 beside it has its own kernels
        check_promise(family.name, heads, head_size, at, computed)
    tokenizer = opened.tokenizer()
    if row is not None and row.pairs is False:
        tokenizer = replace(tokenizer, separator=None)
    net = build(opened, at, precision)
    notice = family.notice(opened.config)
    if notice:
        warnings.warn(notice, LicenceNotice, stacklevel=2)
    if tokenizer.guessed:
        size, advice = len(tokenizer.vocabulary), "put tokenizer.json or spiece.model beside the weights"
        warnings.warn(
            f"no published T5 has {size} tokens, so Ankh's letters are assumed: {advice}", VocabularyNotice, 2
        )
    if at.type == "cpu" and precision.name in ("bfloat16", MIXED) and not bfloat16_unit():
        saved = "" if precision.products else "; bfloat16 halves memory"
        advice = f"float32 is the faster dtype here{saved}"
        warnings.warn(f"this CPU has no instructions for bfloat16: {advice}", SpeedNotice, 2)
    files = tuple(WeightFile(file) for file in opened.tensors.files)
    came = origin(path, row, family.name, revision, files)
    came = came if row or not notice else replace(came, licence=notice)
    weights = EIGHT_BIT if precision.eight_bit else ""
    return Model(net, tokenizer, came, weights, precision.products, batch_invariant)


def build(opened: Opened, device: torch.device, precision: Precision) -> Network:
    """The network of an opened checkpoint, filled and in eval mode."""
    family = opened.family
    with outlines():
        net = family.network(opened.config)
    state = family.loaded(opened.layout, opened.state(net.state_dict()), opened.config)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, Linear) and name not in HEADS}
    as_stored = {f"{name}.weight" for name in layers} if precision.eight_bit else set()
    for name in list(state):  # one at a time, so that a cast or a move holds a single tensor twice
        stored = state[name].dtype
        kept = stored if name in as_stored else kept_in(family, name, stored, precision.dtype)
        state[name] = state[name].to(device, kept)
    net.load_state_dict(state, assign=True)
    for name, layer in layers.items():
        if precision.eight_bit:
            layer.keep_8_bits()
        elif precision.products and "blocks" in name.split("."):  # what is beside them gives results, or is small
            layer.multiply_in(precision.products)
    return net.eval()


def locate(source: str | Path, *, revision: str | None = None, offline: bool = False) -> tuple[Path, Checkpoint | None]:
    """The folder or file of ``source``, downloaded if need be, and its registry row if it was asked for by name."""
    path = Path(source).expanduser()
    if source != "" and path.exists():
        return path, None
    name = str(source)
    if name.startswith(ORIGINAL):
        row = find(name.partition(":")[2])
        return fetch(row, revision=revision, offline=offline, form="original"), row
    try:
        row = find(name) if isinstance(source, Path) or name.startswith((".", "/", "~")) else row_of(name)
    except UnknownModelError:
        if "/" in name or path.suffix:
            raise CheckpointError(f"no such file or folder: {name}") from None
        raise
    return fetch(row, revision=revision, offline=offline), row


def open_checkpoint(path: Path) -> Opened:
    """Read the header of the checkpoint at a folder or file, and find its layout, configuration and key map.

    Raises: CheckpointError if there is none, if it is of no known family, or if its configuration does not make sense.
    """
    weights = find_weights(path)
    tensors = read_fair_esm(weights)
    layouts = ((family, family.layout(tensors.meta)) for family in FAMILIES)
    family, layout = next(((family, layout) for family, layout in layouts if layout), (None, None))
    if family is None or layout is None:
        some, known = ", ".join(sorted(tensors.meta)[:5]), ", ".join(BY_NAME)
        raise CheckpointError(f"{weights}: these tensors are of no family that is known here ({known}): {some}, ...")
    file = weights.with_name("config.json") if layout in CONFIGURED else weights
    settings = read_config(file) if layout in CONFIGURED else {}
    tensors = family.joined(layout, tensors)
    with naming(file):
        read = own_config(settings) if layout == "plm" else family.read_config(layout, settings, tensors)
        config = family.config(**read)  # wrong names, and sizes that do not fit each other, raise here
        rows = family.key_map(tensors.meta, config)
    return Opened(tensors, family, layout, config, rows)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file that it is about before the message of an error, and make it a CheckpointError if it is none."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def find_weights(path: Path) -> Path:
    """The weight file (or index) that ``path`` means: in a folder a complete set in hub form, or the only one.

    A tar archive is unpacked first.
    """
    if path.is_file():
        return weight_files(unpacked(path, home() / "unpacked"))[0] if is_archive(path) else path
    if files := weight_files(path):
        return files[0]
    found = "no weights"
    for kind in (".index.json", ".safetensors", ".pt", ".pth", ".ckpt", ".pkl", ".index", ".h5", ".keras"):
        files = tuple(file for file in sorted(path.glob(f"*{kind}")) if not file.stem.endswith("-contact-regression"))
        if len(files) == 1:
            return files[0]
        if trunk := trunk_among(files):
            return trunk
        if files:
            found = f"several {kind} files ({', '.join(file.name for file in files)}); name one"
            break
    raise CheckpointError(
        f"{path} has {found}. Wanted: model.safetensors or pytorch_model.bin (whole, or shards with their index) "
        "beside a config.json, or one file of weights, such as a fair-esm .pt or ProteinBERT's .pkl, or the variables "
        "of a Keras SavedModel."
    )


def read_config(path: Path) -> dict[str, object]:
    """The settings in a ``config.json``."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; weights in this layout need it beside them")
    return read_object(path)


def own_config(settings: Mapping[str, object]) -> dict[str, object]:
    """The configuration in this library's own form, as ``plm.convert(to="plm")`` writes it."""
    values = settings.get("config")
    if not isinstance(values, dict):
        raise CheckpointError(f"config must be an object; it is a {type(values).__name__}")
    return values


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. A NaN wins both ends, and this is 14 times as fast as ``isfinite``."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


__all__ = [
    "CheckpointError",
    "DownloadError",
    "LicenceNotice",
    "Model",
    "Notice",
    "Origin",
    "SpeedNotice",
    "UnknownModelError",
    "VocabularyNotice",
    "WeightFile",
    "available",
    "load",
]
