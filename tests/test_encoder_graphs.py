"""Passes in buckets, recorded and repeated: the same numbers, for every family, and nothing asked of the device.

There is no GPU here: what a graph would repeat is repeated as it stands, and traced on tensors without data.
"""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_graphs import Repeated
from tiny import encoder_alone, igbert, progen2_model, proteinbert_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import plm
from plm import encoder_graphs
from plm.encoder_graphs import (
    KEPT,
    LARGEST,
    Graphs,
    OnDevice,
    bucket_of,
    graphs_off,
    most_tokens,
    recordable,
    rounded_up,
)
from plm.layers import weights_unchanged
from plm.models import bert, esm, progen2, t5
from plm.packing import Packed
from plm.recording import GraphWarning, Weights, weights_of
from plm_kernels import batch_invariant

LENGTHS = ((3, 17, 1, 30), (38,), (1,), (5, 5, 5), (16,), (2, 38, 38, 38, 7, 1, 1, 1))
# Two float64 programs that add in another order: 7e-15 is seen on states of up to 4.
FLOAT64 = 1e-13


def esm2() -> plm.Model:
    return replace(plm.load("plm-mini", dtype="float64"))


def esm1b() -> plm.Model:
    """Learned positions, of which there are few: pads must not leave their table."""
    torch.manual_seed(0)
    config = esm.Config(2, 32, 4, 48, 40, True, True, 1e-5)
    net = esm.ESM(config).eval().requires_grad_(False)
    esm.initialise(net, torch.Generator().manual_seed(0))
    return replace(esm2(), net=net)


MODELS: dict[str, Callable[[], plm.Model]] = {
    "esm2": esm2,
    "esm1b": esm1b,
    "bert": igbert,
    "t5": encoder_alone,
    "progen2": progen2_model,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> plm.Model:
    found = MODELS[request.param]()
    return replace(found, net=found.net.double(), graphs=Graphs(Repeated()))


def batch_of(lengths: tuple[int, ...], seed: int = 0, masked: bool = False) -> Packed:
    """Any tokens, and in an ESM's batches ``<mask>`` among them, which rescales the others of its sequence."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 30, (length,), generator=generator) for length in lengths]
    for row in rows if masked else ():
        row[1:3] = esm.MASK
    return Packed.from_ids(rows)


@torch.inference_mode()
def test_repeated_passes_give_the_same(model: plm.Model) -> None:
    """The first pass of a bucket, its recording and a repetition with other tokens, after every layer."""
    for lengths in LENGTHS:
        for layer in (0, 1, model.net.config.layers, None):
            for seed in range(4):
                batch = batch_of(lengths, seed, masked=isinstance(model.net, esm.ESM))
                found = model.graphs.hidden(model.net, batch, layer)
                wanted = model.net.encode(batch, layer=layer).hidden
                assert found.shape == wanted.shape and (found - wanted).abs().max() < FLOAT64, (lengths, layer, seed)
    record = model.graphs.record
    assert isinstance(record, Repeated) and record.recorded == 3 * len(LENGTHS)
    assert record.run == len(LENGTHS) * 4 * 4 - record.recorded  # all but the first of each


@torch.inference_mode()
def test_results_are_the_callers_own(model: plm.Model) -> None:
    """What was returned does not change when the next batch runs through the same buffers."""
    results = [model.graphs.hidden(model.net, batch_of((9, 4), seed)) for seed in range(4)]
    for seed, found in enumerate(results):
        assert (found - model.net.encode(batch_of((9, 4), seed)).hidden).abs().max() < FLOAT64


def test_verbs_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and scores, with and without."""
    sequences = ["MKTAYIAKQR", "MK", "QISFVKSHFSRQ"]
    for build in (esm2, igbert, progen2_model):
        plain, recorded = build(), replace(build(), graphs=Graphs(Repeated()))
        for _ in range(3):
            for ours, wanted in zip(plm.embed(recorded, sequences), plm.embed(plain, sequences), strict=True):
                torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
            for score, other in zip(plm.score(recorded, sequences), plm.score(plain, sequences), strict=True):
                torch.testing.assert_close(score.per_residue, other.per_residue, rtol=0, atol=1e-5)
        record = recorded.graphs.record
        assert isinstance(record, Repeated) and record.run >= 4
        assert not plain.graphs.passes  # on a CPU nothing is recorded, nor padded


@torch.inference_mode()
def test_a_bit_of_rounding_does_not_depend_on_what_was_asked_before() -> None:
    """The first pass of a bucket, which nothing has recorded, is computed in the same size as all that follow it."""
    model = replace(igbert(), graphs=Graphs(Repeated()))
    found = [model.graphs.hidden(model.net, batch_of((30, 7))) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.inference_mode()
def test_weights_that_nobody_changes_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a scope; not outside of one, nor for another network."""
    looked: list[object] = []

    def look(net: torch.nn.Module) -> Weights | None:
        looked.append(net)
        return weights_of(net)

    monkeypatch.setattr(encoder_graphs, "weights_of", look)
    model, batch = replace(igbert(), graphs=Graphs(Repeated())), batch_of((30, 7))
    other = copy.deepcopy(model.net)
    other.embed.weight.mul_(2)

    def close(net: torch.nn.Module = model.net) -> None:
        found = model.graphs.hidden(net, batch)
        torch.testing.assert_close(found, net.encode(batch).hidden, rtol=0, atol=1e-5)  # type: ignore[operator]

    for _ in range(2):
        with weights_unchanged():
            for _ in range(3):
                close()
    assert looked == [model.net] * 2
    close()
    close()
    assert looked == [model.net] * 4
    with weights_unchanged():
        close()
        close(other)
        close()
    assert looked[4:] == [model.net, other, model.net]
    looked.clear()
    plm.embed(model, ["MKTAYIAKQR"] * 4, max_tokens=12)
    assert len(looked) == 1, "of four batches"


def test_what_attention_is_in_decides_whether_it_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bfloat16 that is it, whatever the embedding is in."""
    asked = []

    def choose(q: Tensor, bias: object) -> str:
        asked.append(q.dtype)
        return "varlen" if q.dtype == torch.bfloat16 else "dense"

    monkeypatch.setattr(encoder_graphs, "choose_backend", choose)
    found = [recordable(plm.load("plm-mini", device="cpu", dtype=dtype).net) for dtype in ("float32", "fp32-bf16")]
    assert found == [False, True] and asked == [torch.float32, torch.bfloat16]


def test_buckets() -> None:
    assert [rounded_up(n) for n in (1, 16, 17, 64, 65, 81, 129, 1025, 16_384)] == [
        *(16, 16, 32, 64, 80, 96, 160, 1280, 16_384),
    ]
    waste = [rounded_up(n) / n for n in range(64, LARGEST + 1)]
    assert max(waste) <= 1.25 and len({rounded_up(n) for n in range(1, LARGEST + 1)}) == 4 + 8 * 4
    # Over all sizes on a logarithmic scale, as they come: 10 % on average.
    weights = [1 / n for n in range(64, LARGEST + 1)]
    assert 1.08 < sum(w * x for w, x in zip(waste, weights, strict=True)) / sum(weights) < 1.10
    net = igbert().net
    for lengths in LENGTHS:
        batch = batch_of(lengths)
        bucket = bucket_of(net, batch, None)
        assert bucket.longest >= max(lengths) and bucket.segments >= len(lengths)
        assert max(lengths) <= bucket.longest <= net.config.positions


def test_pads_are_segments_of_their_own() -> None:
    """Every token belongs to a segment, none is longer than the bucket says, and the rest are empty."""
    model = replace(igbert(), graphs=Graphs(Repeated()))
    graphs = model.graphs
    for lengths in LENGTHS:
        batch = batch_of(lengths)
        with torch.inference_mode():
            graphs.hidden(model.net, batch)
        bucket = bucket_of(model.net, batch, None)
        sizes = graphs.offsets[: bucket.segments + 1].diff().tolist()
        assert tuple(sizes[: len(lengths)]) == lengths
        assert sum(sizes) == bucket.tokens and min(sizes) >= 0 and max(sizes) <= bucket.longest
        assert graphs.tokens[: bucket.tokens].tolist()[sum(lengths) :] == [0] * (bucket.tokens - sum(lengths))


def test_a_batch_on_the_device() -> None:
    batch = batch_of((3, 17, 1, 30))
    offsets = torch.cat((batch.offsets, torch.tensor([51, 51], dtype=torch.int32)))  # two empty segments
    found = OnDevice.of(batch.tokens, offsets, 32)
    assert torch.equal(found.positions, batch.positions) and torch.equal(found.sequence, batch.sequence)
    assert found.max_length == 32


def test_how_many_tokens_pay() -> None:
    """Small networks up to many tokens, large ones up to few or none."""

    def limit(config: esm.Config) -> int:
        with torch.device("meta"):
            return most_tokens(esm.ESM(config))

    sizes = ((6, 320, 20), (12, 480, 20), (30, 640, 20), (33, 1280, 20), (36, 2560, 40))
    limits = [limit(esm.Config(l, c, h, 4 * c, None, False, True, 1e-5)) for l, c, h in sizes]  # noqa: E741
    assert limits == [16_384, 8_192, 4_096, 1_024, 0]
    model = replace(igbert(), graphs=Graphs(Repeated()))
    with torch.inference_mode():
        model.graphs.hidden(model.net, batch_of((1,)))
        model.graphs.limit = 64
        for lengths in ((30, 30, 30), (38,)):
            model.graphs.hidden(model.net, batch_of(lengths))
    assert {bucket.tokens for bucket in model.graphs.passes} == {16, 48}


@torch.inference_mode()
def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_graphs, "KEPT", 3)
    model = replace(igbert(), graphs=Graphs(Repeated()))
    for lengths in ((1,), (20,), (38,), (1,), (38, 38)):
        model.graphs.hidden(model.net, batch_of(lengths))
    assert [bucket.tokens for bucket in model.graphs.passes] == [48, 16, 80]  # that of 32 was not wanted for longest
    assert KEPT == 32


def test_other_weights_are_seen() -> None:
    """Changed in place, replaced, moved, or with a hook that wants to see every pass."""
    model = replace(igbert(), graphs=Graphs(Repeated()))
    net, batch = model.net, batch_of((30, 7))

    @torch.inference_mode()
    def check() -> None:
        for _ in range(3):
            found = model.graphs.hidden(net, batch)
            torch.testing.assert_close(found, net.encode(batch).hidden, rtol=0, atol=1e-5)

    check()
    first = model.graphs.passes
    net.blocks[0].up.weight.mul_(2)
    check()
    assert model.graphs.passes is not first
    second = model.graphs.passes
    net.blocks[1].down = copy.deepcopy(net.blocks[0].down)
    check()
    assert model.graphs.passes is not second
    seen = []
    handle = net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        for _ in range(4):
            model.graphs.hidden(net, batch)
    assert len(seen) == 4 and not model.graphs.passes
    handle.remove()
    check()
    assert model.graphs.passes


def test_who_is_not_recorded() -> None:
    """Gradients, a scope that asks for none, another kind of network, another dtype of its products."""
    model = replace(igbert(), graphs=Graphs(Repeated()))
    batch = batch_of((5,))
    model.graphs.hidden(model.net, batch)
    with torch.no_grad():
        model.graphs.hidden(model.net, batch)
    with torch.inference_mode(), graphs_off():
        model.graphs.hidden(model.net, batch)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.graphs.hidden(model.net, batch)
    with torch.inference_mode():
        other = replace(proteinbert_model(), graphs=model.graphs)
        other.graphs.hidden(other.net, batch)
        assert not model.graphs.passes
        with pytest.raises(ValueError, match="41 tokens; this checkpoint's position table ends at 40"):
            model.graphs.hidden(model.net, batch_of((41,)))
        with batch_invariant():
            model.graphs.hidden(model.net, batch)
        model.graphs.hidden(model.net, batch)
    assert [bucket.invariant for bucket in model.graphs.passes] == [True, False]


@torch.inference_mode()
def test_a_recording_that_fails_costs_one_warning() -> None:
    def fail(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, batch = replace(igbert(), graphs=Graphs(fail)), batch_of((30, 7))
    wanted = model.net.encode(batch).hidden
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            torch.testing.assert_close(model.graphs.hidden(model.net, batch), wanted, rtol=0, atol=1e-5)
    assert [(each.category, str(each.message)) for each in caught] == [
        (
            GraphWarning,
            "no CUDA graph could be recorded, passes are launched: RuntimeError: operation not permitted when stream "
            "is capturing",
        )
    ]
    assert model.graphs.broken is not None and not model.graphs.passes


@torch.inference_mode()
def test_memory_that_runs_out_is_given_back() -> None:
    """The graphs' memory is freed, and the pass is tried without."""
    tried = []

    def greedy(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, batch = replace(igbert(), graphs=Graphs(greedy)), batch_of((30, 7))
    wanted = model.net.encode(batch).hidden
    for _ in range(4):
        torch.testing.assert_close(model.graphs.hidden(model.net, batch), wanted, rtol=0, atol=1e-5)
    assert len(tried) == 2 and model.graphs.broken is None


def test_copies_start_without() -> None:
    """A graph is of this process and of these tensors."""
    model = replace(igbert(), graphs=Graphs(Repeated()))
    with torch.inference_mode():
        model.graphs.hidden(model.net, batch_of((5,)))
    for twin in (copy.deepcopy(model.graphs), pickle.loads(pickle.dumps(model.graphs))):
        assert not twin.passes and twin.given is None
    assert model == replace(model, graphs=Graphs())


def test_callers_take_turns() -> None:
    """Two threads that share a model share its buffers."""
    model = replace(igbert(), graphs=Graphs(Repeated()))
    wrong = []

    def encode(seed: int) -> None:
        torch.set_num_threads(1)
        batch = batch_of((30, 7), seed)
        with torch.inference_mode():
            wanted = model.net.encode(batch).hidden
            for _ in range(20):
                if (model.graphs.hidden(model.net, batch) - wanted).abs().max() > 1e-5:
                    wrong.append(seed)

    threads = [threading.Thread(target=encode, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class OnlyHere(TorchDispatchMode):
    """Lets no operator give a tensor of another device, as one does that lays out what only the host knows."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = call(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            assert not isinstance(x, Tensor) or x.device.type == self.device, f"{call} gives a tensor on {x.device}"
        return result


SMALL: dict[str, Callable[[], torch.nn.Module]] = {
    "esm2": lambda: esm.ESM(esm.Config(2, 32, 4, 48, None, False, True, 1e-5)),
    "esm1b": lambda: esm.ESM(esm.Config(2, 32, 4, 48, 1026, True, True, 1e-5)),
    "bert": lambda: bert.BERT(bert.Config(30, 2, 32, 4, 48, positions=1024, types=2)),
    "progen2": lambda: progen2.ProGen2(progen2.Config(32, 32, 2, 32, 4, 4, 48, max_length=1024)),
    "t5": lambda: t5.T5(t5.Config(128, 2, 0, 32, 4, 8, 48, "gated-gelu")),
}


@pytest.mark.parametrize("family", SMALL)
def test_a_pass_asks_the_device_for_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced on tensors without data, with varlen attention as on CUDA: no number is read back, which would raise, and
    nothing comes from the host. Either would keep a graph from being recorded."""
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(encoder_graphs, "recordable", lambda net: True)
    monkeypatch.setattr("plm_kernels.packed_attention.choose_backend", lambda q, bias: "varlen")
    # The T5's bias needs the Triton kernel on CUDA; any attention that asks for nothing will do here.
    monkeypatch.setattr("plm.models.t5.attention", lambda q, k, v, offsets, **_: q + k + v)
    with torch.device("meta"), torch.inference_mode():
        net = SMALL[family]().bfloat16().eval()
        tokens = torch.zeros(51, dtype=torch.int64)
        batch = Packed(tokens, (3, 17, 1, 30), torch.zeros(5, dtype=torch.int32), tokens)
    graphs = Graphs(Repeated())
    with torch.inference_mode():
        net.encode(batch)  # type: ignore[operator]  # the first pass may lay out what all need
        with OnlyHere("meta"):
            for layer in (None, None, None, 1, 1):
                assert graphs.hidden(net, batch, layer).shape == (51, 32)
            with pytest.raises(AssertionError, match="gives a tensor on cpu"):
                replace(batch).sequence.clone()  # of a batch whose lengths the host knows
    assert len(graphs.passes) == 2 and isinstance(graphs.record, Repeated) and graphs.record.run == 3
