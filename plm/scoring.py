"""How probable a model finds a sequence."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from plm import running
from plm.context import Context, check_padding
from plm.layers import Linear
from plm.loading import Model
from plm.models.progen2 import ProGen2
from plm.models.proteinbert import ProteinBERT
from plm.models.t5 import START, T5
from plm.outline import outlines
from plm.packing import Packed, batches
from plm.running import Proteins

MaskedHow = Literal["pseudo-likelihood", "single-pass"]
CausalHow = Literal["likelihood", "forward", "backward"]
How = Literal["auto", MaskedHow, CausalHow]


@dataclass(frozen=True, repr=False, eq=False)
class Score:
    """Natural logarithms of probabilities.

    Attributes:
        per_residue: ``[L]`` from N to C in float32 (float64 from a float64 model).
        forward, backward: the two directions that a "likelihood" averages; None where there is no such average.
    """

    per_residue: Tensor
    forward: Self | None = None
    backward: Self | None = None

    def __repr__(self) -> str:
        return f"Score(total={self.total:.4f}, mean={self.mean:.4f}, residues={len(self.per_residue)})"

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self.per_residue.double().sum())

    @property
    def mean(self) -> float:
        """``total`` over residues; no number (NaN) where there are none."""
        return self.total / len(self.per_residue) if len(self.per_residue) else float("nan")


def score(
    model: Model,
    sequences: Proteins | Iterable[Proteins],
    *,
    how: How = "auto",
    task: str | None = None,
    pad_to: int | None = None,
    annotations: Tensor | None = None,
    max_tokens: int | None = None,
) -> list[Score]:
    """Score one sequence or many, or pairs of chains.

    *Pseudo-likelihood* hides one residue at a time and asks for its probability, so it costs a pass per residue:

        total = sum over i of  log p(x_i | x without x_i)

    - ESM and BERT (Salazar et al. 2020): ``<mask>`` in place of residue ``i``; softmax over the whole vocabulary. Of a
      pair, both chains are there while a residue of one is hidden.
    - T5 (``ankh.likelihood`` of Elnaggar et al.): ``<extra_id_0>`` in place of residue ``i``, the decoder reads
      ``<pad> <extra_id_0>``, and the softmax is over all tokens but those in angle or square brackets. Ankh's own value
      is ``exp(mean)``, the geometric mean of the probabilities.

    *Single-pass* (ESM, BERT and ProteinBERT) hides nothing: one pass, in which the model sees the residue that it
    judges. It is fast, it is what some services call the log-likelihood, and it is not one. It is ProteinBERT's only
    score, as no token hides a residue from it: it learnt to name the true ones where 5 % of what it read were random
    tokens, so a residue that does not fit is improbable though it is seen. The softmax is over all 26 tokens.

    *Likelihood* (ProGen2) is that of the protein read from N to C and that of the same read from C to N, averaged:

        forward  = sum over i of  log p(x_i | 1 x_1 ... x_{i-1})
        backward = sum over i of  log p(x_i | 2 x_L ... x_{i+1})
        total    = (forward + backward) / 2

    Every sum has L terms, one per residue: the terminals "1" and "2" are added here and are themselves not scored. The
    softmax is over the 25 letters of the vocabulary (B, O, U, X and Z among them), so that the probability of a
    terminal, or of any other token, is taken out and the rest made to add up to 1. ``total`` is ``ll_sum`` and ``mean``
    is ``ll_mean`` of likelihood.py (salesforce/progen@c27a419) for "1" + sequence + "2". *Forward* and *backward* are
    one direction alone, for half the time.

    Args:
        how: "auto" is the likelihood of ProGen2, the single pass of ProteinBERT, and the pseudo-likelihood of the
            others.
        task: as ``plm.embed``; Ankh's own code scores Ankh3 with "nlu", the default.
        pad_to, annotations: of a ProteinBERT, as ``plm.embed``.
        max_tokens: tokens per batch; speed and memory, not results (of a ProteinBERT without ``pad_to`` the last bits).

    Returns: one ``Score`` per sequence, in input order.
    Raises:
        InputError: as ``embed``.
        ValueError: the checkpoint has no head or no decoder, or a model of its kind has no such score, pads or
            annotations.
    """
    texts = running.as_list(model, sequences)
    task = running.choose_task(model, task)
    check_padding(model, pad_to)
    rows = running.encode(model, texts, task=task, hidden=False, pad_to=pad_to)
    found = dict(
        score_rows(model, rows, how=how, task=task, pad_to=pad_to, annotations=annotations, max_tokens=max_tokens)
    )
    return [found[i] for i in range(len(rows))]


def score_rows(
    model: Model,
    rows: Sequence[bytes],
    *,
    how: How = "auto",
    task: str | None = None,
    pad_to: int | None = None,
    annotations: Tensor | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """``score`` as a stream of (index, score) while they are computed; rows from ``running.encode``."""
    chosen = choose_how(model, how)
    context = Context.of(model, len(rows), pad_to, annotations)
    if chosen == "single-pass":
        yield from single_pass(context, rows, task, max_tokens)
    elif chosen == "pseudo-likelihood":
        yield from pseudo_likelihood(model, rows, task, max_tokens)
    else:
        yield from likelihood(model, rows, chosen, max_tokens)


def choose_how(model: Model, how: How) -> MaskedHow | CausalHow:
    """What "auto" is for a model, or what was asked for.

    Raises: ValueError if it is unknown, or if the model cannot do it.
    """
    name, offered = model.checkpoint.name, get_args(MaskedHow)
    why = "does not read from one end to the other"
    if isinstance(model.net, ProGen2):
        why, offered = "predicts each residue from those before it", get_args(CausalHow)
    elif isinstance(model.net, T5):
        if how == "single-pass":
            raise ValueError("a T5 has no single-pass score; choose 'pseudo-likelihood'")
        offered = offered[:1]
        model.net.need_decoder()
    elif isinstance(model.net, ProteinBERT):
        if how == "pseudo-likelihood":
            raise ValueError(f"{name} has no token that hides a residue, so it has no {how!r}; choose 'single-pass'")
        offered = offered[1:]
    elif model.net.lm_head is None:
        raise ValueError(f"{name} has no language-model head, so it gives no probabilities")
    if how == "auto":
        return offered[0]  # type: ignore[no-any-return]
    if how in offered:
        return how
    known = how in get_args(How)
    *first, last = map(repr, offered if known else ("auto", *offered))
    reason = f"{name} {why}, so it has no {how!r}" if known else f"how={how!r} is unknown"
    raise ValueError(f"{reason}; choose {', '.join(first)} or {last}" if first else f"{reason}; choose {last}")


def single_pass(
    context: Context, rows: Sequence[bytes], task: str | None, max_tokens: int | None
) -> Iterator[tuple[int, Score]]:
    """Log-probability of every residue where nothing is hidden."""
    model = context.model
    places = residue_places(model, task)

    def forward(batch: Packed, members: Sequence[int]) -> list[Tensor]:
        logits = model.net.logits(context.encode(batch, members).hidden)
        parts = zip(batch.split(own_log_probs(logits, batch.tokens)), members, strict=True)
        return [each[places(rows[i])] for each, i in parts]

    for i, values in running.run(model, rows, forward, task=task, max_tokens=max_tokens, pad_to=context.pad_to):
        yield i, Score(values)


def pseudo_likelihood(
    model: Model, rows: Sequence[bytes], task: str | None, max_tokens: int | None
) -> Iterator[tuple[int, Score]]:
    """Log-probability of every residue while it alone is hidden. Copies of one length go through together."""
    budget = running.default_max_tokens(model) if max_tokens is None else max_tokens
    before, after = model.tokenizer.frame(task)
    places_of = residue_places(model, task)
    hidden = model.tokenizer.sentinel(0) if isinstance(model.net, T5) else model.tokenizer.mask_id
    for (i,) in batches([len(row) for row in rows], 1):
        ids = as_tensor(before + rows[i] + after).long()
        places = places_of(rows[i])

        @torch.inference_mode()
        def hide(group: list[int], ids: Tensor = ids, places: Tensor = places) -> Tensor:
            """Log-probabilities of some residues, from a copy of the sequence for each."""
            some = places[group]
            copies = ids.repeat(len(some), 1)
            copies[torch.arange(len(some)), some] = hidden
            batch = Packed.from_tokens(copies.flatten(), (len(ids),) * len(some)).to(model.device)
            logits = hidden_logits(model, batch, some.to(model.device), hidden)
            return own_log_probs(logits, ids[some].to(model.device)).cpu()

        groups = batches([len(ids)] * len(places), budget)
        values = torch.cat([found for _, found in running.halved(model, groups, hide)])
        running.check_finite(model, i, values)
        yield i, Score(values.clone())


def likelihood(
    model: Model, rows: Sequence[bytes], how: CausalHow, max_tokens: int | None
) -> Iterator[tuple[int, Score]]:
    """Log-probability of every residue given those before it; both directions of a protein are in one batch.

    Raises: ValueError for a row without residues, or with an id that is none.
    """
    budget = running.default_max_tokens(model) if max_tokens is None else max_tokens
    letters = bytes(model.tokenizer.residue_ids)
    for i, row in enumerate(rows):
        if not row or row.translate(None, letters):
            raise ValueError(f"row {i + 1} must be ids of residues, without terminals, and at least one; got {[*row]}")
    columns = bytes(max(letters.find(id), 0) for id in range(256))  # of the head below
    starts = {"forward": bytes([model.tokenizer.start_id]), "backward": bytes([model.tokenizer.end_id])}
    directions = ("forward", "backward") if how == "likelihood" else (how,)
    head = letter_head(model)

    @torch.inference_mode()
    def read(group: list[int]) -> list[Tensor]:
        """Log-probabilities ``[directions, L]`` of each row, from N to C. The last residue of a text is not read."""
        texts = [(way, rows[i] if way == "forward" else rows[i][::-1]) for i in group for way in directions]
        tokens = as_tensor(b"".join(starts[way] + text[:-1] for way, text in texts))
        batch = Packed.from_tokens(tokens, tuple(len(text) for _, text in texts)).to(model.device)
        wanted = as_tensor(b"".join(text for _, text in texts).translate(columns)).to(model.device)
        hidden = model.graphs.hidden(model.net, batch)
        found = own_log_probs(head(hidden.to(head.weight.dtype)), wanted.long()).cpu()
        parts = zip(texts, found.split(batch.lengths), strict=True)
        aligned = [part if way == "forward" else part.flip(0) for (way, _), part in parts]
        return [torch.stack(aligned[i : i + len(directions)]) for i in range(0, len(aligned), len(directions))]

    groups = batches([len(directions) * len(row) for row in rows], budget)
    for group, results in running.halved(model, groups, read):
        running.check_all_finite(model, group, results)
        for i, values in zip(group, results, strict=True):
            each = [Score(x) for x in values.clone()]  # a copy made out here is an ordinary tensor
            yield i, Score(values.mean(0), *each) if len(each) > 1 else each[0]


def letter_head(model: Model) -> Linear:
    """The head's rows for the letters alone (a ProGen2 may have 51,200), in float32 at least: ``[n, c] -> [n, 25]``."""
    assert isinstance(model.net, ProGen2)
    letters = torch.tensor(model.tokenizer.residue_ids, device=model.device)
    precise = torch.promote_types(model.dtype, torch.float32)
    rows = {name: x[letters].to(precise) for name, x in model.net.lm_head.state_dict().items()}
    with outlines():
        head = Linear(model.net.config.channels, len(letters))
    head.load_state_dict(rows, assign=True)
    return head


def as_tensor(row: bytes) -> Tensor:
    return torch.frombuffer(bytearray(row), dtype=torch.uint8)


def hidden_logits(model: Model, batch: Packed, places: Tensor, hidden: int) -> Tensor:
    """Logits ``[b, v]`` of the one hidden residue in each sequence, which stands at ``places`` ``[b]`` within it."""
    net = model.net
    if not isinstance(net, T5):
        return net.logits(model.graphs.hidden(net, batch)[batch.first + places])
    decoder = Packed.from_ids([[START, hidden]] * len(batch), device=model.device)
    logits = net(batch, decoder=decoder).logits[1::2]
    silent = [i for i, token in enumerate(model.tokenizer.vocabulary) if token[0] in "<["]
    return logits.index_fill(1, torch.tensor(silent, device=model.device), -torch.inf)  # type: ignore[no-any-return]


def residue_places(model: Model, task: str | None) -> Callable[[bytes], Tensor]:
    """Tells of a row where its residues stand among the tokens of the sequence, without the separator of a pair."""
    start = len(model.tokenizer.frame(task)[0])
    separator = model.tokenizer.separator_id if model.tokenizer.separator is not None else None

    def places(row: bytes) -> Tensor:
        if separator is None:
            return torch.arange(start, start + len(row))
        return start + (as_tensor(row) != separator).nonzero()[:, 0]

    return places


def own_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability ``[n]`` of tokens ``[n]`` under logits ``[n, v]``, in float32 at least."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=precise).gather(-1, tokens[:, None])[:, 0]
