"""ProteinBERT once more, as plain formulas on the list of weights that Keras keeps: nothing of our network is at work.

Written from the description of nadavbra/protein_bert@83198c9, in its order and its layouts: dense kernels ``[i, o]``,
convolutions ``[k, i, o]``, attention ``[h, i, d]``. A sum per tap, per head and per channel, in any dtype. That these
formulas are the original's is shown by its own stored numbers (test_oracle_proteinbert.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NORM_EPS = 1e-3
PAD = 25


@dataclass(frozen=True)
class Twin:
    """Sizes of a model that runs in milliseconds, those of its batch, and the seed of both."""

    blocks: int
    channels: int
    global_channels: int
    heads: int
    key_size: int
    kernel: int
    dilation: int
    annotations: int
    lengths: tuple[int, ...]  # tokens of each protein, pads not counted
    width: int  # pads counted
    seed: int

    def __str__(self) -> str:
        sizes = f"{self.blocks}x{self.channels}x{self.global_channels}-{self.heads}x{self.key_size}"
        return f"{sizes}-k{self.kernel}d{self.dilation}-L{self.width}"

    @property
    def config(self) -> dict[str, Any]:
        """The keywords of our configuration."""
        sizes = {"vocabulary": 26, "annotations": self.annotations, "layers": self.blocks, "channels": self.channels}
        more = {"global_channels": self.global_channels, "heads": self.heads, "key_size": self.key_size}
        return {**sizes, **more, "kernel": self.kernel, "dilation": self.dilation}

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all weights, in Keras' order: by depth in the graph, so that annotations come before letters."""
        c, g, h, d, k = self.channels, self.global_channels, self.heads, self.key_size, self.kernel
        local = [(g, c), (c,), (k, c, c), (c,), (k, c, c), (c,), (c,), (c,), (c, c), (c,), (c,), (c,)]
        attention = [(h, g, d), (h, c, d), (h, c, g // h)]
        block = [*local, (g, g), (g,), *attention, (g,), (g,), (g, g), (g,), (g,), (g,)]
        ends = [(c, 26), (26,), (g, self.annotations), (self.annotations,)]
        return [(self.annotations, g), (g,), (26, c), *(block * self.blocks), *ends]

    def weights(self) -> list[Tensor]:
        """Float32 numbers so that each one matters: no norm is the identity, no bias is zero, no pair is alike."""
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for place, shape in enumerate(self.shapes()):
            noise = torch.randn(shape, generator=generator)
            if is_gain(place, self.blocks):
                noise = 1 + 0.2 * noise
            elif len(shape) == 1:
                noise *= 0.2
            elif place != 2:
                noise *= 1.4 / math.sqrt(shape[0] * shape[1] if is_filter(place, self.blocks) else shape[-2])
            found.append(noise)
        return found

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens ``[b, t]`` and annotations ``[b, a]``: the first protein has none, one of the last is a half."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.full((len(self.lengths), self.width), PAD)
        for row, length in zip(tokens, self.lengths, strict=True):
            row[:length] = torch.randint(PAD, (length,), generator=generator)
        known = (torch.rand(len(self.lengths), self.annotations, generator=generator) < 0.3).float()
        known[0], known[-1, 0] = 0, 0.5
        return tokens, known


def is_gain(place: int, blocks: int) -> bool:
    """Whether the weight at this place of the list is a norm's gamma."""
    return in_block(place, blocks) in (6, 10, 17, 21)


def is_filter(place: int, blocks: int) -> bool:
    return in_block(place, blocks) in (2, 4)


def in_block(place: int, blocks: int) -> int | None:
    """The place within its block, if it is in one."""
    return (place - 3) % 23 if 3 <= place < 3 + 23 * blocks else None


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def dense(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("...i,io->...o", x, kernel) + bias


def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return gamma * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + NORM_EPS) + beta


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Every position in turn: the taps that lie within the sequence, of which the middle one is at the position."""
    left = (len(kernel) - 1) * dilation // 2
    rows = []
    for t in range(x.shape[1]):
        reached = [(tap, t + tap * dilation - left) for tap in range(len(kernel))]
        inside = [(tap, at) for tap, at in reached if 0 <= at < x.shape[1]]
        rows.append(sum(torch.einsum("bi,io->bo", x[:, at], kernel[tap]) for tap, at in inside) + bias)
    return torch.stack(rows, 1)


def attend(g: Tensor, h: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What each head gives, end to end ``[b, g]``, and what it looks at ``[b, h, t]``."""
    outputs, maps = [], []
    for wq, wk, wv in zip(queries, keys, values, strict=True):
        q, k, v = torch.tanh(g @ wq), torch.tanh(h @ wk), gelu(h @ wv)
        powers = torch.exp(torch.einsum("bd,btd->bt", q, k) / math.sqrt(wq.shape[1]))
        maps.append(powers / powers.sum(-1, keepdim=True))
        outputs.append(torch.einsum("bt,btv->bv", maps[-1], v))
    return torch.cat(outputs, -1), torch.stack(maps, 1)


def run(weights: Sequence[Tensor], tokens: Tensor, annotations: Tensor, dilation: int) -> dict[str, Tensor]:
    """Every output and every step within the blocks, under the names of the stored truths."""
    take = iter(weights)
    found: dict[str, Tensor] = {}
    g = gelu(dense(annotations, next(take), next(take)))
    h = next(take)[tokens]
    found |= {"embedding.local": h, "embedding.global": g}
    local, both = [], [g]
    for b in range(1, (len(weights) - 7) // 23 + 1):
        steps = block(take, h, g, dilation)
        h, g = steps["local"], steps["global"]
        found |= {f"block{b}.{name}": x for name, x in steps.items()}
        local += [steps["local_mid"], h]
        both += [steps["global_mid"], g]
    found["seq_logits"] = dense(h, next(take), next(take))
    found["annotation_logits"] = dense(g, next(take), next(take))
    assert next(take, None) is None
    powers = found["seq_logits"].exp()
    found["seq_probs"] = powers / powers.sum(-1, keepdim=True)
    found["annotation_probs"] = 1 / (1 + torch.exp(-found["annotation_logits"]))
    found["local_representations"] = torch.cat([*local, found["seq_probs"]], -1)
    found["global_representations"] = torch.cat([*both, found["annotation_probs"]], -1)
    return found


def block(take: Iterator[Tensor], h: Tensor, g: Tensor, dilation: int) -> dict[str, Tensor]:
    z = gelu(dense(g, next(take), next(take)))
    narrow = gelu(convolve(h, next(take), next(take), 1))
    wide = gelu(convolve(h, next(take), next(take), dilation))
    local_mid = norm(h + z[:, None] + narrow + wide, next(take), next(take))
    local = norm(local_mid + gelu(dense(local_mid, next(take), next(take))), next(take), next(take))
    d = gelu(dense(g, next(take), next(take)))
    mixed, maps = attend(g, local, next(take), next(take), next(take))
    global_mid = norm(g + d + mixed, next(take), next(take))
    return {
        "global_to_local": z,
        "narrow_conv": narrow,
        "wide_conv": wide,
        "local_mid": local_mid,
        "local": local,
        "global_dense1": d,
        "attention_output": mixed,
        "attention_weights": maps,
        "global_mid": global_mid,
        "global": norm(global_mid + gelu(dense(global_mid, next(take), next(take))), next(take), next(take)),
    }


def losses(found: dict[str, Tensor], tokens: Tensor, annotations: Tensor) -> dict[str, Tensor]:
    """The two losses of pre-training and their sum. Pads and proteins without annotations add nothing, but count."""
    letters = -found["seq_probs"].log().gather(-1, tokens[..., None])[..., 0]
    yes, no = found["annotation_probs"].log(), (1 - found["annotation_probs"]).log()
    known = -(annotations * yes + (1 - annotations) * no).mean(-1)
    sequence = (letters * (tokens != PAD)).sum() / tokens.numel()
    of_annotations = (known * (annotations.sum(-1) > 0)).sum() / len(tokens)
    return {"total": sequence + of_annotations, "sequence": sequence, "annotations": of_annotations}


def head_loss(x: Tensor, kernel: Tensor, bias: Tensor, kind: str, wanted: Tensor, counted: Tensor) -> Tensor:
    """Of a fine-tuning head on ``x``: the mean over everything, where what is not counted adds zero."""
    y = dense(x, kernel, bias)
    if kind == "categorical":
        each = -y.softmax(-1).log().gather(-1, wanted.long()[..., None])[..., 0]
    elif kind == "binary":
        p = 1 / (1 + torch.exp(-y[..., 0]))
        each = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
    else:
        each = (y[..., 0] - wanted) ** 2
    return (each * counted).sum() / each.numel()
