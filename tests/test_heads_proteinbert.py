"""Fine-tuning heads of ProteinBERT against stored truths: predictions, targets and losses of the original's classes.

``finetune_heads`` has seven tasks on one network: binary, categorical and numeric, per protein and per residue, on the
concatenated representations and (``.plain``) on the probabilities of pre-training. Gradients are compared with those of
the plain formulas in oracle_proteinbert.py.

There are two losses of each. "loss_float32" is what Keras' ``evaluate`` gives, which trains from logits; it was stored
of a float64 network all the same. "loss" was made of probabilities, to which Keras adds 1e-7 in a binary cross-entropy.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_proteinbert import head_loss, run
from safetensors.torch import load_file
from stored_proteinbert import GOLDEN, TUNED, keras_list, load
from torch import Tensor

from plm.models.proteinbert import Config, ProteinBERT
from plm.models.proteinbert_heads import FineTuned, Head, Kind, Targets, Task, head_inputs, initialise
from plm_weights.proteinbert import weights

# Two float64 programs that add in another order differ by 3e-15 here (measured).
FLOAT64 = 1e-12
TOLD: dict[str, Any] = json.loads((TUNED / "inputs.json").read_text())
EXPECTED, INPUTS, HEADS = (load_file(TUNED / f"{name}.safetensors") for name in ("expected", "inputs", "heads"))
LENGTHS = [len(sequence) + 2 for sequence in TOLD["sequences"]]
WIDTH = TOLD["seq_len"]
TASKS = sorted(TOLD["tasks"])
each_task = pytest.mark.parametrize("name", TASKS)
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])


def task_of(name: str) -> Task:
    told = TOLD["tasks"][name]
    return Task(told["type"], told["is_seq"], told["unique_labels"] or ())


def targets_of(name: str) -> Targets:
    return task_of(name).targets(TOLD["tasks"][name]["raw_labels"], LENGTHS, WIDTH)


def tuned(name: str, dtype: torch.dtype = torch.float64) -> FineTuned:
    """The stored network with the stored head."""
    reads = "representations" if TOLD["tasks"][name]["uses_concatenated_hidden_layers"] else "probabilities"
    model = FineTuned(load(TUNED, dtype), task_of(name), reads=reads)  # type: ignore[arg-type]
    dense = {"weight": HEADS[f"{name}.kernel"].T, "bias": HEADS[f"{name}.bias"]}
    model.head.dense.load_state_dict(dense)
    return model.eval()


def predict(model: FineTuned) -> Any:
    return model(INPUTS["token_ids"], INPUTS["annotations"])


def loss_of(model: FineTuned, name: str) -> Tensor:
    return model.task.loss(predict(model).logits, targets_of(name))


@each_task
@torch.no_grad()
def test_predictions_and_losses_in_float64(name: str) -> None:
    model, targets = tuned(name), targets_of(name)
    found, wanted = predict(model), EXPECTED[f"{name}.prediction"]
    if model.task.kind != "categorical":
        wanted = wanted[..., 0]
    values = found.logits if model.task.kind == "numeric" else found.probabilities
    torch.testing.assert_close(values, wanted, rtol=0, atol=FLOAT64)
    loss = loss_of(model, name)
    torch.testing.assert_close(loss, EXPECTED[f"{name}.loss_float32"], rtol=0, atol=FLOAT64)
    if model.task.kind == "binary":
        yes, no = (values + 1e-7).log(), (1 - values + 1e-7).log()
        loss = -((targets.values * yes + (1 - targets.values) * no) * targets.weights).mean()
    torch.testing.assert_close(loss, EXPECTED[f"{name}.loss"], rtol=0, atol=FLOAT64)


@each_task
def test_targets(name: str) -> None:
    """The original's, number by number: what does not count is 0 and has the weight 0."""
    found = targets_of(name)
    values, counted = INPUTS[f"{name}.Y"], INPUTS[f"{name}.sample_weights"]
    assert found.values.dtype == (torch.int64 if task_of(name).kind == "categorical" else torch.float64)
    assert torch.equal(found.values, values.view_as(found.values).to(found.values.dtype))
    assert torch.equal(found.weights, counted.view_as(found.weights).float())


def test_forms_of_labels() -> None:
    """Numbers, truth values, tensors and texts; classes by any name."""
    for labels in ([1, 0, 1], [True, False, True], [1.0, 0.0, 1.0], ["1", "0", "1"], torch.tensor([1, 0, 1])):
        assert Task("binary").targets(labels, [5, 4, 9]).values.tolist() == [1, 0, 1]  # type: ignore[arg-type]
    for rows in (["101", "01"], [[1, 0, 1], [0, 1]], [torch.tensor([1, 0, 1]), torch.tensor([0, 1])]):
        found = Task("binary", per_residue=True).targets(rows, [5, 4], width=6)
        assert found.values.tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
        assert found.weights.tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    folds = Task("categorical", labels=range(1195))
    assert folds.outputs == 1195 and folds.targets([7, "1194"], [5, 4]).values.tolist() == [7, 1194]


@torch.no_grad()
def test_predictions_in_float32() -> None:
    """At most twice the root mean square error of the original, over all seven tasks."""
    floors = json.loads((GOLDEN / "float32_errors.json").read_text())["finetune_heads"]
    ours, theirs = [], []
    for name in TASKS:
        found, wanted = predict(tuned(name, torch.float32)), EXPECTED[f"{name}.prediction"]
        values = found.logits if found.task.kind == "numeric" else found.probabilities
        ours.append((values.view_as(wanted) - wanted).norm().item())
        theirs.append(floors[f"{name}.prediction"]["rms"] * math.sqrt(wanted.numel()))
    # The noise floor is the original's own error in float32.
    assert math.hypot(*ours) <= 2 * math.hypot(*theirs)


def test_nothing_stored_is_left_out() -> None:
    """The tests of this file name every stored tensor."""
    assert len(TASKS) == 7
    assert EXPECTED.keys() == {f"{name}.{kind}" for name in TASKS for kind in ("prediction", "loss", "loss_float32")}
    assert HEADS.keys() == {f"{name}.{kind}" for name in TASKS for kind in ("kernel", "bias")}
    given = {f"{name}.{kind}" for name in TASKS for kind in ("Y", "sample_weights") if f"{name}.{kind}" in INPUTS}
    assert INPUTS.keys() == given | {"token_ids", "annotations"} and len(given) == 14


# Gradients


def oracle_loss(name: str, kind: Kind, targets: Targets) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """By the plain formulas, and what it depends on: the network's weights in Keras' layout, and the head's."""
    told = TOLD["tasks"][name]
    state = [x.double().requires_grad_() for x in keras_list(TUNED).values()]
    kernel, bias = (HEADS[f"{name}.{kind}"].double().requires_grad_() for kind in ("kernel", "bias"))
    found = run(state, INPUTS["token_ids"], INPUTS["annotations"].double(), dilation=5)
    track, plain = ("local", "seq_probs") if told["is_seq"] else ("global", "annotation_probs")
    x = found[f"{track}_representations" if told["uses_concatenated_hidden_layers"] else plain]
    return head_loss(x, kernel, bias, kind, *targets), state, [kernel, bias]


def assert_gradients(model: FineTuned, name: str, targets: Targets) -> None:
    loss, state, head = oracle_loss(name, model.task.kind, targets)
    loss.backward()
    found = model.task.loss(predict(model).logits, targets)
    found.backward()
    torch.testing.assert_close(found.detach(), loss.detach(), rtol=0, atol=FLOAT64)
    parameters = dict(model.net.named_parameters())
    for weight in weights(model.net.config.layers):
        ours, theirs = parameters[weight.target].grad, state[weight.place].grad
        assert (ours is None) == (theirs is None), weight.target
        if theirs is not None:
            turned = turn(theirs, weight.view).view_as(ours)
            torch.testing.assert_close(ours, turned, rtol=0, atol=FLOAT64, msg=weight.target)
    for parameter, theirs in zip(model.head.dense.parameters(), head, strict=True):
        assert theirs.grad.abs().max() > 1e-4  # there is something to compare
        torch.testing.assert_close(parameter.grad, theirs.grad.t(), rtol=0, atol=FLOAT64)


def turn(x: Tensor, view: str) -> Tensor:
    """From Keras' layout to ours."""
    turns: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x,
        "i o -> o i": lambda x: x.T,
        "k i o -> o i k": lambda x: x.permute(2, 1, 0),
        "h i d -> (h d) i": lambda x: x.permute(0, 2, 1).flatten(0, 1),
    }
    return turns[view](x)


@each_task
def test_every_gradient(name: str) -> None:
    """By every weight of the network and the head; and none by a weight that the task does not depend on."""
    assert_gradients(tuned(name), name, targets_of(name))


def test_numbers_per_residue() -> None:
    """The original accepts such a task and fails later; here it has the loss that its others have."""
    name = "seq_binary"
    model = tuned(name)
    model.task = model.head.task = Task("numeric", per_residue=True)
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randn(length - 2, generator=generator).tolist() for length in LENGTHS]
    targets = model.task.targets(labels, LENGTHS, WIDTH)
    assert targets.values[1, 1:4].tolist() == labels[1][:3] and targets.weights.sum() == sum(map(len, labels))
    assert torch.equal(targets.weights, INPUTS[f"{name}.sample_weights"][..., 0].float())
    assert_gradients(model, name, targets)


@each_task
def test_only_what_a_task_depends_on_learns(name: str) -> None:
    """The same weights as in the original's fine-tuned network, which holds no others."""
    model = tuned(name)
    loss_of(model, name).backward()
    keras = {told["index"]: told["keras_name"] for told in json.loads((TUNED / "names.json").read_text())}
    parameters = dict(model.net.named_parameters())
    learn = [keras[w.pickled] for w in weights(model.net.config.layers) if parameters[w.target].grad is not None]
    assert [*learn, "dense/kernel", "dense/bias"] == TOLD["tasks"][name]["order_of_all_weights_of_the_finetuned_model"]


# Training


@each_task
@frozen_or_not
def test_thirty_steps_lower_the_loss(name: str, frozen: bool) -> None:
    """Of Adam, with dropout at work. A frozen network keeps every bit."""
    model = tuned(name, torch.float32)
    before = loss_of(model, name).item()
    kept = {key: x.clone() for key, x in model.state_dict().items()}
    model.freeze(frozen)
    optimizer = torch.optim.Adam((x for x in model.parameters() if x.requires_grad), lr=1e-2)
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model, name).backward()
        optimizer.step()
    model.eval()
    # 0.2 to 66 % of it are left if all learns; under a frozen network, of which a head reads too little to fit four
    # proteins, 8 to 96 %.
    assert loss_of(model, name).item() < before
    changed = {key for key, x in model.state_dict().items() if not torch.equal(x, kept[key])}
    assert {"head.dense.weight", "head.dense.bias"} <= changed
    assert any(key.startswith("net.") for key in changed) != frozen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_freezing_changes_no_prediction(dtype: torch.dtype) -> None:
    model = tuned("seq_categorical", dtype)
    free = predict(model).logits
    with torch.enable_grad():
        model.freeze()
        frozen = predict(model).logits
        assert frozen.requires_grad and not model.net.embed.weight.requires_grad
        assert frozen.dtype == model.head.dense.weight.dtype == dtype
    assert torch.equal(frozen, free)
    model.freeze(False)
    assert all(x.requires_grad for x in model.parameters())


def test_dropout_is_the_heads_alone() -> None:
    """Half of what the head reads, and twice the rest, in training only."""
    model = tuned("global_binary")
    assert model.head.dropout.p == 0.5
    seen: list[Tensor] = []
    model.head.dense.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    predict(model)
    model.train()
    predict(model)
    predict(model)
    whole, *parts = seen
    assert not torch.equal(*parts)
    for part in parts:
        assert 0.3 < (part == 0).double().mean() < 0.7
        torch.testing.assert_close(part[part != 0], 2 * whole[part != 0])


def test_each_protein_as_if_alone() -> None:
    """With ``lengths`` pads do not exist, for heads as for the network."""
    for name in ("seq_categorical", "global_categorical"):
        model = tuned(name)
        with torch.no_grad():
            whole = model(INPUTS["token_ids"], lengths=torch.tensor(LENGTHS)).logits
            for i, length in enumerate(LENGTHS):
                alone = model(INPUTS["token_ids"][i : i + 1, :length]).logits[0]
                found = whole[i, :length] if model.task.per_residue else whole[i]
                torch.testing.assert_close(found, alone, rtol=0, atol=FLOAT64)


# What is refused


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "ordinal"}, "kind must be 'binary', 'categorical' or 'numeric'; got 'ordinal'"),
        ({"kind": "binary", "labels": "ab"}, r"labels 0 and 1; got \['a', 'b'\]: make it categorical"),
        ({"kind": "numeric", "labels": (1, 2)}, r"no labels; got \['1', '2'\]"),
        ({"kind": "categorical"}, r"two different labels or more; got \[\]"),
        ({"kind": "categorical", "labels": "HEH"}, r"two different labels or more; got \['H', 'E', 'H'\]"),
        ({"kind": "categorical", "labels": ("H", "10"), "per_residue": True}, r"one letter each.*got \['10'\]"),
    ],
)
def test_tasks_that_do_not_make_sense(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**task)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (Task("binary"), [1, 2], "protein 1 has the label '2', which is none of"),
        (Task("binary"), [1], "1 labels for 2 proteins"),
        (Task("categorical", labels="HE"), ["H", "C"], "protein 1 has the label 'C'"),
        (Task("numeric"), [0.5, "x"], "protein 1 has the label 'x'; a numeric task needs finite numbers"),
        (Task("numeric"), [0.5, math.nan], "protein 1 has the label nan"),
        (Task("binary", True), ["010", "0"], "protein 1 has 2 residues, but 1 labels"),
        (Task("binary", True), ["010", "012"], "protein 1 has 2 residues, but 3 labels"),
        (Task("binary", True), ["010", 0], "protein 1 has 2 residues, but the label 0"),
        (Task("categorical", True, "HE"), ["HEH", "HC"], "residue 2 of protein 1 has the label 'C'"),
        (Task("numeric", True), [[1, 2, 3], [1, None]], "residue 2 of protein 1 has the label None"),
    ],
)
def test_labels_that_do_not_fit(task: Task, labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.targets(labels, [5, 4])


def test_sizes_that_do_not_fit() -> None:
    task = Task("binary", per_residue=True)
    with pytest.raises(ValueError, match="a protein has 5 tokens, more than width=4; pad to more"):
        task.targets(["010"], [5], width=4)
    with pytest.raises(ValueError, match=r"shape \[1, 6\].*got values \[1, 5\]"):
        task.loss(torch.zeros(1, 6), task.targets(["010"], [5]))
    with pytest.raises(ValueError, match=r"reads 58 numbers per residue or protein; got shape \[4, 20, 26\]"):
        Head(task, 58)(torch.zeros(4, 20, 26))
    with pytest.raises(ValueError, match="got 'logits'"):
        FineTuned(load(TUNED, torch.float32), task, reads="logits")  # type: ignore[arg-type]
    model = tuned("global_numeric")
    with pytest.raises(ValueError, match="a numeric task predicts values"):
        predict(model).probabilities  # noqa: B018
    with pytest.raises(ValueError, match=r"annotations must have shape \[4, 9\]"):
        model(INPUTS["token_ids"], torch.zeros(4, 8))


def test_widths_of_the_published_network() -> None:
    config = Config(26, 8943, 6, 128, 512, 4, 64)
    residues, proteins = Task("numeric", per_residue=True), Task("numeric")
    assert head_inputs(config, residues, "representations") == 1562
    assert head_inputs(config, proteins, "representations") == 15599
    assert head_inputs(config, residues, "probabilities") == 26
    assert head_inputs(config, proteins, "probabilities") == 8943


# How weights begin


def test_weights_begin_as_keras_makes_them() -> None:
    """Every matrix reaches its limit (nearly) and not beyond, on both sides; biases are zero and norms one."""
    net = ProteinBERT(Config(26, 60, 1, 24, 48, 4, 10, kernel=5))
    initialise(net, torch.Generator().manual_seed(1))
    limits = {
        "annotations_in": 6 / (60 + 48),
        "embed": 0.05**2,
        "blocks.0.to_local": 6 / (48 + 24),
        "blocks.0.narrow": 6 / (5 * 24 + 5 * 24),
        "blocks.0.wide": 6 / (5 * 24 + 5 * 24),
        "blocks.0.local_dense": 6 / (24 + 24),
        "blocks.0.global_dense1": 6 / (48 + 48),
        "blocks.0.attention.query": 6 / (48 * 4 + 10 * 4),  # Keras takes the heads for taps
        "blocks.0.attention.key": 6 / (24 * 4 + 10 * 4),
        "blocks.0.attention.value": 6 / (24 * 4 + 12 * 4),
        "blocks.0.global_dense2": 6 / (48 + 48),
        "lm_head": 6 / (24 + 26),
        "annotation_head": 6 / (48 + 60),
    }
    matrices = {name: x for name, x in net.named_parameters() if x.dim() > 1}
    assert {name.removesuffix(".weight") for name in matrices} == limits.keys()
    for name, x in matrices.items():
        limit = math.sqrt(limits[name.removesuffix(".weight")])
        # That none of 576 numbers or more is in the last hundredth of them has a chance of 0.3 %; the seed is fixed.
        assert 0.98 * limit < x.max() <= limit and -limit <= x.min() < -0.98 * limit, name
    for name, x in net.named_parameters():
        if x.dim() == 1:
            assert (x == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
    again = ProteinBERT(net.config)
    initialise(again, torch.Generator().manual_seed(1))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in net.state_dict().items())


def test_a_head_begins_the_same_way() -> None:
    head = Head(Task("categorical", labels="HEC"), 1562)
    limit = math.sqrt(6 / (1562 + 3))
    assert 0.98 * limit < head.dense.weight.abs().max() <= limit
    assert torch.count_nonzero(head.dense.bias) == 0


def test_networks_that_cannot_be_trained() -> None:
    net = ProteinBERT(Config(26, 9, layers=1, channels=8, global_channels=16, heads=2, key_size=4))
    with pytest.raises(ValueError, match="these heads read a ProteinBERT; got a Linear"):
        FineTuned(torch.nn.Linear(2, 2), Task("binary"))  # type: ignore[arg-type]
    net.lm_head.keep_8_bits()
    with pytest.raises(ValueError, match="8 bits cannot be trained"):
        FineTuned(net, Task("binary"))
