"""Configurations of OmegaConf in torch files: their values are read, their classes are neither needed nor run.

What OmegaConf itself wrote lies in golden/esmfold/original; the classes here pickle as its own do.
"""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import pickletools
import sys
import types
import typing
import zipfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS
from test_hostile_pickles import Call, Rebuilt, Stored, handmade, pickled

from plm_weights import CheckpointError, open_tensors

GOLDEN = Path(__file__).parent / "golden" / "esmfold" / "original" / "esmfold_tiny.pt"
CLASSES = {
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("Metadata", "ContainerMetadata", "Node"),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "IntegerNode", "FloatNode", "StringNode", "EnumNode"),
    "esm.esmfold.v1.trunk": ("FoldingTrunkConfig", "StructureModuleConfig"),
    "esm.esmfold.v1.esmfold": ("ESMFoldConfig",),
}
Made = types.SimpleNamespace


@pytest.fixture
def omega(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Classes that pickle under the names of OmegaConf and of fair-esm, by their own names."""
    found = {}
    for module, names in CLASSES.items():
        fake = types.ModuleType(module)
        for name in names:
            found[name] = type(name, (), {"__module__": module})
            setattr(fake, name, found[name])
        *parents, _ = accumulate(module.split("."), "{}.{}".format)
        for parent in parents:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, fake)
    return Made(**found)


def filled(kind: type, **attributes: object) -> Any:
    item = kind()
    item.__dict__.update(attributes)
    return item


def node(omega: Made, value: object, kind: str = "AnyNode", parent: object = None, of: object = dict) -> Any:
    """A configuration as OmegaConf makes it of plain values."""
    about = {
        "ref_type": typing.Any,
        "object_type": of,
        "optional": True,
        "key": None,
        "flags": {},
        "flags_root": False,
        "resolver_cache": collections.defaultdict(dict),
    }
    if isinstance(value, dict | list):
        item = filled(
            omega.DictConfig if isinstance(value, dict) else omega.ListConfig,
            _metadata=filled(omega.ContainerMetadata, **about, key_type=typing.Any, element_type=int),
            _parent=parent,
        )
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        inside = {key: each if hasattr(each, "__dict__") else node(omega, each, parent=item) for key, each in parts}
        item._content = inside if isinstance(value, dict) else list(inside.values())
        return item
    return filled(getattr(omega, kind), _metadata=filled(omega.Metadata, **about), _parent=parent, _val=value)


def checkpoint(path: Path, model: object, protocol: int = 2) -> Path:
    """A torch file with this configuration and one tensor."""
    torch.save({"cfg": {"model": model}, "model": {"w": torch.ones(1)}}, path, pickle_protocol=protocol)
    return path


def read(path: Path) -> Any:
    cfg = open_tensors(path).extras["cfg"]
    assert isinstance(cfg, dict)
    return cfg["model"]


def test_what_omegaconf_wrote() -> None:
    """Values of every kind, of a file that it wrote: here no such library is installed."""
    settings = read(GOLDEN)
    assert settings["trunk"]["structure_module"]["c_s"] == 20 and settings["trunk"]["chunk_size"] is None
    assert settings["fp16_esm"] is False and settings["trunk"]["structure_module"]["epsilon"] == 1e-8
    assert settings["esm_type"] == "tiny" and isinstance(settings, dict)
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nested_values_of_every_kind(omega: Made, tmp_path: Path, protocol: int) -> None:
    values: dict[str, Any] = {"a": 1, "b": {"c": None, "d": [1.5, "x", {"e": True}]}, "f": {}, "g": 2**70, "h": []}
    assert read(checkpoint(tmp_path / "x.pt", node(omega, values), protocol)) == values


def test_settings_that_are_typed(omega: Made, tmp_path: Path) -> None:
    """As of dataclasses, whose names stand in the metadata, and with typed leaves."""
    typed = {
        "blocks": node(omega, 48, "IntegerNode", of=int),
        "rate": node(omega, 0.1, "FloatNode", of=float),
        "half": node(omega, True, "BooleanNode", of=bool),
        "name": node(omega, "esm2_3B", "StringNode", of=str),
        "trunk": node(omega, {"depth": 2}, of=omega.FoldingTrunkConfig),
    }
    settings = read(checkpoint(tmp_path / "x.pt", node(omega, typed, of=omega.ESMFoldConfig)))
    assert settings == {"blocks": 48, "rate": 0.1, "half": True, "name": "esm2_3B", "trunk": {"depth": 2}}


def test_a_class_is_a_name_and_never_called(omega: Made, tmp_path: Path) -> None:
    for what in (Call(builtins.dict, (("a", 1),)), Call(builtins.int, "7"), Call(omega.ESMFoldConfig)):
        with pytest.raises(CheckpointError, match=r"calls \S+ with arguments that torch\.save does not write"):
            open_tensors(checkpoint(tmp_path / "x.pt", what))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda omega: filled(omega.DictConfig, _content="${other}"), "treats a str as a dict"),
        (lambda omega: filled(omega.DictConfig, _content=None), "treats a NoneType as a dict"),
        (lambda omega: filled(omega.DictConfig, _val=1), "treats a NoneType as a dict"),
        (lambda omega: filled(omega.DictConfig, _content={1: node(omega, 1)}), "names that are no strings"),
        (lambda omega: filled(omega.DictConfig, _content={"a": object}), "builtin__.object|builtins.object"),
        (lambda omega: filled(omega.DictConfig, _content={"a": int}), "holds a Global"),
        (lambda omega: filled(omega.DictConfig, _content={"a": (1, 2)}), "holds a tuple"),
        (lambda omega: filled(omega.DictConfig, _content={"a": {}}), "holds a dict"),
        (lambda omega: filled(omega.DictConfig, _content={"a": filled(omega.Metadata, x=1)}), "holds a Metadata"),
        (lambda omega: filled(omega.ListConfig, _content={"a": 1}), "treats a dict as a list"),
        (lambda omega: node(omega, {"a": "${trunk.b}"}), r"has '\$\{trunk\.b\}', not the value"),
        (lambda omega: node(omega, {"a": "???"}), r"has '\?\?\?', not the value"),
        (lambda omega: node(omega, {"a": node(omega, torch.ones(1))}), "holds a StoredTensor"),
        (lambda omega: node(omega, {"a": node(omega, 1, "EnumNode")}), "omegaconf.nodes.EnumNode"),
        (lambda omega: filled(omega.Node, _val=1), "omegaconf.base.Node"),
        (lambda omega: collections.defaultdict(list), "calls collections.defaultdict"),
        (lambda omega: collections.defaultdict(os.getcwd), r"posix\.getcwd|nt\.getcwd"),
    ],
)
def test_what_omegaconf_does_not_write(
    content: Callable[[Made], object], says: str, omega: Made, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        open_tensors(checkpoint(tmp_path / "x.pt", content(omega)))
    assert str(tmp_path / "x.pt") in str(error.value)


@FORMATS
@pytest.mark.parametrize("place", ["value", "metadata", "parent", "factory"])
def test_code_within_a_configuration_does_not_run(place: str, legacy: bool, omega: Made, tmp_path: Path) -> None:
    """Wherever it stands, also in what is not kept."""
    marker = tmp_path / "marker"
    gadget = Call(os.system, f"echo > {marker}")
    item = node(omega, {"a": 1})
    if place == "value":
        item._content["a"]._val = gadget
    elif place == "metadata":
        item._metadata.object_type = gadget
    elif place == "parent":
        item._parent = gadget
    else:
        item._metadata.resolver_cache = Call(collections.defaultdict, os.system)
    content = pickled({"cfg": {"model": item}, "w": Rebuilt(Stored("0", 1), 0, (1,), (1,))}, legacy)
    path = handmade(tmp_path / "x.pt", content, legacy, {"0": bytes(4)})
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.system.*Nothing in it was run"):
        open_tensors(path)
    assert not marker.exists()


def test_a_configuration_that_holds_itself(omega: Made, tmp_path: Path) -> None:
    """Is read, as plain dicts may hold themselves too, and nothing walks around in it."""
    item = node(omega, {"a": 1})
    item._content["self"] = item
    settings = read(checkpoint(tmp_path / "x.pt", item))
    assert settings["self"] is settings and settings["a"] == 1


def test_the_classes_here_pickle_as_those_of_omegaconf(omega: Made) -> None:
    """Guards the tests above: every name that the golden's pickle refers to is made here, and none else is needed."""
    with zipfile.ZipFile(GOLDEN) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

    def names(data: bytes) -> set[str]:
        return {str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}

    ours = names(pickle.dumps(node(omega, {"a": [1], "b": {"c": 2}}), 2))
    theirs = {name for name in names(content) if not name.startswith(("torch", "collections OrderedDict"))}
    assert ours - theirs == {"omegaconf.listconfig ListConfig", "__builtin__ long"} and theirs <= ours
