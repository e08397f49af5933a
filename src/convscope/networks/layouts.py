"""How a layer's output is laid out: the one place where it becomes a map `(n, h, w, c)`, and a map goes back into it.

A map has its channels last, or first; or it lies in the tokens of a transformer, `(n, tokens, c)`, which are the cells
of a grid, with class or register tokens beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from convscope.networks.foreign import Tensor

if TYPE_CHECKING:
    from convscope.networks.ops import Operations


@dataclass(frozen=True)
class Tokens:
    """The layout of an output `(n, tokens, c)` whose tokens are the cells of a grid, perhaps with others beside them.

    Attributes:
        grid: `(h, w)`.
        count: number of tokens, of the grid and others.
        places: the token of each cell, row by row.
        images_second: the output is `(tokens, n, c)`.

    Example:
        >>> tokens = Tokens((2, 2), 6, (1, 2, 3, 4))
        >>> tokens.front, tokens.behind, tokens.others
        (1, 1, 2)
    """

    grid: tuple[int, int]
    count: int
    places: tuple[int, ...] = field(repr=False)
    images_second: bool = False

    @property
    def front(self) -> int:
        """Number of tokens before the first of the grid, such as a class token."""
        return min(self.places, default=0)

    @property
    def behind(self) -> int:
        """Number of tokens after the last of the grid."""
        return self.count - 1 - max(self.places, default=-1)

    @property
    def others(self) -> int:
        """Number of tokens that are no cells of the grid."""
        return self.count - len(self.places)


@dataclass(frozen=True)
class Layout:
    """The layout of a layer's output.

    Attributes:
        channels_first: an output of four axes is `(n, c, h, w)`.
        tokens: the grid of an output `(n, tokens, c)`; None where it has none.

    Example:
        >>> Layout(tokens=Tokens((2, 2), 5, (1, 2, 3, 4))).shape_of((5, 8))
        (2, 2, 8)
        >>> Layout(channels_first=True).shape_of((8, 2, 2))
        (2, 2, 8)
    """

    channels_first: bool = False
    tokens: Tokens | None = None

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape for one image, channels last, of an output whose own is `shape`."""
        if self.tokens is not None:
            return (*self.tokens.grid, shape[-1])
        return (*shape[1:], shape[0]) if self.channels_first and len(shape) == 3 else shape

    def map_of(self, ops: Operations, output: Tensor) -> Tensor:
        """An output as a map `(n, h, w, c)`, or as it is where it has no map; float32.

        Args:
            ops: the operations of the runtime.
            output: `(n, h, w, c)`, `(n, c, h, w)`, `(n, tokens, c)` or `(tokens, n, c)`, or of another shape.
        """
        if self.tokens is not None:
            cells = ops.take(self._images_first(ops, output), np.array(self.tokens.places), axis=1)
            output = ops.reshape(cells, (-1, *self.tokens.grid, output.shape[-1]))
        elif self._turns(output):
            output = ops.transpose(output, (0, 2, 3, 1))
        return ops.cast(output, "float32")

    def output_of(self, ops: Operations, found: Tensor, output: Tensor) -> Tensor:
        """An output with the map `found` `(n, h, w, c)` in place of its own; tokens beside the grid stay as they are.

        Args:
            ops: the operations of the runtime.
            found: `(n, h, w, c)` float32; it may have more rows than an `output` of one image.
            output: as for `map_of`.
        """
        if self.tokens is not None:
            output = self._images_first(ops, ops.cast(output, "float32"))
            return self._images_first(ops, _in_tokens(ops, self.tokens, found, output))
        return ops.transpose(found, (0, 3, 1, 2)) if self._turns(found) else found

    def by_image(self, shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape of an output with the images as its first axis."""
        second = self.tokens is not None and self.tokens.images_second
        return (shape[1], shape[0], *shape[2:]) if second else shape

    def _images_first(self, ops: Operations, output: Tensor) -> Tensor:
        """An output `(tokens, n, c)` with its first axes exchanged, which also puts it back."""
        second = self.tokens is not None and self.tokens.images_second
        return ops.transpose(output, (1, 0, 2)) if second else output

    def _turns(self, output: Tensor) -> bool:
        return self.channels_first and len(output.shape) == 4


def _in_tokens(ops: Operations, tokens: Tokens, found: Tensor, output: Tensor) -> Tensor:
    rows, channels = found.shape[0], output.shape[-1]
    cells = ops.reshape(found, (-1, len(tokens.places), channels))
    if not tokens.others:
        return ops.take(cells, np.array(_inverse(tokens.places)), axis=1)
    if output.shape[0] == 1 and rows is not None and rows != 1:
        output = ops.broadcast_to(output, (rows, tokens.count, channels))
    sources = np.arange(tokens.count)
    sources[list(tokens.places)] = tokens.count + np.arange(len(tokens.places))
    return ops.take(ops.concatenate([output, cells], axis=1), sources, axis=1)


def _inverse(places: Sequence[int]) -> list[int]:
    return [int(cell) for cell in np.argsort(places)]
