"""What users get: residue rows, pooled vectors and contact maps, in input order, and errors before any work."""

import copy
from pathlib import Path

import pytest
import torch

import plm
from plm import running

SEQUENCES = ["MKTVRQERLKSIV", "M", "KALTARQQEVF<mask>LIRD", "MKT"]


@pytest.fixture(scope="module")
def model() -> plm.Model:
    return plm.load(Path(__file__).parent / "golden" / "esm" / "esm2_tiny")


def test_one_row_per_residue_in_input_order(model: plm.Model) -> None:
    found = plm.embed(model, SEQUENCES, max_tokens=8)
    assert [tuple(rows.shape) for rows in found] == [(13, 32), (1, 32), (16, 32), (3, 32)]
    with torch.inference_mode():
        for sequence, rows in zip(SEQUENCES, found, strict=True):
            out = model.net(plm.Packed.from_ids([model.tokenizer.encode(sequence)]))
            assert torch.equal(rows, out.hidden[1:-1])


def test_one_string_is_a_list_of_one(model: plm.Model) -> None:
    assert torch.equal(plm.embed(model, "MKT")[0], plm.embed(model, ["MKT"])[0])
    assert plm.embed(model, []) == []


def test_layers_are_numbered_as_the_originals_number_them(model: plm.Model) -> None:
    with torch.inference_mode():
        states = model.net(plm.Packed.from_ids([model.tokenizer.encode("MKTV")]), hidden_states=True).hidden_states
    assert len(states) == 5
    for layer in range(5):
        assert torch.equal(plm.embed(model, "MKTV", layer=layer)[0], states[layer][1:-1])
        assert torch.equal(plm.embed(model, "MKTV", layer=layer - 5)[0], states[layer][1:-1])
    with pytest.raises(ValueError, match=r"layers 0 to 4 \(or -1 to -5\); got 5"):
        plm.embed(model, "MKTV", layer=5)


def test_pooling_is_over_residues_alone(model: plm.Model) -> None:
    rows = plm.embed(model, SEQUENCES)
    for pool, formula in {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}.items():
        for vector, residues in zip(plm.embed(model, SEQUENCES, pool=pool), rows, strict=True):
            assert torch.equal(vector, formula(residues))
    with torch.inference_mode():
        start = model.net(plm.Packed.from_ids([model.tokenizer.encode("MKT")])).hidden[0]
    assert torch.equal(plm.embed(model, "MKT", pool="cls")[0], start)
    with pytest.raises(ValueError, match="pool 'sum' is unknown"):
        plm.embed(model, "MKT", pool="sum")


def test_results_are_ordinary_tensors_of_their_own(model: plm.Model) -> None:
    """float32 from any lower precision, and no view that keeps a batch alive."""
    half = plm.load(Path(__file__).parent / "golden" / "esm" / "esm2_tiny", dtype="bfloat16")
    for rows in plm.embed(half, SEQUENCES):
        assert rows.dtype == torch.float32
        assert rows.untyped_storage().nbytes() == rows.numel() * 4
        assert not rows.requires_grad


def test_contacts_are_symmetric_probabilities(model: plm.Model) -> None:
    for sequence, found in zip(SEQUENCES, plm.contacts(model, SEQUENCES), strict=True):
        length = len(model.tokenizer.residues(sequence))
        assert found.shape == (length, length)
        assert ((found >= 0) & (found <= 1)).all()
        torch.testing.assert_close(found, found.T, rtol=0, atol=1e-6)


def test_contacts_need_a_head(golden: Path, tmp_path: Path) -> None:
    plm.convert(golden / "esm" / "esm1b_tiny", tmp_path)
    import json

    from safetensors.torch import load_file, save_file

    settings = json.loads((tmp_path / "config.json").read_text())
    settings["config"]["contact_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "contact" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no contact head"):
        plm.contacts(plm.load(tmp_path), "MKT")


def test_all_bad_sequences_are_named_before_anything_runs(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run", lambda *_: pytest.fail("computed before the input was checked"))
    with pytest.raises(plm.InputError) as caught:
        plm.embed(model, ["MKT", "", "MKt", "MJ"])
    assert [fault.record for fault in caught.value.faults] == [2, 3, 4]
    assert "position 2" in str(caught.value)


def test_esm1b_refuses_1023_residues_before_anything_runs(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plm.load(golden / "esm" / "esm1b_tiny")
    assert plm.embed(model, "M" * 1022)[0].shape == (1022, 24)
    monkeypatch.setattr(type(model.net), "forward", lambda *_: pytest.fail("computed before the length was checked"))
    with pytest.raises(plm.InputError, match="1,023 residues; esm1b_tiny takes at most 1,022"):
        plm.embed(model, ["MKT", "M" * 1023])


def test_a_nan_is_never_returned(golden: Path) -> None:
    model = plm.load(golden / "esm" / "esm2_tiny")
    with torch.no_grad():
        model.net.blocks[1].up.bias[3] = torch.nan
    with pytest.raises(FloatingPointError, match="sequence 1 gave a NaN"):
        plm.embed(model, "MKT")


def test_a_batch_that_does_not_fit_is_halved(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory with more than two sequences: the same results come in smaller batches, one alone is an error."""
    expected = plm.embed(model, SEQUENCES)
    forward = type(model.net).forward
    sizes: list[int] = []

    def limited(self: torch.nn.Module, batch: plm.Packed, most: int = 2, **options: bool) -> object:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, **options)

    monkeypatch.setattr(type(model.net), "forward", limited)
    found = plm.embed(model, SEQUENCES)
    assert sizes == [4, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    monkeypatch.setattr(type(model.net), "forward", lambda *a, **k: limited(*a, most=0, **k))
    with pytest.raises(MemoryError, match="16 residues does not fit into the memory of cpu"):
        plm.embed(model, SEQUENCES)


def test_packed_weights_follow_the_weights(golden: Path) -> None:
    """A packed weight is made again when its weight was trained, loaded or cast in the meantime."""
    model = plm.load(golden / "esm" / "esm2_tiny")
    before = plm.embed(model, "MKTV")[0]
    with torch.no_grad():
        model.net.blocks[0].up.weight.mul_(2)
    changed = plm.embed(model, "MKTV")[0]
    assert (changed - before).abs().max() > 1e-2
    fresh = plm.load(golden / "esm" / "esm2_tiny")
    model.net.load_state_dict(fresh.net.state_dict())
    assert torch.equal(plm.embed(model, "MKTV")[0], before)
    model.net.double()
    torch.testing.assert_close(plm.embed(model, "MKTV")[0], before.double(), rtol=0, atol=1e-5)


def test_predicting_networks_can_be_copied_and_saved(golden: Path, tmp_path: Path) -> None:
    """oneDNN's layout can be neither copied nor pickled; after a prediction, neither could the network."""
    model = plm.load(golden / "esm" / "esm2_tiny")
    expected = plm.embed(model, "MKTV")[0]
    twin = plm.Model(copy.deepcopy(model.net), model.tokenizer, model.checkpoint)
    assert torch.equal(plm.embed(twin, "MKTV")[0], expected)
    torch.save(model.net, tmp_path / "net.pt")
    back = plm.Model(torch.load(tmp_path / "net.pt", weights_only=False), model.tokenizer, model.checkpoint)
    assert torch.equal(plm.embed(back, "MKTV")[0], expected)


def test_fused_optimizers_are_seen(golden: Path) -> None:
    """A fused Adam step changes weights without telling torch's version counter; evaluation ran on the old ones."""
    net = plm.load(golden / "esm" / "esm2_tiny").net
    batch = plm.Packed.from_ids([[0, 5, 6, 7, 2]])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            net(batch)
        net(batch).logits.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        predicted = net(batch).logits
    torch.testing.assert_close(predicted, net(batch).logits.detach(), rtol=0, atol=1e-4)
