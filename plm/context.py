"""What ProteinBERT computes with beside residues: pads and annotations. The other families have neither."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor

from plm.loading import Model
from plm.models.proteinbert import ProteinBERT
from plm.packing import Packed

SHORTEST = 3  # <START>, one residue, <END>


class Encoded(NamedTuple):
    """What another encoder than ProteinBERT's gives."""

    hidden: Tensor  # [n, c]


@dataclass(frozen=True, eq=False)
class Context:
    """A model, and what it is given beside the sequences.

    Attributes:
        pad_to: tokens of every sequence with its pads, as the original's ``seq_len``; None gives each the numbers that
            it has alone and without pads.
        annotations: ``[sequences, a]``, what is known of each; None where nothing is.
    """

    model: Model
    pad_to: int | None = None
    annotations: Tensor | None = None

    @classmethod
    def of(cls, model: Model, count: int, pad_to: int | None, annotations: Tensor | None) -> Self:
        """For ``count`` sequences.

        Raises:
            ValueError: the model takes none of this, ``pad_to`` holds no residue, or annotations of another shape or
                that are not finite.
            TypeError: ``pad_to`` is no whole number, or annotations are no tensor.
        """
        check_padding(model, pad_to)
        check_annotations(model, count, annotations)
        return cls(model, pad_to, annotations)

    def options(self, members: Sequence[int]) -> dict[str, Any]:
        """What the network of a ProteinBERT takes for some of the sequences; nothing for another."""
        if not isinstance(self.model.net, ProteinBERT):
            return {}
        known = None if self.annotations is None else self.annotations[list(members)].to(self.model.device)
        return {"pad_to": self.pad_to, "annotations": known}

    def encode(self, batch: Packed, members: Sequence[int], *, layer: int | None = None, global_: bool = False) -> Any:
        """``net.encode`` for some of the sequences; ``global_``: whether a ProteinBERT's global state is wanted."""
        if not isinstance(self.model.net, ProteinBERT):
            return Encoded(self.model.graphs.hidden(self.model.net, batch, layer))
        return self.model.net.encode(batch, layer=layer, global_=global_, **self.options(members))


def check_padding(model: Model, pad_to: int | None) -> None:
    """Raises: ValueError if the model's numbers know no pads, or if no residue would fit; TypeError for no integer."""
    if pad_to is None:
        return
    if not isinstance(model.net, ProteinBERT):
        raise ValueError(f"pad_to is for ProteinBERT; pads change no number of {model.checkpoint.name}: leave it out")
    if not isinstance(pad_to, int) or isinstance(pad_to, bool):
        raise TypeError(f"pad_to must be a whole number of tokens, such as 512; got {pad_to!r}")
    if pad_to < SHORTEST:
        raise ValueError(f"pad_to must be at least {SHORTEST}: <START>, one residue and <END>; got {pad_to}")


def check_annotations(model: Model, count: int, annotations: Tensor | None) -> None:
    """Raises: ValueError if the model reads none, or not these for ``count`` sequences; TypeError for no tensor."""
    if annotations is None:
        return
    name = model.checkpoint.name
    if not isinstance(model.net, ProteinBERT):
        raise ValueError(f"annotations are for ProteinBERT; {name} reads residues alone: leave them out")
    if not isinstance(annotations, Tensor):
        raise TypeError(f"annotations must be a tensor [sequences, annotations]; got a {type(annotations).__name__}")
    wanted = (count, model.net.config.annotations)
    if annotations.shape != wanted:
        raise ValueError(
            f"annotations have shape {[*annotations.shape]}; {name} takes {[*wanted]}: a row for each of the {count:,} "
            f"sequences, with {wanted[1]:,} numbers, 1 for what is known of it and 0 for the rest"
        )
    broken = (~annotations.isfinite()).any(-1).nonzero()[:, 0].tolist()
    if broken:
        rows = ", ".join(str(i + 1) for i in broken[:5])
        raise ValueError(f"annotations have a NaN or an infinity in rows {rows} (of {len(broken)}); give 0 and 1")
