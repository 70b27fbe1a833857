"""Writing token by token with what is remembered gives what the whole text gives, for any texts beside it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from oracle_t5 import CASES, GOLDEN
from safetensors.torch import load_file
from test_parity_t5 import Case
from torch import Tensor

import plm
from plm.cache import STEP, Cache, Decoding, Memory, Room, steps
from plm.models.t5 import EOS, PAD, START, T5
from plm.packing import Packed
from plm_kernels import packing_available, padded_keys, reference

# Two float64 programs that add in another order: 1e-14 is seen on logits of up to 5.
FLOAT64 = 1e-12
LENGTHS = (5, 17, 17, 1, 30, 17, 30)  # equal lengths are attended to in one call
STEPS = 12

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def load(folder: Path, dtype: str) -> T5:
    net = plm.load(folder, dtype=dtype).net
    assert isinstance(net, T5)
    return net


def random_ids(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]


def texts(rows: int, net: T5) -> Tensor:
    """What is to be written, ``[r, STEPS]``: every row another text, and each begins as a decoder's texts do."""
    written = torch.stack(random_ids((STEPS,) * rows, net.config.vocabulary, seed=1))
    written[:, 0] = START
    return written


@torch.inference_mode()
def stepped(net: T5, state: Decoding, written: Tensor) -> Tensor:
    """Logits ``[r, s, v]`` after each token of ``[r, s]``."""
    return torch.stack([net.step(tokens, state) for tokens in written.T], dim=1)


@torch.inference_mode()
def begun(net: T5, prompts: list[Tensor], rows_per_prompt: int = 1, capacity: int = STEPS) -> Decoding:
    return net.begin(Packed.from_ids(prompts), rows_per_prompt, capacity)


@torch.inference_mode()
def greedy(
    net: T5, prompts: list[Tensor], max_length: int, allowed: Callable[[int, Tensor], Tensor]
) -> list[list[int]]:
    """The likeliest token each time, until ``</s>``; texts that are finished are dropped."""
    state = begun(net, prompts, capacity=max_length)
    ids = [[START] for _ in prompts]
    active = list(range(len(prompts)))
    for length in range(1, max_length):
        newest = torch.tensor([ids[i][-1] for i in active])
        chosen = allowed(length, net.step(newest, state)).argmax(-1).tolist()
        for i, token in zip(active, chosen, strict=True):
            ids[i].append(token)
        going = [row for row, token in enumerate(chosen) if token != EOS]
        if len(going) < len(active):
            active = [active[row] for row in going]
            if not active:
                break
            state.keep(torch.tensor(going))
    return ids


@torch.inference_mode()
def keep(state: Decoding, rows: list[int]) -> None:
    state.keep(torch.tensor(rows))


def without(banned: list[int], logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor(banned, dtype=torch.long), -torch.inf)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "length", "least"),
    [("batch_greedy", 14, 0), ("batch_greedy_min10", 14, 10), ("seed_greedy", 9, 9), ("greedy_badwords", 7, 7)],
)
def test_greedy_ids_of_transformers(folder: Path, name: str, length: int, least: int, dtype: str) -> None:
    """Exactly, in both precisions: up to ``</s>``, with a least length before which there is none, and with tokens
    that are not allowed."""
    case = Case(folder.name)
    wanted = case.expected[f"gen_{name}"].tolist()
    net = load(folder, dtype)
    vocabulary = net.config.vocabulary
    bad = list(range(3, 3 + (vocabulary - 3) // 2)) if name == "greedy_badwords" else []
    prompts = [row[real] for row, real in zip(case.ids, case.keep, strict=True)][: len(wanted)]

    def allowed(written: int, logits: Tensor) -> Tensor:
        return without(bad + ([EOS] if written < least else []), logits)

    found = greedy(net, prompts, length, allowed)
    assert [ids + [PAD] * (length - len(ids)) for ids in found] == wanted


@pytest.mark.parametrize("rows_per_prompt", [1, 3])
def test_cached_equals_uncached_at_every_position(folder: Path, rows_per_prompt: int) -> None:
    """Prompts of different lengths, and several texts to each."""
    net = load(folder, "float64")
    prompts = random_ids(LENGTHS, net.config.vocabulary)
    written = texts(len(prompts) * rows_per_prompt, net)
    found = stepped(net, begun(net, prompts, rows_per_prompt), written)
    repeated = [prompt for prompt in prompts for _ in range(rows_per_prompt)]
    with torch.inference_mode():
        whole = net(Packed.from_ids(repeated), decoder=Packed.from_ids(list(written))).logits
    torch.testing.assert_close(found, whole.view_as(found), rtol=0, atol=FLOAT64)


def test_cached_in_float32_is_as_precise_as_uncached(folder: Path) -> None:
    nets = {dtype: load(folder, dtype) for dtype in ("float32", "float64")}
    prompts = random_ids(LENGTHS, nets["float32"].config.vocabulary)
    written = texts(len(prompts), nets["float32"])
    with torch.inference_mode():
        whole = {k: x(Packed.from_ids(prompts), decoder=Packed.from_ids(list(written))).logits for k, x in nets.items()}
    found = stepped(nets["float32"], begun(nets["float32"], prompts), written)
    truth = whole["float64"].view_as(found)
    floor = (whole["float32"].view_as(found) - truth).square().mean().sqrt()
    # The noise floor is the rounding of float32 in the uncached pass.
    assert (found - truth).square().mean().sqrt() <= 2 * floor


def test_beyond_the_last_bucket(folder: Path) -> None:
    """160 tokens: keys farther back than 128 share one bias."""
    net = load(folder, "float64")
    prompts = random_ids((3, 9), net.config.vocabulary)
    written = torch.stack(random_ids((160, 160), net.config.vocabulary, seed=2))
    found = stepped(net, begun(net, prompts, capacity=160), written)
    with torch.inference_mode():
        whole = net(Packed.from_ids(prompts), decoder=Packed.from_ids(list(written))).logits
    torch.testing.assert_close(found, whole.view_as(found), rtol=0, atol=FLOAT64)


def test_spare_capacity_changes_nothing(folder: Path) -> None:
    net = load(folder, "float64")
    prompts, written = random_ids(LENGTHS, net.config.vocabulary), texts(len(LENGTHS), net)
    exact, spare = (stepped(net, begun(net, prompts, capacity=capacity), written) for capacity in (STEPS, 3 * STEPS))
    assert torch.equal(exact, spare)


@needs_packing
@pytest.mark.parametrize("rows_per_prompt", [1, 4])
def test_same_bits_alone_and_in_a_batch(folder: Path, rows_per_prompt: int) -> None:
    """In float32 no bit of a text depends on the prompts beside its own, nor on their order."""
    net = load(folder, "float32")
    prompts = random_ids(LENGTHS, net.config.vocabulary)
    written = texts(len(prompts) * rows_per_prompt, net).view(len(prompts), rows_per_prompt, STEPS)
    alone = [
        stepped(net, begun(net, [prompt], rows_per_prompt), rows) for prompt, rows in zip(prompts, written, strict=True)
    ]
    for order in (list(range(len(prompts))), [3, 0, 6, 2, 5, 1, 4]):
        state = begun(net, [prompts[i] for i in order], rows_per_prompt)
        together = stepped(net, state, written[order].flatten(0, 1)).split(rows_per_prompt)
        for i, found in zip(order, together, strict=True):
            assert torch.equal(found, alone[i]), (i, (found - alone[i]).abs().max())


@needs_packing
def test_however_many_texts_a_prompt_has(folder: Path) -> None:
    """In float32 not even that changes a bit: the texts of a prompt look at it in groups of one size."""
    net = load(folder, "float32")
    prompts = random_ids(LENGTHS, net.config.vocabulary)
    written = texts(len(prompts), net)
    found = [
        stepped(net, begun(net, prompts, rows), written.repeat_interleave(rows, 0))[::rows] for rows in (1, 2, 4, 7)
    ]
    for other in found[1:]:
        assert torch.equal(other, found[0])


DROPS = {
    "one": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13],
    "a whole prompt": [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    "most": [3, 8],
    "all but one": [13],
    "none": list(range(14)),
}


@pytest.mark.parametrize("kept", DROPS)
def test_rows_that_stay_do_not_change(folder: Path, kept: str) -> None:
    """Two texts to each of seven prompts; after five tokens some rows are dropped, and after nine all but the last."""
    net, rows = load(folder, "float64"), DROPS[kept]
    prompts = random_ids(LENGTHS, net.config.vocabulary)
    written = texts(2 * len(prompts), net)
    wanted = stepped(net, begun(net, prompts, 2), written)

    state = begun(net, prompts, 2)
    first = stepped(net, state, written[:, :5])
    keep(state, rows)
    then = stepped(net, state, written[rows, 5:9])
    keep(state, [len(rows) - 1])
    last = stepped(net, state, written[rows[-1:], 9:])
    for found, real in ((first, wanted[:, :5]), (then, wanted[rows, 5:9]), (last, wanted[rows[-1:], 9:])):
        torch.testing.assert_close(found, real, rtol=0, atol=FLOAT64)


def test_beams_that_are_exchanged(folder: Path) -> None:
    """Rows of one prompt that go on from others of that prompt, one of them twice: as beam search asks for."""
    net = load(folder, "float64")
    prompts = random_ids((4, 9), net.config.vocabulary)
    written = texts(6, net)
    state = begun(net, prompts, 3)
    stepped(net, state, written[:, :5])
    parents = [2, 0, 0, 4, 5, 3]
    keep(state, parents)
    found = stepped(net, state, written[:, 5:])
    crossed = torch.cat([written[parents, :5], written[:, 5:]], 1)
    wanted = stepped(net, begun(net, prompts, 3), crossed)[:, 5:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


def test_what_is_left_out_of_the_cache_is_noticed(folder: Path) -> None:
    """The comparison is sharp: other tokens, another prompt or a row from elsewhere change the next logits."""
    net = load(folder, "float64")
    prompts = random_ids((4, 4), net.config.vocabulary)
    written = texts(2, net)
    wanted = stepped(net, begun(net, prompts), written)[:, -1]
    other = written.clone()
    other[:, 1] = (other[:, 1] + 1) % net.config.vocabulary
    assert (stepped(net, begun(net, prompts), other)[:, -1] - wanted).abs().max() > 1e-4
    assert (stepped(net, begun(net, prompts[::-1]), written)[:, -1] - wanted).abs().max() > 1e-4
    state = begun(net, prompts)
    stepped(net, state, written[:, :6])
    with torch.inference_mode():
        state.cache.move([1, 0])  # and not the prompts
    assert (stepped(net, state, written[:, 6:])[:, -1] - wanted).abs().max() > 1e-4


def test_full(folder: Path) -> None:
    """One token more than there is room for is refused, not written over another."""
    net = load(folder, "float32")
    prompts = random_ids((4, 9), net.config.vocabulary)
    state = begun(net, prompts, capacity=3)
    stepped(net, state, texts(2, net)[:, :3])
    with pytest.raises(ValueError, match="room for 3 tokens"):
        stepped(net, state, texts(2, net)[:, :1])


def test_nothing_is_allocated_while_writing(folder: Path) -> None:
    """Keys and values lie where they were put at the beginning, whatever is dropped, and a prompt's are there once."""
    net = load(folder, "float32")
    state = begun(net, random_ids(LENGTHS, net.config.vocabulary), 4)
    config, rows = net.config, 4 * len(LENGTHS)
    tokens = padded_keys(STEPS, config.head_size)
    assert state.cache.keys.shape == (config.decoder_layers, rows, config.heads, tokens, config.head_size)
    places = state.cache.keys.data_ptr(), state.cache.values.data_ptr()
    padded = max(-(-length // STEP) * STEP for length in LENGTHS)
    prompts = (config.decoder_layers, len(LENGTHS), config.heads, padded, config.head_size)
    assert state.memory.keys.shape == state.memory.values.shape == prompts
    room = Room(rows, STEPS, len(LENGTHS), max(LENGTHS))
    size = room.bytes(config.decoder_layers, config.heads, config.head_size, torch.float32)
    stores = (state.cache.keys, state.cache.values, state.memory.keys, state.memory.values)
    assert size == sum(store.numel() * 4 for store in stores)
    stepped(net, state, texts(rows, net)[:, :4])
    third = list(range(0, rows, 3))
    keep(state, third)
    stepped(net, state, texts(len(third), net)[:, :4])
    assert (state.cache.keys.data_ptr(), state.cache.values.data_ptr()) == places


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_cache_equals_the_formula(bias: bool) -> None:
    """One layer, token by token, against causal attention over the whole text."""
    rows, heads, tokens, size = 3, 2, 7, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, rows, tokens, heads, size, dtype=torch.float64, generator=generator)
    table = torch.randn(heads, 2 * tokens + 1, dtype=torch.float64, generator=generator) * bias
    relative = reference.RelativeBias(table)
    distances = relative.at(torch.arange(1 - tokens, 1)).contiguous()
    cache = Cache((1, rows, heads, tokens, size), scale=0.3, like=q, bias=distances if bias else None)
    cache.take([0] * rows)
    found = []
    for at in range(tokens):
        found.append(cache.attend(0, q[:, at], k[:, at], v[:, at])[0])
        cache.advance()
    for row in range(rows):
        offsets = torch.tensor([0, tokens], dtype=torch.int32)
        wanted = reference.attention(q[row], k[row], v[row], offsets, scale=0.3, causal=True, bias=relative)
        torch.testing.assert_close(torch.stack(found, 1)[row], wanted, rtol=0, atol=1e-14)


def test_memory_equals_the_formula() -> None:
    """Each text looks at its own prompt, before rows are dropped and after."""
    heads, size, counts = 2, 5, 3
    generator = torch.Generator().manual_seed(0)
    batch = Packed.from_ids(random_ids(LENGTHS, 9))
    keys, values = torch.randn(2, len(batch.tokens), heads, size, dtype=torch.float64, generator=generator)
    rows = len(LENGTHS) * counts
    q = torch.randn(rows, heads, size, dtype=torch.float64, generator=generator)
    wanted = []
    for row in range(rows):
        start, stop = list(pairwise(batch.offsets.tolist()))[row // counts]
        one, many = torch.tensor([0, 1]), torch.tensor([0, stop - start])
        prompt = (keys[start:stop], values[start:stop])
        wanted.append(reference.attention(q[row : row + 1], *prompt, one, scale=0.7, key_offsets=many))
    memory = Memory((1, len(LENGTHS), heads, steps(max(LENGTHS)), size), scale=0.7, like=keys)
    memory.put(0, memory.join(batch.lengths, [counts] * len(LENGTHS)), keys, values)
    kept = [0, 2, 4, 5, 9, 10, 11, 20]
    for now in (list(range(rows)), kept):
        if now == kept:
            memory.keep(kept)
        found = memory.attend(0, q[now])
        assert found is not None
        torch.testing.assert_close(found[0], torch.cat(wanted)[now], rtol=0, atol=1e-14)


def test_bfloat16_within_its_rounding(folder: Path) -> None:
    """Written in bfloat16 a text is as precise as it is when it is read whole."""
    truth_net, net = load(folder, "float64"), load(folder, "bfloat16")
    prompts = random_ids(LENGTHS, net.config.vocabulary)
    written = texts(len(prompts), net)
    with torch.inference_mode():
        inputs, decoder = Packed.from_ids(prompts), Packed.from_ids(list(written))
        truth, whole = (x(inputs, decoder=decoder).logits.double() for x in (truth_net, net))
    found = stepped(net, begun(net, prompts), written).flatten(0, 1)
    floor = (whole - truth).square().mean().sqrt()
    # The noise floor is the rounding of bfloat16 in the uncached pass: a hundredth of the logits.
    assert (found - truth).square().mean().sqrt() <= 1.5 * floor


def test_stored_ids_are_all_compared(folder: Path) -> None:
    """Beams and penalties are for the verb; the others are above."""
    stored = {name for name in load_file(folder / "expected.safetensors") if name.startswith("gen_")}
    here = {"gen_batch_greedy", "gen_batch_greedy_min10", "gen_seed_greedy", "gen_greedy_badwords"}
    beams = {"gen_beam3_early_False", "gen_beam3_early_True", "gen_beam4_min6_lp2"}
    assert stored == here | beams | {"gen_greedy_rep1.2"}
