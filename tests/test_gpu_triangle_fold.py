"""Whole proteins folded with ESMFold's kernels, against the stored truths of test_parity_esmfold.py."""

import pytest
import torch
from kernel_device import DEVICE
from kernel_triangles import force_kernels
from parity import differences, largest
from test_parity_esmfold import CASES, Case

pytest.importorskip("triton")


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_precise_as_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few recycles as are stored, in one piece."""
    case = Case(name)
    run, recycles = min(case.pairs, key=lambda pair: pair[1])
    net = case.net("float32").to(DEVICE)
    served = force_kernels(monkeypatch)
    found = {name: [x.cpu() for x in tensors] for name, tensors in case.outputs(net, run, recycles).items()}
    assert {"triangle_attention", "triangle_sides", "pair_norm", "add_gated"} == set(served)
    errors = differences(found, case.truth(run, recycles))
    floors = [told["f32_vs_f64_max_abs"] for runs in case.measured.values() for told in runs["recycles"].values()]
    compared = floors[0].keys() & errors.keys()
    assert {"positions", "s_z", "plddt"} <= compared
    for output in compared:
        # The noise floor: the original's largest error in float32 in any run, measured when the truth was made.
        floor = max(told[output] for told in floors)
        assert largest({output: errors[output]}) <= 2 * floor, output


def test_kernels_are_not_asked_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    served = force_kernels(monkeypatch)
    case = Case(CASES[0])
    with torch.inference_mode():
        next(iter(case.net().to(DEVICE).fold(case.proteins("single"), recycles=0)))
    assert not served
