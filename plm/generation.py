"""Writing sequences: what follows a start, what stands in gaps, and translations between sequence and structure."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from plm import running
from plm.decoding import Request, Stop, Text, beam_search, write
from plm.loading import Model
from plm.models.t5 import EOS, T5
from plm.packing import batches
from plm.sampling import Greedy, Rules, Sampler, streams
from plm.sequences import Fault, InputError

Given = str | Sequence[int] | Tensor
Kind = Literal["completion", "infilling", "translation"]
SENTINEL = re.compile(r"<extra_id_(\d+)>")
OTHER_ALPHABET = {"aa2fold": "fold2aa", "fold2aa": "aa2fold"}


@dataclass(frozen=True)
class Sample:
    """One sequence that a model wrote.

    Attributes:
        sequence: residues alone. Of a completion the prompt and what follows it; of an infilling the prompt with its
            gaps filled; of a translation the other alphabet's letters.
        ids: the decoder's tokens from the start token on, end token included if it wrote one.
        log_probs: ``[len(ids) - 1]`` float32, natural logarithm of the model's own probability of each token after the
            first: before temperature, cuts, penalties and bans.
        stopped_by: "end" (it wrote the end token) or "length".
        filled: of an infilling, what was written into each gap, in order; empty where nothing was.
    """

    sequence: str
    ids: tuple[int, ...]
    log_probs: Tensor = field(repr=False, compare=False)
    stopped_by: Stop
    filled: tuple[str, ...] = ()

    @property
    def ll_sum(self) -> float:
        """Log-likelihood of the tokens that were written."""
        return float(self.log_probs.double().sum())

    @property
    def ll_mean(self) -> float:
        """``ll_sum`` per token."""
        return self.ll_sum / len(self.log_probs)


@dataclass(frozen=True)
class Prompt:
    """What was asked for, and what the encoder reads."""

    text: str  # without spaces
    kind: Kind
    task: str | None
    ids: list[int]
    residues: int  # letters that it has
    gaps: tuple[int, ...] = ()


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
    early_stopping: bool | Literal["never"] = False,
    repetition_penalty: float = 1.0,
    banned: Iterable[str | int] = (),
    residues_only: bool = False,
    task: str | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
) -> list[list[Sample]]:
    """Write ``num_samples`` sequences to each prompt, with a T5 that has a decoder.

    What is written follows from the prompt. *Completion*: plain residues; the model goes on where they stop (Ankh3,
    with the task "s2s"; the others were never trained to). *Infilling*: residues with gaps, ``M_AY_L`` or
    ``M<extra_id_0>AY<extra_id_1>L``; the model says what stands in each (Ankh3 with "nlu", Ankh, ProtT5).
    *Translation*: ProstT5's tasks "aa2fold", from amino acids to 3Di states, and "fold2aa", back; one letter for each,
    never one of the rare U, Z, O and B.

    With ``temperature=0`` and the same bounds the token ids are those of transformers' ``generate``. The sequences
    differ from those of Ankh3's model card in two ways. The card joins the prompt and all decoded tokens, the start
    token among them, so that a ``<pad>`` stands in the middle of the protein; here only residues are joined. And the
    card asks for ``int(L / 2)`` tokens after ``int(L / 2)`` residues, so that a protein of odd length comes back one
    residue short; ``length=L`` asks for all that are missing.

    Args:
        prompts: text; or token ids, which go to the encoder as they are and ask for a completion.
        max_length, min_length: tokens that the decoder writes, its start token counted, as in transformers (so ``n``
            residues need ``n + 1``). Below ``min_length`` the end token is banned. By default a completion may double
            its prompt, an infilling has two tokens for each gap, and a translation has exactly its prompt's length.
        length: residues of a completed sequence, prompt included, in place of ``max_length`` and ``min_length``; it
            implies ``residues_only``, so that it has exactly as many.
        temperature, top_k, top_p: see ``plm.sampling.Sampler``; temperature 0 takes the most probable token.
        num_beams: above 1 for beam search, with temperature 0; it returns the best ``num_samples`` of its beams.
        length_penalty, early_stopping: of the beam search; see ``plm.decoding.beam_search``.
        repetition_penalty: see ``plm.sampling.Rules``.
        banned: tokens that are never written, as text ("X", "<unk>") or ids.
        residues_only: ban all that is neither a residue nor the end (nor, infilling, one of the prompt's gaps), so that
            a completion by ``n`` tokens has ``n`` residues whatever the model prefers. The published recipes do not ban
            them, and trained models hardly ever write anything else. In translations they are always banned.
        task: what goes before the prompt; None as above, "none" for nothing.
        seed: of the random numbers; None draws one. A sample depends on it, on its prompt's place and on its own
            number, and on nothing that is written beside it.
        max_tokens: tokens of prompts and texts that are worked on at a time.

    Returns: for each prompt its samples; of a beam search the best first.
    Raises:
        ValueError: the model cannot write, or the settings contradict each other.
        InputError: a prompt is empty or has letters or gaps that the model does not know.
    """
    found = dict(
        stream(
            model,
            plan(model, prompts, task),
            num_samples=num_samples,
            bounds=(min_length, max_length, length),
            chooser=chooser(temperature, top_k, top_p, num_samples, num_beams, length_penalty, early_stopping),
            beams=(num_beams, length_penalty, early_stopping),
            repetition_penalty=repetition_penalty,
            banned=(banned,) if isinstance(banned, str) else tuple(banned),
            residues_only=residues_only,
            seed=seed,
            max_tokens=max_tokens,
        )
    )
    return [found[i] for i in range(len(found))]


def chooser(
    temperature: float,
    top_k: int | None,
    top_p: float,
    num_samples: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
) -> Greedy | Sampler:
    """How tokens are chosen. Raises: ValueError for settings that contradict each other."""
    if num_beams == 1 and (length_penalty != 1 or early_stopping is not False):
        raise ValueError("length_penalty and early_stopping are of a beam search: give num_beams above 1")
    if num_samples < 1 or num_beams < 1:
        raise ValueError(f"num_samples and num_beams must be at least 1; got {num_samples} and {num_beams}")
    if num_beams > 1 and temperature != 0:
        raise ValueError("beam search draws nothing: give temperature=0 with num_beams, or num_beams=1 to draw samples")
    if 1 < num_beams < num_samples:
        raise ValueError(f"{num_beams} beams hold no {num_samples} samples; give num_beams={num_samples}")
    if temperature == 0:
        if top_k is not None or top_p != 1:
            raise ValueError("with temperature=0 the most probable token is taken; leave out top_k and top_p")
        if num_samples > 1 and num_beams == 1:
            raise ValueError(f"without drawing, all {num_samples} samples would be the same; raise the temperature")
        return Greedy()
    return Sampler(temperature, top_k, top_p)


def plan(model: Model, prompts: Given | Iterable[Given], task: str | None) -> list[Prompt]:
    """What each prompt asks for. Raises: ValueError; InputError with every prompt that cannot be used."""
    if not isinstance(model, Model):
        raise TypeError(f"the first argument must be a model: plm.load({model!r})")
    if not isinstance(model.net, T5) or model.net.decoder is None:
        raise ValueError(
            f"{model.checkpoint.name} writes no sequences; use a model with a decoder, such as ankh3-large"
        )
    planned, faults = [], []
    for i, given in enumerate(texts_or_ids(model, prompts)):
        if not isinstance(given, str):
            planned.append(prompt_of_ids(model, given, i))
            continue
        try:
            planned.append(prompt(model, given, task))
        except InputError as error:
            faults += [Fault(fault.reason, fault.hint, record=i + 1, id=given[:12]) for fault in error.faults]
    if faults:
        raise InputError("prompts", faults)
    return planned


def texts_or_ids(model: Model, prompts: Any) -> list[Any]:
    """One prompt or many, as a list; texts as ``running.as_list`` takes them."""
    texts = isinstance(prompts, tuple) and all(isinstance(each, str) for each in prompts)
    return running.as_list(model, prompts) if texts or isinstance(prompts, str | bytes | Mapping) else list(prompts)


def prompt_of_ids(model: Model, given: Sequence[int] | Tensor, i: int) -> Prompt:
    """A completion of token ids, or a translation if they begin with its prefix.

    Raises: TypeError if ``given`` is something else; ValueError for unknown ids.
    """
    try:
        ids = [int(token) for token in given]
    except (TypeError, ValueError):
        raise TypeError(
            f"a prompt must be text or a row of token ids; number {i + 1} is {given!r}: give [[7, 8, 1]]"
        ) from None
    tokenizer = model.tokenizer
    letters = tokenizer.residue_text(ids)
    first = tokenizer.vocabulary[ids[0]] if ids else ""
    task = next(
        (name for name in OTHER_ALPHABET if name in tokenizer.tasks and tokenizer.tasks[name].prefix == first), None
    )
    return Prompt(letters, "translation" if task else "completion", task, ids, len(letters))


def prompt(model: Model, given: str, task: str | None) -> Prompt:
    """One prompt, its gaps ``_`` numbered. Raises: InputError."""
    text, tokenizer = "".join(given.split()), model.tokenizer
    if "|" in text and tokenizer.separator is not None:
        raise InputError("prompt", [Fault("a pair of chains", "models write single chains: give one as the prompt")])
    tasks = tokenizer.tasks
    if "_" in SENTINEL.sub("", text):
        if SENTINEL.search(text):
            raise InputError(
                "prompt", [Fault("gaps written in two ways", "write all as _ or all as <extra_id_0>, ...")]
            )
        running.encode(model, [text.replace("_", "A")])  # so that an error counts a gap as one letter
        pieces = text.split("_")
        text = "".join(f"{piece}<extra_id_{i}>" for i, piece in enumerate(pieces[:-1])) + pieces[-1]
    gaps = tuple(int(number) for number in SENTINEL.findall(text))
    try:
        sentinels = [tokenizer.sentinel(gap) for gap in gaps]
    except ValueError as error:
        raise InputError("prompt", [Fault(str(error), "write fewer gaps")]) from None
    kind: Kind = "translation" if OTHER_ALPHABET.keys() & tasks.keys() else "infilling" if gaps else "completion"
    if task is None and kind != "translation":
        task = next((name for name in (("nlu",) if gaps else ("s2s",)) if name in tasks), None)
    task = running.choose_task(model, task)
    if kind == "translation" and (gaps or task is None):
        reason = "a translation has no gaps" if gaps else "without a task"
        raise InputError("prompt", [Fault(reason, "give residues with task='aa2fold', or 3Di states with 'fold2aa'")])
    (row,) = running.encode(model, [text], task=task)
    letters, separator = tokenizer.residue_text(row), tokenizer.separator and tokenizer.separator_id
    for token in set(row) - {*tokenizer.residue_ids, *sentinels, separator}:
        reason = f"{tokenizer.vocabulary[token]} is no residue"
        raise InputError("prompt", [Fault(reason, "leave it out: task='...' puts a token before the residues")])
    before, after = tokenizer.frame(task)
    return Prompt(text, kind, task, [*before, *row, *after], len(letters), gaps)


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    bounds: tuple[int | None, int | None, int | None],
    chooser: Greedy | Sampler,
    beams: tuple[int, float, bool | Literal["never"]],
    repetition_penalty: float,
    banned: tuple[str | int, ...],
    residues_only: bool,
    seed: int | None,
    max_tokens: int | None,
) -> Iterator[tuple[int, list[Sample]]]:
    """``generate`` as (index, samples) while batches finish, longest prompts first."""
    net = model.net
    assert isinstance(net, T5)
    seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
    rules = Rules(EOS, repetition_penalty)
    residues_only = residues_only or bounds[2] is not None
    requests = [
        Request(each.ids, *lengths(each, *bounds), allowed(model, each, banned, residues_only)) for each in prompts
    ]
    width = max(num_samples, beams[0])
    costs = [len(request.ids) + width * request.max_length for request in requests]

    def work(batch: list[int]) -> list[list[Text]]:
        some = [requests[i] for i in batch]
        if beams[0] > 1:
            number, penalty, early = beams
            return beam_search(net, some, rules, number, length_penalty=penalty, early_stopping=early)
        longest = max(request.max_length for request in some)
        uniform = streams(seed, [(i, sample) for i in batch for sample in range(num_samples)], longest)
        return write(net, some, chooser, rules, uniform, num_samples)

    budget = default_max_tokens(net) if max_tokens is None else max_tokens
    for batch, texts in running.halved(model, batches(costs, budget), work):
        for i, found in zip(batch, texts, strict=True):
            running.check_finite(model, i, torch.cat([each.log_probs for each in found]))
            yield i, [finished(model, prompts[i], each) for each in found[:num_samples]]


def default_max_tokens(net: T5) -> int:
    """Tokens of prompts and texts at a time: as many as keep their keys and values within a gibibyte or so."""
    config = net.config
    size = 2 * config.decoder_layers * config.heads * config.head_size * net.embed.weight.itemsize
    return max(1_024, min(16_384, (1 << 30) // size))


def lengths(prompt: Prompt, shortest: int | None, longest: int | None, residues: int | None) -> tuple[int, int]:
    """The least and the greatest number of tokens, the start token counted."""
    if residues is not None:
        if prompt.kind != "completion":
            raise ValueError(f"length is of a completed sequence, and this is a case of {prompt.kind}: leave it out")
        if shortest is not None or longest is not None:
            raise ValueError("length takes the place of max_length and min_length: give the one or the others")
        if residues <= prompt.residues:
            raise ValueError(f"length={residues}, but the prompt has {prompt.residues} residues already; give more")
        return (residues - prompt.residues + 1,) * 2
    if shortest is not None and shortest < 0:
        raise ValueError(f"min_length must not be negative; got {shortest}")
    if longest is None and not prompt.residues and not prompt.gaps:
        raise ValueError("the prompt has no residues to tell how much to write: give max_length")
    if prompt.kind == "translation" and longest is None and shortest is None:
        return (prompt.residues + 1,) * 2
    if longest is None:
        longest = 2 * len(prompt.gaps) + 2 if prompt.gaps else prompt.residues + 1
        longest = max(longest, shortest or 0)
    return shortest or 0, longest


def allowed(model: Model, prompt: Prompt, banned: tuple[str | int, ...], residues_only: bool) -> Tensor:
    """Which tokens ``[v]`` may be written. Raises: ValueError for a banned token that the vocabulary has not."""
    tokenizer = model.tokenizer
    may = torch.ones(model.net.embed.num_embeddings, dtype=torch.bool)
    if residues_only or prompt.kind == "translation":
        letters = set(tokenizer.residue_ids)
        if prompt.kind == "translation" and prompt.task is not None:
            wanted = tokenizer.tasks[OTHER_ALPHABET[prompt.task]].letters or ""
            letters = set(tokenizer.residues("".join(letter for letter in wanted if letter not in tokenizer.rare)))
        letters |= {EOS, *(tokenizer.sentinel(gap) for gap in prompt.gaps)}
        may = torch.zeros_like(may).index_fill(0, torch.tensor(sorted(letters)), True)
    for token in banned:
        number = tokenizer.vocabulary.index(token) if token in tokenizer.vocabulary else token
        if not isinstance(number, int) or not 0 <= number < len(may):
            raise ValueError(
                f"banned token {token!r} is not in the vocabulary; it has {' '.join(tokenizer.vocabulary)}"
            )
        may[number] = False
    return may


def finished(model: Model, prompt: Prompt, text: Text) -> Sample:
    """The residues that a text stands for."""
    tokenizer = model.tokenizer
    if prompt.kind == "infilling":
        numbers = {i: int(found[1]) for i, token in enumerate(tokenizer.vocabulary) if (found := SENTINEL.match(token))}
        spans = by_gap(text.ids, numbers)
        filled = {gap: tokenizer.residue_text(spans.get(gap, ())) for gap in prompt.gaps}
        sequence = SENTINEL.sub(lambda match: filled[int(match[1])], prompt.text)
        return Sample(sequence, text.ids, text.log_probs, text.stopped_by, tuple(filled[gap] for gap in prompt.gaps))
    start = prompt.text if prompt.kind == "completion" else ""
    return Sample(start + tokenizer.residue_text(text.ids), text.ids, text.log_probs, text.stopped_by)


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
