"""Sizes of an ESMFold, under short names; `plm_weights.esmfold` knows the published ones."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StructureConfig:
    """Sizes of the structure module. ``scale`` is Ångström per unit of its coordinates."""

    channels: int
    pair: int
    layers: int
    heads: int
    head_size: int
    query_points: int
    value_points: int
    transitions: int
    angle_channels: int
    angle_blocks: int
    scale: float = 10.0


@dataclass(frozen=True)
class Config:
    """Sizes of one checkpoint.

    ``stem`` holds the keywords of the config of the ESM-2 below. ``passes`` is how often the trunk runs unless told
    otherwise, one more than there are recycles. ``position_bins``: distances along the chain beyond it look alike.
    """

    stem: dict[str, Any]
    blocks: int
    channels: int
    pair: int
    head_size: int
    pair_head_size: int
    position_bins: int
    passes: int
    confidence_channels: int
    structure: StructureConfig

    def __post_init__(self) -> None:
        if isinstance(self.structure, dict):  # as a config.json holds it
            object.__setattr__(self, "structure", StructureConfig(**self.structure))
        for what, channels, size in (
            ("channels", self.channels, self.head_size),
            ("pair", self.pair, self.pair_head_size),
        ):
            if channels % size:
                raise ValueError(f"{what} must be a multiple of its head size; got {channels} and {size}")

    @property
    def layers(self) -> int:
        """Of the trunk."""
        return self.blocks

    @property
    def max_length(self) -> None:
        """No limit but memory."""
        return

    @property
    def widest(self) -> int:
        """Channels of the widest activation of a residue."""
        return max(int(self.stem["feed_forward"]), 4 * self.channels)
