"""What a prompt asks for: the tokens that a network reads, what the text begins with, and how long it may become."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plm import running
from plm.loading import Model
from plm.models.progen2 import ProGen2
from plm.models.t5 import EOS, START, T5
from plm.sequences import Fault, InputError

Given = str | Sequence[int] | Tensor
Kind = Literal["completion", "infilling", "translation"]
SENTINEL = re.compile(r"<extra_id_(\d+)>")
BEFORE = re.compile(r"\s*(<\|\w+\|>)?\s*")  # a tag, in front of a fine-tuned ProGen2's sequences
OTHER_ALPHABET = {"aa2fold": "fold2aa", "fold2aa": "aa2fold"}


@dataclass(frozen=True)
class Prompt:
    """What was asked for.

    Attributes:
        text: the prompt as residues, gaps as sentinels; without spaces, terminals and tags.
        ids: what the network reads first.
        start: the tokens that the text begins with: a decoder's start token, or the whole prompt where the text goes
            on from it.
        ends: the tokens that end a text.
        residues: letters that the prompt has.
        reverse: whether it is written from the C-terminus to the N-terminus.
    """

    text: str
    kind: Kind
    task: str | None
    ids: Sequence[int]
    residues: int
    gaps: tuple[int, ...] = ()
    start: Sequence[int] = (START,)
    ends: tuple[int, ...] = (EOS,)
    reverse: bool = False


def writer(model: Model) -> T5 | ProGen2:
    """The network of a model that writes. Raises: ValueError for another."""
    net = model.net
    if isinstance(net, ProGen2) or (isinstance(net, T5) and net.decoder is not None):
        return net
    raise ValueError(
        f"{model.checkpoint.name} writes no sequences; use ProGen2, or a model with a decoder such as ankh3-large"
    )


def plan(model: Model, prompts: Given | Iterable[Given], task: str | None) -> list[Prompt]:
    """What each prompt asks for. Raises: ValueError; InputError with every prompt that cannot be used."""
    if not isinstance(model, Model):
        raise TypeError(f"the first argument must be a model: plm.load({model!r})")
    causal = isinstance(writer(model), ProGen2)
    if causal:
        running.choose_task(model, task)  # which raises if there is one: ProGen2 has none
    planned, faults = [], []
    for i, given in enumerate(texts_or_ids(model, prompts)):
        try:
            if isinstance(given, str):
                planned.append(causal_prompt(model, given) if causal else prompt(model, given, task))
            else:
                ids = token_ids(given, i)
                planned.append(causal_prompt_of_ids(model, ids) if causal else prompt_of_ids(model, ids))
        except InputError as error:
            faults += [Fault(fault.reason, fault.hint, record=i + 1, id=str(given)[:12]) for fault in error.faults]
    if faults:
        raise InputError("prompts", faults)
    return planned


def texts_or_ids(model: Model, prompts: Any) -> list[Any]:
    """One prompt or many, as a list; texts as ``running.as_list`` takes them."""
    texts = isinstance(prompts, tuple) and all(isinstance(each, str) for each in prompts)
    return running.as_list(model, prompts) if texts or isinstance(prompts, str | bytes | Mapping) else list(prompts)


def token_ids(given: Any, i: int) -> list[int]:
    """The ids of prompt number ``i``. Raises: TypeError if it is something else."""
    try:
        return [int(token) for token in given]
    except (TypeError, ValueError):
        raise TypeError(
            f"a prompt must be text or a row of token ids; number {i + 1} is {given!r}: give [[7, 8, 1]]"
        ) from None


def prompt_of_ids(model: Model, ids: list[int]) -> Prompt:
    """A completion of token ids by an encoder and a decoder, or a translation if they begin with its prefix.

    Raises: ValueError for unknown ids.
    """
    tokenizer = model.tokenizer
    letters = tokenizer.residue_text(ids)
    first = tokenizer.vocabulary[ids[0]] if ids else ""
    task = next(
        (name for name in OTHER_ALPHABET if name in tokenizer.tasks and tokenizer.tasks[name].prefix == first), None
    )
    return Prompt(letters, "translation" if task else "completion", task, ids, len(letters))


def prompt(model: Model, given: str, task: str | None) -> Prompt:
    """One prompt of an encoder and a decoder, its gaps ``_`` numbered. Raises: InputError."""
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


def causal_prompt(model: Model, given: str) -> Prompt:
    """One prompt of ProGen2: "1" and what follows from N to C, "2" and what follows from C to N; bare residues get "1".

    Raises: InputError.
    """
    tokenizer = model.tokenizer
    ends = f"{tokenizer.start}{tokenizer.end}"
    if not given.strip():
        raise InputError("prompt", [Fault("the prompt is empty", f"give {tokenizer.start} to write from nothing")])
    found = BEFORE.match(given)
    before = found[0] if found else ""
    body = given.removeprefix(before)
    added = "" if body.startswith(tuple(ends)) else ends[0]
    if inner := next((i for i, letter in enumerate(body) if i and letter in ends), None):
        raise InputError("prompt", [finished_already(body[inner], len(before) + inner + 1)])
    try:
        ids = tokenizer.encode(before + added + body)
    except ValueError as error:

        def as_given(found: re.Match[str]) -> str:
            place = int(found[1])
            return f"at position {place - len(added) if place > len(before) else place}"

        hint = f"letters are those of {model.checkpoint.name}; the original leaves out what it does not know"
        raise InputError("prompt", [Fault(re.sub(r"at position (\d+)", as_given, str(error)), hint)]) from None
    return causal_prompt_of_ids(model, ids)


def causal_prompt_of_ids(model: Model, ids: list[int]) -> Prompt:
    """A ProGen2 prompt of token ids, as they are. Raises: InputError."""
    tokenizer, net = model.tokenizer, writer(model)
    assert isinstance(net, ProGen2)
    config = net.config
    if not ids:
        raise InputError("prompt", [Fault("the prompt is empty", f"give {tokenizer.start} to write from nothing")])
    if wrong := [token for token in ids if not 0 <= token < config.vocabulary]:
        reason = f"ids {wrong[:5]} are not in the vocabulary of {config.vocabulary} tokens"
        raise InputError("prompt", [Fault(reason, "give the ids of model.tokenizer.encode(text)")])
    terminals, letters = (tokenizer.start_id, tokenizer.end_id), tokenizer.residue_ids
    ends = (tokenizer.vocabulary.index("<|eos|>"), *terminals)
    first = next((i for i, token in enumerate(ids) if token in (*terminals, *letters)), len(ids))  # behind tags
    if (inner := next((i for i in range(first + 1, len(ids)) if ids[i] in ends), None)) is not None:
        raise InputError("prompt", [finished_already(tokenizer.vocabulary[ids[inner]], inner + 1)])
    if len(ids) > config.max_length:
        reason = f"{len(ids):,} tokens with the terminal; {model.checkpoint.name} reads at most {config.max_length:,}"
        raise InputError("prompt", [Fault(reason, "give its last residues, from where the sequence is to go on")])
    text = "".join(tokenizer.vocabulary[token] for token in ids if token in letters)
    reverse = tokenizer.end_id in ids[first : first + 1]
    return Prompt(text, "completion", None, ids, len(text), start=ids, ends=ends, reverse=reverse)


def finished_already(terminal: str, place: int) -> Fault:
    """A prompt behind whose terminal nothing can follow."""
    return Fault(f"{terminal} at position {place} ends the sequence", "give what stands before it, or nothing but it")


def lengths(prompt: Prompt, limit: int | None, bounds: tuple[int | None, int | None, int | None]) -> tuple[int, int]:
    """The least and the greatest number of tokens, those that the text begins with counted.

    ``limit`` is the most that the checkpoint reads, and ``bounds`` are min_length, max_length and length as given.

    Raises: ValueError for bounds that contradict each other or the prompt.
    """
    shortest, longest, residues = bounds
    given = len(prompt.start)
    if residues is not None:
        if prompt.kind != "completion":
            raise ValueError(f"length is of a completed sequence, and this is a case of {prompt.kind}: leave it out")
        if shortest is not None or longest is not None:
            raise ValueError("length takes the place of max_length and min_length: give the one or the others")
        if residues <= prompt.residues:
            raise ValueError(f"length={residues}, but the prompt has {prompt.residues} residues already; give more")
        shortest = longest = residues - prompt.residues + given
    if shortest is not None and shortest < 0:
        raise ValueError(f"min_length must not be negative; got {shortest}")
    if limit is not None:
        # The last token is written but never read, so there can be one more of them than positions.
        if longest is not None and longest > limit + 1:
            name, number = ("max_length", longest) if residues is None else ("length", residues)
            most = number - (longest - limit - 1)
            raise ValueError(f"{name}={number}, but the model reads at most {limit} tokens: give {most} or less")
        return shortest or 0, max(limit, given + 1) if longest is None else longest
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
    may = torch.ones(writer(model).config.outputs, dtype=torch.bool)
    if residues_only or prompt.kind == "translation":
        letters = set(tokenizer.residue_ids)
        if prompt.kind == "translation" and prompt.task is not None:
            wanted = tokenizer.tasks[OTHER_ALPHABET[prompt.task]].letters or ""
            letters = set(tokenizer.residues("".join(letter for letter in wanted if letter not in tokenizer.rare)))
        letters |= {*prompt.ends, *(tokenizer.sentinel(gap) for gap in prompt.gaps)}
        may = torch.zeros_like(may).index_fill(0, torch.tensor(sorted(letters)), True)
    for token in banned:
        may[token_id(model, token, "banned")] = False
    return may


def forced_places(model: Model, prompt: Prompt, residues: Mapping[int, str | int], longest: int) -> dict[int, int]:
    """The token of each place of a text, from the residue of each position of a completed sequence (from 1).

    Raises: ValueError for a position that the prompt has already or the text has not, or an unknown token.
    """
    if residues and (prompt.kind != "completion" or prompt.start == (START,)):
        raise ValueError("forced is for models whose text goes on from the prompt, such as ProGen2: leave it out")
    places = {}
    for position, token in residues.items():
        place = len(prompt.start) - prompt.residues + position - 1
        if not len(prompt.start) <= place < longest:
            raise ValueError(
                f"forced position {position} cannot be written: the prompt has {prompt.residues} residues, and there "
                f"is room for {longest - len(prompt.start)} more; positions count from 1, in the order of writing"
            )
        places[place] = token_id(model, token, "forced")
    return places


def token_id(model: Model, token: str | int, what: str) -> int:
    """The id of a token given as text or id. Raises: ValueError if the vocabulary does not have it."""
    vocabulary = model.tokenizer.vocabulary
    number = vocabulary.index(token) if token in vocabulary else token
    if not isinstance(number, int) or not 0 <= number < writer(model).config.outputs:
        raise ValueError(f"{what} token {token!r} is not in the vocabulary; it has {' '.join(vocabulary)}")
    return number
