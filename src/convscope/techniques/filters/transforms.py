"""What is done to a picture before each step, so that it excites its filter also when it is moved a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscope.techniques.filters.canvas import generator

Tensor = Any


@dataclass(frozen=True)
class Affine:
    """Shift, scale and rotation in one resampling, with mid-grey around the picture.

    Drawn in NumPy for each (seed, channel, step), so on each backend alike and whatever shares the batch.

    Attributes:
        shift: largest shift along each axis, as a share of the shorter side.
        scale: smallest and largest factor.
        rotation: largest angle in degrees.
    """

    shift: float
    scale: tuple[float, float]
    rotation: float
    views: int = 1

    def draw(self, key: Sequence[int], step: int, steps: int, size: tuple[int, int]) -> np.ndarray:
        """For each channel the matrix `(n, 8)` float32 that leads from places of the result to places of the picture.

        Rows are (a0, a1, a2, b0, b1, b2, 0, 0): the result at (x, y) is the picture at
        (a0 x + a1 y + a2, b0 x + b1 y + b2), in pixels.
        """
        return self._matrix(generator(*key, step), size)[None]

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

    def apply(self, pictures: Tensor, matrices: Tensor, middle: np.ndarray, half: Any, ops: Any) -> Tensor:
        """Pictures `(n, h, w, c)` resampled bilinearly by `matrices` `(n, 8)`; `middle` `(c,)` is mid-grey.

        By gathering four neighbours, whose gradient is exact on every backend; TensorFlow's own image transformation
        has an approximate one.
        """
        matrices = matrices[:, 0]
        grey = ops.convert_to_tensor(middle.astype(np.float32))
        count, height, width, channels = pictures.shape
        y, x = (axis.reshape(1, -1).astype(np.float32) for axis in np.mgrid[:height, :width])
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        a0, a1, a2, b0, b1, b2 = (matrices[:, index : index + 1] for index in range(6))
        across, down = a0 * x + a1 * y + a2, b0 * x + b1 * y + b2  # (n, h * w)
        left, top = ops.floor(across), ops.floor(down)
        # Each picture's pixels are rows of one long table.
        rows = ops.reshape(pictures - grey, (count * height * width, channels))
        first = ops.convert_to_tensor((np.arange(count) * height * width).reshape(-1, 1).astype(np.int32))
        total: Any = 0.0
        for column, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
            at_x, at_y = left + column, top + row
            weight = _nearness(across, at_x, width, ops) * _nearness(down, at_y, height, ops)
            inside = ops.clip(at_y, 0, height - 1) * width + ops.clip(at_x, 0, width - 1)
            found = ops.take(rows, first + ops.cast(inside, "int32"), axis=0)  # (n, h * w, c)
            total = total + found * ops.reshape(weight, (count, height * width, 1))
        return grey + ops.reshape(total, (count, height, width, channels))


def _nearness(place: Tensor, cell: Tensor, side: int, ops: Any) -> Tensor:
    """Bilinear weight of a cell for a place, zero where the cell lies outside of the picture."""
    outside = ops.cast(ops.less(cell, 0.0), "float32") + ops.cast(ops.less(side - 1.0, cell), "float32")
    return (1 - ops.maximum(place - cell, cell - place)) * (1 - outside)
