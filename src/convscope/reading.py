"""Small files of the user's: text, JSON and arrays, within declared limits.

Every function raises `Unreadable` with the reason alone; the caller adds the expected value and the remedy
to the message. The functions that take a library to read (`json_of`, `array_of`)
do it in the reader process.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import IO, TYPE_CHECKING, Literal, NoReturn

from convscope import isolation, limits
from convscope.errors import ConvscopeError, Unreadable, one_line

if TYPE_CHECKING:
    import numpy as np

FOLDER, NO_FILE = "it is a directory", "it is a device or a pipe"  # kinds of paths that are no files
_MIB = 2**20


def real(path: str) -> str:
    """The absolute path, for the reader process: its working directory and its standard input are not the caller's."""
    with contextlib.suppress(OSError, ValueError):
        found = os.path.realpath(path)
        if os.path.exists(found):
            return found
    return os.path.abspath(path)


def opened(path: str) -> FileIO:
    """An ordinary file, opened. The opened file is the one that is checked, so nothing can replace it in between.

    Raises:
        Unreadable: there is none, or it is a folder, a pipe or a device (none of which is ever waited for).
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        if os.path.isdir(path):  # Windows does not open folders at all
            raise Unreadable(FOLDER, code="is-folder")
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise Unreadable("No such file", code="file-missing") from None
    except (OSError, ValueError) as error:
        raise Unreadable(str(getattr(error, "strerror", None) or error), code="file-unreadable") from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            folder = stat.S_ISDIR(mode)
            raise Unreadable(FOLDER if folder else NO_FILE, code="is-folder" if folder else "no-regular-file")
        return os.fdopen(handle, "rb", 0)
    except BaseException:
        os.close(handle)
        raise


def bytes_of(path: str, limit: str) -> bytes:
    """All bytes of an ordinary file.

    Args:
        path: path of the file.
        limit: the name of the limit that they have to keep: "text" or "file".

    Raises:
        Unreadable: it can't be opened, or is larger.
    """
    most = getattr(limits.current(), limit)
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise too_large(f"it holds {limits.shown(limit, size)}", limit)
            data = file.read(size + 1)
            while 0 < len(data) <= most and (more := file.read(_MIB)):  # it grew, or has no size, as those of /proc
                data += more
    except OSError as error:
        raise Unreadable(str(error.strerror or error), code="file-unreadable") from error
    if len(data) > most:
        raise too_large(f"it holds more than {limits.shown(limit, most)}", limit)
    return data


def too_large(what: str, limit: str) -> Unreadable:
    """The error of a file that is beyond a limit."""
    return Unreadable(f"{what} ({limits.how_to_raise(limit)})", code="input-too-large", limit=limit)


def text_of(path: str) -> str:
    """The text of a file in UTF-8, with or without a mark at its start.

    Raises:
        Unreadable: it can't be opened, is too large, or no text.
    """
    return decoded(bytes_of(path, "text"))


def as_text(name: str) -> str:
    """A name as text that can be written: a file's name may hold bytes that are none, and JSON halves of surrogates.

    Example:
        >>> as_text("cat\ud800")
        'cat?'
    """
    return name.encode("utf-8", "replace").decode()


def decoded(data: bytes) -> str:
    """Bytes decoded as text.

    Raises:
        Unreadable: they are no text in UTF-8.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable("it is UTF-16 text, and not UTF-8", code="not-text", found="UTF-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8 text", code="not-text") from None
    if "\0" in text:
        raise Unreadable("it is not text, for it holds zero bytes", code="not-text")
    return text


def json_of(text: str) -> object:
    """The value of a JSON text, strictly by the standard: no NaN, no duplicate key.

    Raises:
        Unreadable: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise too_large("it is JSON of too many levels", "depth") from None
    except ValueError as error:
        raise Unreadable(f"it is no JSON: {error}", code="not-json", reason=str(error)) from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _without_doubles(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double!r} is there twice")
    return value


def is_deeper(value: object, most: int) -> bool:
    """True if lists and objects of a JSON value are nested more than `most` levels deep; it does not recurse."""
    level = [value]
    for _ in range(most):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, dict | list) for item in level)


# -- arrays ----------------------------------------------------------------------------------------------


def array_of(path: str) -> object:
    """The array of numbers in a `.npy` file, or the only one in a `.npz` file: read in the reader process.

    Raises:
        Unreadable: it is neither, contains other values than numbers, or less than its header declares.
    """
    most = limits.current().file
    where = real(path)
    try:
        return isolation.call("convscope.reading:_array_here", where, memory=most + 256 * _MIB)
    except isolation.ReaderError as error:
        raise Unreadable(str(error), code=error.code) from error
    except ConvscopeError as error:
        raise (
            error if type(error) is not ConvscopeError else Unreadable(error.message, code=error.code, **error.data)
        ) from None


def _array_here(path: str) -> object:
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4)
            file.seek(0)
            if start == b"PK\x03\x04":
                return _only_array(file)
            return _array(file, size)
    except (ConvscopeError, MemoryError):
        raise
    except Exception as error:  # zipfile and NumPy raise errors of many classes for damaged files
        reason = one_line(error)
        raise Unreadable(f"it is damaged: {reason}", code="file-damaged", reason=reason) from None


def _only_array(file: IO[bytes]) -> object:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) != 1:
            raise Unreadable(
                f"it holds {len(members)} arrays where there should be one", code="not-an-array", count=len(members)
            )
        with archive.open(members[0]) as member:
            return _array(member, members[0].file_size)


def _array(file: IO[bytes], size: int) -> np.ndarray:
    import numpy as np

    header, most = npy_header(file), limits.current().file
    if header.size > most:
        raise too_large(f"its header declares {limits.shown('file', header.size)}", "file")
    if header.size > size:
        raise Unreadable(
            f"it is cut short: its header declares {header.size} bytes, but it holds {size}",
            code="file-damaged",
            expected=header.size,
            found=size,
        )
    data = bytearray(header.size)
    got = _filled(file, memoryview(data))
    if got < header.size:
        raise Unreadable(
            f"it is cut short: its header declares {header.size} bytes, but {got} follow",
            code="file-damaged",
            expected=header.size,
            found=got,
        )
    return np.frombuffer(data, header.dtype).reshape(header.shape, order=header.order)


def _filled(file: IO[bytes], view: memoryview) -> int:
    count = 0
    while count < len(view):
        part = file.read(min(len(view) - count, _MIB))
        if not part:
            break
        view[count : count + len(part)] = part
        count += len(part)
    return count


_LONGEST_HEADER = 10_000  # bytes
_HEADER_CHECKS: dict[str, Callable[[object], bool]] = {
    "descr": lambda value: isinstance(value, str),
    "fortran_order": lambda value: isinstance(value, bool),
    "shape": lambda value: (
        isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and n >= 0 for n in value)
    ),
}


@dataclass(frozen=True)
class Header:
    """The header of a `.npy` file of real numbers.

    Attributes:
        dtype: a NumPy type of at most 8 bytes; shape: of the array.
        order: "C" or "F", as NumPy calls the order of the values.
        start: the first byte of the values.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    start: int

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return int(math.prod(self.shape) * self.dtype.itemsize)


def npy_header(file: IO[bytes]) -> Header:
    """The header of the `.npy` file that begins where `file` stands. Nothing is allocated, unpickled or evaluated.

    Raises:
        Unreadable: it is damaged, or does not declare an array of real numbers.
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY":
        raise Unreadable("it is no .npy or .npz file", code="not-an-array")
    width, form = (2, "<H") if start[6:7] == b"\x01" else (4, "<I")
    try:
        (length,) = struct.unpack(form, file.read(width))
        if length > _LONGEST_HEADER:
            raise Unreadable(
                f"its header has {length} bytes, and those of arrays of numbers have about 100",
                code="not-an-array",
                found=length,
            )
        entries = ast.literal_eval(file.read(length).decode("latin-1").strip())
        _check_entries(entries)
        dtype = _numbers(entries["descr"])
    except (struct.error, ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        reason = one_line(error)
        raise Unreadable(f"it is damaged: {reason}", code="file-damaged", reason=reason) from None
    return Header(dtype, entries["shape"], "F" if entries["fortran_order"] else "C", 8 + width + length)


def _check_entries(entries: object) -> None:
    """The three entries, if they have the forms of an array of numbers."""
    if not isinstance(entries, dict) or set(entries) != set(_HEADER_CHECKS):
        raise Unreadable("its header is not that of an array", code="not-an-array")
    if isinstance(entries["descr"], list):
        raise Unreadable("it holds a table with named columns, and not numbers", code="not-numbers", found="a table")
    wrong = [name for name, check in _HEADER_CHECKS.items() if not check(entries[name])]
    if wrong:
        raise Unreadable(f"its header has no {wrong[0]} of an array of numbers", code="not-an-array", name=wrong[0])


def _numbers(descr: str) -> np.dtype:
    import numpy as np

    dtype = np.dtype(descr)
    if dtype.hasobject:
        raise Unreadable(
            "it holds Python objects, which are never loaded: that would run code", code="not-numbers", found="objects"
        )
    if dtype.kind not in "biuf" or dtype.shape or dtype.itemsize > 8:
        raise Unreadable(f"it holds {dtype} and not real numbers", code="not-numbers", found=str(dtype))
    return dtype
