"""A contact map as a picture, which appears whole or not at all, as all outputs."""

import json

from plm.outputs.target import Target
from plm.outputs.writer import Array, Contents, Writer, require
from plm.plots import draw_contacts


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
