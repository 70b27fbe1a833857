"""How well a model likes variants of a protein, against the protein itself."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from plm import mutations, prefix, running
from plm.context import Context, check_padding
from plm.loading import Model
from plm.models.esm import ESM
from plm.models.progen2 import ProGen2
from plm.models.proteinbert import ProteinBERT
from plm.models.t5 import T5
from plm.packing import Packed, batches
from plm.running import Proteins
from plm.scoring import hidden_logits, score_rows
from plm.sequences import Fault, InputError

How = Literal["auto", "masked-marginals", "wt-marginals", "pseudo-ppl", "pseudo-ppl-published", "likelihood"]
MARGINALS = ("masked-marginals", "wt-marginals")
ANY_LENGTH = ("pseudo-ppl", "likelihood")
INDELS = "score insertions and deletions with how='pseudo-ppl' (--how pseudo-ppl), or with a ProGen2"
WITH_PROGEN2 = "score insertions and deletions with a ProGen2, or with an ESM and how='pseudo-ppl'"


def variants(
    model: Model,
    wild_type: Proteins,
    variants: str | Iterable[str],
    *,
    how: How = "auto",
    offset: int = 1,
    task: str | None = None,
    pad_to: int | None = None,
    max_tokens: int | None = None,
) -> list[float]:
    """Score variants of a protein: a difference of natural logarithms, above 0 where the model prefers the variant.

    With ``x`` the wild type, ``y`` the variant, and sums over the positions ``i`` in which they differ:

    - *masked-marginals*, the default of masked models (Meier et al. 2021, the best of theirs): one pass for each such
      position, which alone is hidden, so that several changes add up.

          sum of  log p(y_i | x without x_i) - log p(x_i | x without x_i)

    - *wt-marginals* (the same): one pass in all, nothing hidden. ProteinBERT's default and only one: it has no token
      that hides a residue.

          sum of  log p(y_i | x) - log p(x_i | x)

    - *pseudo-ppl*: the pseudo-log-likelihoods of ``plm.score``, a pass for each residue of each variant; sums over all
      residues. It takes variants of any length.

          sum of  log p(y_i | y without y_i)  -  sum of  log p(x_i | x without x_i)

    - *pseudo-ppl-published*: what fair-esm's ``predict.py`` computes under that name, to compare with its numbers. It
      hides residue ``i`` and asks for residue ``i + 1`` there, for ``i`` from 1 to L - 2. ``predict.py`` prints the
      variant's sum alone, which differs from this by the wild type's.

    - *likelihood*, ProGen2's one and default (Nijkamp et al. 2023): the log-likelihood of ``plm.score``, the mean of
      both directions. It takes variants of any length; a longer one has more terms. What a variant shares with the wild
      type is read once.

          log p(y) - log p(x)

    ESM and BERT take the softmax over their whole vocabulary, as fair-esm does; T5 over all but special tokens, with a
    sentinel in place of a hidden residue; ProGen2 over the letters. The wild type itself scores 0. For an ensemble, as
    of the five ESM-1v, average the scores of its models.

    Args:
        wild_type: residues, or a pair as ``plm.embed`` takes it.
        variants: one or many, as "A24T", "A24T:K30E", "K30del", "A24_K25insGG" or a whole sequence; `plm.mutations`
            says it all. "WT" is the wild type.
        how: "auto" is the default of the model's kind.
        offset: the number of the wild type's first residue.
        task, pad_to: as ``plm.embed``.
        max_tokens: tokens per batch; speed and memory, not results.

    Returns: one score per variant, in input order.
    Raises:
        InputError: with every variant that cannot be read, does not match the wild type, or is nothing that the model
            or ``how`` takes, before anything is computed.
        ValueError: the model cannot do it in this way.
    """
    texts = running.as_list(model, wild_type)
    names = [variants] if isinstance(variants, str) else list(variants)
    how, task = choose_how(model, how), running.choose_task(model, task)
    if len(texts) != 1:
        raise TypeError(f"the wild type is one sequence or pair; got {len(texts)}")
    wild_type = "".join(texts[0].split())
    check_padding(model, pad_to)
    first, rows = encode(model, wild_type, names, how=how, offset=offset, task=task, pad_to=pad_to)
    found = dict(variant_rows(model, first, rows, how=how, task=task, pad_to=pad_to, max_tokens=max_tokens))
    return [found[i] for i in range(len(rows))]


def choose_how(model: Model, how: How) -> How:
    """The way that "auto" means for a model. Raises: ValueError if there is none such, or the model cannot do it."""
    if how not in get_args(How):
        raise ValueError(f"how={how!r} is unknown; choose {', '.join(map(repr, get_args(How)))}")
    name, net = model.checkpoint.name, model.net
    if isinstance(net, ProGen2):
        if how not in ("auto", "likelihood"):
            raise ValueError(
                f"{name} reads in one direction and hides nothing, so it has no {how}; choose 'likelihood'"
            )
        return "likelihood"
    if isinstance(net, ProteinBERT):
        if how not in ("auto", "wt-marginals"):
            why = "no likelihood" if how == "likelihood" else f"no token that hides a residue, so it has no {how}"
            raise ValueError(f"{name} has {why}; choose 'wt-marginals'")
        return "wt-marginals"
    if how == "likelihood":
        raise ValueError(f"{name} has no likelihood; choose 'pseudo-ppl', or a ProGen2")
    if how == "pseudo-ppl-published" and not isinstance(net, ESM):
        raise ValueError(f"pseudo-ppl-published is fair-esm's, for its models, and {name} is none; choose 'pseudo-ppl'")
    if isinstance(net, T5):
        if how == "wt-marginals":
            raise ValueError("a T5 says nothing of residues that are not hidden; choose 'masked-marginals'")
        net.need_decoder()
    elif net.lm_head is None:
        raise ValueError(f"{name} has no language-model head, so it gives no probabilities")
    return "masked-marginals" if how == "auto" else how


def encode(
    model: Model,
    wild_type: str,
    names: Sequence[str],
    *,
    how: How,
    offset: int = 1,
    task: str | None = None,
    pad_to: int | None = None,
) -> tuple[bytes, list[bytes]]:
    """Residue ids of the wild type, and of every variant.

    Raises: InputError as ``variants``.
    """
    (first,) = running.encode(model, [wild_type], task=task, hidden=False, pad_to=pad_to)
    texts, faults = mutations.read(wild_type, names, offset)
    good = sorted(set(range(len(names))) - {fault.record - 1 for fault in faults})
    rows = []
    try:
        rows = running.encode(model, [texts[i] for i in good], task=task, hidden=False, pad_to=pad_to)
    except InputError as error:
        places = [good[fault.record - 1] for fault in error.faults]
        faults += [replace(each, record=i + 1, id=names[i]) for i, each in zip(places, error.faults, strict=True)]
    wanted = chain_lengths(wild_type)
    for i in good if how not in ANY_LENGTH else ():
        if (count := chain_lengths(texts[i])) != wanted:
            reason = f"{count} residues, the wild type has {wanted}; {how} takes equal lengths"
            hint = WITH_PROGEN2 if isinstance(model.net, ProteinBERT) else INDELS
            faults.append(Fault(reason, hint, record=i + 1, id=names[i]))
    if faults:
        raise InputError("variants", sorted(faults, key=lambda fault: fault.record))
    return first, rows


def chain_lengths(text: str) -> str:
    """Residues of a sequence, or of either chain of a pair, in words."""
    return " and ".join(str(len(chain)) for chain in text.split("|"))


def variant_rows(
    model: Model,
    wild_type: bytes,
    rows: Sequence[bytes],
    *,
    how: How,
    task: str | None = None,
    pad_to: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, float]]:
    """``variants`` as a stream of (index, score) while they are computed; rows from ``encode``, not "auto"."""
    context = Context.of(model, 1, pad_to, None)
    if how in MARGINALS:
        yield from marginals(context, wild_type, rows, how, task, max_tokens)
        return
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row, []).append(i)
    for i in places.pop(wild_type, []):
        yield i, 0.0
    if not places:
        return
    different = list(places)
    if how == "likelihood" and not model.batch_invariant:  # what variants share is read in groups of the batch
        found = prefix.likelihood_differences(model, wild_type, different, max_tokens)
    else:
        found = whole_differences(model, wild_type, different, how, task, max_tokens)
    for at, value in found:
        for i in places[different[at]]:
            yield i, value


def marginals(
    context: Context, wild_type: bytes, rows: Sequence[bytes], how: How, task: str | None, max_tokens: int | None
) -> Iterator[tuple[int, float]]:
    """Sums over the changed residues, from what is probable at each place of the wild type."""
    model = context.model
    original = torch.tensor([*wild_type])
    changed = torch.tensor([*b"".join(rows)]).view(len(rows), len(wild_type))
    which, where = (changed != original).nonzero(as_tuple=True)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    missing = torch.bincount(which, minlength=len(rows))  # places of each variant that are not in its sum yet
    for i in (missing == 0).nonzero()[:, 0].tolist():
        yield i, 0.0
    places = where.unique().tolist()
    if how == "masked-marginals":
        tables = hidden_log_probs(model, wild_type, places, task, max_tokens)
    else:
        tables = seen_log_probs(context, wild_type, places)
    for done, table in tables:
        here = torch.isin(where, torch.tensor(done))
        some, place = which[here], where[here]
        at = torch.searchsorted(torch.tensor(done), place)
        gains = table[at, changed[some, place]].double() - table[at, original[place]].double()
        sums.index_add_(0, some, gains)
        missing.index_add_(0, some, -torch.ones_like(some))
        for i in some[missing[some] == 0].unique().tolist():
            running.check_finite(model, i, sums[i])
            yield i, float(sums[i])


def whole_differences(
    model: Model, wild_type: bytes, rows: Sequence[bytes], how: How, task: str | None, max_tokens: int | None
) -> Iterator[tuple[int, float]]:
    """Log-likelihood of every row, or its pseudo-log-likelihood, less that of the wild type."""

    def totals(some: Sequence[bytes]) -> Iterator[tuple[int, float]]:
        if how != "pseudo-ppl-published":
            kind: Literal["likelihood", "pseudo-likelihood"] = (
                "likelihood" if how == "likelihood" else "pseudo-likelihood"
            )
            for i, score in score_rows(model, some, how=kind, task=task, max_tokens=max_tokens):
                yield i, score.total
            return
        for i, row in enumerate(some):
            total = torch.zeros((), dtype=torch.float64)
            for places, table in hidden_log_probs(model, row, range(len(row) - 2), task, max_tokens):
                total += table[range(len(places)), [row[place + 1] for place in places]].double().sum()
            running.check_finite(model, i, total)
            yield i, float(total)

    ((_, own),) = totals([wild_type])
    for i, total in totals(rows):
        yield i, total - own


def hidden_log_probs(
    model: Model, row: bytes, places: Sequence[int], task: str | None, max_tokens: int | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Log-probabilities ``[g, v]`` at some places (indices of ``row``), each of them hidden alone, group by group."""
    budget = running.default_max_tokens(model) if max_tokens is None else max_tokens
    before, after = model.tokenizer.frame(task)
    hidden = model.tokenizer.sentinel(0) if isinstance(model.net, T5) else model.tokenizer.mask_id
    ids = torch.tensor([*before, *row, *after])

    @torch.inference_mode()
    def hide(group: list[int]) -> Tensor:
        some = torch.tensor([len(before) + places[i] for i in group])
        copies = ids.repeat(len(some), 1)
        copies[torch.arange(len(some)), some] = hidden
        batch = Packed.from_tokens(copies.flatten(), (len(ids),) * len(some)).to(model.device)
        return log_probs(hidden_logits(model, batch, some.to(model.device), hidden)).cpu()

    groups = batches([len(ids)] * len(places), budget)
    for group, table in running.halved(model, groups, hide):
        yield [places[i] for i in group], table


def seen_log_probs(context: Context, row: bytes, places: list[int]) -> Iterator[tuple[list[int], Tensor]]:
    """The same with nothing hidden, of all places from one pass."""
    model = context.model

    def forward(batch: Packed, members: Sequence[int]) -> list[Tensor]:
        first = len(model.tokenizer.frame()[0])
        hidden = context.encode(batch, members).hidden
        return [log_probs(model.net.logits(hidden[[first + place for place in places]]))]

    for _, table in running.run(model, [row] if places else [], forward, pad_to=context.pad_to):
        yield places, table


def log_probs(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
