"""ProteinBERT against stored truths: what nadavbra/protein_bert computes in float64 from tiny random weights.

``tiny_2blocks`` has every step within the blocks, losses and gradients; ``padding_3blocks`` the same proteins at three
padded lengths and with annotations. Every number of either is compared. How exact the original is in float32 was
measured on the same inputs (tests/golden/make_errors_proteinbert.py).
"""

import json
import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import differences, rms
from safetensors.torch import load_file
from stored_proteinbert import (
    CASES,
    FINE,
    GOLDEN,
    Case,
    keras_list,
    load,
    losses_and_gradients,
    numbered,
    settings,
    with_changes,
)
from torch import Tensor

from plm.models.proteinbert import Config, ProteinBERT, pretraining_loss
from plm.packing import Packed
from plm_weights import export_weights
from plm_weights.proteinbert import published_rows

# Two float64 programs that add in another order differ by 2e-14 here (measured), where numbers are about 3.
FLOAT64 = 1e-12
PAD = 25
PUBLISHED = Config(26, 8943, 6, 128, 512, 4, 64)
STEPS = {"narrow_conv", "wide_conv", "global_to_local", "global_dense1"}  # stored of one case only
PARTS = {"local_mid", "local", "global_mid", "global", "attention_weights", "attention_output"}
HEADS = {f"{track}_{kind}" for track in ("seq", "annotation") for kind in ("logits", "probs")}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def fine() -> Case:
    return CASES["tiny"]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


def floors(name: str) -> dict[str, dict[str, float]]:
    """The original's errors in float32, the largest and the root mean square of every output, loss and gradient."""
    told = json.loads((GOLDEN / "float32_errors.json").read_text())
    return told["tiny_2blocks" if name == "tiny" else f"padding_3blocks.{name}"]  # type: ignore[no-any-return]


def test_every_tensor_in_float64(case: Case) -> None:
    """Logits, probabilities, both concatenations, embeddings, and the steps within every block."""
    assert case.error_of(case.net()) < FLOAT64


def test_nothing_stored_is_left_out(case: Case) -> None:
    """The tests of this file name every stored tensor."""
    fine = case is CASES["tiny"]
    blocks = range(1, len(case.net().blocks) + 1)
    wanted = {f"block{b}.{name}" for b in blocks for name in (PARTS | STEPS if fine else PARTS)}
    wanted |= HEADS | {"local_representations", "global_representations", "embedding.local", "embedding.global"}
    assert case.truth().keys() == wanted
    assert case.expected.keys() - wanted == ({"loss.total", "loss.sequence", "loss.annotations"} if fine else set())


def test_concatenations_in_float32(case: Case) -> None:
    """At most twice the largest error of the original in float32, which the stored truths came with."""
    found = differences(case.outputs(case.net(torch.float32)), case.truth())
    assert case.float32_errors.keys() == {"local_representations", "global_representations"}
    for name, floor in case.float32_errors.items():
        # The noise floor is the original's own error in float32: 1e-6 to 5e-6. Ours is 0.7 to 1.5 times that.
        assert found[name].abs().max() <= 2 * floor, name


def test_every_output_in_float32() -> None:
    """At most twice the root mean square error of the original, of each kind of output over all cases and blocks."""
    ours: defaultdict[str, list[float]] = defaultdict(list)
    theirs: defaultdict[str, list[float]] = defaultdict(list)
    for name, case in CASES.items():
        floor = floors(name)
        for output, error in differences(case.outputs(case.net(torch.float32)), case.truth()).items():
            kind = output.split(".")[-1] if output.startswith("block") else output
            ours[kind].append(error.norm().item())
            theirs[kind].append(floor[output]["rms"] * math.sqrt(len(error)))
    assert len(ours) == len(PARTS | STEPS | HEADS) + 4
    for kind, errors in ours.items():
        # The noise floor is the original's own error in float32; ours is 0.8 to 1.1 times that.
        assert math.hypot(*errors) <= 2 * math.hypot(*theirs[kind]), kind


def test_the_error_of_bfloat16(case: Case) -> None:
    """Root mean square, relative to the values."""
    truth = case.truth()
    size = rms({name: x for name, (x,) in truth.items()})
    for name, error in rms(differences(case.outputs(case.net(torch.bfloat16)), truth)).items():
        # One rounding to bfloat16's 8 bits is 0.17 % (of the embeddings); 2 or 3 blocks of them are up to 1.8 %.
        assert error < 0.03 * size[name], (name, error / size[name])


# Losses and gradients


def test_losses_and_every_gradient_in_float64(fine: Case) -> None:
    """The gradient of the sum of both losses by every weight, in Keras' order and layout."""
    losses, gradients = losses_and_gradients(fine.net(), fine)
    for name, loss in losses.items():
        same(loss[None], fine.expected[f"loss.{name}"])
    wanted = load_file(FINE / "gradients.safetensors")
    assert {f"grad.{name}" for name in gradients} == wanted.keys()
    for name, gradient in gradients.items():
        assert wanted[f"grad.{name}"].abs().max() > 1e-3  # there is something to compare
        # Gradients are at most 0.14, and two float64 programs differ by 2e-16 (measured).
        torch.testing.assert_close(gradient, wanted[f"grad.{name}"], rtol=0, atol=1e-14, msg=name)


def test_losses_and_every_gradient_in_float32(fine: Case) -> None:
    """Losses within two of the last digits; gradients at most twice as far off as the original's, each counting alike,
    and none by more than four times: many have 12 to 26 numbers, too few for a steady mean."""
    floor = floors("tiny")
    losses, gradients = losses_and_gradients(fine.net(torch.float32), fine)
    for name, loss in losses.items():
        wanted = fine.expected[f"loss.{name}"][0]
        # The noise floor is the spacing of float32 at the loss; ours and the original's are within one of it.
        assert (loss.double() - wanted).abs() <= 2 * torch.finfo(torch.float32).eps * wanted, name
    truth = load_file(FINE / "gradients.safetensors")
    found = rms({name: x.double() - truth[f"grad.{name}"] for name, x in gradients.items()})
    # The noise floor is the original's own error in float32, of each gradient; ours is 0.7 to 2.3 times that, in the
    # mean 1.3.
    ratios = torch.tensor([error / floor[f"grad.{name}"]["rms"] for name, error in found.items()])
    assert len(ratios) == 53 and ratios.square().mean().sqrt() <= 2 and ratios.max() <= 4


# Named parts of the concatenations


def test_the_published_widths() -> None:
    """1,562 and 15,599 numbers, in which "the embedding" of 512 has its place."""
    local, both = PUBLISHED.local_slices, PUBLISHED.global_slices
    assert local["letters"].stop == 1562 and both["annotations"].stop == 15599
    assert local["block6"] == slice(1408, 1536) and local["block1.mid"] == slice(0, 128)
    assert both["annotations_in"] == slice(0, 512) and both["block6"] == slice(6144, 6656)
    for slices in (local, both):
        starts = [part.start for part in slices.values()]
        assert starts == [0, *(part.stop for part in slices.values())][:-1]


def test_every_named_part(case: Case) -> None:
    """Each slice of a concatenation is the stored tensor that its name promises."""
    config = case.net().config
    for i in range(1, config.layers + 1):
        for track, slices in (("local", config.local_slices), ("global", config.global_slices)):
            whole = case.expected[f"{track}_representations"]
            assert torch.equal(whole[..., slices[f"block{i}.mid"]], case.expected[f"block{i}.{track}_mid"])
            assert torch.equal(whole[..., slices[f"block{i}"]], case.expected[f"block{i}.{track}"])
    local, both = case.expected["local_representations"], case.expected["global_representations"]
    assert torch.equal(local[..., config.local_slices["letters"]], case.expected["seq_probs"])
    assert torch.equal(both[:, config.global_slices["annotations_in"]], case.expected["embedding.global"])
    assert torch.equal(both[:, config.global_slices["annotations"]], case.expected["annotation_probs"])
    assert len(config.local_slices) == len(config.global_slices) - 1 == 2 * config.layers + 1


# What is asked for


def test_what_is_not_asked_for_is_not_there(fine: Case) -> None:
    net = fine.net()
    out = net(fine.tokens, fine.annotations.double(), local_logits=False, annotation_logits=False)
    assert (out.local_logits, out.annotation_logits, out.local_states, out.global_states, out.attentions) == (None,) * 5
    with pytest.raises(ValueError, match="need hidden_states=True and local_logits=True"):
        out.local_representations  # noqa: B018
    with pytest.raises(ValueError, match="need hidden_states=True and annotation_logits=True"):
        out.global_representations  # noqa: B018


def test_annotations_of_another_shape(fine: Case) -> None:
    net = fine.net()
    for shape in ([4, 13], [5, 12], [13]):
        with pytest.raises(ValueError, match=rf"must have shape \[5, 13\], one row per protein; got \{shape}"):
            net(fine.tokens, torch.zeros(shape).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_annotations_are_zeros(fine: Case, dtype: torch.dtype) -> None:
    """Where none are given nothing is multiplied, and the numbers are the same."""
    net = fine.net(dtype)
    zeros = torch.zeros_like(fine.annotations)
    with torch.no_grad():
        wanted = net.annotations_in(zeros.to(dtype), "gelu")
        for given in (None, zeros, zeros.int()):
            found = net.embed_annotations(given, len(zeros))
            # A product with zeros adds nothing, so that only the GELU's last digit may be another.
            torch.testing.assert_close(found, wanted, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_the_gradient_by_zero_annotations_is_zero(fine: Case) -> None:
    """It is there, so that an optimizer sees the weight; where no annotations are given at all, it is missing."""
    net = fine.net()
    net(fine.tokens, torch.zeros_like(fine.annotations)).global_.sum().backward()
    assert torch.count_nonzero(net.annotations_in.weight.grad) == 0 < net.annotations_in.bias.grad.abs().sum()


@torch.no_grad()
def test_encode_up_to_each_block(case: Case) -> None:
    """``layer`` counts blocks; the last global state may be spared, and the first of its block comes instead."""
    net = case.net()
    real = case.tokens != PAD
    batch = Packed.from_padded(case.tokens, real)
    for layer in range(net.config.layers + 1):
        stored = f"block{layer}" if layer else "embedding"
        given = {"annotations": case.annotations, "layer": layer, "pad_to": case.tokens.shape[1]}
        found = net.encode(batch, **given)
        same(found.hidden, case.expected[f"{stored}.local"][real])
        same(found.global_, case.expected[f"{stored}.global"])
        spared = net.encode(batch, **given, global_=False)
        assert torch.equal(spared.hidden, found.hidden)
        if layer > 1:
            same(spared.global_, case.expected[f"block{layer - 1}.global"])


# Padding


@torch.no_grad()
def test_other_paddings_are_other_numbers() -> None:
    """The second protein at 19, 42 and 64 tokens, of which 19 are its own: the original's differences, and ours."""
    cases = [CASES["g3"], CASES["g0"], CASES["g1"]]
    assert not any(case.annotations.any() for case in cases)
    theirs, ours = [], []
    for case in cases:
        row = len(case.tokens) // 2  # of three, or the only one
        assert torch.equal(case.tokens[row, :19], CASES["g3"].tokens[0])
        theirs.append(case.expected["local_representations"][row, :19])
        ours.append(case.net()(case.tokens, hidden_states=True).local_representations[row, :19])
    for i, j, told in ((0, 1, 4.5251), (0, 2, 4.6788), (1, 2, 1.7229)):
        assert (theirs[i] - theirs[j]).abs().max().item() == pytest.approx(told, abs=1e-4)
        same(ours[i] - ours[j], theirs[i] - theirs[j])


@torch.no_grad()
def test_encode_padded_as_the_original() -> None:
    """``pad_to`` gives the stored numbers of this padded length, whatever the batch is."""
    g0, g1 = CASES["g0"], CASES["g1"]
    net = g0.net()
    batch = Packed.from_padded(g0.tokens, g0.tokens != PAD)
    for case, width in ((g0, 42), (g1, 64)):
        found = net.encode(batch, pad_to=width)
        same(found.hidden, case.expected["block3.local"][case.tokens != PAD])
        same(found.global_, case.expected["block3.global"])
        alone = net.encode(Packed.from_ids([batch.split(batch.tokens)[1]]), pad_to=width)
        same(alone.hidden, case.expected["block3.local"][1, :19])
    with pytest.raises(ValueError, match="a sequence has 42 tokens, more than pad_to=41; pad to more"):
        net.encode(batch, pad_to=41)


@torch.no_grad()
def test_encode_without_pads() -> None:
    """In a mixed batch a protein has the numbers of its own length, which are stored of one of them."""
    g0, g3 = CASES["g0"], CASES["g3"]
    net = g0.net()
    batch = Packed.from_padded(g0.tokens, g0.tokens != PAD)
    found = net.encode(batch)
    same(batch.split(found.hidden)[1], g3.expected["block3.local"][0])
    same(found.global_[1], g3.expected["block3.global"][0])
    lengths = torch.tensor(batch.lengths)
    out = net(g0.tokens, lengths=lengths, hidden_states=True, attentions=True)
    same(out.local_representations[1, :19], g3.expected["local_representations"][0])
    same(out.global_representations[1], g3.expected["global_representations"][0])
    for i, weights in enumerate(out.attentions, start=1):
        same(weights[1, :, :19], g3.expected[f"block{i}.attention_weights"][0])
        assert torch.count_nonzero(weights[1, :, 19:]) == 0


# The comparison is sharp for every weight


def test_each_swap_of_two_weights_is_caught(fine: Case) -> None:
    """Each with each other of its shape, which no shape tells apart."""
    weights = keras_list(fine.folder)
    names = list(weights)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if weights[a].shape == weights[b].shape]
    assert len(pairs) > 150
    for one, other in pairs:
        wrong = weights | {one: weights[other], other: weights[one]}
        assert fine.error_with(wrong) > 1e-3, (one, other)


def test_each_transposed_weight_is_caught(fine: Case) -> None:
    """Square kernels, and convolutions whose inputs and outputs change places."""
    weights = keras_list(fine.folder)
    square = [name for name, x in weights.items() if x.dim() > 1 and x.shape[-1] == x.shape[-2]]
    assert len(square) == 5 * 2  # two convolutions, a local and two global layers in each block
    for name in square:
        assert fine.error_with(weights | {name: weights[name].mT.contiguous()}) > 1e-3, name


def test_the_way_back(case: Case) -> None:
    """What the key map exports is the published list, bit for bit."""
    net = load(case.folder, torch.float32)
    exported = export_weights(published_rows(settings(case.folder)), net.state_dict())
    wanted = numbered(case.weights())
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], x) for name, x in wanted.items())


@pytest.mark.parametrize(
    "changes", [{"norm_eps": 1e-5}, {"norm_eps": 1e-12}, {"dilation": 4}, {"dilation": 1}], ids=str
)
def test_each_wrong_setting_is_caught(case: Case, changes: dict[str, Any]) -> None:
    """An eps shows least: by 2e-3."""
    assert case.error_of(with_changes(case.net(), **changes)) > 1e-3


def test_configurations_that_do_not_make_sense() -> None:
    with pytest.raises(ValueError, match="got 20 and 3"):
        Config(26, 13, 2, 12, 20, 3, 6)


def test_wrong_arguments_of_the_network() -> None:
    """Lengths, layers and sizes that cannot be meant."""
    config = Config(26, 9, layers=2, channels=8, global_channels=16, heads=2, key_size=4)
    net = ProteinBERT(config)
    tokens = torch.randint(0, 22, (2, 7))
    for lengths in ([7], [7, 8], [0, 7], [[7, 7]]):
        with pytest.raises(ValueError, match="2 numbers from 1 to 7, one per row of tokens"):
            net(tokens, lengths=lengths)
    assert torch.equal(net(tokens, lengths=(7, 4)).local, net(tokens, lengths=torch.tensor([7, 4])).local)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match="from 0 to 2"):
            net.encode(Packed.from_ids(list(tokens)), layer=layer)
    wrong: tuple[dict[str, Any], ...] = ({"dilation": 0}, {"dilation": "5"}, {"heads": 0}, {"kernel": 2.5})
    for change in (*wrong, {"norm_eps": -1.0}, {"norm_eps": math.nan}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(config, **change)
    with pytest.raises(ValueError, match="local_logits=True"):
        pretraining_loss(net(tokens, local_logits=False), tokens, torch.zeros(2, 9))
