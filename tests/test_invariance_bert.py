"""BERT gives a protein the same numbers alone or in any batch and any order.

In float32 on a CPU "the same" means the same bits, as in test_invariance.py and for the same reasons.
"""

from collections.abc import Iterator

import pytest
import torch
from oracle_bert import CASES, GOLDEN, load_bert, randomise, run_ours
from parity import Outputs, differences, rms
from torch import Tensor

from plm.models.bert import BERT, Config
from plm.packing import Packed, batches
from plm_kernels import packing_available

LENGTHS = (1, 48, 33, 11, 33, 20, 48, 33, 1, 5, 2, 48)  # equal lengths go through attention together
NARROW = Config(30, 3, 64, 4, 256, positions=48, types=2, pooler=True, relation_head=True)
WIDE = Config(30, 1, 1024, 16, 4096, positions=48, types=2, pooler=True, relation_head=True)  # a layer of ProtBert's

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def random_net(config: Config, dtype: torch.dtype = torch.float32) -> BERT:
    """Weights of ordinary size, drawn in float32 and rounded to ``dtype``."""
    net = BERT(config).requires_grad_(False).eval()
    randomise(net, seed=0)
    return net.to(dtype)


def random_rows() -> list[Tensor]:
    """Ids and types of each sequence ``[2, t]``, of one chain or two."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(5, 30, (length,), generator=generator)
        ids[length // 2] = 3  # [SEP], between two chains
        rows.append(torch.stack([ids, (torch.arange(length) > length // 2).long()]))
    return rows


def outputs(net: BERT, rows: list[Tensor], groups: list[list[int]]) -> Outputs:
    """All outputs for all rows, a batch per group of them, in input order."""
    found: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        batch = Packed.from_ids([rows[i][0] for i in group])
        for name, tensors in run_ours(net, batch, torch.cat([rows[i][1] for i in group])).items():
            found.setdefault(name, {}).update(zip(group, tensors, strict=True))
    return {name: [tensors[i] for i in range(len(rows))] for name, tensors in found.items()}


def alone(net: BERT, rows: list[Tensor]) -> Outputs:
    return outputs(net, rows, [[i] for i in range(len(rows))])


def regroupings(net: BERT, rows: list[Tensor]) -> Iterator[Outputs]:
    """The same in one batch as they come, in another order, and longest first in batches of a few."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    few = list(batches(LENGTHS, 60))
    assert len(few) > 3 and any(len(group) > 1 for group in few)
    for groups in ([list(range(len(rows)))], [order], few):
        yield outputs(net, rows, groups)


def assert_same_bits(net: BERT) -> None:
    rows = random_rows()
    wanted = alone(net, rows)
    assert {"logits", "pooled", "relation_logits", "attentions"} < wanted.keys()
    for found in regroupings(net, rows):
        assert found.keys() == wanted.keys()
        for name, tensors in wanted.items():
            for ours, single in zip(found[name], tensors, strict=True):
                assert torch.equal(ours, single), f"{name} of shape {[*single.shape]}: {(ours - single).abs().max()}"


@needs_packing
@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "as wide as ProtBert"])
def test_same_bits_in_float32(config: Config) -> None:
    """Every hidden state, attention map, logit and pooled vector."""
    assert_same_bits(random_net(config))


@needs_packing
@pytest.mark.parametrize("name", CASES)
def test_same_bits_of_stored_checkpoints(name: str) -> None:
    assert_same_bits(load_bert(GOLDEN / name, torch.float32))


def test_bfloat16_within_its_rounding() -> None:
    """oneDNN cuts a bfloat16 product into blocks along the inner dimension, and how depends on the number of rows."""
    net, rows = random_net(NARROW, torch.bfloat16), random_rows()
    single = alone(net, rows)
    floor = rms(differences(single, alone(net.double(), rows)))
    net = random_net(NARROW, torch.bfloat16)
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
            # 5,000 times the spacing of float64 at 1; twice that spacing is seen.
            assert change.abs().max() < 1e-12


def test_a_neighbour_changes_nothing() -> None:
    """Not even one whose numbers are infinite: attention never looks past a sequence."""
    net, rows = random_net(NARROW, torch.float64), random_rows()
    net.embed.weight[1] = torch.inf
    ids = [rows[1][0], torch.ones_like(rows[1][0]), rows[2][0]]
    first, broken, last = Packed.from_ids(ids).split(net.encode(Packed.from_ids(ids)).hidden)
    assert not broken.isfinite().any() and first.isfinite().all() and last.isfinite().all()
