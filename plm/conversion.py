"""Checkpoints from one published form into another, tensor for tensor."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from plm.families import CONFIGURED, FAMILIES, Config, Family
from plm.loading import Opened, locate, open_checkpoint
from plm.models import esm, proteinbert
from plm.outline import outlines
from plm.placement import choose_stored
from plm_weights import (
    CheckpointError,
    export_weights,
    write_fair_esm,
    write_proteinbert,
    write_safetensors,
    write_torch,
)
from plm_weights.registry import Checkpoint

Form = Literal["plm", "transformers", "original"]
Files = Mapping[str, str | bytes]
"""Contents of small files by name."""

NO_FILES: Files = {}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.txt",
)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Form = "plm",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> list[Path]:
    """Write the weights of ``source`` in another form: all files, or none.

    No number changes unless ``dtype`` says so, but for one row: from fair-esm's file of an ESM-1b or ESM-1v to another
    form the embedding of ``<mask>`` becomes zero, as fair-esm itself makes it on loading.

    The files of a tokenizer that lie beside the weights come along as they are (fair-esm has none): the vocabulary of
    an Ankh3 is nowhere else.

    Args:
        source: anything ``load`` takes.
        target: a folder; for an ESM and ``to="original"`` also a ``.pt`` file, beside which the contact regression is
            put.
        to: "plm" (this library's names, fused projections), "transformers" (safetensors that its classes read), or
            "original", as the authors published them:

            - ESM: what fair-esm's ``load_model_and_alphabet_local`` reads. fair-esm tells models apart by their file
              names: that of an ESM-2 must start with esm2, and no other may. It wants a contact regression beside all
              but esm1v; a model without one is for its ``load_model_and_alphabet_core``.
            - BERT and T5: ``pytorch_model.bin``, in which tied tensors have all of their names.
            - ProGen2: ``pytorch_model.bin`` with the causal masks that its authors' class stores ("transformers" stands
              for the class of the hub's ports, without them). The ports' models with more embedding than head rows have
              no such form.
            - ProteinBERT: ``weights.pkl``, the pickle of float32 arrays that protein_bert's
              ``load_pretrained_model_from_dump`` reads, without a state of the optimizer; beside it a ``config.json``,
              which it does not read, as the pickle does not tell the dilation. It has no form for transformers.
            - ESMFold: none, as its authors' file holds objects that only OmegaConf writes. It loads, and becomes one of
              the other two.
        dtype: None keeps what is stored. The rotary frequencies always stay float32. A T5 may be stored in float16, as
            ProtT5's encoder was published, but ``load`` does not compute in it.

    Returns: the files written.
    Raises:
        CheckpointError: the source is unusable, has a tensor with a NaN or an infinity, or does not fit the form.
        FileExistsError: one of the files is there already; nothing is ever replaced.
        OSError: the files could not be written; nothing is left behind.
    """
    if to not in get_args(Form):
        raise ValueError(f"form {to!r} is unknown; choose 'plm', 'transformers' or 'original'")
    stored = None if dtype is None else choose_stored(dtype)
    path, row = locate(source, revision=revision, offline=offline)
    opened = open_checkpoint(path)
    family, config, tokenizer = opened.family, opened.config, tokenizer_files(opened)
    files = planned(Path(target), to, config, row, tokenizer)
    with outlines():
        want = family.network(config).state_dict()
    state = opened.state(want)
    if to != "original":
        state = family.loaded(opened.layout, state, config)
    if stored is not None:
        state = {k: v if k in family.always_float32 else v.to(stored) for k, v in state.items()}
    WRITERS[to](state, config, files[-1] if to == "original" else Path(target), tokenizer)
    return files


def tokenizer_files(opened: Opened) -> Files:
    """Those beside the weights, where that is their place."""
    if opened.layout not in CONFIGURED:
        return NO_FILES
    beside = (opened.tensors.files[0].with_name(name) for name in TOKENIZER_FILES)
    return {file.name: file.read_bytes() for file in beside if file.is_file()}


def planned(
    target: Path, to: Form, config: Config, row: Checkpoint | None = None, tokenizer: Files = NO_FILES
) -> list[Path]:
    """The files that will be written, the weights last.

    Raises: FileExistsError, NotADirectoryError; CheckpointError if the authors' code, or transformers, has no such
    model.
    """
    family = family_of(config)
    if to == "original" and (why := family.no_original(config)):
        raise CheckpointError(f"{why}. Choose to='plm' or to='transformers'.")
    if to == "transformers" and (why := family.no_hub(config)):
        raise CheckpointError(f"{why}. Choose to='plm' or to='original'.")
    if to == "original" and isinstance(config, esm.Config):
        refuse_foreign_heads(config)
        weights = target if target.suffix == ".pt" else target / original_name(config, row)
        regression = weights.with_name(f"{weights.stem}-contact-regression.pt")
        files = [regression, weights] if config.contact_head else [weights]
    else:
        if target.suffix in (".pt", ".bin", ".safetensors", ".pkl"):
            raise NotADirectoryError(f"{target} is named like a file, but several files are written; give a folder")
        texts = {"config.json": ""} if to == "plm" else hub_files(config)
        weights = target / (family.original_file if to == "original" else "model.safetensors")
        files = [*(target / name for name in {**texts, **tokenizer}), weights]
    if taken := [str(file) for file in files if file.exists()]:
        raise FileExistsError(f"{', '.join(taken)} would be replaced; remove it or choose another target")
    folder = files[-1].parent
    if file := next((each for each in (folder, *folder.parents) if each.is_file()), None):
        raise NotADirectoryError(f"{file} is a file where a folder is wanted; choose another target")
    return files


def refuse_foreign_heads(config: esm.Config) -> None:
    """fair-esm's ESM models have a language-model head, perhaps contacts, and nothing else."""
    foreign = {
        "a pooler": config.pooler,
        "a sequence classifier": config.sequence_labels,
        "a token classifier": config.token_labels,
        "no language-model head": not config.lm_head,
    }
    if has := [what for what, there in foreign.items() if there]:
        raise CheckpointError(
            f"the checkpoint has {', '.join(has)}; fair-esm has no pooler and no classifiers, and needs a "
            "language-model head. Choose to='plm' or to='transformers'."
        )


def original_name(config: esm.Config, row: Checkpoint | None) -> str:
    """What fair-esm calls a checkpoint, or a name by which it knows the architecture."""
    if row and row.originals:
        return row.originals[0].name
    family = "esm2" if config.learned_positions is None else "esm1b" if config.norm_before else "esm1v"
    return f"{family}_t{config.layers}.pt"


def family_of(config: Config) -> Family:
    return next(family for family in FAMILIES if family.config is type(config))


def hub_files(config: Config, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What transformers wants beside weights of this dtype."""
    return family_of(config).hub_files(asdict(config), str(dtype).removeprefix("torch."))


def to_plm(state: Mapping[str, Tensor], config: Config, folder: Path, tokenizer: Files = NO_FILES) -> None:
    """This library's own form."""
    settings = {"format": "plm", "family": family_of(config).name, "config": asdict(config)}
    beside = {"config.json": json.dumps(settings, indent=2) + "\n", **tokenizer}
    with made(folder):
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"}, beside)


def to_transformers(state: Mapping[str, Tensor], config: Config, folder: Path, tokenizer: Files = NO_FILES) -> None:
    """What transformers writes: less what nobody reads (position_ids, ESM-2's unused position table), and no copies."""
    family = family_of(config)
    tensors = export_weights(family.hub_rows(config), state) | family.hub_extras()
    beside = {**hub_files(config, state["embed.weight"].dtype), **tokenizer}
    with made(folder):
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, beside)


def to_original(state: Mapping[str, Tensor], config: Config, path: Path, tokenizer: Files = NO_FILES) -> None:
    """fair-esm's ``.pt`` file and its contact regression, or a ``.bin`` or ``.pkl`` with what lies beside it."""
    family = family_of(config)
    tensors = export_weights(family.original_rows(config), state) | family.original_extras(config)
    with made(path.parent):
        if isinstance(config, esm.Config):
            write_fair_esm(path, tensors, asdict(config))
        elif isinstance(config, proteinbert.Config):
            write_proteinbert(path, tensors, config.annotations, hub_files(config))
        else:
            write_torch(path, tensors, {**hub_files(config, state["embed.weight"].dtype), **tokenizer})


WRITERS = {"plm": to_plm, "transformers": to_transformers, "original": to_original}


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder and those above it; what was not there before is removed again if writing fails."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in new:
            with suppress(OSError):  # someone else has put something there
                each.rmdir()
        raise
