"""Does this machine, this device and this dtype give the published numbers?"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from plm.loading import Model, Opened, load, locate, open_checkpoint
from plm.packing import Packed
from plm_weights import UnknownModelError
from plm_weights.checks import Check
from plm_weights.registry import find

# With the start and end tokens, unusual residues and hidden ones: the sequences of transformers' own conversion test
# come first (convert_esm.py), one residue last.
SMOKE = (
    "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG",
    "MKTVRQERLKSI<mask>RILERSKEPVSGAQLAEELS<mask>SRQVIVQDIAYLRSLGYN<mask>VATPRGYVLA",
    "MXBUZOACDEFGHIKLNPQRSTVWY",
    "M",
)
LIBRARY_BOUND = 2e-4  # of the largest logit: ten times the float32 error of fair-esm and of transformers (1.5e-5)


@dataclass(frozen=True)
class Finding:
    """One comparison. ``error`` is a share of what is allowed: at most 1 passes."""

    what: str
    source: str
    error: float
    allowed: str

    @property
    def passed(self) -> bool:
        return self.error <= 1  # a NaN does not pass


@dataclass(frozen=True)
class Report:
    """Every comparison that could be made here. With none at all nothing is proven, and the report does not pass."""

    name: str
    device: str
    dtype: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    def as_dict(self) -> dict[str, object]:
        findings = [{**asdict(finding), "passed": finding.passed} for finding in self.findings]
        return {
            "name": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "passed": self.passed,
            "findings": findings,
        }

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.device} in {self.dtype}"]
        for f in self.findings:
            lines.append(
                f"  {'ok  ' if f.passed else 'FAIL'} {f.what}: {f.error:.3f} of the allowed {f.allowed} [{f.source}]"
            )
        if not self.findings:
            lines.append(
                "  nothing to compare with: no published values, and neither transformers nor fair-esm is installed"
            )
        good = sum(f.passed for f in self.findings)
        return "\n".join([*lines, f"{good} of {len(self.findings)} comparisons passed"])


def verify(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    offline: bool = False,
) -> Report:
    """Compare a checkpoint's outputs on this machine with numbers that others published or compute.

    Published values come with the library for every registry row that has any. Where transformers (hub form) or
    fair-esm (``.pt``) is installed, its float32 logits on a few sequences are compared too.

    Args:
        source: anything ``load`` takes; a folder or file is matched with the registry by its name.
        dtype: "auto" is float32 on every device. In bfloat16 and float16 the allowed difference grows by eight units in
            the last place of the largest expected value, and the report says so.

    Raises: as ``load``.
    """
    model = load(
        source, device=device, dtype="float32" if dtype == "auto" else dtype, revision=revision, offline=offline
    )
    findings = [*published_values(model), *other_library(model, locate(source, revision=revision, offline=offline)[0])]
    return Report(model.checkpoint.name, str(model.device), str(model.dtype).removeprefix("torch."), tuple(findings))


def published_values(model: Model) -> Iterator[Finding]:
    """Each check of the registry row, if the model has one and its sizes."""
    try:
        row = find(model.checkpoint.name)
    except UnknownModelError:
        return
    config = model.net.config
    if row.config and (row.config["layers"], row.config["channels"]) != (config.layers, config.channels):
        return
    coarse = 8 * torch.finfo(model.dtype).eps if model.dtype.itemsize == 2 else 0.0
    for check in row.checks:
        largest = max(abs(value) for row in check.expected for value in row)
        slack = check.absolute + check.relative * largest
        allowed = f"{check.absolute:g} + {check.relative:g}·|x|" + (
            f" + {coarse * largest:.2g} ({model.dtype})" if coarse else ""
        )
        error = check.error(values(model, check)) * slack / (slack + coarse * largest)
        yield Finding(describe(check), check.source, error, allowed)


def describe(check: Check) -> str:
    of = check.sequence or f"ids {', '.join(map(str, check.ids or ()))}"
    layer = "" if check.layer is None else f" of layer {check.layer}"
    return f"{check.what}{layer}, {of if len(of) <= 40 else of[:37] + '...'}"


@torch.inference_mode()
def values(model: Model, check: Check) -> Tensor:
    """The matrix that a check speaks of; its kinds are defined in ``plm_weights.checks``."""
    ids = list(check.ids) if check.ids is not None else model.tokenizer.encode(check.sequence or "")
    batch = Packed.from_ids([ids], device=model.device)
    if check.what in ("hidden", "mean"):
        assert check.layer is not None
        hidden: Tensor = model.net(batch, hidden_states=True, logits=False).hidden_states[check.layer]
        return hidden if check.what == "hidden" else hidden[1:-1].float().mean(0, keepdim=True)
    if check.what == "contacts":
        contacts: Tensor = model.net(batch, contacts=True, logits=False).contacts[0]
        return contacts
    logits: Tensor = model.net(batch).logits.float()
    if check.what == "logits":
        return logits
    if check.what == "probabilities":
        return logits.softmax(-1)
    log_probabilities = logits.log_softmax(-1)
    own = log_probabilities.gather(1, batch.tokens[:, None])
    return -own.mean().view(1, 1) if check.what == "nll" else log_probabilities - own


@torch.inference_mode()
def other_library(model: Model, path: Path) -> Iterator[Finding]:
    """Logits of the implementation that the files were published for, if it is installed here."""
    opened = open_checkpoint(path)
    if not opened.config.lm_head:
        return
    if opened.layout == "hub" and installed("transformers"):
        name, theirs = "transformers", transformers_logits(path if path.is_dir() else path.parent)
    elif opened.layout == "fair" and installed("fair-esm"):
        name, theirs = "fair-esm", fair_esm_logits(opened)
    else:
        return
    batch = model.tokenizer.pack(SMOKE).to(model.device)
    ours = model.net(batch).logits.float().cpu()
    largest = theirs.abs().max().item()
    bound = (LIBRARY_BOUND + (8 * torch.finfo(model.dtype).eps if model.dtype.itemsize == 2 else 0)) * largest
    error = (ours - theirs).abs().max().item() / bound
    yield Finding(f"logits of {len(SMOKE)} sequences", f"{name}, float32 on this CPU", error, f"{bound:.2g}")


def installed(distribution: str) -> bool:
    """Whether a distribution is installed; asked by its own name, as several install a module called esm."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def padded_smoke() -> tuple[Tensor, Tensor]:
    """ids and mask ``[b, t]`` of the smoke sequences, for libraries that pad."""
    from plm.tokens import esm_tokenizer

    batch = esm_tokenizer().pack(SMOKE)
    return batch.pad(batch.tokens, 1), batch.pad(torch.ones_like(batch.tokens)).bool()


def transformers_logits(folder: Path) -> Tensor:
    from transformers import EsmForMaskedLM
    from transformers.utils import logging

    ids, mask = padded_smoke()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports heads that a checkpoint does not have, and draws a bar
    logging.disable_progress_bar()
    try:
        theirs = EsmForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    logits: Tensor = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
    return logits


def fair_esm_logits(opened: Opened) -> Tensor:
    """Through fair-esm's own loader, which reads the architecture off the file's name: it is given one that fits."""
    import argparse

    from esm.pretrained import load_model_and_alphabet_core

    path, *regression = opened.tensors.files
    ids, mask = padded_smoke()
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, *contacts = (torch.load(file, map_location="cpu", weights_only=True) for file in (path, *regression))
    name = "esm2" if opened.config.learned_positions is None else "esm1b" if opened.config.norm_before else "esm1v"
    theirs, _ = load_model_and_alphabet_core(f"{name}_any", model, contacts[0] if contacts else None)
    logits: Tensor = theirs.eval()(ids)["logits"][mask]
    return logits
