"""Heads of fine-tuning for ProteinBERT, and how weights begin: what training needs beside the network itself.

Numbers follow nadavbra/protein_bert@83198c9 (proteinbert/finetuning.py and model_generation.py): dropout and one dense
layer on what the network gives per residue or per protein, with the losses that Keras makes of it.

Letters: b proteins, t tokens, i inputs of a head, o labels, v vocabulary, c local channels, g global channels, a
annotations, l blocks.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plm.models.proteinbert import Config, GlobalAttention, ProteinBERT

Kind = Literal["binary", "categorical", "numeric"]
Reads = Literal["representations", "probabilities"]
FRAME = 2  # tokens that are no residues: one before them, one behind


class Targets(NamedTuple):
    """What a head should give, and which of it counts."""

    values: Tensor  # [b], or [b, t] per residue; int64 of a categorical task, else float64
    weights: Tensor  # alike, float32: 1 where a value counts, 0 elsewhere


@dataclass(frozen=True)
class Task:
    """What is predicted, and for what.

    Args:
        kind: "binary" (labels 0 and 1), "categorical" (one of ``labels``), "numeric" (a number).
        per_residue: for each residue, or else for each protein.
        labels: of a categorical task, in the order of its outputs; kept and compared as text, one letter per residue.

    Raises: ValueError for labels that a kind does not have or that are not different from each other.
    """

    kind: Kind
    per_residue: bool = False
    labels: Sequence[object] = ()

    def __post_init__(self) -> None:
        labels = tuple(map(str, self.labels))
        match self.kind:
            case "categorical":
                if len(labels) < 2 or len(set(labels)) < len(labels):
                    raise ValueError(f"a categorical task needs two different labels or more; got {[*labels]}")
            case "binary":
                if labels not in ((), ("0", "1")):
                    raise ValueError(f"a binary task has the labels 0 and 1; got {[*labels]}: make it categorical")
                labels = ("0", "1")
            case "numeric":
                if labels:
                    raise ValueError(f"a numeric task has no labels; got {[*labels]}: make it categorical")
            case _:
                raise ValueError(f"kind must be 'binary', 'categorical' or 'numeric'; got {self.kind!r}")
        if long := [label for label in labels if self.per_residue and len(label) != 1]:
            raise ValueError(f"labels per residue are one letter each, as a protein's are one text; got {long}")
        object.__setattr__(self, "labels", labels)

    @property
    def outputs(self) -> int:
        """Numbers per residue or protein."""
        return len(self.labels) if self.kind == "categorical" else 1

    def targets(self, labels: Sequence[object], lengths: Sequence[int], width: int | None = None) -> Targets:
        """Labels as tensors on a CPU.

        Args:
            labels: one per protein. Per residue that is a text with one letter for each, or (numeric) as many numbers;
                the original accepts a numeric task per residue and then fails. True and 1.0 are the binary label 1.
            lengths: tokens of each protein, both ends included (`Packed.lengths`).
            width: tokens ``t`` of the padded batch; None is the longest length.

        Raises: ValueError naming the protein, for a label that the task does not have, a number that is none, or
            another number of labels than residues.
        """
        if len(labels) != len(lengths):
            raise ValueError(f"{len(labels)} labels for {len(lengths)} proteins; give one for each")
        if not self.per_residue:
            found = [self._value(label, f"protein {i}") for i, label in enumerate(labels)]
            return Targets(self._cast(torch.tensor(found, dtype=torch.float64)), torch.ones(len(found)))
        width = max(lengths) if width is None else width
        if max(lengths) > width:
            raise ValueError(f"a protein has {max(lengths)} tokens, more than width={width}; pad to more")
        values, weights = torch.zeros(len(labels), width, dtype=torch.float64), torch.zeros(len(labels), width)
        for i, (row, length) in enumerate(zip(labels, lengths, strict=True)):
            if not isinstance(row, Collection) or len(row) != length - FRAME:
                told = f"{len(row)} labels" if isinstance(row, Collection) else f"the label {row!r}"
                raise ValueError(f"protein {i} has {length - FRAME} residues, but {told}; give one for each residue")
            found = [self._value(label, f"residue {j} of protein {i}") for j, label in enumerate(row, start=1)]
            values[i, 1 : length - 1] = torch.tensor(found, dtype=torch.float64)  # behind <START>
            weights[i, 1 : length - 1] = 1
        return Targets(self._cast(values), weights)

    def _value(self, label: object, where: str) -> float:
        """A label as a number."""
        if self.kind != "numeric":
            name = str(int(label)) if self.kind == "binary" and label in (0, 1) else str(label)
            if name not in self.labels:
                raise ValueError(f"{where} has the label {name!r}, which is none of {[*self.labels]}")
            return self.labels.index(name)
        try:
            number = float(label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{where} has the label {label!r}; a numeric task needs finite numbers")
        return number

    def _cast(self, values: Tensor) -> Tensor:
        """Classes are whole numbers."""
        return values.long() if self.kind == "categorical" else values

    def loss(self, logits: Tensor, targets: Targets) -> Tensor:
        """Cross-entropy in nats, or squared error of a numeric task, as Keras averages it: over all positions, also
        those that do not count.

        Args:
            logits: ``[b, t, o]`` or ``[b, o]`` of a categorical task, ``[b, t]`` or ``[b]`` of the others.

        Raises: ValueError for targets of another shape.
        """
        shape = logits.shape[:-1] if self.kind == "categorical" else logits.shape
        if not targets.values.shape == targets.weights.shape == shape:
            raise ValueError(
                f"targets must have shape {[*shape]}, as the predictions have; got values {[*targets.values.shape]} "
                f"and weights {[*targets.weights.shape]}"
            )
        values, weights = (x.to(logits.device) for x in targets)
        if self.kind == "categorical":
            each = F.cross_entropy(logits.movedim(-1, 1), values, reduction="none")
        elif self.kind == "binary":
            each = F.binary_cross_entropy_with_logits(logits, values.to(logits.dtype), reduction="none")
        else:
            each = (logits - values.to(logits.dtype)).square()
        return (each * weights).mean()


class Head(nn.Module):
    """Dropout, then one dense layer: ``[..., i]`` to ``[..., o]`` of a categorical task, to ``[...]`` of the others.

    New weights begin as Keras' do.
    """

    def __init__(self, task: Task, inputs: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.task = task
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(inputs, task.outputs)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or the values of a numeric task. Raises: ValueError for another number of inputs."""
        if x.shape[-1] != self.dense.in_features:
            raise ValueError(
                f"this head reads {self.dense.in_features} numbers per residue or protein; got shape {[*x.shape]}. "
                "It was made for another network, or for another choice of `reads`"
            )
        y: Tensor = self.dense(self.dropout(x))
        return y if self.task.kind == "categorical" else y[..., 0]


@dataclass(frozen=True)
class Prediction:
    """What a fine-tuned network gives for its task."""

    task: Task
    logits: Tensor  # values, of a numeric task

    @property
    def probabilities(self) -> Tensor:
        """Of each label ``[..., o]``, or of label 1 of a binary task. Raises: ValueError of a numeric task."""
        if self.task.kind == "numeric":
            raise ValueError("a numeric task predicts values, which are in .logits, and no probabilities")
        return self.logits.softmax(-1) if self.task.kind == "categorical" else self.logits.sigmoid()


class FineTuned(nn.Module):
    """A ProteinBERT whose outputs a head reads. Both learn, until ``freeze``; dropout is at work until ``eval()``.

    Args:
        reads: "representations", all norms' outputs and the probabilities of pre-training (``2 l c + v`` numbers per
            residue or ``(2 l + 1) g + a`` per protein; 1,562 and 15,599 of the published network), or these
            "probabilities" alone.
        dropout: of what the head reads.

    It trains the very network that it is given (``model.net`` of a loaded model is then another one).

    Raises: ValueError for a network that cannot be trained: another one, or one with weights in 8 bits.
    """

    def __init__(self, net: ProteinBERT, task: Task, *, reads: Reads = "representations", dropout: float = 0.5) -> None:
        super().__init__()
        if not isinstance(net, ProteinBERT):
            raise ValueError(f"these heads read a ProteinBERT; got a {type(net).__name__}")
        if not all(weight.is_floating_point() for weight in net.parameters()):
            raise ValueError("weights in 8 bits cannot be trained; load the model in float32 or bfloat16")
        self.net, self.task, self.reads = net, task, reads
        self.head = Head(task, head_inputs(net.config, task, reads), dropout).to(net.embed.weight)
        self.freeze(False)
        self.train()

    def freeze(self, frozen: bool = True) -> None:
        """Whether the head alone learns, which is how the original begins. Prediction runs faster then."""
        self.frozen = frozen
        self.net.requires_grad_(not frozen)

    def forward(
        self, tokens: Tensor, annotations: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> Prediction:
        """Arguments and errors as those of `ProteinBERT`: without ``lengths`` pads are tokens, as in the original."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.inputs(tokens, annotations, lengths)
        return Prediction(self.task, self.head(x))

    def inputs(self, tokens: Tensor, annotations: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """What the head reads, ``[b, t, i]`` or ``[b, i]``. Layers that it does not depend on are left out, and have no
        gradient: the other head, and for residues the global track of the last block."""
        whole = self.reads == "representations"
        if not self.task.per_residue:
            out = self.net(tokens, annotations, lengths=lengths, hidden_states=whole, local_logits=False)
            return out.global_representations if whole else out.annotation_logits.sigmoid()  # type: ignore[no-any-return]
        out = self.net.tracks(tokens, annotations, lengths=lengths, hidden_states=whole, global_=False)
        logits = self.net.logits(out.local.flatten(0, 1)).unflatten(0, tokens.shape)
        return replace(out, local_logits=logits).local_representations if whole else logits.softmax(-1)


def head_inputs(config: Config, task: Task, reads: Reads) -> int:
    """How many numbers a head reads for each residue or protein."""
    if reads not in ("representations", "probabilities"):
        raise ValueError(f"reads must be 'representations' or 'probabilities'; got {reads!r}")
    last = config.local_slices["letters"] if task.per_residue else config.global_slices["annotations"]
    return last.stop if reads == "representations" else last.stop - last.start  # type: ignore[no-any-return]


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill a network or a head for training from scratch, as Keras does by default: Glorot's uniform matrices (Glorot
    and Bengio 2010), zero biases, embeddings within 0.05, norms at one."""
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        for name, parameter in own.items():
            if isinstance(part, nn.Embedding):
                nn.init.uniform_(parameter, -0.05, 0.05, generator)
            elif parameter.dim() >= 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.constant_(parameter, float(isinstance(part, nn.LayerNorm) and name == "weight"))
    for part in module.modules():
        if isinstance(part, GlobalAttention):
            for layer in (part.query, part.key, part.value):
                # Keras takes the first axis of [h, i, d] for the taps of a convolution, so that all heads share fans.
                limit = math.sqrt(6 / (layer.in_features * part.heads + layer.out_features))
                nn.init.uniform_(layer.weight, -limit, limit, generator)
