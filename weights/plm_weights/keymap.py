"""Key maps: tables between the names of a published checkpoint and the names of a model, read in both directions.

A :class:`Row` takes tensors from left to right on import and from right to left on export, so one table is the import,
the export and the proof that no tensor is forgotten. ``{i}`` in a name is a hole that fits a whole number; the same
hole name ranges over the same numbers in every row of a table.

Everything that names, shapes and dtypes can tell is proven on ``meta`` tensors before data is read, and all faults are
reported at once. Nothing is cast: dtypes are as stored.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from plm_weights.errors import KeyMapError
from plm_weights.read import TensorSource

Names = str | tuple[str, ...]
Numbers = tuple[tuple[str, int], ...]  # what stands in the holes: (("i", 3),)
NUMBER = "0|[1-9][0-9]{0,8}"


@dataclass(frozen=True)
class Row:
    """``source -> target``. Several sources are stacked on a new first axis, ``view`` (an einops pattern, with
    ``sizes`` for axes that it cannot infer in either direction) is applied, several targets are unstacked.

    An ``optional`` row may find nothing. Optional rows with the same target are alternatives: a checkpoint has at most
    one of them, and export writes the first.
    """

    source: Names
    target: Names
    view: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        if len({_holes(name) for name in (*_tuple(self.source), *_tuple(self.target))}) > 1:
            raise ValueError(f"all names of a row must have the same holes: {self.source} -> {self.target}")


@dataclass(frozen=True)
class Drop:
    """A stored tensor that the model has no use for, where there is one. Export does not write it."""

    source: str
    why: str


@dataclass(frozen=True)
class Tied:
    """A stored copy of another source tensor: on import compared with it, on export written again.

    Where the original is not stored, neither is the copy. An ``optional`` copy may be missing though its original is
    there, and export does not write it.
    """

    source: str
    same_as: str
    why: str = ""
    optional: bool = False


KeyMap = tuple[Row | Drop | Tied, ...]


def affine(source: str, target: str, optional: bool = False) -> KeyMap:
    """The weight and the bias of one layer."""
    return tuple(Row(f"{source}.{part}", f"{target}.{part}", optional=optional) for part in ("weight", "bias"))


def stacked(source: str, parts: tuple[str, ...], target: str, kinds: tuple[str, ...] = ("weight", "bias")) -> KeyMap:
    """Several projections of the same input as one, in this order."""
    return tuple(
        Row(
            tuple(f"{source}{part}.{kind}" for part in parts),
            f"{target}.{kind}",
            "parts o ... -> (parts o) ...",
            {"parts": len(parts)},
        )
        for kind in kinds
    )


class Step(NamedTuple):
    """One row with its holes filled: what is read and what is written."""

    read: tuple[str, ...]
    written: tuple[str, ...]
    view: str
    sizes: Mapping[str, int]


class Plan(NamedTuple):
    """A table laid over a set of names."""

    steps: list[Step]
    ranges: Mapping[tuple[str, ...], set[Numbers]]  # for each set of holes, the numbers that occur
    faults: list[str]


def check(rows: KeyMap, source: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Prove by names, shapes and dtypes that an import will succeed; all tensors may be on ``meta``.

    Raises: KeyMapError with all faults: a source tensor read by no row or by several, a target filled by none or by
    several, a row that finds nothing, a shape that is not the model's, a copy unlike its original.
    """
    _prove(rows, source, want)


def import_weights(rows: KeyMap, source: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``source`` with the names and shapes of ``want``, a model's ``state_dict`` on any device.

    One row is read at a time, so that of a :class:`TensorSource` no more than that is in memory beside the result.
    Where a row only renames, the result may share the memory of the source.

    Raises: KeyMapError, as ``check`` before data is read, and after it if a stored copy has other values.
    """
    steps, copies = _prove(rows, source, want)
    result: dict[str, Tensor] = {}
    for step in steps:
        result |= _apply(step, source)
    _raise(
        f"{copy}: its values are not those of {original}, of which it should be a copy"
        for copy, original in copies
        if not torch.equal(source[copy], source[original])
    )
    return result


def export_weights(rows: KeyMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``import_weights``, without what that drops. Copies share the memory of their original.

    Raises: KeyMapError with all faults.
    """
    steps, ranges, faults = _plan(rows, state, back=True)
    faults += _not_read_once(state, Counter(name for step in steps for name in step.read))
    for step in steps:
        faults += _shape_faults(step, state, {})
    _raise(faults)
    result: dict[str, Tensor] = {}
    for step in steps:
        result |= _apply(step, state)
    for row in rows:
        if isinstance(row, Tied) and not row.optional:
            result |= {copy: result[original] for copy, original in _copies(row, ranges) if original in result}
    return result


def explain(rows: KeyMap) -> list[tuple[str, str, str]]:
    """A table in words, a line per row: source, target, and what happens or why."""
    lines = []
    for row in rows:
        match row:
            case Row(source, target, view):
                lines.append((", ".join(_tuple(source)), ", ".join(_tuple(target)), view or "as it is"))
            case Tied(source, same_as, why):
                lines.append((source, "", f"equal to {same_as}" + (f": {why}" if why else "")))
            case Drop(source, why):
                lines.append((source, "", f"dropped: {why}"))
    return lines


def _plan(rows: KeyMap, given: Mapping[str, Tensor], back: bool) -> Plan:
    directed = []
    ranges: defaultdict[tuple[str, ...], set[Numbers]] = defaultdict(set, {(): {()}})
    for row in rows:
        if isinstance(row, Row):
            read, written, view = _tuple(row.source), _tuple(row.target), row.view
            if back:
                left, arrow, right = view.partition("->")
                read, written, view = written, read, right + arrow + left
            fits = {numbers for name in read for numbers in _fits(name, given)}
            ranges[_holes(read[0])] |= fits
            directed.append((row, read, written, view, fits))

    steps: list[Step] = []
    faults: list[str] = []
    taken: set[str] = set()
    for row, read, written, view, fits in directed:
        wanted = fits if row.optional else ranges[_holes(read[0])]
        if not wanted and not row.optional:
            faults.append(f"{read[0]}: nothing has such a name, needed for {written[0]}")
        for numbers in sorted(wanted):
            step = Step(_fill(read, numbers), _fill(written, numbers), view, row.sizes)
            if back and row.optional and taken.issuperset(step.read):
                continue  # another form of what a row above has written
            taken.update(step.read)
            steps.append(step)
            faults += [f"{name}: not there, needed for {step.written[0]}" for name in step.read if name not in given]
    filled = Counter(name for step in steps for name in step.written)
    faults += [f"{name}: filled by {count} rows" for name, count in filled.items() if count > 1]
    return Plan(steps, ranges, faults)


def _prove(
    rows: KeyMap, source: Mapping[str, Tensor], want: Mapping[str, Tensor]
) -> tuple[list[Step], list[tuple[str, str]]]:
    """The steps of an import and the (copy, original) pairs whose values are still to be compared."""
    source = source.meta if isinstance(source, TensorSource) else source
    steps, ranges, faults = _plan(rows, source, back=False)
    read = Counter(name for step in steps for name in step.read)
    pairs = []
    for row in rows:
        if isinstance(row, Drop):
            read.update(name for name in source if _pattern(row.source).fullmatch(name))
        if isinstance(row, Tied):
            for copy, original in _copies(row, ranges):
                if copy in source:
                    pairs.append((copy, original))
                elif original in source and not row.optional:
                    faults.append(f"{copy}: not there, should be a copy of {original}")
    for copy, original in pairs:
        read[copy] += 1
        if original not in source:
            faults.append(f"{copy}: should be a copy of {original}, which is not there")
        elif (source[copy].shape, source[copy].dtype) != (source[original].shape, source[original].dtype):
            faults.append(
                f"{copy}: {_told(source[copy])}, but should be a copy of {original}, {_told(source[original])}"
            )
    faults += _not_read_once(source, read)

    filled = {name for step in steps for name in step.written}
    faults += [f"{name}: the model has it, nothing fills it" for name in want.keys() - filled]
    faults += [f"{name}: a row fills it, the model has no such tensor" for name in filled - want.keys()]
    for step in steps:
        faults += _shape_faults(step, source, want)
    _raise(faults)
    return steps, pairs


def _not_read_once(given: Iterable[str], read: Counter[str]) -> list[str]:
    faults = [f"{name}: in no row of the key map" for name in given if read[name] == 0]
    return faults + [f"{name}: read by {read[name]} rows" for name in given if read[name] > 1]


def _shape_faults(step: Step, given: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the step, tried on ``meta``."""
    if not all(name in given for name in step.read):
        return []  # reported by the plan
    try:
        made = _apply(step, {name: _outline(given[name]) for name in step.read})
    except (EinopsError, ValueError) as error:
        return [f"{step.read[0]}: {' '.join(str(error).split())}"]
    return [
        f"{name}: the model has {tuple(want[name].shape)}, {step.read[0]} gives {tuple(tensor.shape)}"
        for name, tensor in made.items()
        if name in want and tensor.shape != want[name].shape
    ]


def _outline(x: Tensor) -> Tensor:
    """The shape of ``x`` on ``meta``. For ``empty_like`` torch would import its compiler."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _apply(step: Step, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = [given[name] for name in step.read]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        raise ValueError("to be stacked, but unlike: " + ", ".join(map(_told, tensors)))
    whole = tensors[0]
    if len(tensors) > 1:  # to stack on ``meta`` torch would import its compiler, for a second
        whole = whole.new_empty(len(tensors), *whole.shape) if whole.is_meta else torch.stack(tensors)
    if step.view:
        whole = rearrange(whole, step.view, **step.sizes)
    if len(step.written) == 1:
        return {step.written[0]: whole.contiguous()}
    if whole.shape[:1] != (len(step.written),):
        raise ValueError(f"shape {tuple(whole.shape)}, to be unstacked into {len(step.written)} tensors")
    return {name: part.contiguous() for name, part in zip(step.written, whole.unbind(0), strict=True)}


def _copies(row: Tied, ranges: Mapping[tuple[str, ...], set[Numbers]]) -> list[tuple[str, str]]:
    """The (copy, original) names of a tied row, over all numbers that its holes take elsewhere in the table."""
    numbers = sorted(ranges.get(_holes(row.source), ()))
    pairs = [_fill((row.source, row.same_as), each) for each in numbers]
    return [(copy, original) for copy, original in pairs if copy != original]


def _told(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _holes(name: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\{(\w+)\}", name))))


def _fill(names: tuple[str, ...], numbers: Numbers) -> tuple[str, ...]:
    return tuple(name.format(**dict(numbers)) for name in names)


def _fits(name: str, given: Iterable[str]) -> set[Numbers]:
    matches = map(_pattern(name).fullmatch, given)
    return {tuple((hole, int(match[hole])) for hole in _holes(name)) for match in matches if match}


@cache
def _pattern(name: str) -> re.Pattern[str]:
    literals_and_holes = re.split(r"\{(\w+)\}", name)
    seen: set[str] = set()
    pattern = ""
    for index, part in enumerate(literals_and_holes):
        if index % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={part})" if part in seen else f"(?P<{part}>{NUMBER})"
            seen.add(part)
    return re.compile(pattern)


def _raise(faults: Iterable[str]) -> None:
    """Raise all faults, sorted; those that differ in a layer number only are one line."""
    number = re.compile(rf"(?<=\.)({NUMBER})(?=\.)")
    layers: defaultdict[str, set[int]] = defaultdict(set)
    lines: list[str] = []
    for fault in faults:
        found = set(number.findall(fault))
        if len(found) == 1:
            layers[number.sub("{i}", fault)].add(int(found.pop()))
        else:
            lines.append(fault)
    for line, found_in in layers.items():
        lines.append(line.replace("{i}", str(*found_in)) if len(found_in) == 1 else f"{line}, i = {_ranges(found_in)}")
    if lines:
        advice = "Check that the checkpoint is complete and that its configuration and the key map belong to it."
        raise KeyMapError("\n  ".join(["The checkpoint and the model disagree:", *sorted(lines)]) + f"\n{advice}")


def _ranges(numbers: set[int]) -> str:
    """``{0, 3, 4, 5}`` as ``0, 3..5``."""
    starts = [number for number in sorted(numbers) if number - 1 not in numbers]
    ends = [number for number in sorted(numbers) if number + 1 not in numbers]
    return ", ".join(
        str(first) if first == last else f"{first}..{last}" for first, last in zip(starts, ends, strict=True)
    )
