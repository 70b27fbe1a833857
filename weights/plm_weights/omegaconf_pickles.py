"""OmegaConf's configurations in a pickle, read as plain dicts, lists and values. OmegaConf itself is not needed.

A configuration is a tree. Its inner nodes have their parts under ``_content``, its leaves a value under ``_val``; every
node also points to its parent and to metadata, in which the types are told that it may take. All classes are replaced
by the inert ones below, and of metadata and parents nothing is kept. Source: omegaconf 2.4, base.py and nodes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from plm_weights.pickle_machine import Global, as_dict, as_list, fill

DICT, LIST = "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"
METADATA = {"omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata"}
LEAVES = {f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Integer", "Float", "String")}
CACHE = "collections.defaultdict"  # of resolved values, always of dicts
BUILTINS = {
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")  # the latter in protocols up to 2, which torch.save uses
    for name in ("bool", "dict", "float", "int", "list", "long", "str", "tuple", "unicode")
}
# What metadata names as types: nothing of it is ever called. The last are the dataclasses of ESMFold's own settings.
TYPES = {
    *BUILTINS,
    "typing.Any",
    "esm.esmfold.v1.esmfold.ESMFoldConfig",
    "esm.esmfold.v1.trunk.FoldingTrunkConfig",
    "esm.esmfold.v1.trunk.StructureModuleConfig",
}
NAMES = {DICT, LIST, CACHE, *METADATA, *LEAVES, *TYPES}


class Settings(dict[str, object]):
    """What a ``DictConfig`` held, by name."""


class Items(list[object]):
    """What a ``ListConfig`` held."""


@dataclass
class Leaf:
    """One value."""

    value: object = None


@dataclass(frozen=True)
class Metadata:
    """Nothing: what OmegaConf notes about a node is not kept."""


def made(name: str, arguments: object) -> object:
    """The stand-in for an object of OmegaConf that is empty yet; None if such a call does not make one."""
    match name, arguments:
        case "omegaconf.dictconfig.DictConfig", ():
            return Settings()
        case "omegaconf.listconfig.ListConfig", ():
            return Items()
        case "collections.defaultdict", (Global(name="builtins.dict" | "__builtin__.dict"),):
            return {}
        case str(), () if name in LEAVES:
            return Leaf()
        case str(), () if name in METADATA:
            return Metadata()
    return None


def filled(item: Settings | Items | Leaf | Metadata, state: object) -> object:
    """The stand-in with what its attributes in the pickle say.

    Raises: TypeError, ValueError for what OmegaConf does not write, and for values that refer to others.
    """
    attributes = as_dict(state)
    match item:
        case Settings():
            content = as_dict(attributes.get("_content"))
            if not all(isinstance(name, str) for name in content):
                raise TypeError("its configuration has names that are no strings")
            fill(item, list(content), [plain(value) for value in content.values()])
        case Items():
            item.extend(plain(value) for value in as_list(attributes.get("_content")))
        case Leaf():
            item.value = plain(attributes.get("_val"))
            if isinstance(item.value, str) and (item.value == "???" or "${" in item.value):
                raise ValueError(f"its configuration has {item.value[:80]!r}, not the value that this stands for")
    return item


def plain(value: object) -> object:
    """A part of a configuration without the node around it."""
    if isinstance(value, Leaf):
        value = value.value
    if not isinstance(value, Settings | Items | str | int | float | None):
        raise TypeError(f"its configuration holds a {type(value).__name__}")
    return value
