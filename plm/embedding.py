"""Embeddings: one vector per residue, or one per protein."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plm import running
from plm.context import Context, check_padding
from plm.loading import Model
from plm.models.progen2 import ProGen2
from plm.models.proteinbert import Config, ProteinBERT
from plm.packing import Packed, in_order
from plm.running import Proteins

Pool = Literal["mean", "max", "cls", "card", "global"]
Layer = int | Literal["all"]


def embed(
    model: Model,
    sequences: Proteins | Iterable[Proteins],
    *,
    layer: Layer = -1,
    pool: Pool | None = None,
    task: str | None = None,
    per_chain: bool = False,
    pad_to: int | None = None,
    annotations: Tensor | None = None,
    max_tokens: int | None = None,
) -> list[Any]:
    """Embed one sequence or many, or pairs of chains.

    ProGen2 reads "1" + residues + "2" from N to C, so a residue's row knows of those before it and of none behind it.

    ProteinBERT has a vector of the whole protein beside the rows of the residues, and takes its pads for tokens: its
    authors pad to 512 or more, and every length gives other numbers. Here a protein is not padded unless ``pad_to``
    asks for it.

    Args:
        sequences: residues; one string, or a list of them. For a model of antibody pairs (IgBert, IgT5) also
            ``(heavy, light)`` or ``"HEAVY|LIGHT"``: there, a bare tuple of two strings is one pair, so put many
            sequences into a list.
        layer: 0 are the token embeddings, ``l`` (or -1) the output of the last layer after the final norm, as in
            fair-esm's ``repr_layers`` and transformers' ``hidden_states``. Of a T5 these are the encoder's. "all", of a
            ProteinBERT, are all states behind its norms and the probabilities at its end, side by side, as its authors
            use them: 1,562 channels of the published one, or 15,599 with pool "global".
            ``model.net.config.local_slices`` and ``global_slices`` name them.
        pool: None gives a row per residue. "mean" and "max" are over the residues alone, never over start, end, prefix
            or separator; "cls" is the row of the start token, where the model has one that sees the protein. "card" is
            the mean as IgBert's model card computes it: of a pair it averages in the separator between the chains as if
            it were a residue. "global" is ProteinBERT's vector of the whole protein, after the same layer; layer 0 is
            what it makes of the annotations.
        task: what goes before the residues where a model was trained with prefixes: "nlu" (the default) or "s2s" for
            Ankh3; for ProstT5 "aa2fold" (the default), for amino acids, or "fold2aa", for 3Di states in lower case;
            "none" for no prefix.
        per_chain: give a pair as ``(heavy, light)`` instead of heavy rows followed by light rows.
        pad_to: of a ProteinBERT, tokens of every protein with its pads: 512 gives the original's numbers at
            ``seq_len=512``, for at most 510 residues. Rows are of residues all the same.
        annotations: of a ProteinBERT, ``[sequences, a]``: 1 for what is known of a protein, 0 for the rest; the
            published one has 8,943. None: nothing is known, as the authors embed.
        max_tokens: tokens per batch, with the pads that were asked for. It changes speed and memory, and in float32 on
            a CPU no bit of the result; but of a ProteinBERT the last bits (1e-6 of the largest number; with ``pad_to``
            none at the published sizes, but for the probabilities of annotations that layer "all" ends in).

    Returns:
        Tensors on the CPU in input order: ``[L, c]`` with exactly one row per residue, of a pair those of the heavy
        chain and then those of the light one; or ``[c]``. float32, or float64 from a float64 model. With ``per_chain``
        a tuple of one tensor per chain in place of each.

    Raises:
        InputError: empty or too long sequences, a missing chain, pairs mixed with single chains, or letters that the
            model does not know, before anything is computed.
        ValueError: the model has no such layer, vector, pads or annotations.
        FloatingPointError: the model gave a NaN or an infinity.
    """
    texts = running.as_list(model, sequences)
    task = running.choose_task(model, task)
    check_padding(model, pad_to)
    rows = running.encode(model, texts, task=task, pad_to=pad_to)
    found = embed_rows(
        model,
        rows,
        layer=layer,
        pool=pool,
        task=task,
        per_chain=per_chain,
        pad_to=pad_to,
        annotations=annotations,
        max_tokens=max_tokens,
    )
    results = in_order(found, len(rows))
    return [split_chains(model, *each, pool) for each in zip(results, rows, strict=True)] if per_chain else results


def embed_rows(
    model: Model,
    rows: Sequence[bytes],
    *,
    layer: Layer = -1,
    pool: Pool | None = None,
    task: str | None = None,
    per_chain: bool = False,
    pad_to: int | None = None,
    annotations: Tensor | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``embed`` as a stream of (index, tensor) while batches finish, longest first; rows from ``running.encode``.

    Pooled ``per_chain``, a tensor is ``[chains, c]``.
    """
    number = layer_number(model, layer)
    check_pool(model, pool, per_chain)
    context = Context.of(model, len(rows), pad_to, annotations)
    before, after = map(len, model.tokenizer.frame(task))

    def encode(batch: Packed, members: Sequence[int]) -> Any:
        if number != "all":
            return context.encode(batch, members, layer=number, global_=pool == "global")
        assert isinstance(model.net, ProteinBERT)  # which layer_number has made sure
        return model.net.represent(batch, **context.options(members))

    def forward(batch: Packed, members: Sequence[int]) -> list[Tensor]:
        encoded = encode(batch, members)
        if pool == "global":
            return list(encoded.global_)
        if pool == "cls":
            return [tokens[0] for tokens in batch.split(encoded.hidden)]
        if pool == "card":
            return [pooled(tokens[before : len(tokens) - after], "mean") for tokens in batch.split(encoded.hidden)]
        # One cut for all of the batch: a call of torch for each sequence would cost more than short ones do themselves.
        shapes = [[before, *with_separator(rows[i]), after] for i in members]
        pieces = iter(encoded.hidden.split([length for shape in shapes for length in shape]))
        chains = [[next(pieces) for _ in shape][1:-1] for shape in shapes]
        if pool is None:
            return [joined(parts[::2]) for parts in chains]
        if per_chain:
            return [torch.stack([pooled(part, pool) for part in parts[::2]]) for parts in chains]
        return [pooled(joined(parts[::2]), pool) for parts in chains]

    def with_separator(row: bytes) -> list[int]:
        """Tokens of the heavy chain, the separator and the light chain; or of the only chain."""
        heavy, *light = chain_lengths(model, row)
        return [heavy, 1, *light] if light else [heavy]

    return running.run(model, rows, forward, task=task, max_tokens=max_tokens, pad_to=pad_to)


def check_pool(model: Model, pool: Pool | None, per_chain: bool) -> None:
    """Raises: ValueError if it is unknown, or the model has no such vector."""
    name = model.checkpoint.name
    if pool is not None and pool not in get_args(Pool):
        raise ValueError(f"pool {pool!r} is unknown; choose None, 'mean', 'max', 'cls', 'card' or 'global'")
    if pool == "global" and not isinstance(model.net, ProteinBERT):
        raise ValueError(f"{name} has no global vector, only a ProteinBERT has; pool with 'mean' or 'max'")
    if pool == "cls" and model.tokenizer.start is None:
        raise ValueError(f"{name} has no start token; pool with 'mean' or 'max'")
    if pool == "cls" and isinstance(model.net, ProGen2):
        raise ValueError(f"the start token of {name} sees nothing of what follows it; pool with 'mean' or 'max'")
    if per_chain and pool in ("cls", "card", "global"):
        raise ValueError(f"pool {pool!r} is one vector for both chains; leave out per_chain, or choose 'mean' or 'max'")


def chain_lengths(model: Model, row: bytes) -> list[int]:
    """Residues of each chain."""
    if model.tokenizer.separator is None:
        return [len(row)]
    return [len(chain) for chain in row.split(bytes([model.tokenizer.separator_id]))]


def split_chains(model: Model, result: Tensor, row: bytes, pool: Pool | None) -> tuple[Tensor, ...]:
    """A tensor of both chains as one tensor per chain."""
    return result.split(chain_lengths(model, row)) if pool is None else result.unbind()


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def pooled(residues: Tensor, pool: Literal["mean", "max"]) -> Tensor:
    """Rows ``[L, c]`` to one vector ``[c]``, in float32 at least."""
    precise = residues.to(torch.promote_types(residues.dtype, torch.float32))
    return precise.mean(0) if pool == "mean" else precise.amax(0)


def layer_number(model: Model, layer: Layer) -> Layer:
    """``layer`` counted from 0, as it is written into outputs; or "all".

    Raises: ValueError if the model has no such layer.
    """
    layers, name = model.net.config.layers, model.checkpoint.name
    if layer == "all" and isinstance(model.net, ProteinBERT):
        return layer
    if layer == "all":
        raise ValueError(f"all layers side by side are ProteinBERT's; of {name} take one, from 0 to {layers}")
    if not isinstance(layer, int):
        raise ValueError(f"layer must be a number from 0 to {layers}, or 'all' of a ProteinBERT; got {layer!r}")
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"{name} has layers 0 to {layers} (or -1 to {-layers - 1}); got {layer}")
    return layer % (layers + 1)


def channels(model: Model, layer: Layer, pool: Pool | None) -> int:
    """How wide an embedding is."""
    config = model.net.config
    if isinstance(config, Config) and layer == "all":
        slices = config.global_slices if pool == "global" else config.local_slices
        return max(int(part.stop) for part in slices.values())
    if isinstance(config, Config) and pool == "global":
        return config.global_channels
    return config.channels
