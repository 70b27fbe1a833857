"""ProteinBERT against the plain formulas of oracle_proteinbert.py, at sizes that no stored checkpoint has.

First the formulas themselves against the original's stored numbers; then our network against them on random weights,
which it takes in Keras' order and layout through its key map.
"""

import pytest
import torch
from oracle_proteinbert import Twin, losses, run
from parity import Outputs, differences, largest, rms
from safetensors.torch import load_file
from stored_proteinbert import CASES, FINE, build, keras_gradients, numbered, run_ours
from torch import Tensor

from plm.models.proteinbert import pretraining_loss
from plm_weights import export_weights
from plm_weights.proteinbert import published_rows

# Two float64 programs that add in another order differ by 2e-14 here (measured).
FLOAT64 = 1e-12
TWINS = [
    # One block, one head; everything is shorter than the reach of the wide convolution.
    Twin(1, 10, 14, 1, 3, kernel=9, dilation=5, annotations=7, lengths=(2, 9, 5), width=12, seed=1),
    # Even kernels, whose extra zero lies behind; values as wide as the local track, so that no shape tells them apart.
    Twin(2, 6, 18, 3, 4, kernel=4, dilation=3, annotations=5, lengths=(21, 17), width=21, seed=2),
    Twin(3, 8, 8, 2, 8, kernel=6, dilation=1, annotations=1, lengths=(30, 4, 11), width=33, seed=3),
    # <START> and <END> alone: two positions.
    Twin(2, 12, 20, 2, 6, kernel=3, dilation=2, annotations=13, lengths=(2, 2), width=2, seed=4),
    Twin(4, 16, 32, 4, 5, kernel=3, dilation=2, annotations=29, lengths=(70, 64, 3, 1), width=75, seed=5),
    Twin(2, 7, 15, 5, 2, kernel=1, dilation=7, annotations=3, lengths=(6, 8), width=9, seed=6),
]
every_twin = pytest.mark.parametrize("twin", TWINS, ids=str)


def truth_of(twin: Twin, dtype: torch.dtype = torch.float64) -> Outputs:
    tokens, annotations = twin.batch()
    found = run([x.to(dtype) for x in twin.weights()], tokens, annotations.to(dtype), twin.dilation)
    return {name: [x] for name, x in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_formulas_are_the_originals(name: str) -> None:
    case = CASES[name]
    weights = [x.double() for x in case.weights()]
    found = run(weights, case.tokens, case.annotations.double(), dilation=5)
    assert case.truth().keys() <= found.keys()
    assert largest(differences({name: [x] for name, x in found.items()}, case.truth())) < FLOAT64


def test_their_losses_and_gradients_too() -> None:
    case = CASES["tiny"]
    weights = [x.double().requires_grad_() for x in case.weights()]
    found = run(weights, case.tokens, case.annotations.double(), dilation=5)
    told = losses(found, case.inputs["target_ids"].long(), case.inputs["target_annotations"].double())
    told["total"].backward()
    for name, loss in told.items():
        torch.testing.assert_close(loss.detach()[None], case.expected[f"loss.{name}"], rtol=0, atol=FLOAT64)
    wanted = load_file(FINE / "gradients.safetensors")
    for name, weight in numbered(weights).items():
        # Gradients are at most 0.14, and two float64 programs differ by 2e-16 (measured).
        torch.testing.assert_close(weight.grad, wanted[f"grad.{name}"], rtol=0, atol=1e-14, msg=name)


@every_twin
def test_every_output(twin: Twin) -> None:
    """To the last digits in float64, and as precise as the formulas in float32."""
    weights, (tokens, annotations) = numbered(twin.weights()), twin.batch()
    truth = truth_of(twin)
    ours = run_ours(build(weights, twin.config, torch.float64), tokens, annotations)
    assert ours.keys() == truth.keys()
    assert largest(differences(ours, truth)) < FLOAT64

    floor = differences(truth_of(twin, torch.float32), truth)
    found = differences(run_ours(build(weights, twin.config, torch.float32), tokens, annotations), truth)
    # The noise floor is the formulas' own error in float32, over all outputs: sums of few numbers have errors that
    # scatter. Ours is 0.8 to 1.6 times that.
    whole = [rms({"all": torch.cat(list(errors.values()))})["all"] for errors in (found, floor)]
    assert whole[0] <= 2 * whole[1]


@every_twin
def test_losses_and_gradients(twin: Twin) -> None:
    """The gradient of the losses of pre-training by every weight, through every step, for targets unlike the input."""
    tokens, annotations = twin.batch()
    given = tokens.roll(1, 1), annotations.roll(1, 1).double()
    weights = [x.double().requires_grad_() for x in twin.weights()]
    wanted = losses(run(weights, *given, twin.dilation), tokens, annotations.double())
    wanted["total"].backward()

    net = build(numbered(twin.weights()), twin.config, torch.float64)
    found = pretraining_loss(net(*given), tokens, annotations.double())
    found[0].backward()
    for ours, theirs in zip(found, wanted.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT64)
    for name, gradient in keras_gradients(net).items():
        assert weights[int(name)].grad is not None
        torch.testing.assert_close(gradient, weights[int(name)].grad, rtol=0, atol=FLOAT64, msg=name)


@every_twin
def test_each_protein_as_if_alone(twin: Twin) -> None:
    """With ``lengths``, every output of a protein is what the formulas give for it alone and without pads."""
    tokens, annotations = twin.batch()
    net, weights = build(numbered(twin.weights()), twin.config, torch.float64), [x.double() for x in twin.weights()]
    lengths = torch.tensor(twin.lengths)
    with torch.no_grad():
        out = net(tokens, annotations.double(), lengths=lengths, hidden_states=True, attentions=True)
    for i, length in enumerate(twin.lengths):
        alone = run(weights, tokens[i : i + 1, :length], annotations[i : i + 1].double(), twin.dilation)
        pairs: list[tuple[Tensor, Tensor]] = [
            (out.local_representations[i, :length], alone["local_representations"][0]),
            (out.global_representations[i], alone["global_representations"][0]),
            (out.local_logits[i, :length], alone["seq_logits"][0]),
            *(
                (maps[i, :, :length], alone[f"block{b}.attention_weights"][0])
                for b, maps in enumerate(out.attentions, 1)
            ),
        ]
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


@every_twin
def test_the_way_back(twin: Twin) -> None:
    """Export gives the list that was imported, bit for bit."""
    weights = numbered(twin.weights())
    net = build(weights, twin.config, torch.float32)
    exported = export_weights(published_rows(vars(net.config)), net.state_dict())
    assert exported.keys() == weights.keys() and len(weights) == 7 + 23 * twin.blocks
    assert all(torch.equal(exported[name], x) for name, x in weights.items())
