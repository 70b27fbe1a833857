"""What is known of proteins like this one: probabilities of Gene Ontology terms, from ProteinBERT's global track."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from plm import running
from plm.context import Context, check_padding
from plm.loading import Model
from plm.models.proteinbert import ProteinBERT
from plm.packing import Packed, in_order


def annotate(
    model: Model,
    sequences: str | Iterable[str],
    *,
    annotations: Tensor | None = None,
    pad_to: int | None = None,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """Probability of every annotation that a ProteinBERT was trained to tell, by the index of its output.

    Which GO term an index of the published checkpoint stands for is not public: its authors lost the list. Who has a
    table reads it with ``plm.read_terms``. The probabilities are each for themselves and do not add up to 1.

    Args:
        annotations: ``[sequences, a]``: 1 for what is known of a protein already, 0 for the rest. None: nothing is.
        pad_to: tokens of every protein with its pads, as ``plm.embed``; 512 gives the original's numbers at
            ``seq_len=512``.
        max_tokens: tokens per batch; speed and memory, and the last bits, as ``plm.embed``.

    Returns: one tensor ``[a]`` per sequence on the CPU, in input order; float32, or float64 from a float64 model.
    Raises:
        ValueError: the model is no ProteinBERT, ``pad_to`` holds no residue, or annotations of another shape.
        InputError, FloatingPointError: as ``plm.embed``.
    """
    texts = running.as_list(model, sequences)
    annotating(model)
    check_padding(model, pad_to)
    rows = running.encode(model, texts, pad_to=pad_to)
    found = annotate_rows(model, rows, annotations=annotations, pad_to=pad_to, max_tokens=max_tokens)
    return in_order(found, len(rows))


def annotate_rows(
    model: Model,
    rows: Sequence[bytes],
    *,
    annotations: Tensor | None = None,
    pad_to: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``annotate`` as a stream of (index, tensor) while batches finish, longest first; rows from ``running.encode``."""
    net, context = annotating(model), Context.of(model, len(rows), pad_to, annotations)

    def forward(batch: Packed, members: Sequence[int]) -> list[Tensor]:
        logits = net.annotation_head(context.encode(batch, members, global_=True).global_)
        return list(logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid())

    return running.run(model, rows, forward, max_tokens=max_tokens, pad_to=pad_to)


def annotating(model: Model) -> ProteinBERT:
    """The network of a model that annotates. Raises: ValueError for another."""
    if isinstance(model.net, ProteinBERT):
        return model.net
    raise ValueError(f"{model.checkpoint.name} predicts no annotations; use a ProteinBERT")


def ranked(probabilities: Tensor, *, top: int | None = None, least: float = 0.0) -> list[int]:
    """Indices of the most probable outputs ``[a]``, most probable first, and of equal ones the first first.

    Args:
        top: how many; None for all.
        least: leave out what is less probable.
    """
    order = probabilities.argsort(descending=True, stable=True)
    order = order[probabilities[order] >= least]
    found: list[int] = order[:top].tolist()
    return found
