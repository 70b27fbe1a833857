"""Key maps: every row has an inverse, and every kind of disagreement is named before data is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoints import CONFIGS, DROPPED, FREQUENCY, equal, hub, rows_of, wanted
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plm_weights import (
    Drop,
    KeyMap,
    KeyMapError,
    Row,
    TensorSource,
    Tied,
    check,
    explain,
    export_weights,
    import_weights,
)

# ------------------------------------------------------------------------------------------------ the language


def both_ways(rows: KeyMap, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Import with whatever shapes come out, and prove the way back."""
    state = import_weights(rows, source, imported_shapes(rows, source))
    assert equal(export_weights(rows, state), source)
    return state


def imported_shapes(rows: KeyMap, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets of a table, by reading the table turned round from right to left."""
    turned = [
        Row(row.target, row.source, "->".join(reversed(row.view.split("->"))), row.sizes)
        for row in rows
        if isinstance(row, Row)
    ]
    return export_weights(tuple(turned), source)


def test_two_numbers_in_one_name() -> None:
    """As T5 has them: ``encoder.block.{i}.layer.0`` is a name with one hole and one digit; some have two holes."""
    rows: KeyMap = (Row("block.{i}.layer.{j}.norm", "norms.{j}.{i}"), Row("block.{i}.layer.0.q", "blocks.{i}.q"))
    source = {f"block.{i}.layer.{j}.norm": torch.tensor([i, j]) for i in (0, 1, 10) for j in (0, 1)}
    source |= {f"block.{i}.layer.0.q": torch.tensor([i]) for i in (0, 1, 10)}
    state = both_ways(rows, source)
    assert torch.equal(state["norms.1.10"], torch.tensor([10, 1]))


def test_a_name_with_the_same_number_twice() -> None:
    rows: KeyMap = (Row("a.{i}.b.{i}", "c.{i}"), Drop("a.0.b.1", "the numbers differ"))
    source = {"a.0.b.0": torch.zeros(1), "a.1.b.1": torch.ones(1), "a.0.b.1": torch.ones(2)}
    state = import_weights(rows, source, {"c.0": torch.zeros(1), "c.1": torch.zeros(1)})
    assert torch.equal(state["c.1"], torch.ones(1))


def test_the_sharded_projection_of_progen2() -> None:
    """One published matrix holds, for each of 8 shards, its part of q, v and k in this order (salesforce/progen,
    modeling_progen.py): the row gives what its forward computes."""
    c, heads, shards = 64, 16, 8
    weight, x = torch.randn(3 * c, c, generator=torch.Generator().manual_seed(0)), torch.ones(2, c)
    targets = tuple(f"blocks.{{i}}.{name}" for name in "qvk")
    row = Row("h.{i}.qkv", targets, "(shard three o) i -> three (shard o) i", {"three": 3, "shard": shards})
    state = both_ways((row,), {"h.0.qkv": weight})
    projected = rearrange(x @ weight.T, "n (shard rest) -> n shard rest", shard=shards)
    for name, part in zip("qvk", projected.split(c // shards, dim=-1), strict=True):
        published = rearrange(part, "n shard (h d) -> n (shard h) d", h=heads // shards)
        torch.testing.assert_close((x @ state[f"blocks.0.{name}"].T).unflatten(-1, (heads, -1)), published)


def test_copies_per_layer() -> None:
    rows: KeyMap = (
        Row("layer.{i}.w", "blocks.{i}.w"),
        Row("layer.0.table", "table"),
        Tied("layer.{i}.table", "layer.0.table"),
        Tied("again", "layer.0.table", optional=True),
    )
    table = torch.arange(3.0)
    source = {f"layer.{i}.w": torch.tensor([i]) for i in range(12)} | {f"layer.{i}.table": table for i in range(12)}
    want = {f"blocks.{i}.w": torch.zeros(1) for i in range(12)} | {"table": table}
    state = import_weights(rows, source | {"again": table}, want)
    assert equal(export_weights(rows, state), source)
    del source["layer.7.table"]
    with pytest.raises(KeyMapError, match=r"layer\.7\.table: not there"):
        check(rows, source, state)


NUMBERS = st.sampled_from([(), (0,), (0, 1), (0, 1, 2, 11)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    layers=NUMBERS.filter(bool),
    parts=st.integers(1, 4),
    targets=st.integers(1, 4),
    view=st.sampled_from(["", "fuse", "transpose"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_any_row_has_an_inverse(
    layers: tuple[int, ...], parts: int, targets: int, view: str, shape: tuple[int, int]
) -> None:
    sources = tuple(f"a.{{i}}.{part}" for part in range(parts))
    if parts > 1:
        patterns = {"": "", "fuse": "p x y -> (p x) y", "transpose": "p x y -> p y x"}
    else:
        patterns = {"": "", "fuse": "x y -> (x y)", "transpose": "x y -> y x"}
    rows: KeyMap = (Row(sources, "b.{i}", patterns[view], {"x": shape[0], "y": shape[1]} if view == "fuse" else {}),)
    random = torch.Generator().manual_seed(0)
    source = {f"a.{i}.{part}": torch.randn(shape, generator=random) for i in layers for part in range(parts)}
    state = both_ways(rows, source)
    assert state.keys() == {f"b.{i}" for i in layers}

    unstacked: KeyMap = (Row("a.{i}", tuple(f"b.{{i}}.{target}" for target in range(targets))),)
    if targets > 1:
        both_ways(unstacked, {f"a.{i}": torch.randn((targets, *shape), generator=random) for i in layers})


def test_a_table_explained() -> None:
    rows: KeyMap = (
        Row(("q", "k"), "qk", "two o i -> (two o) i"),
        Row("a", "b"),
        Tied("head", "a", "the head shares the embedding"),
        Tied("tail", "a"),
        Drop("ids", "computed"),
    )
    assert explain(rows) == [
        ("q, k", "qk", "two o i -> (two o) i"),
        ("a", "b", "as it is"),
        ("head", "", "equal to a: the head shares the embedding"),
        ("tail", "", "equal to a"),
        ("ids", "", "dropped: computed"),
    ]


# ------------------------------------------------------------------------------------------------ faults


def lose(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda source: source.pop(key)


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda source: source.update({key: tensor})


def lose_layers(*layers: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda source: [source.pop(key) for key in list(source) if any(f"layer.{each}." in key for each in layers)]


KEY = "esm.encoder.layer.2.attention.self.key.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "missing": (lose(KEY), [f"{KEY}: not there, needed for blocks.2.attention.qkv.weight"]),
    "missing once": (
        lose("esm.encoder.emb_layer_norm_after.bias"),
        ["esm.encoder.emb_layer_norm_after.bias: not there, needed for norm.bias"],
    ),
    "optional to the table, but not to the model": (
        lose("lm_head.bias"),
        ["lm_head.bias: the model has it, nothing fills it"],
    ),
    "extra": (put("esm.extra", torch.zeros(1)), ["esm.extra: in no row of the key map"]),
    "extra layer number": (
        put("esm.encoder.layer.07.LayerNorm.bias", torch.zeros(32)),
        ["esm.encoder.layer.07.LayerNorm.bias: in no row of the key map"],
    ),
    "other shape": (
        put("lm_head.bias", torch.zeros(34)),
        ["lm_head.bias: the model has (33,), lm_head.bias gives (34,)"],
    ),
    "one of three of another shape": (
        put(KEY, torch.zeros(31, 32)),
        [
            f"{KEY.replace('key', 'query')}: to be stacked, but unlike: (32, 32) float32, (31, 32) float32, "
            "(32, 32) float32"
        ],
    ),
    "one of three of another dtype": (
        put(KEY, torch.zeros(32, 32, dtype=torch.float16)),
        [
            f"{KEY.replace('key', 'query')}: to be stacked, but unlike: (32, 32) float32, (32, 32) float16, "
            "(32, 32) float32"
        ],
    ),
    "copy of another shape": (
        put(FREQUENCY.format(3), torch.zeros(5)),
        [f"{FREQUENCY.format(3)}: (5,) float32, but should be a copy of {FREQUENCY.format(0)}, (4,) float32"],
    ),
    "copy with other values": (
        put(FREQUENCY.format(3), torch.zeros(4)),
        [f"{FREQUENCY.format(3)}: its values are not those of {FREQUENCY.format(0)}, of which it should be a copy"],
    ),
    "head not tied": (
        put("lm_head.decoder.weight", torch.zeros(33, 32)),
        [
            "lm_head.decoder.weight: its values are not those of esm.embeddings.word_embeddings.weight, of which it "
            "should be a copy"
        ],
    ),
    "a layer lost within": (
        lose_layers(2),
        [
            f"blocks.2.{name}.{part}: the model has it, nothing fills it"
            for name in ("attention.out", "attention.qkv", "attention_norm", "down", "feed_forward_norm", "up")
            for part in ("bias", "weight")
        ],
    ),
    "layers lost at the end": (
        lose_layers(2, 3),
        [
            f"blocks.{{i}}.{name}.{part}: the model has it, nothing fills it, i = 2..3"
            for name in ("attention.out", "attention.qkv", "attention_norm", "down", "feed_forward_norm", "up")
            for part in ("bias", "weight")
        ],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_named_and_nothing_else(fault: str) -> None:
    source = dict(hub("esm2_tiny"))
    seed, lines = FAULTS[fault]
    seed(source)
    with pytest.raises(KeyMapError) as error:
        import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    first, *named, advice = str(error.value).splitlines()
    assert first == "The checkpoint and the model disagree:"
    assert named == [f"  {line}" for line in lines]
    assert advice.startswith("Check that the checkpoint is complete")


def test_a_model_with_fewer_layers_than_the_checkpoint() -> None:
    source = hub("esm2_tiny")
    with pytest.raises(KeyMapError) as error:
        check(rows_of("esm2_tiny", source), source.meta, wanted(CONFIGS["esm2_tiny"] | {"layers": 1}))
    lines = str(error.value).splitlines()
    assert "  blocks.{i}.up.weight: a row fills it, the model has no such tensor, i = 1..3" in lines
    assert "  contact_head.weight: the model has (1, 4), esm.contact_head.regression.weight gives (1, 16)" in lines
    assert len(lines) == 2 + 12 + 1


def test_all_faults_come_at_once_and_sorted() -> None:
    source = dict(hub("esm2_tiny"))
    lose(KEY)(source)
    put("a.name", torch.zeros(1))(source)
    put("lm_head.bias", torch.zeros(34))(source)
    with pytest.raises(KeyMapError) as error:
        import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]] == [
        "a.name",
        KEY,
        "lm_head.bias",
    ]


def test_faults_are_found_before_data_is_read() -> None:
    meta = dict(hub("esm2_tiny").meta)
    del meta["lm_head.bias"]

    def read(name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    source = TensorSource(meta, {}, (), read)
    with pytest.raises(KeyMapError, match=r"lm_head\.bias"):
        import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    complete = TensorSource(hub("esm2_tiny").meta, {}, (), read)
    check(rows_of("esm2_tiny", complete), complete, wanted(CONFIGS["esm2_tiny"]))


def test_what_is_dropped_is_not_read_and_the_rest_once() -> None:
    original = hub("esm2_tiny")
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return original[name]

    source = TensorSource(original.meta, {}, (), read)
    import_weights(rows_of("esm2_tiny", source), source, wanted(CONFIGS["esm2_tiny"]))
    untied = [name for name in reads if "inv_freq" not in name]
    assert sorted(untied) == sorted(set(untied))
    assert set(reads) == original.keys() - DROPPED["esm2_tiny"]


def a_to_b(*rows: Row | Drop | Tied, names: str = "a", want: str = "b") -> str:
    """What is said about a table between tensors of one element."""
    source, target = ({name: torch.ones(1) for name in each.split()} for each in (names, want))
    with pytest.raises(KeyMapError) as error:
        check(rows, source, target)
    return "\n".join(line.strip() for line in str(error.value).splitlines()[1:-1])


def test_faults_of_tables() -> None:
    ab = Row("a", "b")
    assert a_to_b(ab, Row("c", "b"), names="a c") == "b: filled by 2 rows"
    assert a_to_b(ab, Row("a", "c"), want="b c") == "a: read by 2 rows"
    assert a_to_b(ab, Drop("a", "why")) == "a: read by 2 rows"
    assert a_to_b(ab, Tied("x", "c"), names="a x") == "x: should be a copy of c, which is not there"
    assert a_to_b(ab, Row("x.{i}", "y.{i}")) == "x.{i}: nothing has such a name, needed for y.{i}"
    assert a_to_b(ab, Row("x", "y")) == "x: not there, needed for y\ny: a row fills it, the model has no such tensor"
    assert a_to_b(ab, Tied("c", "a")) == "c: not there, should be a copy of a"
    assert a_to_b(ab, Row("c", "d"), names="a c") == "d: a row fills it, the model has no such tensor"
    assert a_to_b(Row("a", ("b", "c")), want="b c") == "a: shape (1,), to be unstacked into 2 tensors"
    assert "Wrong shape: expected 2 dims" in a_to_b(Row("a", "b", "x y -> y x"))
    both = (Row("x.{i}.a", "x.{i}.b"), Row("x.{i}.c", "x.{i}.d"))
    assert a_to_b(*both, names="x.0.a x.1.a x.1.c", want="x.0.b x.1.b x.0.d x.1.d") == (
        "x.0.c: not there, needed for x.0.d"
    )
    with pytest.raises(ValueError, match="same holes"):
        Row("a.{i}", "b.{j}")


def test_faults_of_an_export() -> None:
    rows: KeyMap = (Row(("a", "c"), "b"), Row("d", "e"))
    with pytest.raises(KeyMapError) as error:
        export_weights(rows, {"b": torch.ones(3), "x": torch.ones(1)})
    assert str(error.value).splitlines()[1:-1] == [
        "  b: shape (3,), to be unstacked into 2 tensors",
        "  e: not there, needed for d",
        "  x: in no row of the key map",
    ]
