"""What is known of a published checkpoint; the rows themselves lie beside this file, one file per family.

Revisions, sizes and hashes come from the publishers' own listings (the commit and file pages of the hub) and from
independent manifests of the same files (Synthyra/FastPLMs, Field-Lin/PROTEUS, uci-cbcl/esm-efficient, BioLM/biolm-hub);
what nobody stated stays unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from plm_weights.checks import Check, checks

# What the rows of two families share.
PROTTRANS = "Elnaggar et al. 2022, IEEE TPAMI 44, 7112-7127, doi:10.1109/TPAMI.2021.3095381"
KENLAY = "Kenlay et al. 2024, arXiv:2403.17889, doi:10.48550/arXiv.2403.17889"
ANTIBODY_LICENCE = "MIT (hub), CC BY 4.0 (Zenodo)"
RARE = "U, Z, O and B were X in training"

Form = Literal["hub", "original"]
"""How a checkpoint is published: as a repository of the hub (transformers' layout), or as its authors' own files."""


@dataclass(frozen=True)
class File:
    """One published file; ``size`` in bytes. Any hash of ``sha256`` is accepted; none listed means none known.
    ``mirrors`` are other addresses of the same bytes."""

    name: str
    size: int | None = None
    sha256: tuple[str, ...] = ()
    url: str | None = None
    mirrors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint.

    ``files`` lie in ``hub`` at ``revision``, or in ``folder`` of this package; ``originals`` are the authors' own, all
    within one ``archive`` (its address) if there is one. ``preferred`` is the form that the row's name stands for.
    ``config`` holds keyword arguments of the family's ``Config``; None means that the folder's ``config.json`` says it.
    ``parameters`` counts each trained number once and leaves out the contact head. ``pairs``: whether it was trained on
    pairs of chains, a heavy and a light one, or on single ones; None where nobody said.
    """

    name: str
    family: str
    licence: str
    citation: str
    aliases: tuple[str, ...] = ()
    note: str = ""
    parameters: int | None = None
    config: Mapping[str, int | float | bool | str | Mapping[str, object] | None] | None = field(
        default=None, hash=False
    )
    folder: str | None = None
    hub: str | None = None
    revision: str | None = None
    files: tuple[File, ...] = ()
    originals: tuple[File, ...] = ()
    archive: str | None = None
    preferred: Form = "hub"
    header: str | None = None
    pairs: bool | None = None

    @property
    def checks(self) -> tuple[Check, ...]:
        """Published values of this checkpoint, for ``plm verify``."""
        return checks(self.name)


def spellings(name: str, hub: str, *others: str) -> tuple[str, ...]:
    """The aliases of a row: its hub id with and without the organisation, underscores for hyphens, and ``others``."""
    aliases = {alias.casefold(): alias for alias in (hub, hub.partition("/")[2], name.replace("-", "_"), *others)}
    aliases.pop(name.casefold(), None)
    return tuple(aliases.values())
