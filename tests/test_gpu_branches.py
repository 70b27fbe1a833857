"""What plm does on CUDA and nowhere else: torch's varlen attention, recorded steps, and every verb on tensors there.

The verbs run on any device (``kernel_device``) and are compared with the CPU, so without a GPU they compare it with
itself; the rest needs a GPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor

import plm
from plm.loading import Model
from plm_kernels import attention, reference
from plm_kernels.packed_attention import choose_backend, varlen_available

GOLDEN = Path(__file__).parent / "golden"
# Ten times the largest error that any stored checkpoint has in float32 on a CPU, relative: sums in another order.
FLOAT32 = 7e-6
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="for CUDA devices")
needs_varlen = pytest.mark.skipif(
    DEVICE.type != "cuda" or not varlen_available(), reason="for CUDA devices, with torch's varlen attention"
)
PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "A", "GSHMLEDPV", "MKTVRQERLKSI"]
FAMILIES = {
    "esm": "esm/esm2_tiny",
    "esm1b": "esm/esm1b_tiny",
    "bert": "bert/igbert_tiny",
    "t5": "t5/prott5_tiny",
    "progen2": "progen2/half_rotary_buffers",
    "proteinbert": "proteinbert/tiny_2blocks",
}
Verb = Callable[[Model], list[Tensor]]
VERBS: dict[str, tuple[str, Verb]] = {
    **{f"embed {family}": (family, lambda model: plm.embed(model, PROTEINS)) for family in FAMILIES},
    "pool esm": ("esm", lambda model: plm.embed(model, PROTEINS, pool="mean")),
    "contacts esm": ("esm", lambda model: plm.contacts(model, PROTEINS[2:])),
    "score esm": ("esm", lambda model: [each.per_residue for each in plm.score(model, PROTEINS)]),
    "score progen2": ("progen2", lambda model: [torch.tensor([x.total]) for x in plm.score(model, PROTEINS)]),
    "score bert": ("bert", lambda model: [each.per_residue for each in plm.score(model, PROTEINS)]),
    "variants esm": ("esm", lambda model: [torch.tensor(plm.variants(model, "MKTAYI", ["M1A", "T3W:I6L"]))]),
    "variants progen2": ("progen2", lambda model: [torch.tensor(plm.variants(model, "MKTAYI", ["M1A", "K2del"]))]),
    "annotate proteinbert": ("proteinbert", lambda model: plm.annotate(model, PROTEINS)),
}


@pytest.fixture(autouse=True)
def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions round float32 to ten bits unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    difference = torch.cat([(x.double() - y.double()).flatten() for x, y in zip(found, wanted, strict=True)])
    return float(difference.norm() / torch.cat([y.double().flatten() for y in wanted]).norm())


@pytest.mark.filterwarnings("ignore::plm.loading.Notice")
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_give_what_they_give_on_a_cpu(verb: str) -> None:
    family, run = VERBS[verb]
    there, here = (
        run(plm.load(GOLDEN / FAMILIES[family], device=device, dtype="float32")) for device in (DEVICE, "cpu")
    )
    assert relative(there, here) <= FLOAT32


def test_folding_gives_what_it_gives_on_a_cpu() -> None:
    """One chain and two; positions in Ångström."""
    texts = ["MKTAYIAKQRQI", "MKTAY:GSHMLE"]
    there, here = (
        plm.fold(plm.load(GOLDEN / "esmfold" / "a_hub_layout", device=device), texts, recycles=0)
        for device in (DEVICE, "cpu")
    )
    for ours, theirs in zip(there, here, strict=True):
        # Ten times the original's largest error in float32 on such proteins.
        assert (ours.positions - theirs.positions).abs().max() <= 1.2e-4
        assert (ours.plddt - theirs.plddt).abs().max() <= 1e-3


@pytest.mark.filterwarnings("ignore::plm.loading.Notice")
@pytest.mark.parametrize("family", ["t5", "progen2"])
def test_greedy_texts_are_those_of_a_cpu(family: str) -> None:
    folder = GOLDEN / FAMILIES[family]
    there, here = (
        plm.generate(plm.load(folder, device=device, dtype="float32"), ["MKT", "GSHMA"], temperature=0, max_length=16)
        for device in (DEVICE, "cpu")
    )
    assert [sample.ids for (sample,) in there] == [sample.ids for (sample,) in here]


@needs_cuda
@pytest.mark.parametrize("samples", [1, 3])
def test_recorded_steps_write_the_same(samples: int) -> None:
    """ProGen2 with its steps as CUDA graphs and without: greedy, and drawn."""
    model = plm.load(GOLDEN / FAMILIES["progen2"], device=DEVICE, dtype="float32")
    how: dict[str, Any] = {"num_samples": samples, "max_length": 40, "seed": 0, "temperature": 0 if samples == 1 else 1}
    graphed, plain = (plm.generate(model, ["MKT", "1GSHMLED"], cuda_graphs=graphs, **how) for graphs in (True, False))
    assert [x.ids for some in graphed for x in some] == [x.ids for some in plain for x in some]


@needs_varlen
def test_halves_without_a_bias_take_varlen() -> None:
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    assert choose_backend(q, None) == "varlen"


@needs_varlen
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("size", [16, 24, 32, 64, 96, 128])
def test_varlen_equals_the_reference(size: int, causal: bool, dtype: torch.dtype) -> None:
    """Views of one product, as the models have them, with an empty sequence among them."""
    lengths = [5, 0, 129, 1, 64]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    q, k, v = torch.randn(sum(lengths), 3, 4, size, device=DEVICE, dtype=dtype).unbind(1)
    how: dict[str, Any] = {"scale": size**-0.5, "causal": causal}
    found = attention(q, k, v, offsets, max_length=129, backend="varlen", **how)
    wanted = reference.attention(q.double(), k.double(), v.double(), offsets, **how)
    # Inputs are exact here; what is rounded are the weights before they meet the values, and the result: twice half a
    # unit in the last place each.
    assert relative([found], [wanted]) <= 2 * torch.finfo(dtype).eps


@needs_varlen
def test_varlen_between_two_batches() -> None:
    """Queries of a decoder and keys of an encoder."""
    offsets = torch.tensor([0, 3, 4, 40], dtype=torch.int32, device=DEVICE)
    key_offsets = torch.tensor([0, 17, 81, 82], dtype=torch.int32, device=DEVICE)
    q = torch.randn(40, 4, 32, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, 82, 4, 32, device=DEVICE, dtype=torch.bfloat16)
    more = {"max_length": 36, "max_key_length": 64, "backend": "varlen"}
    found = attention(q, k, v, offsets, scale=1.0, key_offsets=key_offsets, **more)
    wanted = reference.attention(q.double(), k.double(), v.double(), offsets, scale=1.0, key_offsets=key_offsets)
    assert relative([found], [wanted]) <= 2 * torch.finfo(torch.bfloat16).eps
