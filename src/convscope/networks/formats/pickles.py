"""Pickles read without being run: a stack machine that makes data, and calls only functions of a given table.

Python's own unpickler imports and calls whatever a file names. This one does the operations of `_OPERATIONS` alone,
looks names up in the table of its caller alone, and calls nothing but what it found there.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from convscope import limits
from convscope.errors import ModelError

# What a malformed pickle makes pickletools and the machine raise.
DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError)


class ForeignName(Exception):
    """The pickle names something that the table does not have.

    Attributes:
        name: "module.name" of it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class UnknownOpcode(ValueError):
    """The pickle uses an operation that the machine does not do."""


Value = Any  # what a pickle makes, or what its table makes for it


@dataclass(frozen=True)
class Made:
    """A table's entry for a name: the function that makes its value.

    Attributes:
        call: makes the value from the arguments; None where the name is only passed on.
        takes_state: true where the pickle may give the value a state afterwards, which is left out.
    """

    call: Callable[..., Value] | None
    takes_state: bool = False


@dataclass(eq=False)
class Instance:
    """An object of a class of the file's: its name, what it was made of, and its state. Nothing of it was run."""

    name: str
    arguments: tuple = ()
    state: Value = None
    finished: bool = False


@dataclass(frozen=True)
class Stub:
    """Stands for an object of which nothing is made: its class or function is not called, its parts are left out.

    Attributes:
        name: of the class or function that the pickle names.
    """

    name: str


def stub(name: str) -> Made:
    """A table's entry that makes a `Stub` of whatever the pickle does with a name."""
    return Made(lambda *_, **__: Stub(name), takes_state=True)


@dataclass(frozen=True)
class Named:
    """A name that the table has, on the stack."""

    name: str
    made: Made


@dataclass
class _Machine:
    table: Callable[[str], Made | None]
    persistent: Callable[[object], object]
    stack: list[Value] = field(default_factory=list)
    marks: list[list[object]] = field(default_factory=list)
    memo: dict[int, Value] = field(default_factory=dict)
    states: dict[int, object] = field(default_factory=dict)

    def marked(self) -> list[object]:
        found, self.stack = self.stack, self.marks.pop()
        return found


def load(
    source: bytes | IO[bytes], table: Callable[[str], Made | None], persistent: Callable[[Value], Value] | None = None
) -> Value:
    """The value of a pickle.

    Args:
        source: its bytes, or a file that stands where it begins, and will stand where it ends.
        table: what to make of "module.name"; None for a name that is not harmless.
        persistent: what to make of what the pickle stores elsewhere.

    Raises:
        ForeignName: it names something that the table does not have.
        UnknownOpcode: it uses an operation of another protocol.
        ValueError, IndexError, KeyError, TypeError: it is damaged.
        ModelError: it is larger than the limits.
    """
    machine = _Machine(table, persistent or _nothing_stored)
    for name, argument in operations(source):
        if name == "STOP":
            (value,) = machine.stack
            check_shape(value)
            return value
        operation = _OPERATIONS.get(name)
        if operation is None:
            raise UnknownOpcode(f"the operation {name} of pickles is not read here")
        operation(machine, argument)
    raise ValueError("the pickle does not end")


def operations(source: bytes | IO[bytes]) -> Iterator[tuple[str, Value]]:
    """The operations of one pickle with their arguments, bounded by the limits for one text and for entries."""
    bounded = _Bounded(io.BytesIO(source) if isinstance(source, bytes) else source, limits.current().text)
    most = 50 * limits.current().entries
    for number, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):  # type: ignore[arg-type]
        if number >= most:
            raise ModelError(
                f"a pickle in the file holds too many operations ({limits.how_to_raise('entries')}).",
                code="input-too-large",
                limit="entries",
            )
        yield opcode.name, argument


class _Bounded:
    """A file of which so many bytes are read and no more."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._left = file, most

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > self._left:
            count = self._left + 1
        return self._counted(self._file.read(count))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ModelError(
                f"a pickle in the file is too large ({limits.how_to_raise('text')}).",
                code="input-too-large",
                limit="text",
            )
        return data


def check_shape(value: object) -> None:
    """Refuse values that hold themselves, that are nested deeply, or that are small only because parts are shared.

    Raises:
        ModelError: it is one of these.
    """
    depths: dict[int, int] = {}
    most = limits.current()
    for part, parts in _innermost_first(value, most.depth):
        depths[id(part)] = 1 + max((depths[id(inner)] for inner in parts), default=-1)
        if depths[id(part)] > most.depth:
            raise _too_deep()  # by way of a part that was met before, less deep
    if count(value) > 50 * most.entries:
        raise ModelError(
            f"a pickle in the file holds too many values ({limits.how_to_raise('entries')}).",
            code="input-too-large",
            limit="entries",
        )


def count(value: object, kind: type = object) -> int:
    """How many parts of a kind a value has, itself among them; one that is shared counts at each of its places."""
    found: dict[int, int] = {}
    for part, parts in _innermost_first(value):
        below = sum(found[id(inner)] for inner in parts)
        found[id(part)] = min(isinstance(part, kind) + below, 2**62)  # sharing doubles it at each level
    return found[id(value)]


def parts_of(value: object, kind: type) -> Iterator[Value]:
    """Each part of a kind that a value has, once."""
    return (part for part, _ in _innermost_first(value) if isinstance(part, kind))


def _too_deep() -> ModelError:
    return ModelError(
        f"a pickle in the file is nested too deeply ({limits.how_to_raise('depth')}).",
        code="input-too-large",
        limit="depth",
    )


def _innermost_first(value: object, depth: float = math.inf) -> Iterator[tuple[object, list[object]]]:
    """Each part once, after the parts that it has.

    Raises:
        ModelError: a part holds itself, or lies more than `depth` levels deep.
    """
    done: set[int] = set()
    begun: set[int] = set()
    waiting: list[tuple[Value, list[Value] | None]] = [(value, None)]
    while waiting:
        part, parts = waiting.pop()
        if parts is not None:
            begun.discard(id(part))
            done.add(id(part))
            yield part, parts
        elif id(part) in begun:
            raise ModelError(
                "a pickle in the file holds a value that holds itself; no model does.", code="file-invalid"
            )
        elif id(part) not in done:
            begun.add(id(part))
            if len(begun) > depth + 1:
                raise _too_deep()
            parts = _parts(part)
            waiting.append((part, parts))
            waiting.extend((inner, None) for inner in parts)


def _parts(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Instance):
        return [value.arguments, value.state]
    return []


def _nothing_stored(_: object) -> object:
    raise ValueError("it refers to something that is stored outside of it")


# -- the operations --------------------------------------------------------------------------------------

_Operation = Callable[[_Machine, Value], None]


def _push(machine: _Machine, argument: object) -> None:
    machine.stack.append(argument)


def _pushing(make: Callable[[], object]) -> _Operation:
    return lambda machine, _: machine.stack.append(make())


def _mark(machine: _Machine, _: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _tuple_of(count: int) -> _Operation:
    def operation(machine: _Machine, _: object) -> None:
        if len(machine.stack) < count:
            raise IndexError("the stack is empty")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


def _marked_tuple(machine: _Machine, _: object) -> None:
    found = machine.marked()
    machine.stack.append(tuple(found))


def _marked_list(machine: _Machine, _: object) -> None:
    found = machine.marked()
    machine.stack.append(found)


def _marked_dict(machine: _Machine, _: object) -> None:
    found = machine.marked()
    made: dict[Value, Value] = {}
    _set(made, found)
    machine.stack.append(made)


def _set(target: object, pairs: list[object]) -> None:
    if isinstance(target, Stub):
        return
    if not isinstance(target, dict):
        raise TypeError("items are set of what is no dictionary")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        check_key(key)
        target[key] = value


def check_key(key: object) -> None:
    """Refuse keys whose hash takes long, overflows the stack, or can be that of many others.

    Raises:
        TypeError: it is one of these.
    """
    parts = key if isinstance(key, tuple) and len(key) <= _LONGEST_KEY else (key,)
    if not all(_is_plain_key(part) for part in parts):
        raise TypeError(f"a key of a dictionary is a {type(key).__name__} that no model has")


_LONGEST_KEY = 16
_LARGEST_KEY = 2**61 - 1  # Python hashes whole numbers modulo this


def _is_plain_key(key: object) -> bool:
    if isinstance(key, int):
        return abs(key) < _LARGEST_KEY
    return isinstance(key, str | bytes | float | type(None) | Stub)


def _set_one(machine: _Machine, _: object) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine.stack[-1], [key, value])


def _set_marked(machine: _Machine, _: object) -> None:
    found = machine.marked()
    _set(machine.stack[-1], found)


def _add(machine: _Machine, found: list[object]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Stub):
        return
    if not isinstance(target, list):
        raise TypeError("values are appended to what is no list")
    target.extend(found)


def _append(machine: _Machine, _: object) -> None:
    value = machine.stack.pop()
    _add(machine, [value])


def _append_marked(machine: _Machine, _: object) -> None:
    found = machine.marked()
    _add(machine, found)


def _put(machine: _Machine, argument: Value) -> None:
    if int(argument) > len(machine.memo) + 1:  # they are counted up; torch's reader allocates all below
        raise ValueError(f"it numbers a value {argument} that is not the next one")
    machine.memo[int(argument)] = machine.stack[-1]


def _get(machine: _Machine, argument: Value) -> None:
    machine.stack.append(machine.memo[int(argument)])


def _global(machine: _Machine, argument: object) -> None:
    home, _, kind = str(argument).partition(" ")
    name = f"{home}.{kind}"
    made = machine.table(name)
    if made is None:
        raise ForeignName(name)
    machine.stack.append(Named(name, made))


def _reduce(machine: _Machine, _: object) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if isinstance(function, Stub):  # what a call has made is called itself
        machine.stack.append(function)
        return
    if not isinstance(function, Named) or function.made.call is None or not isinstance(arguments, tuple):
        raise TypeError("it calls what is no function")
    made = function.made.call(*arguments)
    if function.made.takes_state:
        machine.states[id(made)] = made  # kept, so that its id stays its own
    machine.stack.append(made)


def _build(machine: _Machine, _: object) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Instance):
        if target.finished:
            raise ValueError("an object is given its state twice")
        target.state, target.finished = state, True
    elif isinstance(target, Stub):
        return
    elif machine.states.get(id(target)) is not target:
        raise TypeError(f"a {type(target).__name__} is given a state")


def _stored(machine: _Machine, _: object) -> None:
    machine.stack.append(machine.persistent(machine.stack.pop()))


_OPERATIONS: Mapping[str, _Operation] = {
    "PROTO": lambda machine, argument: None,
    "MARK": _mark,
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "INT", "LONG", "FLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "UNICODE", "STRING"), _push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES"), _push),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_TUPLE": _pushing(tuple),
    "TUPLE": _marked_tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": _marked_list,
    "DICT": _marked_dict,
    "SETITEM": _set_one,
    "SETITEMS": _set_marked,
    "APPEND": _append,
    "APPENDS": _append_marked,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), _get),
    "GLOBAL": _global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "BINPERSID": _stored,
}


def names(source: bytes | IO[bytes]) -> tuple[list[str], int]:
    """The classes and functions that a pickle names, in order, and its protocol; nothing is made of them.

    Raises:
        ValueError: it is damaged so early that it names and holds nothing.
    """
    wanted: list[str] = []
    pushed: list[str | None] = []  # texts that went on the stack; None for anything else
    memo: dict[int, str | None] = {}
    protocol = 0
    try:
        for name, argument in operations(source):
            if name == "PROTO":
                protocol = int(argument)
            elif name == "GLOBAL":
                wanted.append(str(argument).replace(" ", "."))
            elif name == "STACK_GLOBAL":
                wanted.append(".".join(str(text) for text in pushed[-2:]))
            if name == "MEMOIZE" or name.endswith("PUT"):
                memo[len(memo) if argument is None else int(argument or 0)] = pushed[-1] if pushed else None
            elif name.endswith("GET"):
                pushed.append(memo.get(int(argument or 0)))
            else:
                pushed.append(argument if isinstance(argument, str) else None)
    except DAMAGE:
        if not wanted and not any(pushed):
            raise
    return wanted, protocol
