"""plm generate with ProGen2: prompts from either end, whole proteins and their likelihoods, in every layout."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Plm, no_model_is_loaded, outputs, save_tiny_progen2
from test_cli_generate import read_jsonl, stop_after_the_first

import plm
from plm.generation import Sample

PROMPTS = {"N": "1", "C": "2KV", "bare": "MKT", "both": "1MKT"}
FASTA = "".join(f">{id} a header\n{prompt}\n" for id, prompt in PROMPTS.items())
SIZE = "Note: keys and values of up to "


@pytest.fixture(scope="module")
def progen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_progen2(tmp_path_factory.mktemp("models") / "progen2_tiny")


@pytest.fixture(scope="module")
def model(progen2: str) -> plm.Model:
    return plm.load(progen2)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text(FASTA)
    return "in.fasta"


def as_rows(found: list[list[Sample]], ids: Any = PROMPTS) -> list[dict[str, Any]]:
    """What tables hold: proteins from N to C."""
    return [
        {
            "id": f"{id}_{i}",
            "prompt": id,
            "sample": i,
            "sequence": sample.protein,
            "ll_sum": sample.ll_sum,
            "ll_mean": sample.ll_mean if sample.ll_mean == sample.ll_mean else None,
            "stopped_by": sample.stopped_by,
            "filled": [],
        }
        for id, samples in zip(ids, found, strict=True)
        for i, sample in enumerate(samples, 1)
    ]


def as_fasta(found: list[list[Sample]], ids: Any = PROMPTS) -> str:
    text = ""
    for row in as_rows(found, ids):
        mean = "none" if row["ll_mean"] is None else f"{row['ll_mean']:.3f}"
        text += f">{row['id']} ll_mean={mean} stopped_by={row['stopped_by']}\n{row['sequence']}\n"
    return text


def test_fasta_holds_what_python_gives(run: Plm, model: plm.Model, progen2: str, prompts: str, tmp_path: Path) -> None:
    """On stdout the data alone; on stderr the size of the cache, which way is which, and the summary."""
    expected = plm.generate(model, list(PROMPTS.values()), num_samples=3, seed=7, min_length=6)
    argv = ("generate", prompts, "-m", progen2, "--num-samples", "3", "--seed", "7", "--min-length", "6")
    code, out, err = run(*argv)
    assert code == 0 and out == as_fasta(expected)
    size, ends, summary = err.splitlines()
    assert size == f"{SIZE}12 texts of 79 tokens and 4 prompts take 1 MB"
    assert (
        ends
        == "Note: prompts that begin with 2 are written from C to N; the sequences here read from N to C, as all others"
    )
    assert summary.startswith("4 prompts, 12 samples, ") and summary.endswith("with progen2_tiny, seed 7")
    from_c = [line for line in out.splitlines() if line.endswith("VK")]
    assert len(from_c) == 3 and sum(line.startswith("MKT") for line in out.splitlines()) == 6
    assert run(*argv, "--quiet", "-o", "out.fasta") == (0, "", "") and (tmp_path / "out.fasta").read_text() == out
    assert run(*argv[:-2], "--max-tokens", "100").out != out and run(*argv, "--max-tokens", "100").out == out
    assert outputs(tmp_path, "in.fasta") == ["out.fasta"]


@pytest.mark.parametrize(("prompt", "first"), [("1", 3), ("2KV", 4), ("2", 4)])
def test_prompts_on_the_command_line(run: Plm, model: plm.Model, progen2: str, prompt: str, first: int) -> None:
    ((sample,),) = expected = plm.generate(model, prompt, seed=3, min_length=9)
    code, out, err = run("generate", prompt, "-m", progen2, "--seed", "3", "--min-length", "9")
    assert code == 0 and out == as_fasta(expected, ["1"]) and sample.ids[0] == first
    assert f"{SIZE}1 text of " in err and " and 1 prompt take " in err
    assert ("from C to N" in err) == (first == 4)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(run: Plm, model: plm.Model, progen2: str, tmp_path: Path, suffix: str, delimiter: str) -> None:
    (tmp_path / "in.csv").write_text("id,sequence\n" + "".join(f"{id},{text}\n" for id, text in PROMPTS.items()))
    expected = plm.generate(model, list(PROMPTS.values()), num_samples=2, max_length=12, seed=3)
    argv = ("--num-samples", "2", "--max-length", "12", "--seed", "3", "-o", f"out.{suffix}")
    assert run("generate", "in.csv", "-m", progen2, *argv).code == 0
    comment, *lines = (tmp_path / f"out.{suffix}").read_text().splitlines()
    rows = list(csv.DictReader(lines, delimiter=delimiter))
    wanted = [row | {"filled": ""} for row in as_rows(expected)]
    assert rows == [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in wanted]
    assert json.loads(comment.removeprefix("#"))["max_length"] == 12


def test_all_settings(run: Plm, model: plm.Model, progen2: str, prompts: str, tmp_path: Path) -> None:
    """Under the names of BioLM's page too; what is stored repeats the run in Python."""
    argv = ("--t", "0.7", "--p", "0.6", "--max-length", "20", "--num-samples", "2", "--no-repeat", "3")
    argv += ("--force", "5:c", "--force", "6:W", "--ban", "C", "--no-likelihood", "-o", "out.jsonl")
    code, _, err = run("generate", prompts, "-m", progen2, *argv)
    provenance, rows = read_jsonl((tmp_path / "out.jsonl").read_text())
    assert code == 0 and f"seed {provenance['seed']} -> out.jsonl" in err
    told = {"temperature": 0.7, "top_p": 0.6, "max_length": 20, "num_samples": 2, "no_repeat": 3, "banned": ["C"]}
    told |= {"likelihood": False, "forced": {"5": "C", "6": "W"}, "residues_only": False, "seed": provenance["seed"]}
    assert told.items() <= provenance.items()
    settings = told | {"forced": {5: "C", 6: "W"}}
    expected = plm.generate(model, list(PROMPTS.values()), **settings)
    assert rows == as_rows(expected)
    # By ids: the model may write spare ids, which count as places and are no residues of ``sequence``.
    places = [model.tokenizer.decode(sample.ids[5:7]) for samples in expected for sample in samples]
    assert {place for place in places if len(place) == 2} == {"CW"}
    with_it = plm.generate(model, list(PROMPTS.values()), **settings | {"likelihood": True})
    assert [[sample.ids for sample in samples] for samples in with_it] == [[s.ids for s in each] for each in expected]


def test_a_protein_without_residues(run: Plm, progen2: str) -> None:
    """A terminal at once: its likelihood is an empty sum, which has no mean; what was written has one."""
    argv = ("generate", "1", "-m", progen2, "--force", "1:2", "--t", "0", "-q")
    _, (row,) = read_jsonl(run(*argv, "--format", "jsonl").out)
    assert (row["sequence"], row["ll_sum"], row["ll_mean"], row["stopped_by"]) == ("", 0, None, "end")
    assert run(*argv).out == ">1_1 ll_mean=none stopped_by=end\n\n"
    assert run(*argv, "--format", "csv").out.splitlines()[2] == "1_1,1,1,,0.0,,end,"
    _, (row,) = read_jsonl(run(*argv, "--format", "jsonl", "--no-likelihood").out)
    assert row["sequence"] == "" and row["ll_mean"] == row["ll_sum"] < 0


def test_greedy(run: Plm, model: plm.Model, progen2: str, prompts: str) -> None:
    expected = plm.generate(model, list(PROMPTS.values()), temperature=0, max_length=30)
    code, out, err = run("generate", prompts, "-m", progen2, "--t", "0", "--max-length", "30")
    assert code == 0 and out == as_fasta(expected) and "seed" not in err


def test_seeds(run: Plm, progen2: str, prompts: str) -> None:
    first, second = (run("generate", prompts, "-m", progen2) for _ in range(2))
    assert first.out != second.out
    seed = first.err.rsplit("seed ", 1)[1].strip()
    assert run("generate", prompts, "-m", progen2, "--seed", seed).out == first.out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--force", "5"), "'5' is not POSITION:RESIDUE, as 45:C"),
        (("--force", "5:"), "'5:' is not POSITION:RESIDUE"),
        (("--force", "five:C"), "'five:C' is not POSITION:RESIDUE"),
        (("--force", "²:C"), "'²:C' is not POSITION:RESIDUE"),
        (("--force", "5:C", "--force", "5:D"), "position 5 is given twice"),
        (("--no-repeat", "0"), "--no-repeat"),
        (("--t", "-1"), "'--temperature' / '--t'"),
        (("--p", "1.5"), "'--top-p' / '--p'"),
        (("--t", "0", "--p", "0.5"), "leave out top_k and top_p"),
        (("--num-samples", "0"), "--num-samples"),
        (("-o", "out.pdb"), "names no layout"),
    ],
)
def test_settings_that_cannot_be(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], told: str
) -> None:
    """Exit 2, before a model is loaded."""
    no_model_is_loaded(monkeypatch)
    code, out, err = run("generate", "MKT", "-m", "progen2-medium", *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm generate" in err
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--max-length", "82"), "max_length=82, but the model reads at most 80 tokens: give 81 or less"),
        (("--length", "90"), "length=90, but the model reads at most 80 tokens: give 80 or less"),
        (("--max-length", "4"), "max_length counts the 4 tokens that are given, so it must be at least 5"),
        (("--min-length", "90"), "min_length must not be above it"),
        (("--force", "3:C"), "forced position 3 cannot be written: the prompt has 3 residues"),
        (("--force", "5:J"), "forced token 'J' is not in the vocabulary"),
        (("--ban", "J"), "banned token 'J' is not in the vocabulary"),
        (("--num-beams", "2", "--t", "0"), "beam search is for models with an encoder and a decoder"),
        (("--task", "s2s"), "task 's2s' is unknown; progen2_tiny has no tasks"),
    ],
)
def test_settings_that_contradict_the_model_or_a_prompt(
    run: Plm, progen2: str, tmp_path: Path, argv: tuple[str, ...], told: str
) -> None:
    """Exit 2, before anything is written."""
    code, out, err = run("generate", "MKT", "-m", progen2, "-o", "out.fasta", *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm generate" in err
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (">a\nMKT\n>b\nMK\nTJ\n", "in.fasta: line 3, record 2 'b': character 'J' at position 4"),
        (">a\n1MKT\n>b\n2MKJ\n", "record 2 'b': character 'J' at position 4"),
        (">a\nMKT2\n", "record 1 'a': 2 at position 4 ends the sequence"),
        (">a\n12\n", "record 1 'a': 2 at position 2 ends the sequence"),
        (">a\nM_K\n", "record 1 'a': character '_' at position 2 is not in the vocabulary"),
        (">a\nM*K\n", "record 1 'a': '*' at position 2"),
        (">a\nMKT\n>b\n\n", "record 2 'b': empty sequence"),
        (f">a\n{'M' * 80}\n", "record 1 'a': 81 tokens with the terminal; progen2_tiny reads at most 80"),
    ],
)
def test_bad_prompts(run: Plm, progen2: str, tmp_path: Path, data: str, told: str) -> None:
    """Exit 4."""
    (tmp_path / "in.fasta").write_text(data)
    code, out, err = run("generate", "in.fasta", "-m", progen2, "-o", "out.fasta")
    assert (code, out) == (4, "") and told in err
    assert outputs(tmp_path, "in.fasta") == []


def test_prompts_that_are_too_long_can_be_left_out(run: Plm, model: plm.Model, progen2: str, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">a\nMK\n>b\n{'M' * 90}\n")
    code, out, err = run("generate", "in.fasta", "-m", progen2, "--too-long", "skip", "--seed", "2")
    assert code == 3 and out == as_fasta(plm.generate(model, ["MK"], seed=2), ["a"])
    assert "Failed: line 3, record 2 'b': 91 tokens with the terminal" in err


def test_too_little_memory(
    run: Plm, progen2: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 6, with what would fit."""
    monkeypatch.setattr("plm.writing.free_memory", lambda _: 100_000)
    code, out, err = run("generate", prompts, "-m", progen2, "--max-tokens", "10000", "-o", "out.fasta")
    assert (code, out) == (6, "") and "at a time would: give max_tokens=" in err
    assert outputs(tmp_path, "in.fasta") == []


def test_interrupted(run: Plm, progen2: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves neither a part of the output nor nothing where there was one."""
    (tmp_path / "out.csv").write_text("precious")
    with monkeypatch.context() as patch:
        stop_after_the_first(patch)
        for name in ("new.fasta", "out.csv"):
            argv = ("-o", name, "--overwrite", "--max-tokens", "1", "--quiet")
            assert run("generate", prompts, "-m", progen2, *argv) == (130, "", "Error: interrupted\n")
    assert outputs(tmp_path, "in.fasta") == ["out.csv"] and (tmp_path / "out.csv").read_text() == "precious"


def test_summary_as_json(run: Plm, progen2: str, prompts: str) -> None:
    argv = ("--num-samples", "2", "--length", "15", "--seed", "4", "--json", "--quiet", "-o", "out.fasta")
    code, out, err = run("generate", prompts, "-m", progen2, *argv)
    summary = json.loads(out)
    tokens = 2 * sum(15 - len(prompt.lstrip("12")) for prompt in PROMPTS.values())
    assert (code, err) == (0, "") and (summary["samples"], summary["tokens"], summary["seed"]) == (8, tokens, 4)
