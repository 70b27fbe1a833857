"""ProGen2 gives a protein the same numbers alone or in any batch and any order; and a text those of its beginning.

In float32 on a CPU "the same" means the same bits, as in test_invariance.py and for the same reasons. Writing is in the
tests of generation.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from oracle_progen2 import CASES, GOLDEN, load, randomise, run_ours
from parity import Outputs, differences, largest, rms
from torch import Tensor

import plm
import plm_kernels
from plm.models import progen2
from plm.models.progen2 import Config, ProGen2
from plm.packing import Packed, batches
from plm_kernels import packing_available

LENGTHS = (1, 48, 33, 11, 33, 20, 48, 33, 1, 5, 2, 48)  # equal lengths go through attention together
# As all published ones, the feed-forward layers are multiples of 16 wide: a GELU's vector unit and its scalar tail may
# differ in the last bit, and where the tail is depends on the batch.
NARROW = Config(32, 32, 3, 64, 8, 4, 256, max_length=80)
WIDE = Config(32, 32, 1, 1024, 16, 32, 4096, max_length=80)  # a layer of ProGen2-small
LARGE = Config(64, 64, 1, 2560, 32, 64, 1280, max_length=80)  # of ProGen2-large, an eighth of the width between

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def random_net(config: Config, dtype: torch.dtype = torch.float32) -> ProGen2:
    """Weights of ordinary size, drawn in float32 and rounded to ``dtype``."""
    net = ProGen2(config).requires_grad_(False).eval()
    randomise(net, seed=0)
    return net.to(dtype)


def random_rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(30, (length,), generator=generator) for length in lengths]


def outputs(net: ProGen2, rows: list[Tensor], groups: list[list[int]]) -> Outputs:
    """All outputs for all rows, a batch per group of them, in input order."""
    found: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        for name, tensors in run_ours(net, Packed.from_ids([rows[i] for i in group])).items():
            found.setdefault(name, {}).update(zip(group, tensors, strict=True))
    return {name: [tensors[i] for i in range(len(rows))] for name, tensors in found.items()}


def alone(net: ProGen2, rows: list[Tensor]) -> Outputs:
    return outputs(net, rows, [[i] for i in range(len(rows))])


def regroupings(net: ProGen2, rows: list[Tensor]) -> Iterator[Outputs]:
    """The same in one batch as they come, in another order, and longest first in batches of a few."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    few = list(batches([len(row) for row in rows], 60))
    assert len(few) > 3 and any(len(group) > 1 for group in few)
    for groups in ([list(range(len(rows)))], [order], few):
        yield outputs(net, rows, groups)


def assert_same_bits(net: ProGen2) -> None:
    rows = random_rows()
    wanted = alone(net, rows)
    assert {"logits", "attentions", "keys.0", "values.0"} < wanted.keys()
    for found in regroupings(net, rows):
        assert found.keys() == wanted.keys()
        for name, tensors in wanted.items():
            for ours, single in zip(found[name], tensors, strict=True):
                assert torch.equal(ours, single), f"{name} of shape {[*single.shape]}: {(ours - single).abs().max()}"


@needs_packing
@pytest.mark.parametrize("config", [NARROW, WIDE, LARGE], ids=["narrow", "as wide as small", "as wide as large"])
def test_same_bits_in_float32(config: Config) -> None:
    """Every hidden state, attention map, logit, key and value."""
    assert_same_bits(random_net(config))


@needs_packing
@pytest.mark.parametrize("name", CASES)
def test_same_bits_of_stored_checkpoints(name: str) -> None:
    assert_same_bits(load(GOLDEN / name, "float32"))


def test_bfloat16_within_its_rounding() -> None:
    """oneDNN cuts a bfloat16 product into blocks along the inner dimension, and how depends on the number of rows."""
    rows = random_rows()
    net = random_net(NARROW, torch.bfloat16)
    single = alone(net, rows)
    floor = rms(differences(single, alone(random_net(NARROW, torch.bfloat16).double(), rows)))
    for found in regroupings(net, rows):
        for name, change in rms(differences(found, single)).items():
            # The noise floor is the rounding of bfloat16, against the same weights in float64. None of it is seen here.
            assert change <= floor[name], (name, change, floor[name])


def test_float64_within_its_rounding() -> None:
    """oneDNN packs no float64, so a product's order of summing depends on the number of rows."""
    net, rows = random_net(NARROW, torch.float64), random_rows()
    single = alone(net, rows)
    for found in regroupings(net, rows):
        for change in differences(found, single).values():
            # 5,000 times the spacing of float64 at 1; 30 times that spacing is seen.
            assert change.abs().max() < 1e-12


def beginnings(net: ProGen2, row: Tensor) -> Iterator[tuple[Outputs, Outputs]]:
    """What is computed from the first tokens of a text alone, and what of the whole text belongs to them."""
    whole = run_ours(net, Packed.from_ids([row]))
    whole.pop("attentions")
    for length in (1, 2, 17, 33, 47):
        yield run_ours(net, Packed.from_ids([row[:length]])), {name: [x[0][:length]] for name, x in whole.items()}


def test_what_follows_changes_nothing() -> None:
    """The logits, states, keys and values of a prompt are those of every text that begins with it."""
    row = random_rows()[1]
    for found, wanted in beginnings(random_net(NARROW, torch.float64), row):
        # 5,000 times the spacing of float64 at 1; 50 times that spacing is seen.
        assert largest(differences(found, wanted)) < 1e-12
    net = random_net(NARROW)
    floor = rms(differences(alone(net, [row]), alone(random_net(NARROW).double(), [row])))
    for found, wanted in beginnings(net, row):
        for name, change in rms(differences(found, wanted)).items():
            # The noise floor is the rounding of float32: attention adds up a longer row in another order.
            assert change <= floor[name], (name, change, floor[name])


@torch.no_grad()
@pytest.mark.parametrize("backend", ["segments", "dense", "reference"])
def test_another_end_changes_no_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one length that part at some token are alike before it, to the last bit, on every backend of a CPU."""
    monkeypatch.setattr(progen2, "attention", partial(plm_kernels.attention, backend=backend))
    net, row = random_net(NARROW), random_rows()[1]
    wanted = net(Packed.from_ids([row])).logits
    for length in (1, 2, 17, 33, 47):
        other = torch.cat((row[:length], (row[length:] + 1) % 30))
        found = net(Packed.from_ids([other])).logits
        assert torch.equal(found[:length], wanted[:length])
        assert (found[length:] - wanted[length:]).abs().amax(1).min() > 1e-3


def test_a_neighbour_changes_nothing() -> None:
    """Not even one whose numbers are infinite: attention never looks past a sequence."""
    net, rows = random_net(NARROW, torch.float64), random_rows()
    net.embed.weight[31] = torch.inf
    batch = Packed.from_ids([rows[1], torch.full_like(rows[1], 31), rows[2]])
    first, broken, last = batch.split(net.encode(batch).hidden)
    assert not broken.isfinite().any() and first.isfinite().all() and last.isfinite().all()


@needs_packing
@pytest.mark.parametrize("name", CASES[:2])
def test_same_bits_of_every_pool_and_layer(name: str) -> None:
    model = plm.load(GOLDEN / name, dtype="float32")
    proteins = [model.tokenizer.decode(row % 25 + 5) for row in random_rows((1, 40, 33, 7, 33, 40, 2, 33))]
    for layer in range(model.net.config.layers + 1):
        for pool in (None, "mean", "max"):
            alone = [plm.embed(model, protein, layer=layer, pool=pool)[0] for protein in proteins]
            for max_tokens in (1, 80, None):
                found = plm.embed(model, proteins[::-1], layer=layer, pool=pool, max_tokens=max_tokens)
                assert all(map(torch.equal, found[::-1], alone)), (layer, pool, max_tokens)
