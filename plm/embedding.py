"""Embeddings: one vector per residue, or one per protein."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from torch import Tensor

from plm import running
from plm.loading import Model
from plm.packing import Packed, in_order

Pool = Literal["mean", "max", "cls"]


def embed(
    model: Model,
    sequences: str | Iterable[str],
    *,
    layer: int = -1,
    pool: Pool | None = None,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """Embed one sequence or many.

    Args:
        layer: 0 are the token embeddings, ``l`` (or -1) the output of the last layer after the final norm, as in
            fair-esm's ``repr_layers`` and transformers' ``hidden_states``.
        pool: None gives a row per residue; "mean" and "max" are over the residues alone, without start and end tokens;
            "cls" is the row of the start token.
        max_tokens: tokens per batch. It changes speed and memory, and in float32 on a CPU no bit of the result.

    Returns:
        Tensors on the CPU in input order: ``[L, c]`` with exactly one row per residue, or ``[c]``. float32, or float64
        from a float64 model.

    Raises:
        InputError: empty or too long sequences, or letters the model does not know, before anything is computed.
        FloatingPointError: the model gave a NaN or an infinity.
    """
    texts = running.as_list(sequences)
    rows = running.encode(model, texts)
    return in_order(embed_rows(model, rows, layer=layer, pool=pool, max_tokens=max_tokens), len(rows))


def embed_rows(
    model: Model,
    rows: Sequence[bytes],
    *,
    layer: int = -1,
    pool: Pool | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``embed`` as a stream of (index, tensor) while batches finish, longest first; rows from ``running.encode``."""
    number = layer_number(model, layer)
    if pool is not None and pool not in get_args(Pool):
        raise ValueError(f"pool {pool!r} is unknown; choose None, 'mean', 'max' or 'cls'")
    last = number == model.net.config.layers

    def forward(batch: Packed) -> list[Tensor]:
        out = model.net(batch, logits=False, hidden_states=not last)
        return [pooled(rows, pool) for rows in batch.split(out.hidden if last else out.hidden_states[number])]

    return running.run(model, rows, forward, max_tokens)


def pooled(rows: Tensor, pool: Pool | None) -> Tensor:
    """Token rows ``[t, c]`` of one sequence to residue rows ``[t - 2, c]`` or to one vector ``[c]``."""
    residues = rows[1:-1]
    if pool is None:
        return residues
    if pool == "cls":
        return rows[0]
    precise = residues.double() if rows.dtype.itemsize == 8 else residues.float()
    return precise.mean(0) if pool == "mean" else precise.amax(0)


def layer_number(model: Model, layer: int) -> int:
    """``layer`` counted from 0, as it is written into outputs.

    Raises: ValueError if the model has no such layer.
    """
    layers = model.net.config.layers
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"{model.checkpoint.name} has layers 0 to {layers} (or -1 to {-layers - 1}); got {layer}")
    return layer % (layers + 1)
