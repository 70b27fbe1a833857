"""ProGen2 token by token with what is remembered: what the whole text gives, for any prompts and texts beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from test_parity_progen2 import FLOAT64 as STORED
from test_parity_progen2 import Case, round_as_the_original
from tiny import writing_progen2
from torch import Tensor

from plm.cache import STEP, Decoding, Room, steps
from plm.models.progen2 import ProGen2
from plm.packing import Packed
from plm_kernels import packing_available, padded_keys

# Two float64 programs that add in another order: 2e-14 is seen on logits of up to 8.
FLOAT64 = 1e-12
LENGTHS = (5, 1, 17, 66, 17, 1, 16, 65, 130)  # of prompts, also around multiples of STEP
COUNTS = (1, 3, 2, 1, 4, 1, 5, 2, 1)  # of texts to each

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


def net_of(dtype: torch.dtype = torch.float64) -> ProGen2:
    net = writing_progen2(dtype).net
    assert isinstance(net, ProGen2)
    return net


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(32, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Text:
    """A prompt, what is written to it, and the logits behind each token that was read, from the prompt's last on."""

    prompt: list[int]
    written: list[int]
    logits: list[Tensor] = field(default_factory=list)

    def newest(self) -> int:
        return [self.prompt[-1], *self.written][len(self.logits)]

    def whole(self, net: ProGen2) -> Tensor:
        """The same logits without a cache."""
        ids = (self.prompt + self.written)[: len(self.prompt) + len(self.logits) - 1]
        return net(Packed.from_ids([ids])).logits[-len(self.logits) :]


class Writer:
    """Texts on their way through a network, a row for each."""

    def __init__(self, net: ProGen2, texts: int = 24, prompts: int = 12) -> None:
        self.net = net
        self.state: Decoding = net.room(Room(texts, 40, prompts, 140))
        self.rows: list[Text] = []
        self.joined = 0

    @torch.inference_mode()
    def join(self, lengths: Sequence[int], counts: Sequence[int], seed: int | None = None) -> list[Text]:
        """Random prompts of these lengths, and so many texts to each. Returns: the texts."""
        texts = []
        for length, count in zip(lengths, counts, strict=True):
            self.joined += 1
            own = 1000 * (self.joined if seed is None else seed)
            texts.append([Text(random_ids(length, own), random_ids(40, own + 1 + i)) for i in range(count)])
        self.net.join(self.state, [each[0].prompt for each in texts], counts)
        new = [text for each in texts for text in each]
        self.rows = self.rows + new
        return new

    @torch.inference_mode()
    def step(self, count: int) -> None:
        for _ in range(count):
            found = self.net.step(torch.tensor([text.newest() for text in self.rows]), self.state)
            for text, logits in zip(self.rows, found, strict=True):
                text.logits.append(logits)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self.state.keep(rows)
        self.rows = [self.rows[row] for row in rows]

    @torch.inference_mode()
    def errors(self, net: ProGen2 | None = None) -> Tensor:
        """Cached less uncached (by ``net``), of every logit of every text that is there."""
        found = [torch.stack(text.logits) - text.whole(net or self.net) for text in self.rows]
        return torch.cat(found)


def test_cached_equals_uncached_at_every_position() -> None:
    """Prompts of one token and of more than two steps of the memory, and several texts to each."""
    writer = Writer(net_of())
    writer.join(LENGTHS, COUNTS)
    writer.step(12)
    assert writer.errors().abs().max() < FLOAT64


@pytest.mark.parametrize("length", [1, 2, STEP, STEP + 1, STEP + 2])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_prompt_alone(length: int, count: int) -> None:
    """Of one token nothing is read before the first step, so there is nothing to look back at."""
    writer = Writer(net_of())
    writer.join([length], [count])
    writer.step(5)
    assert writer.errors().abs().max() < FLOAT64


def test_joined_at_different_times_and_finished_ones_replaced() -> None:
    """Rows leave at the front, in the middle and at the end, and new prompts take their places, longer and shorter."""
    writer = Writer(net_of(), texts=9, prompts=9)
    writer.join((5, 1, 70), (2, 3, 1))
    writer.step(3)
    writer.join((1, 17), (1, 2))  # and there is no more room
    writer.step(2)
    writer.keep([1, 2, 4, 8])
    writer.step(1)
    writer.join((130, 1, 2), (3, 1, 1))
    writer.step(4)
    assert writer.errors().abs().max() < FLOAT64
    writer.keep([0, 4, 5, 6, 8])
    writer.join((33,), (4,))
    writer.step(3)
    assert sorted({len(text.logits) for text in writer.rows}) == [3, 7, 13]
    assert writer.errors().abs().max() < FLOAT64
    writer.keep([6])
    writer.join((1,) * 8, (1,) * 8)
    writer.step(2)
    assert writer.errors().abs().max() < FLOAT64


def test_everyone_leaves_and_others_come() -> None:
    writer = Writer(net_of(), texts=3, prompts=2)
    for lengths, counts in (((70, 3), (2, 1)), ((1,), (3,)), ((1, 9), (1, 1))):
        writer.join(lengths, counts)
        writer.step(4)
        assert writer.errors().abs().max() < FLOAT64
        writer.keep([])
        assert writer.state.cache.lengths == writer.state.memory.lengths == writer.state.memory.counts == []


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2), (torch.bfloat16, 1.5)])
def test_as_precise_as_uncached(dtype: torch.dtype, factor: float) -> None:
    """Root mean square over all logits of all texts."""
    writer, exact = Writer(net_of(dtype)), net_of()
    writer.join(LENGTHS, COUNTS)
    writer.step(12)
    ours, difference = writer.errors(exact), writer.errors()
    # The noise floor is the rounding of the dtype in the uncached pass.
    assert rms(ours) <= factor * rms(ours - difference)


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def alone(writer: Writer, length: int) -> Text:
    (text,) = writer.join([length], [1], seed=0)
    writer.step(8)
    return text


def one_of_nine(writer: Writer, length: int) -> Text:
    text = writer.join([length], [9], seed=0)[0]
    writer.step(8)
    return text


def the_only_one_left(writer: Writer, length: int) -> Text:
    text = writer.join([length], [3], seed=0)[0]
    writer.step(4)
    writer.keep([0])
    writer.step(4)
    return text


def among_others(writer: Writer, length: int) -> Text:
    writer.join((70, 1, length), (2, 1, 4))
    text = writer.join([length], [2], seed=0)[0]
    writer.join((length, 3), (1, 3))
    writer.step(8)
    return text


def behind_some_that_leave(writer: Writer, length: int) -> Text:
    writer.join((130, length, 1), (1, 4, 1))
    writer.step(3)
    text = writer.join([length], [1], seed=0)[0]
    writer.step(2)
    writer.keep([5, 6])
    writer.step(6)
    return text


def while_others_come(writer: Writer, length: int) -> Text:
    text = writer.join([length], [5], seed=0)[0]
    for others in (1, 64, 2):
        writer.step(2)
        writer.join([others], [2])
    writer.step(2)
    return text


@needs_packing
@pytest.mark.parametrize("length", [1, 6, 66])
@pytest.mark.parametrize(
    "way", [one_of_nine, the_only_one_left, among_others, behind_some_that_leave, while_others_come]
)
def test_no_bit_depends_on_what_is_beside(way: Callable[[Writer, int], Text], length: int) -> None:
    """In float32: nor on how many texts a prompt has, nor on when it came and who left."""
    net = net_of(torch.float32)
    found, wanted = way(Writer(net), length), alone(Writer(net), length)
    assert (found.prompt, found.written) == (wanted.prompt, wanted.written)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


def test_the_comparison_is_sharp() -> None:
    """Another token, another prompt, another row's tokens: each changes the logits that follow."""
    for spoil in ("prompt", "text", "rows"):
        writer = Writer(net_of())
        writer.join((5, 5), (2, 2))
        writer.step(4)
        with torch.inference_mode():
            if spoil == "prompt":
                writer.state.memory.values[:, 0] = writer.state.memory.values[:, 1]
            elif spoil == "text":
                writer.state.cache.keys[0, 1, :, 2] = writer.state.cache.keys[0, 1, :, 1]
            else:
                writer.state.cache.move([1, 0, 2, 3])
        writer.step(1)
        assert writer.errors().abs().max() > 1e-4, spoil


@pytest.mark.parametrize("read", [1, 2, 20])
def test_what_is_remembered_is_what_the_original_remembers(read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys (turned) and values of the last layer, some read with the prompt and the others one by one."""
    round_as_the_original(monkeypatch)
    case = Case("half_rotary_buffers")
    net, ids = case.net(), case.ids[0]
    state = net.room(Room(1, len(ids), 1, read))
    state.cache.scale = state.memory.scale = 1 / torch.tensor(float(net.config.head_size)).sqrt().item()
    with torch.inference_mode():
        net.join(state, [ids[:read]], [1])
        for token in ids[read - 1 :]:
            net.step(torch.tensor([token]), state)
    for name, prompt, text in (
        ("past_key.last.0", state.memory.keys, state.cache.keys),
        ("past_value.last.0", state.memory.values, state.cache.values),
    ):
        found = torch.cat((prompt[-1, 0, :, : read - 1], text[-1, 0, :, : len(ids) - read + 1]), 1)
        torch.testing.assert_close(found, case.expected[name], rtol=0, atol=STORED)


def test_full() -> None:
    """One token, one text or one prompt more than there is room for is refused, not written over another."""
    net = net_of(torch.float32)
    state = net.room(Room(texts=2, text_tokens=3, prompts=1, prompt_tokens=5))
    with torch.inference_mode():
        net.join(state, [random_ids(5, 0)], [1])
        with pytest.raises(ValueError, match="room for 2 of 3 tokens, and 1 are there"):
            net.join(state, [[3]], [2])
        with pytest.raises(ValueError, match=rf"2 more of up to 64 tokens; .* room for 1 of {STEP} tokens, and 0 are"):
            net.join(net.room(Room(2, 3, 1, 5)), [[3], random_ids(65, 0)], [1, 1])
        for _ in range(3):
            net.step(torch.tensor([3]), state)
        with pytest.raises(ValueError, match="the cache is full: it was begun with room for 3 tokens"):
            net.step(torch.tensor([3]), state)


def test_nothing_is_allocated_while_writing() -> None:
    """Keys and values lie where they were put at the beginning, whoever leaves and comes; a prompt's are there once."""
    net = net_of(torch.float32)
    room = Room(24, 40, 12, 140)
    writer = Writer(net)
    state, config = writer.state, net.config
    stores = (state.cache.keys, state.cache.values, state.memory.keys, state.memory.values)
    tokens = padded_keys(40, config.head_size)
    assert state.cache.keys.shape == (config.layers, 24, config.heads, tokens, config.head_size)
    assert state.memory.keys.shape == (config.layers, 12, config.heads, steps(140), config.head_size)
    size = room.bytes(config.layers, config.heads, config.head_size, torch.float32)
    assert size == sum(store.numel() * 4 for store in stores)
    places = [store.data_ptr() for store in stores]
    writer.join(LENGTHS, COUNTS)
    writer.step(3)
    assert len(state.memory.lengths) == len(LENGTHS) and len(state.cache.lengths) == sum(COUNTS)
    writer.keep(range(0, sum(COUNTS), 3))
    writer.join((30, 1), (3, 1))
    writer.step(3)
    now = (state.cache.keys, state.cache.values, state.memory.keys, state.memory.values)
    assert [store.data_ptr() for store in now] == places
