"""ESMFold: a language model's states of one sequence, a folding trunk, and a structure module.

Lin et al. 2023, doi:10.1126/science.ade2574. Numbers follow facebookresearch/esm@2b36991 and transformers 5.23.

Proteins fold one at a time, each on tensors of its own length, so there is no padding and no mask; only the language
model below reads many at once. Letters: n packed tokens, l residues, c channels, p channels of a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plm.esmfold.chains import Chains
from plm.esmfold.confidence import ERRORS, AtomConfidence, accuracy, pair_errors
from plm.esmfold.config import Config
from plm.esmfold.geometry import atoms, backbone_atoms, distance_bins, group_frames, rotation
from plm.esmfold.pair import chunks
from plm.esmfold.residues import LETTERS, tables
from plm.esmfold.structure import Frames, StructureModule
from plm.esmfold.trunk import Block
from plm.layers import Linear, unpacked
from plm.packing import Packed

DISTANCES = 15  # ranges of the distance between two CB that a recycle is told
DISTOGRAM = 64
# Modules that stay in float32 when the trunk is in half precision: what sums and what places atoms, as bfloat16 holds
# 50 Å to a quarter of an Ångström. Of the trunk's blocks only the products are in half precision.
FLOAT32_AT_LEAST = (
    "stem_transition",
    "recycle_norm",
    "recycle_pair_norm",
    "recycle_distances",
    "relative_positions",
    "to_structure",
    "to_structure_pair",
    "structure",
    "confidence_head",
    "error_head",
)


@dataclass(frozen=True)
class Prediction:
    """One protein, linkers between its chains included. Coordinates in Ångström."""

    positions: Tensor  # [l, 14, 3], zero where an atom does not exist
    plddt: Tensor  # [l, 37] of each kind of atom, 0 to 1
    pae: Tensor  # [l, l]
    ptm: float
    layers: list[Frames]  # of the structure module in the last pass, coordinates in units of its scale
    angles: Tensor  # [l, 7, 2] sine and cosine, of the last layer
    s: Tensor  # [l, c] residues as the trunk leaves them
    z: Tensor | None  # [l, l, p] pairs, if they were to be kept


class StemTransition(nn.Module):
    """From the language model's channels to the trunk's."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = Linear(channels, outputs)
        self.down = Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x), "relu"))  # type: ignore[no-any-return]


class ESMFold(nn.Module):
    """Call ``fold``. ``stem`` is an ESM-2: it has ``embed_tokens``, ``turns``, ``blocks`` and ``norm``.

    Its blocks may be kept in half precision, as published; its embedding and its norm have the dtype of the rest.
    """

    def __init__(self, config: Config, stem: Any) -> None:
        super().__init__()
        self.config = config
        width, c, pair = int(config.stem["channels"]), config.channels, config.pair
        self.stem: Any = stem
        self.layer_weights = nn.Parameter(torch.zeros(int(config.stem["layers"]) + 1))
        self.stem_transition = StemTransition(width, c)
        self.embed = nn.Embedding(len(LETTERS) + 2, c)
        self.relative_positions = nn.Embedding(2 * config.position_bins + 2, pair)
        self.recycle_norm = nn.LayerNorm(c)
        self.recycle_pair_norm = nn.LayerNorm(pair)
        self.recycle_distances = nn.Embedding(DISTANCES, pair)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.to_structure = Linear(c, config.structure.channels)
        self.to_structure_pair = Linear(pair, config.structure.pair)
        self.structure = StructureModule(config.structure)
        self.confidence_head = AtomConfidence(config)
        self.error_head = Linear(pair, ERRORS)
        self.distogram_head = Linear(pair, DISTOGRAM)
        self.residue_head = Linear(c, len(LETTERS) + 2)

    def fold(
        self,
        batch: Sequence[Chains],
        *,
        recycles: int | None = None,
        rows: int | None = None,
        keep_pairs: bool = False,
    ) -> Iterator[Prediction]:
        """Fold proteins one after the other; the language model reads them together.

        Args:
            recycles: passes of the trunk after the first; None means the checkpoint's (3 as published).
            rows: of pairs that are worked on at a time: memory, not results.
            keep_pairs: give the pairs ``[l, l, p]`` as well.
        """
        passes = self.config.passes if recycles is None else recycles + 1
        packed = Packed.from_ids([chains.stem_tokens for chains in batch], device=self.embed.weight.device)
        states = packed.split(self.stem_states(packed))
        for chains, state in zip(batch, states, strict=True):
            yield self.fold_one(chains, state[1:-1], passes, rows or chains.length, keep_pairs)

    def stem_states(self, batch: Packed) -> Tensor:
        """The learned mean of all states of the language model, ``[n, c]``: a running sum, never all of them."""
        dtype, stem = self.embed.weight.dtype, self.stem
        weights = self.layer_weights.to(self.to_structure.weight.dtype).softmax(0)  # in which they are summed
        with unpacked():
            x, turns = stem.embed_tokens(batch), stem.turns(batch)
            total = weights[0] * x.to(weights.dtype)
            for weight, block in zip(weights[1:-1], stem.blocks[:-1], strict=True):
                x = widened(block, dtype, x, batch, turns, None)
                total += weight * x.to(total.dtype)  # a number alone would not widen it
            x = stem.norm(widened(stem.blocks[-1], dtype, x, batch, turns, None))
        return total + weights[-1] * x.to(total.dtype)  # type: ignore[no-any-return]

    def fold_one(self, chains: Chains, states: Tensor, passes: int, rows: int, keep_pairs: bool = False) -> Prediction:
        """One protein from the language model's states ``[l, c]`` of its residues."""
        types, positions = chains.types.to(states.device), chains.positions.to(states.device)
        fixed, length = tables(), chains.length
        first = self.stem_transition(states) + self.embed(types)
        s, z = torch.zeros_like(first), first.new_zeros(length, length, self.config.pair)
        bins = torch.zeros(length, length, dtype=torch.int64, device=states.device)
        scale, precise = self.config.structure.scale, self.to_structure.weight.dtype
        for _ in range(passes):
            s = first + self.recycle_norm(s)
            z = self.recycled(z, bins, positions, rows)
            for block in self.blocks:
                s, z = block(s, z, rows)
            layers, before = self.structure(
                self.to_structure(s.to(precise)),
                self.to_structure_pair(z.flatten(0, 1).to(precise)).view(length, length, -1),
            )
            turn, shift = rotation(layers[-1].quaternion), layers[-1].translation * scale
            bins = distance_bins(backbone_atoms(types, turn, shift, fixed))
        angles, _ = self.structure.torsions(layers[-1].state, before)
        errors = pair_errors(self.error_head, z, rows)
        return Prediction(
            positions=atoms(types, group_frames(types, turn, shift, angles, fixed), fixed),
            plddt=accuracy(self.confidence_head(layers[-1].state)),
            pae=errors.expected,
            ptm=errors.tm,
            layers=layers,
            angles=angles,
            s=s,
            z=z if keep_pairs else None,
        )

    def distances(self, z: Tensor) -> Tensor:
        """Logits ``[l, l, 64]`` of how far two residues are apart, from pairs that ``fold`` has kept; symmetric."""
        logits = self.distogram_head(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return (logits + logits.transpose(0, 1)) / 2  # type: ignore[no-any-return]

    def recycled(self, z: Tensor, bins: Tensor, positions: Tensor, rows: int) -> Tensor:
        """Pairs as a pass begins with them, from those that the one before has left; these may be overwritten."""
        reach = self.config.position_bins
        parts = []
        for some in chunks(len(z), rows):
            apart = (positions - positions[some, None]).clamp(-reach, reach) + reach + 1  # 0 is for padding
            parts.append(
                self.recycle_pair_norm(z[some]) + self.recycle_distances(bins[some]) + self.relative_positions(apart)
            )
            if not torch.is_grad_enabled():
                z[some] = parts.pop()
        return torch.cat(parts) if parts else z


def widened(module: nn.Module, dtype: torch.dtype, *inputs: object) -> Tensor:
    """What a module computes with its weights in ``dtype``, in which it holds them only meanwhile.

    The published language model has 2.8 billion weights in half precision; all of them in float32 would be 11 GB.
    """
    if all(weight.dtype == dtype for weight in module.parameters()):
        return module(*inputs)  # type: ignore[no-any-return]
    wide = {name: weight.to(dtype) for name, weight in module.named_parameters()}
    return functional_call(module, wide, inputs)  # type: ignore[no-any-return]
