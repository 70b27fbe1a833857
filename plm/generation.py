"""Writing sequences: what follows a start, what stands in gaps, and translations between sequence and structure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from plm import running
from plm.decoding import Stop, Text
from plm.loading import Model
from plm.models.progen2 import ProGen2
from plm.prompts import SENTINEL, Given, Prompt, plan
from plm.scoring import Score, score_rows
from plm.writing import Early, Job, Settings


@dataclass(frozen=True)
class Sample:
    """One sequence that a model wrote.

    Attributes:
        sequence: residues alone, in the order in which they were written. Of a completion the prompt and what follows
            it, up to the terminal; of an infilling the prompt with its gaps filled; of a translation the other
            alphabet's letters.
        ids: the decoder's tokens from the start token on, or where the text goes on from it from the prompt on; the end
            token included if it wrote one.
        log_probs: ``[tokens that were written]`` float32, natural logarithm of the model's own probability of each:
            before temperature, cuts, penalties and bans.
        stopped_by: "end" (it wrote the end token, or a terminal) or "length".
        filled: of an infilling, what was written into each gap, in order; empty where nothing was.
        reverse: whether it was written from the C-terminus to the N-terminus, and ``sequence`` reads like that.
        score: the likelihood of the whole protein, prompt included (see ``plm.score``, which refuses one that with both
            terminals is longer than the checkpoint reads; here the last tokens are not read), of models that write from
            either end (a protein without residues has 0 in sum, and a mean that is no number); None of others.
    """

    sequence: str
    ids: tuple[int, ...]
    log_probs: Tensor = field(repr=False, compare=False)
    stopped_by: Stop
    filled: tuple[str, ...] = ()
    reverse: bool = False
    score: Score | None = field(default=None, repr=False, compare=False)

    @property
    def protein(self) -> str:
        """``sequence`` from the N-terminus to the C-terminus."""
        return self.sequence[::-1] if self.reverse else self.sequence

    @property
    def ll_sum(self) -> float:
        """Log-likelihood: of the protein where there is a ``score``, the mean of both directions; else of what was
        written."""
        return self.score.total if self.score is not None else float(self.log_probs.double().sum())

    @property
    def ll_mean(self) -> float:
        """``ll_sum`` per residue of the protein, or per token that was written."""
        return self.score.mean if self.score is not None else self.ll_sum / len(self.log_probs)


@dataclass(frozen=True)
class Piece:
    """One token that was written just now, and the whole sample if it is its last.

    ``text`` is the token, empty for one outside the vocabulary; ``prompt`` and ``number`` (from 0) say of which sample.
    """

    prompt: int
    number: int
    id: int
    text: str
    log_prob: float
    sample: Sample | None = None


def generate(
    model: Model,
    prompts: Given | Iterable[Given],
    *,
    num_samples: int = 1,
    max_length: int | None = None,
    min_length: int | None = None,
    length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: Early = False,
    repetition_penalty: float = 1.0,
    no_repeat: int | None = None,
    banned: Iterable[str | int] = (),
    forced: Mapping[int, str | int] | None = None,
    residues_only: bool = False,
    likelihood: bool = True,
    cuda_graphs: bool = True,
    task: str | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
) -> list[list[Sample]]:
    """Write ``num_samples`` sequences to each prompt, with ProGen2 or with a T5 that has a decoder.

    *ProGen2* goes on from the prompt until it writes a terminal. A prompt is residues ("MKT", read as "1MKT"), or
    "1MKT" from the N-terminus on, or "2" and residues from the C-terminus on; "1" and "2" alone write from nothing.
    This is what ``sample.py`` of the authors does and what BioLM's API returns: the context, temperature ``t``, nucleus
    ``p``, ``max_length`` with the prompt and its terminal counted, text cut at the first terminal, and ``ll_sum`` and
    ``ll_mean`` of the whole protein as ``likelihood.py`` computes them. It differs in these: the authors' script draws
    from the 50 most probable tokens, which for the two checkpoints with 51,200 tokens is ``top_k=50`` and else all; it
    writes on behind a terminal and throws that away; and it drops letters that it does not know, an error here.

    *T5*: what is written follows from the prompt. *Completion*: plain residues; the model goes on where they stop
    (Ankh3, with the task "s2s"; the others were never trained to). *Infilling*: residues with gaps, ``M_AY_L`` or
    ``M<extra_id_0>AY<extra_id_1>L``; the model says what stands in each (Ankh3 with "nlu", Ankh, ProtT5).
    *Translation*: ProstT5's tasks "aa2fold", from amino acids to 3Di states, and "fold2aa", back; one letter for each,
    never one of the rare U, Z, O and B.

    With ``temperature=0`` and the same bounds the token ids are those of transformers' ``generate``. The sequences
    differ from those of Ankh3's model card in two ways. The card joins the prompt and all decoded tokens, the start
    token among them, so that a ``<pad>`` stands in the middle of the protein; here only residues are joined. And the
    card asks for ``int(L / 2)`` tokens after ``int(L / 2)`` residues, so that a protein of odd length comes back one
    residue short; ``length=L`` asks for all that are missing.

    Args:
        prompts: text; or token ids, which go to the network as they are and ask for a completion. ProGen2 goes on with
            the ids of a sample that ``max_length`` cut, with the same seed and place as if it had not been.
        num_samples: sequences for each prompt.
        max_length, min_length: tokens of the text. T5's decoder counts its start token (``n`` residues need ``n + 1``);
            ProGen2 counts the prompt with its terminal. Below ``min_length`` the end is banned. By default a
            completion by T5 may double its prompt, an infilling has two tokens for each gap, a translation has exactly
            its prompt's length, and ProGen2 writes until the end, or as many tokens as the checkpoint reads.
        length: residues of a completed sequence, prompt included, in place of ``max_length`` and ``min_length``; it
            implies ``residues_only``, so that it has exactly as many.
        temperature, top_k, top_p: see ``plm.sampling.Sampler``; temperature 0 takes the most probable token.
        num_beams: above 1 for beam search (T5), with temperature 0; it returns the best ``num_samples`` of its beams.
        length_penalty, early_stopping: of the beam search; see ``plm.beams.beam_search``.
        repetition_penalty, no_repeat: guards against repeats; see ``plm.sampling.Rules``.
        banned: tokens that are never written, as text ("X", "<unk>") or ids.
        forced: the residue at each of some positions of the completed sequence, ``{45: "C"}``, counted from 1 in the
            order of writing (ProGen2). What is forced is written whatever is banned; a text may end before it, unless
            ``length`` or ``min_length`` keep it from that.
        residues_only: ban all that is neither a residue nor the end (nor, infilling, one of the prompt's gaps), so that
            a completion by ``n`` tokens has ``n`` residues whatever the model prefers. The published recipes do not ban
            them, and trained models hardly ever write anything else. In translations they are always banned.
        likelihood: compute ``Sample.score`` of what ProGen2 wrote, which takes two passes over each protein.
        cuda_graphs: on CUDA, record ProGen2's steps and repeat them: see ``plm.graphs``.
        seed: of the random numbers; None draws one. A sample depends on it, on its prompt's place and on its own
            number, and on nothing that is written beside it: in float32 on a CPU to the bit, in 8 bits and on a GPU
            as far as rounding allows, so that a near-tie may fall the other way.
        max_tokens: tokens of prompts and texts that are worked on at a time; None for what fits well into memory.
        task: what goes before the prompt; None as above, "none" for nothing.

    Returns: for each prompt its samples; of a beam search the best first.
    Raises:
        ValueError: the model cannot write, or the settings contradict each other.
        InputError: a prompt is empty, too long, or has letters or gaps that the model does not know.
        MemoryError: keys and values would not fit; it says how many texts would.
    """
    how = Settings(
        num_samples=num_samples,
        max_length=max_length,
        min_length=min_length,
        length=length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        repetition_penalty=repetition_penalty,
        no_repeat=no_repeat,
        banned=banned,
        forced=forced or {},
        residues_only=residues_only,
        likelihood=likelihood,
        cuda_graphs=cuda_graphs,
        seed=seed,
        max_tokens=max_tokens,
    )
    found = dict(written(model, plan(model, prompts, task), how))
    return [found[i] for i in range(len(found))]


def stream(
    model: Model, prompts: Given | Iterable[Given], *, task: str | None = None, **settings: Any
) -> Iterator[Piece]:
    """``generate``, with all of its arguments, token by token while they are written; but no beam search.

    Nothing is computed before it is asked for, so a stream can be left and gone on with: its pieces are the same. The
    model's weights must not change meanwhile.

    Raises: as ``generate``, before the first token.
    """
    how = Settings(**settings)
    if how.num_beams > 1:
        raise ValueError("a beam search knows its first token when it knows its last: use generate, or num_beams=1")
    return pieces(Job.of(model, plan(model, prompts, task), how))


def pieces(job: Job) -> Iterator[Piece]:
    """``stream`` of work that is planned."""
    model, prompts, how = job.model, job.prompts, job.how
    tokenizer = model.tokenizer
    order = range(len(prompts))
    for step in job.steps(order, job.rows):
        for name, token, log_prob in zip(step.names, step.tokens, step.log_probs, strict=True):
            sample = None
            running.check_finite(model, name[0], torch.tensor(log_prob))
            if text := step.finished.get(name):
                (sample,) = complete(model, name[0], prompts[name[0]], [text], how)
            known = tokenizer.vocabulary[token] if token < len(tokenizer.vocabulary) else ""
            yield Piece(name[0], name[1], token, known, log_prob, sample)


def written(model: Model, prompts: Sequence[Prompt], how: Settings) -> Iterator[tuple[int, list[Sample]]]:
    """``generate`` of prompts that are planned as (index, samples) while they are finished, longest texts first."""
    job = Job.of(model, prompts, how)
    if how.num_beams > 1:
        for i, found in job.searched():
            yield i, complete(model, i, prompts[i], found, how)
        return
    order = sorted(range(len(prompts)), key=lambda i: -job.requests[i].max_length)
    rows = job.rows
    texts: dict[int, dict[int, Text]] = {}
    while order:
        try:
            for step in job.steps(order, rows):
                for (i, number), text in step.finished.items():
                    texts.setdefault(i, {})[number] = text
                    if len(texts[i]) == how.num_samples:
                        found = [texts[i][number] for number in range(how.num_samples)]
                        samples = complete(model, i, prompts[i], found, how)
                        order.remove(i)
                        yield i, samples
        except RuntimeError as error:
            if not running.out_of_memory(error):
                raise
            if rows == 1:
                raise MemoryError(f"a single text does not fit into the memory of {model.device}") from None
            rows //= 2
            texts = {}


def complete(model: Model, i: int, prompt: Prompt, texts: Sequence[Text], how: Settings) -> list[Sample]:
    """What became of prompt number ``i``. Raises: FloatingPointError if a number is not finite."""
    running.check_finite(model, i, torch.cat([each.log_probs for each in texts]))
    return scored(model, [finished(model, prompt, each) for each in texts], how)


def finished(model: Model, prompt: Prompt, text: Text) -> Sample:
    """The residues that a text stands for."""
    tokenizer = model.tokenizer
    known = [token for token in text.ids if token < len(tokenizer.vocabulary)]  # not the spare rows of an embedding
    if prompt.kind == "infilling":
        numbers = {i: int(found[1]) for i, token in enumerate(tokenizer.vocabulary) if (found := SENTINEL.match(token))}
        spans = by_gap(text.ids, numbers)
        filled = {gap: tokenizer.residue_text(spans.get(gap, ())) for gap in prompt.gaps}
        sequence = SENTINEL.sub(lambda match: filled[int(match[1])], prompt.text)
        return Sample(sequence, text.ids, text.log_probs, text.stopped_by, tuple(filled[gap] for gap in prompt.gaps))
    goes_on = prompt.kind == "completion" and prompt.start != prompt.ids
    sequence = (prompt.text if goes_on else "") + tokenizer.residue_text(known)
    return Sample(sequence, text.ids, text.log_probs, text.stopped_by, reverse=prompt.reverse)


def scored(model: Model, samples: list[Sample], how: Settings) -> list[Sample]:
    """The samples with the likelihood of their proteins, of models that write from either end."""
    if not how.likelihood or not isinstance(model.net, ProGen2):
        return samples
    samples = [sample if sample.sequence else replace(sample, score=Score(torch.zeros(0))) for sample in samples]
    some = [i for i, sample in enumerate(samples) if sample.sequence]
    rows = [model.tokenizer.residues(samples[i].protein) for i in some]
    for at, score in score_rows(model, rows):
        samples[some[at]] = replace(samples[some[at]], score=score)
    return samples


def by_gap(ids: Sequence[int], sentinels: dict[int, int]) -> dict[int, list[int]]:
    """The tokens behind each gap's sentinel, up to the next sentinel; of a gap that comes twice the first."""
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in ids:
        if token in sentinels:
            current = spans.setdefault(sentinels[token], []) if sentinels[token] not in spans else None
        elif current is not None:
            current.append(token)
    return spans
