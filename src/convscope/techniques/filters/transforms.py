"""Transforms of an image before each step, so that it excites its filter also when it is moved a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from convscope.networks.foreign import Tensor
from convscope.networks.ops import Operations
from convscope.techniques.filters.parameterizations import generator


class Transforms(Protocol):
    """Views of an image. Drawn in NumPy for each (seed, channel, step): alike on each backend and in any batch.

    Example:
        >>> from dataclasses import dataclass, replace
        >>> from convscope.techniques.filters import RECIPES
        >>> @dataclass(frozen=True)
        ... class Mirrored:
        ...     views: int = 2
        ...     def draw(self, key, step, steps, size):
        ...         return np.zeros((self.views, 8), np.float32)
        ...     def apply(self, images, draws, middle, half, ops):
        ...         both = ops.stack([images, ops.flip(images, axis=2)], axis=1)
        ...         return ops.reshape(both, (-1, *images.shape[1:]))
        >>> recipe = replace(RECIPES["fast"], name="mirrored", transforms=Mirrored())
        >>> convscope.filters(network, "block4_conv", [7], recipe=recipe, steps=2, size=32).values.shape
        (1, 32, 32, 3)
    """

    @property
    def views(self) -> int:
        """The number of views of each image."""

    def draw(self, key: Sequence[int], step: int, steps: int, size: tuple[int, int]) -> np.ndarray:
        """The numbers `(views, 8)` float32 of one image's views at one of `steps` steps.

        Rows begin with (a0, a1, a2, b0, b1, b2): the view at (x, y) is the image at (a0 x + a1 y + a2,
        b0 x + b1 y + b2), in pixels.
        """

    def apply(self, images: Tensor, draws: Tensor, middle: np.ndarray, half: np.ndarray, ops: Operations) -> Tensor:
        """The views `(n * views, h, w, c)` of images `(n, h, w, c)`, those of one image one after another.

        Args:
            images: `(n, h, w, c)`.
            draws: `(n, views, 8)`.
            middle, half: mid-grey and half the range of the network's input, `(c,)`.
            ops: the framework's operations.
        """


@dataclass(frozen=True)
class Affine:
    """Shift, scale and rotation in one resampling, with mid-grey around the image.

    Attributes:
        shift: largest shift along each axis, as a share of the shorter side.
        scale: smallest and largest factor.
        rotation: largest angle in degrees.
        views: how many of each image.

    Example:
        >>> Affine(shift=0.1, scale=(0.9, 1.1), rotation=5.0).draw((0, 7), 0, 48, (32, 32)).shape
        (1, 8)
    """

    shift: float
    scale: tuple[float, float]
    rotation: float
    views: int = 1

    def draw(self, key: Sequence[int], step: int, steps: int, size: tuple[int, int]) -> np.ndarray:
        """See `Transforms.draw`."""
        drawn = generator(*key, step)
        return np.stack([self._matrix(drawn, size) for _ in range(self.views)])

    def _matrix(self, drawn: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        height, width = size
        angle = np.deg2rad(drawn.uniform(-self.rotation, self.rotation))
        factor = 1 / drawn.uniform(*self.scale)
        down, right = drawn.uniform(-self.shift, self.shift, 2) * min(size)
        cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
        # Around the middle, which is moved.
        middle = np.array([(width - 1) / 2, (height - 1) / 2])
        turn = np.array([[cosine, -sine], [sine, cosine]])
        move = middle + np.array([right, down]) - turn @ middle
        return np.array([*turn[0], move[0], *turn[1], move[1], 0, 0], np.float32)

    def apply(self, images: Tensor, draws: Tensor, middle: np.ndarray, half: np.ndarray, ops: Operations) -> Tensor:
        """See `Transforms.apply`."""
        return resampled(images, draws, middle, ops)


@dataclass(frozen=True)
class Crops:
    """Square cut-outs, enlarged to the image's size, with noise: the views of MaCo (Fel et al. 2023, 2306.06805).

    Attributes:
        first, last: mean side of the cut-outs at the first and at the last step, as a share of the image's.
        views: how many of each image.
        spread: standard deviation of a side; jitter: of the middle's place, as shares of the image.
        noise_std: standard deviation of the noise of each value; brightness: largest shift of all values of a view.
            Both as shares of the network's range.

    Example:
        >>> Crops(first=0.9, last=0.9, views=4).draw((0, 7), 0, 48, (32, 32)).shape
        (4, 8)
    """

    first: float
    last: float
    views: int
    spread: float = 0.05
    jitter: float = 0.15
    noise_std: float = 0.08
    brightness: float = 0.04

    def draw(self, key: Sequence[int], step: int, steps: int, size: tuple[int, int]) -> np.ndarray:
        """See `Transforms.draw`; the last two numbers are the brightness and the place in the tile of noise."""
        drawn = generator(*key, step)
        share = self.first + (self.last - self.first) * step / max(1, steps - 1)
        rows = []
        for _ in range(self.views):
            side = float(np.clip(drawn.normal(share, self.spread), 0.05, 1))
            down, right = np.clip(drawn.normal(0.5, self.jitter, 2), side / 2, 1 - side / 2) - side / 2
            # Of pixels that are squares: the middle of the first lies half a pixel inside.
            top, left = (start * sides + (side - 1) / 2 for start, sides in zip((down, right), size, strict=True))
            brightness, place = drawn.uniform(-self.brightness, self.brightness), drawn.uniform()
            rows.append([side, 0, left, 0, side, top, brightness, place])
        return np.array(rows, np.float32)

    def apply(self, images: Tensor, draws: Tensor, middle: np.ndarray, half: np.ndarray, ops: Operations) -> Tensor:
        """See `Transforms.apply`."""
        views = resampled(images, draws, middle, ops)
        width = ops.convert_to_tensor((2 * half).astype(np.float32))
        last = ops.reshape(draws, (-1, 8))
        brightness = ops.reshape(last[:, 6], (-1, 1, 1, 1))
        return views + width * (brightness + self.noise_std * _noise(last[:, 7:8], tuple(views.shape[1:]), ops))


def _noise(places: Tensor, shape: tuple[int, ...], ops: Operations) -> Tensor:
    """Normal noise `(n, h, w, c)`: one fixed tile, which each view begins at a place of its own `(n, 1)` in 0..1."""
    height, width, channels = shape
    cells = height * width
    tile = generator(cells, channels).normal(size=(cells, channels)).astype(np.float32)
    begin = ops.cast(ops.floor(places * float(cells - 1)), "int32")
    at = begin + ops.convert_to_tensor(np.arange(cells, dtype=np.int32)[None])
    return ops.reshape(ops.take(ops.convert_to_tensor(np.concatenate([tile, tile])), at, axis=0), (-1, *shape))


def resampled(images: Tensor, draws: Tensor, middle: np.ndarray, ops: Operations) -> Tensor:
    """Images `(n, h, w, c)` resampled bilinearly by `draws` `(n, views, 8)`: `(n * views, h, w, c)`.

    By gathering four neighbours, whose gradient is exact on every backend; TensorFlow's own image transformation has an
    approximate one. Outside of an image is mid-grey, `middle` `(c,)`.
    """
    grey = ops.convert_to_tensor(middle.astype(np.float32))
    count, height, width, channels = images.shape
    views = draws.shape[1]
    across, down = _places(ops.reshape(draws, (count * views, draws.shape[2])), (height, width), ops)
    left, top = ops.floor(across), ops.floor(down)
    right, below = across - left, down - top
    # Pixels are rows of one long table, with zeros around each image so that no place lies outside.
    table = ops.reshape(ops.pad(images - grey, ((0, 0), (1, 2), (1, 2), (0, 0))), (-1, channels))
    begins = np.repeat(np.arange(count), views) * (height + 3) * (width + 3)
    first = ops.convert_to_tensor(begins.reshape(-1, 1).astype(np.int32))
    first = first + ops.cast((top + 1) * (width + 3.0) + (left + 1), "int32")  # (n * views, h * w)
    total: Tensor = 0.0
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        near = (below if row else 1 - below) * (right if column else 1 - right)
        found = ops.take(table, first + (row * (width + 3) + column), axis=0)
        total = total + found * ops.reshape(near, (count * views, height * width, 1))
    return grey + ops.reshape(total, (count * views, height, width, channels))


def _places(matrices: Tensor, size: tuple[int, int], ops: Operations) -> tuple[Tensor, Tensor]:
    """The place in the image of each pixel of a view `(n, h * w)`: across and down, at most one pixel outside."""
    y, x = (ops.convert_to_tensor(axis.reshape(1, -1).astype(np.float32)) for axis in np.mgrid[: size[0], : size[1]])
    a0, a1, a2, b0, b1, b2 = (matrices[:, index : index + 1] for index in range(6))
    across, down = a0 * x + a1 * y + a2, b0 * x + b1 * y + b2
    return ops.clip(across, -1.0, float(size[1])), ops.clip(down, -1.0, float(size[0]))
