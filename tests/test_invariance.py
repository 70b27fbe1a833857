"""A protein has the same numbers alone or in any batch, in any order, at any budget; and memory grows with its length.

In float32 on a CPU "the same" means the same bits. A packed oneDNN product gives a row the same bits however many rows
stand beside it, and attention never looks past a sequence.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import differences, rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import plm
from plm import running
from plm.loading import Model, Origin
from plm.models.esm import ESM, Config
from plm.packing import in_order
from plm.vocabularies import esm_tokenizer
from plm_kernels import packing_available

LENGTHS = (1, 400, 63, 111, 63, 200, 33, 63, 1, 111, 5, 2)  # equal lengths go through attention together
ESM2_8M = Config(6, 320, 20, 1280, None, False, True, 1e-5, contact_head=True)
WIDE = Config(2, 640, 20, 2560, None, False, True, 1e-5, contact_head=True)
ORIGIN = Origin("random", "esm", "random", None, (), "", "")

Numbers = dict[str, list[Tensor]]

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def random_model(config: Config, dtype: torch.dtype = torch.float32) -> Model:
    """Weights of ordinary size, drawn in float32 and rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    net = ESM(config).requires_grad_(False)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise *= 6 if "contact_head" in name else 1.4 / parameter.shape[-1] ** 0.5
        parameter.copy_(noise)
    return Model(net.to(dtype).eval(), esm_tokenizer(), ORIGIN)


def random_proteins(lengths: tuple[int, ...] = LENGTHS) -> list[str]:
    letters = torch.tensor(list(b"LAGVSERTIDPKQNFYMHWC"))
    return [bytes(letters[torch.randint(20, (length,))].tolist()).decode() for length in lengths]


def logits(model: Model, sequences: list[str], max_tokens: int) -> list[Tensor]:
    rows = running.encode(model, sequences)
    found = running.run(model, rows, lambda batch, _: batch.split(model.net(batch).logits), max_tokens=max_tokens)
    return in_order(found, len(rows))


def numbers(model: Model, sequences: list[str], max_tokens: int) -> Numbers:
    """Embeddings, logits and, where there is a head, contacts."""
    found = {
        "residues": plm.embed(model, sequences, max_tokens=max_tokens),
        "logits": logits(model, sequences, max_tokens),
    }
    if model.net.config.contact_head:
        found["contacts"] = plm.contacts(model, sequences, max_tokens=max_tokens)
    return found


def regroupings(model: Model, sequences: list[str], compute: Callable[..., Numbers] = numbers) -> list[Numbers]:
    """The numbers of all sequences from several batches and orders, each put back into input order."""
    count = len(sequences)
    shuffled = torch.randperm(count).tolist()
    found = []
    for order, max_tokens in ((list(range(count)), 4096), (list(range(count))[::-1], 500), (shuffled, 150)):
        got = compute(model, [sequences[i] for i in order], max_tokens)
        back = sorted(range(count), key=order.__getitem__)
        found.append({name: [tensors[i] for i in back] for name, tensors in got.items()})
    return found


def assert_same_bits(found: Numbers, wanted: Numbers) -> None:
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        for ours, alone in zip(found[name], tensors, strict=True):
            assert torch.equal(ours, alone), f"{name} of shape {[*alone.shape]}: {(ours - alone).abs().max()}"


@needs_packing
@pytest.mark.parametrize("config", [ESM2_8M, WIDE], ids=["esm2-8m", "640 wide"])
def test_same_bits_in_float32(config: Config) -> None:
    """The real shape of ESM-2 8M, and twice as wide as that."""
    model, proteins = random_model(config), random_proteins()
    alone = numbers(model, proteins, max_tokens=1)
    for found in regroupings(model, proteins):
        assert_same_bits(found, alone)


@needs_packing
@pytest.mark.parametrize("name", ["esm1b_tiny", "esm2_tiny"])
def test_same_bits_of_every_pool_and_layer(golden: Path, name: str) -> None:
    model, proteins = plm.load(golden / "esm" / name), random_proteins()

    def everything(model: Model, sequences: list[str], max_tokens: int) -> Numbers:
        found = numbers(model, sequences, max_tokens)
        for layer in range(model.net.config.layers + 1):
            for pool in ("mean", "max", "cls"):
                found[f"{pool} {layer}"] = plm.embed(model, sequences, layer=layer, pool=pool, max_tokens=max_tokens)
        return found

    alone = everything(model, proteins, max_tokens=1)
    for found in regroupings(model, proteins, everything):
        assert_same_bits(found, alone)


@needs_packing
def test_same_bits_on_two_threads() -> None:
    """The number of threads may change bits, the batch may not."""
    config, proteins = replace(WIDE, layers=1, contact_head=False), random_proteins((1, 200, 63, 63, 5))
    model = random_model(config)
    one_thread = numbers(model, proteins, max_tokens=1)
    torch.set_num_threads(2)
    try:
        alone = numbers(model, proteins, max_tokens=1)
        together = numbers(model, proteins, max_tokens=4096)
    finally:
        torch.set_num_threads(1)
    assert_same_bits(together, alone)
    floor = rms(differences(one_thread, numbers(random_model(config, torch.float64), proteins, max_tokens=4096)))
    for name, change in rms(differences(alone, one_thread)).items():
        # The noise floor is the rounding of float32. With AVX-512 even these bits agree, with AVX2 they do not.
        assert change <= floor[name], name


def test_bfloat16_within_its_rounding() -> None:
    """oneDNN cuts a bfloat16 product into blocks along the inner dimension, and how depends on the number of rows."""
    proteins = random_proteins()
    model = random_model(ESM2_8M, torch.bfloat16)
    truth = numbers(Model(model.net.double(), model.tokenizer, ORIGIN), proteins, max_tokens=4096)
    model = random_model(ESM2_8M, torch.bfloat16)
    alone = numbers(model, proteins, max_tokens=1)
    floor = rms(differences(alone, truth))
    for found in regroupings(model, proteins):
        for name, change in rms(differences(found, alone)).items():
            # The noise floor is the rounding of bfloat16, against the same weights in float64; 0.6 of it are seen.
            assert change <= floor[name], (name, change, floor[name])


def test_float64_within_its_rounding() -> None:
    """oneDNN packs no float64, so a product's order of summing depends on the number of rows."""
    model, proteins = random_model(WIDE, torch.float64), random_proteins()
    alone = numbers(model, proteins, max_tokens=1)
    for found in regroupings(model, proteins):
        for change in differences(found, alone).values():
            # 5,000 times the spacing of float64 at 1.
            assert change.abs().max() < 1e-12


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = call(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("name", ["esm1b_tiny", "esm2_tiny"])
def test_embedding_holds_nothing_quadratic(golden: Path, name: str) -> None:
    """No operator gives ``[t, t]`` numbers, let alone ``[h, t, t]``."""
    model = plm.load(golden / "esm" / name)
    proteins, tokens = random_proteins((900, 900)), 2 * 902
    with LargestTensor() as largest:
        plm.embed(model, proteins)
    config = model.net.config
    assert largest.numel == tokens * max(config.feed_forward, 3 * config.channels) < 902 * 902


@pytest.mark.parametrize("name", ["esm1b_tiny", "esm2_tiny"])
def test_contacts_hold_one_layer_of_maps(golden: Path, name: str) -> None:
    """Contacts are summed up layer by layer: ``[h, t, t]`` at most, whatever the number of layers or sequences."""
    model = plm.load(golden / "esm" / name)
    with LargestTensor() as largest:
        plm.contacts(model, random_proteins((250, 250, 100)))
    assert largest.numel == model.net.config.heads * 252 * 252


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a process is read as Linux tells it")
def test_peak_memory_is_linear_in_length(golden: Path) -> None:
    """What no operator shows, a kernel's own scratch, would show here: one 8,000 x 8,000 map alone is 256 MB."""
    program = """
import re, sys, torch, plm
torch.set_num_threads(1)
model = plm.load(sys.argv[1])
for length in (500, 2000, 4000, 8000):
    plm.embed(model, "MK" * (length // 2))
    # not getrusage: its maximum starts from the parent's memory
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    told = subprocess.run(
        [sys.executable, "-c", program, golden / "esm" / "esm2_tiny"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    _, short, middle, long = (int(line) / 1024 for line in told.stdout.split())
    # In MB: 7 and 10 are seen for 2,000 and 4,000 residues more; a single map of this length would add 256.
    assert middle - short < 30 and long - short < 60, (short, middle, long)
