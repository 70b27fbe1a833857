"""plm generate: the samples of Python, the same again for the same seed, and nothing half-written."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    ANKH,
    ANKH3,
    ESM2,
    PROSTT5,
    PROTT5,
    SEQUENCE,
    Plm,
    no_model_is_loaded,
    outputs,
    save_tiny_bert,
    save_tiny_t5,
)

import plm
from plm.cli.errors import Code
from plm.generation import Sample

PROMPTS = {"P1": "MKTAYIAKQR", "P2": "M", "P3": "ACDEFGHIKLNP"}
FASTA = "".join(f">{id} a header\n{prompt}\n" for id, prompt in PROMPTS.items())

pytestmark = pytest.mark.filterwarnings("ignore::plm.LicenceNotice")


@pytest.fixture(scope="module")
def ankh(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("models") / "ankh_tiny", ANKH)


@pytest.fixture(scope="module")
def prostt5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("models") / "prostt5_tiny", PROSTT5)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text(FASTA)
    return "in.fasta"


def as_fasta(ids: list[str], found: list[list[Sample]]) -> str:
    return "".join(
        f">{id}_{i} ll_mean={sample.ll_mean:.3f} stopped_by={sample.stopped_by}\n{sample.sequence}\n"
        for id, samples in zip(ids, found, strict=True)
        for i, sample in enumerate(samples, 1)
    )


def as_rows(id: str, samples: list[Sample]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{id}_{i}",
            "prompt": id,
            "sample": i,
            "sequence": sample.sequence,
            "ll_sum": sample.ll_sum,
            "ll_mean": sample.ll_mean,
            "stopped_by": sample.stopped_by,
            "filled": list(sample.filled),
        }
        for i, sample in enumerate(samples, 1)
    ]


def read_jsonl(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The provenance, and the rows."""
    first, *rows = map(json.loads, text.splitlines())
    return first["provenance"], rows


# -- what is written


@pytest.mark.parametrize("argv", [(), ("-o", "out.fa"), ("-o", "out.txt", "--format", "fasta")])
def test_fasta_holds_what_python_gives(run: Plm, ankh: str, prompts: str, tmp_path: Path, argv: Any) -> None:
    expected = plm.generate(plm.load(ankh), list(PROMPTS.values()), num_samples=3, seed=7)
    assert len({sample.sequence for samples in expected for sample in samples}) > 3
    code, out, err = run("generate", prompts, "-m", ankh, "--num-samples", "3", "--seed", "7", *argv)
    text = (tmp_path / argv[1]).read_text() if argv else out
    assert code == 0 and text == as_fasta(list(PROMPTS), expected)
    licence, size, summary = err.splitlines()
    assert licence.startswith("Note: Ankh's weights")
    assert re.fullmatch(r"Note: keys and values of up to 9 texts of \d+ tokens and 3 prompts take \d+ MB", size)
    assert re.match(r"3 prompts, 9 samples, [\d,]+ tokens in .* with ankh_tiny, seed 7", summary)
    assert outputs(tmp_path, "in.fasta") == [*argv[1:2]]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(run: Plm, ankh: str, tmp_path: Path, suffix: str, delimiter: str) -> None:
    (expected,) = plm.generate(plm.load(ankh), "M_AY_L", num_samples=2, max_length=12, seed=3)
    (tmp_path / "in.csv").write_text("id,sequence\na,M_AY_L\n")
    argv = ("--num-samples", "2", "--max-length", "12", "--seed", "3", "-o", f"out.{suffix}")
    assert run("generate", "in.csv", "-m", ankh, *argv).code == 0
    comment, *lines = (tmp_path / f"out.{suffix}").read_text().splitlines()
    rows = list(csv.DictReader(lines, delimiter=delimiter))
    assert rows == [
        {column: ";".join(cell) if column == "filled" else str(cell) for column, cell in row.items()}
        for row in as_rows("a", expected)
    ]
    assert json.loads(comment.removeprefix("#"))["num_samples"] == 2


def test_provenance_repeats_the_run(run: Plm, ankh: str, prompts: str, tmp_path: Path) -> None:
    """All settings are stored under the names that `plm.generate` gives them."""
    argv = ("--length", "20", "--top-k", "9", "--top-p", "0.9", "--temperature", "1.5", "--residues-only")
    argv += ("--repetition-penalty", "1.2", "--ban", "X", "--ban", "A", "--num-samples", "2", "-o", "out.jsonl")
    code, _, err = run("generate", prompts, "-m", ankh, *argv)
    provenance, rows = read_jsonl((tmp_path / "out.jsonl").read_text())
    settings = {
        "num_samples": 2,
        "length": 20,
        "max_length": None,
        "min_length": None,
        "temperature": 1.5,
        "top_k": 9,
        "top_p": 0.9,
        "num_beams": 1,
        "length_penalty": 1.0,
        "early_stopping": False,
        "repetition_penalty": 1.2,
        "banned": ["X", "A"],
        "residues_only": True,
        "task": None,
        "seed": provenance["seed"],
    }
    assert code == 0 and settings.items() <= provenance.items()
    assert (provenance["model"], provenance["sequences"], provenance["input"]) == ("ankh_tiny", 3, "in.fasta")
    assert f"seed {provenance['seed']} -> out.jsonl" in err
    expected = plm.generate(plm.load(ankh), list(PROMPTS.values()), **settings)
    assert rows == [row for id, samples in zip(PROMPTS, expected, strict=True) for row in as_rows(id, samples)]
    for row in rows:
        written = row["sequence"].removeprefix(PROMPTS[row["prompt"]])
        assert len(row["sequence"]) == 20 and not {"X", "A"} & set(written)


def test_seeds(run: Plm, ankh: str, prompts: str) -> None:
    """Without one, one is drawn; it is told, and it gives the same samples."""
    first, second = (run("generate", prompts, "-m", ankh) for _ in range(2))
    assert first.out != second.out
    found = re.search(r"seed (\d+)", first.err)
    assert found and run("generate", prompts, "-m", ankh, "--seed", found[1]).out == first.out
    summary = json.loads(run("generate", prompts, "-m", ankh, "-o", "out.fasta", "--json", "--quiet").out)
    assert run("generate", prompts, "-m", ankh, "--seed", str(summary["seed"])).out == Path("out.fasta").read_text()
    greedy = run("generate", prompts, "-m", ankh, "--temperature", "0")
    assert "seed" not in greedy.err and greedy.out == run("generate", prompts, "-m", ankh, "--temperature", "0").out


def test_a_sample_does_not_depend_on_other_prompts(run: Plm, ankh: str, tmp_path: Path) -> None:
    (tmp_path / "one.fasta").write_text(f">P1\n{PROMPTS['P1']}\n")
    (tmp_path / "other.fasta").write_text(f">P1\n{PROMPTS['P1']}\n>long\n{SEQUENCE * 4}\n>gap\nM_A\n")
    (tmp_path / "all.fasta").write_text(FASTA)
    texts = []
    for name in ("one", "other", "all"):
        for argv in ((), ("--max-tokens", "1")):
            found = run("generate", f"{name}.fasta", "-m", ankh, "--seed", "5", "--num-samples", "2", *argv)
            texts.append(found.out.splitlines()[:4])
    assert texts == [texts[0]] * 6 and texts[0][0].startswith(">P1_1 ")


@pytest.mark.parametrize("prompt", ["M_AY_L", "M<extra_id_0>AY<extra_id_1>L"])
def test_gaps(run: Plm, ankh: str, prompt: str) -> None:
    argv = ("--format", "jsonl", "--residues-only", "--max-length", "30", "--seed", "1")
    code, out, _ = run("generate", prompt, "-m", ankh, *argv)
    _, (row,) = read_jsonl(out)
    (samples,) = plm.generate(plm.load(ankh), prompt, residues_only=True, max_length=30, seed=1)
    assert code == 0 and [row] == as_rows("1", samples)
    first, second = row["filled"]
    assert first + second and row["sequence"] == f"M{first}AY{second}L"


def test_beam_search(run: Plm, ankh: str, prompts: str) -> None:
    argv = ("--temperature", "0", "--num-beams", "4", "--num-samples", "2", "--length-penalty", "0.5")
    code, out, _ = run("generate", prompts, "-m", ankh, *argv, "--early-stopping", "never", "--min-length", "3")
    expected = plm.generate(
        plm.load(ankh),
        list(PROMPTS.values()),
        temperature=0,
        num_beams=4,
        num_samples=2,
        length_penalty=0.5,
        early_stopping="never",
        min_length=3,
    )
    assert code == 0 and out == as_fasta(list(PROMPTS), expected)


def test_translation(run: Plm, prostt5: str, tmp_path: Path) -> None:
    """3Di states are lower case to ProstT5; Foldseek writes them in capitals."""
    model = plm.load(prostt5)
    code, out, _ = run("generate", SEQUENCE, "-m", prostt5, "--task", "aa2fold", "--seed", "2", "-q")
    assert code == 0 and out == as_fasta(["1"], plm.generate(model, SEQUENCE, task="aa2fold", seed=2))
    states = out.splitlines()[1]
    assert states.islower() and len(states) == len(SEQUENCE)
    back = as_fasta(["a"], plm.generate(model, states, task="fold2aa", seed=2))
    for text, notes in ((states, 0), (states.upper(), 1)):
        (tmp_path / "in.fasta").write_text(f">a\n{text}\n")
        code, out, err = run("generate", "in.fasta", "-m", prostt5, "--task", "fold2aa", "--seed", "2")
        assert (code, out, err.count("Note: ")) == (0, back, 1 + notes)  # one is on the size of the cache
    assert err.startswith("Note: 22 uppercase letters lower-cased")
    assert run("generate", states, "-m", prostt5, "--task", "fold2aa", "--seed", "2").out == back.replace(">a", ">1")


def test_rare_letters_are_told(run: Plm, tmp_path: Path) -> None:
    folder = save_tiny_t5(tmp_path / "prott5_tiny", PROTT5)
    code, out, err = run("generate", "MUKB_Z", "-m", folder, "--format", "jsonl")
    told = "3 letters U, Z, O or B read as X, as the model's authors do"
    assert code == 0 and f"Note: {told}\n" in err and told in read_jsonl(out)[0]["changes"]


def test_summary_as_json(run: Plm, ankh: str, prompts: str) -> None:
    argv = ("--num-samples", "2", "--length", "15", "--residues-only", "--seed", "4", "--json", "--quiet")
    code, out, err = run("generate", prompts, "-m", ankh, "-o", "out.fasta", *argv)
    summary = json.loads(out)
    assert (code, err) == (0, "") and summary.pop("seconds") > 0 and summary.pop("tokens_per_second") > 0
    tokens = 2 * sum(15 - len(prompt) for prompt in PROMPTS.values())
    assert summary == {
        "prompts": 3,
        "samples": 6,
        "tokens": tokens,
        "device": "cpu",
        "dtype": "float32",
        "model": "ankh_tiny",
        "revision": None,
        "output": "out.fasta",
        "changes": [],
        "failed": [],
        "seed": 4,
    }


# -- what cannot be done: exit 2 before anything is computed


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--num-beams", "2"), "beam search draws nothing"),
        (("--num-beams", "2", "--num-samples", "3", "--temperature", "0"), "2 beams hold no 3 samples"),
        (("--temperature", "0", "--top-k", "3"), "leave out top_k and top_p"),
        (("--temperature", "0", "--num-samples", "2"), "would be the same"),
        (("--temperature", "nan"), "temperature must be above 0"),
        (("--temperature", "-1"), "--temperature"),
        (("--top-p", "0"), "--top-p"),
        (("--repetition-penalty", "0"), "--repetition-penalty"),
        (("-o", "out.npz"), "names no layout"),
        (("--json",), "give the sequences a file"),
    ],
)
def test_settings_that_contradict_each_other(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], told: str
) -> None:
    no_model_is_loaded(monkeypatch)
    code, out, err = run("generate", SEQUENCE, "-m", "ankh3-large", *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm generate" in err
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--length", "22"), "the prompt has 22 residues already"),
        (("--length", "30", "--max-length", "9"), "takes the place of max_length"),
        (("--min-length", "9", "--max-length", "8"), "min_length must not be above it"),
        (("--max-length", "1"), "must be at least 2"),
        (("--ban", "J"), "banned token 'J' is not in the vocabulary"),
        (("--task", "s2s"), "Invalid value for --task: task 's2s' is unknown; ankh_tiny has no tasks"),
        (("--dtype", "float16"), "Invalid value for --dtype: dtype float16 cannot be used"),
    ],
)
def test_settings_that_contradict_the_model_or_a_prompt(
    run: Plm, ankh: str, tmp_path: Path, argv: tuple[str, ...], told: str
) -> None:
    code, out, err = run("generate", SEQUENCE, "-m", ankh, "-o", "out.fasta", *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm generate" in err
    assert outputs(tmp_path) == []


def test_models_that_do_not_write(run: Plm, tmp_path: Path) -> None:
    encoder = save_tiny_t5(tmp_path / "encoder", ANKH, decoder_layers=0)
    for folder in (ESM2, save_tiny_bert(tmp_path / "bert"), encoder):
        code, out, err = run("generate", SEQUENCE, "-m", folder)
        assert (code, out) == (2, "") and f"{Path(folder).name} writes no sequences" in err


def test_tasks(run: Plm, prostt5: str, tmp_path: Path) -> None:
    """A task that the model has not; and one whose token only the checkpoint's own files tell."""
    code, _, err = run("generate", SEQUENCE, "-m", prostt5, "--task", "nlu")
    assert code == 2 and "--task" in err and "prostt5_tiny has the tasks aa2fold, fold2aa" in err
    ankh3 = save_tiny_t5(tmp_path / "ankh3_tiny", ANKH3)
    code, _, err = run("generate", SEQUENCE, "-m", ankh3, "--task", "s2s")
    assert code == 2 and "--task" in err and "tokenizer.json" in err
    assert run("generate", SEQUENCE, "-m", ankh3, "--task", "none").code == 0


# -- bad prompts: exit 4


@pytest.mark.parametrize(
    ("data", "argv", "told"),
    [
        (b">a\nMKT\n>b\nMK\nTJ\n", (), "in.fasta: line 3, record 2 'b': character 'J' at position 4"),
        (b">a\nM_A<extra_id_0>K\n", (), "line 1, record 1 'a': gaps written in two ways"),
        (b">a\nMKT\n>b\n", (), "record 2 'b': empty sequence"),
    ],
)
def test_bad_prompts(run: Plm, ankh: str, tmp_path: Path, data: bytes, argv: tuple[str, ...], told: str) -> None:
    (tmp_path / "in.fasta").write_bytes(data)
    code, out, err = run("generate", "in.fasta", "-m", ankh, "-o", "out.fasta", *argv)
    assert (code, out) == (4, "") and told in err
    assert outputs(tmp_path, "in.fasta") == []


def test_a_translation_has_no_gaps(run: Plm, prostt5: str) -> None:
    code, _, err = run("generate", "M_A", "-m", prostt5, "--task", "aa2fold")
    assert code == 4 and "a translation has no gaps" in err


# -- whole or not at all


def test_an_old_output_stays_until_the_new_one_is_complete(
    run: Plm, ankh: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "out.fasta"
    old.write_text("precious")
    with monkeypatch.context() as patch:
        no_model_is_loaded(patch)
        code, _, err = run("generate", prompts, "-m", ankh, "-o", "out.fasta")
        assert code == 4 and "exists already" in err
        code, _, err = run("generate", prompts, "-m", ankh, "-o", prompts, "--overwrite")
        assert code == 2 and "is the input" in err
    with monkeypatch.context() as patch:
        stop_after_the_first(patch)
        argv = ("-o", "out.fasta", "--overwrite", "--max-tokens", "1", "--quiet")
        assert run("generate", prompts, "-m", ankh, *argv) == (130, "", "Error: interrupted\n")
    assert outputs(tmp_path, "in.fasta") == ["out.fasta"] and old.read_text() == "precious"
    assert run("generate", prompts, "-m", ankh, "-o", "out.fasta", "--overwrite").code == 0
    assert old.read_text().startswith(">P1_1 ")


def stop_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when the second prompt's samples are finished."""
    from plm.generation import complete

    done = iter([complete])

    def interrupted(*given: Any) -> Any:
        if (go_on := next(done, None)) is None:
            raise KeyboardInterrupt
        return go_on(*given)

    monkeypatch.setattr("plm.generation.complete", interrupted)


def test_what_is_not_a_number_is_not_written(
    run: Plm, ankh: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plm.generation.Sample.ll_sum", float("nan"))
    code, out, err = run("generate", prompts, "-m", ankh)
    assert (code, out) == (5, "") and "P2_1: ll_sum is nan; check the weights with `plm verify`" in err
    assert outputs(tmp_path, "in.fasta") == []


def test_folded_states_are_refused(run: Plm, prostt5: str, tmp_path: Path) -> None:
    """Lower case are structure states to ProstT5; read as residues they would be another protein."""
    (tmp_path / "states.fasta").write_text(">a\ndvlvvcq\n")
    result = run("generate", "states.fasta", "-m", prostt5, "--temperature", "0")
    assert result.code == Code.USAGE and "--task fold2aa" in result.err
    assert run("generate", "states.fasta", "-m", prostt5, "--temperature", "0", "--task", "fold2aa").code == Code.DONE
