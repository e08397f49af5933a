"""Values to pixels: one module of views for each kind of result, above colour, grid, text, overlay and encoding.

All functions take and return NumPy arrays, (h, w, 3) uint8 for renderings, and use no framework and no file. One
tile is the same pixels alone as in its sheet.

>>> import numpy as np
>>> tile(np.eye(4, dtype=np.float32), side=32)[:8]
b'\\x89PNG\\r\\n\\x1a\\n'
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import numpy as np

from convscope.render import activations, concepts, filters, heatmaps
from convscope.render.channels import channel_tile
from convscope.render.encode import encode_png, encode_webp, image_tag
from convscope.render.overlay import COMPAT, Paint
from convscope.results import Activations, Concepts, Filters, Heatmap, Result
from convscope.results.base import display_with

__all__ = ["COMPAT", "Paint", "activations", "concepts", "filters", "heatmaps", "html", "renderings", "tile"]


def tile(
    values: np.ndarray,
    scale: tuple[float, float] | None = None,
    side: int = 80,
    colours: str = "viridis",
    kind: str = "png",
) -> bytes:
    """One channel as the bytes of an image file, the same pixels as in a sheet.

    Args:
        values: (h, w), any real values.
        scale: the raw values of the two ends of the colour map; the classic scale, the channel's own, where None.
        side: approximate length of the longer side, in pixels.
        colours: a colour map of matplotlib.
        kind: "png" (lossless) or "webp".

    Raises:
        UsageError: there is no such colour map, or `values` is no map.

    Example:
        >>> found = convscope.activations(network, PHOTOS[0], "block4_conv")
        >>> tile(found.channel("block4_conv", 7), side=112, kind="webp")[:4]
        b'RIFF'
    """
    pixels = channel_tile(values, scale, side, colours)
    return encode_webp(pixels) if kind == "webp" else encode_png(pixels)


@singledispatch
def renderings(result: Result) -> Iterator[tuple[str, np.ndarray]]:
    """All renderings of a result: a relative file name without suffix, and (h, w, 3) uint8.

    A result of your own gets its views with `renderings.register`.

    Example:
        >>> found = convscope.heatmap(network, PHOTOS[0])
        >>> name, pixels = next(iter(convscope.render.renderings(found)))
        >>> pixels.dtype.name, pixels.shape[-1]
        ('uint8', 3)
    """
    raise TypeError(f"nothing draws a {type(result).__name__}; register a function with renderings.register")


@singledispatch
def html(result: Result) -> str:
    """A result as a piece of a page, for notebooks.

    Example:
        >>> html(convscope.concepts(network, PHOTOS[0], count=2))[:14]
        '<div><img src='
    """
    return f"<div>{''.join(image_tag(pixels, name) for name, pixels in renderings(result))}</div>"


renderings.register(Activations, activations.renderings)
renderings.register(Filters, filters.renderings)
renderings.register(Heatmap, heatmaps.renderings)
renderings.register(Concepts, concepts.renderings)
html.register(Activations, activations.html)
html.register(Filters, filters.html)
display_with(html)
