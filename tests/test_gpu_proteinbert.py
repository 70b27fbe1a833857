"""The whole ProteinBERT with Triton kernels, on a GPU if there is one, else interpreted; and that they compile.

Against the same network in float64, which PyTorch runs, and against what the original computed.
"""

import copy
from collections import Counter
from importlib import import_module

import pytest
import torch
from kernel_device import DEVICE, HALF
from stored_proteinbert import CASES
from tiny import proteinbert_model
from torch import Tensor

from plm.layers import Linear
from plm.models.proteinbert import Config, Output, ProteinBERT
from plm_kernels import prefer

pytest.importorskip("triton")
convolution, global_attention = (
    import_module(f"plm_kernels.gpu.{name}") for name in ("convolution", "global_attention")
)

LENGTHS = (21, 1, 9)
SIZES = {
    "tiny": Config(26, 40, 3, 32, 64, 4, 16),
    "odd": Config(26, 7, 2, 10, 14, 2, 3, kernel=4, dilation=3),
}
each_size = pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is run from now on."""
    counted: Counter[str] = Counter()
    for module, name in ((convolution, "local_block"), (global_attention, "global_attention")):

        def kernel(*given: object, run: object = getattr(module, name), name: str = name) -> object:
            counted[name] += 1
            return run(*given)  # type: ignore[operator]

        monkeypatch.setattr(module, name, kernel)
    return counted


def network(config: Config, dtype: torch.dtype) -> ProteinBERT:
    return proteinbert_model(dtype, config).net.to(DEVICE)


def tokens() -> Tensor:
    return torch.randint(25, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.inference_mode()
def run(net: ProteinBERT, lengths: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Every state of every block; of the local ones those of the proteins' own tokens."""
    out: Output = net(tokens(), lengths=lengths, hidden_states=True, attentions=True)
    keep = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS if lengths else (max(LENGTHS),) * 3)[:, None]
    local = {f"local{i}": x[keep.to(DEVICE)] for i, x in enumerate((*out.local_states, out.local_logits))}
    both = {f"global{i}": x for i, x in enumerate((*out.global_states, out.annotation_logits))}
    return local | both | {f"attention{i}": x for i, x in enumerate(out.attentions)}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["pads are tokens", "no pads"])
def test_all_states(config: Config, dtype: torch.dtype, lengths: tuple[int, ...] | None, runs: Counter[str]) -> None:
    """As exact as by PyTorch in the same dtype."""
    net = network(config, dtype)
    truth, plain = run(copy.deepcopy(net).double(), lengths), run(net, lengths)
    assert not runs or DEVICE.type == "cuda"
    runs.clear()
    with prefer("triton"):
        found = run(net, lengths)
    assert runs == {"local_block": config.layers, "global_attention": config.layers}
    assert found.keys() == truth.keys() and len(truth) == 4 + 5 * config.layers
    for name, wanted in truth.items():
        # The noise floor is PyTorch's own error, and one rounding of the result. 0.3 to 0.9 of it are seen.
        floor = rms(plain[name].double() - wanted) + rms(wanted - wanted.to(dtype))
        assert rms(found[name].double() - wanted) <= 2 * floor, name


@pytest.mark.parametrize("name", ["tiny", "g1"])
def test_the_originals_numbers(name: str, runs: Counter[str]) -> None:
    """Within twice the original's own error in float32."""
    case = CASES[name]
    net = case.net(torch.float32).to(DEVICE)
    with torch.inference_mode(), prefer("triton"):
        out = net(case.tokens.to(DEVICE), case.annotations.float().to(DEVICE), hidden_states=True)
    assert len(runs) == 2
    for found, key in (
        (out.local_representations, "local_representations"),
        (out.global_representations, "global_representations"),
    ):
        assert (found.cpu() - case.expected[key]).abs().max() <= 2 * case.float32_errors[key]


@torch.inference_mode()
def test_a_protein_has_the_same_numbers_alone(runs: Counter[str]) -> None:
    """Without pads. What may be left of rounding comes from the products that are PyTorch's."""
    net = network(SIZES["tiny"], torch.float32)
    with prefer("triton"):
        whole = net(tokens(), lengths=LENGTHS)
        for i, length in enumerate(LENGTHS):
            alone = net(tokens()[i : i + 1, :length])
            # A hundred times the spacing of float32 at 1; nothing is seen.
            assert (alone.local[0] - whole.local[i, :length]).abs().max() < 1e-5
            assert (alone.global_[0] - whole.global_[i]).abs().max() < 1e-5
    assert runs["local_block"] == 12


@torch.inference_mode()
def test_a_mask_that_is_lost_would_be_seen() -> None:
    net = network(SIZES["tiny"], torch.float32)
    with prefer("triton"):
        found, padded = run(net, LENGTHS), run(net, None)
    last = found["global6"]
    assert rms(last[0] - padded["global6"][0]) < 1e-5 < 1e-2 < rms(last[1:] - padded["global6"][1:])


def test_gradients_are_torchs(runs: Counter[str]) -> None:
    net = network(SIZES["tiny"], torch.float32).requires_grad_(True)
    with prefer("triton"):
        net(tokens()).local.square().sum().backward()
    assert not runs and net.blocks[0].narrow.weight.grad.abs().max() > 0


@torch.inference_mode()
def test_layers_in_8_bits_are_torchs(runs: Counter[str]) -> None:
    """The kernel of the local track takes no whole numbers."""
    net = network(SIZES["tiny"], torch.bfloat16)
    for layer in (each for each in net.blocks.modules() if isinstance(each, Linear)):
        layer.keep_8_bits()
    with prefer("torch"):
        wanted = net(tokens()).local
    with prefer("triton"):
        found = net(tokens()).local
    assert runs == {"global_attention": 3}
    # Five roundings to bfloat16 of half its spacing at 1. 0.003 is seen.
    assert rms(found - wanted) < 0.02 * rms(wanted)
