"""What every verb does before and around the forward pass: encode, check, batch, run, and check what came out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from plm.loading import Model
from plm.packing import Packed, batches
from plm.sequences import Fault, InputError

Run = Callable[[Packed], list[Tensor]]
"""One batch to one tensor per sequence."""


def as_list(sequences: str | Iterable[str]) -> list[str]:
    """One string or many, as a list.

    Raises: TypeError for anything else.
    """
    if isinstance(sequences, bytes | Mapping):
        raise TypeError(
            f"sequences must be strings; got {type(sequences).__name__}: .decode() bytes, take a dict's values()"
        )
    texts = [sequences] if isinstance(sequences, str) else list(sequences)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"sequences must be strings; number {i + 1} is a {type(text).__name__}")
    return texts


def encode(model: Model, sequences: Sequence[str], names: Sequence[str] | None = None) -> list[bytes]:
    """Residue ids of every sequence, one byte each.

    Raises:
        InputError: with every sequence that is empty, too long for the model, or has a letter that it does not know,
            before anything is computed.
        TypeError: ``model`` is not what ``plm.load`` gives.
    """
    if not isinstance(model, Model):
        raise TypeError(f"the first argument must be a model: plm.load({model!r})")
    limit = model.net.config.max_length
    rows, faults = [], []

    def fault(i: int, reason: str, hint: str) -> None:
        name = names[i] if names else sequences[i][:12]
        faults.append(Fault(reason, hint, record=i + 1, id=name))

    for i, sequence in enumerate(sequences):
        try:
            row = model.tokenizer.residues(sequence)
        except ValueError as error:
            fault(i, str(error), "mend or leave out the sequence")
            continue
        if not row:
            fault(i, "the sequence is empty", "leave it out")
        elif limit is not None and len(row) + 2 > limit:
            reason = f"{len(row):,} residues; {model.checkpoint.name} takes at most {limit - 2:,}"
            fault(i, reason, "cut the sequence into domains, or use ESM-2, which has no limit")
        rows.append(row)
    if faults:
        raise InputError("sequences", faults)
    return rows


def default_max_tokens(model: Model) -> int:
    """Tokens per batch: enough to fill the machine, few enough to stay in its caches and memory.

    On a CPU the widest tensor stays below 32 MiB, from where on glibc asks the system for every tensor anew and each
    of its pages is a fault.
    """
    if model.device.type == "cuda":
        return 65_536
    widest = model.net.config.feed_forward * model.dtype.itemsize
    return max(1_024, min(4_096, (32 << 20) // widest))


def run(
    model: Model, rows: Sequence[bytes], forward: Run, max_tokens: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(index, result on the CPU) of every row, as batches finish, longest rows first.

    A batch that does not fit into the device's memory is halved until it does.

    Raises:
        FloatingPointError: a result has a NaN or an infinity.
        MemoryError: a single sequence does not fit.
    """
    budget = default_max_tokens(model) if max_tokens is None else max_tokens
    pending = list(batches([len(row) + 2 for row in rows], budget))
    pending.reverse()
    while pending:
        batch = pending.pop()
        try:
            results = _forward(model, [rows[i] for i in batch], forward)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"a sequence of {len(rows[batch[0]]):,} residues does not fit into the memory of {model.device}; "
                    "use dtype='bfloat16' or device='cpu'"
                ) from error.with_traceback(None)  # the traceback would keep the batch's tensors alive
            pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            continue
        for i, result in zip(batch, results, strict=True):
            if not result.isfinite().all():
                raise FloatingPointError(
                    f"sequence {i + 1} gave a NaN or an infinity in {model.dtype}; check the weights with "
                    "`plm verify`, or use dtype='float32'"
                )
            yield i, result


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device (its own error class) or the CPU's allocator (a plain RuntimeError) ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _forward(model: Model, rows: Sequence[bytes], forward: Run) -> list[Tensor]:
    with torch.inference_mode():
        results = forward(model.tokenizer.pack_residues(rows).to(model.device))
    # Copies made out here are ordinary tensors that a user's own layers can be trained on. Half-precision results widen
    # exactly, and then every numpy function takes them.
    return [result.to("cpu", torch.promote_types(result.dtype, torch.float32), copy=True) for result in results]
