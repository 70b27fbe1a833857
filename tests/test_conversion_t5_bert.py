"""`plm.convert` of T5 and BERT: every form gives back the published tensors, and brings its tokenizer along."""

import json
import shutil
from pathlib import Path
from typing import Any

import oracle_bert
import oracle_t5
import pytest
import torch
from checkpoints import equal
from command_line import Plm
from safetensors.torch import load_file
from test_conversion import FORMS, changed, full_disk
from torch import Tensor
from transformers import BertForMaskedLM, BertModel, T5EncoderModel, T5ForConditionalGeneration

import plm
from plm.conversion import TOKENIZER_FILES, Form
from plm.tokens import UNCONFIRMED
from plm.vocabularies import ANKH3
from plm_weights import open_tensors

GOLDEN = oracle_bert.GOLDEN.parent
BERTS, T5S = [f"bert/{name}" for name in oracle_bert.CASES], [f"t5/{name}" for name in oracle_t5.CASES]
WEIGHTS = {"plm": "model.safetensors", "transformers": "model.safetensors", "original": "pytorch_model.bin"}
CONFIG, HEAD_BIAS, DECODER = "config.json", "cls.predictions.bias", "cls.predictions.decoder.{}"
WORDS = "bert.embeddings.word_embeddings.weight"
# Beside a whole T5's, how it generates; beside a BERT's, a tokenizer that can be known from the family.
BESIDE = {"t5": {CONFIG, "generation_config.json"}, "bert": {CONFIG, "vocab.txt", "tokenizer_config.json"}}


@pytest.fixture(params=[*BERTS, *T5S])
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def published(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def with_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a ``.bin`` file has them: spelled out, independently of the key maps."""
    names = {}
    if "shared.weight" in tensors:
        names["encoder.embed_tokens.weight"] = "shared.weight"
    if "decoder.final_layer_norm.weight" in tensors:
        names |= {"decoder.embed_tokens.weight": "shared.weight", "lm_head.weight": "shared.weight"}
    if HEAD_BIAS in tensors:
        names |= {DECODER.format("bias"): HEAD_BIAS, DECODER.format("weight"): WORDS}
    return {copy: tensors[name] for copy, name in names.items()} | tensors  # with Ankh's own head in place of a copy


def keep_encoder(tensors: dict[str, Tensor]) -> None:
    """Of a T5 in float16, as ProtT5's encoder was published; of a BERT as its base class has it, with a pooler."""
    kept = {k: x.half() if "shared.weight" in tensors else x for k, x in tensors.items()}
    kept = {k: x for k, x in kept.items() if k.startswith(("shared.", "encoder.", "bert."))}
    tensors.clear()
    tensors.update(kept)


def round_trip(source: Path, folder: Path) -> dict[Form, Path]:
    """Published to ours, to transformers, to what was published."""
    folders: dict[Form, Path] = {}
    for form in FORMS:
        folders[form] = folder / form
        files = plm.convert(source, folders[form], to=form)
        assert sorted(files) == sorted(folders[form].iterdir()) and files[-1].name == WEIGHTS[form]
        source = folders[form]
    return folders


def test_there_and_back(case: Path, tmp_path: Path) -> None:
    """Every tensor bit for bit; and our network is the same from any form."""
    folders, source = round_trip(case, tmp_path), published(case)
    assert equal(published(folders["transformers"]), source)
    assert equal(open_tensors(folders["original"] / "pytorch_model.bin"), with_copies(source))
    ours = plm.load(case).net.state_dict()
    assert equal(published(folders["plm"]), ours)
    assert all(equal(plm.load(folder).net.state_dict(), ours) for folder in folders.values())


def test_an_encoder_alone_there_and_back(case: Path, tmp_path: Path) -> None:
    source = changed(case, tmp_path / "source", keep_encoder)
    folders, stored = round_trip(source, tmp_path), published(source)
    assert {x.dtype for x in stored.values()} == {torch.float16 if case.parent.name == "t5" else torch.float32}
    assert equal(published(folders["transformers"]), stored)
    assert equal(open_tensors(folders["original"] / "pytorch_model.bin"), with_copies(stored))
    assert not (folders["original"] / "generation_config.json").exists()


@pytest.mark.parametrize("form", ["transformers", "original"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "encoder"])
def test_transformers_reads_it(case: Path, tmp_path: Path, form: Form, whole: bool) -> None:
    """Nothing is missing, nothing left over but what its class has no place for; and the outputs are the source's."""
    source = case if whole else changed(case, tmp_path / "source", keep_encoder)
    plm.convert(source, tmp_path / "out", to=form)
    classes = {("t5", True): T5ForConditionalGeneration, ("t5", False): T5EncoderModel}
    kind: Any = (classes | {("bert", True): BertForMaskedLM, ("bert", False): BertModel})[case.parent.name, whole]
    theirs, found = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    unread = ("bert.pooler.", "cls.seq_relationship.") if kind is BertForMaskedLM else ()
    assert all(name.startswith(unread) for name in found["unexpected_keys"])
    direct = kind.from_pretrained(source, dtype=torch.float32)
    assert equal(theirs.state_dict(), direct.state_dict())
    ids = torch.tensor([[5, 6, 7, 1]])
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind is T5ForConditionalGeneration else {})
    assert torch.equal(theirs(**given)[0], direct(**given)[0])
    as_stored = kind.from_pretrained(tmp_path / "out", dtype="auto").dtype
    assert as_stored == (torch.float16 if kind is T5EncoderModel else torch.float32)


def test_copies_take_no_room(case: Path, tmp_path: Path) -> None:
    """In a ``.bin`` file, tensors that are one have one storage."""
    tensors = torch.load(plm.convert(case, tmp_path / "out", to="original")[-1])
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors.values()}
    assert sum(storages.values()) == sum(x.nbytes for x in published(case).values())


@pytest.mark.parametrize("form", FORMS)
def test_dtype(case: Path, tmp_path: Path, form: Form) -> None:
    """float16 is a way to store a T5, though not one to compute in."""
    *_, file = plm.convert(case, tmp_path / "out", to=form, dtype="float16")
    assert {x.dtype for x in open_tensors(file).values()} == {torch.float16}
    told = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert told.get("torch_dtype", "float16") == "float16"
    assert plm.load(tmp_path / "out", dtype="float32").dtype == torch.float32
    if case.parent.name == "t5":
        with pytest.raises(ValueError, match="dtype float16 cannot be used"):
            plm.load(tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("form", FORMS)
def test_the_tokenizer_comes_along_unchanged(case: Path, tmp_path: Path, form: Form) -> None:
    """Byte for byte, whatever is in it; only these files, and before what the family would write."""
    source = tmp_path / "source"
    shutil.copytree(case, source)
    added = {name: f"\x00{name}\r\n\xff".encode("latin-1") for name in TOKENIZER_FILES}
    for name, content in {**added, "README.md": b"mine", "training_args.bin": b"mine"}.items():
        (source / name).write_bytes(content)
    files = plm.convert(source, tmp_path / "out", to=form)
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert {name: (tmp_path / "out" / name).read_bytes() for name in added} == added
    own = {CONFIG} if form == "plm" else BESIDE[case.parent.name]
    assert {file.name for file in files} == {*added, *own, WEIGHTS[form]}


@pytest.mark.parametrize("form", ["transformers", "original"])
def test_a_vocabulary_is_written_where_the_family_has_one(case: Path, tmp_path: Path, form: Form) -> None:
    source = changed(case, tmp_path / "source", lambda tensors: None)
    files = plm.convert(source, tmp_path / "out", to=form)
    assert {file.name for file in files} == {*BESIDE[case.parent.name], WEIGHTS[form]}
    if case.parent.name == "bert":
        assert (tmp_path / "out" / "vocab.txt").read_bytes() == (case / "vocab.txt").read_bytes()


@pytest.mark.filterwarnings("ignore::plm.loading.LicenceNotice")
def test_what_an_ankh3_can_be_asked_for_survives(tmp_path: Path) -> None:
    """Which id its tasks have is in its tokenizer.json alone."""
    twin = oracle_t5.Twin(2, 1, 24, 3, 8, 40, "gated-silu", "false", vocabulary=len(ANKH3))
    oracle_t5.save(oracle_t5.hub_twin(twin), twin, tmp_path)
    unconfirmed = iter(["[S2S]", "[CLM]", "[NLU]", "[NLG]", *"XUBZ"])
    pieces = [[next(unconfirmed) if UNCONFIRMED.fullmatch(text) else text, 0.0] for text in ANKH3]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": pieces}}))
    wanted = plm.load(tmp_path).tokenizer.encode("MKX", task="nlu")
    assert wanted[0] == 5
    for folder in round_trip(tmp_path, tmp_path / "out").values():
        assert plm.load(folder).tokenizer.encode("MKX", task="nlu") == wanted


def test_old_names_become_new_ones(tmp_path: Path) -> None:
    """gamma, beta and the buffers of a file from TensorFlow; the copies are those that a ``.bin`` file has today."""
    model = oracle_bert.hub_twin(oracle_bert.Twin(2, 32, 4, 48))
    oracle_bert.save_legacy(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    files = plm.convert(tmp_path, tmp_path / "out", to="original")
    assert equal(open_tensors(files[-1]), {k: x for k, x in model.state_dict().items() if "position_ids" not in k})


@pytest.mark.parametrize("form", FORMS)
def test_from_shards(tmp_path: Path, form: Form) -> None:
    twin = oracle_t5.Twin(2, 1, 24, 3, 8, 40, "relu")
    model = oracle_t5.hub_twin(twin)
    oracle_t5.save(model, twin, tmp_path, "bin shards")
    (tmp_path / "spiece.model").write_bytes(b"\n\x00")
    folder = plm.convert(tmp_path, tmp_path / "out", to=form)[-1].parent
    assert (folder / "spiece.model").read_bytes() == b"\n\x00"
    (folder / "spiece.model").unlink()
    ours = plm.convert(folder, tmp_path / "hub", to="transformers")[-1]
    assert equal(load_file(ours), oracle_t5.unique(model))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_replaced(case: Path, tmp_path: Path, form: Form) -> None:
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(case, source)
    (source / "special_tokens_map.json").write_text("{}")
    for name in (CONFIG, WEIGHTS[form], "special_tokens_map.json"):
        target.mkdir()
        (target / name).write_text("mine")
        with pytest.raises(FileExistsError, match=rf"{name} would be replaced; remove it or choose another target"):
            plm.convert(source, target, to=form)
        assert [(path.name, path.read_text()) for path in target.iterdir()] == [(name, "mine")]
        shutil.rmtree(target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [10, 20_000], ids=["first file", "last file"])
def test_a_full_disk_leaves_nothing_behind(case: Path, tmp_path: Path, form: Form, size: int) -> None:
    with full_disk(size), pytest.raises(OSError, match=r"could not be written: .*[Ff]ile too large"):
        plm.convert(case, tmp_path / "new" / "folder", to=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
def test_a_folder_is_wanted(case: Path, tmp_path: Path, form: Form, name: str) -> None:
    """One file does not make a T5 or a BERT: its config.json has to lie beside it."""
    with pytest.raises(NotADirectoryError, match=rf"{name} is named like a file.*give a folder"):
        plm.convert(case, tmp_path / name, to=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_is_not_converted(case: Path, tmp_path: Path, form: Form) -> None:
    name = sorted(published(case))[5]
    source = changed(case, tmp_path / "broken", lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(plm.CheckpointError, match="has NaN or infinite values in"):
        plm.convert(source, tmp_path / "out", to=form)
    assert not (tmp_path / "out").exists()


def test_files_are_as_readable_as_any_other(case: Path, tmp_path: Path) -> None:
    for folder in round_trip(case, tmp_path).values():
        assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1


def test_on_the_command_line(case: Path, run: Plm) -> None:
    assert run("convert", str(case), "back", "--to", "original").code == 0
    assert equal(open_tensors(Path("back") / "pytorch_model.bin"), with_copies(published(case)))
