"""What each layer makes of a picture: every chosen layer in one pass, or in groups under a limit of memory."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from convscope.errors import ConvscopeError, UsageError
from convscope.events import Advanced, ItemFinished, Progress, Started, tell
from convscope.images.decode import InputImage, read_images
from convscope.networks import Layer, Network, open_model
from convscope.results import ActivationParameters, Activations, LayerStatistics, origin

BYTES = 4  # float32
MOST_PICTURES = 16  # in one pass
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def activations(
    network: Network | Any,
    images: Any,
    layers: str | Sequence[str] | None = None,
    *,
    memory: int | str = "2GB",
    scratch: str | PathLike | None = None,
    progress: Progress = None,
) -> Activations:
    """What every chosen layer makes of every picture.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        layers: kinds ("conv|pool", the default), globs of paths, places (":8"); see `Network.select`.
        memory: bytes, or text such as "500MB", that the recorded arrays may take; beyond it the layers run in
            groups, each written to disk before the next, and the arrays of the result are memory-mapped.
        scratch: folder for those files; the system's folder for temporary files where None.
        progress: called with each event (`convscope.events`).

    Returns:
        the raw arrays `(n, h, w, c)` with the share of zeros and the number of empty channels of each layer.

    Raises:
        UsageError: no such layer; ImageError: a picture can't be read; ModelError: the model can't be run.
    """
    network = open_model(network)
    photos = tuple(read_images(images))
    chosen = network.select(layers)
    plan = _plan(chosen, len(photos), memory_bytes(memory))
    x = network.prepare(photos)
    keep = _Keep(chosen, len(photos), tempfile.TemporaryDirectory(dir=_folder(scratch)) if plan.to_disk else None)
    rows: dict[tuple[int, str], LayerStatistics] = {}
    passes = list(plan.passes())
    for done, (group, start, stop) in enumerate(passes):
        begun = Advanced if done else Started
        tell(progress, begun(done, len(passes), f"{group[0].path} … {group[-1].path}"))
        arrays, sizes, shares = _look(network, group, x[start:stop], plan.at_once)
        for layer in group:
            keep.put(layer, start, arrays[layer.path])
            for index, photo in enumerate(photos[start:stop]):
                row = _row(photo, layer, sizes[layer.path][index], shares, index)
                rows[start + index, layer.path] = row
                tell(progress, ItemFinished(done, len(passes), photo.name, item=row))
        keep.flush()
    keep.close()
    tell(progress, Advanced(len(passes), len(passes), "done"))
    return Activations(
        origin(network, "activations", photos),
        ActivationParameters(tuple(layer.path for layer in chosen), memory),
        photos=photos,
        layers=tuple(chosen),
        arrays=keep.arrays,
        statistics=tuple(rows[index, layer.path] for index in range(len(photos)) for layer in chosen),
        scratch=keep.folder,
    )


def memory_bytes(memory: int | str) -> int:
    """A limit of memory in bytes: a number, or text such as "500MB" or "2GiB".

    Raises:
        UsageError: it is not one of these, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(memory).lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise UsageError(f'memory {memory!r} is not understood; expected bytes, or text such as "500MB" or "2GiB".')
    return size


@dataclass(frozen=True)
class _Plan:
    """Which layers run together, on how many pictures at a time, and whether the arrays go to disk."""

    groups: tuple[tuple[Layer, ...], ...]
    pictures: int
    at_once: int
    to_disk: bool

    def passes(self) -> Iterator[tuple[tuple[Layer, ...], int, int]]:
        """Each pass: its layers and its range of pictures."""
        for group in self.groups:
            for start in range(0, self.pictures, self.at_once):
                yield group, start, min(start + self.at_once, self.pictures)


def _plan(layers: Sequence[Layer], pictures: int, limit: int) -> _Plan:
    """Fewest passes under `limit` bytes; a layer that alone exceeds it runs alone, a picture at a time."""
    sizes = [BYTES * int(np.prod(layer.shape)) for layer in layers]
    if sum(sizes) * pictures <= limit:
        return _Plan((tuple(layers),), pictures, min(pictures, MOST_PICTURES), to_disk=False)
    at_once = int(np.clip(limit // max(sizes), 1, min(pictures, MOST_PICTURES)))
    groups: list[list[Layer]] = []
    used = limit
    for layer, size in zip(layers, sizes, strict=True):
        if not groups or used + size * at_once > limit:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size * at_once
    return _Plan(tuple(map(tuple, groups)), pictures, at_once, to_disk=True)


class _Keep:
    """Arrays for all pictures, in memory or as memory-mapped files."""

    def __init__(self, layers: Sequence[Layer], pictures: int, folder: tempfile.TemporaryDirectory | None) -> None:
        self.folder = folder
        self._pictures = pictures
        self._number = {layer.path: number for number, layer in enumerate(layers)}
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, layer: Layer, start: int, array: np.ndarray) -> None:
        """Take the values of some pictures, from number `start` on."""
        if self.folder is None and len(array) == self._pictures:
            self.arrays[layer.path] = np.ascontiguousarray(array)  # of a single pass: no copy of what may be large
            return
        if layer.path not in self.arrays:
            self.arrays[layer.path] = self._new(layer, array)
        self.arrays[layer.path][start : start + len(array)] = array

    def flush(self) -> None:
        """Write what is mapped."""
        for array in self.arrays.values():
            if isinstance(array, np.memmap):
                array.flush()

    def close(self) -> None:
        """Open what is mapped anew, for reading only."""
        for path, array in self.arrays.items():
            if isinstance(array, np.memmap):
                self.arrays[path] = np.load(str(array.filename), mmap_mode="r")

    def _new(self, layer: Layer, array: np.ndarray) -> np.ndarray:
        shape = (self._pictures, *array.shape[1:])
        if self.folder is None:
            return np.empty(shape, np.float32)
        path = Path(self.folder.name) / f"{self._number[layer.path]}.npy"
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        _reserve(path)
        return mapped


def _reserve(path: Path) -> None:
    """Take the room on the disk now: a process that writes to a mapped file when the disk is full is killed.

    Raises:
        ConvscopeError: there is not enough.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConvscopeError(
                f"the arrays don't fit on the disk of {str(path.parent)!r} ({error.strerror}): free some space, or "
                "choose another folder with scratch=, fewer layers, or fewer pictures."
            ) from error


def _folder(scratch: str | PathLike | None) -> str | None:
    if scratch is None:
        return None
    Path(scratch).mkdir(parents=True, exist_ok=True)
    return str(scratch)


def _look(
    network: Network, group: tuple[Layer, ...], x: np.ndarray, at_once: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays of a group of layers, mean and largest value `(n, 2)` of each, and, for each place where zeros count,
    the share of each channel that is none `(n, c)`.

    A last chunk of fewer than `at_once` pictures is filled up: one shape, one compile.
    """
    paths = tuple(layer.path for layer in group)
    rectified = tuple(sorted({layer.rectified for layer in group if layer.rectified}))
    program = network.program(("activations", paths), lambda: network.compile(_recording(network, paths, rectified)))
    arrays, sizes, alive = program(network.tensor(x if len(x) == at_once else np.resize(x, (at_once, *x.shape[1:]))))
    return (
        {path: network.numpy(array)[: len(x)] for path, array in arrays.items()},
        {path: np.stack([network.numpy(size) for size in of], axis=-1)[: len(x)] for path, of in sizes.items()},
        {path: network.numpy(share)[: len(x)] for path, share in alive.items()},
    )


def _recording(network: Network, paths: tuple[str, ...], rectified: tuple[str, ...]) -> Callable:
    ops = network.ops

    def alive(activation: Any) -> Any:
        places = tuple(range(1, len(activation.shape) - 1))
        counted = network.count_nonzero(activation, places) if places else ops.cast(activation != 0, "float32")
        return counted / int(np.prod(activation.shape[1:-1]))

    def size(activation: Any) -> tuple[Any, Any]:
        every = tuple(range(1, len(activation.shape)))
        return ops.mean(activation, axis=every), ops.max(activation, axis=every)

    def kept(path: str) -> Callable:
        # Counted where they pass by: to keep what a convolution's ReLU made would take the memory of another layer.
        return lambda activation: {
            "activation": activation if path in paths else None,
            "size": size(activation) if path in paths else None,
            "alive": alive(activation) if path in rectified else None,
        }

    def record(run: Callable, x: Any) -> tuple[dict, dict, dict]:
        # The head stays as it is: these are the layers' own values, probabilities included.
        keep = {path: kept(path) for path in {*paths, *rectified}}
        seen = run(x, record=keep, outputs=False, undone=False).activations
        return (
            {path: seen[path]["activation"] for path in paths},
            {path: seen[path]["size"] for path in paths},
            {path: seen[path]["alive"] for path in rectified},
        )

    return record


def _row(
    photo: InputImage, layer: Layer, size: np.ndarray, shares: dict[str, np.ndarray], index: int
) -> LayerStatistics:
    alive = shares[layer.rectified][index] if layer.rectified else None
    return LayerStatistics(
        image=photo.name,
        layer=layer.path,
        kind=layer.kind,
        shape=layer.shape,
        mean=float(size[0]),
        max=float(size[1]),
        zeros=None if alive is None else float(1 - alive.mean(dtype=np.float64)),
        empty_channels=None if alive is None else int((alive == 0).sum()),
        counted_at=layer.rectified,
    )
