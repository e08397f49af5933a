"""A folder that results are written to, each file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convscope.files import dump, safe_name, write_file
from convscope.images.image import InputImage
from convscope.render.encode import encode_png
from convscope.results.base import identified
from convscope.schema import Json

SCHEMA = 2  # of the manifests that are written and read; development versions wrote schema 1
NEEDS = "0.1.0"  # the first version of convscope that reads this schema


class Folder:
    """A folder that results are written to; within a run nothing in it is overwritten.

    Each file is written whole or not at all, and the JSON that names the others comes last. The JSON of an earlier
    result is removed before the first of its files is replaced: it would name files of two results.

    Args:
        path: made when the first file is written.

    Example:
        >>> folder = Folder("notes")
        >>> folder.write("note.txt", "one"), folder.write("note.txt", "two")
        ('note.txt', 'note-2.txt')
    """

    def __init__(self, path: str | PathLike) -> None:
        self.path = Path(path)
        self.files: list[str] = []
        self._taken: set[str] = set()
        self._outdated: list[Path] = []

    def begin(self, name: str) -> int:
        """A result begins, whose JSON will be called `name`; returns how many files there are before it."""
        self._outdated = [self.path / self._next(name)]
        return len(self.files)

    def write(self, name: str, data: bytes | str) -> str:
        """Write `data` under the relative name `name`, with a suffix if it is taken; returns the name used."""
        return self._write(name, data)

    def image(self, name: str, pixels: np.ndarray) -> str:
        """Write a rendering (h, w, 3) uint8 as PNG."""
        return self.write(name, encode_png(pixels))

    def array(self, name: str, array: np.ndarray) -> str:
        """Write an array as NumPy's `.npy`."""
        # Straight to the disk: an array that is memory-mapped need not fit into memory.
        return self._write(name, lambda file: write_array(file, np.asarray(array)))

    def json(self, name: str, report: Mapping[str, object], since: int = 0) -> list[str]:
        """Write the manifest of a result: `report`, the schema's version, and the files written since there were
        `since` of them, itself included; returns these.
        """
        free = self._free(name)
        self.files.append(free)
        write_file(self.path / free, dump({"schema": SCHEMA, "needs": NEEDS, **report, "files": self.files[since:]}))
        self._outdated = []
        return self.files[since:]

    def _write(self, name: str, data: bytes | str | Callable[[BinaryIO], object]) -> str:
        free = self._free(name)
        write_file(self.path / free, data, self._before(self.path / free))
        self.files.append(free)
        return free

    def _before(self, path: Path) -> Callable[[], None]:
        def before() -> None:
            if os.path.exists(path):
                while self._outdated:
                    self._outdated.pop().unlink(missing_ok=True)

        return before

    def _free(self, name: str) -> str:
        free = self._next(name)
        self._taken.add(free.casefold())
        return free

    def _next(self, name: str) -> str:
        folder, _, file = name.rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        free, again = name, 1
        # File systems that fold case would let "A.png" overwrite "a.png".
        while free.casefold() in self._taken:
            again += 1
            free = f"{folder}{'/' if folder else ''}{stem}-{again}{dot}{suffix}"
        return free


class _Sink:
    """A file that NumPy does not recognize, and so writes in pieces with `write`, whose error has the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array in NumPy's format.

    Raises:
        OSError: the disk refuses it; `errno` has the reason.
    """
    np.lib.format.write_array(_Sink(file), array, allow_pickle=False)


def save_images(folder: Folder, images: Sequence[InputImage]) -> list[dict[str, Json]]:
    """Write the images that a result was made from; returns an entry of the manifest for each."""
    files: dict[tuple[str, int], str] = {}  # an image that is there several times is written once
    for image in images:
        if (image.name, id(image.pixels)) not in files:
            name = f"photos/{safe_name(image.name)}.png"
            files[image.name, id(image.pixels)] = folder.image(name, image.pixels)
    return [{**identified(image), "file": files[image.name, id(image.pixels)]} for image in images]


def as_folder(directory: str | PathLike | Folder) -> Folder:
    """A folder that results of one run go to; a path is one for this result alone."""
    return directory if isinstance(directory, Folder) else Folder(directory)
