"""What every verb does before and around the forward pass: encode, check, batch, run, and check what came out."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from plm.esmfold.model import ESMFold
from plm.layers import weights_unchanged
from plm.loading import Model, is_finite
from plm.models.proteinbert import ProteinBERT
from plm.packing import Packed, batches
from plm.sequences import Fault, InputError
from plm.tokens import Tokenizer
from plm_kernels import batch_invariant

Proteins = str | tuple[str, str]
"""Residues; or the heavy and the light chain of an antibody, also written ``HEAVY|LIGHT``."""
BAR = re.compile(r"(?<!<)\|(?!>)")  # between two chains, and not in a token such as ProGen2's <|bos|>
T = TypeVar("T")
Run = Callable[[Packed, Sequence[int]], list[Tensor]]
"""One batch, and which of the rows it holds, to one tensor per sequence."""


def as_list(model: Model, sequences: Proteins | Iterable[Proteins]) -> list[str]:
    """One sequence or many, as a list of strings, with ``|`` between the chains of a pair.

    For a model that takes pairs a tuple of two strings is one pair; else any tuple is a collection like a list. Its own
    separator as text ("[SEP]", as on IgBert's model card) is one way to write ``|``.

    Raises: TypeError for anything else, or if ``model`` is not what ``plm.load`` gives.
    """
    if not isinstance(model, Model):
        raise TypeError(f"the first argument must be a model: plm.load({model!r})")
    need_language_model(model)
    if isinstance(sequences, bytes | Mapping):
        raise TypeError(
            f"sequences must be strings; got {type(sequences).__name__}: .decode() bytes, take a dict's values()"
        )
    paired = model.tokenizer.separator is not None
    alone = isinstance(sequences, str) or (paired and isinstance(sequences, tuple) and is_pair(sequences))
    given: list[object] = [sequences] if alone else list(sequences)
    separator, texts = model.tokenizer.separator or "|", []
    for i, one in enumerate(given):
        text = "|".join(one) if isinstance(one, tuple) and is_pair(one) else one
        if not isinstance(text, str):
            raise TypeError(
                f"sequences must be strings, or pairs as tuples (heavy, light); number {i + 1} is a "
                f"{type(text).__name__}: {str(text)[:40]}"
            )
        texts.append(text.replace(separator, "|"))
    return texts


def need_language_model(model: Model) -> None:
    """Raises: ValueError if the model gives no states and no likelihoods, but structures."""
    if isinstance(model.net, ESMFold):
        raise ValueError(
            f"{model.checkpoint.name} predicts structures alone: use plm.fold, or load its language model, esm2-3b"
        )


def is_pair(value: tuple[object, ...]) -> bool:
    return len(value) == 2 and all(isinstance(chain, str) for chain in value)


def choose_task(model: Model, task: str | None) -> str | None:
    """The task whose token goes before every sequence: the first that the model has, unless told otherwise.

    Raises: ValueError if the model has no such task, or if nobody said which token it is.
    """
    tasks = model.tokenizer.tasks
    chosen = next(iter(tasks), None) if task is None else task
    if chosen is None or chosen == "none":
        return None
    if chosen not in tasks:
        has = f"has the tasks {', '.join(tasks)}" if tasks else "has no tasks: leave it out"
        raise ValueError(f"task {task!r} is unknown; {model.checkpoint.name} {has}")
    model.tokenizer.frame(chosen)  # which raises if its token is not known
    return chosen


def encode(
    model: Model,
    sequences: Sequence[str],
    *,
    task: str | None = None,
    hidden: bool = True,
    pad_to: int | None = None,
) -> list[bytes]:
    """Residue ids of every sequence, one byte each, and the separator between two chains.

    ``hidden``: whether residues may be hidden, by ``<mask>`` or by a T5's ``<extra_id_0>``. Start and end tokens, task
    prefixes and separators are never taken as text: they are not residues.

    Letters that all published recipes of a model read as X are read as X: U, Z, O and B of ProtT5, ProstT5, IgT5 and
    the BERTs, which have tokens for them that were never trained.

    ``pad_to``: the tokens that each sequence is to fill up with pads, those around it included (see `plm.context`).

    Raises:
        InputError: with every sequence that is empty, too long for the model, lacks a chain, or has a letter that the
            model does not know or a token that is no residue, and with the pairs among single chains or the reverse,
            before anything is computed.
    """
    need_language_model(model)
    tokenizer, limit = model.tokenizer, token_limit(model, pad_to)
    around = sum(map(len, tokenizer.frame(task)))
    as_x = str.maketrans(dict.fromkeys(tokenizer.rare, "X"))
    separator = b"" if tokenizer.separator is None else bytes([tokenizer.separator_id])
    foreign = foreign_tokens(tokenizer, hidden)
    odd_ones = minority(sequences)
    rows, faults = [], []

    def fault(i: int, reason: str, hint: str) -> None:
        faults.append(Fault(reason, hint, record=i + 1, id=sequences[i][:12]))

    for i, sequence in enumerate(sequences):
        chains = [chain.strip() for chain in BAR.split(sequence)]
        if not all(chains) or len(chains) > 2:
            fault(i, *chain_fault(chains))
            continue
        if i in odd_ones:
            what = "a pair among single chains" if len(chains) == 2 else "a single chain among pairs"
            fault(i, what, "give all sequences as pairs HEAVY|LIGHT, or none")
            continue
        texts = chains if separator else [sequence]  # without one, "|" is a letter that the model does not know
        parts = []
        try:
            for text in texts:
                parts.append(tokenizer.residues(text.translate(as_x), task=task))
        except ValueError as error:
            where = f"{'light' if parts else 'heavy'} chain: " if len(texts) > 1 else ""
            fault(i, f"{where}{error}", "mend or leave out the sequence")
            continue
        row = separator.join(parts)
        if any(len(part.translate(None, foreign)) < len(part) for part in parts):
            first = next(id for part in parts for id in part if id in foreign)
            hint = "give residues alone: the tokens around them are put there"
            hint += " (task='...' chooses which)" if tokenizer.tasks else ""
            hint += ", and a pair is HEAVY|LIGHT" if separator else ""
            if not tokenizer.framed:
                hint = f"give residues alone: {tokenizer.start} is put before them and {tokenizer.end} behind them"
            fault(i, f"{tokenizer.decode([first])} is no residue", hint)
        elif limit is not None and len(row) + around > limit:
            taker = model.checkpoint.name if pad_to is None else f"pad_to={pad_to}"
            hint = "cut the sequence into domains, or use ESM-2 or a T5, which have no limit"
            if pad_to is not None:
                hint = f"pad to {around} more than its residues; without pad_to (--pad-to) each has its own length"
            fault(i, f"{len(row):,} residues; {taker} takes at most {limit - around:,}", hint)
        rows.append(row)
    if faults:
        raise InputError("sequences", faults)
    return rows


def token_limit(model: Model, pad_to: int | None = None) -> int | None:
    """The most tokens that a sequence may have, those around it included; None where there is no limit."""
    return model.net.config.max_length if pad_to is None else pad_to


def foreign_tokens(tokenizer: Tokenizer, hidden: bool) -> bytes:
    """Ids that no sequence may have: what stands around or between residues, and unless ``hidden`` all but letters.

    ProteinBERT's ``<OTHER>`` is a letter: all that it has no own one for.
    """
    around = {tokenizer.start, tokenizer.end, tokenizer.separator, "<pad>", "[PAD]", "<PAD>"}
    around |= {task.prefix for task in tokenizer.tasks.values()}
    around |= {token for token in tokenizer.vocabulary if token.startswith("<|")}  # ProGen2's, and tags of its ports
    return bytes(
        i
        for i, token in enumerate(tokenizer.vocabulary)
        if token in around or (not hidden and len(token) > 1 and token != "<OTHER>")
    )


def minority(sequences: Sequence[str]) -> set[int]:
    """The pairs if most sequences are single chains, else the single chains; none if all are alike."""
    pairs = {i for i, sequence in enumerate(sequences) if BAR.search(sequence)}
    singles = set(range(len(sequences))) - pairs
    return pairs if len(pairs) < len(singles) else singles if pairs else set()


def chain_fault(chains: list[str]) -> tuple[str, str]:
    """What is wrong with the number of chains, and what to do."""
    if len(chains) == 1:
        return "the sequence is empty", "leave it out"
    if len(chains) > 2:
        return f"{len(chains)} chains", "a pair is HEAVY|LIGHT: two chains"
    missing = "no chains" if not any(chains) else "no heavy chain" if not chains[0] else "no light chain"
    return missing, "a pair is HEAVY|LIGHT with residues on both sides; give a single chain without |"


def default_max_tokens(model: Model) -> int:
    """Tokens per batch: enough to fill the machine, few enough to stay in its caches and memory.

    On a CPU the widest tensor stays below 32 MiB, from where on glibc asks the system for every tensor anew and each
    of its pages is a fault.
    """
    if model.device.type == "cuda":
        return 65_536
    widest = model.net.config.widest * (model.products or model.dtype).itemsize
    return max(1_024, min(4_096, (32 << 20) // widest))


def run(
    model: Model,
    rows: Sequence[bytes],
    forward: Run,
    *,
    task: str | None = None,
    max_tokens: int | None = None,
    pad_to: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(index, result on the CPU) of every row, as batches finish, longest rows first.

    A batch that does not fit into the device's memory is halved until it does. With ``pad_to`` every row costs as many
    tokens.

    Raises:
        FloatingPointError: a result has a NaN or an infinity.
        MemoryError: a single sequence does not fit.
    """
    budget = default_max_tokens(model) if max_tokens is None else max_tokens
    around = sum(map(len, model.tokenizer.frame(task)))
    lengths = [pad_to or len(row) + around for row in rows]
    groups = batches(lengths, budget, padded=isinstance(model.net, ProteinBERT))
    for batch, results in halved(model, groups, lambda some: _forward(model, rows, some, forward, task)):
        check_all_finite(model, batch, results)
        yield from zip(batch, results, strict=True)


def check_all_finite(model: Model, members: Sequence[int], results: Sequence[Tensor]) -> None:
    """``check_finite`` of a batch, in one look at all of it."""
    if not is_finite(torch.cat([result.flatten() for result in results])):
        for i, result in zip(members, results, strict=True):
            check_finite(model, i, result)


def check_finite(model: Model, i: int, result: Tensor) -> None:
    """Raises: FloatingPointError if the result of sequence ``i`` has a NaN or an infinity."""
    if not result.isfinite().all():
        advice = "" if model.precision == "float32" else ", or use dtype='float32'"
        raise FloatingPointError(
            f"sequence {i + 1} gave a NaN or an infinity in {model.precision}; check the weights with "
            f"`plm verify`{advice}"
        )


def halved(model: Model, groups: Iterable[list[int]], work: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
    """(group, what ``work`` makes of it) for every group; one that does not fit into memory is halved until it does.

    Nobody is to change a weight before the last group is through: each is looked at once.

    Raises: MemoryError if a single member does not fit.
    """
    pending, scope = list(groups), object()
    pending.reverse()
    while pending:
        group = pending.pop()
        try:
            with batch_invariant(model.batch_invariant), weights_unchanged(scope):
                result = work(group)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(group) == 1:
                raise MemoryError(
                    f"number {group[0] + 1} alone does not fit into the memory of {model.device}; "
                    "use dtype='bfloat16' or device='cpu', or make it shorter"
                ) from error.with_traceback(None)  # the traceback would keep the batch's tensors alive
            pending += [group[len(group) // 2 :], group[: len(group) // 2]]
            continue
        yield group, result


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. torch has an error class for the memory of CUDA devices only; for the rest there is the
    wording: of the CPU's allocators, of oneDNN, of cuBLAS, of MPS."""
    return isinstance(error, torch.OutOfMemoryError) or tells_of_memory(str(error))


def tells_of_memory(message: str) -> bool:
    """Whether an error of torch says in its words that memory ran out."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(word in message for word in words) or message in ("std::bad_alloc", "could not create a primitive")


def _forward(model: Model, rows: Sequence[bytes], some: Sequence[int], forward: Run, task: str | None) -> list[Tensor]:
    with torch.inference_mode():
        batch = model.tokenizer.pack_residues([rows[i] for i in some], task=task)
        results = forward(batch.to(model.device), some)
    return on_host(results)


def on_host(results: Sequence[Tensor]) -> list[Tensor]:
    """Each result on the CPU, in float32 at least and in memory of its own; a GPU is waited for once.

    Copies made out of inference mode are ordinary tensors that a user's own layers can be trained on. Half-precision
    results widen exactly, and then every numpy function takes them.
    """
    flat = torch.cat([result.flatten() for result in results]).to("cpu")
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if len(results) == 1:
        return [flat.view(results[0].shape)]
    parts = flat.split([result.numel() for result in results])
    return [part.clone().view(result.shape) for part, result in zip(parts, results, strict=True)]
