"""Messages between processes: the length of a JSON text, the text, then the bytes of the arrays in it. No pickles."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from typing import Any

Sent = Any  # what messages carry: None, bool, int, float, str, bytes, arrays, and lists and dicts of these
Pipe = Any  # an object with `write` or `readinto`, such as a file


def write_all(pipe: Pipe, parts: Sequence[Sent]) -> None:
    """Write the parts of a message; `pipe.write(view)` may take some of the bytes and returns their number."""
    for part in parts:
        _write(pipe, part)


def _write(pipe: Pipe, part: Sent) -> None:
    view = memoryview(part).cast("B")
    while len(view):
        view = view[pipe.write(view) :]


def message(value: object) -> list[Sent]:
    """The parts of the message of a value: plain values, bytes, arrays, and lists and dicts of these.

    Raises:
        TypeError: it is none of these, or an array of objects.

    Example:
        >>> message({"a": b"xy"})[1:]
        [b'xy']
    """
    buffers: list[object] = []
    text = json.dumps(_packed(value, buffers)).encode()
    return [struct.pack("<Q", len(text)) + text, *buffers]


def receive(pipe: Pipe) -> Sent:
    """The value of the next message; `pipe.readinto(view)` returns the number of bytes that it read.

    Raises:
        EOFError: the pipe has ended.

    Example:
        >>> import io
        >>> receive(io.BytesIO(b"".join(message([1, "a", b"xy"]))))
        [1, 'a', b'xy']
    """
    (length,) = struct.unpack("<Q", _read(pipe, 8))
    message = json.loads(bytes(_read(pipe, length)))
    return _unpacked(message, pipe)


def _read(pipe: Pipe, count: int) -> memoryview:
    view = memoryview(bytearray(count))
    _read_into(pipe, view)
    return view


def _read_into(pipe: Pipe, view: memoryview) -> None:
    while len(view):
        got = pipe.readinto(view)
        if not got:
            raise EOFError
        view = view[got:]


def _packed(value: object, buffers: list[object]) -> object:
    """JSON of a value; arrays and bytes are put aside in `buffers`, in the order in which `_unpacked` meets them."""
    if isinstance(value, str | int | float | None):
        return value
    np = sys.modules.get("numpy")  # without the import there can be no array of it
    if np is not None and isinstance(value, np.generic):
        value = np.asarray(value)
    if np is not None and isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects can't be sent")
        buffers.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else b"")
        return {"$": "array", "dtype": np.lib.format.dtype_to_descr(value.dtype), "shape": list(value.shape)}
    if isinstance(value, bytes):
        buffers.append(value)
        return {"$": "bytes", "size": len(value)}
    if isinstance(value, dict):
        return {"$": "dict", "keys": list(value), "values": [_packed(item, buffers) for item in value.values()]}
    if isinstance(value, list | tuple):
        return [_packed(item, buffers) for item in value]
    return value


def _unpacked(value: object, pipe: Pipe) -> object:
    if isinstance(value, list):
        return [_unpacked(item, pipe) for item in value]
    if not isinstance(value, dict):
        return value
    if value["$"] == "dict":
        return dict(zip(value["keys"], [_unpacked(item, pipe) for item in value["values"]], strict=True))
    if value["$"] == "bytes":
        return bytes(_read(pipe, value["size"]))
    return _array(value, pipe)


def _array(about: dict[str, Sent], pipe: Pipe) -> Sent:
    import numpy as np

    descr = about["dtype"]
    if isinstance(descr, list):  # JSON made lists of the tuples of a structured type
        descr = [tuple(field) for field in descr]
    out = np.empty(about["shape"], np.lib.format.descr_to_dtype(descr))
    if out.size:
        _read_into(pipe, memoryview(out.reshape(-1).view(np.uint8).data))
    return out
