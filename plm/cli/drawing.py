"""Pictures, which appear whole or not at all, as all outputs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from plm.cli.assays import Table
from plm.outputs.output import Output
from plm.outputs.target import FileTarget, Target
from plm.outputs.writer import Array, Contents, Writer, require
from plm.plots import RESIDUES, draw_contacts, draw_scan


class DrawnMap(Writer):
    """The map of the one sequence, with its provenance in the PNG's text."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        require("matplotlib", "plot")

    def _begin(self) -> None:
        self.target.temporary.touch()

    def _put(self, index: int, array: Array) -> None:
        self._map = array

    def _finish(self) -> None:
        provenance = self.contents.provenance
        title, model = self.contents.ids[0], str(json.loads(provenance)["model"])
        metadata = {"Description": provenance}
        draw_contacts(self._map, self.target.temporary, title=title, subtitle=model, metadata=metadata)

    def _abandon(self) -> None:
        """Nothing is open."""


class DrawnScan(Output):
    """The scores of single substitutions; variants of another kind have no place in it."""

    def __init__(self, path: str, table: Table, provenance: Mapping[str, object], *, overwrite: bool) -> None:
        super().__init__(FileTarget(path, overwrite=overwrite, size=0), table.assay.variants)
        require("matplotlib", "plot")
        self.table, self.provenance = table, provenance
        self.wild_type = next(iter(table.groups)).replace("|", "")
        self.places = table.substitutions()
        self.scores = [[math.nan] * len(self.wild_type) for _ in RESIDUES]

    def write(self, index: int, score: float) -> None:
        """Take the score of a variant. Raises: ValueError for a wrong index, or a second writing."""
        self._check_free(index)
        if (place := self.places[index]) is not None and place[1] in RESIDUES:
            self.scores[RESIDUES.index(place[1])][place[0]] = score
        self._written[index] = True

    def _begin(self) -> None:
        self.target.temporary.touch()

    def _finish(self) -> None:
        models = self.provenance.get("ensemble") or [self.provenance]
        assert isinstance(models, list)
        names = ", ".join(str(model["model"]) for model in models)
        draw_scan(
            self.scores,
            self.wild_type,
            self.target.temporary,
            offset=self.table.offset,
            title=Path(str(self.provenance["input"])).name,
            subtitle=f"{'mean of ' if len(models) > 1 else ''}{names}, {self.provenance['how']}",
            label="log-probability of the variant less that of the wild type",
            metadata={"Description": json.dumps(self.provenance)},
        )

    def _abandon(self) -> None:
        """Nothing is open."""
