"""A few layers of every family at the published widths, with random weights: what the kernels meet in earnest.

``quick`` makes them narrow enough for interpreted kernels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plm.esmfold.config import Config as FoldConfig
from plm.esmfold.config import StructureConfig
from plm.esmfold.trunk import Block
from plm.models import bert, esm, progen2, proteinbert, t5
from plm.packing import Packed

LENGTHS = (350, 117, 1, 511, 64)  # tokens of each sequence
SHORT = (9, 1, 5)
PAIRS = 65  # residues of the folding block
STRUCTURE = StructureConfig(384, 128, 8, 12, 16, 4, 8, 1, 128, 2)
STEM = {"channels": 2560, "layers": 36, "feed_forward": 10240}
Run = Callable[[Any, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A network, made on a device in float32, and how rows of tokens go through it: one result per row."""

    name: str
    build: Callable[[bool], nn.Module]
    run: Run
    letters: range  # ids that stand for residues
    float16: bool = True
    batched: bool = True  # whether there are batches

    def rows(self, quick: bool, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        lengths = SHORT if quick else LENGTHS
        low, high = self.letters.start, self.letters.stop
        return [torch.randint(low, high, (length,), generator=generator).to(device) for length in lengths]

    def network(self, quick: bool, device: str) -> nn.Module:
        """In float32, in eval mode, the same in every run."""
        with torch.device("meta"):
            net = self.build(quick)
        net = net.to_empty(device=device).requires_grad_(False).eval()
        fill(net)
        return net


@torch.no_grad()
def fill(net: nn.Module) -> None:
    """Random weights that keep every activation near 1, so that errors are those of real sizes."""
    generator = torch.Generator().manual_seed(0)
    unscaled = isinstance(net, t5.T5)
    for name, x in net.named_parameters():
        noise = torch.randn(x.shape, generator=generator)
        if x.dim() == 1:
            noise = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
        elif "embed" not in name:
            noise *= x[0].numel() ** -0.5
            if unscaled and "qkv" in name:  # a T5 does not divide its logits by the root of the head size
                noise *= net.config.head_size**-0.25
        x.copy_(noise)
    if isinstance(net, esm.ESM):
        net.frequencies.copy_(esm.default_frequencies(net.config.head_size))


def converted(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, as ``plm.load`` would give it: the biases of a T5 stay in float32."""
    copied = copy.deepcopy(net).to(dtype)
    for name, module in copied.named_modules():
        if name.endswith("relative_bias") and dtype.itemsize < 4:
            whole = net.get_submodule(name).weight
            module.weight = nn.Parameter(whole.clone(), requires_grad=False)
    return copied


def packed_hidden(net: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    batch = Packed.from_ids([row.cpu() for row in rows], device=rows[0].device)
    return batch.split(net.encode(batch).hidden)


def rectangle(net: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """ProteinBERT's rows padded to 512, as its authors run it: each has the same numbers alone."""
    width = 512 if net.config.channels == 128 else 16
    tokens = torch.full((len(rows), width), proteinbert.PAD, device=rows[0].device)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    out = net(tokens, local_logits=False, annotation_logits=False)
    return [torch.cat([x.flatten(), y]) for x, y in zip(out.local, out.global_, strict=True)]


def folding(net: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """A block of the trunk on random residues and pairs, which are in float32 at least: there they are summed."""
    weight = net.outgoing.out.weight
    precise = torch.promote_types(weight.dtype, torch.float32)
    length = min(PAIRS, max(map(len, rows)))
    generator = torch.Generator().manual_seed(2)
    c, p = net.attention.out.weight.shape[0], weight.shape[0]
    s, z = (
        torch.randn(shape, generator=generator).to(weight.device, precise)
        for shape in ((length, c), (length, length, p))
    )
    s, z = net(s, z, length)
    return [torch.cat([s.flatten(), z.flatten()])]


def fold_config(quick: bool) -> FoldConfig:
    if quick:
        return FoldConfig(STEM, 1, 32, 16, 8, 16, 8, 4, 16, STRUCTURE)
    return FoldConfig(STEM, 48, 1024, 128, 32, 32, 32, 4, 128, STRUCTURE)


def esm2(channels: int, heads: int) -> Callable[[bool], nn.Module]:
    def build(quick: bool) -> nn.Module:
        c, h = (64, 2) if quick else (channels, heads)
        return esm.ESM(esm.Config(2, c, h, 4 * c, None, False, True, 1e-5, lm_head=False))

    return build


def ankh3(quick: bool) -> nn.Module:
    sizes = (64, 2, 32, 96) if quick else (1536, 16, 64, 3840)
    return t5.T5(t5.Config(256, 2, 0, *sizes, "gated-silu", buckets=64))


def igbert(quick: bool) -> nn.Module:
    c, h, f = (64, 2, 128) if quick else (1024, 16, 4096)
    return bert.BERT(bert.Config(30, 2, c, h, f, positions=40000, types=2, lm_head=False))


def progen(quick: bool) -> nn.Module:
    c, h, turned = (64, 4, 8) if quick else (1536, 16, 48)
    return progen2.ProGen2(progen2.Config(32, 32, 2, c, h, turned, 4 * c, 2048))


def protein_bert(quick: bool) -> nn.Module:
    c, g, annotations = (32, 64, 40) if quick else (128, 512, 8943)
    return proteinbert.ProteinBERT(proteinbert.Config(26, annotations, 2, c, g, 4, 16 if quick else 64))


CASES = (
    Case("ESM-2 650M", esm2(1280, 20), packed_hidden, range(4, 24)),
    Case("ESM-2 150M", esm2(640, 20), packed_hidden, range(4, 24)),
    Case("ESM-2 8M", esm2(320, 20), packed_hidden, range(4, 24)),
    Case("Ankh3-large", ankh3, packed_hidden, range(8, 28), float16=False),
    Case("IgBert", igbert, packed_hidden, range(5, 25)),
    Case("ProGen2-base", progen, packed_hidden, range(5, 25)),
    Case("ProteinBERT", protein_bert, rectangle, range(20)),
    Case("ESMFold block", lambda quick: Block(fold_config(quick)), folding, range(4, 24), float16=False, batched=False),
)
