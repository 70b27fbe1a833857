"""Published values of published checkpoints: what ``plm verify`` compares with.

``checks/<name>.json`` is a list of blocks, one per source and tolerance::

    [{"source": "who computed it, how, and where it is printed", "licence": "MIT",
      "absolute": 1e-4, "relative": 1e-3, "because": "why this tolerance",
      "checks": [{"what": "hidden", "layer": 6, "sequence": "ACD<mask>FGHI",
                  "rows": [1, 2], "columns": [0, 1, 2], "expected": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}]}]

``ids`` may stand in place of ``sequence``; they go to the model as they are, and all are attended to, even ``<pad>``.
A pair of chains is one sequence, ``"EVQ|DIQ"``, and chains that fold together are ``"EVQ:DIQ"``; where a model has
tasks, a check may name its ``task``. Only ``hidden``, ``mean`` and ``backbone`` have a ``layer``. Each kind of value is
one matrix per sequence of n tokens, t of them residues; the inner tokens are all but those which the tokenizer puts
around the residues (the separator of a pair is one of them):

    logits                [n, v]  of one pass over the input as it stands
    probabilities         [n, v]  softmax of the logits over the whole vocabulary
    log_odds              [n, v]  log-probability minus that of the token which stands there
    nll                   [1, 1]  mean over all n tokens of minus the log-probability of the token which stands there
    causal_nll            [1, 1]  mean over all but the first token of minus its log-probability given those before it
    ll_sum                [1, 1]  of t plain residues, between 1 and 2: the sum of their log-probabilities, each given
                                  what is before it; softmax over letters alone; average of both directions
    ll_mean               [1, 1]  the same, divided by t
    log_likelihood        [1, 1]  sum over the inner tokens of the log-probability of the token which stands there
    masked_probabilities  [t, v]  row i as in probabilities, at residue i, of a pass in which that residue is hidden
    hidden                [n, c]  ``hidden_states[layer]``, of the encoder if there are two stacks
    mean                  [1, c]  the same, averaged over the inner tokens
    contacts              [t, t]  probabilities
    backbone              [3t, 3] x, y and z of N, CA and C of every residue, in Ångström, after ``layer`` (from 0) of
                                  the structure module in the last of as many passes as the checkpoint has
    plddt                 [1, 1]  mean over all atoms, 0 to 100
    ptm                   [1, 1]
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

What = Literal[
    "logits",
    "probabilities",
    "log_odds",
    "nll",
    "causal_nll",
    "ll_sum",
    "ll_mean",
    "log_likelihood",
    "masked_probabilities",
    "hidden",
    "mean",
    "contacts",
    "backbone",
    "plddt",
    "ptm",
]

FOLDED = ("backbone", "plddt", "ptm")
_LAYERED, _OF_RESIDUES = ("hidden", "mean", "backbone"), ("ll_sum", "ll_mean", *FOLDED)
_FOLDER = Path(__file__).with_name("checks")


@dataclass(frozen=True)
class Check:
    """Values at ``rows`` and ``columns`` of one matrix, met if |difference| <= absolute + relative * |expected|."""

    what: What
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    expected: tuple[tuple[float, ...], ...]
    source: str
    licence: str
    absolute: float
    relative: float
    because: str
    sequence: str | None = None
    ids: tuple[int, ...] | None = None
    layer: int | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.expected]
        needs = {
            f"what to be one of {', '.join(get_args(What))}": self.what in get_args(What),
            "either a sequence or ids": (self.sequence is None) != (self.ids is None),
            "a sequence where there is a task": self.task is None or self.sequence is not None,
            f"a sequence for {', '.join(_OF_RESIDUES)}": self.what not in _OF_RESIDUES or bool(self.sequence),
            f"a layer for {', '.join(_LAYERED)}, and for nothing else": (self.layer is not None)
            == (self.what in _LAYERED),
            "rows and columns from 0 upwards": bool(self.rows and self.columns) and min(*self.rows, *self.columns) >= 0,
            "expected to be rows by columns": shape == [len(self.columns)] * len(self.rows),
            "expected to be finite": all(math.isfinite(value) for row in self.expected for value in row),
            "an absolute tolerance above 0, a relative one of at least 0": self.absolute > 0 and self.relative >= 0,
        }
        if unmet := [need for need, met in needs.items() if not met]:
            raise ValueError(f"a check needs {'; '.join(unmet)}; got {self}")

    def error(self, matrix: Tensor) -> float:
        """Largest difference in ``matrix``, of the form given above, as a share of what is allowed: 1 still passes."""
        found = matrix.detach().double().cpu()[list(self.rows)][:, list(self.columns)]
        expected = torch.tensor(self.expected, dtype=torch.float64)
        return float(((found - expected).abs() / (self.absolute + self.relative * expected.abs())).max())


def checks(name: str) -> tuple[Check, ...]:
    """The published values of the checkpoint with this registry name; empty where nobody published any.

    Raises: ValueError if the file is not in the form above, naming the file and the check.
    """
    path = _FOLDER / f"{name}.json"
    if not path.exists():
        return ()
    return tuple(
        _check(f"{path.name}, block {i}, check {j}", {key: block[key] for key in block if key != "checks"} | check)
        for i, block in enumerate(json.loads(path.read_text()))
        for j, check in enumerate(block["checks"])
    )


def _check(where: str, fields: dict[str, Any]) -> Check:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return Check(**frozen | {"expected": tuple(tuple(row) for row in frozen["expected"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
