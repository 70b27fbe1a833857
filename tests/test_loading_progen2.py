"""`plm.load` of ProGen2: every published form gives the same network, and what is broken is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import equal
from safetensors.torch import load_file, save_file
from torch import Tensor

import plm
from plm.conversion import to_original
from plm.models import progen2
from plm.vocabularies import PROGEN2
from plm_weights import open_tensors
from plm_weights.progen2 import original_masks

GOLDEN = Path(__file__).parent / "golden" / "progen2"
CASES = ("half_rotary_buffers", "bin_fp16_large_vocab", "hub_port_asymmetric_vocab")
BIN = "pytorch_model.bin"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def tensors(folder: Path) -> dict[str, Tensor]:
    """As published, without the masks."""
    file = folder / (BIN if (folder / BIN).is_file() else "model.safetensors")
    return {k: x.clone() for k, x in open_tensors(file).items() if not k.endswith((".attn.bias", ".masked_bias"))}


def masks(folder: Path) -> dict[str, Tensor]:
    settings = json.loads((folder / "config.json").read_text())
    return original_masks({"layers": settings["n_layer"], "max_length": settings["n_positions"]})


def as_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / BIN)


def as_bin_with_masks(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | masks(folder), folder / BIN)


def as_legacy_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | masks(folder), folder / BIN, _use_new_zipfile_serialization=False)


def as_safetensors(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def as_safetensors_with_masks(folder: Path, state: dict[str, Tensor]) -> None:
    """As older revisions of the ports: one for each layer."""
    as_safetensors(folder, state | {name: tensor.clone() for name, tensor in masks(folder).items()})


def as_shards(folder: Path, state: dict[str, Tensor]) -> None:
    """As the large ports."""
    names = sorted(state)
    places = {name: f"model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


FORMS = (as_bin, as_bin_with_masks, as_legacy_bin, as_safetensors, as_safetensors_with_masks, as_shards)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_gives_the_same_network(
    case: Path, tmp_path: Path, form: Callable[[Path, dict[str, Tensor]], None], dtype: torch.dtype
) -> None:
    """On a CPU in float32, whatever is stored, and no number changes on the way."""
    shutil.copyfile(case / "config.json", tmp_path / "config.json")
    state = {name: tensor.to(dtype) for name, tensor in tensors(case).items()}
    form(tmp_path, state)
    model = plm.load(tmp_path, device="cpu")
    assert model.dtype == torch.float32 and not model.net.training
    assert {x.dtype for x in model.net.state_dict().values()} == {torch.float32}
    reference = plm.load(case).net.state_dict()
    assert equal(model.net.state_dict(), {name: tensor.to(dtype).float() for name, tensor in reference.items()})
    assert model.checkpoint.family == "progen2"


def test_the_published_float16_file_computes_in_float32() -> None:
    """Its masks share one memory, and their filling overflowed."""
    folder = GOLDEN / "bin_fp16_large_vocab"
    stored = open_tensors(folder / BIN)
    assert stored["transformer.h.0.attn.masked_bias"] == -torch.inf
    assert {str(x.dtype) for x in stored.meta.values()} == {"torch.float16", "torch.bool"}
    model = plm.load(folder, device="cpu")
    assert torch.equal(model.net.embed.weight, stored["transformer.wte.weight"].float())
    out = model.net(plm.Packed.from_ids([[3, 16, 4]]))
    assert out.logits.dtype == torch.float32 and out.logits.isfinite().all()


def test_as_many_rows_as_the_large_checkpoints_have(tmp_path: Path) -> None:
    """51,200, of which 30 are tokens: the rest are columns of the logits and nothing more."""
    config = progen2.Config(51200, 51200, 1, 16, 8, 2, 64, 24)
    to_original(progen2.ProGen2(config).half().state_dict(), config, tmp_path / BIN)
    model = plm.load(tmp_path, device="cpu")
    assert model.net.config == config and len(model.tokenizer.vocabulary) == 30
    batch = plm.Packed.from_ids([model.tokenizer.encode("1MKT2")])
    assert model.net(batch).logits.shape == (5, 51200)
    assert plm.verify(tmp_path).passed


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_dtype_can_be_asked_for(case: Path, dtype: str) -> None:
    model = plm.load(case, dtype=dtype)
    assert {str(x.dtype) for x in model.net.state_dict().values()} == {f"torch.{dtype}"}


def test_a_file_as_well_as_its_folder(case: Path) -> None:
    (file,) = plm.load(case).checkpoint.files
    assert equal(plm.load(file.path).net.state_dict(), plm.load(case).net.state_dict())
    assert plm.load(file.path).checkpoint.name == plm.load(case).checkpoint.name == case.name


def test_a_torn_file_is_named(case: Path, tmp_path: Path) -> None:
    (file,) = plm.load(case).checkpoint.files
    shutil.copyfile(case / "config.json", tmp_path / "config.json")
    whole = file.path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / file.name).write_bytes(whole[:cut])
        with pytest.raises(plm.CheckpointError, match=file.name.replace(".", r"\.")):
            plm.load(tmp_path)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    shutil.copyfile(GOLDEN / "bin_fp16_large_vocab" / "config.json", tmp_path / "config.json")

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save(tensors(GOLDEN / "bin_fp16_large_vocab") | {"lm_head.bias": Hostile()}, tmp_path / BIN)
    with pytest.raises(plm.CheckpointError, match=r"pytorch_model\.bin cannot be read.*Nothing in it was run"):
        plm.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fault", ["transposed", "missing", "nan", "integers"])
def test_wrong_weights_are_named(case: Path, tmp_path: Path, fault: str) -> None:
    shutil.copyfile(case / "config.json", tmp_path / "config.json")
    state, name = tensors(case), "transformer.h.1.mlp.fc_out.weight"
    if fault == "transposed":
        state[name] = state[name].T.contiguous()
    elif fault == "missing":
        del state[name]
    elif fault == "nan":
        state[name][3, 5] = torch.nan
    else:
        state[name] = state[name].int()
    as_safetensors(tmp_path, state)
    with pytest.raises(plm.CheckpointError, match=r"fc_out\.weight|feed_forward\.down\.weight"):
        plm.load(tmp_path)


def test_a_configuration_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    """Every size that a tensor or the mask has to do with."""
    case = GOLDEN / "half_rotary_buffers"
    shutil.copyfile(case / "model.safetensors", tmp_path / "model.safetensors")
    settings = json.loads((case / "config.json").read_text())
    for key, value in (("n_layer", 2), ("n_layer", 4), ("n_embd", 128), ("n_positions", 2048), ("vocab_size", 51200)):
        (tmp_path / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(plm.CheckpointError):
            plm.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(plm.CheckpointError, match=r"config\.json is missing"):
        plm.load(tmp_path)


def tokenizer_json(folder: Path, *added: str, vocabulary: tuple[str, ...] = PROGEN2) -> None:
    """As the ports have it: letters in the model, and the special ones and a fine-tuned port's own added to it."""
    special = [*vocabulary[:3], *added]
    ids = {token: i for i, token in enumerate((*vocabulary, *added))}
    root = {
        "added_tokens": [{"id": ids[token], "content": token, "special": True} for token in special],
        "model": {"type": "BPE", "vocab": {token: ids[token] for token in vocabulary}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(root))


@pytest.fixture
def port(tmp_path: Path) -> Path:
    """A port with 37 embedding rows, of which 7 are a fine-tuned model's own."""
    return Path(shutil.copytree(GOLDEN / "hub_port_asymmetric_vocab", tmp_path / "port"))


def test_a_fine_tuned_port_has_tokens_of_its_own(port: Path) -> None:
    tags = [f"<|pf0366{i}|>" for i in range(7)]
    tokenizer_json(port, *tags)
    model = plm.load(port)
    assert model.tokenizer.vocabulary == (*PROGEN2, *tags)
    ids = model.tokenizer.encode("<|pf03666|>1MK2")
    assert ids == [36, 3, 16, 14, 4]
    assert model.net(plm.Packed.from_ids([ids])).logits.shape == (5, 32)


def test_the_published_vocabulary_beside_the_weights_changes_nothing(port: Path) -> None:
    tokenizer_json(port)
    assert plm.load(port).tokenizer == plm.load(GOLDEN / "hub_port_asymmetric_vocab").tokenizer


def test_more_tokens_than_the_embedding_has_rows(port: Path) -> None:
    tokenizer_json(port, *(f"<|pf0366{i}|>" for i in range(8)))
    with pytest.raises(plm.CheckpointError, match=r"tokenizer\.json: 38 tokens, but the embedding has 37 rows"):
        plm.load(port)


def test_another_vocabulary_is_refused(port: Path) -> None:
    """That of multimolecule's port has the letters in another order."""
    tokenizer_json(port, vocabulary=(*PROGEN2[:5], *reversed(PROGEN2[5:])))
    with pytest.raises(plm.CheckpointError, match=r"tokenizer\.json is not the vocabulary .*id 5 is 'Z', wanted 'A'"):
        plm.load(port)


def test_own_form(case: Path, tmp_path: Path) -> None:
    plm.convert(case, tmp_path / "own")
    assert equal(
        load_file(tmp_path / "own" / "model.safetensors"), plm.load(case, dtype=stored_dtype(case)).net.state_dict()
    )
    assert equal(plm.load(tmp_path / "own").net.state_dict(), plm.load(case).net.state_dict())


def stored_dtype(case: Path) -> torch.dtype:
    return tensors(case)["lm_head.bias"].dtype
