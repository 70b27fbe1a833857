"""The networks on Triton's element-wise kernels: which of them serve, and that the numbers are those of PyTorch."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from kernel_device import DEVICE, HALF
from kernel_errors import error
from torch import Tensor, nn

import plm_kernels
from plm.models import bert, esm, progen2, t5
from plm.packing import Packed

pytest.importorskip("triton")

NETS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "esm2": (lambda: esm.ESM(esm.Config(2, 96, 4, 384, None, False, True, 1e-5)), {"norm", "rotary"}),
    "esm1b": (lambda: esm.ESM(esm.Config(2, 96, 4, 384, 64, True, True, 1e-5)), {"norm"}),
    "bert": (lambda: bert.BERT(bert.Config(30, 2, 96, 4, 384, 64, 2, pooler=True)), {"norm"}),
    "t5-gelu": (lambda: t5.T5(t5.Config(32, 2, 2, 96, 4, 24, 250, "gated-gelu")), {"norm", "gate"}),
    "t5-silu": (lambda: t5.T5(t5.Config(32, 2, 2, 96, 4, 24, 250, "gated-silu")), {"norm", "gate"}),
    "t5-relu": (lambda: t5.T5(t5.Config(32, 2, 2, 96, 4, 24, 250, "relu")), {"norm"}),
    "progen2": (lambda: progen2.ProGen2(progen2.Config(32, 32, 2, 128, 4, 16, 512, 512)), {"norm", "rotary"}),
}


def network(name: str) -> nn.Module:
    """A small one with random weights; norms are near one, so that what is added to their input shows."""
    net = NETS[name][0]().double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.detach().mul_(parameter.dim() == 1).add_(torch.randn(parameter.shape, generator=generator) * size)
    return net.to(DEVICE)


def sequences() -> Packed:
    """Five of random tokens, one of them a single token."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 20, (n,), generator=generator).tolist() for n in (1, 7, 7, 30, 3)]
    return Packed.from_ids(rows).to(DEVICE)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From here on every call that has an element-wise kernel is served by it; the names of those that were."""
    names: set[str] = set()

    def serve(
        name: str,
        x: Tensor,
        backend: str,
        kernel: Callable[[], Any],
        plain: Callable[[], Any],
        fits: Callable[[], bool] = lambda: True,
    ) -> Any:
        names.add(name)
        assert fits()
        return kernel()

    for module in (plm_kernels.norms, plm_kernels.rotary, plm_kernels.gates):
        monkeypatch.setattr(module, "serve", serve)
    return names


@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_networks_give_the_same_numbers(name: str, request: pytest.FixtureRequest) -> None:
    """In float64, where the order of sums is all that differs, every state and the logits; with and without states."""
    net, batch = network(name), sequences()
    how = {"decoder": batch} if name.startswith("t5") else {}
    plain = net(batch, hidden_states=True, **how)
    served = request.getfixturevalue("served")
    ours = net(batch, hidden_states=True, **how)
    assert served == NETS[name][1]
    for found, wanted in zip((*ours.hidden_states, ours.logits), (*plain.hidden_states, plain.logits), strict=True):
        assert wanted.abs().max() > 0.1
        # Numbers up to 30 after two layers: some tens of roundings of 2e-16.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert torch.equal(net(batch, **how).logits, ours.logits)
    if name.startswith("t5"):
        encoded = net.encode(batch, hidden_states=True)
        assert torch.equal(encoded.hidden, ours.encoder_hidden)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "half"])
@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_networks_lose_no_digits(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Against the same rounded weights in float64. Kernels round less often than PyTorch; 0.85 to 1.16 were seen."""
    net, batch = network(name).to(dtype), sequences()
    how = {"decoder": batch} if name.startswith("t5") else {}
    truth = deepcopy(net).double()(batch, **how).logits
    plain = error(net(batch, **how).logits, truth)
    request.getfixturevalue("served")
    assert error(net(batch, **how).logits, truth) <= 1.5 * plain


@torch.inference_mode()
def test_steps_of_a_decoder_equal_the_whole(served: set[str]) -> None:
    """A prompt, then token by token: keys are turned in place before they go into the cache."""
    net = network("progen2")
    ids = [3, *torch.randint(5, 20, (11,), generator=torch.Generator().manual_seed(0)).tolist()]
    whole = net(Packed.from_ids([ids]).to(DEVICE)).logits
    state = net.room(progen2.Room(1, len(ids), 1, 4))
    net.join(state, [ids[:4]], [1])
    steps = torch.cat([net.step(torch.tensor([token], device=DEVICE), state) for token in ids[3:]])
    torch.testing.assert_close(steps, whole[3:], rtol=0, atol=1e-12)
    assert served == {"norm", "rotary"}


@pytest.mark.parametrize("name", NETS)
def test_gradients_never_go_through_a_kernel(name: str) -> None:
    """Kernels have none, and "auto" sees by itself, on a GPU as well, that they are wanted."""
    net = network(name).float()
    batch = Packed.from_ids([[5, 6, 7]]).to(DEVICE)
    net(batch, **({"decoder": batch} if name.startswith("t5") else {})).logits.square().sum().backward()
    without = {key.partition(".")[0] for key, parameter in net.named_parameters() if parameter.grad is None}
    assert without <= {"pooler"}  # which no logits come from
