"""Checkpoints from one published form into another, tensor for tensor."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from plm.loading import choose_dtype, locate, open_checkpoint
from plm.models.esm import ESM, Config, zero_mask_row
from plm_weights import CheckpointError, export_weights, write_fair_esm, write_safetensors
from plm_weights import esm as published
from plm_weights.registry import Checkpoint

Form = Literal["plm", "transformers", "original"]


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

    Args:
        source: anything ``load`` takes.
        target: a folder; for ``to="original"`` also a ``.pt`` file, beside which the contact regression is put.
        to: "plm" (this library's names, fused projections), "transformers" (what its Esm classes read), or "original"
            (what fair-esm's ``load_model_and_alphabet_local`` reads). fair-esm tells models apart by their file names:
            that of an ESM-2 must start with esm2, and no other may. It wants a contact regression beside all but
            esm1v; a model without one is for its ``load_model_and_alphabet_core``.
        dtype: None keeps what is stored. The rotary frequencies always stay float32.

    Returns: the files written.
    Raises:
        CheckpointError: the source is unusable, has a tensor with a NaN or an infinity, or does not fit the form.
        FileExistsError: one of the files is there already; nothing is ever replaced.
        OSError: the files could not be written; nothing is left behind.
    """
    if to not in get_args(Form):
        raise ValueError(f"form {to!r} is unknown; choose 'plm', 'transformers' or 'original'")
    path, row = locate(source, revision=revision, offline=offline)
    opened = open_checkpoint(path)
    files = planned(Path(target), to, opened.config, row)
    with torch.device("meta"):
        want = ESM(opened.config).state_dict()
    state = opened.state(want)
    if opened.layout == "fair" and to != "original":
        state = zero_mask_row(state, opened.config)
    if dtype is not None:
        precision = choose_dtype(dtype, torch.device("cpu"))
        state = {k: v if k == "frequencies" else v.to(precision) for k, v in state.items()}
    WRITERS[to](state, opened.config, files[-1] if to == "original" else Path(target))
    return files


def planned(target: Path, to: Form, config: Config, row: Checkpoint | None) -> list[Path]:
    """The files that will be written, the weights last.

    Raises: FileExistsError, NotADirectoryError; CheckpointError if fair-esm has no such model.
    """
    if to == "original":
        refuse_foreign_heads(config)
        weights = target if target.suffix == ".pt" else target / original_name(config, row)
        regression = weights.with_name(f"{weights.stem}-contact-regression.pt")
        files = [regression, weights] if config.contact_head else [weights]
    else:
        texts = published.hub_files(asdict(config)) if to == "transformers" else ("config.json",)
        files = [target / name for name in (*texts, "model.safetensors")]
    if taken := [str(file) for file in files if file.exists()]:
        raise FileExistsError(f"{', '.join(taken)} would be replaced; remove it or choose another target")
    folder = files[-1].parent
    if file := next((each for each in (folder, *folder.parents) if each.is_file()), None):
        raise NotADirectoryError(f"{file} is a file where a folder is wanted; choose another target")
    return files


def refuse_foreign_heads(config: Config) -> None:
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


def original_name(config: Config, row: Checkpoint | None) -> str:
    """What fair-esm calls a checkpoint, or a name by which it knows the architecture."""
    if row and row.originals:
        return row.originals[0].name
    family = "esm2" if config.learned_positions is None else "esm1b" if config.norm_before else "esm1v"
    return f"{family}_t{config.layers}.pt"


def to_plm(state: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    """This library's own form."""
    settings = {"format": "plm", "family": "esm", "config": asdict(config)}
    write_folder(folder, {"config.json": json.dumps(settings, indent=2) + "\n"}, state)


def to_transformers(state: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    """What the hub holds, less what nobody reads (position_ids, ESM-2's unused position table)."""
    rows = published.hub_rows(rotary=config.learned_positions is None, contact_head=config.contact_head)
    dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
    write_folder(folder, published.hub_files(asdict(config), dtype), export_weights(rows, state))


def to_original(state: Mapping[str, Tensor], config: Config, path: Path) -> None:
    """fair-esm's ``.pt`` file and its contact regression."""
    rows = published.fair_rows(rotary=config.learned_positions is None, contact_head=config.contact_head)
    with made(path.parent):
        write_fair_esm(path, export_weights(rows, state), asdict(config))


WRITERS = {"plm": to_plm, "transformers": to_transformers, "original": to_original}


def write_folder(folder: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    with made(folder):
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, beside=texts)


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
