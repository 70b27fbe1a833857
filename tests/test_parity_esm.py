"""ESM-1b and ESM-2 against stored truths: what fair-esm and transformers compute in float64 from tiny random weights.

Every number is compared, read from both published forms of the same weights.
"""

import json
import shutil
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from parity import Outputs, differences, largest, rms, run_ours, unpad, unpad_contacts, unpad_maps
from safetensors.torch import load_file, save_file
from torch import Tensor

import plm
from plm.models.esm import MASK, classification_loss, masked_lm_loss

# Two float64 programs that add in another order differ by 3e-14 here (measured); a float32 step left in either by 5e-6.
FLOAT64 = 1e-9
HEADS = {
    "EsmForSequenceClassification": ("classifier.dense.", "classifier.out_proj."),
    "EsmForTokenClassification": ("classifier.weight", "classifier.bias"),
    "EsmModel": ("esm.pooler.",),
}


@pytest.fixture(params=["esm1b_tiny", "esm2_tiny"])
def case(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / "esm" / request.param


@pytest.fixture(params=["hub", "fair-esm"])
def source(request: pytest.FixtureRequest, case: Path) -> Path:
    """The same weights in either published form."""
    return case if request.param == "hub" else case / f"{case.name}.pt"


@pytest.fixture
def expected(case: Path) -> dict[str, Tensor]:
    return load_file(case / "expected.safetensors")


@pytest.fixture
def batch(expected: dict[str, Tensor]) -> plm.Packed:
    return plm.Packed.from_padded(expected["input_ids"], expected["attention_mask"])


@pytest.fixture
def truth(expected: dict[str, Tensor]) -> Outputs:
    keep = expected["attention_mask"].bool()
    states = {name: unpad(x, keep) for name, x in expected.items() if name.startswith("hidden_states.")}
    return {
        **states,
        "logits": unpad(expected["logits"], keep),
        "attentions": unpad_maps(expected["attentions"], keep),
        "contacts": unpad_contacts(expected["contacts"], keep),
    }


def save_head(case: Path, folder: Path, kind: str) -> Path:
    """A folder as transformers' ``kind`` saves it: the encoder and its head, without the masked-language-model head."""
    heads = load_file(case / "heads.safetensors")
    state = {name: x for name, x in load_file(case / "model.safetensors").items() if not name.startswith("lm_head.")}
    state |= {name: x for name, x in heads.items() if name.startswith(HEADS[kind])}
    if kind == "EsmModel":  # the base class saves itself without a prefix
        state = {name.removeprefix("esm."): x for name, x in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(case / "config.json", folder)
    return folder


def test_every_tensor_in_float64(source: Path, batch: plm.Packed, truth: Outputs) -> None:
    """Logits, every hidden state, every attention map and the contacts."""
    ours = run_ours(plm.load(source, dtype="float64").net, batch)
    assert ours.keys() == truth.keys()
    assert largest(differences(ours, truth)) < FLOAT64


def test_float32_is_as_precise_as_the_original(source: Path, case: Path, batch: plm.Packed, truth: Outputs) -> None:
    """The largest error of each output is at most twice fair-esm's own."""
    ours = differences(run_ours(plm.load(source, dtype="float32").net, batch), truth)
    measured = json.loads((case / "meta.json").read_text())["measured"]
    for name in ours:
        # The noise floor: fair-esm in float32 against this truth, measured when it was made (2e-5 for logits up to 14).
        assert ours[name].abs().max() <= 2 * measured[name]["fair32-fair64"], name


def test_logits_in_float32(source: Path, batch: plm.Packed, expected: dict[str, Tensor], truth: Outputs) -> None:
    """The same for all logits together, for which fair-esm's float32 numbers are stored."""
    wanted = {"logits": truth["logits"]}
    stored = {"logits": unpad(expected["logits_fp32"], expected["attention_mask"].bool())}
    ours = run_ours(plm.load(source, dtype="float32").net, batch)
    # The noise floor: fair-esm's root mean square error in float32, 2e-6.
    assert rms(differences(ours, wanted))["logits"] <= 2 * rms(differences(stored, wanted))["logits"]


def test_pooler(case: Path, tmp_path: Path, batch: plm.Packed, expected: dict[str, Tensor]) -> None:
    net = plm.load(save_head(case, tmp_path, "EsmModel"), dtype="float64").net
    assert net.lm_head is None
    assert largest(differences(run_ours(net, batch), {"pooled": list(expected["pooler_output"])})) < FLOAT64


def test_sequence_classifier(case: Path, tmp_path: Path, batch: plm.Packed, expected: dict[str, Tensor]) -> None:
    net = plm.load(save_head(case, tmp_path, "EsmForSequenceClassification"), dtype="float64").net
    out = net(batch)
    torch.testing.assert_close(out.sequence_logits, expected["seqcls_logits"], rtol=0, atol=FLOAT64)
    loss = classification_loss(out.sequence_logits, expected["seqcls_labels"])
    torch.testing.assert_close(loss, expected["seqcls_loss"][0], rtol=0, atol=FLOAT64)


def test_token_classifier(case: Path, tmp_path: Path, batch: plm.Packed, expected: dict[str, Tensor]) -> None:
    net = plm.load(save_head(case, tmp_path, "EsmForTokenClassification"), dtype="float64").net
    keep = expected["attention_mask"].bool()
    out = net(batch)
    torch.testing.assert_close(out.token_logits, expected["tokcls_logits"][keep], rtol=0, atol=FLOAT64)
    loss = classification_loss(out.token_logits, expected["tokcls_labels"][keep])
    torch.testing.assert_close(loss, expected["tokcls_loss"][0], rtol=0, atol=FLOAT64)


def test_masked_lm_loss(source: Path, batch: plm.Packed, expected: dict[str, Tensor]) -> None:
    logits = plm.load(source, dtype="float64").net(batch).logits
    loss = masked_lm_loss(logits, expected["mlm_labels"][expected["attention_mask"].bool()])
    torch.testing.assert_close(loss, expected["mlm_loss"][0], rtol=0, atol=FLOAT64)


@torch.no_grad()
def test_scores(source: Path, case: Path, expected: dict[str, Tensor]) -> None:
    """Marginal log-probabilities without a mask and with each token masked in turn, and what is summed from them."""
    model = plm.load(source, dtype="float64")
    ids = torch.tensor(model.tokenizer.encode(json.loads((case / "inputs.json").read_text())["scoring_sequence"]))
    plain = model.net(plm.Packed.from_ids([ids])).logits.log_softmax(-1)
    copies = ids.repeat(len(ids), 1).fill_diagonal_(MASK)
    batch = plm.Packed.from_ids(list(copies))
    masked = torch.stack([x[i] for i, x in enumerate(batch.split(model.net(batch).logits.log_softmax(-1)))])
    total = masked.gather(1, ids[:, None])[1:-1].sum()
    found = {
        "wt_logprobs": plain,
        "masked_logprobs": masked,
        "pseudo_loglik": total[None],
        "pseudo_perplexity": (-total[None] / (len(ids) - 2)).exp(),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, expected[f"score.{name}"], rtol=0, atol=FLOAT64, msg=name)


def test_tokens(source: Path, case: Path) -> None:
    inputs = json.loads((case / "inputs.json").read_text())
    rows = [row[: sum(mask)] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    tokenizer = plm.load(source).tokenizer
    assert [tokenizer.encode(text) for text in inputs["sequences"]] == rows
    assert tokenizer.pack(inputs["sequences"]).tokens.tolist() == [*chain(*rows)]


def test_verbs_give_these_numbers(source: Path, case: Path, truth: Outputs) -> None:
    """``embed`` and ``contacts`` from text, in input order, residues alone: the path that users take."""
    model = plm.load(source, dtype="float64")
    texts = json.loads((case / "inputs.json").read_text())["sequences"]
    for layer in range(model.net.config.layers + 1):
        wanted = {"rows": [x[1:-1] for x in truth[f"hidden_states.{layer}"]]}
        assert largest(differences({"rows": plm.embed(model, texts, layer=layer)}, wanted)) < FLOAT64
    ours = {"contacts": plm.contacts(model, texts)}
    assert largest(differences(ours, {"contacts": truth["contacts"]})) < FLOAT64


def error_with(wrong: dict[str, Tensor], case: Path, folder: Path, batch: plm.Packed, truth: Outputs) -> float:
    """The largest error of a checkpoint whose tensors are ``wrong``, though it loads."""
    save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(case / "config.json", folder)
    return largest(differences(run_ours(plm.load(folder, dtype="float64").net, batch), truth))


def test_each_transposed_matrix_is_caught(case: Path, tmp_path: Path, batch: plm.Packed, truth: Outputs) -> None:
    """The comparison is sharp: it fails for each square matrix that lies the wrong way around, which no shape tells."""
    state = load_file(case / "model.safetensors")
    matrices = [name for name, x in state.items() if x.dim() == 2 and x.shape[0] == x.shape[1]]
    layers = json.loads((case / "config.json").read_text())["num_hidden_layers"]
    assert len(matrices) == 4 * layers + 1  # query, key, value and output of each layer; the head
    for name in matrices:
        wrong = {**state, name: state[name].T.contiguous()}
        assert error_with(wrong, case, tmp_path, batch, truth) > 1e-3, name


def test_each_swap_of_two_tensors_is_caught(case: Path, tmp_path: Path, batch: plm.Packed, truth: Outputs) -> None:
    """It fails too if two tensors of one shape change places: each with the next of that shape in the alphabet."""
    state = load_file(case / "model.safetensors")
    alike: dict[torch.Size, list[str]] = {}
    for name in sorted(state):
        if not name.endswith("inv_freq"):  # the same numbers in every layer
            alike.setdefault(state[name].shape, []).append(name)
    swaps = [pair for names in alike.values() for pair in pairwise(names)]
    assert len(swaps) > len(state) / 2
    for name, other in swaps:
        wrong = {**state, name: state[other], other: state[name]}
        assert error_with(wrong, case, tmp_path, batch, truth) > 1e-3, (name, other)
