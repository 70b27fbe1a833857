"""Steps that are recorded and repeated: the same numbers, whoever joins and leaves, and nothing asked of the device.

There is no GPU here: what a graph would repeat is repeated as it stands, and traced on tensors without data.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import writing_progen2
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import plm
from plm.cache import Room
from plm.decoding import Request, write
from plm.graphs import TOKENS, Graphed, StaticDecoding, graph_tokens
from plm.models.progen2 import Config, ProGen2
from plm.packing import Packed
from plm.recording import GraphWarning
from plm.sampling import Rules, Sampler, streams
from plm.writing import Settings, graphed
from plm_kernels import batch_invariant

CONFIG = Config(32, 30, 2, 32, 4, 4, 48, max_length=400)
# Two float64 programs that add in another order: 1e-15 is seen on logits of up to 2.
FLOAT64 = 1e-13


@pytest.fixture
def net() -> ProGen2:
    torch.manual_seed(0)
    return ProGen2(CONFIG).double().eval().requires_grad_(False)


class Repeated:
    """In place of a CUDA graph: the work itself, its result put where a graph would put it."""

    def __init__(self) -> None:
        self.recorded = self.run = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        result = work().clone()

        def repeat() -> None:
            self.run += 1
            result.copy_(work())

        return result, repeat


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 30, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def test_every_step_is_that_of_the_whole_sequence(net: ProGen2) -> None:
    """Prompts of several lengths and numbers of texts, others that join later, and rows that leave."""
    graphs = Graphed(net, Repeated())
    state = graphs.room(Room(texts=7, text_tokens=20, prompts=4, prompt_tokens=150))
    prompts = [random_ids(length, length) for length in (1, 5, 150, 9)]
    rows = [prompts[0], prompts[1], prompts[1], prompts[2], prompts[3], prompts[3]]
    texts = [[*prompt, *random_ids(12, 100 + i)] for i, prompt in enumerate(rows)]
    graphs.join(state, prompts[:3], [1, 2, 1])
    taken, live = [len(prompt) - 1 for prompt in rows], [0, 1, 2, 3]
    for step in range(9):
        if step == 3:
            live = [0, 2, 3]
            state.keep(live)
        if step == 5:
            graphs.join(state, prompts[3:], [2])
            live = [0, 2, 3, 4, 5]
        found = graphs.step(torch.tensor([texts[row][taken[row]] for row in live]), state)
        for row in live:
            taken[row] += 1
        batch = Packed.from_ids([texts[row][: taken[row]] for row in live])
        wanted = net(batch).logits[batch.offsets[1:].long() - 1]
        assert (found - wanted).abs().max() < FLOAT64, step


@torch.inference_mode()
def test_one_record_for_each_bucket(net: ProGen2) -> None:
    """Rows in powers of two, tokens in multiples of TOKENS; and a cache of another size is recorded anew."""
    record = Repeated()
    graphs = Graphed(net, record)
    room = Room(texts=4, text_tokens=2 * TOKENS, prompts=1, prompt_tokens=1)
    state = graphs.room(room)
    graphs.join(state, [[3]], [4])
    for rows in (4, 3, 2, 1):
        state.keep(range(rows))
        for _ in range(40):
            graphs.step(torch.full((rows,), 7), state)
    assert graphs.steps.keys() == {(4, TOKENS), (2, TOKENS), (1, TOKENS), (1, 2 * TOKENS)}
    assert record.recorded == 4 and record.run == 160
    assert graphs.room(room) is state and len(graphs.steps) == 4
    assert graphs.room(replace(room, texts=5)) is not state and not graphs.steps


def test_used_again_it_is_as_new(net: ProGen2) -> None:
    """Nothing is left of the texts before; and weights that changed meanwhile, in place or not, are recorded anew."""
    record = Repeated()
    graphs, room = Graphed(net, record), Room(texts=2, text_tokens=20, prompts=1, prompt_tokens=40)

    @torch.inference_mode()
    def first_logits(graphs: Graphed, prompt: list[int]) -> Tensor:
        state = graphs.room(room)
        graphs.join(state, [prompt], [2])
        return graphs.step(torch.tensor([7, 9]), state)

    first_logits(graphs, random_ids(40, 1))
    assert graphs.state is not None
    with torch.inference_mode():
        graphs.state.keys.fill_(torch.nan)  # what is masked must be finite all the same
    for factor in (None, 2):
        if factor:
            net.lm_head.weight.mul_(factor)
        found = first_logits(graphs, random_ids(3, 2))
        assert torch.equal(found, first_logits(Graphed(net, Repeated()), random_ids(3, 2)))
    assert record.recorded == 2
    net.norm = copy.deepcopy(net.norm)
    first_logits(graphs, random_ids(3, 2))
    assert record.recorded == 3
    with batch_invariant():
        first_logits(graphs, random_ids(3, 2))
    assert record.recorded == 4


class OnCpu(Graphed):
    """As it would be on CUDA."""

    def __init__(self, net: ProGen2) -> None:
        super().__init__(net, Repeated())


def test_a_model_keeps_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one caller at a time: a stream that rests has it, and another call makes its own."""
    monkeypatch.setattr("plm.writing.graphed", lambda model, how: how.cuda_graphs)
    monkeypatch.setattr("plm.writing.Graphed", OnCpu)
    model = writing_progen2()

    def write(**how: Any) -> list[tuple[int, ...]]:
        samples = plm.generate(model, ["MKT", "1"], seed=1, max_length=40, **how)
        return [sample.ids for (sample,) in samples]

    wanted = write(cuda_graphs=False)
    assert model.steps.kept is None
    assert write() == wanted
    kept = model.steps.kept
    assert kept is not None and isinstance(kept.record, Repeated)
    recorded = kept.record.recorded
    assert write() == wanted and model.steps.kept is kept and kept.record.recorded == recorded
    stream = plm.stream(model, ["MKT", "1"], seed=1, max_length=40)
    pieces = [next(stream)]
    assert model.steps.kept is None
    assert write() == wanted and model.steps.kept is not kept
    pieces += stream
    assert sorted(piece.sample.ids for piece in pieces if piece.sample) == sorted(wanted)
    assert model.steps.kept is kept
    assert copy.deepcopy(model.steps).kept is None
    other = replace(model, net=copy.deepcopy(model.net))
    plm.generate(other, "MKT", seed=1, max_length=40)
    assert other.steps.kept is not kept
    monkeypatch.setattr("plm.writing.KEPT_BYTES", 1)
    assert write() == wanted and model.steps.kept is None


def test_nothing_is_recorded_under_autocast(net: ProGen2) -> None:
    model: Any = SimpleNamespace(device=torch.device("cuda"), net=net)
    found = []
    for on in (True, False):
        torch.set_autocast_enabled("cuda", on)
        try:
            found.append(graphed(model, Settings()))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert found == [False, True]
    assert not graphed(model, Settings(cuda_graphs=False))


def test_the_loop_writes_the_same(net: ProGen2) -> None:
    prompts = [random_ids(length, length) for length in (2, 7, 1)]
    allowed = torch.ones(CONFIG.outputs, dtype=torch.bool)
    requests = [Request(ids, 0, 30, allowed, start=ids) for ids in prompts]

    def draw(names: list[tuple[int, int]], length: int) -> Tensor:
        return streams(3, names, length)

    found = [write(each, requests, Sampler(), Rules((2, 3, 4)), draw, 3, 5) for each in (net, Graphed(net, Repeated()))]
    assert found[0] == found[1]
    for one, other in zip(*map(chain.from_iterable, found), strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0, atol=1e-6)  # kept in float32


def test_a_step_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without data: a length that is read back would raise, and a graph could not be recorded."""
    monkeypatch.setattr("plm_kernels.parts.fused_available", lambda: False)  # a GPU takes the formula,
    monkeypatch.setattr("plm.layers.PackedWeight.of", lambda *_: None)  # and packs nothing
    with FakeTensorMode():
        net = ProGen2(CONFIG).eval()
        state = StaticDecoding(Room(4, 20, 2, 30), CONFIG.layers, CONFIG.heads, CONFIG.head_size, 0.5, net.embed.weight)
        state.known, state.rows, state.tokens = [3, 5], 4, TOKENS
        with torch.no_grad():
            assert net.step(torch.zeros(4, dtype=torch.int64), state).shape == (4, CONFIG.outputs)


@torch.inference_mode()
def test_products_in_bfloat16() -> None:
    """Regression: the newest token's keys in bfloat16 were put into a store in float32, which a device refuses."""
    torch.manual_seed(0)
    net = ProGen2(CONFIG).eval().requires_grad_(False)
    for block in net:
        for layer in (block.attention.qvk, block.attention.out, block.feed_forward.up, block.feed_forward.down):
            layer.multiply_in(torch.bfloat16)
    prompts, graphs = [random_ids(5, 1), random_ids(9, 2)], Graphed(net, Repeated())
    state = graphs.room(Room(texts=2, text_tokens=20, prompts=2, prompt_tokens=9))
    graphs.join(state, prompts, [1, 1])
    found = graphs.step(torch.tensor([ids[-1] for ids in prompts]), state)
    assert state.keys.dtype == found.dtype == torch.float32
    batch = Packed.from_ids(prompts)
    wanted = net(batch).logits[batch.offsets[1:].long() - 1]
    # Their attention is in bfloat16, that of a step in float32: up to 2.1e-3 is seen on logits of up to 2.
    assert (found - wanted).abs().max() < 1e-2


class Failing:
    """A machine that cannot record: a step may have been begun, and has moved the lengths on."""

    tried = 0

    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        self.error = error

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.tried += 1
        work()
        raise self.error("operation not permitted when stream is capturing\nand more lines")


@torch.inference_mode()
def test_what_cannot_be_recorded_is_launched(net: ProGen2) -> None:
    """One warning, the same numbers, and no second try, also in a cache of another size."""
    failing, ids = Failing(), random_ids(6, 1)
    graphs, whole = Graphed(net, failing), Graphed(net, Repeated())

    def logits(graphs: Graphed, texts: int) -> list[Tensor]:
        state = graphs.room(Room(texts, text_tokens=20, prompts=1, prompt_tokens=9))
        graphs.join(state, [ids], [texts])
        return [graphs.step(torch.full((texts,), token), state) for token in (7, 9, 4)]

    with pytest.warns(GraphWarning, match="steps are launched: RuntimeError: operation not permitted .* capturing$"):
        found = logits(graphs, 2)
    assert all(map(torch.equal, found, logits(whole, 2))) and len(found) == 3
    assert all(map(torch.equal, logits(graphs, 3), logits(whole, 3)))  # another warning would be an error
    assert failing.tried == 1
    with pytest.raises(torch.OutOfMemoryError):
        logits(Graphed(net, Failing(torch.OutOfMemoryError)), 2)


def test_room() -> None:
    net = ProGen2(CONFIG).eval()
    graphs, room = Graphed(net, Repeated()), Room(texts=2, text_tokens=3, prompts=1, prompt_tokens=4)
    state = graphs.room(room)
    assert state.keys.shape == (CONFIG.layers, 2, CONFIG.heads, graph_tokens(room), CONFIG.head_size)
    with torch.inference_mode():
        graphs.join(state, [[3, 5, 6, 7]], [2])
        with pytest.raises(ValueError, match="3 rows of up to 3 tokens; there is room for fewer"):
            graphs.join(state, [[3]], [1])
