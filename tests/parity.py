"""How ours and theirs are compared: whole tensors, one per sequence and without padding, against a float64 truth."""

from collections.abc import Mapping

import torch
from torch import Tensor

from plm.models.esm import ESM
from plm.packing import Packed

Outputs = dict[str, list[Tensor]]
"""From the name of an output to one tensor per sequence."""


@torch.no_grad()
def run_ours(net: ESM, batch: Packed) -> Outputs:
    """All that our network gives."""
    out = net(batch, hidden_states=True, attentions=True, contacts=net.config.contact_head)
    found: Outputs = {f"hidden_states.{i}": batch.split(x) for i, x in enumerate(out.hidden_states)}
    found["attentions"] = out.attentions
    per_token = {"logits": out.logits, "token_logits": out.token_logits}
    per_sequence = {"contacts": out.contacts, "pooled": out.pooled, "sequence_logits": out.sequence_logits}
    found |= {name: batch.split(x) for name, x in per_token.items() if x is not None}
    found |= {name: list(x) for name, x in per_sequence.items() if x is not None}
    return found


def unpad(x: Tensor, keep: Tensor) -> list[Tensor]:
    """Rows ``[b, t, ...]`` to one ``[t, ...]`` per sequence, where keep ``[b, t]`` is true."""
    return [row[real] for row, real in zip(x, keep, strict=True)]


def unpad_maps(x: Tensor, keep: Tensor) -> list[Tensor]:
    """Maps ``[b, l, h, t, t]`` to one ``[l, h, t, t]`` per sequence."""
    return [row[..., real, :][..., real] for row, real in zip(x, keep, strict=True)]


def unpad_contacts(x: Tensor, keep: Tensor) -> list[Tensor]:
    """Contacts ``[b, t - 2, t - 2]`` of a batch padded on the right, to the residues of each sequence."""
    return [row[:size, :size] for row, size in zip(x, (keep.sum(-1) - 2).clamp(min=0).tolist(), strict=True)]


def differences(ours: Mapping[str, list[Tensor]], truth: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Ours less the truth in float64: every number of every sequence as one vector per output of the truth."""
    found = {}
    for name, wanted in truth.items():
        assert [x.shape for x in ours[name]] == [x.shape for x in wanted], name
        found[name] = torch.cat([(x.double() - y).flatten() for x, y in zip(ours[name], wanted, strict=True)])
    return found


def largest(differences: Mapping[str, Tensor]) -> float:
    """The largest absolute difference in any output; a NaN is the largest of all."""
    return max(x.abs().max().nan_to_num(torch.inf).item() for x in differences.values())


def rms(differences: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each output's differences."""
    return {name: x.square().mean().sqrt().item() for name, x in differences.items()}
