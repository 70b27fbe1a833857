"""ESMFold against the original itself: transformers' class as tiny random twins of odd sizes, through our key map.

Then the way back: tensor for tensor what was published, in each form in which it was.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle_esmfold as oracle
import pytest
import torch
import transformers
from oracle_esmfold import Twin, authors_file, build, clean_float64, hub_file, hub_twin, load, run_hub, run_ours
from parity import Outputs, differences, largest, rms
from safetensors.torch import load_file
from test_parity_esmfold import CASES, Case
from torch import Tensor
from transformers.models.esm.openfold_utils.rigid_utils import Rigid

from plm.esmfold.chains import read_chains
from plm.esmfold.residues import LETTERS
from plm_weights import export_weights, import_weights
from plm_weights.esmfold import folding_rows, hub_rows, recognise

# Two float64 programs that add in another order differ by 4e-14 Å here (measured).
FLOAT64 = 1e-9
ODD = Twin(
    stem_layers=3,
    stem_heads=3,
    stem_channels=18,
    blocks=3,
    heads=3,
    channels=15,
    pair_heads=2,
    pair=6,
    bins=3,
    layers=1,
    structure_channels=10,
    structure_pair=5,
    structure_heads=3,
    head_size=5,
    query_points=1,
    value_points=2,
    transitions=2,
    angle_blocks=3,
    angle_channels=9,
    seed=2,
)
# As the authors' ablations "structure_module_only".
NO_BLOCKS = Twin(
    stem_layers=1,
    stem_heads=2,
    stem_channels=20,
    blocks=0,
    heads=2,
    channels=14,
    pair_heads=1,
    pair=8,
    bins=40,
    layers=5,
    structure_channels=12,
    structure_pair=7,
    structure_heads=2,
    head_size=3,
    query_points=5,
    value_points=1,
    transitions=1,
    angle_blocks=1,
    angle_channels=8,
    scale=7,
    passes=3,
    confidence=11,
    seed=1,
)
TWINS = [ODD, NO_BLOCKS]
PROTEINS = [
    read_chains("MKTAYIAKQRQISFVKSHF"),
    read_chains("ACD:EFW", linker="GSG", residue_gap=20),
    read_chains("W"),  # no neighbour to stand beside
    read_chains("GPXVLN", hidden=torch.tensor([False, True, False, False, True, False])),
]
every_twin = pytest.mark.parametrize("twin", TWINS, ids=str)


def assert_as_precise(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Root mean squares of errors in float32; pTM aside, of which there is one number for each protein."""
    found, floor = rms(ours), rms(theirs)
    for name in floor.keys() - {"ptm"}:
        # The noise floor is the original's own error in float32, measured here on the same inputs.
        assert found[name] <= 2 * floor[name], f"{name}: {found[name]:.1e}, theirs {floor[name]:.1e}"


@torch.no_grad()
@every_twin
@pytest.mark.parametrize("recycles", [0, 3])
def test_every_output(twin: Twin, recycles: int) -> None:
    """A protein beside others, two chains, a single residue, X and hidden residues: in float64 and in float32."""
    theirs = hub_twin(twin)
    tensors = hub_file(theirs)
    truth = oracle.truth_of(theirs, PROTEINS, recycles=recycles)
    ours = run_ours(build(twin, tensors, torch.float64), PROTEINS, recycles=recycles)
    assert truth.keys() | {"max_predicted_aligned_error"} == ours.keys()
    assert largest(differences(ours, truth)) < FLOAT64

    ours = run_ours(build(twin, tensors, torch.float32), PROTEINS, recycles=recycles)
    hub = run_hub(theirs, PROTEINS, recycles=recycles)
    assert_as_precise(differences(ours, truth), differences(hub, truth))


@torch.no_grad()
def test_stored_checkpoints_in_float32() -> None:
    """All runs of test_parity_esmfold.py together, for which the original's largest errors alone are stored."""
    sums: list[dict[str, list[Tensor]]] = [{}, {}]  # ours, theirs
    for case in map(Case, CASES):
        net = case.net("float32")
        theirs = transformers.EsmForProteinFolding.from_pretrained(case.folder).float().eval()
        for run, recycles in case.pairs:
            truth, proteins = case.truth(run, recycles), case.proteins(run)
            hub = run_hub(theirs, proteins, recycles=recycles, chunk=case.runs[run]["chunk_size"])
            wanted = {name: truth[name] for name in truth.keys() & hub.keys()}
            found = case.outputs(net, run, recycles), case.stored_of(hub, run, recycles)
            for whole, outputs in zip(sums, found, strict=True):
                for name, difference in differences(outputs, wanted).items():
                    whole.setdefault(name, []).append(difference)
    ours, hubs = ({name: torch.cat(parts) for name, parts in whole.items()} for whole in sums)
    assert_as_precise(ours, hubs)


@torch.no_grad()
def test_ptm_in_float32() -> None:
    """One number for each protein, so it takes many of them."""
    generator = torch.Generator().manual_seed(0)
    proteins = [
        read_chains("".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator)))
        for length in range(4, 26)
    ]
    theirs = hub_twin(ODD)
    truth = {"ptm": oracle.truth_of(theirs, proteins, recycles=0)["ptm"]}
    ours = run_ours(build(ODD, hub_file(theirs), torch.float32), proteins, recycles=0)
    # The noise floor is the original's own error in float32, 3e-9 of numbers about 0.05: one or two roundings.
    floor = rms(differences(run_hub(theirs, proteins, recycles=0), truth))["ptm"]
    assert rms(differences(ours, truth))["ptm"] <= 2 * floor


def test_the_original_reads_its_own_file(tmp_path: Path) -> None:
    """The files that are made here by renaming are those that transformers knows: all tensors arrive."""
    theirs = hub_twin(ODD)
    folder = oracle.save(hub_file(theirs), ODD, tmp_path)
    again, report = transformers.EsmForProteinFolding.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    for name, x in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(x.dtype), x), name


# Files


def dropped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what counts 0, 1, 2, ... and which token a residue is: computed here, and not written again."""
    return {name: x for name, x in tensors.items() if name not in ("af2_to_esm", "esm.embeddings.position_ids")}


def assert_same_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name


@every_twin
def test_the_hubs_file_and_back(twin: Twin) -> None:
    """Half precision and one set of frequencies per layer in the language model, and all else as it is."""
    tensors = hub_file(hub_twin(twin))
    assert recognise(tensors) == "hub"
    rows = oracle.rows_of(tensors, oracle.config_of(twin, tensors))
    assert_same_tensors(export_weights(rows, oracle.imported(twin, tensors)), dropped(tensors))


@every_twin
def test_the_authors_files_and_back(twin: Twin) -> None:
    """ESM-2's own names behind ``esm.``, its head of masked tokens included."""
    tensors = authors_file(hub_twin(twin))
    assert recognise(tensors) == "original"
    config = oracle.config_of(twin, tensors)
    assert config["stem"]["lm_head"]
    rows = oracle.rows_of(tensors, config)
    assert_same_tensors(export_weights(rows, oracle.imported(twin, tensors)), dropped(tensors))


def test_what_transformers_5_saves(tmp_path: Path) -> None:
    """Norms of the language model as gamma and beta, and frequencies under a name with an asterisk."""
    theirs = hub_twin(ODD)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith(".gamma") for name in tensors) and any(".*." in name for name in tensors)
    wide = {name: x.float() if name.startswith("esm.") else x for name, x in dropped(hub_file(theirs)).items()}
    state = oracle.imported(ODD, tensors)
    assert_same_tensors(export_weights(hub_rows(oracle.config_of(ODD, tensors)), state), wide)
    net = load(tmp_path, "float32")
    assert_same_tensors(net.state_dict(), state)


@torch.no_grad()
def test_all_forms_fold_alike(tmp_path: Path) -> None:
    theirs = hub_twin(ODD)
    truth = oracle.truth_of(theirs, PROTEINS, recycles=1)
    theirs.save_pretrained(tmp_path / "saved")
    forms = [hub_file(theirs), authors_file(theirs), load_file(tmp_path / "saved" / "model.safetensors")]
    for tensors in forms:
        net = build(ODD, tensors, torch.float64)
        assert largest(differences(run_ours(net, PROTEINS, recycles=1), truth)) < FLOAT64


@torch.no_grad()
def test_the_original_reads_what_is_written_back(tmp_path: Path) -> None:
    """Nothing but its table of tokens is missing, which it makes itself, and it gives the same numbers."""
    theirs = hub_twin(ODD)
    tensors = authors_file(theirs)
    state = {name: x for name, x in oracle.imported(ODD, tensors).items() if not name.startswith("stem.lm_head.")}
    folder = oracle.save(export_weights(hub_rows(oracle.config_of(ODD, tensors)), state), ODD, tmp_path)
    again, report = transformers.EsmForProteinFolding.from_pretrained(folder, output_loading_info=True)
    assert report.pop("missing_keys") == {"af2_to_esm"} and not any(report.values())
    again = again.float().eval()
    truth = oracle.truth_of(theirs, PROTEINS[:2], recycles=1)
    assert largest(differences(oracle.truth_of(again, PROTEINS[:2], recycles=1), truth)) < FLOAT64


# Gradients


def weighted(outputs: Outputs) -> Tensor:
    """One number in which every number of every output counts, with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs.keys() - {"ptm", "max_predicted_aligned_error"}):
        for x in outputs[name]:
            total = total + (torch.randn(x.shape, generator=generator, dtype=torch.float64) * x).mean()
    return total


@pytest.mark.parametrize("rows", [None, 2], ids=lambda rows: f"rows={rows}")
def test_gradients(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every parameter of the trunk, the structure module and the heads; the language model is not trained.

    The original's recipe for training is not ours: it takes no gradient of the rotation of a layer in the next, nor
    of the vector of alanine, which its embedding has for padding. Both are undone in it here.
    """
    twin = replace(ODD, layers=3)
    theirs = hub_twin(twin)
    monkeypatch.setattr(Rigid, "stop_rot_gradient", lambda self: self)
    wide: Any = copy.deepcopy(theirs).double()
    wide.embedding.padding_idx = None
    proteins = PROTEINS[:2]
    with clean_float64():
        loss = weighted(run_hub(wide, proteins, recycles=0))
        loss.backward()

    net = build(twin, hub_file(theirs), torch.float64)
    outputs = run_ours(net, proteins, recycles=0, rows=rows)
    ours = weighted(outputs)
    ours.backward()
    assert abs(ours.item() - loss.item()) < FLOAT64
    with torch.no_grad():  # and what is computed in place is the same
        assert largest(differences(run_ours(net, proteins, recycles=0, rows=rows), outputs)) < FLOAT64

    named = {name: x.grad for name, x in wide.named_parameters() if not name.startswith("esm.")}
    found = {name: x.grad for name, x in net.named_parameters() if not name.startswith("stem.")}
    assert all(x is not None for x in [*named.values(), *found.values()])
    # Of norms of zeros, and what a softmax does not see because it is added to all.
    still = ("recycle_norm.weight", "recycle_pair_norm.weight", "pair_to_sequence.norm.bias", "pair_bias.bias")
    for name, wanted in import_weights(folding_rows(oracle.config_of(twin, hub_file(theirs))), named, found).items():
        assert name.endswith(still) or wanted.abs().max() > 1e-6, name  # there is something to compare
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=FLOAT64, msg=name)


def test_gradients_through_recycles() -> None:
    """They flow through all passes, and are finite: also where residues stand in one place, as all do at first."""
    net = build(ODD, hub_file(hub_twin(ODD)), torch.float64)
    weighted(run_ours(net, PROTEINS, recycles=2)).backward()
    for name, parameter in net.named_parameters():
        if not name.startswith("stem.contact_head."):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert net.recycle_norm.weight.grad.abs().max() > 1e-6
