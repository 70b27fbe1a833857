"""Antibody pairs, tasks and licences on the command line: from two columns of a table to rows of each chain."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import (
    ANKH,
    HEAVY,
    LIGHT,
    PROSTT5,
    PROTT5,
    SEQUENCE,
    Plm,
    outputs,
    save_tiny_bert,
    save_tiny_t5,
)

import plm
from plm.outputs import read_embeddings

PAIRS = {"a": (HEAVY, LIGHT), "b": (HEAVY[:3], LIGHT[:5]), "c": (HEAVY[::-1], "D")}
COLUMNS = ("--heavy-column", "H", "--light-column", "L", "--id-column", "antibody")
TABLE = "antibody,H,L\n" + "".join(f"{id},{heavy},{light}\n" for id, (heavy, light) in PAIRS.items())
RARE = "3 letters U, Z, O or B read as X, as the model's authors do"


@pytest.fixture(scope="module")
def igbert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """At most 64 tokens."""
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "igbert_tiny")


@pytest.fixture(scope="module")
def antibodies(igbert: str) -> plm.Model:
    return plm.load(igbert)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "in.csv").write_text(TABLE)
    return "in.csv"


# -- pairs


def test_two_columns(run: Plm, igbert: str, antibodies: plm.Model, pairs: str) -> None:
    """All heavy rows, then all light rows, and none for what is between them."""
    code, _, err = run("embed", pairs, "-m", igbert, "-o", "out.npz", *COLUMNS)
    assert code == 0 and err.startswith("3 proteins, 50 residues in ")
    back = read_embeddings("out.npz")
    assert back.ids == list(PAIRS) and back.provenance["per_chain"] is False
    for array, tensor in zip(back.arrays, plm.embed(antibodies, list(PAIRS.values())), strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
    assert [len(array) for array in back.arrays] == [25, 8, 17]


def test_the_same_pairs_as_fasta(run: Plm, igbert: str, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text("".join(f">{id}\n{'|'.join(chains)}\n" for id, chains in PAIRS.items()))
    assert run("embed", pairs, "-m", igbert, "-o", "table.npz", *COLUMNS).code == 0
    assert run("embed", "in.fasta", "-m", igbert, "-o", "fasta.npz").code == 0
    one, other = (read_embeddings(name) for name in ("table.npz", "fasta.npz"))
    assert one.ids == other.ids and all(map(np.array_equal, one.arrays, other.arrays))


@pytest.mark.parametrize("pool", [None, "mean", "max"])
def test_chains_apart(run: Plm, igbert: str, antibodies: plm.Model, pairs: str, pool: str | None) -> None:
    argv = ("--per-chain", "--pool", pool or "none", "--max-tokens", "20")
    code, _, err = run("embed", pairs, "-m", igbert, "-o", "out.npz", *COLUMNS, *argv)
    assert code == 0 and err.startswith("3 proteins, 50 residues in ")
    back = read_embeddings("out.npz")
    assert back.ids == ["a:heavy", "a:light", "b:heavy", "b:light", "c:heavy", "c:light"]
    assert (back.provenance["per_chain"], back.provenance["sequences"]) == (True, 3)
    expected = plm.embed(antibodies, list(PAIRS.values()), pool=pool, per_chain=True)
    for array, tensor in zip(back.arrays, [chain for chains in expected for chain in chains], strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())


def test_single_chains_keep_their_ids(run: Plm, igbert: str, antibodies: plm.Model) -> None:
    code, out, _ = run("embed", SEQUENCE, "-m", igbert, "--per-chain", "--pool", "mean", "--format", "jsonl")
    row = json.loads(out.splitlines()[1])
    assert code == 0 and row["id"] == "1"
    assert torch.equal(torch.tensor(row["embedding"]), plm.embed(antibodies, SEQUENCE, pool="mean")[0])


def test_pooling_of_the_card(run: Plm, igbert: str, antibodies: plm.Model, pairs: str) -> None:
    assert run("embed", pairs, "-m", igbert, "-o", "out.npz", *COLUMNS, "--pool", "card").code == 0
    back = read_embeddings("out.npz")
    card, mean = (torch.stack(plm.embed(antibodies, list(PAIRS.values()), pool=pool)) for pool in ("card", "mean"))
    np.testing.assert_array_equal(np.stack(back.arrays), card.numpy())
    assert not torch.allclose(card, mean) and back.provenance["pooling"] == "card"


@pytest.mark.parametrize("pool", ["cls", "card"])
def test_what_both_chains_share_cannot_be_apart(run: Plm, igbert: str, pairs: str, tmp_path: Path, pool: str) -> None:
    code, out, err = run("embed", pairs, "-m", igbert, "-o", "o.npz", *COLUMNS, "--per-chain", "--pool", pool)
    assert (code, out) == (2, "") and "--pool" in err and "one vector for both chains" in err
    assert outputs(tmp_path, "in.csv") == []


@pytest.mark.parametrize("verb", ["embed", "score", "generate"])
@pytest.mark.parametrize(("row", "told"), [(f"{HEAVY},", "no light chain"), (f"n/a,{LIGHT}", "no heavy chain")])
def test_a_missing_chain(run: Plm, igbert: str, tmp_path: Path, verb: str, row: str, told: str) -> None:
    (tmp_path / "in.csv").write_text(f"{TABLE}broken,{row}\n")
    code, out, err = run(verb, "in.csv", "-m", igbert, "-o", "out.npz" if verb == "embed" else "out.csv", *COLUMNS)
    assert (code, out) == (4, "") and f"in.csv: line 5, record 4 'broken': {told}" in err and "--skip-empty" in err
    assert outputs(tmp_path, "in.csv") == []


def test_a_missing_chain_left_out(run: Plm, igbert: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(f"{TABLE}broken,{HEAVY},\n")
    code, out, err = run("embed", "in.csv", "-m", igbert, "-o", "out.npz", *COLUMNS, "--skip-empty", "--json")
    assert code == 3 and read_embeddings("out.npz").ids == list(PAIRS)
    assert [failed["id"] for failed in json.loads(out)["failed"]] == ["broken"] and "no light chain" in err


def test_pairs_among_single_chains(run: Plm, igbert: str, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">a\n{HEAVY}|{LIGHT}\n>b\n{HEAVY}\n>c\n{HEAVY}|{LIGHT}\n")
    code, out, err = run("embed", "in.fasta", "-m", igbert, "-o", "out.npz")
    assert (code, out) == (4, "") and "in.fasta: line 3, record 2 'b': a single chain among pairs" in err
    assert outputs(tmp_path, "in.fasta") == []


def test_one_column_needs_the_other(run: Plm, igbert: str, pairs: str) -> None:
    code, _, err = run("embed", pairs, "-m", igbert, "-o", "out.npz", "--heavy-column", "H")
    assert code == 4 and "--heavy-column and --light-column" in err


def test_the_limit_counts_what_is_around_and_between_chains(run: Plm, igbert: str, tmp_path: Path) -> None:
    """64 tokens: 61 residues of a pair, between start, separator and end; 62 of a single chain."""
    (tmp_path / "in.fasta").write_text(f">fits\n{'A' * 60}|E\n>long\n{'A' * 61}|E\n>odd\n{'A' * 60}|J\n")
    code, _, err = run("embed", "in.fasta", "-m", igbert, "-o", "out.npz", "--too-long", "skip")
    assert code == 4 and "'odd'" in err and "'long'" not in err
    (tmp_path / "in.fasta").write_text(f">fits\n{'A' * 60}|E\n>long\n{'A' * 61}|E\n")
    code, out, err = run("embed", "in.fasta", "-m", igbert, "-o", "out.npz", "--too-long", "skip", "--json")
    assert code == 3 and read_embeddings("out.npz").ids == ["fits"]
    assert [failed["id"] for failed in json.loads(out)["failed"]] == ["long"]
    (tmp_path / "in.fasta").write_text(f">fits\n{'A' * 62}\n>long\n{'A' * 63}\n")
    assert run("embed", "in.fasta", "-m", igbert, "-o", "out.npz", "--too-long", "skip", "--overwrite").code == 3
    assert read_embeddings("out.npz").ids == ["fits"]


# -- rare letters, tasks and licences


def test_rare_letters_are_told(run: Plm, igbert: str, antibodies: plm.Model, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMUKB\n>b\nMXK<mask>\n>c\nOMT\n")
    code, out, err = run("embed", "in.fasta", "-m", igbert, "-o", "out.npz", "--json")
    back = read_embeddings("out.npz")
    assert code == 0 and f"Note: {RARE}\n" in err
    assert back.provenance["changes"] == [RARE] == json.loads(out)["changes"]
    np.testing.assert_array_equal(back.arrays[0], plm.embed(antibodies, "MXKX")[0].numpy())
    code, _, err = run("embed", "in.fasta", "-m", igbert, "-o", "quiet.npz", "--quiet")
    assert (code, err) == (0, "") and read_embeddings("quiet.npz").provenance["changes"] == [RARE]


def test_tasks(run: Plm, tmp_path: Path) -> None:
    folder = save_tiny_t5(tmp_path / "prostt5_tiny", PROSTT5)
    model = plm.load(folder)
    (tmp_path / "in.fasta").write_text(">a\nDVVPQ\n")
    expected = {
        None: ("aa2fold", "DVVPQ"),
        "aa2fold": ("aa2fold", "DVVPQ"),
        "fold2aa": ("fold2aa", "dvvpq"),
        "none": (None, "DVVPQ"),
    }
    for task, (chosen, sequence) in expected.items():
        argv = ("--task", task) if task else ()
        code, _, err = run("embed", "in.fasta", "-m", folder, "-o", "out.npz", "--overwrite", *argv)
        back = read_embeddings("out.npz")
        assert code == 0 and back.provenance["task"] == chosen
        assert ("5 uppercase letters lower-cased" in err) is (task == "fold2aa")
        np.testing.assert_array_equal(back.arrays[0], plm.embed(model, sequence, task=task)[0].numpy())
    code, out, err = run("embed", "in.fasta", "-m", folder, "-o", "new.npz", "--task", "nlu")
    assert (code, out) == (2, "") and "--task" in err and "has the tasks aa2fold, fold2aa" in err
    assert outputs(tmp_path) == ["in.fasta", "out.npz", "prostt5_tiny"]


def test_what_a_t5_cannot_do(run: Plm, tmp_path: Path) -> None:
    folder = save_tiny_t5(tmp_path / "prott5_tiny", PROTT5)
    for argv, told in {
        ("--dtype", "float16"): "Invalid value for --dtype: dtype float16 cannot be used: the residual stream of a T5",
        ("--pool", "cls"): "Invalid value for --pool: prott5_tiny has no start token",
        ("--layer", "9"): "has layers 0 to 2",
    }.items():
        code, out, err = run("embed", SEQUENCE, "-m", folder, "-o", "out.npz", *argv)
        assert (code, out) == (2, "") and told in err
    assert outputs(tmp_path) == ["prott5_tiny"]


def test_a_licence_is_told_at_load(run: Plm, tmp_path: Path) -> None:
    folder = save_tiny_t5(tmp_path / "ankh_tiny", ANKH)
    told = "Note: Ankh's weights are published under CC BY-NC-SA 4.0: they may not be used commercially\n"
    for argv in (("embed", SEQUENCE, "-o", "a.npz"), ("score", SEQUENCE), ("generate", SEQUENCE)):
        for quiet in ((), ("--quiet", "--overwrite")):
            code, _, err = run(*argv, "-m", folder, *quiet)
            assert code == 0 and err.count(told) == (0 if quiet else 1) and "Warning" not in err
