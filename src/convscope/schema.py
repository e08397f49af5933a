"""Types of JSON values: small readers that are combined, so that a file from anywhere gives one clear error.

A reader takes a value and its place in the file (`heatmaps[3].score`), and returns the typed value or raises
`Misfit`. `record` makes the reader of a dataclass from its annotations.

>>> pair = sequence(whole(0, 9), 2, 2)
>>> pair([1, 2], "pair")
(1, 2)
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

Json = Any  # what JSON holds, before a reader has found it to be what it has to be
Reader = Callable[[object, str], Json]

LONGEST = 10_000  # characters of one text
LARGEST = 2**31 - 1  # of a whole number


class Misfit(Exception):
    """A value does not have the expected type.

    Attributes:
        where: its place in the file, such as `heatmaps[3].score`.
        expected, found: in words.
    """

    def __init__(self, where: str, expected: str, found: str) -> None:
        super().__init__(f"expected {expected} at {where}, found {found}")
        self.where, self.expected, self.found = where, expected, found


def shown(value: object) -> str:
    """A JSON value in a few words, for a message."""
    if isinstance(value, dict):
        return f"an object of {len(value)} entries"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    return ascii(value) if len(ascii(value)) <= 60 else ascii(value)[:57] + "..."


def text(value: object, where: str) -> str:
    """A text that can be written as UTF-8, of at most `LONGEST` characters."""
    if not isinstance(value, str):
        raise Misfit(where, "a text", shown(value))
    if len(value) > LONGEST:
        raise Misfit(where, f"a text of at most {LONGEST} characters", f"one of {len(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Misfit(where, "a text", "characters that are none (surrogates)")
    return value


def flag(value: object, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Misfit(where, "true or false", shown(value))
    return value


def whole(low: int = -LARGEST, high: int = LARGEST) -> Reader:
    """A whole number from `low` to `high`."""

    def read(value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Misfit(where, f"a whole number from {low} to {high}", shown(value))
        return value

    return read


def number(value: object, where: str) -> float:
    """A finite number, as float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misfit(where, "a number", shown(value))
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Misfit(where, "a finite number", shown(value))
    return found


def measured(value: object, where: str) -> float:
    """A finite number, or NaN for null: JSON has no word for values that are not finite."""
    return math.nan if value is None else number(value, where)


def one_of(*choices: str) -> Reader:
    """One of some texts."""

    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Misfit(where, " or ".join(map(repr, choices)), shown(value))
        return value

    return read


def optional(reader: Reader) -> Reader:
    """Null, as None, or what `reader` reads."""
    return lambda value, where: None if value is None else reader(value, where)


def sequence(reader: Reader, least: int = 0, most: int = LARGEST) -> Reader:
    """A list of `least` to `most` values, as a tuple."""

    def read(value: object, where: str) -> tuple:
        if not isinstance(value, list):
            raise Misfit(where, "a list", shown(value))
        if not least <= len(value) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            raise Misfit(where, f"a list of {count} values", f"one of {len(value)}")
        return tuple(reader(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read


def mapping(reader: Reader) -> Reader:
    """An object whose values `reader` reads, under any names."""

    def read(value: object, where: str) -> dict[str, Json]:
        return {text(key, where): reader(item, f"{where}.{key}") for key, item in table(value, where).items()}

    return read


def table(value: object, where: str) -> dict[str, Json]:
    """An object, as it is."""
    if not isinstance(value, dict):
        raise Misfit(where, "an object", shown(value))
    return value


def anything(value: object, where: str) -> object:
    """Any value, as it is: for entries that no computation uses."""
    return value


def entries(needed: Mapping[str, Reader], extra: Mapping[str, Reader] = types.MappingProxyType({})) -> Reader:
    """An object with the `needed` entries and perhaps the `extra` ones, read; others stay as they are."""

    def read(value: object, where: str) -> dict[str, Json]:
        found = dict(table(value, where))
        for name, reader in {**needed, **extra}.items():
            if name in found:
                found[name] = reader(found[name], f"{where}.{name}" if where else name)
            elif name in needed:
                raise Misfit(where or "the top", f"an entry {name!r}", "none")
        return found

    return read


def record(cls: type, called: Mapping[str, str] = types.MappingProxyType({}), **special: Reader) -> Reader:
    """The reader of a dataclass `cls`: an object with an entry for each field, others are ignored.

    Args:
        cls: the dataclass; its annotations are the types of the entries; a field with a default may be missing.
        called: the entry's name for a field that has another one in the file.
        special: readers of some fields, instead of the annotation's.
    """
    hints = get_type_hints(cls)
    readers = {field.name: special.get(field.name) or of(hints[field.name]) for field in fields(cls)}
    keys = {field.name: called.get(field.name, field.name) for field in fields(cls)}
    needed = {
        keys[field.name]: readers[field.name]
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    }
    read_entries = entries(needed, {keys[name]: reader for name, reader in readers.items()})

    def read(value: object, where: str) -> Json:
        found = read_entries(value, where)
        return cls(**{name: found[key] for name, key in keys.items() if key in found})

    return read


def of(hint: object) -> Reader:
    """The reader of a type as dataclasses write it: `int`, `float | None`, `tuple[str, ...]`, another dataclass."""
    plain = {str: text, bool: flag, int: whole(), float: measured}
    if hint in plain:
        return plain[hint]
    if is_dataclass(hint) and isinstance(hint, type):
        return record(hint)
    arguments = get_args(hint)
    if get_origin(hint) is tuple and arguments[1:] == (...,):
        return sequence(of(arguments[0]))
    if get_origin(hint) is tuple and len(set(arguments)) == 1:  # `tuple[int, int]`
        return sequence(of(arguments[0]), len(arguments), len(arguments))
    if get_origin(hint) in (Union, types.UnionType) and type(None) in arguments and len(arguments) == 2:
        (other,) = (argument for argument in arguments if argument is not type(None))
        return optional(number if other is float else of(other))
    raise TypeError(f"no reader for {hint}")
