"""Linear weights in 8 bits: what is kept, what it costs in precision, and that few rows and many agree."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import plm
from plm.layers import Linear
from plm_kernels import FEW, eight_bits, linear_8bit

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ("progen2/bin_fp16_large_vocab", "t5/ankh3_tiny", "esm/esm2_tiny", "bert/igbert_tiny")
BF16 = torch.finfo(torch.bfloat16).eps / 2  # the largest relative rounding


def weights(outputs: int = 96, inputs: int = 64) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / 8


def test_rounding() -> None:
    """No weight moves by more than half a step, and of a step a row has 127 up to its largest weight."""
    weight = weights()
    weight[3] = 0
    whole, scale = eight_bits(weight)
    assert whole.dtype == torch.int8 and scale.dtype == torch.bfloat16 and whole.abs().max() == 127
    step = weight.abs().amax(-1) / 127
    assert (scale.float() - step).abs().max() <= BF16 * step.max()
    moved = (whole.float() * scale.float()[:, None] - weight).abs()
    # The scale's own rounding may push the largest weight past 127 steps, where it is cut.
    assert (moved <= (0.5 + 127 * BF16) * scale.float()[:, None] + 1e-9).all() and (moved[3] == 0).all()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("inputs", [64, 40])  # whole blocks of the kernel, and not
@pytest.mark.parametrize("rows", [1, 2, FEW, 7])
def test_product(rows: int, inputs: int, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the formula within bfloat16's rounding of its result (the kernel adds in float32)."""
    if not kernel:
        monkeypatch.setattr("plm_kernels.eight_bit.kernel_available", lambda: False)
    whole, scale = eight_bits(weights(inputs=inputs))
    generator = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((rows, inputs), (96,)))
    product = x.double() @ (whole.double() * scale.double()[:, None]).T
    found = linear_8bit(x, whole, scale, bias).double()
    # Rounded once or twice, then added to the bias and rounded again.
    assert ((found - (product + bias.double())).abs() <= 3 * BF16 * (product.abs() + bias.double().abs() + 1e-3)).all()


@pytest.mark.parametrize("folder", FOLDERS)
def test_layers_keep_8_bits_and_heads_do_not(folder: str) -> None:
    model = plm.load(GOLDEN / folder, dtype="int8")
    layers = {name: module for name, module in model.net.named_modules() if isinstance(module, Linear)}
    assert layers and model.weights == "int8" and model.dtype == torch.bfloat16
    for name, module in layers.items():
        wanted = torch.bfloat16 if name == "lm_head" else torch.int8
        assert module.weight.dtype == wanted and (module.scale is None) == (name == "lm_head")
    assert plm.load(GOLDEN / folder, dtype="bfloat16").weights == ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_precision(folder: str) -> None:
    """Embeddings of whole weights, against float64 and beside what bfloat16 loses itself.

    Steps of a row's largest weight over 127 are about three times as coarse as bfloat16 is in the mean.
    """
    found = {}
    for dtype in ("float64", "bfloat16", "int8"):
        (found[dtype],) = plm.embed(plm.load(GOLDEN / folder, dtype=dtype), "MKTAYIAKQRQISFVKSHFSRQ")
    lost = {dtype: float((found[dtype] - found["float64"]).square().mean().sqrt()) for dtype in ("bfloat16", "int8")}
    assert 0 < lost["int8"] <= 4 * lost["bfloat16"], lost


def test_few_rows_and_many_are_the_same_numbers() -> None:
    """By two kernels, so within bfloat16; and the weights that many rows want are laid out once."""
    layer = Linear(64, 96)
    with torch.no_grad():
        layer.weight.copy_(weights())
    layer = layer.bfloat16().eval()
    layer.keep_8_bits()
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        many, packed = layer(x), layer.packed.packed
        again = layer(x)
        few = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(many, again) and layer.packed.packed is packed
    assert ((many - few).float().abs() <= 4 * BF16 * (many.float().abs() + 0.1)).all()


@pytest.mark.parametrize("name", ["progen2/bin_fp16_large_vocab", "t5/ankh3_tiny"])
def test_it_writes(name: str) -> None:
    model = plm.load(GOLDEN / name, dtype="int8")
    one, other = (plm.generate(model, "MKT", max_length=12, seed=3, num_samples=2)[0] for _ in range(2))
    assert one == other and len(one[0].ids) > 1


def test_torch_int8_is_the_same_and_other_names_are_refused() -> None:
    assert plm.load(GOLDEN / FOLDERS[0], dtype=torch.int8).weights == "int8"
    with pytest.raises(ValueError, match=r"'int4' is unknown; choose 'auto', .*'int8'"):
        plm.load(GOLDEN / FOLDERS[0], dtype="int4")


def test_a_state_of_other_weights_is_not_taken() -> None:
    """Whole numbers are no weights without their scales, and the reverse: the names tell."""
    folder = GOLDEN / FOLDERS[0]
    narrow, wide = plm.load(folder, dtype="int8").net, plm.load(folder, dtype="bfloat16").net
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        wide.load_state_dict(narrow.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*scale"):
        narrow.load_state_dict(wide.state_dict())
    other = plm.load(folder, dtype="int8").net
    other.load_state_dict(narrow.state_dict())


def test_again_and_in_another_dtype() -> None:
    """Nothing is rounded twice, and nothing is multiplied with scales of another dtype."""
    layer = Linear(64, 96)
    layer = layer.bfloat16().eval().requires_grad_(False)
    layer.keep_8_bits()
    whole, scale = layer.weight.clone(), layer.scale
    layer.keep_8_bits()
    assert scale is not None and torch.equal(layer.weight, whole) and layer.scale is scale
    with pytest.raises(TypeError, match=r"take bfloat16, not torch\.float32: load the model again"):
        layer(torch.randn(2, 64))
    with pytest.raises(TypeError, match="take bfloat16"):
        layer.float()(torch.randn(2, 64))
