"""How probable a model finds a sequence."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from plm import running
from plm.loading import Model
from plm.models.t5 import START, T5
from plm.packing import Packed, batches
from plm.running import Proteins

How = Literal["auto", "pseudo-likelihood", "single-pass"]


@dataclass(frozen=True, repr=False, eq=False)
class Score:
    """Natural logarithms of probabilities: ``per_residue`` is ``[L]`` in float32 (float64 from a float64 model)."""

    per_residue: Tensor

    def __repr__(self) -> str:
        return f"Score(total={self.total:.4f}, mean={self.mean:.4f}, residues={len(self.per_residue)})"

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self.per_residue.double().sum())

    @property
    def mean(self) -> float:
        """``total`` over residues."""
        return self.total / len(self.per_residue)


def score(
    model: Model,
    sequences: Proteins | Iterable[Proteins],
    *,
    how: How = "auto",
    task: str | None = None,
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

    *Single-pass* (ESM and BERT) hides nothing: one pass, in which the model sees the residue that it judges. It is
    fast, it is what some services call the log-likelihood, and it is not one.

    Args:
        how: "auto" is the pseudo-likelihood.
        task: as ``plm.embed``; Ankh's own code scores Ankh3 with "nlu", the default.
        max_tokens: tokens per batch; speed and memory, not results.

    Returns: one ``Score`` per sequence, in input order.
    Raises:
        InputError: as ``embed``.
        ValueError: the checkpoint has no head or no decoder, or the T5 cannot do it in a single pass.
    """
    texts = running.as_list(model, sequences)
    task = running.choose_task(model, task)
    rows = running.encode(model, texts, task=task, hidden=False)
    found = dict(score_rows(model, rows, how=how, task=task, max_tokens=max_tokens))
    return [found[i] for i in range(len(rows))]


def score_rows(
    model: Model,
    rows: Sequence[bytes],
    *,
    how: How = "auto",
    task: str | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """``score`` as a stream of (index, score) while they are computed; rows from ``running.encode``."""
    if how not in get_args(How):
        raise ValueError(f"how={how!r} is unknown; choose 'auto', 'pseudo-likelihood' or 'single-pass'")
    if isinstance(model.net, T5):
        if how == "single-pass":
            raise ValueError("a T5 has no single-pass score; choose 'pseudo-likelihood'")
        model.net.need_decoder()
    elif model.net.lm_head is None:
        raise ValueError(f"{model.checkpoint.name} has no language-model head, so it gives no probabilities")
    if how == "single-pass":
        yield from single_pass(model, rows, task, max_tokens)
    else:
        yield from pseudo_likelihood(model, rows, task, max_tokens)


def single_pass(
    model: Model, rows: Sequence[bytes], task: str | None, max_tokens: int | None
) -> Iterator[tuple[int, Score]]:
    """Log-probability of every residue where nothing is hidden."""

    def forward(batch: Packed, some: Sequence[bytes]) -> list[Tensor]:
        log_probs = own_log_probs(model.net(batch).logits, batch.tokens)
        return [each[residue_places(model, row, task)] for each, row in zip(batch.split(log_probs), some, strict=True)]

    for i, values in running.run(model, rows, forward, task=task, max_tokens=max_tokens):
        yield i, Score(values)


def pseudo_likelihood(
    model: Model, rows: Sequence[bytes], task: str | None, max_tokens: int | None
) -> Iterator[tuple[int, Score]]:
    """Log-probability of every residue while it alone is hidden. Copies of one length go through together."""
    budget = running.default_max_tokens(model) if max_tokens is None else max_tokens
    before, after = model.tokenizer.frame(task)
    hidden = model.tokenizer.sentinel(0) if isinstance(model.net, T5) else model.tokenizer.mask_id
    for (i,) in batches([len(row) for row in rows], 1):
        ids = torch.tensor([*before, *rows[i], *after])
        places = residue_places(model, rows[i], task)

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


def hidden_logits(model: Model, batch: Packed, places: Tensor, hidden: int) -> Tensor:
    """Logits ``[b, v]`` of the one hidden residue in each sequence, which stands at ``places`` ``[b]`` within it."""
    net = model.net
    if not isinstance(net, T5):
        return net.logits(net.encode(batch).hidden[batch.first + places])
    decoder = Packed.from_ids([[START, hidden]] * len(batch), device=model.device)
    logits = net(batch, decoder=decoder).logits[1::2]
    silent = [i for i, token in enumerate(model.tokenizer.vocabulary) if token[0] in "<["]
    return logits.index_fill(1, torch.tensor(silent, device=model.device), -torch.inf)  # type: ignore[no-any-return]


def residue_places(model: Model, row: bytes, task: str | None) -> Tensor:
    """Where the residues stand among the tokens of a sequence, without the separator of a pair."""
    before, _ = model.tokenizer.frame(task)
    separator = model.tokenizer.separator_id if model.tokenizer.separator is not None else None
    return torch.tensor([len(before) + i for i, token in enumerate(row) if token != separator])


def own_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability ``[n]`` of tokens ``[n]`` under logits ``[n, v]``, in float32 at least."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=precise).gather(-1, tokens[:, None])[:, 0]
