"""BERT against transformers itself: tiny random twins, loaded from what it saves in every published form.

Then the way back: what our key map exports is read by transformers and gives the same numbers there.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle_bert import CASES, FORMS, GOLDEN, Twin, hub_twin, load_bert, pad, run_hub, run_ours
from parity import differences, largest, rms
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForMaskedLM, BertForPreTraining, BertModel

from plm.packing import Packed
from plm_weights import export_weights, import_weights, write_safetensors
from plm_weights.bert import hub_files, hub_rows, key_map

# Two float64 programs that add in another order differ by 2e-14 here (measured); one norm in float32 by 6e-7.
FLOAT64 = 1e-9
# One token; the whole position table; equal lengths apart from each other; enough for an average over sequences.
LENGTHS = (9, 63, 1, 111, 63, 2, *range(3, 33))
TWINS = [
    Twin(layers=1, channels=16, heads=2, feed_forward=64, seed=1),
    Twin(layers=3, channels=45, heads=3, feed_forward=101, types=3, seed=2),  # heads of 15
    Twin(layers=2, channels=24, heads=4, feed_forward=50, norm_eps=1e-6, seed=3),
    Twin(layers=5, channels=14, heads=2, feed_forward=33, types=1, seed=4),
]
every_twin = pytest.mark.parametrize("twin", TWINS, ids=str)


def random_ids(seed: int, lowest: int = 0, longest: int = 111) -> tuple[Tensor, Tensor]:
    """Ids ``[b, t]`` of every kind, even ``[PAD]`` among the residues, and the mask of the padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [min(length, longest) for length in LENGTHS]
    return pad([torch.randint(lowest, 30, (length,), generator=generator).tolist() for length in lengths])


def random_types(mask: Tensor, count: int) -> Tensor:
    return torch.randint(count, mask.shape, generator=torch.Generator().manual_seed(count))


def assert_parity(folder: Path, theirs: Any, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> None:
    """All outputs of ours from ``folder`` and of ``theirs`` agree in float64, and ours are as precise in float32."""
    batch = Packed.from_padded(ids, mask)
    ours_types = None if types is None else types[mask.bool()]
    truth = run_hub(copy.deepcopy(theirs).double(), ids, mask, types)
    ours = run_ours(load_bert(folder, torch.float64), batch, ours_types)
    assert ours.keys() == truth.keys()
    assert largest(differences(ours, truth)) < FLOAT64

    floor = rms(differences(run_hub(theirs, ids, mask, types), truth))
    found = rms(differences(run_ours(load_bert(folder, torch.float32), batch, ours_types), truth))
    for name in truth:
        # The noise floor is the original's own error in float32, measured here on the same inputs.
        assert found[name] <= 2 * floor[name], f"{name}: {found[name]:.1e}, theirs {floor[name]:.1e}"


@every_twin
def test_every_output(twin: Twin, tmp_path: Path) -> None:
    """``BertForPreTraining``: hidden states, attention maps, logits, pooled sequences and their relation."""
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    assert_parity(tmp_path, theirs, *random_ids(twin.seed))


@every_twin
def test_token_types(twin: Twin, tmp_path: Path) -> None:
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path)
    ids, mask = random_ids(twin.seed)
    assert_parity(tmp_path, theirs, ids, mask, random_types(mask, twin.types))


@every_twin
@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel, "no pooler"], ids=str)
def test_other_classes(twin: Twin, kind: Any, tmp_path: Path) -> None:
    """Without pooler; without heads, where transformers leaves ``bert.`` out of the names; and without either."""
    theirs = hub_twin(twin, BertModel, add_pooling_layer=False) if kind == "no pooler" else hub_twin(twin, kind)
    theirs.save_pretrained(tmp_path)
    assert_parity(tmp_path, theirs, *random_ids(twin.seed))
    config = load_bert(tmp_path, torch.float32).config
    assert (config.lm_head, config.pooler, config.relation_head) == (kind is BertForMaskedLM, kind is BertModel, False)


@pytest.mark.parametrize("name", CASES)
def test_stored_checkpoints(name: str) -> None:
    """The checkpoints of test_parity_bert.py, for the precision of every output in float32."""
    theirs = BertForPreTraining.from_pretrained(GOLDEN / name, attn_implementation="eager").eval()
    assert_parity(GOLDEN / name, theirs, *random_ids(0, longest=theirs.config.max_position_embeddings))


def test_longest_sequence(tmp_path: Path) -> None:
    """111 tokens reach the last row of the position table (above); one more is refused before anything is computed."""
    hub_twin(TWINS[0]).save_pretrained(tmp_path)
    net = load_bert(tmp_path, torch.float32)
    assert net.config.max_length == max(LENGTHS) == 111
    with pytest.raises(ValueError, match=r"112 tokens; this checkpoint's position table ends at 111 \(109 residues\)"):
        net(Packed.from_ids([[5] * 3, [5] * 112]))


@pytest.mark.parametrize("twin", TWINS[1:3], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_file_form(twin: Twin, form: str, tmp_path: Path) -> None:
    """Loading gives the very numbers that were in the original's memory, and from them the original's outputs."""
    theirs = hub_twin(twin)
    theirs.config.save_pretrained(tmp_path)
    FORMS[form](theirs, tmp_path)
    assert ("shards" in form) == any(tmp_path.glob("*.index.json"))
    ours = load_bert(tmp_path, torch.float32).state_dict()
    wanted = import_weights(hub_rows({}), theirs.state_dict(), ours)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name
    assert_parity(tmp_path, theirs, *random_ids(twin.seed))


def export(folder: Path, target: Path) -> dict[str, Tensor]:
    """What is published in ``folder``, through our network's names and back; the tensors that were written."""
    target.mkdir()
    net = load_bert(folder, torch.float32)
    config = vars(net.config)
    exported = export_weights(hub_rows(config), net.state_dict())
    write_safetensors(target / "model.safetensors", exported, {"format": "pt"}, hub_files(config))
    return exported


def load_hub(kind: type[Any], folder: Path) -> tuple[Any, set[str]]:
    """What transformers makes of a folder, in which nothing may be missing; and what it has no use for."""
    model, report = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return model.eval(), set(report["unexpected_keys"])


@every_twin
def test_back_to_transformers(twin: Twin, tmp_path: Path) -> None:
    """The same tensors, bit for bit, and so the same logits; in the class that knows all of them, and in the usual."""
    theirs = hub_twin(twin)
    theirs.save_pretrained(tmp_path / "made")
    exported = export(tmp_path / "made", tmp_path / "back")
    published = load_file(tmp_path / "made" / "model.safetensors")
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in published.items())

    found, unread = load_hub(BertForPreTraining, tmp_path / "back")
    assert not unread
    state = found.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    ids, mask = random_ids(twin.seed)
    truth = run_hub(theirs, ids, mask)
    assert largest(differences(run_hub(found, ids, mask), truth)) == 0

    usual, unread = load_hub(BertForMaskedLM, tmp_path / "back")
    assert all("pooler" in name or "seq_relationship" in name for name in unread)
    logits = {"logits": truth["logits"]}
    assert largest(differences(run_hub(usual, ids, mask), logits)) == 0


def test_an_encoder_back_to_transformers(tmp_path: Path) -> None:
    """Saved without ``bert.`` before the names and without heads; exported with it, which ``BertModel`` reads too."""
    theirs = hub_twin(TWINS[1], BertModel)
    theirs.save_pretrained(tmp_path / "made")
    export(tmp_path / "made", tmp_path / "back")
    found, unread = load_hub(transformers.AutoModel, tmp_path / "back")
    assert type(found) is BertModel and not unread
    ids, mask = random_ids(1)
    assert largest(differences(run_hub(found, ids, mask), run_hub(theirs, ids, mask))) == 0


def test_what_transformers_saves_again(tmp_path: Path) -> None:
    """A round trip through both libraries ends at the first tensors."""
    hub_twin(TWINS[1]).save_pretrained(tmp_path / "made")
    export(tmp_path / "made", tmp_path / "back")
    load_hub(BertForPreTraining, tmp_path / "back")[0].save_pretrained(tmp_path / "again")
    ours, again = (load_bert(tmp_path / folder, torch.float32) for folder in ("made", "again"))
    assert ours.config == again.config
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("made_by", [transformers.BertTokenizer, transformers.AutoTokenizer])
def test_the_exported_tokenizer(made_by: Any, tmp_path: Path) -> None:
    """It gives the ids that ProtBert's own tokenizer gives."""
    export(GOLDEN / "protbert_tiny", tmp_path / "back")
    stored = GOLDEN.parent / "tokenizers" / "prot_bert_bfd" / "examples.json"
    tokenizer = made_by.from_pretrained(tmp_path / "back")
    for case in json.loads(stored.read_text())["cases"]:
        if "text" in case and "input_ids" in case:
            assert tokenizer(case["text"])["input_ids"] == case["input_ids"], case["text"]


@every_twin
def test_gradients(twin: Twin, tmp_path: Path) -> None:
    """Of every parameter, through the logits, the relation and the token types: fine-tuning goes the same way."""
    theirs = hub_twin(twin).double()
    theirs.save_pretrained(tmp_path)
    ids, mask = random_ids(twin.seed, lowest=1)  # transformers withholds the gradient of [PAD] as an input
    types = random_types(mask, twin.types)
    keep, generator = mask.bool(), torch.Generator().manual_seed(0)
    weights = torch.randn(int(mask.sum()), 30, dtype=torch.float64, generator=generator)
    pulls = torch.randn(len(ids), 2, dtype=torch.float64, generator=generator)

    out = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)
    ((out.prediction_logits[keep] * weights).sum() + (out.seq_relationship_logits * pulls).sum()).backward()
    net = load_bert(tmp_path, torch.float64)
    ours = net(Packed.from_padded(ids, mask), types=types[keep])
    ((ours.logits * weights).sum() + (ours.relation_logits * pulls).sum()).backward()

    named = {name: x.grad for name, x in theirs.named_parameters()}
    found = {name: x.grad for name, x in net.named_parameters()}
    wanted = import_weights(key_map(named, vars(net.config)), named, found)
    for name, gradient in wanted.items():
        # The noise floor is the rounding of float64 on gradients of up to 1e3: 2e-12 is seen.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=FLOAT64, msg=name)
