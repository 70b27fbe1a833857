"""ESM against the originals themselves: transformers and fair-esm as tiny random twins, loaded from what they save.

Then the way back: what ``plm.convert`` writes is read by the originals and gives the same numbers there.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle_esm as oracle
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_esm import ALPHABET, CleanFloat64, Twin, fair_twin, hub_twin, in_float64, run_fair, run_hub
from parity import Outputs, differences, largest, rms, run_ours

import plm
import plm_kernels
from plm.models import esm
from plm.vocabularies import esm_tokenizer
from plm_weights import import_weights
from plm_weights.esm import hub_rows

# Two float64 programs that add in another order differ by 3e-14 here (measured); a float32 step left in either by 5e-6.
FLOAT64 = 1e-9
TOKENIZER = esm_tokenizer()
LETTERS = "LAGVSERTIDPKQNFYMHWC"
ROWS = [
    *map(
        TOKENIZER.encode,
        (
            "MKTVRQERLKSIVRILERSKEPVSG",
            "KALTARQQEVF<mask>LIRD<mask>ISQTGMP",
            "K",
            "MXBUZO.-<null_1>ACDWY",
            (LETTERS * 6)[7:116],  # 111 tokens with start and end
        ),
    ),
    [0],  # one token
    TOKENIZER.encode((LETTERS[::-1] * 4)[:61]),  # 63
]
TWINS = [
    Twin("esm2", layers=1, channels=16, heads=2, feed_forward=64, seed=1),
    Twin("esm2", layers=3, channels=48, heads=3, feed_forward=192, seed=2),
    Twin("esm2", layers=2, channels=48, heads=2, feed_forward=192, token_dropout=False, seed=3),
    Twin("esm1b", layers=2, channels=24, heads=3, feed_forward=52, seed=4),
    Twin("esm1b", layers=1, channels=32, heads=2, feed_forward=40, token_dropout=False, seed=5),
    Twin("esm1v", layers=3, channels=48, heads=2, feed_forward=70, seed=6),
]
HEADS = [transformers.EsmModel, transformers.EsmForSequenceClassification, transformers.EsmForTokenClassification]
ODD = Twin("esm2", layers=2, channels=24, heads=3, feed_forward=50, seed=7)  # a feed-forward that fair-esm cannot have
every_twin = pytest.mark.parametrize("twin", TWINS, ids=str)
one_of_each = pytest.mark.parametrize("twin", [TWINS[1], TWINS[3], TWINS[5]], ids=str)


def assert_parity(source: Path, run: Callable[[Any], Outputs], theirs: Any, batch: plm.Packed) -> None:
    """All outputs of ours from ``source`` and of ``theirs`` agree in float64, and ours are as precise in float32."""
    with CleanFloat64():
        truth = run(in_float64(theirs))
    net = plm.load(source, dtype="float64").net
    if not net.config.contact_head:
        truth.pop("contacts", None)
    ours = run_ours(net, batch)
    assert truth.keys() <= ours.keys()
    assert largest(differences(ours, truth)) < FLOAT64

    floor = rms(differences(run(theirs), truth))
    found = rms(differences(run_ours(plm.load(source, dtype="float32").net, batch), truth))
    for name in truth:
        # The noise floor is the original's own error in float32, measured here on the same inputs.
        assert found[name] <= 2 * floor[name], f"{name}: {found[name]:.1e}, theirs {floor[name]:.1e}"


@pytest.mark.parametrize("twin", [*TWINS, ODD], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers(twin: Twin, side: Any, tmp_path: Path) -> None:
    """``EsmForMaskedLM``: logits, hidden states, attention maps and contacts, whichever side its padding is on."""
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    ids, mask = oracle.pad(ROWS, side)

    def run(model: Any) -> Outputs:
        found = run_hub(model, ids, mask)
        if side == "left":
            found.pop("contacts")  # transformers cuts them out for padding on the right alone
        return found

    assert_parity(tmp_path, run, theirs, plm.Packed.from_padded(ids, mask))


@every_twin
def test_fair_esm(twin: Twin, tmp_path: Path) -> None:
    """``ESM2`` and ``ProteinBertModel``, which zeroes the ``<mask>`` row that the file of an ESM-1 holds."""
    twin = replace(twin, seed=twin.seed + 100)
    path = oracle.save_fair(fair_twin(twin), twin, tmp_path)
    ids, mask = oracle.pad(ROWS)
    assert_parity(path, lambda model: run_fair(model, ids), oracle.load_fair(path), plm.Packed.from_padded(ids, mask))


@pytest.mark.parametrize("name", ["esm1b_tiny", "esm2_tiny"])
def test_stored_checkpoints(name: str, golden: Path) -> None:
    """The checkpoints of test_parity_esm.py, for the precision of every output in float32, all numbers together."""
    path = golden / "esm" / name / f"{name}.pt"
    inputs = json.loads(path.with_name("inputs.json").read_text())
    ids, mask = torch.tensor(inputs["input_ids"]), torch.tensor(inputs["attention_mask"])
    assert_parity(path, lambda model: run_fair(model, ids), oracle.load_fair(path), plm.Packed.from_padded(ids, mask))


@one_of_each
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_heads_of_transformers(twin: Twin, kind: type[Any], tmp_path: Path) -> None:
    """Pooler, sequence classifier and token classifier, on an encoder without the masked-language-model head."""
    theirs = hub_twin(twin, kind, num_labels=3)
    theirs.save_pretrained(tmp_path)
    ids, mask = oracle.pad(ROWS)
    assert_parity(tmp_path, lambda model: run_hub(model, ids, mask), theirs, plm.Packed.from_padded(ids, mask))


def test_pads_that_are_attended_to(tmp_path: Path) -> None:
    """A mask of ones makes even ``<pad>`` a token, to transformers as to ``Packed``.

    The published check values of ESM-2 8M are of such an input: 0 1 2 3 4 5.
    """
    theirs = hub_twin(TWINS[1])
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 20, 1, 32, 2, 1]])
    mask = torch.ones_like(ids)

    def run(model: Any) -> Outputs:
        found = run_hub(model, ids, mask)
        found.pop("contacts")  # transformers takes out every <eos>, ours the last token
        return found

    assert_parity(tmp_path, run, theirs, plm.Packed.from_padded(ids, mask))


@pytest.mark.parametrize("twin", [TWINS[3], TWINS[5]], ids=str)
def test_longest_sequence_of_learned_positions(twin: Twin, tmp_path: Path) -> None:
    """1024 tokens reach the last row of the position table; one more is refused before anything is computed."""
    twin = replace(twin, layers=1)
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(4, 24, (1, 1024))
    assert_parity(
        tmp_path,
        lambda model: {"logits": [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].detach()]},
        theirs,
        plm.Packed.from_ids([ids[0]]),
    )
    with pytest.raises(ValueError, match="1025 tokens; this checkpoint's position table ends at 1024"):
        plm.load(tmp_path).net(plm.Packed.from_ids([[4] * 1025]))


def save_state_dict(model: Any, folder: Path) -> None:
    """``pytorch_model.bin`` with the names that tensors have in memory."""
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_bin_shards(model: Any, folder: Path) -> None:
    """``.bin`` shards and their index, as the hub keeps ESM-2 3B and 15B."""
    state = model.state_dict()
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
        shard = f"pytorch_model-{number:05}-of-00003.bin"
        torch.save({name: state[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    total = sum(x.numel() * x.element_size() for x in state.values())
    told = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(told)


def save_as_reloaded(model: Any, folder: Path) -> None:
    """Loaded from a file of transformers 4 (one set of frequencies per layer) and saved by the installed version."""
    state = dict(model.state_dict())
    frequencies = state.pop("esm.rotary_embeddings.inv_freq", None)
    if frequencies is not None:
        for layer in range(model.config.num_hidden_layers):
            state[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies
    old = folder / "old"
    model.config.save_pretrained(old)
    torch.save(state, old / "pytorch_model.bin")
    transformers.EsmForMaskedLM.from_pretrained(old).save_pretrained(folder)


FORMS: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "safetensors shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "reloaded": save_as_reloaded,
    "bin": save_state_dict,
    "bin shards": save_bin_shards,
}


@one_of_each
@pytest.mark.parametrize("form", FORMS)
def test_every_file_form_holds_the_same_tensors(twin: Twin, form: str, tmp_path: Path) -> None:
    """Loading gives the very numbers that were in the original's memory, whatever form and names it saved them in."""
    theirs = hub_twin(twin)
    theirs.config.save_pretrained(tmp_path)
    FORMS[form](theirs, tmp_path)
    assert ("shards" in form) == any(tmp_path.glob("*.index.json"))
    ours = plm.load(tmp_path).net.state_dict()
    rotary = twin.family == "esm2"
    wanted = import_weights(hub_rows(rotary=rotary, contact_head=twin.family != "esm1v"), theirs.state_dict(), ours)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


def make(made_by: str, twin: Twin, folder: Path) -> tuple[Path, Any]:
    """A checkpoint as ``made_by`` saves it, and its model. The ``<mask>`` row of an ESM-1 is zero, as on the hub."""
    theirs = hub_twin(twin) if made_by == "transformers" else fair_twin(twin)
    words = theirs.esm.embeddings.word_embeddings if made_by == "transformers" else theirs.embed_tokens
    if twin.family != "esm2":
        words.weight.data[esm.MASK] = 0
    if made_by == "fair-esm":
        return oracle.save_fair(theirs, twin, folder), theirs
    theirs.save_pretrained(folder / "made")
    return folder / "made", theirs


def run_any(model: Any) -> Outputs:
    ids, mask = oracle.pad(ROWS)
    with CleanFloat64():
        wide = in_float64(model)
        return run_hub(wide, ids, mask) if isinstance(model, transformers.PreTrainedModel) else run_fair(wide, ids)


def assert_same_model(found: Any, theirs: Any, without: set[str]) -> None:
    """The same outputs, and from the same library the same tensors, bit for bit."""
    truth = run_any(theirs)
    if without:
        truth.pop("contacts", None)
    assert largest(differences(run_any(found), truth)) < FLOAT64
    if type(found) is type(theirs):
        state = found.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            assert name in without or torch.equal(state[name], tensor), name


def load_hub(kind: type[Any], folder: Path, missing: set[str]) -> Any:
    """What transformers makes of a folder, from which nothing but ``missing`` may be missing."""
    model, report = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@one_of_each
@pytest.mark.parametrize("made_by", ["transformers", "fair-esm"])
def test_back_to_transformers(twin: Twin, made_by: str, tmp_path: Path) -> None:
    source, theirs = make(made_by, twin, tmp_path)
    plm.convert(source, tmp_path / "back", to="transformers")
    # ESM-1v was published without a contact head; what the hub's files carry in its place is random.
    untrained = {"esm.contact_head.regression.weight", "esm.contact_head.regression.bias"}
    missing = untrained if twin.family == "esm1v" else set()
    assert_same_model(load_hub(transformers.EsmForMaskedLM, tmp_path / "back", missing), theirs, missing)


@one_of_each
@pytest.mark.parametrize("made_by", ["transformers", "fair-esm"])
def test_back_to_fair_esm(twin: Twin, made_by: str, tmp_path: Path) -> None:
    source, theirs = make(made_by, twin, tmp_path)
    target = tmp_path / f"{twin.family}_back.pt"
    plm.convert(source, target, to="original")
    untrained = {"contact_head.regression.weight", "contact_head.regression.bias"}
    assert_same_model(oracle.load_fair(target), theirs, untrained if twin.family == "esm1v" else set())


@one_of_each
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_heads_back_to_transformers(twin: Twin, kind: type[Any], tmp_path: Path) -> None:
    theirs = hub_twin(twin, kind, num_labels=3)
    theirs.save_pretrained(tmp_path / "made")
    plm.convert(tmp_path / "made", tmp_path / "back", to="transformers")
    untrained = {name for name in theirs.state_dict() if "contact_head" in name}
    missing = untrained if twin.family == "esm1v" else set()
    assert_same_model(load_hub(kind, tmp_path / "back", missing), theirs, missing)


@one_of_each
@pytest.mark.parametrize("backend", ["segments", "dense", "reference"])
def test_gradients(twin: Twin, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the masked-language-model loss by every parameter, through every attention backend of a CPU."""
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    ids, mask = oracle.pad(ROWS)
    labels = torch.where(torch.rand(ids.shape) < 0.3, torch.randint(4, 24, ids.shape), -100)
    labels[mask == 0] = -100
    with CleanFloat64():
        wide = in_float64(theirs)
        loss = wide(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()

    monkeypatch.setattr(esm, "attention", partial(plm_kernels.attention, backend=backend))
    net = plm.load(tmp_path, dtype="float64").net
    batch = plm.Packed.from_padded(ids, mask)
    ours = esm.masked_lm_loss(net(batch).logits, labels[mask.bool()])
    ours.backward()
    assert abs(ours.item() - loss.item()) < FLOAT64

    found = {name: x.grad for name, x in net.named_parameters() if x.grad is not None}
    assert net.state_dict().keys() - found.keys() <= {"frequencies", "contact_head.weight", "contact_head.bias"}
    named = {name: x.grad for name, x in wide.named_parameters() if x.grad is not None}
    rows = hub_rows(rotary=twin.family == "esm2", contact_head=False)
    for name, wanted in import_weights(rows, named, found).items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=FLOAT64, msg=name)


@pytest.mark.parametrize("named", [True, False], ids=["named", "chosen"])
@pytest.mark.parametrize(
    ("problem", "labels", "targets"),
    [
        ("regression", 1, [0.1, -2.0, 3.0, 0.0, 1.0, 0.5, 0.25]),
        ("single_label_classification", 4, [0, 3, 1, 2, 2, 0, 1]),
        ("multi_label_classification", 2, [[0.0, 1.0]] * 5 + [[1.0, 1.0], [0.0, 0.0]]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_classification_losses(problem: str, labels: int, targets: list[Any], named: bool) -> None:
    """The three losses of ``EsmForSequenceClassification``, and which of them is taken if none is named."""
    kind = transformers.EsmForSequenceClassification
    theirs = hub_twin(TWINS[0], kind, num_labels=labels, problem_type=problem if named else None)
    ids, mask = oracle.pad(ROWS)
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=mask, labels=torch.tensor(targets))
    # The same formula on the same float32 logits.
    ours = esm.classification_loss(out.logits, torch.tensor(targets), problem if named else None)
    assert torch.equal(ours, out.loss)


FACTS = [
    "K A <mask> I S Q",
    "MX BUZO.-",
    "A<null_1>C",
    "A<eos>C<pad>D",
    "M\nK\tT",
    "<mask><mask>",
    "MKTVRQG",
    "KALTA<mask>ISQP",
    "LAGVS",
    "WCB",
    "A<cls>C",
]
UNKNOWN = ["mktv", "AJ*A", "AAJJAA", "MKtV", "", "A1 2C", "A<masc>C", "<", "A<mask", "ⅷA", "MΩΩK"]
VOCABULARY_FILE = Path(__file__).parent / "golden" / "esm" / "esm2_tiny" / "vocab.txt"
HUB_TOKENIZER = transformers.EsmTokenizer(str(VOCABULARY_FILE))
steady = settings(deadline=None, derandomize=True)  # the same verdict in every run, on a busy machine as well
tokens = st.sampled_from([*TOKENIZER.vocabulary, " ", "\n", "  "])


@pytest.mark.parametrize("text", FACTS)
def test_tokens_of_both_originals(text: str) -> None:
    wanted = HUB_TOKENIZER(text)["input_ids"]
    assert wanted[1:-1] == ALPHABET.encode(text)
    assert TOKENIZER.encode(text) == wanted


@pytest.mark.parametrize("text", [*FACTS, *UNKNOWN])
def test_unknown_runs_as_transformers(text: str) -> None:
    assert TOKENIZER.encode(text, unknown="run") == HUB_TOKENIZER(text)["input_ids"]


@steady
@given(st.lists(tokens).map("".join))
def test_random_known_text(text: str) -> None:
    assert list(TOKENIZER.residues(text)) == ALPHABET.encode(text)


@steady
@given(st.lists(tokens | st.text(max_size=3)).map("".join))
def test_random_unknown_text(text: str) -> None:
    assert TOKENIZER.encode(text, unknown="run") == HUB_TOKENIZER(text)["input_ids"]
