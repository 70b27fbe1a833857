"""Attention in Triton against the plain formula: values, gradients, invariances and faults.

Interpreted where there is no GPU (see kernel_device.py), so sizes are small, and odd. Tiles are of 16 to 128 tokens.
"""

import pytest
import torch
from kernel_device import DEVICE, HALF
from torch import Tensor

from plm_kernels import RelativeBias, attention, backends, packed_attention, reference
from plm_kernels.backends import KernelWarning
from plm_kernels.packed_attention import attention_choice

pytest.importorskip("triton")
# An empty sequence among them, as CUDA graphs pad with; the longest fills more tiles than a bias of reach 2 needs on
# either side, and not the last one.
LENGTHS = {torch.float32: (1, 0, 101), HALF: (1, 0, 201)}


def packed(lengths: tuple[int, ...], size: int, dtype: torch.dtype, heads: int = 2) -> tuple[Tensor, Tensor]:
    """Strided q, k, v ``[n, 3, h, d]`` as a fused projection gives them, and offsets."""
    generator = torch.Generator().manual_seed(sum(lengths) + size)
    qkv = torch.randn(sum(lengths), 3, heads, size, generator=generator)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return qkv.to(DEVICE, dtype), offsets.to(DEVICE)


def table(reach: int, heads: int = 2) -> Tensor:
    return torch.randn(heads, 2 * reach + 1, generator=torch.Generator().manual_seed(reach)).to(DEVICE)


class Case:
    """The inputs of one call; it gives the output and the gradients of a weighted sum of it, in any precision."""

    def __init__(
        self, size: int, dtype: torch.dtype, reach: int | None, causal: bool = False, scale: float = 0.3,
        lengths: tuple[int, ...] = (), partners: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        lengths = lengths or LENGTHS[dtype]
        qkv, self.offsets = packed(lengths, size, dtype)
        self.how = {"scale": scale, "causal": causal}
        self.inputs = list(qkv.unbind(1))
        self.longest = {"max_length": max(lengths)}
        if partners is not None:
            kv, self.how["key_offsets"] = packed(partners, size, dtype)
            self.inputs[1:] = kv.unbind(1)[1:]
            self.longest["max_key_length"] = max(partners)
        if reach is not None:
            self.inputs.append(table(reach))

    def run(self, backend: str, dtype: torch.dtype | None = None, gradients: bool = True) -> list[Tensor]:
        """The output and the gradients of q, k, v and the table, in another dtype if one is given."""
        leaves = [x if dtype is None else x.to(dtype) for x in self.inputs]
        leaves = [x.detach().requires_grad_(gradients) for x in leaves]
        q, k, v, *rest = leaves
        how = {**self.how, "bias": RelativeBias(rest[0]) if rest else None}
        if backend == "reference":
            out = reference.attention(q, k, v, self.offsets, **how)
        else:
            out = attention(q, k, v, self.offsets, **how, **self.longest, backend=backend)
        if gradients:
            out.backward(torch.arange(out.numel(), device=DEVICE).view_as(out).cos().to(out.dtype))
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    def noise(self, gradients: bool) -> list[Tensor]:
        """The formula's own error in this dtype, on 8 draws: of a table of 10 numbers it varies by a factor 8."""
        given, generator = self.inputs, torch.Generator().manual_seed(1)
        errors = []
        for draw in range(8):
            if draw > 0:
                self.inputs = [torch.randn(x.shape, generator=generator).to(x) for x in given]
            found, truths = (self.run("reference", dtype, gradients) for dtype in (None, torch.float64))
            pairs = zip(found, truths, strict=True)
            errors.append(torch.stack([rms(found - truth) for found, truth in pairs]))
        self.inputs = given
        return [rms(each) for each in torch.stack(errors, 1)]

    def check(self, gradients: bool) -> None:
        """As exact as the formula in the same dtype: its error is the noise floor, twice that is allowed."""
        ours, truths = self.run("triton", None, gradients), self.run("reference", torch.float64, gradients)
        for found, truth, floor in zip(ours, truths, self.noise(gradients), strict=True):
            assert found.isfinite().all()
            assert found.shape == truth.shape
            assert rms(truth) > 1e-3  # there is something to compare
            assert rms(found - truth) <= 2 * floor


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("reach", [None, 2, 200], ids=["plain", "near-bias", "far-bias"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_it_equals_the_formula(dtype: torch.dtype, causal: bool, reach: int | None) -> None:
    """With tiles wholly behind the bias's reach, ahead of it and within, and with a last one that is not full.

    With a reach of 2, tiles next to the query's own have one pair in their corners that is not far.
    """
    Case(24, dtype, reach, causal).check(gradients=False)


@pytest.mark.parametrize("size", [1, 16, 20, 32, 64, 80, 96, 128, 256])
def test_every_head_size(size: int) -> None:
    Case(size, HALF, 9, scale=size**-0.5, lengths=(33, 2)).check(gradients=True)


@pytest.mark.parametrize("size", [80, 160])
def test_large_heads_in_float32(size: int) -> None:
    Case(size, torch.float32, 9, scale=size**-0.5, lengths=(19, 2)).check(gradients=True)


@pytest.mark.parametrize("scale", [1.0, 0.125, -0.7])
def test_every_scale(scale: float) -> None:
    Case(16, torch.float32, 3, scale=scale, lengths=(37, 2)).check(gradients=True)


def test_a_scale_of_zero_leaves_the_bias_alone() -> None:
    case = Case(16, torch.float32, 3, scale=0.0, lengths=(37, 2))
    (ours, *_), (expected, *_) = case.run("triton"), case.run("reference", torch.float64)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("reach", "causal"), [(2, False), (2, True), (1, False), (90, False), (None, True)], ids=str
)  # fmt: skip
def test_gradients_equal_the_formulas(reach: int | None, causal: bool) -> None:
    """Of q, k, v and the table, whose edges many distances share."""
    Case(24, torch.float32, reach, causal, lengths=(1, 0, 70)).check(gradients=True)


@pytest.mark.parametrize(("reach", "causal"), [(2, False), (300, True)], ids=str)
def test_gradients_in_half_precision(reach: int, causal: bool) -> None:
    Case(32, HALF, reach, causal, lengths=(1, 0, 135)).check(gradients=True)


def test_a_table_of_one_number_has_no_gradient() -> None:
    """Softmax does not see a constant, so all that is found is what rounding left over."""
    case = Case(16, torch.float32, 0, lengths=(40,))
    *_, found = case.run("triton")
    assert found.shape == (2, 1)
    assert found.abs().max() < 1e-5 * case.run("triton")[1].abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_attention_to_another_batch(dtype: torch.dtype) -> None:
    """With partners longer, shorter, and of no tokens, the sum over which is zero; and partners of nobody."""
    case = Case(24, dtype, None, lengths=(33, 0, 5, 9), partners=(50, 4, 0, 40))
    case.check(gradients=True)
    assert not case.run("triton", gradients=False)[0][33:38].any()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 0, 3, 0)], ids=str)
def test_few_tokens_or_none(lengths: tuple[int, ...]) -> None:
    qkv, offsets = packed(lengths, 16, torch.float32)
    bias = RelativeBias(table(3).requires_grad_())
    qkv.requires_grad_()
    out = attention(*qkv.unbind(1), offsets, scale=1, bias=bias, max_length=max(lengths, default=0), backend="triton")
    expected = reference.attention(*qkv.unbind(1), offsets, scale=1, bias=bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    out.sum().backward()
    assert bias.table.grad is not None and bias.table.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    """Among neighbours of huge numbers, and with other tiles before it."""
    lengths, at = (3, 70, 40), slice(3, 73)
    batch, alone = (Case(24, dtype, 5, lengths=each) for each in (lengths, lengths[1:2]))
    for whole, single in zip(batch.inputs[:3], alone.inputs[:3], strict=True):
        single.copy_(whole[at])
        whole[: at.start], whole[at.stop :] = 3e4, -3e4
    together, single = (case.run("triton", gradients=False)[0] for case in (batch, alone))
    assert torch.equal(together[at], single)
    assert together[: at.start].eq(3e4).all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients_have_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    def gradients(qkv: Tensor, lengths: tuple[int, ...], upstream: Tensor) -> Tensor:
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
        qkv, bias = qkv.clone().requires_grad_(), RelativeBias(table(5))
        out = attention(*qkv.unbind(1), offsets, scale=1, bias=bias, max_length=40, backend="triton")
        out.backward(upstream)
        assert qkv.grad is not None
        return qkv.grad

    qkv, _ = packed((3, 40, 20), 24, dtype)
    upstream = torch.randn_like(qkv[:, 0])
    together = gradients(qkv, (3, 40, 20), upstream)
    assert torch.equal(together[3:43], gradients(qkv[3:43], (40,), upstream[3:43]))


def test_strided_inputs_are_read_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of a fused projection are not copied; channels that are not next to each other are, and stay right."""
    from plm_kernels.gpu import attention as gpu

    read: list[int] = []
    launch = gpu.launch

    def launched(kernel: object, programs: tuple[int, int], size: object, *tensors: Tensor, **rest: int) -> None:
        read.extend(x.data_ptr() for x in tensors[:3])
        launch(kernel, programs, size, *tensors, **rest)

    monkeypatch.setattr(gpu, "launch", launched)
    qkv, offsets = packed((30, 3), 24, torch.float32)
    how = {"scale": 0.3, "max_length": 30, "bias": RelativeBias(table(5)), "backend": "triton"}
    views = qkv.unbind(1)
    out = attention(*views, offsets, **how)
    assert read == [x.data_ptr() for x in views]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    assert turned[0].stride(-1) != 1
    assert torch.equal(attention(*turned, offsets, **how), out)


def test_faults_would_be_caught() -> None:
    """A table read from the wrong end, with the wrong sign or off by one place is no rounding error."""
    case = Case(24, torch.float32, 5, lengths=(1, 0, 70))
    ours, floor = case.run("triton"), [rms(a - b) for a, b in zip(case.run("reference"),
        case.run("reference", torch.float64), strict=True)]  # fmt: skip
    right = case.inputs[3]
    for wrong in (right.flip(1), -right, right.roll(1, 1)):
        case.inputs[3] = wrong
        for found, expected, noise in zip(ours, case.run("reference", torch.float64), floor, strict=True):
            assert rms(found - expected) > 1000 * noise
    case.inputs[3] = right
    assert rms(ours[4].flip(1) - case.run("reference", torch.float64)[4]) > 1000 * floor[4]


def on_cuda(dtype: torch.dtype, bias: bool, head_size: int = 64) -> str:
    return attention_choice("cuda", dtype, head_size, bias=bias)


def test_what_auto_means_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    monkeypatch.setattr(packed_attention, "varlen_available", lambda: True)
    for half in (torch.bfloat16, torch.float16):
        assert on_cuda(half, bias=True) == "triton"
        assert on_cuda(half, bias=False) == "varlen"
        assert on_cuda(half, bias=False, head_size=20) == "triton"
        assert on_cuda(half, bias=False, head_size=512) == on_cuda(half, bias=True, head_size=264) == "dense"
    assert on_cuda(torch.float32, bias=True) == on_cuda(torch.float32, bias=False) == "triton"
    assert on_cuda(torch.float64, bias=True) == on_cuda(torch.float64, bias=False) == "dense"
    assert attention_choice("cpu", torch.bfloat16, 64, bias=True) == "segments"
    assert attention_choice("mps", torch.float16, 64, bias=False) == "dense"
    with backends.prefer("torch"):
        assert on_cuda(torch.bfloat16, bias=True) == "dense" and on_cuda(torch.bfloat16, bias=False) == "varlen"
    with backends.prefer("triton"), torch.no_grad():
        assert attention_choice("cpu", torch.float32, 64, bias=False) == on_cuda(torch.float16, False) == "triton"
    monkeypatch.setattr(packed_attention, "varlen_available", lambda: False)
    assert on_cuda(torch.bfloat16, bias=False) == "triton"
    monkeypatch.setattr(packed_attention, "varlen_available", lambda: True)
    backends._broken["varlen"] = "RuntimeError"
    assert on_cuda(torch.bfloat16, bias=False) == "triton"
    with backends.prefer("torch"):
        assert on_cuda(torch.bfloat16, bias=False) == "dense"
    backends._broken["attention backward"] = "RuntimeError"
    assert on_cuda(torch.bfloat16, bias=True) == "dense"
    with torch.no_grad():
        assert on_cuda(torch.bfloat16, bias=True) == "triton"
    backends._broken["attention"] = "RuntimeError"
    with torch.no_grad():
        assert on_cuda(torch.bfloat16, bias=True) == "dense"
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setattr(backends, "triton_available", lambda: False)
    assert on_cuda(torch.bfloat16, bias=True) == on_cuda(torch.float32, bias=False) == "dense"


def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no ptxas")


@pytest.mark.parametrize("kernel", ["forward", "gradients"])
def test_a_kernel_that_fails_costs_a_warning(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Forward or backward: the dense backend does its work, with the same numbers."""
    from plm_kernels.gpu import attention as gpu

    case = Case(16, torch.float32, 3, lengths=(9, 2))
    expected = case.run("reference")
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setattr(packed_attention, "choose_backend", lambda q, bias: "triton")
    for ours, wanted in zip(case.run("auto"), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert not backends.broken()
    monkeypatch.setattr(gpu, kernel, fail)
    with pytest.warns(KernelWarning, match="does not work here, PyTorch is used: RuntimeError: no ptxas"):
        found = case.run("auto")
    assert [*backends.broken()] == ["attention" if kernel == "forward" else "attention backward"]
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="no ptxas"):
        case.run("triton")


@pytest.mark.parametrize("prefer", ["auto", "torch"])
def test_varlen_that_fails_costs_a_warning(monkeypatch: pytest.MonkeyPatch, prefer: backends.Backend) -> None:
    """Then the Triton kernel does its work, or the dense backend where PyTorch is asked for: the same numbers."""
    case = Case(16, torch.float32, None, lengths=(9, 2))
    expected, used = case.run("reference"), []
    choice = {"auto": "triton", "torch": "dense"}[prefer]

    def choose(q: torch.Tensor, bias: RelativeBias | None) -> str:
        return choice if "varlen" in backends.broken() else "varlen"

    for name in ("_triton", "_dense"):
        real = getattr(packed_attention, name)
        monkeypatch.setattr(packed_attention, name, lambda *a, n=name, f=real: [used.append(n), f(*a)][1])
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setattr(packed_attention, "choose_backend", choose)
    monkeypatch.setattr(packed_attention, "_varlen", fail)
    with backends.prefer(prefer):
        with pytest.warns(KernelWarning, match="^torch's varlen attention does not work here, another is used"):
            found = case.run("auto")
        again = case.run("auto")
    assert [*backends.broken()] == ["varlen"] and used[0] == f"_{choice}"
    for ours, same, wanted in zip(found, again, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
            assert torch.equal(ours, same)
    monkeypatch.setattr(backends, "_broken", {})
    q, k, v = (torch.zeros(3, 1, 16) for _ in range(3))
    with pytest.raises(ValueError, match=r"share a type.*float32, torch\.float16"):
        attention(q, k.half(), v, torch.tensor([0, 3]), scale=1, max_length=3)
    assert not backends.broken()


def test_wrong_arguments_are_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_broken", {})
    qkv, offsets = packed((3,), 16, torch.float32)
    q, k, v = qkv.unbind(1)
    how = {"scale": 1, "max_length": 3}
    with pytest.raises(ValueError, match=r"float16 on CUDA.*float64.*Use backend='auto' or 'dense'"):
        attention(*qkv.double().unbind(1), offsets, **how, backend="triton")
    with pytest.raises(ValueError, match=r"up to 256.*heads of 264"):
        attention(*torch.zeros(3, 3, 1, 264, device=DEVICE).unbind(1), offsets, **how, backend="triton")
    monkeypatch.setattr(packed_attention, "choose_backend", lambda q, bias: "triton")
    with pytest.raises(ValueError, match=r"share a type.*float32, torch\.float16"):
        attention(q, k.half(), v, offsets, **how)
    with pytest.raises(ValueError, match=r"share a type, and a device .*meta"):
        attention(q, k, v, offsets, **how, bias=RelativeBias(torch.zeros(2, 3, device="meta")))
    assert not backends.broken()


def test_offsets_from_inference_mode() -> None:
    """Whoever trains on batches that were made for predictions."""
    case = Case(16, torch.float32, 3, lengths=(5, 2))
    wanted = case.run("triton")
    with torch.inference_mode():
        case.offsets = case.offsets.clone()
    assert case.offsets.is_inference()
    assert all(map(torch.equal, case.run("triton"), wanted))


def test_tiles_of_the_backward_pass() -> None:
    from plm_kernels.gpu.attention_backward import Tiles, capability, tiles

    assert capability(torch.zeros(1)) == 9
    for generation in (7, 8, 9, 10, 12):
        small = generation not in (9, 10)
        assert tiles(64, torch.bfloat16, True, generation) == (Tiles(32, 32, 4, 2) if small else Tiles(64, 64, 4, 2))
        assert tiles(64, torch.bfloat16, False, generation) == Tiles(64, 64, 4, 2)
        assert tiles(128, torch.float16, True, generation) == Tiles(64, 64, 8, 2)
        assert tiles(64, torch.float32, True, generation) == Tiles(32, 32, 8, 1)


@pytest.mark.parametrize("reach", [2, 40])
def test_smaller_tiles_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch, reach: int) -> None:
    """As of an A100, wherever this runs."""
    monkeypatch.setattr("plm_kernels.gpu.attention_backward.capability", lambda x: 8)
    Case(24, HALF, reach, lengths=(70, 1, 33)).check(gradients=True)
