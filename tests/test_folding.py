"""``plm.fold``: what it gives and what it refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import plm
from plm import running
from plm.esmfold.model import FLOAT32_AT_LEAST
from plm.folding import fold, fold_rows, random_hidden, read_proteins
from plm.sequences import InputError

ALL20 = "MKTWYFHRDENQSCGPAVIL"
SPACING = 2**-18  # of float32 from 32 to 64, beyond which no number here lies
TWICE = 3  # pLDDT is rounded at 1 and times 100, where half a spacing is up to 1.6 of those, and rounded again


@pytest.fixture(scope="module")
def single(golden: Path) -> plm.Model:
    return plm.load(golden / "esmfold" / "a_hub_layout", dtype="float64")


@pytest.fixture(scope="module")
def multimer(golden: Path) -> plm.Model:
    return plm.load(golden / "esmfold" / "b_v5_layout_multimer", dtype="float64")


def near(ours: Tensor, truth: Tensor, roundings: int = 1) -> bool:
    """Equal but for the rounding of float32, half a spacing each."""
    return ours.dtype == torch.float32 and bool((ours.double() - truth).abs().max() <= roundings * SPACING / 2)


def truth_of(golden: Path, case: str, run: str) -> dict[str, Tensor]:
    stored = load_file(golden / "esmfold" / case / "expected.safetensors")
    return {name.removeprefix(f"{run}/"): x for name, x in stored.items() if name.startswith(f"{run}/")}


def test_what_comes_out(single: plm.Model, golden: Path) -> None:
    """Every field against the original's numbers, in its order of 37 kinds of atoms; X has no atoms."""
    truth = truth_of(golden, "a_hub_layout", "single/r3")
    (found,) = fold(single, ALL20 + "X")
    index, exists = truth["residx_atom37_to_atom14"][0], truth["atom37_atom_exists"][0].bool()
    assert torch.equal(found.atoms, exists)
    placed = truth["positions"][-1, 0].gather(1, index[..., None].expand(-1, -1, 3)) * exists[..., None]
    assert near(found.positions, placed)
    assert near(found.plddt, 100 * truth["plddt"][0], TWICE)
    assert near(found.pae, truth["predicted_aligned_error"][0])
    assert abs(found.ptm - truth["ptm"].item()) < 1e-12
    assert found.chains == (ALL20 + "X",)
    assert torch.equal(found.residue_index, torch.arange(21))
    assert not found.chain.any()
    assert found.settings == {
        "model": "a_hub_layout",
        "recycles": 3,  # the checkpoint's
        "chunk": 21,
        "linker": "G" * 25,
        "residue_gap": 512,
        "dtype": "float64",
        "device": "cpu",
    }
    assert not any(x.is_inference() for x in (found.positions, found.plddt, found.pae))


def test_linkers_are_left_out(multimer: plm.Model, golden: Path) -> None:
    truth = truth_of(golden, "b_v5_layout_multimer", "multimer/r2")
    (found,) = fold(multimer, ("MKVLHT", "WYCQNRE"), recycles=2, linker="G" * 5)
    keep = torch.tensor([*range(6), *range(11, 18)])
    assert near(found.positions[:, 1], truth["positions"][-1, 0, keep, 1])  # CA
    assert near(found.plddt, 100 * truth["plddt"][0, keep], TWICE)
    assert near(found.pae, truth["predicted_aligned_error"][0][keep][:, keep])
    assert abs(found.ptm - truth["ptm"].item()) < 1e-12  # with the linker, as in the original
    assert found.chains == ("MKVLHT", "WYCQNRE")
    assert found.chain.tolist() == [0] * 6 + [1] * 7
    assert found.residue_index.tolist() == [*range(6), *range(523, 530)]
    (bare,) = fold(multimer, "MKVLHT:WYCQNRE", recycles=0, linker="", residue_gap=20)
    assert bare.residue_index.tolist() == [*range(6), *range(26, 33)]


def test_hidden_residues(multimer: plm.Model, golden: Path) -> None:
    """The original's masking_pattern: the language model does not see them, the trunk does. U and O are read as X."""
    truth = truth_of(golden, "b_v5_layout_multimer", "masked/r1")
    mask = torch.zeros(22, dtype=torch.bool)
    mask[[2, 7, 13]] = True
    (found,) = fold(multimer, ALL20 + "UO", recycles=1, hidden=mask)
    assert near(found.plddt, 100 * truth["plddt"][0], TWICE)
    assert found.chains == (ALL20 + "XX",)
    # None hides nothing, beside a sequence that hides some
    some, none = fold(multimer, [ALL20 + "UO", "MKV"], recycles=1, hidden=[mask, None])
    assert (some.positions - found.positions).abs().max() <= SPACING
    assert (none.positions - fold(multimer, "MKV", recycles=1)[0].positions).abs().max() <= SPACING


def test_hidden_counts_residues_not_linkers(multimer: plm.Model) -> None:
    mask = torch.tensor([False, True, True, False])
    (chains,) = read_proteins(["MK:VL"], linker="GG", hidden=mask)
    assert chains.hidden is not None
    assert chains.hidden.tolist() == [False, True, False, False, True, False]
    for wrong in (torch.zeros(6, dtype=torch.bool), torch.zeros(4)):
        with pytest.raises(InputError, match=r"hidden must be bool and have shape \[4\], one per residue; got"):
            fold(multimer, "MK:VL", hidden=wrong)
    with pytest.raises(ValueError, match=r"one tensor \(or None\) per sequence, 1; got 2"):
        fold(multimer, "MK:VL", hidden=[mask, mask])


def test_random_hidden() -> None:
    """Of 20,000 residues a share, within five standard deviations; by the generator alone; linkers not counted."""
    (chains,) = read_proteins(["A" * 10_000 + ":" + "G" * 10_000])
    generator = torch.Generator().manual_seed(1)
    first = random_hidden(chains, 0.15, generator)
    assert first.shape == (20_000,)
    assert abs(first.double().mean().item() - 0.15) < 5 * (0.15 * 0.85 / 20_000) ** 0.5
    assert not torch.equal(first, random_hidden(chains, 0.15, generator))
    assert torch.equal(first, random_hidden(chains, 0.15, torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first, random_hidden(("A" * 10_000, "G" * 10_000), 0.15, generator))
    assert not random_hidden(chains, 0).any()
    assert random_hidden(chains, 1).all()
    with pytest.raises(ValueError, match="share must be from 0 to 1; got 15"):
        random_hidden(chains, 15)


def test_results_come_in_input_order_and_as_they_would_alone(single: plm.Model) -> None:
    """Whatever the language model reads together. In float64, so what is left is the rounding to float32."""
    sequences = ["MKV", ALL20, "WY:CQ", ALL20[::-1] + "MK", "A"]
    alone = [fold(single, one, recycles=1)[0] for one in sequences]
    for budget in (None, 1, 30):
        together = fold(single, sequences, recycles=1, max_tokens=budget)
        assert [one.sequence for one in together] == sequences
        for one, other in zip(together, alone, strict=True):
            assert (one.positions - other.positions).abs().max() <= SPACING
            assert (one.plddt - other.plddt).abs().max() <= 2 * SPACING
            assert abs(one.ptm - other.ptm) < 1e-12


def test_longest_first(single: plm.Model) -> None:
    proteins = read_proteins(["MKV", ALL20, "WYCQ"])
    assert [i for i, _ in fold_rows(single, proteins, recycles=0, max_tokens=9)] == [1, 2, 0]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunks_change_results_by_rounding_alone(single: plm.Model, chunk: int) -> None:
    (whole,), (pieces,) = fold(single, ALL20, chunk=None), fold(single, ALL20, chunk=chunk)
    assert (pieces.positions - whole.positions).abs().max() <= SPACING
    assert (pieces.pae - whole.pae).abs().max() <= SPACING
    assert pieces.settings["chunk"] == min(chunk, 20)


def test_a_trunk_in_bfloat16(golden: Path) -> None:
    """Structure module and heads stay in float32. What is off is at most twice the most that was measured: 1.6 times
    what rounding the trunk's weights alone does."""
    for case, sequence in (("a_hub_layout", ALL20), ("b_v5_layout_multimer", "MKVLHTWYCQNRE")):
        exact = plm.load(golden / "esmfold" / case, dtype="float64")
        (truth,) = fold(exact, sequence)
        half, wide = (plm.load(golden / "esmfold" / case, dtype=dtype) for dtype in ("bfloat16", "float32"))
        for name in FLOAT32_AT_LEAST:
            setattr(half.net, name, getattr(wide.net, name))
        (found,) = fold(half, sequence)
        assert found.settings["dtype"] == "bfloat16"
        with torch.no_grad():
            for name, weight in exact.net.named_parameters():
                if not name.startswith(FLOAT32_AT_LEAST):
                    weight.copy_(weight.bfloat16())
        (rounded,) = fold(exact, sequence)
        assert error(found.plddt, truth.plddt) < 3.2 * error(rounded.plddt, truth.plddt)
        assert error(found.positions, truth.positions) < 3.2 * error(rounded.positions, truth.positions)


def error(ours: Tensor, truth: Tensor) -> float:
    """Root mean square."""
    return (ours - truth).square().mean().sqrt().item()


def test_all_bad_sequences_are_named(single: plm.Model) -> None:
    bad = ["MKT", "mkt", "", "MK:", "MK*T", ":", "M K"]
    with pytest.raises(InputError) as caught:
        fold(single, bad)
    assert [fault.record for fault in caught.value.faults] == [2, 3, 4, 5, 6, 7]
    reasons = [fault.reason for fault in caught.value.faults]
    for part, reason in zip(
        ("character 'm' at position 1", "it is empty", "chain 2 of 2 is empty", "'*'", "chain 1, 2 of 2", "' '"),
        reasons,
        strict=True,
    ):
        assert part in reason
    assert "Residues are upper case." in reasons[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recycles": -1}, "recycles must be a whole number, 0 or more; got -1"),
        ({"recycles": 1.5}, "recycles must be a whole number, 0 or more; got 1.5"),
        ({"recycles": True}, "recycles must be a whole number, 0 or more; got True"),
        ({"chunk": 0}, "chunk must be a number of rows, 1 or more, or 'auto'; got 0"),
        ({"chunk": "small"}, "chunk must be a number of rows, 1 or more, or 'auto'; got 'small'"),
        ({"linker": "gg"}, "character 'g' at position 1 of the linker is no residue"),
        ({"residue_gap": -1}, "residue_gap must be a whole number from 0 to 1,000,000; got -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_arguments_without_sense(single: plm.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fold(single, ["MKT", "MKV"], **options)
    assert not isinstance(caught.value, InputError)  # it is no sequence's fault


def test_what_is_no_sequence_or_no_model(single: plm.Model) -> None:
    for wrong, message in (
        (b"MKT", "got bytes"),
        ({"a": "MKT"}, "got dict"),
        (["MKT", 3], "number 2 is a int: 3"),
        ([("MKT", 3)], "number 1 is a tuple"),
        ([()], "number 1 is a tuple"),
    ):
        with pytest.raises(TypeError, match=message):
            fold(single, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a model: plm.load\('esmfold'\)"):
        fold("esmfold", "MKT")  # type: ignore[arg-type]
    assert fold(single, []) == []


def test_other_families_predict_no_structures(model: plm.Model, single: plm.Model) -> None:
    for other in (model, tiny.prott5(), tiny.progen2_model()):
        with pytest.raises(ValueError, match=f"{other.checkpoint.name} predicts no structures; load esmfold"):
            fold(other, "MKT")
        running.need_language_model(other)
    with pytest.raises(ValueError, match=r"a_hub_layout predicts structures alone: use plm.fold, or load"):
        running.need_language_model(single)


def test_a_network_that_gives_nan_says_so(golden: Path) -> None:
    """And which protein; fold_rows goes on if somebody listens."""
    broken = plm.load(golden / "esmfold" / "a_hub_layout", dtype="float32")
    with torch.no_grad():
        broken.net.embed.weight[18] = torch.nan  # of Y
    with pytest.raises(FloatingPointError, match=r"\.\.\. gave a NaN or an infinity in torch.float32"):
        fold(broken, ["MKV", "MKY"])
    failed: dict[int, Exception] = {}
    found = dict(fold_rows(broken, read_proteins(["MKV", "MKY", "A"]), on_failure=failed.__setitem__))
    assert found.keys() == {0, 2}
    assert list(failed) == [1] and isinstance(failed[1], FloatingPointError)


def test_weights_may_change_between_two_of_a_stream(golden: Path) -> None:
    """What was packed for one protein is looked at again for the next."""
    proteins = read_proteins(["MKTWYFHRDE", "MKTWYFHRDE"])
    changed = plm.load(golden / "esmfold" / "a_hub_layout")
    stream = fold_rows(changed, proteins, recycles=0)
    _, first = next(stream)
    with torch.no_grad():
        changed.net.blocks[0].outgoing.out.weight.mul_(2)  # type: ignore[union-attr]
    (_, second), (fresh,) = next(stream), fold(copy.deepcopy(changed), "MKTWYFHRDE", recycles=0)
    assert torch.equal(second.positions, fresh.positions) and not torch.equal(second.positions, first.positions)


def test_autocast_is_refused(single: plm.Model) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast would change"):
        fold(single, "MKT")
