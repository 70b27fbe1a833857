"""What T5 folders become: a network, its tokenizer and one row per residue; a notice; or a refusal that says why."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from oracle_t5 import GOLDEN, Twin, hub_twin, save
from test_tokens_t5 import ANKH3_PIECES
from test_vocabularies import spiece

import plm
from plm.loading import LicenceNotice, Notice, VocabularyNotice
from plm.models.t5 import T5
from plm.vocabularies import ANKH, PROTT5

SIZES = {"prott5": 128, "ankh": 144, "prostt5": 150, "ankh3": 256, "another": 40}
PROTEINS = ["MKTAYIAKQR", "K", "ACDEFGHIKLMNPQRSTVWY"]
STATES = ["dvvvlqal", "d", "acdefghiklmnpqrstvwy"]
HEAVY, LIGHT = "QVQLVQ", "EIVL"


def published(kind: str, folder: Path) -> Path:
    """A folder with a vocabulary of the size of ``kind``, and random weights."""
    activation = "gated-silu" if kind == "ankh3" else "gated-gelu" if kind == "ankh" else "relu"
    tie = "false" if kind.startswith("ankh") else "absent"
    twin = Twin(2, 1, 24, 2, 8, 32, activation, tie, vocabulary=SIZES[kind])
    return save(hub_twin(twin), twin, folder)


def load(kind: str, folder: Path, dtype: str = "float64") -> plm.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return plm.load(published(kind, folder), dtype=dtype)


def encoded(model: plm.Model, ids: list[int]) -> torch.Tensor:
    """The encoder's last hidden state for these very ids ``[t, c]``."""
    with torch.inference_mode():
        return model.net.encode(plm.Packed.from_ids([ids])).hidden


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)  # 5,000 times the spacing of float64 at 1


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_float16_is_refused_with_the_reason(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"float16 cannot be used: .* exceeds 65,504.* Choose bfloat16 or float32"):
        plm.load(GOLDEN / "prott5_tiny", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_other_types_are_taken_by_every_weight(dtype: str) -> None:
    net = plm.load(GOLDEN / "ankh3_tiny", dtype=dtype).net
    assert isinstance(net, T5) and not net.training
    kept = {name: x.dtype for name, x in net.state_dict().items() if "relative_bias" in name}
    assert set(kept.values()) == {torch.promote_types(getattr(torch, dtype), torch.float32)}
    assert {x.dtype for name, x in net.state_dict().items() if name not in kept} == {getattr(torch, dtype)}


def test_a_file_in_float16_is_used_in_float32(tmp_path: Path) -> None:
    twin = Twin(1, 1, 16, 2, 8, 20, "relu")
    theirs = hub_twin(twin).half()
    model = plm.load(save(theirs, twin, tmp_path))
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert torch.equal(model.net.embed.weight.float().cpu(), theirs.shared.weight.float())


@pytest.mark.parametrize("kind", ["ankh", "ankh3"])
def test_ankh_says_that_it_is_not_for_commercial_use(kind: str, tmp_path: Path) -> None:
    """A warning, which names where it came from; and nothing that stops the loading."""
    folder = published(kind, tmp_path)
    with pytest.warns(LicenceNotice, match="CC BY-NC-SA 4.0: they may not be used commercially") as told:
        model = plm.load(folder)
    assert [Path(warning.filename) for warning in told] == [Path(__file__)]
    assert len(model.tokenizer.vocabulary) == SIZES[kind]


@pytest.mark.parametrize("kind", ["prott5", "prostt5", "another"])
def test_no_other_t5_gives_a_notice(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LicenceNotice)
        assert len(plm.load(published(kind, tmp_path)).tokenizer.vocabulary) == SIZES[kind]


def tokenizer_json(pieces: list[str]) -> str:
    return json.dumps({"model": {"type": "Unigram", "vocab": [[piece, 0.0] for piece in pieces]}, "added_tokens": []})


MARKED = [f"▁{piece}" if len(piece) == 1 else piece for piece in PROTT5]
SWAPPED = [*MARKED[:3], MARKED[4], MARKED[3], *MARKED[5:]]


def test_a_vocabulary_beside_the_weights_is_compared(tmp_path: Path) -> None:
    """ProtT5's, whole as a ``tokenizer.json`` has it and without sentinels as a ``spiece.model`` has it."""
    folder = published("prott5", tmp_path)
    (folder / "spiece.model").write_bytes(spiece(MARKED[:28]))
    assert plm.load(folder).tokenizer.vocabulary == PROTT5
    (folder / "tokenizer.json").write_text(tokenizer_json(MARKED))
    assert plm.load(folder).tokenizer.vocabulary == PROTT5


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (SWAPPED, "id 3 is 'L', wanted 'A'; id 4 is 'A', wanted 'L'"),
        ([*MARKED, "<extra_id_100>"], "id 128 is '<extra_id_100>', beyond the last"),
        (list(ANKH), "id 28 is '<extra_id_115>', wanted '<extra_id_99>'"),
    ],
    ids=["swapped", "longer", "of Ankh"],
)
def test_a_vocabulary_that_disagrees_is_refused(file: str, pieces: list[str], complaint: str, tmp_path: Path) -> None:
    """Before the weights are read, with the file and the ids: the residues would be others."""
    folder = published("prott5", tmp_path)
    content = tokenizer_json(pieces).encode() if file == "tokenizer.json" else spiece(pieces)
    (folder / file).write_bytes(content)
    with pytest.raises(plm.CheckpointError, match=f"{file}.*{complaint}"):
        plm.load(folder)


def test_a_torn_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = published("prott5", tmp_path)
    (folder / "spiece.model").write_bytes(spiece(MARKED[:28])[:99])
    with pytest.raises(plm.CheckpointError, match=r"spiece\.model is torn"):
        plm.load(folder)


def test_ankh3_needs_its_own_vocabulary_for_tasks(tmp_path: Path) -> None:
    """Nobody published the ids of its prefixes: without the file a task is refused, and "none" needs none of them."""
    model = load("ankh3", tmp_path)
    with pytest.raises(ValueError, match=r"needs the id of \[NLU\].*tokenizer\.json or spiece\.model"):
        plm.embed(model, "MKT")
    ids = model.tokenizer.encode("MKT")
    same(plm.embed(model, "MKT", task="none")[0], encoded(model, ids)[:-1])

    (tmp_path / "spiece.model").write_bytes(spiece(list(ANKH3_PIECES)))
    with pytest.warns(LicenceNotice):
        model = plm.load(tmp_path, dtype="float64")
    same(plm.embed(model, "MKT")[0], encoded(model, [3, *ids])[1:-1])
    same(plm.embed(model, "MKT", task="s2s")[0], encoded(model, [4, *ids])[1:-1])


@pytest.mark.parametrize(("task", "sequences", "prefix"), [("aa2fold", PROTEINS, 149), ("fold2aa", STATES, 148)])
def test_exactly_one_row_per_residue_of_prostt5(task: str, sequences: list[str], prefix: int, tmp_path: Path) -> None:
    """Neither the prefix nor ``</s>`` is among them, though both are read."""
    model = load("prostt5", tmp_path)
    found = plm.embed(model, sequences, task=task)
    for rows, sequence in zip(found, sequences, strict=True):
        assert rows.shape == (len(sequence), 24)
        ids = model.tokenizer.encode(sequence, task=task)
        assert ids[0] == prefix and ids[-1] == 1 and len(ids) == len(sequence) + 2
        same(rows, encoded(model, ids)[1:-1])
    pooled = plm.embed(model, sequences, task=task, pool="mean")
    for vector, rows in zip(pooled, found, strict=True):
        same(vector, rows.mean(0))


def test_prostt5_takes_residues_unless_told_otherwise(tmp_path: Path) -> None:
    model = load("prostt5", tmp_path)
    for default, named in zip(plm.embed(model, PROTEINS), plm.embed(model, PROTEINS, task="aa2fold"), strict=True):
        assert torch.equal(default, named)


@pytest.mark.parametrize(
    ("task", "sequence", "complaint"),
    [
        (
            "fold2aa",
            "DVVV",
            r"character 'D' at position 1 .*Foldseek writes 3Di states in upper case: call \.lower\(\)",
        ),
        ("fold2aa", "dvX", r"character 'X' at position 3"),
        ("fold2aa", "dvx", r"character 'x' at position 3"),
        ("aa2fold", "MKt", r"character 't' at position 3 .*Lower case are 3Di states"),
        ("fold", "MKT", r"task 'fold' is unknown; .* has the tasks aa2fold, fold2aa"),
    ],
)
def test_case_carries_meaning(task: str, sequence: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        plm.embed(load("prostt5", tmp_path), sequence, task=task)


def test_rows_of_a_pair(tmp_path: Path) -> None:
    """IgT5: the heavy chain's residues, then the light one's; the ``</s>`` between them is read and left out."""
    model = load("prott5", tmp_path)
    pairs = [(HEAVY, LIGHT), (LIGHT, "K")]
    ids = model.tokenizer.encode(f"{HEAVY}|{LIGHT}")
    states = encoded(model, ids)
    assert ids[len(HEAVY)] == ids[-1] == 1 and len(ids) == len(HEAVY) + len(LIGHT) + 2

    whole = plm.embed(model, pairs)
    assert [len(rows) for rows in whole] == [len(heavy) + len(light) for heavy, light in pairs]
    same(whole[0], torch.cat([states[: len(HEAVY)], states[len(HEAVY) + 1 : -1]]))
    heavy, light = plm.embed(model, pairs, per_chain=True)[0]
    same(heavy, states[: len(HEAVY)])
    same(light, states[len(HEAVY) + 1 : -1])
    for pool in ("mean", "max"):
        vectors = plm.embed(model, pairs, pool=pool, per_chain=True)[0]
        for vector, rows in zip(vectors, (heavy, light), strict=True):
            same(vector, rows.mean(0) if pool == "mean" else rows.amax(0))
        same(plm.embed(model, pairs, pool=pool)[0], whole[0].mean(0) if pool == "mean" else whole[0].amax(0))
    assert torch.equal(plm.embed(model, f"{HEAVY}|{LIGHT}")[0], plm.embed(model, [pairs[0]])[0])


def test_one_chain_is_a_tuple_of_one(tmp_path: Path) -> None:
    model = load("prott5", tmp_path)
    (rows,) = plm.embed(model, "MKT", per_chain=True)[0]
    same(rows, encoded(model, model.tokenizer.encode("MKT"))[:-1])


@pytest.mark.parametrize(
    ("sequences", "complaint"),
    [
        ([(HEAVY, "")], "no light chain"),
        ([("", LIGHT)], "no heavy chain"),
        ([f"{HEAVY}|{LIGHT}|K"], "3 chains"),
        ([(HEAVY, LIGHT), HEAVY, (HEAVY, LIGHT)], "a single chain among pairs"),
    ],
)
def test_wrong_chains(sequences: list[str | tuple[str, str]], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        plm.embed(load("prott5", tmp_path), sequences)


@pytest.mark.parametrize("kind", ["ankh", "prostt5"])
def test_pairs_for_models_of_single_chains(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model takes single chains"):
        plm.embed(load(kind, tmp_path), f"{HEAVY}|{LIGHT}")


@pytest.mark.parametrize("kind", ["prott5", "prostt5"])
def test_rare_letters_are_read_as_x(kind: str, tmp_path: Path) -> None:
    """As every published recipe does, though they have ids; the tokenizer itself leaves them alone."""
    model = load(kind, tmp_path)
    rare, plain = plm.embed(model, ["MUKZTOAB", "MXKXTXAX"])
    same(rare, plain)
    assert model.tokenizer.residues("UZOB") == bytes([26, 27, 25, 24])


def test_ankh_has_its_own_rare_letters(tmp_path: Path) -> None:
    model = load("ankh", tmp_path)
    rare, plain = plm.embed(model, ["MUKZTOAB", "MXKXTXAX"])
    assert (rare - plain).abs().max() > 1e-3
    same(rare, encoded(model, model.tokenizer.encode("MUKZTOAB"))[:-1])


def test_no_limit_of_length(tmp_path: Path) -> None:
    """``n_positions`` is 512 in the file, and means nothing."""
    folder = published("prott5", tmp_path)
    assert json.loads((folder / "config.json").read_text())["n_positions"] == 512
    assert plm.embed(plm.load(folder), "MK" * 300)[0].shape == (600, 24)


def test_there_is_no_start_token_to_pool(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no start token; pool with 'mean' or 'max'"):
        plm.embed(load("prott5", tmp_path), "MKT", pool="cls")


@pytest.mark.parametrize("size", [20, 300])
def test_a_vocabulary_of_any_size_is_loaded(size: int, tmp_path: Path) -> None:
    """The network is what it is; of the letters only so many are guessed."""
    twin = Twin(1, 1, 16, 2, 8, 20, "relu", vocabulary=size)
    with pytest.warns(VocabularyNotice, match="put tokenizer.json"):
        model = plm.load(save(hub_twin(twin), twin, tmp_path))
    assert model.net.embed.num_embeddings == size and len(model.tokenizer.vocabulary) <= 28


def test_a_file_tells_a_vocabulary_that_nobody_published(tmp_path: Path) -> None:
    """Pieces and prefixes are the file's; what it leaves out are sentinels."""
    shutil.copytree(GOLDEN / "ankh3_tiny", tmp_path / "told")
    pieces = ["<pad>", "</s>", "<unk>", "[S2S]", "[NLU]", *"VTAMKLGS"]
    (tmp_path / "told" / "tokenizer.json").write_text(tokenizer_json(pieces))
    tokenizer = plm.load(tmp_path / "told").tokenizer
    assert tokenizer.encode("MKV", task="nlu") == [4, 8, 9, 5, 1] and tokenizer.sentinel(0) == 47
    assert len(plm.embed(plm.load(tmp_path / "told"), "MKV")[0]) == 3


def test_a_guessed_vocabulary_is_said(tmp_path: Path) -> None:
    """Nobody published 40 tokens: Ankh's letters are assumed, unless a file beside the weights tells."""
    with pytest.warns(VocabularyNotice, match="no published T5 has 40 tokens"):
        model = plm.load(GOLDEN / "prott5_tiny")
    assert model.tokenizer.guessed
    shutil.copytree(GOLDEN / "prott5_tiny", tmp_path / "told")
    (tmp_path / "told" / "tokenizer.json").write_text(tokenizer_json(list(model.tokenizer.vocabulary)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not plm.load(tmp_path / "told").tokenizer.guessed
