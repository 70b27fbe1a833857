"""What users get: residue rows, pooled vectors and contact maps, in input order, and errors before any work."""

import copy
from collections.abc import Callable
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
    monkeypatch.setattr(
        type(model.net), "encode", lambda *_, **__: pytest.fail("computed before the length was checked")
    )
    with pytest.raises(plm.InputError, match="1,023 residues; esm1b_tiny takes at most 1,022"):
        plm.embed(model, ["MKT", "M" * 1023])


def test_a_nan_is_never_returned(golden: Path) -> None:
    model = plm.load(golden / "esm" / "esm2_tiny")
    with torch.no_grad():
        model.net.blocks[1].up.bias[3] = torch.nan
    with pytest.raises(FloatingPointError, match="sequence 1 gave a NaN"):
        plm.embed(model, "MKT")


@pytest.mark.parametrize("layer", [0, 2])
def test_layers_beyond_the_wanted_one_are_not_computed(model: plm.Model, layer: int) -> None:
    calls: list[int] = []
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in model.net.blocks]
    expected = model.net(model.tokenizer.pack(["MKT"]), hidden_states=True).hidden_states[layer][1:-1]
    calls.clear()
    try:
        torch.testing.assert_close(plm.embed(model, "MKT", layer=layer)[0], expected, rtol=0, atol=1e-5)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == layer


def test_a_batch_that_does_not_fit_is_halved(model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory with more than two sequences: the same results come in smaller batches, one alone is an error."""
    expected = plm.embed(model, SEQUENCES)
    encode = type(model.net).encode
    sizes: list[int] = []

    def limited(self: torch.nn.Module, batch: plm.Packed, most: int = 2, **options: bool) -> object:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, batch, **options)

    monkeypatch.setattr(type(model.net), "encode", limited)
    found = plm.embed(model, SEQUENCES)
    assert sizes == [4, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    monkeypatch.setattr(type(model.net), "encode", lambda *a, **k: limited(*a, most=0, **k))
    with pytest.raises(MemoryError, match="number 3 alone does not fit into the memory of cpu"):
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


def fused_adam(net: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    net(plm.Packed.from_ids([[0, 5, 6, 7, 2]])).logits.square().mean().backward()
    optimizer.step()


def through_data(net: torch.nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(1.5)


def new_parameters(net: torch.nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight * 1.5)


@pytest.mark.parametrize("change", [fused_adam, through_data, new_parameters])
def test_packed_weights_follow_changes_that_torch_does_not_count(golden: Path, change: Callable[..., None]) -> None:
    """These leave a weight's version counter as it was; predictions after them ran on the old weights."""
    net = plm.load(golden / "esm" / "esm2_tiny").net
    batch = plm.Packed.from_ids([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        before = net(batch).logits
    change(net)
    with torch.no_grad():
        after = net(batch).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, net(batch).logits.detach(), rtol=1e-5, atol=1e-4)


def test_autocast_is_obeyed(model: plm.Model) -> None:
    """Under autocast linears run in bfloat16; packed float32 weights would ignore it."""
    batch = plm.Packed.from_ids([[0, 5, 6, 7, 2]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.net(batch).logits.dtype == torch.bfloat16


def test_layers_can_be_trained_on_embeddings(model: plm.Model) -> None:
    """Results used to be inference tensors, which no gradient may pass through."""
    for rows in (plm.embed(model, "MKT")[0], plm.embed(model, "MKT", pool="mean")[0], plm.contacts(model, "MKT")[0]):
        layer = torch.nn.Linear(rows.shape[-1], 1)
        layer(rows).sum().backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("wrong", [[5], b"MKT", {"a": "MKT"}, ["MKT", None]])
def test_sequences_must_be_strings(model: plm.Model, wrong: object) -> None:
    with pytest.raises(TypeError, match="sequences must be strings"):
        plm.embed(model, wrong)


def test_any_iterable_of_strings_will_do(model: plm.Model) -> None:
    expected = plm.embed(model, ["MKT", "AAA"])
    for sequences in (("MKT", "AAA"), (s for s in ("MKT", "AAA")), {"a": "MKT", "b": "AAA"}.values()):
        assert all(torch.equal(a, b) for a, b in zip(plm.embed(model, sequences), expected, strict=True))


def test_wrong_arguments_say_what_is_wanted(model: plm.Model) -> None:
    with pytest.raises(TypeError, match=r"plm\.load\('esm2-8m'\)"):
        plm.embed("esm2-8m", "MKT")
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        plm.embed(model, "MKT", max_tokens=0)
