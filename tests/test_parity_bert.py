"""BERT against stored truths: what transformers computes in float64 from tiny random weights.

``protbert_tiny`` has the twelve settings of ProtBert's config.json (no eps, no model type), ``igbert_tiny`` the full
set. Every number of either is compared.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracle_bert import CASES, GOLDEN, build_bert, load_bert, run_ours
from parity import Outputs, differences, largest, rms, unpad, unpad_maps
from safetensors.torch import load_file
from torch import Tensor

from plm.models.bert import BERT, Config, masked_lm_loss
from plm.packing import Packed
from plm_weights import CheckpointError

# Two float64 programs that add in another order differ by 1.4e-14 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
MASK = 4
# What is made of the network's outputs, by pooling and scoring.
DERIVED = {"pooled_added_only", "pooled_every_special_id", "special_mask_added_only", "special_mask_every_special_id"}


class Case:
    """One stored checkpoint with its inputs and what they should give."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        inputs = json.loads((self.folder / "inputs.json").read_text())
        self.ids, self.mask, self.masked_ids, self.labels, self.types = (
            torch.tensor(inputs[key])
            for key in ("input_ids", "attention_mask", "masked_input_ids", "labels", "token_type_ids")
        )
        self.keep = self.mask.bool()
        self.batch = Packed.from_padded(self.ids, self.mask)
        self.settings = json.loads((self.folder / "config.json").read_text())
        self.state = load_file(self.folder / "model.safetensors")
        self.expected = load_file(self.folder / "expected.safetensors")
        self.layers = self.settings["num_hidden_layers"]

    def truth(self) -> Outputs:
        states = {f"hidden_states.{i}": unpad(self.expected[f"hidden_{i}"], self.keep) for i in range(self.layers + 1)}
        return {
            **states,
            "attentions": unpad_maps(self.expected["attention_0"][:, None], self.keep),
            "logits": unpad(self.expected["logits"], self.keep),
            "pooled": list(self.expected["pooler_output"]),
            "relation_logits": list(self.expected["seq_relationship_logits"]),
        }

    def net(self, dtype: torch.dtype = torch.float64) -> BERT:
        return load_bert(self.folder, dtype)

    def error_of(self, net: BERT, types: Tensor | None = None) -> float:
        """The largest error of any output; of the attention maps, only the first layer's are stored."""
        found = run_ours(net, self.batch, types)
        found["attentions"] = [maps[:1] for maps in found["attentions"]]
        truth = self.truth()
        assert found.keys() == truth.keys()
        return largest(differences(found, truth))

    def error_with(self, wrong: Mapping[str, Tensor]) -> float:
        return self.error_of(build_bert(wrong, wrong, self.settings, torch.float64))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


def test_every_tensor_in_float64(case: Case) -> None:
    """Every hidden state, the first layer's attention maps, logits, pooled sequences and their relation."""
    assert case.error_of(case.net()) < FLOAT64
    same(case.expected[f"hidden_{case.layers}"], case.expected["last_hidden_state"])


def test_nothing_stored_is_left_out(case: Case) -> None:
    """The other tests of this file name every stored tensor."""
    numbered = {f"hidden_{i}" for i in range(case.layers + 1)}
    whole = {"attention_0", "logits", "pooler_output", "seq_relationship_logits", "last_hidden_state", "logits_fp32"}
    other = {"masked_logits", "masked_lm_loss", "typed_last_hidden_state", "nomask_last_hidden_state"}
    assert case.expected.keys() == numbered | whole | other | {"pseudo_logp_row2"} | DERIVED


@torch.no_grad()
def test_masked_logits_and_their_loss(case: Case) -> None:
    logits = case.net()(Packed.from_padded(case.masked_ids, case.mask)).logits
    same(logits, case.expected["masked_logits"][case.keep])
    same(masked_lm_loss(logits, case.labels[case.keep]), case.expected["masked_lm_loss"][0])


@torch.no_grad()
def test_token_types(case: Case) -> None:
    hidden = case.net().encode(case.batch, types=case.types[case.keep]).hidden
    same(hidden, case.expected["typed_last_hidden_state"][case.keep])


@torch.no_grad()
def test_without_an_attention_mask(case: Case) -> None:
    """Then ``[PAD]`` is a token like any other, with the vector that is stored for it."""
    batch = Packed.from_padded(case.ids, torch.ones_like(case.mask))
    same(batch.pad(case.net().encode(batch).hidden), case.expected["nomask_last_hidden_state"])


@torch.no_grad()
def test_each_residue_masked_in_turn(case: Case) -> None:
    """The log-probabilities that a pseudo-log-likelihood adds up, for the third sequence."""
    ids = case.ids[2][case.keep[2]]
    inner = torch.arange(1, len(ids) - 1)
    copies = ids.repeat(len(inner), 1)
    copies[torch.arange(len(inner)), inner] = MASK
    batch = Packed.from_ids(list(copies))
    log_probs = torch.stack(batch.split(case.net()(batch).logits.log_softmax(-1)))
    same(log_probs[torch.arange(len(inner)), inner], case.expected["pseudo_logp_row2"])


def test_logits_in_float32(case: Case) -> None:
    """At most twice the error of transformers in float32, both the largest and the root mean square."""
    wanted = {"logits": unpad(case.expected["logits"], case.keep)}
    floor = differences({"logits": unpad(case.expected["logits_fp32"], case.keep)}, wanted)
    found = differences(run_ours(case.net(torch.float32), case.batch), wanted)
    # The noise floor is the original's own error in float32: at most 8e-6, in the mean 2e-6.
    assert largest(found) <= 2 * largest(floor)
    assert rms(found)["logits"] <= 2 * rms(floor)["logits"]


@torch.no_grad()
def test_encode_is_forward_without_heads(case: Case) -> None:
    net = case.net()
    whole, encoded = net(case.batch, hidden_states=True), net.encode(case.batch, hidden_states=True)
    assert torch.equal(encoded.hidden, whole.hidden)
    assert all(map(torch.equal, encoded.hidden_states, whole.hidden_states))
    heads = (encoded.logits, encoded.pooled, encoded.relation_logits, encoded.attentions)
    assert heads == (None, None, None, None)
    assert net(case.batch, logits=False).logits is None and net(case.batch).hidden_states is None


def test_each_transposed_matrix_is_caught(case: Case) -> None:
    """The comparison is sharp: it fails for each square matrix that lies the wrong way around, which no shape tells."""
    matrices = [name for name, x in case.state.items() if x.dim() == 2 and x.shape[0] == x.shape[1]]
    assert len(matrices) == 4 * case.layers + 2  # query, key, value and output of each layer; the head; the pooler
    for name in matrices:
        assert case.error_with(case.state | {name: case.state[name].T.contiguous()}) > 1e-3, name


def test_each_swap_of_two_tensors_is_caught(case: Case) -> None:
    """It fails too if two tensors of one shape change places: each with the next of that shape in the alphabet."""
    alike: dict[torch.Size, list[str]] = {}
    for name in sorted(case.state):
        alike.setdefault(case.state[name].shape, []).append(name)
    swaps = [pair for names in alike.values() for pair in pairwise(names)]
    assert len(swaps) > len(case.state) / 2
    for name, other in swaps:
        wrong = case.state | {name: case.state[other], other: case.state[name]}
        assert case.error_with(wrong) > 1e-3, (name, other)


def test_each_missing_tensor_is_refused(case: Case) -> None:
    """Before anything is computed, by name; an optional head may be missing as a whole only."""
    for name in case.state:
        with pytest.raises(CheckpointError, match=r"nothing fills it|not there"):
            case.error_with({other: x for other, x in case.state.items() if other != name})


@pytest.mark.parametrize("eps", [1e-5, 1e-7])
def test_another_epsilon_is_caught(case: Case, eps: float) -> None:
    """torch's own default is 1e-5; 1e-12 is what BERT has where its configuration says nothing."""
    net = case.net()
    assert net.config.norm_eps == 1e-12
    wrong = BERT(replace(net.config, norm_eps=eps)).double()
    wrong.load_state_dict(net.state_dict())
    assert case.error_of(wrong) > 10 * FLOAT64


def test_other_token_types_are_caught(case: Case) -> None:
    """None is zero, and neither one nor the types of a tokenizer that was given two texts."""
    net, zero = case.net(), torch.zeros_like(case.batch.tokens)
    assert case.error_of(net, types=zero) < FLOAT64
    assert case.error_of(net, types=zero + 1) > 1e-3
    assert case.error_of(net, types=case.types[case.keep]) > 1e-3
    with pytest.raises(ValueError, match=r"one number per packed token, shape \[45\]; got \[3, 21\]"):
        net(case.batch, types=case.types)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_epsilon_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    """A constant row has no variance: 1e-12 added in float16, where it is zero, would make 0 / 0 of it."""
    net = case.net(dtype)
    for table in (net.embed, net.positions, net.types):
        table.weight.fill_(0.5)
    embedded = net.embed_tokens(case.batch)
    assert torch.equal(embedded, net.embed_norm.bias.expand_as(embedded))
    assert net(case.batch).logits.isfinite().all()


def test_configurations_that_do_not_make_sense() -> None:
    sizes = {"vocabulary": 30, "layers": 1, "channels": 10, "feed_forward": 8, "positions": 9, "types": 2}
    with pytest.raises(ValueError, match="got 10 channels and 3 heads"):
        Config(heads=3, **sizes)
    with pytest.raises(ValueError, match="relation head without a pooler"):
        Config(heads=2, relation_head=True, **sizes)
