"""Class names as users have them: a list, or a file of lines or JSON."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from itertools import islice

from convscope import limits, reading
from convscope.errors import Unreadable, UsageError
from convscope.schema import Json


def read_class_names(classes: str | os.PathLike | Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names in the order of the outputs.

    Args:
        classes: the names themselves, or a file: a line each; or JSON: a list, `{"0": "cat"}`,
            `{"0": ["n02123045", "tabby"]}` as Keras ships it, or `{"cat": 0}` as Keras' generators give it.

    Raises:
        UsageError: the file is missing, or not one of these.

    Example:
        >>> read_class_names(["cat", "dog"])
        ('cat', 'dog')
    """
    if classes is None:
        return None
    if not isinstance(classes, str | os.PathLike):
        return _names_given(classes)
    path = os.fsdecode(classes)
    try:
        text = reading.text_of(path)
    except Unreadable as error:
        raise UsageError(
            f"the class names at {path} can't be read: {error.message}. "
            "Expected text in UTF-8, a name a line, or JSON.",
            code=error.code,
            path=path,
            **error.data,
        ) from None
    try:
        if text.lstrip()[:1] not in ("[", "{"):
            return _names_from_lines(text)
        return _names_from_json(reading.json_of(_of_few_entries(text)))
    except (Unreadable, ValueError) as error:
        large = isinstance(error, Unreadable) and error.code == "input-too-large"
        reason = error.message if isinstance(error, Unreadable) else str(error)
        raise UsageError(
            f"the class names at {path} are not understood: {reason}. Expected a name a line, or JSON such as "
            '["cat", "dog"], {"0": "cat", "1": "dog"} or {"cat": 0, "dog": 1}, with every number from 0 on.',
            code="input-too-large" if large else "class-names-invalid",
            path=path,
            reason=reason,
        ) from None


def _names_given(classes: Json) -> tuple[str, ...]:
    """Names that the caller holds."""
    try:
        return (
            _names_from_json(dict(classes))
            if isinstance(classes, Mapping)
            else tuple(reading.as_text(str(name)) for name in classes)
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the class names are not understood: {error}. Expected a list of names.",
            code="class-names-invalid",
            reason=str(error),
        ) from None


def _of_few_entries(text: str) -> str:
    """The text, if it can't hold more values than the limit allows: each but the first has one of these before it."""
    if sum(map(text.count, "[{,")) > limits.current().entries:
        raise reading.too_large("it holds too many entries", "entries")
    return text


def _names_from_lines(text: str) -> tuple[str, ...]:
    most = limits.current().entries
    names = tuple(islice(filter(None, map(str.strip, io.StringIO(text, newline=None))), most + 1))
    if not names:
        raise Unreadable("it is empty", code="file-empty")
    if len(names) > most:
        raise reading.too_large("it holds too many names", "entries")
    return names


def _names_from_json(data: Json) -> tuple[str, ...]:
    if isinstance(data, dict) and data and all(type(value) is int for value in data.values()):
        if sorted(data.values()) != list(range(len(data))):
            raise ValueError("a number is missing, or there twice")
        data = sorted(data, key=lambda name: data[name])
    if isinstance(data, dict):
        data = [data[str(number)] if str(number) in data else data[number] for number in _from_zero(data)]
    if not data:
        raise ValueError("there are none")
    return tuple(map(_name, data))


def _from_zero(data: dict[object, object]) -> range:
    missing = {str(number) for number in range(len(data))} - set(map(str, data))
    if missing:
        raise ValueError(f"there is no number {min(missing, key=int)}")
    return range(len(data))


def _name(entry: object) -> str:
    """A name from a list: text, the last text of a pair (id, name), or a number, which some data sets have."""
    if isinstance(entry, list) and entry:
        entry = entry[-1]
    if not isinstance(entry, str) and type(entry) is not int:
        raise ValueError(f"a name has to be text, but this is {str(entry)[:40]!r}")
    return reading.as_text(str(entry))
