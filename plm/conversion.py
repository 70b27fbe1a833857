"""Checkpoints from one published form into another, tensor for tensor."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from plm.loading import Opened, choose_dtype, locate, open_checkpoint
from plm.models.esm import ESM, Config, zero_mask_row
from plm_weights import CheckpointError, export_weights, write_fair_esm, write_safetensors
from plm_weights import esm as published

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
    """Write the weights of ``source`` in another form. No number changes, unless ``dtype`` says so.

    Args:
        source: anything ``load`` takes.
        target: a folder; for ``to="original"`` the ``.pt`` file, beside which the contact regression is put.
        to: "plm" (this library's names, fused projections), "transformers" (what ``EsmForMaskedLM`` reads), or
            "original" (what fair-esm's ``load_model_and_alphabet_local`` reads; its file name must begin as fair-esm
            wants it, esm2... or esm1...).
        dtype: None keeps what is stored. The rotary frequencies always stay float32.

    Returns: the files written.
    Raises:
        CheckpointError: the source is unusable, has a tensor with a NaN or an infinity, or does not fit the form.
        FileExistsError: ``target`` already holds a checkpoint.
    """
    if to not in get_args(Form):
        raise ValueError(f"form {to!r} is unknown; choose 'plm', 'transformers' or 'original'")
    target = Path(target)
    taken = target if to == "original" else target / "model.safetensors"
    if taken.exists():
        raise FileExistsError(f"{taken} exists; remove it or choose another target")
    path, _ = locate(source, revision=revision, offline=offline)
    opened = open_checkpoint(path)
    state = read_state(opened)
    if opened.layout == "fair" and to != "original":
        state = zero_mask_row(state, opened.config)
    if dtype is not None:
        precision = choose_dtype(dtype, torch.device("cpu"))
        state = {k: v if k == "frequencies" else v.to(precision) for k, v in state.items()}
    return WRITERS[to](state, opened.config, target)


def read_state(opened: Opened) -> dict[str, Tensor]:
    """Every tensor under this library's names.

    Raises: CheckpointError naming all tensors that are not finite.
    """
    with torch.device("meta"):
        want = ESM(opened.config).state_dict()
    state = opened.state(want)
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{opened.tensors.files[0]} has NaN or infinite values in {', '.join(sorted(broken))}")
    return state


def to_plm(state: Mapping[str, Tensor], config: Config, folder: Path) -> list[Path]:
    """This library's own form."""
    settings = {"format": "plm", "family": "esm", "config": asdict(config)}
    return write_folder(folder, {"config.json": json.dumps(settings, indent=2) + "\n"}, state)


def to_transformers(state: Mapping[str, Tensor], config: Config, folder: Path) -> list[Path]:
    """What the hub holds, less what nobody reads (position_ids, ESM-2's unused position table)."""
    rows = published.hub_rows(rotary=config.learned_positions is None, contact_head=config.contact_head)
    dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
    return write_folder(folder, published.hub_files(asdict(config), dtype), export_weights(rows, state))


def to_original(state: Mapping[str, Tensor], config: Config, target: Path) -> list[Path]:
    """fair-esm's ``.pt`` file and its contact regression."""
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = published.fair_rows(rotary=config.learned_positions is None, contact_head=config.contact_head)
    write_fair_esm(target, export_weights(rows, state), asdict(config))
    regression = target.with_name(f"{target.stem}-contact-regression.pt")
    return [target, *([regression] if config.contact_head else [])]


WRITERS = {"plm": to_plm, "transformers": to_transformers, "original": to_original}


def write_folder(folder: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[Path]:
    """Small files first and the weights last, so that a folder with weights is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return [folder / name for name in (*texts, "model.safetensors")]
