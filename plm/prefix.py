"""Log-likelihoods of variants from what a causal model made of the wild type, read once in each direction.

Before the first residue in which a variant differs, a causal model sees the wild type, so all keys and values there are
known. A variant runs from that residue on and attends to the wild type's tokens and to its own. Read from the other
end, what it shares is the C-terminal part. All single substitutions of a protein take half the tokens of whole ones.

Letters: n packed tokens, b variants, m tokens that a variant runs, s residues that it shares, h heads, d head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from plm import running
from plm.loading import Model
from plm.models.progen2 import ProGen2
from plm.packing import Packed, batches
from plm_kernels import attention


@dataclass(frozen=True)
class Start:
    """The wild type as it is read from one end."""

    backward: bool
    residues: bytes  # in the order of reading
    keys: list[Tensor]  # per layer [h, t, d] of the terminal and the residues behind it
    values: list[Tensor]
    log_probs: Tensor  # [t, letters] float64 on the CPU, of the residue behind each token
    own: Tensor  # [t - 1]: those of the wild type


@dataclass(frozen=True)
class Rest:
    """A variant as it is read from one end, of which ``shared`` residues are the wild type's."""

    start: Start
    residues: bytes
    shared: int

    @property
    def tokens(self) -> bytes:
        """What has to be read: from the first change on, without the last residue."""
        return self.residues[self.shared : -1]

    @property
    def run(self) -> tuple[bool, int, int]:
        """Rests of one run attend to the same tokens and have equally many."""
        return self.start.backward, self.shared, len(self.tokens)


def likelihood_differences(
    model: Model, wild_type: bytes, rows: Sequence[bytes], max_tokens: int | None = None
) -> Iterator[tuple[int, float]]:
    """(index, log-likelihood less that of the wild type, in nats) of every row, as batches finish.

    The log-likelihood is ProGen2's of ``plm.score``: the mean of both directions, softmax over the letters alone,
    terminals not scored. Rows may be of any length. The same as scoring each row whole, but for rounding.
    """
    budget = running.default_max_tokens(model) if max_tokens is None else max_tokens
    starts = read_wild_type(model, wild_type)
    rests = [[rest_of(start, row) for start in starts] for row in rows]
    # Variants of one site side by side, so that one call attends for all of them.
    order = sorted(range(len(rows)), key=lambda i: [rest.run for rest in rests[i]])
    lengths = [sum(len(rest.tokens) for rest in rests[i]) for i in order]

    @torch.inference_mode()
    def work(group: list[int]) -> Tensor:
        both = [rest for direction in zip(*(rests[i] for i in group), strict=True) for rest in direction]
        return differences(model, both, budget).view(len(starts), -1).mean(0)

    groups = ([order[i] for i in group] for group in batches(lengths, budget))
    for group, found in running.halved(model, groups, work):
        for i, value in zip(group, found, strict=True):
            running.check_finite(model, i, value)
            yield i, float(value)


@torch.inference_mode()
def read_wild_type(model: Model, wild_type: bytes) -> list[Start]:
    """Keys, values and log-probabilities of the wild type from N to C, and from C to N."""
    net, tokenizer = causal(model), model.tokenizer
    texts = [wild_type, wild_type[::-1]]
    ends = [tokenizer.start_id, tokenizer.end_id]
    batch = Packed.from_ids([[end, *text] for end, text in zip(ends, texts, strict=True)], device=model.device)
    layers: list[tuple[list[Tensor], list[Tensor]]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = ([x.transpose(0, 1).contiguous() for x in batch.split(each)] for each in (k, v))
        layers.append((keys, values))
        scale = net.config.head_size**-0.5
        return attention(q, k, v, batch.offsets, scale=scale, causal=True, max_length=batch.max_length)

    log_probs = batch.split(letter_log_probs(model, net.read(batch.tokens, batch.positions, attend)).double().cpu())
    starts = []
    for i, (text, table) in enumerate(zip(texts, log_probs, strict=True)):
        own = table[range(len(text)), columns(model, text)]
        keys, values = ([layer[kind][i] for layer in layers] for kind in (0, 1))
        starts.append(Start(bool(i), text, keys, values, table, own))
    return starts


def rest_of(start: Start, row: bytes) -> Rest:
    """A variant's row behind what it shares with the wild type."""
    text = row[::-1] if start.backward else row
    pairs = enumerate(zip(text, start.residues, strict=False))
    shortest = min(len(text), len(start.residues))
    return Rest(start, text, next((i for i, (one, other) in pairs if one != other), shortest))


def differences(model: Model, rests: Sequence[Rest], budget: int) -> Tensor:
    """Log-likelihood ``[b]`` of each rest less that of the wild type's own, in float64 on the CPU.

    ``budget`` bounds the tokens whose keys are laid out side by side.
    """
    net = causal(model)
    total = -torch.stack([rest.start.own[rest.shared :].sum() for rest in rests])
    for i, rest in enumerate(rests):
        if new := rest.residues[rest.shared :]:  # whose first follows from the wild type's tokens alone
            total[i] += rest.start.log_probs[rest.shared, columns(model, new[:1])[0]]
    runs = [Run(list(members), net.config.head_size**-0.5, budget) for _, members in groupby(rests, lambda x: x.run)]
    read = [rest for rest in rests if rest.tokens]
    if not read:
        return total
    tokens = torch.frombuffer(bytearray(b"".join(rest.tokens for rest in read)), dtype=torch.uint8).long()
    lengths = torch.tensor([len(rest.tokens) for rest in rests])
    positions = torch.cat([torch.arange(len(rest.tokens)) + rest.shared + 1 for rest in read])
    sizes = [run.size for run in runs]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([run.attend(layer, *some) for run, *some in pieces])

    hidden = net.read(tokens.to(model.device), positions.to(model.device), attend)
    targets = columns(model, b"".join(rest.residues[rest.shared + 1 :] for rest in read))
    found = letter_log_probs(model, hidden).gather(1, torch.tensor(targets, device=model.device)[:, None])
    return total.index_add(0, torch.repeat_interleave(lengths), found[:, 0].double().cpu())


class Run:
    """Rests of one length behind the same tokens of the wild type, which attend together."""

    def __init__(self, rests: list[Rest], scale: float, budget: int) -> None:
        self.start, self.scale = rests[0].start, scale
        self.before, self.length = rests[0].shared + 1, len(rests[0].tokens)
        self.size = len(rests) * self.length
        self.together = max(1, budget // (self.before + self.length))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each token ``[b m, h, d]`` to the wild type's, and to those of its own variant up to itself."""
        if not self.length:
            return q
        seen = torch.ones(self.length, self.before + self.length, dtype=torch.bool, device=q.device).tril(self.before)
        before = [x[layer][:, : self.before] for x in (self.start.keys, self.start.values)]
        mixed = []
        for queries, *own in zip(*(x.split(self.together * self.length) for x in (q, k, v)), strict=True):
            rows = queries.unflatten(0, (-1, self.length)).transpose(1, 2)  # [b, h, m, d]
            keys, values = (
                torch.cat((old.expand(len(rows), -1, -1, -1), new.unflatten(0, (-1, self.length)).transpose(1, 2)), 2)
                for old, new in zip(before, own, strict=True)
            )
            out = F.scaled_dot_product_attention(rows, keys, values, seen, scale=self.scale)
            mixed.append(out.transpose(1, 2).flatten(0, 1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def letter_log_probs(model: Model, hidden: Tensor) -> Tensor:
    """Log-probabilities ``[n, letters]`` of the next residue, from letters alone, in float32 at least."""
    letters, precise = list(model.tokenizer.residue_ids), torch.promote_types(hidden.dtype, torch.float32)
    head = causal(model).lm_head
    weight, bias = (x[letters].to(precise) for x in (head.weight, head.bias))
    return F.linear(hidden.to(precise), weight, bias).log_softmax(-1)


def columns(model: Model, residues: bytes) -> list[int]:
    """Where residues stand among the letters."""
    place = {token: i for i, token in enumerate(model.tokenizer.residue_ids)}
    return [place[token] for token in residues]


def causal(model: Model) -> ProGen2:
    """The network. Raises: TypeError if it reads from both sides at once."""
    if not isinstance(model.net, ProGen2):
        raise TypeError(f"{model.checkpoint.name} is no causal model: it has no prefix to share")
    return model.net
