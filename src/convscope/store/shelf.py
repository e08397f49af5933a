"""Folders that results were saved in, read with care: they may come from anybody.

Names in a folder's JSON are plain names of regular files inside of it. Sizes are held against the limits before
anything is read as a whole, and every value is checked against a schema, so that any fault gives one clear error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from convscope import limits, schema
from convscope.arrays import NotAnArray, open_regular, read_npy
from convscope.errors import ConvscopeError
from convscope.files import is_safe_name
from convscope.images.decode import read_image
from convscope.images.image import InputImage
from convscope.reading import is_deeper
from convscope.results.base import array_sha256
from convscope.schema import Json, Misfit

VALUES_PER_ENTRY = 20  # of JSON, for each entry that the limits allow: a curve has many numbers


# -- reading ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file, its size and depth held against the limits.

    Raises:
        ConvscopeError: it can't be read, or is too large. Misfit: it is no JSON object.
    """
    allowed = limits.current()
    try:
        with open_regular(path) as file:
            data = file.read(allowed.text + 1)
    except OSError as error:
        raise ConvscopeError(
            f"{str(path)!r} can't be read ({error.strerror}).",
            code="file-unreadable",
            path=str(path),
            reason=error.strerror,
        ) from None
    except NotAnArray as kind:
        raise ConvscopeError(
            f"expected a regular file at {str(path)!r}, found {kind}.",
            code="no-regular-file",
            path=str(path),
            found=str(kind),
        ) from None
    _check_size("text", len(data), allowed.text, "bytes", path)
    _check_size("entries", data.count(b"{") + data.count(b"["), allowed.entries, "objects and lists", path)
    _check_size("entries", data.count(b","), VALUES_PER_ENTRY * allowed.entries, "values", path)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise Misfit("the top", f"at most {allowed.depth} levels", "more") from None
    except ValueError as error:
        raise Misfit("the top", "JSON", str(error)[:200]) from None
    if is_deeper(value, allowed.depth):
        raise Misfit("the top", f"at most {allowed.depth} levels", f"more ({limits.how_to_raise('depth')})")
    return schema.table(value, "the top")


def _check_size(name: str, size: int, most: int, what: str, path: Path) -> None:
    if size > most:
        raise ConvscopeError(
            f"{str(path)!r} holds more than {most} {what}, which is more than is read ({limits.how_to_raise(name)}).",
            code="input-too-large",
            path=str(path),
            limit=name,
        )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def is_plain(name: str, suffix: str) -> bool:
    """True for the name of a file as `files.safe_name` makes them: no folder, nothing hidden, no device."""
    return name.endswith(suffix) and is_safe_name(name)


@dataclass
class Shelf:
    """The files beside one JSON file.

    Attributes:
        root: their folder.
        left: bytes that may still be read.
    """

    root: Path
    left: int = field(default_factory=lambda: limits.current().weights)
    _photos: dict[str, np.ndarray] = field(default_factory=dict)

    def path(self, name: Json, where: str, suffix: str, inside: str = "") -> Path:
        """The file that an entry of the JSON names: plainly, or as `inside/NAME`.

        Raises:
            Misfit: it is not such a name.
        """
        wanted = f"{inside}/NAME{suffix}" if inside else f"NAME{suffix}"
        folder, _, file = schema.text(name, where).rpartition("/")
        if folder != inside or not is_plain(file, suffix):
            raise Misfit(where, f"the plain name of a file ({wanted})", schema.shown(name))
        if inside and not _is_folder(self.root / inside):
            raise Misfit(where, f"a folder {inside} beside the JSON file", "none, or a link")
        return self.root / name

    def array(self, name: Json, where: str, inside: str = "", *, mapped: bool = False) -> np.ndarray:
        """The float32 array in a `.npy` file.

        Raises:
            Misfit: there is none. ConvscopeError: it is larger than the limits allow.
        """
        path = self.path(name, where, ".npy", inside)
        try:
            values = read_npy(path, mapped=mapped, room=self.left)
        except OSError as error:
            raise Misfit(where, f"an array in {name}", error.strerror or str(error)) from None
        except (NotAnArray, ValueError) as reason:
            raise Misfit(where, f"an array in {name}", str(reason)) from None
        if values.dtype != np.float32:
            raise Misfit(where, f"float32 in {name}", str(values.dtype))
        self.left -= 0 if mapped else values.nbytes
        return values

    def images(self, rows: Sequence[Mapping[str, Json]]) -> tuple[InputImage, ...]:
        """The images that a result was made from, each file read once.

        Raises:
            Misfit: one is missing, or another than the result was made from. ImageError: one can't be decoded.
        """
        found = []
        for index, row in enumerate(rows):
            where = f"photos[{index}].file"
            pixels = self._pixels(row["file"], where)
            if row["pixels_sha256"] != array_sha256(pixels):
                raise Misfit(where, f"in {row['file']} the image that the result was made from", "another one")
            found.append(InputImage(row["name"], pixels, row["source"], row["notes"], row["sha256"]))
        return tuple(found)

    def _pixels(self, name: Json, where: str) -> np.ndarray:
        path = self.path(name, where, ".png", "photos")
        if name not in self._photos:
            try:
                open_regular(path).close()
            except (OSError, NotAnArray) as reason:
                found = reason.strerror if isinstance(reason, OSError) else str(reason)
                raise Misfit(where, f"an image in {name}", found or "") from None
            self._photos[name] = read_image(path).pixels
            self.left -= self._photos[name].nbytes
            if self.left < 0:
                raise ConvscopeError(
                    f"the images in {str(self.root)!r} take too much ({limits.how_to_raise('weights')})",
                    code="input-too-large",
                    path=str(self.root),
                    limit="weights",
                )
        return self._photos[name]


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def check(holds: bool, where: str, expected: str, found: object) -> None:
    """Two entries have to fit each other.

    Raises:
        Misfit: they do not.
    """
    if not holds:
        raise Misfit(where, expected, str(found))


def check_shape(array: np.ndarray, shape: tuple[int, ...], where: str) -> None:
    """Check that a loaded array has the shape that the JSON declares.

    Raises:
        Misfit: it has another.
    """
    check(array.shape == shape, where, f"an array of the shape {shape}", array.shape)


# Common to all results.

_ANY_TEXT = schema.optional(lambda value, where: value if isinstance(value, str) else schema.text(value, where))
IMAGE = schema.entries({
    "name": schema.text,
    "source": _ANY_TEXT,  # a file's name may hold bytes that are no text
    "notes": schema.sequence(schema.text),
    "sha256": schema.optional(schema.text),
    "pixels_sha256": schema.text,
    "file": schema.text,
})  # fmt: skip
