"""Embeddings of ProteinBERT: what its network gives for tokens and pads, and what of that is asked for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_invariance import random_proteins
from tiny import igbert, progen2_model, proteinbert_model
from torch import Tensor

import plm
from plm.embedding import channels
from plm.models.proteinbert import PAD, Config, Output, ProteinBERT
from plm_kernels import packing_available

SEQUENCES = ["MKTAYIAKQR", "V", "QISFVKSHFSRQLEE", "MK", "UXACDEFGHIKL", "MKTAYIAKQR"]
PUBLISHED = Config(26, 8943, 6, 128, 512, 4, 64)
PAD_TO = 40
# Convolutions reach 20 residues to each side, so that proteins of these lengths are partly out of their ends' reach.
LENGTHS = (1, 40, 63, 111, 63, 33, 63, 1, 5, 2)
# Ten times what two float64 programs that add in another order differ by here (measured).
FLOAT64 = 3e-14
POOLS: tuple[Any, ...] = (None, "mean", "max", "cls", "card", "global")
LAYERS: tuple[Any, ...] = (0, 1, -1, "all")

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


@torch.inference_mode()
def network(model: plm.Model, text: str, pad_to: int | None = None, annotations: Tensor | None = None) -> Output:
    """All that the network says of one protein, pads and all."""
    ids = torch.tensor([model.tokenizer.encode(text)])
    ids = F.pad(ids, (0, (pad_to or 0) - ids.shape[1] if pad_to else 0), value=PAD)
    out: Output = model.net(ids, annotations, hidden_states=True)
    return out


def picked(out: Output, length: int, layer: int | str, pool: str | None) -> Tensor:
    """The part of an output that ``embed`` is asked for."""
    assert out.local_states is not None and out.global_states is not None
    local, both = out.local_representations, out.global_representations
    if layer != "all":
        at = 2 * (int(layer) % (len(out.local_states) // 2 + 1))
        local, both = out.local_states[at], out.global_states[at]
    if pool == "global":
        return both[0]
    if pool == "cls":
        return local[0, 0]
    rows = local[0, 1 : length + 1]
    return rows if pool is None else rows.amax(0) if pool == "max" else rows.mean(0)


@needs_packing
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("pool", POOLS)
def test_embeddings_are_those_of_the_network(layer: Any, pool: Any) -> None:
    """Bit by bit, where each protein is alone in its batch: on its own length, and with pads behind it."""
    model = proteinbert_model()
    for pad_to in (None, PAD_TO):
        found = plm.embed(model, SEQUENCES, layer=layer, pool=pool, pad_to=pad_to, max_tokens=1)
        for text, ours in zip(SEQUENCES, found, strict=True):
            assert torch.equal(ours, picked(network(model, text, pad_to), len(text), layer, pool))


def test_pads_change_every_number() -> None:
    """They are part of the function. Own length plus two is no pad at all, and one more is another function."""
    model = proteinbert_model(torch.float64)
    for pool in (None, "global"):
        (own,) = plm.embed(model, "MKTAYIAKQR", pool=pool)
        found = [plm.embed(model, "MKTAYIAKQR", pool=pool, pad_to=length)[0] for length in (12, 13, 40)]
        assert torch.equal(found[0], own)
        assert all((other - own).abs().max() > 1e-2 for other in found[1:])
        assert (found[1] - found[2]).abs().max() > 1e-2


def test_layers_are_numbered_by_blocks() -> None:
    model = proteinbert_model()
    for layer in range(4):
        for pool in (None, "global"):
            ours = plm.embed(model, SEQUENCES, layer=layer, pool=pool)
            same = plm.embed(model, SEQUENCES, layer=layer - 4, pool=pool)
            assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    wrong = r"layers 0 to 3 \(or -1 to -4\); got 4"
    with pytest.raises(ValueError, match=wrong):
        plm.embed(model, "MKT", layer=4)


def test_the_slices_name_what_lies_side_by_side() -> None:
    model = proteinbert_model(torch.float64)
    config = model.net.config
    assert isinstance(config, Config)
    (rows,), (both,) = (plm.embed(model, "MKTAYIAK", layer="all", pool=pool) for pool in (None, "global"))
    for layer in (1, 2, 3):
        torch.testing.assert_close(
            rows[:, config.local_slices[f"block{layer}"]],
            plm.embed(model, "MKTAYIAK", layer=layer)[0],
            rtol=0,
            atol=1e-12,
        )
        torch.testing.assert_close(
            both[config.global_slices[f"block{layer}"]],
            plm.embed(model, "MKTAYIAK", layer=layer, pool="global")[0],
            rtol=0,
            atol=1e-12,
        )
    before = plm.embed(model, "MKTAYIAK", layer=0, pool="global")[0]
    torch.testing.assert_close(both[config.global_slices["annotations_in"]], before, rtol=0, atol=1e-12)
    assert rows[:, config.local_slices["letters"]].sum(-1).allclose(torch.ones(8, dtype=torch.float64))
    assert torch.equal(both[config.global_slices["annotations"]], plm.annotate(model, "MKTAYIAK")[0])


def test_published_widths() -> None:
    """128 and 512; side by side 1,562 and 15,599, as its authors' code gives them. What outputs are told beforehand."""
    model = proteinbert_model()
    with torch.device("meta"):
        published = replace(model, net=ProteinBERT(PUBLISHED))
    widths = {(-1, None): 128, (0, "mean"): 128, ("all", None): 1562, ("all", "mean"): 1562}
    widths |= {(-1, "global"): 512, ("all", "global"): 15_599}
    for (layer, pool), width in widths.items():
        assert channels(published, layer, pool) == width  # type: ignore[arg-type]
    for layer in LAYERS:
        for pool in POOLS:
            (found,) = plm.embed(model, "MKT", layer=layer, pool=pool)
            assert found.shape[-1] == channels(model, layer, pool)


# Any batch, any order


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("pool", [None, "global"])
@pytest.mark.parametrize("layer", [-1, "all"])
def test_a_protein_is_the_same_alone_and_in_any_batch(layer: Any, pool: Any) -> None:
    """On its own length, beside longer ones. How the sums over a sequence round depends on the longest."""
    # Twice what was measured: 2.3e-6 in float32 and 3e-15 in float64, of numbers up to 8. A neighbour that got in, or a
    # pad, would be seen: test_pads_change_every_number.
    for dtype, bound in ((torch.float32, 5e-6), (torch.float64, 1e-14)):
        model = proteinbert_model(dtype)
        texts = random_proteins(LENGTHS)
        alone = [plm.embed(model, text, layer=layer, pool=pool)[0] for text in texts]
        for max_tokens in (50, 150, 4096):
            for order in (list(range(len(texts))), torch.randperm(len(texts)).tolist()):
                some = [texts[i] for i in order]
                found = plm.embed(model, some, layer=layer, pool=pool, max_tokens=max_tokens)
                assert largest_difference(found, [alone[i] for i in order]) <= bound


@needs_packing
@pytest.mark.parametrize("pool", [None, "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_pads_not_a_bit_depends_on_the_batch(dtype: torch.dtype, pool: Any) -> None:
    """All sequences are equally long then."""
    model = proteinbert_model(dtype)
    texts = random_proteins(LENGTHS)
    alone = [plm.embed(model, text, pool=pool, pad_to=128)[0] for text in texts]
    for max_tokens in (128, 400, 4096):
        found = plm.embed(model, texts, pool=pool, pad_to=128, max_tokens=max_tokens)
        assert largest_difference(found, alone) == 0


# Annotations


def test_annotations_go_with_their_sequences() -> None:
    """Whatever order batches come in, and where half of them know nothing."""
    model = proteinbert_model(torch.float64)
    known = (torch.rand(len(SEQUENCES), 40) < 0.2).float()
    known[::2] = 0
    for pad_to in (None, PAD_TO):
        for layer, pool in ((0, "global"), (-1, "global"), (-1, None), ("all", "mean")):
            wanted = [
                picked(network(model, text, pad_to, known[i : i + 1]), len(text), layer, pool)  # type: ignore[arg-type]
                for i, text in enumerate(SEQUENCES)
            ]
            for max_tokens in (1, 30, None):
                found = plm.embed(
                    model,
                    SEQUENCES,
                    layer=layer,  # type: ignore[arg-type]
                    pool=pool,  # type: ignore[arg-type]
                    pad_to=pad_to,
                    annotations=known,
                    max_tokens=max_tokens,
                )
                assert largest_difference(found, wanted) < FLOAT64
    plain, told = (plm.embed(model, SEQUENCES, pool="global", annotations=x) for x in (None, known))
    changed = [(a - b).abs().max().item() for a, b in zip(plain, told, strict=True)]
    assert max(changed[::2]) < FLOAT64 and min(changed[1::2]) > 1e-2


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float64])
def test_annotations_of_any_kind(kind: torch.dtype) -> None:
    """int8, as the original's encoder makes them."""
    model, known = proteinbert_model(), torch.rand(1, 40) < 0.5
    one, other = (
        plm.embed(model, "MKT", pool="global", annotations=known.to(each))[0] for each in (torch.float32, kind)
    )
    assert torch.equal(one, other)


# What is not computed


def test_nothing_is_computed_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither head, nor blocks beyond the layer, nor the last global state unless it is the one."""
    model, asked = proteinbert_model(), []
    encode = ProteinBERT.encode

    def recorded(self: ProteinBERT, batch: plm.Packed, **options: Any) -> Any:
        asked.append(options["global_"])
        return encode(self, batch, **options)

    monkeypatch.setattr(ProteinBERT, "encode", recorded)
    calls: list[str] = []
    for name, module in model.net.named_modules():
        if name in ("lm_head", "annotation_head") or name.count(".") == 1:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    plm.embed(model, "MKT")
    plm.embed(model, "MKT", pool="global")
    assert asked == [False, True] and calls == ["blocks.0", "blocks.1", "blocks.2"] * 2
    calls.clear()
    plm.embed(model, "MKT", layer=1)
    assert calls == ["blocks.0"]


# dtypes and faults


@pytest.mark.parametrize("pool", POOLS)
def test_precisions(pool: Any) -> None:
    exact, half = (
        plm.embed(proteinbert_model(dtype), SEQUENCES, pool=pool) for dtype in (torch.float64, torch.bfloat16)
    )
    assert {x.dtype for x in exact} == {torch.float64} and {x.dtype for x in half} == {torch.float32}
    # Three times what was measured: bfloat16 keeps 8 bits, and three blocks of it are off by 0.02, of numbers up to 4.
    assert 1e-3 < largest_difference(half, exact) < 0.06
    for one in half:
        assert one.untyped_storage().nbytes() == one.numel() * 4 and not one.is_inference()


@pytest.mark.parametrize("layer", [-1, "all"])
def test_a_nan_is_never_returned(layer: Any) -> None:
    model = proteinbert_model()
    broken = replace(model, net=copy.deepcopy(model.net))
    with torch.no_grad():
        broken.net.embed.weight[model.tokenizer.vocabulary.index("K"), 3] = torch.nan
    with pytest.raises(FloatingPointError, match="sequence 2 gave a NaN or an infinity"):
        plm.embed(broken, ["MAM", "MAKAM"], layer=layer)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no room": ({"pad_to": 2}, ValueError, "pad_to must be at least 3: <START>, one residue and <END>; got 2"),
    "negative": ({"pad_to": -512}, ValueError, "pad_to must be at least 3"),
    "a fraction": ({"pad_to": 512.0}, TypeError, r"pad_to must be a whole number of tokens, such as 512; got 512\.0"),
    "too narrow": (
        {"annotations": torch.zeros(2, 39)},
        ValueError,
        r"have shape \[2, 39\]; proteinbert takes \[2, 40\]",
    ),
    "too few": ({"annotations": torch.zeros(1, 40)}, ValueError, r"have shape \[1, 40\]; proteinbert takes \[2, 40\]"),
    "one row": ({"annotations": torch.zeros(40)}, ValueError, r"have shape \[40\]; proteinbert takes \[2, 40\]"),
    "a list": (
        {"annotations": [[0.0] * 40] * 2},
        TypeError,
        r"must be a tensor \[sequences, annotations\]; got a list",
    ),
    "no number": ({"annotations": torch.full((2, 40), torch.nan)}, ValueError, r"in rows 1, 2 \(of 2\); give 0 and 1"),
    "a layer's name": ({"layer": "last"}, ValueError, "a number from 0 to 3, or 'all' of a ProteinBERT; got 'last'"),
    "pool": (
        {"pool": "local"},
        ValueError,
        "pool 'local' is unknown; choose None, 'mean', 'max', 'cls', 'card' or 'gl",
    ),
    "chains": ({"pool": "global", "per_chain": True}, ValueError, "pool 'global' is one vector for both chains"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, error, told = REFUSED[case]
    for name in ("encode", "represent"):
        monkeypatch.setattr(
            ProteinBERT, name, lambda *_, **__: pytest.fail("computed before the settings were checked")
        )
    with pytest.raises(error, match=told):
        plm.embed(proteinbert_model(), ["MKT", "MK"], **given)


def test_all_that_is_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = proteinbert_model()
    assert len(plm.embed(model, "M" * 510, pad_to=512)[0]) == 510
    monkeypatch.setattr(ProteinBERT, "encode", lambda *_, **__: pytest.fail("computed before lengths were checked"))
    with pytest.raises(plm.InputError) as caught:
        plm.embed(model, ["M" * 511, "MK", "A" * 1000], pad_to=512)
    assert [fault.record for fault in caught.value.faults] == [1, 3]
    assert "511 residues; pad_to=512 takes at most 510" in str(caught.value) and "1,000 residues" in str(caught.value)


@pytest.mark.parametrize("text", ["MKB", "MK<mask>", "MK<PAD>", "<START>MK", "mkt", ""])
def test_what_is_no_protein(text: str) -> None:
    """The original reads all that it does not know as <OTHER>, in silence."""
    with pytest.raises(plm.InputError) as caught:
        plm.embed(proteinbert_model(), ["MKT", text])
    assert [fault.record for fault in caught.value.faults] == [2]


OTHERS = {
    "pad_to": ({"pad_to": 512}, "pad_to is for ProteinBERT; pads change no number of {}: leave it out"),
    "annotations": ({"annotations": torch.zeros(1, 40)}, "annotations are for ProteinBERT; {} reads residues alone"),
    "global": ({"pool": "global"}, "{} has no global vector, only a ProteinBERT has; pool with 'mean' or 'max'"),
    "all": ({"layer": "all"}, "all layers side by side are ProteinBERT's; of {} take one, from 0 to 2"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("make", [igbert, progen2_model])
def test_other_families_have_none_of_this(make: Callable[[], plm.Model], case: str) -> None:
    given, told = OTHERS[case]
    model = make()
    with pytest.raises(ValueError, match=told.format(model.checkpoint.name)):
        plm.embed(model, "MKT", **given)  # type: ignore[arg-type]


def test_what_it_does_not_do() -> None:
    model = proteinbert_model()
    with pytest.raises(ValueError, match="proteinbert has no contact head, so it predicts no contacts; use esm1b"):
        plm.contacts(model, "MKT")
    with pytest.raises(ValueError, match="proteinbert writes no sequences; use ProGen2"):
        plm.generate(model, "MKT")
