"""ProGen2 against transformers' GPT-J and CodeGen: tiny random twins, saved as ProGen2's files are, and loaded.

The original's own class needs transformers 4.16. These two run the same arithmetic (see oracle_progen2.py); what the
original itself computed is in test_parity_progen2.py.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_progen2 import (
    CleanFloat64,
    Relative,
    Twin,
    given,
    in_float64,
    load,
    pad,
    published,
    relative,
    run_hub,
    run_ours,
    save,
    truth_of,
)
from parity import differences, largest, rms
from torch import Tensor

import plm_kernels
from plm.models import progen2
from plm.models.progen2 import lm_loss
from plm.packing import Packed
from plm_weights import export_weights, import_weights
from plm_weights.progen2 import hub_rows, key_map

# Two float64 programs that add in another order differ by 2e-14 here (measured); one norm in float32 by 7e-7.
FLOAT64 = 1e-9
# One token; equal lengths apart from each other; the whole context; odd ones.
LENGTHS = (9, 33, 1, 80, 33, 2, 17, 5)
TWINS = [
    Twin(layers=1, heads=8, head_size=5, rotated=4, seed=1),  # one head in each of the eight shards
    Twin(layers=3, heads=16, head_size=6, rotated=6, feed_forward=50, seed=2),  # whole heads turned
    Twin(layers=2, heads=24, head_size=3, rotated=2, vocabulary=128, outputs=128, norm_eps=1e-6, seed=3),
    Twin(layers=2, heads=8, head_size=10, rotated=64, feed_forward=33, vocabulary=37, seed=4),  # a port with more rows
    Twin(layers=4, heads=32, head_size=4, rotated=2, seed=5),
]
every_twin = pytest.mark.parametrize("twin", TWINS, ids=str)
each_relative = pytest.mark.parametrize("kind", ["gptj", "codegen"])


def random_ids(twin: Twin, side: Any = "right", rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids ``[b, t]`` of every kind, and the mask of the padding."""
    generator = torch.Generator().manual_seed(twin.seed)
    rows = twin.vocabulary if rows is None else rows
    return pad([torch.randint(rows, (length,), generator=generator).tolist() for length in LENGTHS], side)


@every_twin
@each_relative
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_output(twin: Twin, kind: Relative, side: Any, tmp_path: Path) -> None:
    """Hidden states, attention maps, logits, and the keys and values of a cache: to the last digits in float64, and as
    precise as theirs in float32."""
    theirs = relative(twin, kind)
    ids, mask = random_ids(twin, side)
    batch = Packed.from_padded(ids, mask)
    folder = save(theirs, twin, tmp_path, masks=kind == "codegen")
    truth = truth_of(theirs, kind, ids, mask, twin.outputs)
    ours = run_ours(load(folder, "float64"), batch)
    assert ours.keys() == truth.keys()
    assert largest(differences(ours, truth)) < FLOAT64

    floor = rms(differences(run_hub(theirs, ids, mask, twin.outputs), truth))
    found = rms(differences(run_ours(load(folder, "float32"), batch), truth))
    for name in truth:
        # The noise floor is the relative's own error in float32, measured here on the same inputs.
        assert found[name] <= 2 * floor[name], f"{name}: {found[name]:.1e}, theirs {floor[name]:.1e}"


def test_both_relatives_are_one_model() -> None:
    """Shards of four and matrices apart, cut and put together, are the same model: the two oracles agree."""
    twin = TWINS[1]
    gptj, codegen = relative(twin, "gptj"), relative(twin, "codegen")
    state = codegen.state_dict()
    for i in range(twin.layers):
        q, k, v = (gptj.state_dict()[f"transformer.h.{i}.attn.{each}_proj.weight"] for each in "qkv")
        shards = [x.reshape(4, -1, twin.channels) for x in (q, v, k)]
        state[f"transformer.h.{i}.attn.qkv_proj.weight"] = torch.stack(shards, 1).reshape(-1, twin.channels)
    codegen.load_state_dict({name: gptj.state_dict().get(name, x) for name, x in state.items()})
    ids, mask = random_ids(twin)
    found = [truth_of(model, kind, ids, mask, 32) for model, kind in ((gptj, "gptj"), (codegen, "codegen"))]  # type: ignore[arg-type]
    assert largest(differences(*found)) < FLOAT64
    ours = [published(dict(model.named_parameters()), twin) for model in (gptj, codegen)]
    assert all(torch.equal(ours[0][name], x) for name, x in ours[1].items())


@every_twin
@each_relative
def test_back_to_the_published_tensors(twin: Twin, kind: Relative, tmp_path: Path) -> None:
    """What our key map exports is what was loaded, bit for bit."""
    theirs = relative(twin, kind)
    net = load(save(theirs, twin, tmp_path, masks=kind == "codegen"), "float32")
    exported = export_weights(hub_rows(), net.state_dict())
    wanted = published(dict(theirs.named_parameters()), twin)
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], x) for name, x in wanted.items())


@every_twin
@each_relative
@pytest.mark.parametrize("backend", ["segments", "dense", "reference"])
def test_loss_and_gradients(
    twin: Twin, kind: Relative, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the loss by every parameter, through every attention backend of a CPU."""
    theirs = relative(twin, kind)
    save(theirs, twin, tmp_path)
    ids, mask = random_ids(twin, rows=twin.outputs)
    labels = torch.where(mask.bool(), ids, -100)
    with CleanFloat64():
        wide = in_float64(theirs, kind)
        if twin.outputs < twin.vocabulary:  # a port has no columns for the tokens that were added
            wide.lm_head.bias.data[twin.outputs :] = -torch.inf
        loss = wide(**given(ids, mask), labels=labels).loss
        loss.backward()

    monkeypatch.setattr(progen2, "attention", partial(plm_kernels.attention, backend=backend))
    net = load(tmp_path, "float64")
    batch = Packed.from_padded(ids, mask)
    ours = lm_loss(net(batch).logits, batch)
    ours.backward()
    assert abs(ours.item() - loss.item()) < FLOAT64

    found = {name: x.grad for name, x in net.named_parameters()}
    named = published({name: x.grad for name, x in wide.named_parameters()}, twin)
    for name, wanted in import_weights(key_map(named), named, found).items():
        assert wanted.abs().max() > 1e-6, name  # there is something to compare
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=FLOAT64, msg=name)
