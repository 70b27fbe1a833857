"""`verify` for T5 and BERT: the published values of every kind, and transformers on the files themselves."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle_bert
import oracle_t5
import pytest
import torch
from command_line import Plm
from safetensors.torch import load_file, save_file
from torch import Tensor

import plm
from plm import peers, verification
from plm.loading import open_checkpoint
from plm.verification import published_values, values
from plm_weights.checks import Check

GOLDEN = oracle_bert.GOLDEN.parent
BERTS, T5S = [f"bert/{name}" for name in oracle_bert.CASES], [f"t5/{name}" for name in oracle_t5.CASES]
T5_QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"
BERT_QUERY = "bert.encoder.layer.1.attention.self.query.weight"
# Two float64 programs that add in another order differ by 1e-14 here (measured). All but hidden states are given in
# float32, whose last place is 1e-6 of a logit of 20 and 6e-8 of a mean or a probability.
FLOAT64, FLOAT32 = 1e-9, 1e-5


@pytest.fixture(params=[*BERTS, *T5S])
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy with other tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(source / "config.json", folder / "config.json")
    return folder


def of(report: plm.Report) -> list[str]:
    return [finding.what for finding in report.findings]


def test_transformers_agrees(case: Path) -> None:
    """Without a model_type in its config.json (ProtBert) as well."""
    assert ("model_type" in (case / "config.json").read_text()) != (case.name == "protbert_tiny")
    report = plm.verify(case)
    assert report.passed, str(report)
    hidden = ["hidden states of 4 sequences"] if case.parent.name == "t5" else []
    assert of(report) == [*hidden, "logits of 4 sequences"]
    assert {finding.source for finding in report.findings} == {"transformers, float32 on this CPU"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(case: Path, dtype: str) -> None:
    """Half precision is allowed twice what transformers itself loses in it."""
    if dtype == "float16" and case.parent.name == "t5":
        with pytest.raises(ValueError, match="dtype float16 cannot be used"):
            plm.verify(case, dtype=dtype)
        return
    report = plm.verify(case, dtype=dtype)
    assert report.passed, str(report)
    assert all((f"torch.{dtype}" in finding.allowed) == (dtype != "float64") for finding in report.findings)


def swap(one: str, other: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda x: x.update({one: x[other], other: x[one]})


def nudge(name: str) -> Callable[[dict[str, Tensor]], object]:
    """One weight, by as much as the largest of its tensor; in the row of a token that occurs."""
    return lambda x: x[name].flatten()[-1:].add_(x[name].abs().max()) if x[name].dim() == 1 else x[name][4, 1:2].add_(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert/igbert_tiny", swap(BERT_QUERY, BERT_QUERY.replace("query", "key"))),
        ("t5/ankh3_tiny", swap(T5_QUERY, T5_QUERY.replace(".q.", ".k."))),
        ("t5/prott5_tiny", swap(T5_QUERY.replace("encoder", "decoder"), T5_QUERY)),
    ],
)
def test_a_swap_fails(
    name: str, change: Callable[[dict[str, Tensor]], object], dtype: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """transformers reads the good files, our network the spoiled ones."""
    asked = peers.theirs
    monkeypatch.setattr(peers, "theirs", lambda _, *rest: asked(open_checkpoint(GOLDEN / name), *rest))
    assert plm.verify(changed(GOLDEN / name, tmp_path / "same", lambda x: None), dtype=dtype).passed
    report = plm.verify(changed(GOLDEN / name, tmp_path / "other", change), dtype=dtype)
    assert not report.passed and "FAIL" in str(report)


def test_one_weight_fails(case: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Whichever tensor it is in: no part of a network is left out of the comparison, but BERT's pooler and what reads
    it, and token types other than 0. A bias of the keys adds the same to all scores of a query: it changes nothing."""
    opened = open_checkpoint(case)
    answer = peers.theirs(opened, peers.question_for(opened), torch.float32)
    monkeypatch.setattr(peers, "theirs", lambda *_: answer)
    aside = re.compile(r"bert\.pooler|cls\.seq_relationship|token_type|key\.bias|block\.[1-9]")  # and T5's later layers
    for name in load_file(case / "model.safetensors"):
        if not aside.search(name):
            report = plm.verify(changed(case, tmp_path, nudge(name)))
            assert not report.passed, name


FORMS: dict[str, dict[str, Any]] = {"bert": oracle_bert.FORMS, "t5": oracle_t5.FORMS}
UNKNOWN = ("parallel", "adapter")


@pytest.mark.parametrize(("family", "form"), [(family, form) for family, forms in FORMS.items() for form in forms])
def test_every_published_form(family: str, form: str, tmp_path: Path) -> None:
    """What transformers does not find behind a foreign prefix it makes up: such files are not compared."""
    if family == "bert":
        model = oracle_bert.hub_twin(oracle_bert.Twin(2, 32, 4, 48))
        FORMS[family][form](model, tmp_path)
        model.config.save_pretrained(tmp_path)
    else:
        twin = oracle_t5.Twin(2, 1, 24, 3, 8, 40, "gated-gelu", "false")
        oracle_t5.save(oracle_t5.hub_twin(twin), twin, tmp_path, form)
    report = plm.verify(tmp_path)
    foreign = any(word in form for word in UNKNOWN)
    assert report.passed != foreign and bool(report.findings) != foreign, str(report)
    assert ("nothing to compare with" in str(report)) == foreign


@pytest.mark.parametrize("name", T5S)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_encoder_of_a_t5(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In float16 as ProtT5's was published: both compute in float32 with its numbers."""

    def encoder(x: dict[str, Tensor]) -> None:
        kept = {k: tensor.to(dtype) for k, tensor in x.items() if k.startswith(("shared.", "encoder."))}
        x.clear()
        x.update(kept)

    report = plm.verify(changed(GOLDEN / name, tmp_path, encoder))
    assert report.passed and of(report) == ["hidden states of 4 sequences"], str(report)


def test_a_bert_without_heads(tmp_path: Path) -> None:
    def encoder(x: dict[str, Tensor]) -> None:
        for name in [name for name in x if name.startswith(("cls.", "bert.pooler."))]:
            del x[name]

    report = plm.verify(changed(GOLDEN / "bert" / "igbert_tiny", tmp_path, encoder))
    assert report.passed and of(report) == ["hidden states of 4 sequences"], str(report)


def test_the_file_that_was_given_is_the_one_compared(tmp_path: Path) -> None:
    """Of two in one folder, transformers is told which: here the other one holds another network."""
    source = changed(GOLDEN / "bert" / "igbert_tiny", tmp_path, swap(BERT_QUERY, BERT_QUERY.replace("query", "key")))
    torch.save(load_file(GOLDEN / "bert" / "igbert_tiny" / "model.safetensors"), source / "pytorch_model.bin")
    for file in ("pytorch_model.bin", "model.safetensors"):
        report = plm.verify(source / file)
        assert report.passed, str(report)


def stored(case: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and float64 truths of one of the stored cases."""
    inputs = json.loads((case / "inputs.json").read_text())
    return {k: torch.tensor(inputs[k]) for k in ("input_ids", "attention_mask")}, load_file(
        case / "expected.safetensors"
    )


def check(what: Any, ids: list[int] | None, expected: Tensor, **fields: Any) -> Check:
    """A published matrix, with all its rows and columns."""
    rows, columns = (tuple(range(size)) for size in expected.shape)
    listed = tuple(map(tuple, expected.tolist()))
    of = {"ids": tuple(ids)} if ids is not None else {}
    return Check(what, rows, columns, listed, "transformers", "MIT", FLOAT64, 0.0, "float64", **of, **fields)


@pytest.mark.parametrize("name", BERTS)
def test_values_of_a_bert(name: str) -> None:
    """Each kind of value is what transformers computes in float64, from ids as they are."""
    inputs, expected = stored(GOLDEN / name)
    model = plm.load(GOLDEN / name, dtype="float64")
    ids = inputs["input_ids"][2][inputs["attention_mask"][2].bool()].tolist()
    hidden, logits = expected["hidden_1"][2, : len(ids)], expected["logits"][2, : len(ids)]
    own = logits.log_softmax(-1)[range(len(ids)), ids]
    torch.testing.assert_close(values(model, check("hidden", ids, hidden, layer=1)), hidden, rtol=0, atol=FLOAT64)
    mean = values(model, check("mean", ids, hidden, layer=1)).double()
    torch.testing.assert_close(mean, hidden[1:-1].mean(0, keepdim=True), rtol=0, atol=FLOAT32)
    for what, wanted in {
        "logits": logits,
        "probabilities": logits.softmax(-1),
        "log_odds": logits.log_softmax(-1) - own[:, None],
        "nll": -own.mean().view(1, 1),
        "log_likelihood": own[1:-1].sum().view(1, 1),
    }.items():
        torch.testing.assert_close(values(model, check(what, ids, wanted)).double(), wanted, rtol=0, atol=FLOAT32)
    masked = values(model, check("masked_probabilities", ids, logits)).double()
    torch.testing.assert_close(masked, expected["pseudo_logp_row2"].exp(), rtol=0, atol=FLOAT32)


def test_values_of_a_pair() -> None:
    """The separator counts among the inner tokens, and is no residue."""
    model = plm.load(GOLDEN / "bert" / "igbert_tiny", dtype="float64")
    zero = torch.zeros(1, 1)
    pair, ids = "EVQLV|DIQ", model.tokenizer.encode("EVQLV|DIQ")
    for what, fields, rows in (
        ("hidden", {"layer": 2}, 11),
        ("mean", {"layer": 2}, 1),
        ("logits", {}, 11),
        ("log_likelihood", {}, 1),
        ("masked_probabilities", {}, 8),
    ):
        written = values(model, check(what, None, zero, sequence=pair, **fields))
        assert torch.equal(written, values(model, check(what, ids, zero, **fields))) and len(written) == rows, what
    hidden = values(model, check("hidden", ids, zero, layer=2))
    torch.testing.assert_close(values(model, check("mean", ids, zero, layer=2))[0], hidden[1:-1].float().mean(0))
    hidden_one = [*ids]
    hidden_one[7] = model.tokenizer.mask_id  # the first residue behind the separator
    probabilities = values(model, check("probabilities", hidden_one, zero))
    torch.testing.assert_close(values(model, check("masked_probabilities", ids, zero))[5], probabilities[7])


@pytest.mark.parametrize("name", T5S)
def test_values_of_a_t5(name: str) -> None:
    """They are the encoder's; nothing stands before a residue, ``</s>`` behind the last one."""
    inputs, expected = stored(GOLDEN / name)
    model = plm.load(GOLDEN / name, dtype="float64")
    for i, real in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][i][real].tolist()
        for layer in range(model.net.config.layers + 1):
            hidden = expected[f"encoder_hidden_{layer}"][i, : len(ids)]
            torch.testing.assert_close(
                values(model, check("hidden", ids, hidden, layer=layer)), hidden, rtol=0, atol=FLOAT64
            )
            mean = values(model, check("mean", ids, hidden, layer=layer)).double()
            torch.testing.assert_close(mean, hidden[:-1].mean(0, keepdim=True), rtol=0, atol=FLOAT32)


def test_the_token_of_a_task_is_no_inner_token(tmp_path: Path) -> None:
    twin = oracle_t5.Twin(2, 1, 24, 3, 8, 40, "relu", vocabulary=150)  # of ProstT5's size
    oracle_t5.save(oracle_t5.hub_twin(twin), twin, tmp_path)
    model, zero = plm.load(tmp_path), torch.zeros(1, 1)
    hidden = values(model, check("hidden", None, zero, sequence="MKTV", task="aa2fold", layer=2))
    ids = model.tokenizer.encode("MKTV", task="aa2fold")
    assert torch.equal(hidden, values(model, check("hidden", ids, zero, layer=2))) and len(hidden) == 6
    mean = values(model, check("mean", None, zero, sequence="MKTV", task="aa2fold", layer=2))
    torch.testing.assert_close(mean[0], hidden[1:-1].mean(0))
    assert "hidden of layer 2 for aa2fold, MKTV" in verification.describe(
        check("hidden", None, zero, sequence="MKTV", task="aa2fold", layer=2)
    )


def row(family: str, check: Check) -> Any:
    return SimpleNamespace(family=family, config=None, checks=(check,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_published_value_fails(case: Path, dtype: str, monkeypatch: Any) -> None:
    model = plm.load(case, dtype=dtype)
    family, ids = case.parent.name, model.tokenizer.encode("MKTV")
    right = values(plm.load(case), check("hidden", ids, torch.zeros(1, 1), layer=2))
    wrong = right.clone()
    wrong[2, 5] += right.abs().max() / 5
    for expected, passes in ((right, True), (wrong, False)):
        published = check("hidden", ids, expected, layer=2)
        object.__setattr__(published, "absolute", 1e-4)  # ten times the float32 error of two runs
        monkeypatch.setattr(verification, "find", lambda _, published=published: row(family, published))
        (finding,) = published_values(model)
        assert finding.passed == passes, finding
        assert ("bfloat16" in finding.allowed) == (dtype == "bfloat16")


def test_a_namesake_of_another_family_is_not_held_to_a_rows_numbers(case: Path, tmp_path: Path) -> None:
    """plm-mini's row leaves its sizes to its own folder."""
    shutil.copytree(case, tmp_path / "plm-mini")
    assert list(published_values(plm.load(tmp_path / "plm-mini"))) == []


def test_on_the_command_line(case: Path, run: Plm) -> None:
    code, out, _ = run("verify", str(case))
    assert code == 0 and "comparisons passed" in out
