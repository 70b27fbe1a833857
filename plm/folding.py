"""Folding: from sequences to structures, each protein by itself and in as many pieces as memory needs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from plm import running
from plm.esmfold.chains import LINKER, RESIDUE_GAP, Chains, read_chains
from plm.esmfold.memory import needed, rows_within
from plm.esmfold.model import ESMFold, Prediction
from plm.esmfold.residues import tables
from plm.layers import weights_unchanged
from plm.loading import Model
from plm.memory import free_memory, gigabytes
from plm.packing import Packed, batches
from plm.sequences import Fault, InputError
from plm.structures import Structure

Proteins = str | tuple[str, ...]
"""Residues; several chains are written ``A:B`` or given as a tuple."""
Chunk = int | Literal["auto"] | None
Hidden = Tensor | Sequence[Tensor | None] | None
OnFailure = Callable[[int, MemoryError | FloatingPointError], None]
SHARE = 0.8  # of the free memory: the need is an estimate, and other programs want some as well
ADVICE = "cut it into domains, or use a machine with more memory"


def fold(
    model: Model,
    sequences: Proteins | Iterable[Proteins],
    *,
    recycles: int | None = None,
    chunk: Chunk = "auto",
    linker: str = LINKER,
    residue_gap: int = RESIDUE_GAP,
    hidden: Hidden = None,
    max_tokens: int | None = None,
) -> list[Structure]:
    """Predict the structure of one protein or many.

    Args:
        sequences: residues in upper case, of several chains ``"A:B"`` or ``("A", "B")``: a bare tuple is one protein,
            so put many into a list. B, J, O, U, X and Z are read as X, which gets no atoms.
        recycles: how often the network sees its own prediction; None is the checkpoint's number (3 as published).
        chunk: rows of the pairs of residues that are worked on at a time. It changes memory and speed; results by
            rounding alone. "auto" (or None) takes what fits. If memory runs out after all, smaller ones are tried.
        linker: residues between two chains, which are left out of the result; may be empty.
        residue_gap: how far apart the chains' numbers are, beyond the linker.
        hidden: bool ``[L]`` of each sequence, residues of all chains that the language model is not shown (see
            ``random_hidden``): the only way to different structures of one sequence.
        max_tokens: tokens that the language model reads at a time. It changes speed and memory.

    Returns:
        Structures in input order.

    Raises:
        ValueError: the model predicts no structures, or an argument makes no sense.
        InputError: empty chains, letters that are no residues, or proteins for which there is not enough memory,
            before anything is computed.
        MemoryError: there was less memory than there seemed to be. ``fold_rows`` goes on with other proteins.
        FloatingPointError: the model gave a NaN or an infinity.

    Source: Lin et al. 2023, "Evolutionary-scale prediction of atomic-level protein structure with a language model".
    """
    net = folding_network(model)
    texts = as_texts(sequences)
    proteins = read_proteins(texts, linker=linker, residue_gap=residue_gap, hidden=hidden)
    free = free_memory(model.device)
    large = [(i, reason) for i, one in enumerate(proteins) if (reason := too_large(net, one.length, free))]
    if large:
        raise InputError("sequences", [Fault(reason, ADVICE, record=i + 1, id=texts[i][:12]) for i, reason in large])
    found = dict(fold_rows(model, proteins, recycles=recycles, chunk=chunk, max_tokens=max_tokens))
    return [found[i] for i in range(len(proteins))]


def fold_rows(
    model: Model,
    proteins: Sequence[Chains],
    *,
    recycles: int | None = None,
    chunk: Chunk = "auto",
    max_tokens: int | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[tuple[int, Structure]]:
    """``fold`` as a stream of (index, structure), longest first; proteins from ``read_proteins``.

    ``on_failure`` is told of proteins that do not fit into memory or give a NaN, by index, and the others are folded
    nevertheless; without it, the error is raised.
    """
    net = folding_network(model)
    passes = number_of_passes(net, recycles)
    if chunk not in (None, "auto") and not whole_number(chunk, 1):
        raise ValueError(f"chunk must be a number of rows, 1 or more, or 'auto'; got {chunk!r}")
    budget = running.default_max_tokens(model) if max_tokens is None else max_tokens
    if model.device.type != "mps" and torch.is_autocast_enabled(model.device.type):
        raise ValueError("autocast would change the precision of every product unsaid; choose dtype='bfloat16' instead")
    groups = batches([one.length + 2 for one in proteins], budget)

    def fitting(group: list[int]) -> list[int]:
        """Those for which there is memory: the language model need not read others."""
        free, kept = free_memory(model.device), []
        for i in group:
            if (reason := too_large(net, proteins[i].length, free)) is None:
                kept.append(i)
                continue
            error = MemoryError(f"{proteins[i].letters[:12]}...: {reason}; {ADVICE}")
            if on_failure is None:
                raise error
            on_failure(i, error)
        return kept

    def stream() -> Iterator[tuple[int, Structure]]:
        for group in filter(None, map(fitting, groups)):
            states = stem_states(net, [proteins[i] for i in group])
            for i, state in zip(group, states, strict=True):
                try:
                    with weights_unchanged():  # while this protein folds; a caller may do what he likes between two
                        found, rows = fold_in_pieces(model, proteins[i], state, passes, chunk)
                    structure = as_structure(proteins[i], found, made_with(model, proteins[i], passes, rows))
                    check_finite(model, structure, proteins[i])
                except (MemoryError, FloatingPointError) as error:
                    if on_failure is None:
                        raise
                    on_failure(i, error)
                    continue
                yield i, structure

    return stream()


def read_proteins(
    sequences: Sequence[str],
    *,
    linker: str = LINKER,
    residue_gap: int = RESIDUE_GAP,
    hidden: Hidden = None,
) -> list[Chains]:
    """What ``fold_rows`` takes, from residues ``A:B``; arguments as of ``fold``.

    Raises:
        InputError: with every sequence that has an empty chain, a letter that is no residue, or a ``hidden`` of another
            length.
        ValueError: the linker or the gap makes no sense.
    """
    read_chains("G:G", linker=linker, residue_gap=residue_gap)  # what is wrong with these is no sequence's fault
    masks = [hidden] if isinstance(hidden, Tensor) else [None] * len(sequences) if hidden is None else list(hidden)
    if len(masks) != len(sequences):
        raise ValueError(f"hidden must be one tensor (or None) per sequence, {len(sequences)}; got {len(masks)}")
    proteins, faults = [], []
    for i, (text, mask) in enumerate(zip(sequences, masks, strict=True)):
        try:
            chains = read_chains(text, linker=linker, residue_gap=residue_gap)
            proteins.append(chains if mask is None else hide(chains, mask))
        except ValueError as error:
            faults.append(Fault(str(error), "mend or leave out the sequence", record=i + 1, id=text[:12]))
    if faults:
        raise InputError("sequences", faults)
    return proteins


def hide(chains: Chains, mask: Tensor) -> Chains:
    """The protein with residues hidden from the language model where ``mask`` ``[L]`` is true; linkers are seen."""
    residues = chains.length - int(chains.linker.sum())
    mask = torch.as_tensor(mask)
    if mask.shape != (residues,) or mask.dtype != torch.bool:
        raise ValueError(
            f"hidden must be bool and have shape [{residues}], one per residue; got {mask.dtype} and {[*mask.shape]}"
        )
    everywhere = torch.zeros(chains.length, dtype=torch.bool)
    everywhere[~chains.linker] = mask.cpu()
    return replace(chains, hidden=everywhere)


def random_hidden(protein: Proteins | Chains, share: float, generator: torch.Generator | None = None) -> Tensor:
    """``[L]`` bool: each residue of one protein with the chance ``share``, for ``fold(..., hidden=...)``.

    fold(model, [sequence] * 5, hidden=[random_hidden(sequence, 0.15) for _ in range(5)])     # five structures
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1; got {share}")
    if isinstance(protein, Chains):
        residues = protein.length - int(protein.linker.sum())
    else:
        residues = len(as_texts(protein)[0].replace(":", ""))
    return torch.rand(residues, generator=generator) < share


def as_texts(sequences: Proteins | Iterable[Proteins]) -> list[str]:
    """One protein or many, as strings ``A:B``.

    Raises: TypeError for anything else.
    """
    if isinstance(sequences, bytes | Mapping):
        kind = type(sequences).__name__
        raise TypeError(f"sequences must be strings; got {kind}: .decode() bytes, take a dict's values()")
    given: list[object] = [sequences] if isinstance(sequences, str | tuple) else list(sequences)
    texts = []
    for i, one in enumerate(given):
        chains = one if isinstance(one, tuple) and one else (one,)
        if not all(isinstance(chain, str) for chain in chains):
            raise TypeError(
                f"sequences must be strings, or tuples of chains; number {i + 1} is a {type(one).__name__}: "
                f"{str(one)[:40]}"
            )
        texts.append(":".join(map(str, chains)))
    return texts


def folding_network(model: Model) -> ESMFold:
    """Raises: TypeError for what is no model; ValueError for one that predicts no structures."""
    if not isinstance(model, Model):
        raise TypeError(f"the first argument must be a model: plm.load({model!r})")
    net: object = model.net
    if not isinstance(net, ESMFold):
        raise ValueError(f"{model.checkpoint.name} predicts no structures; load esmfold")
    return net


def check_finite(model: Model, structure: Structure, chains: Chains) -> None:
    """Raises: FloatingPointError if it has a NaN or an infinity."""
    numbers = (structure.positions, structure.plddt, structure.pae, torch.tensor(structure.ptm))
    if not all(bool(each.isfinite().all()) for each in numbers):
        advice = "" if model.dtype == torch.float32 else ", or use dtype='float32'"
        raise FloatingPointError(
            f"{chains.letters[:12]}... gave a NaN or an infinity in {model.dtype}; check the weights with `plm "
            f"verify`{advice}"
        )


def number_of_passes(net: ESMFold, recycles: int | None) -> int:
    """Of the trunk, one more than recycles."""
    if recycles is None:
        return net.config.passes
    if not whole_number(recycles, 0):
        raise ValueError(f"recycles must be a whole number, 0 or more; got {recycles!r}")
    return recycles + 1


def whole_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def too_large(net: ESMFold, length: int, free: int | None) -> str | None:
    """Why a protein (its linkers included) does not fit into free memory however small the pieces; None if it does."""
    least = needed(net, length, rows=1)
    if free is None or least <= free:
        return None
    return f"{length:,} residues with linkers need about {gigabytes(least)} of memory, and {gigabytes(free)} are free"


def stem_states(net: ESMFold, proteins: Sequence[Chains]) -> list[Tensor | None]:
    """What the language model makes of each protein, ``[l, c]``; None if all together do not fit into memory."""
    device = net.embed.weight.device
    try:
        with torch.inference_mode():
            packed = Packed.from_ids([one.stem_tokens for one in proteins], device=device)
            return [state[1:-1] for state in packed.split(net.stem_states(packed))]
    except RuntimeError as error:
        if not running.out_of_memory(error):
            raise
    return [None] * len(proteins)


def fold_in_pieces(
    model: Model, chains: Chains, states: Tensor | None, passes: int, chunk: Chunk
) -> tuple[Prediction, int]:
    """One protein, in smaller pieces whenever memory runs out, and how many rows at a time it took in the end.

    Raises: MemoryError if single rows are still too much.
    """
    net, length, name = folding_network(model), chains.length, f"{chains.letters[:12]}..."
    free = free_memory(model.device)
    if reason := too_large(net, length, free):
        raise MemoryError(f"{name}: {reason}; {ADVICE}")
    within = None if free is None else int(SHARE * free)
    rows = rows_within(net, length, within, chunk if isinstance(chunk, int) else None)
    tried: list[int] = []
    while True:
        try:
            with torch.inference_mode():
                if states is None:
                    packed = Packed.from_ids([chains.stem_tokens], device=model.device)
                    states = net.stem_states(packed)[1:-1]
                return net.fold_one(chains, states, passes, rows), rows
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not running.out_of_memory(error):
                raise
            tried.append(rows)
            if rows == 1:
                raise MemoryError(
                    f"{name}: {length:,} residues with linkers do not fit into the memory of {model.device}, tried "
                    f"with {', '.join(map(str, tried))} rows at a time; {ADVICE}"
                ) from error.with_traceback(None)  # the traceback would keep tensors alive
        rows = max(1, rows // 4)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def made_with(model: Model, chains: Chains, passes: int, rows: int) -> dict[str, object]:
    """What a structure was made with."""
    return {
        "model": model.checkpoint.name,
        "recycles": passes - 1,
        "chunk": rows,
        "linker": chains.joined_by,
        "residue_gap": chains.residue_gap,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def as_structure(chains: Chains, found: Prediction, settings: Mapping[str, object]) -> Structure:
    """What a prediction says of residues, on the CPU and in float32; linkers are left out."""
    real = ~chains.linker
    types = chains.types[real]
    fixed = tables()
    atoms = fixed.kinds_present[types].bool()
    compact = found.positions.float().cpu()[real]  # [L, 14, 3]
    positions = compact.gather(1, fixed.places[types][..., None].expand(-1, -1, 3)) * atoms[..., None]
    letters = "".join(letter for letter, keep in zip(chains.letters, real.tolist(), strict=True) if keep)
    counts = chains.chain[real].bincount().tolist()
    return Structure(
        chains=tuple(letters[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))),
        positions=positions,
        atoms=atoms,
        plddt=100 * found.plddt.float().cpu()[real],
        pae=found.pae.float().cpu()[real][:, real],
        ptm=found.ptm,
        chain=chains.chain[real],
        residue_index=chains.positions[real],
        settings=settings,
    )
