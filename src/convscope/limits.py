"""Declared limits of one file: checked before anything is unpacked, allocated or waited for.

`current()` gives the limits in force. They come from `using(...)`, else from the environment variable
`CONVSCOPE_LIMITS` (`"seconds=300,weights=32GiB"`), else from the defaults of `Limits`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from convscope.errors import UsageError, nearest, option

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Limits:
    """The limits of one file.

    Attributes:
        pixels: width x height of an image.
        file: bytes of one image file, or of one array that an input is fed with.
        weights: bytes of all the arrays that one model file contains or declares, unpacked.
        text: bytes of one configuration, class list or other text, unpacked.
        entries: members of an archive, objects of an HDF5 file, tensors of a checkpoint, or lines of a table of images.
        nodes: operations of a graph, after its functions are expanded.
        values: bytes of the output of one operation of a graph for one image; a whole pass may make 16 times as much.
        depth: levels of nesting, of groups, functions or JSON.
        seconds: time that one file may take to read in the reader process.

    Example:
        >>> Limits().seconds
        60
    """

    pixels: int = 178_000_000
    file: int = _GIB
    weights: int = 8 * _GIB
    text: int = 64 * _MIB
    entries: int = 200_000
    nodes: int = 200_000
    values: int = 512 * _MIB
    depth: int = 100
    seconds: float = 60


_NAMES = tuple(field.name for field in fields(Limits))
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kib": 2**10, "mib": _MIB, "gib": _GIB}
_SIZES = (("GiB", _GIB), ("MiB", _MIB), ("KiB", 2**10), ("", 1))
_current: ContextVar[Limits | None] = ContextVar("limits", default=None)


def current() -> Limits:
    """The limits in force.

    Raises:
        UsageError: `CONVSCOPE_LIMITS` can't be read.

    Example:
        >>> current().depth
        100
    """
    chosen = _current.get()
    if chosen is not None:
        return chosen
    text = os.environ.get("CONVSCOPE_LIMITS", "")
    return _changed(Limits(), parse(part for part in text.split(",") if part.strip()))


@contextmanager
def using(**changes: float) -> Iterator[Limits]:
    """Other limits for the length of a block: `with limits.using(seconds=300): open_model(...)`.

    Raises:
        UsageError: there is no such limit, or it is not positive.

    Example:
        >>> with convscope.limits.using(seconds=300) as chosen:
        ...     chosen.seconds
        300
    """
    token = _current.set(_changed(current(), changes))
    try:
        yield current()
    finally:
        _current.reset(token)


def parse(texts: Iterable[str]) -> dict[str, float]:
    """The limits that `NAME=VALUE` texts name; a value may have a unit: `weights=32GiB`, `pixels=400M`.

    Raises:
        UsageError: a text has another form, or there is no such limit.

    Example:
        >>> parse(["seconds=300", "pixels=400M"])
        {'seconds': 300.0, 'pixels': 400000000}
    """
    found = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.lower())
        if match is None or match[2] not in _UNITS:
            raise UsageError(
                f"a limit has to be NAME=VALUE, such as weights=32GiB or seconds=300, but this is {text!r}.",
                code="limit-invalid",
                found=text,
            )
        found[name] = _checked(name, float(match[1]) * _UNITS[match[2]])
    return found


def _changed(limits: Limits, changes: Mapping[str, float]) -> Limits:
    checked: dict[str, Any] = {name: _checked(name, value) for name, value in changes.items()}
    return replace(limits, **checked)


def _checked(name: str, value: float) -> float:
    if name not in _NAMES:
        raise UsageError(f"there is no limit {name!r}; {nearest(name, _NAMES)}", code="limit-unknown", name=name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = type(value).__name__
        raise UsageError(
            f"the limit {name} has to be a number, but it is a {found}.", code="limit-invalid", name=name, found=found
        )
    least = 0.001 if name == "seconds" else 1
    if not least <= value < 2**62:
        raise UsageError(
            f"the limit {name} has to be a number from {least} to 2**62, but it is {value:g}.",
            code="limit-invalid",
            name=name,
            found=value,
        )
    return value if name == "seconds" else int(value)


def most_unpacked(size: int) -> int:
    """Bytes that a file, or a part of one, of `size` bytes may unpack to: weights are hardly compressed."""
    return min(current().weights, 64 * _MIB + 100 * size)


def how_to_raise(name: str) -> str:
    """The part of a message on a limit: its value, and the option for five times as much."""
    value = getattr(current(), name)
    more = f"{name}={shown(name, 5 * value)}"
    return (
        f"limit {name}={shown(name, value)}; to raise it: {option(f'limits.using:{more}')}, or CONVSCOPE_LIMITS={more}"
    )


def shown(name: str, value: float) -> str:
    """A limit's value as people write it."""
    if name in ("weights", "text", "file", "values"):
        unit, size = next((unit, size) for unit, size in _SIZES if value >= size)
        return f"{value / size:.4g}{unit}"
    return f"{value:g}" if name == "seconds" else str(int(value))
