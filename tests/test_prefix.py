"""Sharing the wild type's keys and values: the numbers of scoring every variant whole, from half the tokens."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import igbert

import plm
from plm.models.progen2 import ProGen2
from plm.mutations import RESIDUES, mutated, single_substitutions
from plm.packing import Packed
from plm.prefix import causal

GOLDEN = Path(__file__).parent / "golden" / "progen2"
CASES = ("half_rotary_buffers", "bin_fp16_large_vocab", "hub_port_asymmetric_vocab")
# Both add float64 in another order: at most 1e-13 here (measured).
FLOAT64 = 1e-9
WILD_TYPE = "MKTAYIAKQRQISFVKSHFS"
NAMES = ["M1A", "S20W", "WT", "I6V", "K2E:F19W", "M1G:S20G", "A4T:Q9M:K16R", "I6I"]
NAMES += ["M1del", "S20del", "K8_S13del", "A4_Y5insGG", "K2delinsAVL", "S20delinsSG", "Q9del:H18_F19insWW"]
NAMES += [WILD_TYPE[:-3], WILD_TYPE + "GG", WILD_TYPE[3:], "GG" + WILD_TYPE, "M", "W", WILD_TYPE * 2]


def load(case: str, dtype: str = "float64") -> plm.Model:
    return plm.load(GOLDEN / case, dtype=dtype)


@torch.inference_mode()
def whole(model: plm.Model, text: str) -> float:
    """The plain formula: both directions of the whole protein, alone, softmax over the letters, terminals unscored."""
    letters, total = list(model.tokenizer.residue_ids), 0.0
    for written in (f"1{text}2", f"2{text[::-1]}1"):
        ids = model.tokenizer.encode(written)
        log_probs = model.net(Packed.from_ids([ids])).logits[:, letters].log_softmax(-1).double()
        total += sum(float(log_probs[i - 1, letters.index(ids[i])]) for i in range(1, len(ids) - 1))
    return total / 2


def one_by_one(model: plm.Model, wild_type: str, names: list[str]) -> list[float]:
    own = whole(model, wild_type)
    return [whole(model, text) - own for text in mutated(wild_type, names)]


def distance(found: list[float], wanted: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_tokens", [1, 50, None])
def test_sharing_changes_nothing(case: str, max_tokens: int | None) -> None:
    """First and last residue, several changes, changes of length at either end and within; any budget."""
    model = load(case)
    wanted = one_by_one(model, WILD_TYPE, NAMES)
    found = plm.variants(model, WILD_TYPE, NAMES, max_tokens=max_tokens)
    assert distance(found, wanted) < FLOAT64
    assert found[NAMES.index("WT")] == found[NAMES.index("I6I")] == 0
    assert min(abs(value) for value in found if value) > 1e-3


@pytest.mark.parametrize("wild_type", ["M", "MK", "MKT"])
def test_the_shortest(wild_type: str) -> None:
    model = load(CASES[0])
    names = [*single_substitutions(wild_type), wild_type + "W", "W" + wild_type, "WW"]
    assert distance(plm.variants(model, wild_type, names), one_by_one(model, wild_type, names)) < FLOAT64


SEQUENCES = st.text(RESIDUES, min_size=1, max_size=9)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(SEQUENCES, st.lists(SEQUENCES, min_size=1, max_size=6), st.integers(1, 60))
def test_any_variants(wild_type: str, texts: list[str], max_tokens: int) -> None:
    names = [text for text in texts if text != "WT"]
    model = any_model()
    found = plm.variants(model, wild_type, names, max_tokens=max_tokens)
    assert not names or distance(found, [whole(model, text) - whole(model, wild_type) for text in names]) < FLOAT64


def any_model(made: list[plm.Model] = []) -> plm.Model:  # noqa: B006 - loaded once for all examples
    made[:] = made or [load(CASES[0])]
    return made[0]


@pytest.mark.parametrize("case", CASES)
def test_float32_is_no_worse_than_whole_scoring(case: str) -> None:
    """Root mean square of the errors against float64, which are those of rounding in either way."""
    exact, single = load(case), load(case, "float32")
    names = single_substitutions(WILD_TYPE)
    truth = torch.tensor(plm.variants(exact, WILD_TYPE, names))
    ours = (torch.tensor(plm.variants(single, WILD_TYPE, names)) - truth).square().mean().sqrt()
    plain = (torch.tensor(one_by_one(single, WILD_TYPE, names)) - truth).square().mean().sqrt()
    assert 0 < ours < 2 * plain


class Counted:
    """Tokens that went through the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        read: Callable[..., Any] = ProGen2.read

        def counting(net: ProGen2, tokens: torch.Tensor, *rest: Any) -> Any:
            self.calls.append(len(tokens))
            return read(net, tokens, *rest)

        monkeypatch.setattr(ProGen2, "read", counting)


def test_a_scan_takes_half_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole variants, which are two directions of L + 2 tokens each; and no batch has more than its budget."""
    model, counted, length = load(CASES[0], "float32"), Counted(monkeypatch), len(WILD_TYPE)
    plm.variants(model, WILD_TYPE, single_substitutions(WILD_TYPE), max_tokens=200)
    wild_type, *variants = counted.calls
    assert wild_type == 2 * (length + 1)
    # A change at position p leaves L - p tokens behind it in one direction and p - 1 in the other.
    assert sum(variants) == 19 * length * (length - 1)
    assert sum(variants) / (19 * length * 2 * (length + 2)) < 0.5
    assert max(variants) <= 200


def test_a_variant_is_run_once_however_often_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = load(CASES[0], "float32"), Counted(monkeypatch)
    found = plm.variants(model, WILD_TYPE, ["I6V", "WT", "I6V", "I6I", "MKTAYVAKQRQISFVKSHFS"])
    assert counted.calls == [2 * (len(WILD_TYPE) + 1), len(WILD_TYPE) - 1]
    assert found[0] == found[2] == found[4] and found[1] == found[3] == 0


def test_the_ends_need_no_token_in_one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing follows the last residue, so its probability is the wild type's alone."""
    model, counted = load(CASES[0]), Counted(monkeypatch)
    plm.variants(model, "M", single_substitutions("M"))
    assert counted.calls == [4]


def test_a_nan_is_never_returned() -> None:
    model = load(CASES[0], "float32")
    broken = replace(model, net=copy.deepcopy(model.net))
    with torch.no_grad():
        broken.net.embed.weight[model.tokenizer.vocabulary.index("W"), 3] = torch.nan
    with pytest.raises(FloatingPointError, match="gave a NaN or an infinity"):
        plm.variants(broken, WILD_TYPE, ["I6W"])


def test_only_a_causal_model_has_a_prefix_to_share() -> None:
    with pytest.raises(TypeError, match="igbert is no causal model"):
        causal(igbert())
