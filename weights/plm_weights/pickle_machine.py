"""A pickle is a program for a small stack machine. This is that machine without its dangerous half.

A name that a pickle refers to becomes a :class:`Global`, which is nothing but the name, so there is never anything to
import or to call. What the few names that a kind of file needs mean, that kind says in a subclass of :class:`Machine`;
any other name is refused.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO, ClassVar

LONGEST_READ = 2**28  # bytes; the pickle of the largest checkpoint is a few megabytes, an array of ProteinBERT 18
ERRORS = (ValueError, TypeError, LookupError, OSError, struct.error)  # what a damaged file makes of the code below

LITERALS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONSTANTS = {  # opcodes that push their argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to. It stands for itself: nothing is imported."""

    name: str


class Bounded(io.BufferedReader):
    """A file that refuses to be read in pieces so large that only a torn or hostile pickle asks for them."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LONGEST_READ:
            raise ValueError(f"its pickle claims an item of {size:,} bytes; it is torn or hostile")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(LONGEST_READ)


class Machine:
    """Reads the next pickle of a file. What its names mean is for a subclass to say."""

    writer: ClassVar[str]  # whose pickles these are, for the errors
    content: ClassVar[str]  # what they hold
    allowed: ClassVar[Collection[str]]  # the names that they may refer to

    def call(self, name: str, arguments: object) -> object:
        """What a call of ``name`` gives. Raises: ValueError, as ``refusal``."""
        raise self.refusal(name)

    def built(self, item: object, state: object) -> object:
        """An ``item`` with the attributes that a pickle sets on it afterwards."""
        raise self.refusal(f"a {type(item).__name__}")

    def outside(self, identity: object) -> object:
        """What a reference to something outside the pickle means."""
        raise ValueError("its pickle refers to something outside itself")

    def constant(self, value: object, end: int) -> object:
        """What a constant stands for; ``end`` is where it ends in the file."""
        return value

    def refusal(self, name: str) -> ValueError:
        return ValueError(f"its pickle calls {name} with arguments that {self.writer} does not write")

    def load(self, file: IO[bytes]) -> object:
        """The object of the next pickle in ``file``.

        Raises: one of ``ERRORS`` for anything that the writer of such files does not write.
        """
        stack: list[object] = []
        marks: list[int] = []
        memo: dict[int, object] = {}

        def since_mark() -> list[object]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, argument, _ in pickletools.genops(file):
            match opcode.name:
                case name if name in CONSTANTS:
                    stack.append(self.constant(argument, file.tell()))
                case name if name in LITERALS:
                    stack.append(LITERALS[name])
                case "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append([] if opcode.name == "EMPTY_LIST" else {})
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(opcode.name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "LIST":
                    stack.append(since_mark())
                case "DICT":
                    items = since_mark()
                    stack.append({})
                    fill(stack[-1], items[::2], items[1::2])
                case "MARK":
                    marks.append(len(stack))
                case "APPEND":
                    item = stack.pop()
                    as_list(stack[-1]).append(item)
                case "APPENDS":
                    items = since_mark()
                    as_list(stack[-1]).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    fill(stack[-1], [key], [value])
                case "SETITEMS":
                    items = since_mark()
                    fill(stack[-1], items[::2], items[1::2])
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[as_count(argument)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[as_count(argument)])
                case "GLOBAL":
                    stack.append(self.named(*str(argument).split(" ", 1)))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(self.named(module, attribute))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    if not isinstance(function, Global):
                        raise self.refusal(type(function).__name__)
                    stack.append(self.call(function.name, arguments))
                case "BUILD":
                    state = stack.pop()
                    stack[-1] = self.built(stack[-1], state)
                case "BINPERSID":
                    stack.append(self.outside(stack.pop()))
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case other:
                    told = f"{other} {argument or ''}"[:200].strip()
                    raise ValueError(
                        f"its pickle has {told!r}, which {self.writer} does not write. Nothing in it was run"
                    )
        raise ValueError("its pickle does not end")

    # No message here or below prints more of the pickle than strings and sizes: the repr of nested references can fill
    # any memory.

    def named(self, module: object, attribute: object) -> Global:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("its pickle refers to a name that is not a string")
        name = f"{module}.{attribute}"
        if name not in self.allowed:
            raise ValueError(
                f"its pickle refers to {name[:200]!r}, which no checkpoint of {self.content} needs. Nothing in it was "
                "run. If you trust its author, load it with the program that wrote it and save the tensors as "
                "safetensors"
            )
        return Global(name)


def fill(target: object, keys: list[object], values: list[object]) -> None:
    for key, value in zip(keys, values, strict=True):
        # Hashing a tuple of nested references could take forever.
        if not isinstance(key, str | bytes | int | float | None):
            raise TypeError(f"its pickle has a {type(key).__name__} as the key of a dict")
        as_dict(target)[key] = value


def as_dict(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise TypeError(f"its pickle treats a {type(value).__name__} as a dict")
    return value


def as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"its pickle treats a {type(value).__name__} as a list")
    return value


def as_count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("its pickle has something else where a count belongs")
    return value


def as_counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise TypeError(f"its pickle has a {type(value).__name__} where a shape belongs")
    return tuple(map(as_count, value))
