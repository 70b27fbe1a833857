"""Pairs of chains in ``embed``: what is pooled, what is given per chain, how a pair is written, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_bert import CASES, GOLDEN
from safetensors.torch import load_file
from tiny import ankh, igbert, prott5
from torch import Tensor

import plm
from plm.embedding import embed_rows
from plm.packing import Packed
from plm_kernels import packing_available

# Two float64 programs that add in another order differ by 1.4e-14 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
PAIR = ("EVQLV", "DIQ")
PAIRED = pytest.mark.parametrize("make", [igbert, prott5], ids=["IgBert", "IgT5"])


class Case:
    """A stored checkpoint; its first two texts are pairs, and the third one a chain with U and B."""

    def __init__(self, folder: Path) -> None:
        self.model = plm.load(folder, dtype="float64")
        self.expected = load_file(folder / "expected.safetensors")
        inputs = json.loads((folder / "inputs.json").read_text())
        self.texts = [text.replace(" [SEP] ", "|").replace(" ", "") for text in inputs["texts"]]
        self.ids = [[token for token in row if token] for row in inputs["input_ids"]]

    @property
    def pairs(self) -> list[str]:
        return self.texts[:2]

    def chains(self, i: int) -> tuple[Tensor, Tensor]:
        """Rows of ``last_hidden_state`` that belong to the residues of each chain."""
        rows, middle = self.expected["last_hidden_state"][i], self.texts[i].index("|")
        return rows[1 : 1 + middle], rows[2 + middle : 1 + len(self.texts[i])]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(GOLDEN / request.param)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


def test_the_mean_is_over_residues_and_the_cards_counts_the_separator(case: Case) -> None:
    means, cards = (torch.stack(plm.embed(case.model, case.pairs, pool=pool)) for pool in ("mean", "card"))
    same(means, case.expected["pooled_every_special_id"][:2])
    same(cards, case.expected["pooled_added_only"][:2])
    assert (means - cards).abs().max() > 1e-3


def test_a_single_chain_has_one_mean(case: Case) -> None:
    """Of the third text with U and B as they are; the verb reads them as X."""
    ids = bytes(case.ids[2][1:-1])
    for pool, stored in (("mean", "pooled_every_special_id"), ("card", "pooled_added_only")):
        ((_, found),) = embed_rows(case.model, [ids], pool=pool)
        same(found, case.expected[stored][2])
    assert "U" in case.texts[2] and "B" in case.texts[2]
    read = plm.embed(case.model, case.texts[2])[0]
    assert torch.equal(read, plm.embed(case.model, case.texts[2].replace("U", "X").replace("B", "X"))[0])
    assert (read - case.expected["last_hidden_state"][2, 1:-1][: len(read)]).abs().max() > 1e-3


def test_rows_are_those_of_the_residues(case: Case) -> None:
    """Heavy rows and then light rows, without the separator's, of every layer."""
    for i, found in enumerate(plm.embed(case.model, case.pairs)):
        same(found, torch.cat(case.chains(i)))
        assert len(found) == len(case.texts[i]) - 1
    for layer in range(case.model.net.config.layers + 1):
        for i, found in enumerate(plm.embed(case.model, case.pairs, layer=layer)):
            rows, middle = case.expected[f"hidden_{layer}"][i], case.texts[i].index("|")
            same(found, torch.cat([rows[1 : 1 + middle], rows[2 + middle : 1 + len(case.texts[i])]]))


def test_per_chain(case: Case) -> None:
    wanted = [case.chains(i) for i in range(2)]
    same(plm.embed(case.model, case.pairs, per_chain=True), wanted)
    for pool, formula in {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}.items():
        vectors = plm.embed(case.model, case.pairs, per_chain=True, pool=pool)
        same(vectors, [tuple(map(formula, chains)) for chains in wanted])


def test_pooled_by_the_maximum_or_by_the_start_token(case: Case) -> None:
    found = plm.embed(case.model, case.pairs, pool="max")
    same(found, [torch.cat(case.chains(i)).amax(0) for i in range(2)])
    same(torch.stack(plm.embed(case.model, case.pairs, pool="cls")), case.expected["last_hidden_state"][:2, 0])


@PAIRED
def test_a_pair_is_one_text_with_the_separator_inside(make: Callable[[torch.dtype], plm.Model]) -> None:
    """``[CLS] H [SEP] L [SEP]`` for IgBert with one token type throughout, ``H </s> L </s>`` for IgT5."""
    model = make(torch.float64)
    text = f"{PAIR[0]}{model.tokenizer.separator}{PAIR[1]}"
    ids = model.tokenizer.encode(text)
    first = 0 if model.tokenizer.start is None else 1
    assert [model.tokenizer.vocabulary[i] for i in ids[first:]] == [
        *PAIR[0],
        model.tokenizer.separator,
        *PAIR[1],
        model.tokenizer.end,
    ]
    with torch.inference_mode():
        rows = model.net.encode(Packed.from_ids([ids])).hidden[first:-1]
    same(plm.embed(model, [PAIR])[0], torch.cat([rows[:5], rows[6:]]))
    same(plm.embed(model, [PAIR], pool="mean")[0], torch.cat([rows[:5], rows[6:]]).mean(0))
    same(plm.embed(model, [PAIR], pool="card")[0], rows.mean(0))
    same(plm.embed(model, [PAIR], per_chain=True)[0], (rows[:5], rows[6:]))


@PAIRED
def test_a_pair_in_every_form(make: Callable[[], plm.Model]) -> None:
    model = make()
    wanted = plm.embed(model, "EVQLV|DIQ")[0]
    separator = model.tokenizer.separator
    forms: list[Any] = [PAIR, [PAIR], ["EVQLV|DIQ"], iter([PAIR]), f"EVQLV{separator}DIQ", "E V Q L V | D I Q"]
    for given in forms:
        (found,) = plm.embed(model, given)
        assert torch.equal(found, wanted)
    mixed = plm.embed(model, [PAIR, "EVQLV|DIQ", ("DIQ", "EVQLV")])
    assert torch.equal(mixed[0], wanted) and torch.equal(mixed[1], wanted)
    assert not torch.equal(mixed[2], torch.cat([wanted[5:], wanted[:5]])), "the chains are not exchangeable"


@PAIRED
def test_chains_of_a_single_one(make: Callable[[], plm.Model]) -> None:
    """A model of pairs takes single chains too; per chain there is one."""
    model = make()
    whole = plm.embed(model, ["EVQLV", "D"])
    for chains, rows in zip(plm.embed(model, ["EVQLV", "D"], per_chain=True), whole, strict=True):
        assert len(chains) == 1 and torch.equal(chains[0], rows)
    for chains, rows in zip(plm.embed(model, ["EVQLV", "D"], per_chain=True, pool="mean"), whole, strict=True):
        assert len(chains) == 1 and torch.equal(chains[0], rows.mean(0))
    with_card, mean = (plm.embed(model, ["EVQLV", "D"], pool=pool) for pool in ("card", "mean"))
    assert all(map(torch.equal, with_card, mean))


@pytest.mark.skipif(not packing_available(), reason="this torch cannot pack weights: no promise of bits")
@PAIRED
def test_pairs_do_not_depend_on_their_batch(make: Callable[[], plm.Model]) -> None:
    model = make()
    pairs = [PAIR, ("Q", "V"), ("QVQLQESGPG", "EIVL"), ("EVQLV", "DIQ"), ("E", "DIQMTQSPSS")]
    wanted = [plm.embed(model, [pair], per_chain=True)[0] for pair in pairs]
    for max_tokens in (1, 20, 10_000):
        found = plm.embed(model, pairs, per_chain=True, max_tokens=max_tokens)
        for chains, alone in zip(found, wanted, strict=True):
            assert all(map(torch.equal, chains, alone))
            assert [len(chain) for chain in chains] == [len(chain) for chain in alone]


def test_a_tuple_of_two_is_a_pair_only_where_there_are_pairs(model: plm.Model) -> None:
    """To a model of single chains it is a collection of two sequences."""
    for single in (model, ankh()):
        assert [len(rows) for rows in plm.embed(single, PAIR)] == [5, 3]
    assert [len(rows) for rows in plm.embed(igbert(), PAIR)] == [8]
    assert [len(rows) for rows in plm.embed(igbert(), (*PAIR, "MK"))] == [5, 3, 2]
    assert [len(rows) for rows in plm.embed(igbert(), list(PAIR))] == [5, 3]
    assert [len(rows) for rows in plm.embed(igbert(), (PAIR, PAIR))] == [8, 8]


@pytest.mark.parametrize("pool", ["cls", "card"])
def test_one_vector_for_both_chains_is_not_per_chain(pool: Any) -> None:
    with pytest.raises(
        ValueError, match=f"pool '{pool}' is one vector for both chains; leave out per_chain, or choose"
    ):
        plm.embed(igbert(), PAIR, pool=pool, per_chain=True)


def test_no_start_token_to_pool_with() -> None:
    with pytest.raises(ValueError, match="prott5 has no start token; pool with 'mean' or 'max'"):
        plm.embed(prott5(), PAIR, pool="cls")


CHAINS = {
    "no light chain": ("EVQLV|", "no light chain"),
    "an empty light chain": (("EVQLV", ""), "no light chain"),
    "no heavy chain": ("|DIQ", "no heavy chain"),
    "no chains": ("|", "no chains"),
    "three chains": ("EV|DI|QM", "3 chains"),
    "a lower-case chain": ("EVQLV|diq", "light chain: character 'd' at position 1"),
    "a single chain": ("EVQLV", "a single chain among pairs"),
    "too long": (("E" * 20, "D" * 18), "39 residues; igbert takes at most 38"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_wrong_chains_are_named(name: str) -> None:
    given, reason = CHAINS[name]
    with pytest.raises(plm.InputError) as caught:
        plm.embed(igbert(), [PAIR, given, PAIR])
    (fault,) = caught.value.faults
    assert fault.record == 2 and reason in fault.reason and fault.hint


def test_the_longest_pair_that_fits() -> None:
    """40 positions: three special tokens and 37 residues."""
    assert len(plm.embed(igbert(), [("E" * 20, "D" * 17)])[0]) == 37


def test_a_pair_among_single_chains() -> None:
    with pytest.raises(plm.InputError, match="a pair among single chains"):
        plm.embed(igbert(), ["MKT", PAIR, "MK"])


def test_a_model_of_single_chains_says_so(model: plm.Model) -> None:
    for single in (model, ankh()):
        for given in ([PAIR], "EVQLV|DIQ"):
            with pytest.raises(plm.InputError, match="this model takes single chains"):
                plm.embed(single, given)


@pytest.mark.parametrize("wrong", [[("EVQ", None)], [("EVQ", "DIQ", "MK")], [["EVQ", "DIQ"]]])
def test_a_pair_is_two_strings(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"sequences must be strings, or pairs as tuples \(heavy, light\); number 1 is a"
    ):
        plm.embed(igbert(), wrong)
