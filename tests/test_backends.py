"""Which implementation serves a call, and what happens where a kernel does not work."""

import ast
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import plm
from plm_kernels import backends
from plm_kernels.backends import KernelWarning, attempt, picks, prefer, serve


@pytest.fixture(autouse=True)
def none_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_broken", {})


def kernel() -> str:
    return "triton"


def plain() -> str:
    return "torch"


def failing() -> str:
    raise RuntimeError("no ptxas\nand more lines")


def test_a_cpu_is_served_by_torch() -> None:
    x = torch.zeros(1)
    assert serve("rotary", x, "auto", kernel, plain) == "torch"
    assert serve("rotary", x, "torch", kernel, plain) == "torch"
    assert serve("rotary", x, "triton", kernel, plain) == "triton"
    with pytest.raises(ValueError, match="'cuda' is unknown; choose 'auto', 'torch' or 'triton'"):
        serve("rotary", x, "cuda", kernel, plain)  # type: ignore[arg-type]


def test_a_kernel_that_fails_costs_one_warning() -> None:
    with pytest.warns(KernelWarning, match="'rotary' does not work here, PyTorch is used: RuntimeError: no ptxas$"):
        assert attempt("rotary", failing, plain) == "torch"
    assert backends.broken() == {"rotary": "RuntimeError: no ptxas"}


def test_a_kernel_asked_for_by_name_may_fail() -> None:
    with pytest.raises(RuntimeError, match="no ptxas"):
        serve("rotary", torch.zeros(1), "triton", failing, plain)


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda = True


@torch.inference_mode()
def test_cuda_is_served_by_triton_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    assert serve("rotary", x, "auto", kernel, plain) == "triton"
    with pytest.warns(KernelWarning):
        serve("rotary", x, "auto", failing, plain)
    with warnings.catch_warnings(action="error"):
        assert serve("rotary", x, "auto", failing, plain) == "torch"
        assert serve("norm", x, "auto", kernel, plain) == "triton"
    monkeypatch.setattr(backends, "triton_available", lambda: False)
    assert serve("norm", x, "auto", kernel, plain) == "torch"


def test_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    assert serve("rotary", OnCuda(), "auto", kernel, plain) == "torch"  # type: ignore[arg-type]


def test_auto_is_what_is_preferred() -> None:
    x = torch.zeros(1)
    with torch.inference_mode(), prefer("triton"):
        assert serve("rotary", x, "auto", kernel, plain) == "triton"
        assert serve("rotary", x, "torch", kernel, plain) == "torch"
        with pytest.raises(RuntimeError, match="no ptxas"):
            serve("rotary", x, "auto", failing, plain)
        with prefer("torch"):
            assert serve("rotary", x, "auto", kernel, plain) == "torch"
            assert serve("rotary", x, "triton", kernel, plain) == "triton"
        with prefer("auto"):
            assert serve("rotary", x, "auto", kernel, plain) == "torch"
        assert serve("rotary", x, "auto", kernel, plain) == "triton"
    with prefer("triton"):
        assert serve("rotary", x, "auto", kernel, plain) == "torch", "gradients"
    with torch.inference_mode():
        assert serve("rotary", x, "auto", kernel, plain) == "torch"
    with pytest.raises(ValueError, match="'cuda' is unknown"), prefer("cuda"):  # type: ignore[arg-type]
        pass


def test_a_preference_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="no ptxas"), torch.inference_mode(), prefer("triton"):
        failing()
    with torch.inference_mode():
        assert serve("rotary", torch.zeros(1), "auto", kernel, plain) == "torch"


@torch.inference_mode()
def test_cuda_may_prefer_torch() -> None:
    with prefer("torch"):
        assert serve("rotary", OnCuda(), "auto", kernel, plain) == "torch"  # type: ignore[arg-type]


@torch.inference_mode()
def test_what_does_not_fit_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody asks whether it fits where PyTorch serves anyway."""
    x: Tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    assert serve("norm", x, "auto", failing, plain, lambda: False) == "torch"
    assert serve("norm", x, "triton", failing, plain, lambda: False) == "torch"
    assert not backends.broken()
    assert serve("norm", torch.zeros(1), "auto", failing, plain, failing) == "torch"  # type: ignore[arg-type]


class Forbidding:
    """A finder that lets nobody look for Triton."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "triton":
            raise ModuleNotFoundError(f"{name} is forbidden")


def test_triton_that_cannot_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Forbidding(), *sys.meta_path])
    assert backends.triton_available.__wrapped__() is False


def test_every_kernel_has_its_module() -> None:
    folder = Path(backends.__file__).parent / "gpu"
    assert all((folder / f"{module}.py").is_file() for module in backends.KERNELS.values())


def test_kernels_are_launched_on_the_device_of_their_tensors() -> None:
    """Triton takes the current device, which need not be theirs."""
    launched = 0
    for path in (Path(backends.__file__).parent / "gpu").glob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = {
            inner
            for outer in ast.walk(tree)
            if isinstance(outer, ast.With) and ast.unparse(outer.items[0]).startswith("torch.cuda.device_of(")
            for inner in ast.walk(outer)
        }
        launches = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and isinstance(x.func, ast.Subscript)]
        launched += len(launches)
        assert all(x in guarded for x in launches), path.name
    assert launched == 12


def test_memory_that_runs_out_is_no_fault_of_the_kernel() -> None:
    def greedy() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        attempt("rotary", greedy, plain)
    assert not backends.broken()


def test_nor_is_what_triton_says_of_it() -> None:
    """Its launcher knows no class of its own; a program that asks for more than an SM has never runs, however."""

    def greedy() -> str:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    def too_large() -> str:
        raise RuntimeError("out of resource: shared memory, Required: 240000, Hardware limit: 101376.")

    with pytest.raises(torch.OutOfMemoryError, match="Triton Error"):
        attempt("rotary", greedy, plain)
    assert not backends.broken()
    with pytest.warns(KernelWarning, match="out of resource"):
        assert attempt("rotary", too_large, plain) == "torch"


def test_picks_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "KERNELS", {"rotary": "rotary", "norm": "norms"})
    monkeypatch.setattr(backends, "_broken", {"norm": "RuntimeError: no ptxas"})
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    assert picks() == {"rotary": "triton", "norm": "torch (RuntimeError: no ptxas)"}
    monkeypatch.setattr(backends, "triton_available", lambda: False)
    assert picks()["rotary"] == "torch (Triton is not installed)"
    assert set(picks("cpu").values()) == {"torch"}
    with prefer("triton"):
        assert set(picks("cpu").values()) == {"triton (preferred)"}


@torch.inference_mode()
def test_a_model_says_what_it_runs_on() -> None:
    model = plm.load("plm-mini", device="cpu")
    assert model.backends == dict.fromkeys(backends.KERNELS, "torch") | {"attention": "segments"}
    with prefer("triton"):
        assert set(model.backends.values()) == {"triton (preferred)", "triton"}


def test_what_a_model_on_cuda_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by the dtype of its products: what torch has for halves, Triton for float32."""
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    monkeypatch.setattr("plm_kernels.packed_attention.varlen_available", lambda: True)
    monkeypatch.setattr(plm.Model, "device", torch.device("cuda"))
    for dtype, wanted in (("float32", "triton"), ("bfloat16", "varlen"), ("fp32-bf16", "varlen"), ("float64", "dense")):
        found = plm.load("plm-mini", device="cpu", dtype=dtype).backends
        assert found["attention"] == wanted and found["norm"] == "triton"
