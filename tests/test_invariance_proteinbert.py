"""ProteinBERT gives a protein the same numbers alone or in any batch and any order.

In float32 on a CPU "the same" means the same bits where a batch is as wide as the protein alone: padded to a given
number of tokens, or among proteins of its own length. In a wider batch, in which its pads do not exist, it means within
rounding: how oneDNN and a softmax cut a row into steps depends on its width.
"""

import copy

import pytest
import torch
from oracle_proteinbert import Twin
from parity import Outputs, differences, rms
from stored_proteinbert import build, numbered
from torch import Tensor

from plm.models.proteinbert import Config, ProteinBERT
from plm.packing import Packed
from plm_kernels import filters_available

LENGTHS = (1, 48, 33, 11, 33, 20, 48, 33, 2, 5, 2, 48)
SIZES = {
    "narrow": Twin(3, 16, 24, 4, 8, 9, 5, 37, LENGTHS, 60, seed=1),
    "as wide as the published one": Twin(2, 128, 512, 4, 64, 9, 5, 100, LENGTHS, 60, seed=2),
}
each_size = pytest.mark.parametrize("twin", SIZES.values(), ids=SIZES.keys())
needs_packing = pytest.mark.skipif(
    not filters_available(torch.float32), reason="this torch cannot pack weights: no promise of bits"
)


def net_of(twin: Twin, dtype: torch.dtype) -> ProteinBERT:
    return build(numbered(twin.weights()), twin.config, dtype)


def rows_of(twin: Twin) -> tuple[list[Tensor], Tensor]:
    """Tokens of each protein, and its annotations."""
    tokens, annotations = twin.batch()
    return [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)], annotations


@torch.no_grad()
def encode(net: ProteinBERT, twin: Twin, groups: list[list[int]], pad_to: int | None) -> Outputs:
    """Both tracks for all proteins, a batch per group of them, in input order."""
    rows, annotations = rows_of(twin)
    local: dict[int, Tensor] = {}
    both: dict[int, Tensor] = {}
    for group in groups:
        batch = Packed.from_ids([rows[i] for i in group])
        found = net.encode(batch, annotations=annotations[group], pad_to=pad_to)
        local.update(zip(group, batch.split(found.hidden), strict=True))
        both.update(zip(group, found.global_, strict=True))
    return {"local": [local[i] for i in range(len(rows))], "global": [both[i] for i in range(len(rows))]}


ALONE = [[i] for i in range(len(LENGTHS))]
ORDER = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1)).tolist()
MIXED = [[list(range(len(LENGTHS)))], [ORDER], [ORDER[:5], ORDER[5:6], ORDER[6:]]]
EQUAL = [[i for i, each in enumerate(LENGTHS) if each == length] for length in sorted(set(LENGTHS))]


def assert_same_bits(found: Outputs, wanted: Outputs) -> None:
    for name in wanted:
        for i, (ours, single) in enumerate(zip(found[name], wanted[name], strict=True)):
            assert torch.equal(ours, single), f"{name} of {LENGTHS[i]} tokens: {(ours - single).abs().max()}"


@needs_packing
@each_size
def test_same_bits_padded_in_float32(twin: Twin) -> None:
    """Both tracks at a given padded length, in any batch."""
    net = net_of(twin, torch.float32)
    wanted = encode(net, twin, ALONE, pad_to=60)
    for groups in MIXED:
        assert_same_bits(encode(net, twin, groups, pad_to=60), wanted)


@needs_packing
@each_size
def test_same_bits_among_equal_lengths_in_float32(twin: Twin) -> None:
    """Without pads, in batches of one length each."""
    net = net_of(twin, torch.float32)
    assert max(map(len, EQUAL)) == 3
    assert_same_bits(encode(net, twin, EQUAL, None), encode(net, twin, ALONE, None))
    assert_same_bits(encode(net, twin, [group[::-1] for group in EQUAL], None), encode(net, twin, ALONE, None))


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_lengths_within_rounding(twin: Twin, dtype: torch.dtype) -> None:
    """Without pads in a batch of several lengths."""
    single = encode(net_of(twin, dtype), twin, ALONE, None)
    truth = encode(net_of(twin, dtype).double(), twin, ALONE, None)
    floor = rms(differences(single, truth))
    for groups in MIXED:
        for name, change in rms(differences(encode(net_of(twin, dtype), twin, groups, None), single)).items():
            # The noise floor is the rounding of this dtype, against the same weights in float64. In float32 0.4 of it
            # is seen (3e-6 at most), in bfloat16 nothing.
            assert change <= floor[name], (name, change, floor[name])


@each_size
@pytest.mark.parametrize("pad_to", [None, 60])
def test_float64_within_its_rounding(twin: Twin, pad_to: int | None) -> None:
    """Where nothing is packed, a product's order of summing depends on the number of rows."""
    net = net_of(twin, torch.float64)
    single = encode(net, twin, ALONE, pad_to)
    for groups in MIXED:
        for change in differences(encode(net, twin, groups, pad_to), single).values():
            # 5,000 times the spacing of float64 at 1; 65 times that spacing is seen.
            assert change.abs().max() < 1e-12


def test_a_neighbour_changes_nothing() -> None:
    """Not even one whose numbers are infinite; nor what stands in the place of a protein's pads."""
    twin = SIZES["narrow"]
    net = net_of(twin, torch.float64)
    net.embed.weight.data[24] = torch.inf
    tokens = torch.randint(24, (3, 48), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([48, 30, 48])
    tokens[0] = 24
    with torch.no_grad():
        out = net(tokens, lengths=lengths)
        tokens[1, 30:] = 7
        same = net(tokens, lengths=lengths)
    assert not out.local[0].isfinite().any() and out.local[2].isfinite().all() and out.global_[1:].isfinite().all()
    assert torch.equal(same.local[1, :30], out.local[1, :30]) and torch.equal(same.global_[1], out.global_[1])


@pytest.mark.parametrize("residues", [10, 16])
def test_prediction_after_fused_training_on_short_proteins(residues: int) -> None:
    """Taps that no protein reaches are not trained, fused optimizers count no versions: packed weights still follow."""
    torch.manual_seed(0)
    net = ProteinBERT(Config(26, 20, layers=2, channels=32, global_channels=64, heads=4, key_size=16))
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    tokens = torch.randint(0, 22, (4, residues))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    with torch.no_grad():
        before = net(tokens).local
    for _ in range(5):
        optimizer.zero_grad()
        net(tokens).local_logits.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        found, fresh = net(tokens).local, copy.deepcopy(net)(tokens).local
    assert not torch.allclose(found, before) and torch.equal(found, fresh)
