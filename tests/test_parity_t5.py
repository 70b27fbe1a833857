"""T5 against stored truths: what transformers computes in float64 from tiny random weights.

``ankh3_tiny`` is gated (silu) with a head of its own and 64 buckets; ``prott5_tiny`` is plain (relu), its head is the
embedding because its config.json does not say otherwise, and its heads together are twice as wide as the stream.
Generated ids are compared in test_cache.py.
"""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_t5 import CASES, GOLDEN, run_ours
from parity import Outputs, differences, largest, rms, unpad, unpad_maps
from safetensors.torch import load_file, save_file
from torch import Tensor

import plm
from plm.models.t5 import T5, bucket, lm_loss, shift_right
from plm.packing import Packed

# Two float64 programs that add in another order differ by 1e-14 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
IGNORED = -100


class Case:
    """One stored checkpoint with its inputs and what they should give."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        inputs = json.loads((self.folder / "inputs.json").read_text())
        self.inputs = {key: torch.tensor(value) for key, value in inputs.items()}
        self.ids, self.mask, self.labels = (self.inputs[key] for key in ("input_ids", "attention_mask", "labels"))
        self.keep = self.mask.bool()
        self.batch = Packed.from_padded(self.ids, self.mask)
        self.settings: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.state = load_file(self.folder / "model.safetensors")
        self.expected = load_file(self.folder / "expected.safetensors")
        # The original's decoder runs over padding as well, which it marks in the labels alone.
        self.decoder = Packed.from_ids(list(self.expected["decoder_input_ids"]))

    @property
    def numbered(self) -> dict[str, str]:
        """From our name of each hidden state to theirs."""
        stacks = {"encoder": self.settings["num_layers"], "decoder": self.settings["num_decoder_layers"]}
        return {f"{stack}.{i}": f"{stack}_hidden_{i}" for stack, count in stacks.items() for i in range(count + 1)}

    def truth(self) -> Outputs:
        """Each stack's hidden states, the attention maps that are stored, and the logits."""
        whole = {name: self.expected[stored] for name, stored in self.numbered.items()}
        states = {k: unpad(x, self.keep) if k.startswith("encoder") else list(x) for k, x in whole.items()}
        cross = self.expected["cross_attention_last"]
        return {
            **states,
            "encoder.attentions": unpad_maps(self.expected["encoder_attention_0"][:, None], self.keep),
            "decoder.attentions": list(self.expected["decoder_attention_0"][:, None]),
            "cross.attentions": [x[None][..., real] for x, real in zip(cross, self.keep, strict=True)],
            "logits": list(self.expected["logits"]),
        }

    def net(self, dtype: str = "float64") -> T5:
        net = plm.load(self.folder, dtype=dtype).net
        assert isinstance(net, T5)
        return net

    def error_of(self, net: T5) -> float:
        """The largest error of any output."""
        return largest(differences(self.outputs(net), self.truth()))

    def outputs(self, net: T5) -> Outputs:
        """All outputs; of the attention maps, those that are stored."""
        found = run_ours(net, self.batch, self.decoder)
        for name in ("encoder.attentions", "decoder.attentions"):
            found[name] = [maps[:1] for maps in found[name]]
        found["cross.attentions"] = [maps[-1:] for maps in found["cross.attentions"]]
        return found

    def error_with(self, wrong: dict[str, Tensor], folder: Path) -> float:
        """The same of a checkpoint whose tensors are ``wrong``, though it loads."""
        save_file({name: x.contiguous() for name, x in wrong.items()}, folder / "model.safetensors")
        shutil.copy(self.folder / "config.json", folder)
        return self.error_of(plm.load(folder, dtype="float64").net)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT64)


def test_every_tensor_in_float64(case: Case) -> None:
    """Every hidden state of both stacks, attention maps of the three kinds, and the logits."""
    found, truth = case.outputs(case.net()), case.truth()
    assert found.keys() == truth.keys()
    assert largest(differences(found, truth)) < FLOAT64


def test_nothing_stored_is_left_out(case: Case) -> None:
    """This file names every stored tensor but those that are about generation and scores."""
    maps = {"encoder_attention_0", "decoder_attention_0", "cross_attention_last"}
    other = {"left_encoder_last", "long_encoder_last", "nomask_encoder_last"}
    biases = {"encoder_bias_5x160", "decoder_bias_160x160"}
    head = {"logits", "logits_fp32", "loss", "decoder_input_ids"}
    stored = {name for name in case.expected if not name.startswith(("gen_", "pll_"))}
    assert stored == {*case.numbered.values()} | maps | other | biases | head


@torch.no_grad()
def test_padding_on_the_left(case: Case) -> None:
    ids, mask = case.inputs["left_input_ids"], case.inputs["left_attention_mask"]
    hidden = case.net().encode(Packed.from_padded(ids, mask)).hidden
    same(hidden, case.expected["left_encoder_last"][mask.bool()])


@torch.no_grad()
def test_a_sequence_that_reaches_every_bucket(case: Case) -> None:
    """300 tokens, so that distances go far beyond the last bucket's edge."""
    hidden = case.net().encode(Packed.from_ids(list(case.inputs["long_input_ids"]))).hidden
    same(hidden, case.expected["long_encoder_last"][0])


@torch.no_grad()
def test_without_an_attention_mask(case: Case) -> None:
    """Then ``<pad>`` is a token like any other, with the vector that is stored for it."""
    batch = Packed.from_ids(list(case.ids))
    same(batch.pad(case.net().encode(batch).hidden), case.expected["nomask_encoder_last"])


@torch.no_grad()
def test_relative_biases(case: Case) -> None:
    """From 5 queries to 160 keys of the encoder; from the last 3 queries of 160 to the keys before them, of the
    decoder, whose later keys no query sees."""
    net = case.net()
    positions = torch.arange(160)
    encoder = net.encoder.relative_bias().at(positions - positions[:5, None])
    same(encoder, case.expected["encoder_bias_5x160"][0])
    decoder = net.decoder.relative_bias().at(positions - positions[-3:, None])
    seen = positions <= positions[-3:, None]
    same(decoder[:, seen], case.expected["decoder_bias_160x160"][0][:, seen])


def test_labels_to_decoder_input(case: Case) -> None:
    shifted = [shift_right(row) for row in case.labels.tolist()]
    assert shifted == case.expected["decoder_input_ids"].tolist()


@torch.no_grad()
def test_loss(case: Case) -> None:
    """Also with the tokens left out whose labels are ignored: a decoder never looks ahead."""
    net, wanted = case.net(), case.expected["loss"][0]
    same(lm_loss(net(case.batch, decoder=case.decoder).logits, case.labels.flatten()), wanted)
    labels = [row[row != IGNORED] for row in case.labels]
    decoder = Packed.from_ids([shift_right(row.tolist()) for row in labels])
    same(lm_loss(net(case.batch, decoder=decoder).logits, torch.cat(labels)), wanted)


def test_logits_in_float32(case: Case) -> None:
    """At most twice the error of transformers in float32, both the largest and the root mean square."""
    wanted = {"logits": case.truth()["logits"]}
    floor = differences({"logits": list(case.expected["logits_fp32"])}, wanted)
    found = differences(case.outputs(case.net("float32")), wanted)
    # The noise floor is the original's own error in float32: at most 2e-6, in the mean 4e-7.
    assert largest(found) <= 2 * largest(floor)
    assert rms(found)["logits"] <= 2 * rms(floor)["logits"]


@torch.no_grad()
def test_the_verb_gives_what_the_network_gives(case: Case) -> None:
    """``embed``, from ids that are residues: every layer of the encoder, without the row of ``</s>``."""
    model = plm.load(case.folder, dtype="float64")
    rows = [row[real][:-1].tolist() for row, real in zip(case.ids, case.keep, strict=True)]
    residues = {*model.tokenizer.residue_ids}
    texts = [model.tokenizer.decode([i if i in residues else 3 for i in row]) for row in rows]
    batch = model.tokenizer.pack(texts)
    states = model.net.encode(batch, hidden_states=True).hidden_states
    for layer, state in enumerate(states):
        found = plm.embed(model, texts, layer=layer)
        for ours, wanted in zip(found, batch.split(state), strict=True):
            same(ours, wanted[:-1])


FIRST_OF_BUCKET = {
    (32, False): [*range(9), 12, 16, 23, 32, 46, 64, 91],
    (32, True): [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
    (64, True): [
        *(*range(33), 34, 35, 37, 39, 40, 42, 44, 46, 48, 50, 52, 54, 57, 59, 62, 64, 67, 70, 73, 77, 80, 83, 87, 91),
        *(95, 99, 104, 108, 113, 118, 123),
    ],
}
FIRST_OF_BUCKET[64, False] = FIRST_OF_BUCKET[32, True]


@pytest.mark.parametrize(("buckets", "causal"), FIRST_OF_BUCKET)
def test_buckets(buckets: int, causal: bool) -> None:
    """The first distance of every bucket, and what becomes of the keys on the other side."""
    distance = torch.arange(5000)
    before = bucket(-distance, buckets, 128, causal)
    first = [int((before == i).nonzero()[0]) for i in before.unique().tolist()]
    assert first == FIRST_OF_BUCKET[buckets, causal]
    assert before.tolist() == sorted(before.tolist())
    after = bucket(distance[1:], buckets, 128, causal)
    assert torch.equal(after, torch.zeros_like(after) if causal else before[1:] + buckets // 2)


def test_each_transposed_matrix_is_refused(case: Case, tmp_path: Path) -> None:
    """By its shape and with its place: the heads together are never as wide as the stream."""
    for name, matrix in case.state.items():
        if matrix.dim() == 2:
            with pytest.raises(plm.CheckpointError, match=re.escape(name.rsplit(".", 2)[0])):
                case.error_with(case.state | {name: matrix.T}, tmp_path)


def test_each_swap_of_two_tensors_is_caught(case: Case, tmp_path: Path) -> None:
    """It fails if two tensors of one shape change places: each with the next of that shape in the alphabet."""
    alike: dict[torch.Size, list[str]] = {}
    for name in sorted(case.state):
        alike.setdefault(case.state[name].shape, []).append(name)
    swaps = [pair for names in alike.values() for pair in pairwise(names)]
    assert len(swaps) > len(case.state) / 2
    for name, other in swaps:
        wrong = case.state | {name: case.state[other], other: case.state[name]}
        assert case.error_with(wrong, tmp_path) > 1e-3, (name, other)


def test_each_missing_tensor_is_refused(case: Case, tmp_path: Path) -> None:
    """By name, before anything is computed. A T5 is known by its encoder's bias: without it, it is of no family."""
    for name in case.state:
        with pytest.raises(plm.CheckpointError) as error:
            case.error_with({other: x for other, x in case.state.items() if other != name}, tmp_path)
        said = "of no family" if name.startswith("encoder.") and "relative_attention_bias" in name else name
        assert said in str(error.value), name
