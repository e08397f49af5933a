"""Attributes that a model's own code sets while it runs (a counter, a cache): put back after each pass."""

from __future__ import annotations

from collections.abc import Container, Iterable
from contextlib import ExitStack
from typing import NamedTuple

Content = list[object] | dict[object, object] | set[object]


class _Kept(NamedTuple):
    value: object
    content: Content | None


def keep_attributes(undo: ExitStack, parts: Iterable[object], framework: Container[str]) -> None:
    """Put the attributes of modules or layers back when `undo` is run, and the items of lists, dicts and sets in them.

    What such an item holds itself is not kept: a pass that changes a list within a list leaves it changed.

    Args:
        undo: runs it.
        parts: objects of classes that are none of the framework's, whose own state is kept elsewhere.
        framework: names of the attributes that belong to the framework.
    """
    held = [
        (part, {name: _Kept(value, _content(value)) for name, value in vars(part).items() if name not in framework})
        for part in parts
    ]
    undo.callback(_put_back, held, framework)


def _content(value: object) -> Content | None:
    # Exactly these types: a subclass may do more than hold items.
    if type(value) is list or type(value) is dict or type(value) is set:
        return value.copy()
    return None


def _put_back(held: Iterable[tuple[object, dict[str, _Kept]]], framework: Container[str]) -> None:
    for part, kept in held:
        state = vars(part)
        for name in [name for name in state if name not in kept and name not in framework]:
            del state[name]
        for name, (value, content) in kept.items():
            state[name] = value
            _refill(value, content)


def _refill(value: object, content: Content | None) -> None:
    if isinstance(value, list) and isinstance(content, list):
        value[:] = content
    if isinstance(value, dict) and isinstance(content, dict):
        value.clear()
        value.update(content)
    if isinstance(value, set) and isinstance(content, set):
        value.clear()
        value |= content


def is_of(part: object, *packages: str) -> bool:
    """True if the class of an object comes from one of these packages.

    Example:
        >>> is_of(3, "builtins"), is_of(3, "torch")
        (True, False)
    """
    return type(part).__module__.partition(".")[0] in packages
