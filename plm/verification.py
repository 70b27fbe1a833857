"""Does this machine, this device and this dtype give the published numbers?"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from plm import peers
from plm.esmfold.chains import read_chains
from plm.esmfold.geometry import backbone_atoms, rotation
from plm.esmfold.residues import tables
from plm.folding import fold, folding_network
from plm.loading import Model, load, locate, open_checkpoint
from plm.packing import Packed
from plm.scoring import score_rows
from plm_weights import UnknownModelError
from plm_weights.checks import FOLDED, Check
from plm_weights.registry import find

# The largest float32 error of fair-esm and transformers against float64, as a share of the largest value: of random
# networks as deep as the published ones (T5: Ankh's 72 layers; ProtT5's is 1e-6. ProGen2: GPT-J with 32 layers.
# ProteinBERT: protein-bert 1.0.1 on TensorFlow 2.15 at the published sizes, 1.9e-6. ESMFold: 36 layers, 48 blocks and
# four passes of 64 channels, 2.5e-6 in pTM, 2e-6 in positions, 3e-7 in pLDDT).
FLOAT32_ERROR = {"esm": 2e-5, "bert": 3e-6, "t5": 4e-5, "progen2": 2e-6, "proteinbert": 2e-6, "esmfold": 3e-6}


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
                "  nothing to compare with: no published values, and no library is installed that reads these files"
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
    fair-esm (``.pt``) is installed, its float32 outputs on a few sequences are compared too: the logits, and of a T5
    the encoder's hidden states. A ProGen2, which transformers has not, is given to its GPT-J, as the block is the same.
    A ProteinBERT, of which nobody published values, is compared with its authors' protein-bert where that is installed
    with TensorFlow: all states and outputs, with annotations and pads. Of an ESMFold positions, pLDDT, aligned errors
    and, but for half precision, pTM are compared.

    Args:
        source: anything ``load`` takes; a folder or file is matched with the registry by its name.
        dtype: "auto" is float32 on every device. In bfloat16 (of products alone, too) and float16 the allowed
            difference to published values grows by eight units in the last place of the largest of them, and that to
            another library by twice what the library itself loses in that dtype; the report says so.

    Raises: as ``load``.
    """
    model = load(
        source, device=device, dtype="float32" if dtype == "auto" else dtype, revision=revision, offline=offline
    )
    findings = [*published_values(model), *other_library(model, locate(source, revision=revision, offline=offline)[0])]
    return Report(model.checkpoint.name, str(model.device), model.precision, tuple(findings))


def published_values(model: Model) -> Iterator[Finding]:
    """Each check of the registry row, if the model has one of its family and sizes."""
    try:
        row = find(model.checkpoint.name)
    except UnknownModelError:
        return
    config = model.net.config
    if row.family != model.checkpoint.family:
        return
    sizes = ("layers", "blocks", "channels")  # blocks are those of a folding trunk
    if any(getattr(config, size) != row.config[size] for size in sizes if row.config and size in row.config):
        return
    narrow = model.products or model.dtype
    coarse = 8 * torch.finfo(narrow).eps if narrow.itemsize == 2 else 0.0
    for check in row.checks:
        largest = max(abs(value) for row in check.expected for value in row)
        slack = check.absolute + check.relative * largest
        allowed = f"{check.absolute:g} + {check.relative:g}·|x|" + (
            f" + {coarse * largest:.2g} ({narrow})" if coarse else ""
        )
        error = check.error(values(model, check)) * slack / (slack + coarse * largest)
        yield Finding(describe(check), check.source, error, allowed)


def describe(check: Check) -> str:
    of = check.sequence or f"ids {', '.join(map(str, check.ids or ()))}"
    layer = "" if check.layer is None else f" of layer {check.layer}"
    task = "" if check.task is None else f" for {check.task}"
    return f"{check.what}{layer}{task}, {of if len(of) <= 40 else of[:37] + '...'}"


@torch.inference_mode()
def values(model: Model, check: Check) -> Tensor:
    """The matrix that a check speaks of; its kinds are defined in ``plm_weights.checks``."""
    tokenizer, net = model.tokenizer, model.net
    if check.what in FOLDED:
        return folded(model, check)
    if check.what in ("ll_sum", "ll_mean"):
        ((_, likelihood),) = score_rows(model, [tokenizer.residues(check.sequence or "")], how="likelihood")
        return torch.tensor([[likelihood.total if check.what == "ll_sum" else likelihood.mean]])
    ids = list(check.ids) if check.ids is not None else tokenizer.encode(check.sequence or "", task=check.task)
    before, after = map(len, tokenizer.frame(check.task))
    inner = slice(before, len(ids) - after)
    batch = Packed.from_ids([ids], device=model.device)
    if check.what in ("hidden", "mean"):
        hidden = net.encode(batch, layer=check.layer).hidden
        return hidden if check.what == "hidden" else hidden[inner].float().mean(0, keepdim=True)
    if check.what == "contacts":
        contacts: Tensor = net(batch, contacts=True, logits=False).contacts[0]
        return contacts
    if check.what == "masked_probabilities":
        return masked_probabilities(model, ids, inner)
    logits: Tensor = net(batch).logits.float()
    if check.what == "logits":
        return logits
    if check.what == "probabilities":
        return logits.softmax(-1)
    log_probabilities = logits.log_softmax(-1)
    if check.what == "causal_nll":
        return -log_probabilities[:-1].gather(1, batch.tokens[1:, None]).mean().view(1, 1)
    own = log_probabilities.gather(1, batch.tokens[:, None])
    if check.what == "log_likelihood":
        return own[inner].sum().view(1, 1)
    return -own.mean().view(1, 1) if check.what == "nll" else log_probabilities - own


def folded(model: Model, check: Check) -> Tensor:
    """What a check says of a structure."""
    sequence = check.sequence or ""
    if check.what == "backbone":
        chains, net = read_chains(sequence), folding_network(model)
        (prediction,) = net.fold([chains])
        frames = prediction.layers[check.layer or 0]
        types, shift = chains.types.to(model.device), frames.translation * net.config.structure.scale
        return backbone_atoms(types, rotation(frames.quaternion), shift, tables()).flatten(0, 1)
    (structure,) = fold(model, sequence)
    return torch.tensor([[structure.mean_plddt if check.what == "plddt" else structure.ptm]])


def masked_probabilities(model: Model, ids: list[int], inner: slice) -> Tensor:
    """A pass per residue, in which that one is hidden: its probabilities ``[t, v]``."""
    tokenizer = model.tokenizer
    separator = None if tokenizer.separator is None else tokenizer.separator_id
    places = torch.tensor([i for i in range(len(ids))[inner] if ids[i] != separator])
    copies = torch.tensor(ids).repeat(len(places), 1)
    copies[torch.arange(len(places)), places] = tokenizer.mask_id
    batch = Packed.from_ids(list(copies), device=model.device)
    logits: Tensor = model.net(batch).logits[batch.first + places.to(model.device)]
    return logits.float().softmax(-1)


def other_library(model: Model, path: Path) -> Iterator[Finding]:
    """Outputs of the implementation that the files were published for, if it is installed here."""
    opened = open_checkpoint(path)
    question = peers.question_for(opened)
    if (answer := peers.theirs(opened, question, torch.float32)) is None:
        return
    name, wanted = answer
    narrow = model.products or model.dtype
    coarse = peers.theirs(opened, question, narrow) if narrow.itemsize == 2 else None
    for what, ours in peers.ours(model.net, question).items():
        bound = 10 * FLOAT32_ERROR[opened.family.name] * wanted[what].abs().max().item()
        allowed = f"{bound:.2g}"
        if coarse is not None:
            lost = 2 * largest_difference(coarse[1][what], wanted[what])
            bound, allowed = bound + lost, f"{allowed} + {lost:.2g} ({narrow})"
        error = largest_difference(ours, wanted[what]) / bound
        yield Finding(f"{what} of {len(question.batch)} sequences", f"{name}, float32 on this CPU", error, allowed)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    return (found.float().cpu() - wanted).abs().max().item()
