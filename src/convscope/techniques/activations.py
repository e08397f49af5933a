"""The output of each layer for an image: every chosen layer in one pass, or in groups under a limit of memory."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from convscope.arrays import padded
from convscope.errors import ConvscopeError, UsageError
from convscope.events import Advanced, ItemFinished, Progress, Started, tell
from convscope.images.image import InputImage
from convscope.images.source import ImageBatch, Images, ImageStream, hold, image_source, report_failures, stream
from convscope.networks import Layer, Network, Pass, Run, open_model
from convscope.networks.foreign import Tensor
from convscope.results import ActivationParameters, Activations, LayerStatistics, origin

BYTES = 4  # float32
MOST_IMAGES = 16  # in one pass
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
    network: Network | object,
    images: Images,
    layers: str | Sequence[str] | None = None,
    *,
    memory: int | str = "2GB",
    scratch: str | PathLike | None = None,
    progress: Progress = None,
) -> Activations:
    """The output of every chosen layer for every image.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several; or an `ImageSource`.
        layers: kinds ("conv|pool", the default), globs of paths, places (":8"); see `Network.select`.
        memory: bytes, or text such as "500MB", that the recorded arrays may take; beyond it the layers run in
            groups, each written to disk before the next, and the arrays of the result are memory-mapped.
        scratch: folder for those files; the system's folder for temporary files where None.
        progress: called with each event (`convscope.events`).

    Returns:
        the raw arrays `(n, h, w, c)` with the share of zeros and the number of empty channels of each layer.

    Raises:
        UsageError: no such layer, or no layers at all; ImageError: an image can't be read; ModelError: the model
            can't be run.

    Example:
        >>> found = convscope.activations(network, PHOTOS[:2], "block4_conv")
        >>> found["block4_conv"].shape
        (2, 28, 28, 96)
        >>> 0 <= found.row("block4_conv", image=1).zeros <= 1
        True
    """
    network = open_model(network)
    shown = hold(images, network.image_shape)
    chosen = _chosen(network, layers)
    plan = _plan(chosen, len(shown), memory_bytes(memory))
    keep = _Keep(chosen, len(shown), tempfile.TemporaryDirectory(dir=_folder(scratch)) if plan.to_disk else None)
    rows: dict[tuple[int, str], LayerStatistics] = {}
    total = len(plan.groups) * -(-len(shown) // plan.at_once)
    for done, one in enumerate(_passes(network, plan, [ImageBatch(0, shown)])):
        begun = Advanced if done else Started
        tell(progress, begun(done, total, f"{one.layers[0].path} … {one.layers[-1].path}"))
        for layer in one.layers:
            keep.put(layer, one.start, one.arrays[layer.path])
        for item in one.items():
            rows[item.number, item.layer.path] = item.row
            tell(progress, ItemFinished(done, total, item.image.name, item=item))
        keep.flush()
    keep.close()
    tell(progress, Advanced(total, total, "done"))
    return Activations(
        origin(network, "activations", shown),
        ActivationParameters(tuple(layer.path for layer in chosen), memory),
        images=shown,
        layers=tuple(chosen),
        arrays=keep.arrays,
        statistics=tuple(rows[index, layer.path] for index in range(len(shown)) for layer in chosen),
        scratch=keep.folder,
    )


@dataclass(frozen=True, eq=False)
class ActivationItem:
    """The output of one layer for one image.

    Attributes:
        number: of the image, from 0, among those that could be read.
        image: the image.
        layer: the layer.
        array: its output `(h, w, c)` or `(c,)` float32.
        row: its statistics.

    Example:
        >>> item = next(iter_activations(network, PHOTOS[0], "block4_conv"))
        >>> item.image.name, item.layer.path, item.array.shape
        ('cat', 'block4_conv', (28, 28, 96))
    """

    number: int
    image: InputImage
    layer: Layer
    array: np.ndarray
    row: LayerStatistics


def _chosen(network: Network, layers: str | Sequence[str] | None) -> list[Layer]:
    if not network.layers:
        raise UsageError(
            f"expected a network with layers, found none in {network.name}: it has no activations to show.",
            code="no-layers",
            name=network.name,
        )
    return network.select(layers)


def iter_activations(
    network: Network | object,
    images: Images | ImageStream,
    layers: str | Sequence[str] | None = None,
    *,
    memory: int | str = "2GB",
    batch: int = MOST_IMAGES,
) -> Iterator[ActivationItem]:
    """Each layer's output for each image as soon as it is computed, image by image in batches; none of it is kept.

    Args:
        network: an opened network, or what `open_model` takes.
        images: an image source, or what `image_source` makes one of; or an `ImageStream`, whose `failures` then name
            the images left out (otherwise a warning names them).
        layers: see `activations`.
        memory: bytes, or text such as "500MB", that the arrays of a pass may take; beyond it each batch goes through
            the network several times, for some of the layers at a time.
        batch: images at a time, where `images` is no stream.

    Raises:
        UsageError: no such layer, or no layers at all. ImageError: no image can be read. ModelError: the model can't
            be run.

    Example:
        >>> for item in iter_activations(network, convscope.image_source(PHOTOS[:2]), "block4_conv"):
        ...     print(item.image.name, item.layer.path, item.array.shape)
        cat block4_conv (28, 28, 96)
        coffee block4_conv (28, 28, 96)
    """
    network = open_model(network)
    chosen = _chosen(network, layers)
    given = isinstance(images, ImageStream)
    batches = images if isinstance(images, ImageStream) else stream(image_source(images), batch, network.image_shape)
    plan = _plan(chosen, batches.batch, memory_bytes(memory))
    return _streamed(network, plan, batches, given)


def _streamed(network: Network, plan: _Plan, batches: ImageStream, given: bool) -> Iterator[ActivationItem]:
    try:
        for one in _passes(network, plan, batches):
            yield from one.items()
    finally:
        if not given:
            batches.close()
    if not given:
        report_failures(batches)


def memory_bytes(memory: int | str) -> int:
    """A limit of memory in bytes: a number, or text such as "500MB" or "2GiB".

    Raises:
        UsageError: it is not one of these, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(memory).lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise UsageError(
            f'memory {memory!r} is not understood; expected bytes, or text such as "500MB" or "2GiB".',
            code="memory-not-understood",
            found=memory,
        )
    return size


@dataclass(frozen=True)
class _Plan:
    """Which layers run together, on how many images at a time, and whether the arrays go to disk."""

    groups: tuple[tuple[Layer, ...], ...]
    at_once: int
    to_disk: bool


def _plan(layers: Sequence[Layer], images: int, limit: int) -> _Plan:
    """Fewest passes under `limit` bytes; a layer that alone exceeds it runs alone, one image at a time."""
    sizes = [BYTES * int(np.prod(layer.shape)) for layer in layers]
    if sum(sizes) * images <= limit:
        return _Plan((tuple(layers),), min(images, MOST_IMAGES), to_disk=False)
    at_once = int(np.clip(limit // max(sizes), 1, min(images, MOST_IMAGES)))
    groups: list[list[Layer]] = []
    used = limit
    for layer, size in zip(layers, sizes, strict=True):
        if not groups or used + size * at_once > limit:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size * at_once
    return _Plan(tuple(map(tuple, groups)), at_once, to_disk=True)


@dataclass(frozen=True, eq=False)
class _Pass:
    """The result of one pass on some images: for some layers their arrays, sizes and shares (see `_look`)."""

    start: int
    images: tuple[InputImage, ...]
    layers: tuple[Layer, ...]
    arrays: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]
    shares: dict[str, np.ndarray]

    def items(self) -> Iterator[ActivationItem]:
        for index, image in enumerate(self.images):
            for layer in self.layers:
                row = _row(image, layer, self.sizes[layer.path][index], self.shares, index)
                yield ActivationItem(self.start + index, image, layer, self.arrays[layer.path][index], row)


def _passes(network: Network, plan: _Plan, batches: Iterable[ImageBatch]) -> Iterator[_Pass]:
    """Each batch through the network, `plan.at_once` images at a time, a group of layers after the other."""
    for batch in batches:
        for at in range(0, len(batch.images), plan.at_once):
            images = batch.images[at : at + plan.at_once]
            x = network.prepare(images)
            for group in plan.groups:
                yield _Pass(batch.start + at, images, group, *_look(network, group, x, plan.at_once))


class _Keep:
    """Arrays for all images, in memory or as memory-mapped files."""

    def __init__(self, layers: Sequence[Layer], images: int, folder: tempfile.TemporaryDirectory | None) -> None:
        self.folder = folder
        self._images = images
        self._number = {layer.path: number for number, layer in enumerate(layers)}
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, layer: Layer, start: int, array: np.ndarray) -> None:
        """Take the values of some images, from number `start` on."""
        if self.folder is None and len(array) == self._images:
            self.arrays[layer.path] = np.ascontiguousarray(array)  # of a single pass: no copy of large arrays
            return
        if layer.path not in self.arrays:
            self.arrays[layer.path] = self._new(layer, array)
        self.arrays[layer.path][start : start + len(array)] = array

    def flush(self) -> None:
        """Write the mapped arrays to disk."""
        for array in self.arrays.values():
            if isinstance(array, np.memmap):
                array.flush()

    def close(self) -> None:
        """Reopen the mapped arrays, read-only."""
        for path, array in self.arrays.items():
            if isinstance(array, np.memmap):
                self.arrays[path] = np.load(str(array.filename), mmap_mode="r")

    def _new(self, layer: Layer, array: np.ndarray) -> np.ndarray:
        shape = (self._images, *array.shape[1:])
        if self.folder is None:
            return np.empty(shape, np.float32)
        path = Path(self.folder.name) / f"{self._number[layer.path]}.npy"
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        _reserve(path)
        return mapped


def _reserve(path: Path) -> None:
    """Allocate the space on the disk now: a process that writes to a mapped file when the disk is full is killed.

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
                "choose another folder with scratch=, fewer layers, or fewer images.",
                code="disk-full",
                path=str(path.parent),
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

    A last chunk of fewer than `at_once` images is filled up: one shape, one compile.
    """
    paths = tuple(layer.path for layer in group)
    rectified = tuple(sorted({layer.rectified for layer in group if layer.rectified}))
    program = network.program(_recording, paths, rectified)
    arrays, sizes, alive = program(network.tensor(padded(x, at_once)))
    return (
        {path: network.numpy(array)[: len(x)] for path, array in arrays.items()},
        {path: np.stack([network.numpy(size) for size in of], axis=-1)[: len(x)] for path, of in sizes.items()},
        {path: network.numpy(share)[: len(x)] for path, share in alive.items()},
    )


def _recording(network: Network, paths: tuple[str, ...], rectified: tuple[str, ...]) -> Callable:
    ops = network.ops

    def alive(activation: Tensor) -> Tensor:
        places = tuple(range(1, len(activation.shape) - 1))
        counted = network.count_nonzero(activation, places) if places else ops.cast(activation != 0, "float32")
        return counted / int(np.prod(activation.shape[1:-1]))

    def size(activation: Tensor) -> tuple[Tensor, Tensor]:
        every = tuple(range(1, len(activation.shape)))
        return ops.mean(activation, axis=every), ops.max(activation, axis=every)

    def kept(path: str) -> Callable:
        # Counted inside the pass: to keep the output of a convolution's ReLU would take the memory of another layer.
        return lambda activation: {
            "activation": activation if path in paths else None,
            "size": size(activation) if path in paths else None,
            "alive": alive(activation) if path in rectified else None,
        }

    def record(run: Run, x: Tensor) -> tuple[dict, dict, dict]:
        # The head stays as it is: these are the layers' own values, probabilities included.
        keep = {path: kept(path) for path in {*paths, *rectified}}
        seen = run(x, Pass(record=tuple(keep), stop=True, logits=False), reductions=keep).activations
        return (
            {path: seen[path]["activation"] for path in paths},
            {path: seen[path]["size"] for path in paths},
            {path: seen[path]["alive"] for path in rectified},
        )

    return record


def _row(
    image: InputImage, layer: Layer, size: np.ndarray, shares: dict[str, np.ndarray], index: int
) -> LayerStatistics:
    alive = shares[layer.rectified][index] if layer.rectified else None
    return LayerStatistics(
        image=image.name,
        layer=layer.path,
        kind=layer.kind,
        shape=layer.shape,
        mean=float(size[0]),
        max=float(size[1]),
        zeros=None if alive is None else float(1 - alive.mean(dtype=np.float64)),
        empty_channels=None if alive is None else int((alive == 0).sum()),
        counted_at=layer.rectified,
    )
