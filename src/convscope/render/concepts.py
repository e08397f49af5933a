"""Views of concepts: a panel for each image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convscope.files import safe_name
from convscope.render.grid import at_most
from convscope.render.overlay import regions
from convscope.render.text import beside, legend, page
from convscope.results import Concepts


def panel(result: Concepts, index: int = 0, opacity: float = 0.75) -> np.ndarray:
    """An image, and its regions in the concepts' colours: (H, W, 3) uint8."""
    image = at_most(result.images[index].pixels, 360)
    drawn = regions(image, result.values[index], result.values.max(axis=(0, 1, 2)), opacity)
    names = legend([row.text for row in result.rows], len(image))
    title, where = result.images[index].name, f"regions of {result.parameters.layer}"
    return page(beside([image, drawn, names]), title, where)


def renderings(result: Concepts) -> Iterator[tuple[str, np.ndarray]]:
    """A panel for each image."""
    for index, image in enumerate(result.images):
        yield safe_name(image.name), panel(result, index)
