"""The batch-invariant product: equal to its formula, the same bits for a row among any others, and it compiles."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, HALF
from torch import Tensor

from plm_kernels import batch_invariant, is_batch_invariant, product, reference

pytest.importorskip("triton")

from plm_kernels.gpu import matmul

SHAPES = [(1, 16, 33), (3, 40, 20), (70, 72, 130), (129, 200, 65), (0, 16, 8)]  # rows, inputs, outputs
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Products of the size of 1, where activations bend."""
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    return tuple(each.to(DEVICE, dtype) for each in (x, weight, bias))  # type: ignore[return-value]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max()) if truth.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = operands(*shape, dtype)
    for some in (bias, None):
        truth = reference.product(x.double(), weight.double(), None if some is None else some.double(), F.gelu)
        floor = error(reference.product(x, weight, some, F.gelu), truth)
        found = product(x, weight, some, "gelu", backend="triton")
        assert found.dtype == dtype and found.shape == (shape[0], shape[2])
        # The noise floor is the formula's own error in this dtype (up to 1.7e-6 in float32, 1.9e-3 in float16); 0.3 to
        # 1.7 times that is seen in float32, and just that in float16. What faults give is below.
        assert error(found, truth) <= 4 * floor


def test_faults_would_be_seen() -> None:
    """An input that is left out is 400,000 times the floor, a bias forgotten 2,000,000, the other GELU 360."""
    x, weight, bias = operands(129, 200, 65, torch.float32)
    truth = reference.product(x.double(), weight.double(), bias.double(), F.gelu)
    floor = error(reference.product(x, weight, bias, F.gelu), truth)
    assert error(product(x[:, :-1], weight[:, :-1], bias, "gelu", backend="triton"), truth) > 1000 * floor
    assert error(product(x, weight, None, "gelu", backend="triton"), truth) > 1000 * floor
    assert error(matmul.product(x, weight, bias, "gelu_tanh"), truth) > 100 * floor


@pytest.mark.parametrize("activation", matmul.FUSED)
def test_every_activation(activation: str) -> None:
    x, weight, bias = operands(9, 24, 40, torch.float32)
    wide = (12 * x, weight, bias)  # far into both tails
    truth = reference.product(*(each.double() for each in wide), FORMULAS[activation])
    floor = error(reference.product(*wide, FORMULAS[activation]), truth)
    # Products reach 50. The tails of an activation add nothing to the rounding of a sum.
    assert error(matmul.product(*wide, activation), truth) <= 4 * floor + 1e-6
    assert tuple(FORMULAS) == matmul.FUSED


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_nothing_is_written_beside_the_result(dtype: torch.dtype) -> None:
    """Tiles reach beyond the last row and the last output."""
    x, weight, bias = operands(70, 40, 20, dtype)
    tile = matmul.tiles(20, dtype)
    guarded = torch.full((80, 20), 7.0, dtype=dtype, device=DEVICE)
    shape = dict(zip(("BM", "BN", "BK"), tile[:3], strict=True))
    numbers = (70, 20, x.stride(0), weight.stride(0))
    matmul.product_kernel[(-(-70 // tile.rows),)](
        *(x, weight, bias, guarded[5:], *numbers), K=40, HAS_BIAS=True, ACTIVATION="none", GROUP=8, **shape
    )
    assert (guarded[:5] == 7).all() and (guarded[75:] == 7).all()
    assert torch.equal(guarded[5:75], product(x, weight, bias, backend="triton"))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_activations_that_are_not_fused(activation: str) -> None:
    x, weight, bias = operands(9, 24, 40, torch.float32)
    wanted = product(x, weight, bias, activation, backend="torch")  # type: ignore[arg-type]
    found = product(x, weight, bias, activation, backend="triton")  # type: ignore[arg-type]
    assert (found - wanted).abs().max() < 1e-6


def test_a_nan_stays_in_its_row() -> None:
    x, weight, bias = operands(70, 40, 20, torch.float32)
    whole = product(x, weight, bias, "relu", backend="triton")
    x[3, 7] = float("nan")
    broken = product(x, weight, bias, "relu", backend="triton")
    assert broken[3].isnan().all()
    assert torch.equal(torch.cat((broken[:3], broken[4:])), torch.cat((whole[:3], whole[4:])))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_bits_do_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    x, weight, bias = operands(200, 136, 72, dtype)
    whole = product(x, weight, bias, "gelu", backend="triton")
    for start, count in ((0, 1), (199, 1), (63, 3), (5, 130)):
        some = product(x[start : start + count], weight, bias, "gelu", backend="triton")
        assert torch.equal(some, whole[start : start + count]), (start, count)


def test_tiles_know_nothing_of_rows() -> None:
    """One choice for a width and a dtype; sizes that Triton takes, within a Hopper's shared memory."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for outputs in (33, 320, 960, 1280, 2560, 5120, 3 * 5120, 51_200):
            tile = matmul.tiles(outputs, dtype)
            assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:3])
            assert (tile.rows + tile.outputs) * tile.depth * dtype.itemsize * tile.stages <= 227 * 1024


def test_strided_operands() -> None:
    """Rows of a wider tensor are read where they lie; a transposed one is copied."""
    x, weight, bias = operands(5, 64, 24, torch.float32)
    wanted = product(x[:, :32].contiguous(), weight[:, :32].contiguous(), bias, backend="triton")
    assert torch.equal(product(x[:, :32], weight[:, :32], bias, backend="triton"), wanted)
    turned = x[:, :32].T.contiguous().T
    assert torch.equal(product(turned, weight[:, :32], bias, backend="triton"), wanted)


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch on a CPU and outside of the scope; on CUDA within it the kernel, whatever that costs."""
    x, weight, bias = operands(3, 16, 8, torch.float32)
    asked = []
    monkeypatch.setattr(matmul, "product", lambda *args: asked.append(args) or args[0])
    product(x, weight, bias)
    with batch_invariant():
        product(x, weight, bias)
        assert len(asked) == x.is_cuda
        with batch_invariant(False):
            assert is_batch_invariant()  # an inner scope breaks no outer promise
    assert not is_batch_invariant()
    with batch_invariant(False):
        assert not is_batch_invariant()
    with pytest.raises(ValueError, match="'cuda' is unknown; choose 'auto', 'torch' or 'triton'"):
        product(x, weight, bias, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one dtype.*got x \[3, 16\] in torch.float64"):
        product(x.double(), weight.double(), None, backend="triton")
    with pytest.raises(RuntimeError, match="no gradients"):
        product(x, weight.requires_grad_(), bias, backend="triton")


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plm_kernels.gpu.matmul import product_kernel, tiles

names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
cases = ((torch.float32, 320, "none"), (torch.bfloat16, 33, "none"), (torch.bfloat16, 2560, "gelu"))
for dtype, outputs, activation in cases:
    tile = tiles(outputs, dtype)
    constants = {"K": 640, "HAS_BIAS": True, "ACTIVATION": activation, "GROUP": 8}
    constants |= {"BM": tile.rows, "BN": tile.outputs, "BK": tile.depth}
    tensors = dict.fromkeys(("p_x", "p_weight", "p_bias", "p_y"), f"*{names[dtype]}")
    numbers = dict.fromkeys(("M", "N", "stride_x", "stride_weight"), "i32")
    whole = [0, 1, 2, 3, *((5,) if outputs % 16 == 0 else ()), 6, 7]  # multiples of 16, as a call would find
    source = ASTSource(
        product_kernel,
        tensors | numbers | dict.fromkeys(constants, "constexpr"),
        constants,
        {(i,): [["tt.divisibility", 16]] for i in whole},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert ("wgmma" in compiled.asm["ptx"]) == (dtype != torch.float32)
    assert "cp.async" in compiled.asm["ptx"] and compiled.metadata.shared <= 227 * 1024
    print(names[dtype], outputs)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_hopper() -> None:
    """Without a GPU: tensor cores and asynchronous loads where they are meant, within a program's shared memory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
