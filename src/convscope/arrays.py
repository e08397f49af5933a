"""Reading NumPy's files: what the header declares is held against the file's size before anything is allocated.

No pickle and no `eval`: a header is read by its own pattern, and the types of numbers are an allow-list.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import numpy as np

from convscope import limits
from convscope.errors import ConvscopeError

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 64 * 1024
_DTYPES = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
_HEADER = re.compile(
    r"\{\s*'descr'\s*:\s*'(?P<descr>[^']{1,8})'\s*,\s*'fortran_order'\s*:\s*(?P<fortran>True|False)\s*,"
    r"\s*'shape'\s*:\s*\((?P<shape>(?:\s*\d{1,18}\s*,)*(?:\s*\d{1,18})?)\s*\)\s*,?\s*\}\s*"
)


class NotAnArray(Exception):
    """A file is not the array that was expected; the text says what was found."""


@dataclass(frozen=True)
class Header:
    """What the beginning of a `.npy` file declares.

    Attributes:
        dtype, shape, fortran: of the array.
        start: the first byte of its values.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; no link, and never a pipe or a device, whose reading could wait for ever.

    Raises:
        OSError: it can't be opened.
        NotAnArray: it is no regular file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise NotAnArray("a link, a folder, a pipe or a device")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it may have been replaced in between
        file.close()
        raise NotAnArray("a link, a folder, a pipe or a device")
    return file


def header(file: BinaryIO, available: int) -> Header:
    """The header of a `.npy` file, whose values are all there.

    Args:
        file: at its first byte.
        available: bytes of the whole file.

    Raises:
        NotAnArray: it is damaged, its type of numbers is none of those allowed, or the file has another size than
            the header declares.
    """
    begin = file.read(8)
    if begin[:6] != _MAGIC or len(begin) < 8 or begin[6] not in (1, 2, 3):
        raise NotAnArray("a file that does not begin as NumPy's do")
    width = 2 if begin[6] == 1 else 4
    length = file.read(width)
    if len(length) < width:
        raise NotAnArray("a header that is cut short")
    (count,) = struct.unpack("<H" if width == 2 else "<I", length)
    if count > min(_LONGEST_HEADER, available):
        raise NotAnArray(f"a header of {count} bytes")
    found = _HEADER.fullmatch(file.read(count).decode("latin-1"))
    if found is None or not _DTYPES.fullmatch(found["descr"]):
        raise NotAnArray("a header that declares no plain array of numbers")
    shape = tuple(int(side) for side in found["shape"].replace(" ", "").split(",") if side)
    declared = Header(np.dtype(found["descr"]), shape, found["fortran"] == "True", 8 + width + count)
    if len(shape) > 8 or declared.start + declared.size != available:
        raise NotAnArray(f"{available} bytes where the header declares {declared.start + declared.size}")
    return declared


def read_npy(path: str | os.PathLike[str], *, mapped: bool = False, room: int | None = None) -> np.ndarray:
    """The array of a `.npy` file.

    Args:
        path: of a regular file.
        mapped: memory-mapped and read-only, instead of in memory.
        room: bytes that it may take in memory; the limit `weights` where None.

    Raises:
        OSError: it can't be read. NotAnArray: it holds no plain array.
        ConvscopeError: it would take more than `room`.
    """
    with open_regular(path) as file:
        declared = header(file, os.fstat(file.fileno()).st_size)
        order = "F" if declared.fortran else "C"
        if mapped and declared.size:
            return np.memmap(file, declared.dtype, "r", declared.start, declared.shape, order)  # type: ignore[call-overload]
        if declared.size > (limits.current().weights if room is None else room):
            raise ConvscopeError(
                f"{os.fspath(path)!r} holds an array of {limits.shown('weights', declared.size)}, and what is read may "
                f"take less ({limits.how_to_raise('weights')})."
            )
        values = np.fromfile(file, declared.dtype, prod(declared.shape))
    if len(values) != prod(declared.shape):
        raise NotAnArray("fewer values than the header declares")
    return values.reshape(declared.shape, order=order)  # type: ignore[call-overload]
