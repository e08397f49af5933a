"""The options of a heatmap method: the fields of its dataclass, with the allowed values of each.

>>> from convscope.techniques.heatmaps import SmoothGrad
>>> SmoothGrad(noise=0.1)
SmoothGrad(noise=0.1, copies=32)
>>> [option.text for option in SmoothGrad().options]
['noise=0.15 (a number of at least 0)', 'copies=32 (a whole number of at least 1)']
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convscope.errors import UsageError, nearest

Value = int | float | bool | str | None
KINDS = (bool, int, float, str)
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


Given = Any  # a user's value of an option, before it is checked


@dataclass(frozen=True)
class Limits:
    """The allowed values of an option.

    Attributes:
        about: description of the option.
        low, high: the smallest and the largest number, both allowed; None for no limit.
        choices: the words that are allowed; none for any.
        none: the word for None, and after a colon its meaning: "auto: half of the patch". Empty where None is not
            allowed.

    Example:
        >>> Limits("number of copies", low=1).high is None
        True
    """

    about: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    none: str = ""


def option(default: object, about: str, **limits: Any) -> Any:
    """A field of a method's dataclass that is one of its options.

    Args:
        default: its value where none is given.
        about: its description.
        limits: further attributes of `Limits`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Blur:
        ...     radius: int = option(3, "radius in pixels", low=1)
        >>> [one.text for one in options_of(Blur())]
        ['radius=3 (a whole number of at least 1)']
    """
    return dataclasses.field(default=default, metadata={"limits": Limits(about, **limits)})


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: as `--option name=value` takes it.
        kind: bool, int, float or str.
        default: its value where none is given.
        limits: its allowed values.

    Example:
        >>> Option("copies", int, 32, Limits("number of copies", low=1)).parse("8")
        8
    """

    name: str
    kind: type
    default: Value
    limits: Limits

    @property
    def expected(self) -> str:
        """The allowed values: "a whole number of at least 1, or auto"."""
        if self.kind is bool:
            what = "true or false"
        elif self.kind is str:
            *others, last = self.limits.choices or ("a text",)
            what = f"{', '.join(others)} or {last}" if others else last
        else:
            what = ("a whole number" if self.kind is int else "a number") + self._range
        return f"{what}, or {self._none}" if self._none else what

    @property
    def text(self) -> str:
        """Name, default and allowed values: "copies=32 (a whole number of at least 1)"."""
        return f"{self.name}={self.written(self.default)} ({self.expected})"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, default, allowed values and description: a row of a table."""
        note = self.limits.none.partition(": ")[2]
        return (
            self.name,
            self.written(self.default),
            self.expected,
            self.limits.about + (f"; {self._none}: {note}" if note else ""),
        )

    def written(self, value: Value) -> str:
        """A value as `parse` takes it."""
        if value is None:
            return self._none
        return str(value).lower() if isinstance(value, bool) else str(value)

    def parse(self, text: str) -> Value:
        """The value that a text stands for.

        Raises:
            ValueError: none.
        """
        text = text.strip()
        if self._none and text == self._none:
            return None
        if self.kind is bool:
            if text.lower() not in TRUTHS:
                raise ValueError(text)
            return TRUTHS[text.lower()]
        if self.kind is int and not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError(text)
        found: Value = self.kind(text)
        return found

    def checked(self, value: Given) -> Value:
        """The value as a plain one of its kind.

        Raises:
            ValueError: it is not an allowed value.
        """
        limits, found = self.limits, value
        if value is None and limits.none:
            return None
        if self.kind in (int, float):
            if isinstance(value, bool) or not self._is_number(value):
                raise ValueError(value)
            found = int(value) if self.kind is int else float(value)
            low = -math.inf if limits.low is None else limits.low
            high = math.inf if limits.high is None else limits.high
            if not math.isfinite(found) or not low <= found <= high:
                raise ValueError(value)
        elif not isinstance(value, self.kind) or (limits.choices and value not in limits.choices):
            raise ValueError(value)
        plain: Value = found
        return plain

    def _is_number(self, value: object) -> bool:
        return isinstance(value, numbers.Integral if self.kind is int else numbers.Real)

    @property
    def _none(self) -> str:
        return self.limits.none.partition(":")[0]

    @property
    def _range(self) -> str:
        low, high = (None if limit is None else f"{limit:g}" for limit in (self.limits.low, self.limits.high))
        if low is not None and high is not None:
            return f" from {low} to {high}"
        return f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""


def options_of(method: object) -> tuple[Option, ...]:
    """The options of a method: the fields of its dataclass that are a truth value, a number or a text."""
    if not dataclasses.is_dataclass(method):
        return ()
    kinds = _kinds(method if isinstance(method, type) else type(method))
    found = []
    for field in dataclasses.fields(method):
        kind, optional = kinds.get(field.name, (None, False))
        if kind is None or not field.init or field.default is dataclasses.MISSING:
            continue
        limits = field.metadata.get("limits", Limits(none="none" if optional else ""))
        found.append(Option(field.name, kind, field.default, limits))
    return tuple(found)


def _kinds(method: type) -> dict[str, tuple[type | None, bool]]:
    """For each field the plain type of its values, None where it has another type; and whether None is allowed."""
    try:
        hints = typing.get_type_hints(method)
    except (NameError, TypeError, AttributeError):  # an annotation of the user's that can't be resolved from here
        return {}
    return {name: _kind(hint) for name, hint in hints.items()}


def _kind(hint: object) -> tuple[type | None, bool]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [part for part in parts if part is not types.NoneType]
    return (plain[0] if len(plain) == 1 and plain[0] in KINDS else None), len(plain) < len(parts)


def check_options(name: str, method: object) -> dict[str, Value]:
    """The values of a method's options, as plain values.

    Args:
        name: the method's name, for messages.
        method: the method with the options.

    Raises:
        UsageError: a value is not allowed.
    """
    found = {}
    for one in options_of(method):
        value = getattr(method, one.name)
        try:
            found[one.name] = one.checked(value)
        except ValueError:
            raise _refused(name, one, value) from None
    return found


def parsed(name: str, options: tuple[Option, ...], given: Mapping[str, str]) -> dict[str, Value]:
    """The values that texts stand for.

    Args:
        name: the method's name, for messages.
        options: its options.
        given: texts by the name of an option.

    Raises:
        UsageError: there is no such option, or its text stands for no value.
    """
    known, found = {one.name: one for one in options}, {}
    for key, text in given.items():
        if key not in known:
            raise UsageError(
                f"method {name!r} has no option {key!r}; {nearest(key, known)}. {listed(name, options)}",
                code="method-option-unknown",
                method=name,
                name=key,
            )
        try:
            found[key] = known[key].parse(text)
        except ValueError:
            raise _refused(name, known[key], text) from None
    return found


def listed(name: str, options: tuple[Option, ...]) -> str:
    """A sentence that lists a method's options."""
    if not options:
        return f"{name} has no options."
    return f"{name} has {', '.join(one.text for one in options)}."


def _refused(name: str, option: Option, value: object) -> UsageError:
    return UsageError(
        f"option {option.name!r} of method {name!r}: expected {option.expected}, found {value!r}; "
        f"the default is {option.written(option.default)}.",
        code="method-option-invalid",
        method=name,
        name=option.name,
        expected=option.expected,
        found=value,
    )
