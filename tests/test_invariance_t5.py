"""T5 gives a protein the same numbers alone or in any batch and any order, in memory that grows with its length.

In float32 on a CPU "the same" means the same bits, as in test_invariance.py and for the same reasons. Writing is in
test_cache.py.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle_t5 import CASES, GOLDEN, randomise, run_ours
from parity import Outputs, differences, rms
from torch import Tensor

import plm
from plm.models.t5 import T5, Config
from plm.packing import Packed, batches
from plm_kernels import packing_available

LENGTHS = (1, 148, 33, 11, 33, 20, 148, 33, 1, 5, 2, 148)  # equal lengths go through attention together
WRITTEN = (2, 30, 9, 9, 33, 1, 30, 8, 140, 5, 2, 7)
NARROW = Config(40, 3, 2, 64, 4, 16, 256, "gated-silu", buckets=64, tied=False)
ANKH3 = Config(256, 1, 1, 1536, 16, 64, 3840, "gated-silu", buckets=64, tied=False)  # layers of Ankh3 large
PROTT5 = Config(128, 1, 1, 1024, 32, 128, 2048, "relu")  # layers of ProtT5, an eighth of the width between

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def random_net(config: Config, dtype: torch.dtype = torch.float32) -> T5:
    """Weights of ordinary size, drawn in float32 and rounded to ``dtype``."""
    net = T5(config).requires_grad_(False).eval()
    randomise(net, seed=0)
    return net.to(dtype)


def random_rows(vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Ids of the encoder and of the decoder for each sequence."""
    generator = torch.Generator().manual_seed(0)
    pairs = zip(LENGTHS, WRITTEN, strict=True)
    return [tuple(torch.randint(vocabulary, (x,), generator=generator) for x in pair) for pair in pairs]  # type: ignore[misc]


def outputs(net: T5, rows: list[tuple[Tensor, Tensor]], groups: list[list[int]]) -> Outputs:
    """All outputs for all rows, a batch per group of them, in input order."""
    found: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        batch, decoder = (Packed.from_ids([rows[i][which] for i in group]) for which in (0, 1))
        for name, tensors in run_ours(net, batch, decoder).items():
            found.setdefault(name, {}).update(zip(group, tensors, strict=True))
    return {name: [tensors[i] for i in range(len(rows))] for name, tensors in found.items()}


def alone(net: T5, rows: list[tuple[Tensor, Tensor]]) -> Outputs:
    return outputs(net, rows, [[i] for i in range(len(rows))])


def regroupings(net: T5, rows: list[tuple[Tensor, Tensor]]) -> Iterator[Outputs]:
    """The same in one batch as they come, in another order, and longest first in batches of a few."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    few = list(batches(LENGTHS, 160))
    assert len(few) > 3 and any(len(group) > 1 for group in few)
    for groups in ([list(range(len(rows)))], [order], few):
        yield outputs(net, rows, groups)


def assert_same_bits(net: T5) -> None:
    rows = random_rows(net.config.vocabulary)
    wanted = alone(net, rows)
    assert {"logits", "encoder.0", "decoder.1", "cross.attentions"} < wanted.keys()
    for found in regroupings(net, rows):
        assert found.keys() == wanted.keys()
        for name, tensors in wanted.items():
            for ours, single in zip(found[name], tensors, strict=True):
                assert torch.equal(ours, single), f"{name} of shape {[*single.shape]}: {(ours - single).abs().max()}"


@needs_packing
@pytest.mark.parametrize("config", [NARROW, ANKH3, PROTT5], ids=["narrow", "as wide as Ankh3", "as wide as ProtT5"])
def test_same_bits_in_float32(config: Config) -> None:
    """Every hidden state of both stacks, attention map and logit."""
    assert_same_bits(random_net(config))


@needs_packing
@pytest.mark.parametrize("name", CASES)
def test_same_bits_of_stored_checkpoints(name: str) -> None:
    net = plm.load(GOLDEN / name, dtype="float32").net
    assert isinstance(net, T5)
    assert_same_bits(net)


def test_bfloat16_within_its_rounding() -> None:
    """oneDNN cuts a bfloat16 product into blocks along the inner dimension, and how depends on the number of rows."""
    rows = random_rows(NARROW.vocabulary)
    net = random_net(NARROW, torch.bfloat16)
    single = alone(net, rows)
    floor = rms(differences(single, alone(random_net(NARROW, torch.bfloat16).double(), rows)))
    for found in regroupings(net, rows):
        for name, change in rms(differences(found, single)).items():
            # The noise floor is the rounding of bfloat16, against the same weights in float64.
            assert change <= floor[name], (name, change, floor[name])


@pytest.mark.parametrize("name", CASES)
def test_the_error_of_bfloat16(name: str) -> None:
    """Root mean square, relative to the values: about 1 % of the last hidden states, the logits and attention maps."""
    nets = [plm.load(GOLDEN / name, dtype=dtype).net for dtype in ("bfloat16", "float64")]
    rows = random_rows(nets[0].config.vocabulary)
    ours, truth = (alone(net, rows) for net in nets)
    size = rms({output: torch.cat([x.flatten() for x in tensors]) for output, tensors in truth.items()})
    for output, error in rms(differences(ours, truth)).items():
        # One rounding to bfloat16's 8 bits is 0.17 % (of the embeddings); 2 to 6 layers of them are up to 1.2 %.
        assert error < 0.02 * size[output], (output, error / size[output])


def test_float64_within_its_rounding() -> None:
    """oneDNN packs no float64, so a product's order of summing depends on the number of rows."""
    net, rows = random_net(NARROW, torch.float64), random_rows(NARROW.vocabulary)
    single = alone(net, rows)
    for found in regroupings(net, rows):
        for change in differences(found, single).values():
            # 5,000 times the spacing of float64 at 1; 30 times that spacing is seen.
            assert change.abs().max() < 1e-12


def test_a_neighbour_changes_nothing() -> None:
    """Not even one whose numbers are infinite: neither attention looks past a sequence, nor past its prompt."""
    net, rows = random_net(NARROW, torch.float64), random_rows(NARROW.vocabulary)
    net.embed.weight[39] = torch.inf
    rows = [tuple(x.clamp(max=38) for x in row) for row in rows[1:4]]  # type: ignore[misc]
    for broken_prompt in (True, False):
        prompt, text = rows[1]
        rows[1] = (torch.full_like(prompt, 39 if broken_prompt else 3), text if broken_prompt else text * 0 + 39)
        batch, decoder = (Packed.from_ids([row[which] for row in rows]) for which in (0, 1))
        out = net(batch, decoder=decoder)
        first, broken, last = decoder.split(out.logits)
        assert not broken.isfinite().any() and first.isfinite().all() and last.isfinite().all()
        assert [bool(x.isfinite().all()) for x in batch.split(out.encoder_hidden)] == [True, not broken_prompt, True]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a process is read as Linux tells it")
@pytest.mark.parametrize("name", CASES)
def test_peak_memory_is_linear_in_length(name: str) -> None:
    """What no operator shows, a kernel's own scratch, would show here: one 6,000 x 6,000 map alone is 144 MB."""
    program = """
import re, sys, torch, plm
torch.set_num_threads(1)
model = plm.load(sys.argv[1])
for length in (500, 1500, 3000, 6000):
    plm.embed(model, "MK" * (length // 2))
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    told = subprocess.run(
        [sys.executable, "-c", program, GOLDEN / name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    _, short, middle, long = (int(line) / 1024 for line in told.stdout.split())
    # In MB: 7 and 12 are seen for 1,500 and 3,000 residues more.
    assert middle - short < 30 and long - middle < 60, (short, middle, long)
