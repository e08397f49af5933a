"""Views of heatmaps: over the image, a panel for each, a comparison of several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from convscope.errors import UsageError, nearest
from convscope.files import safe_name
from convscope.render.grid import Label, at_most, labelled_grid
from convscope.render.overlay import Paint, overlay, scaled_map
from convscope.render.plots import Axes, axes, entitle
from convscope.render.text import beside, colour_bar, page
from convscope.results import Heatmap


def overlaid(result: Heatmap, index: int = 0, paint: Paint | float = 0.7) -> np.ndarray:
    """A heatmap over its image, at the image's own size: (h, w, 3) uint8. `paint`: the style, or the opacity."""
    return overlay(result.images[index].pixels, result.maps[index], paint)


def scaled(result: Heatmap, index: int = 0, compat: str = "convscope") -> np.ndarray:
    """A map at the network's input size (h, w) float32, scaled as another tool would: see `scaled_map`."""
    if result.origin.input_size is None:
        raise UsageError(
            "the size of the network's input is not known, so a map can't be scaled to it.", code="size-unknown"
        )
    return scaled_map(result.maps[index], *result.origin.input_size, compat)


def panel(result: Heatmap, index: int = 0, paint: Paint | float = 0.7) -> np.ndarray:
    """Image, overlay, colour bar and prediction side by side: (H, W, 3) uint8."""
    row, image = result.rows[index], at_most(result.images[index].pixels, 480)
    paint = paint if isinstance(paint, Paint) else Paint(paint)
    drawn = overlay(image, result.maps[index], paint)
    peak = paint.highest(result.maps[index])
    bar = colour_bar(len(image), f"{-peak:.3g}" if paint.signed else "0", f"{peak:.3g}", paint.map)
    best = ", ".join(prediction.text for prediction in row.predictions[:3])
    what = f"{row.image}: regions that support {row.explained}"
    about = [f"prediction: {best}"] if best else []
    about.append(row.reason or (f"{row.method} at {row.layer}" if row.layer else row.method))
    lines = [" · ".join(about), row.note]
    if row.check is not None:
        lines.append(f"check: {row.check.badge} · {row.check.reason}")
    return page(beside([image, drawn, bar]), what, *filter(None, lines))


def comparison(
    result: Heatmap, image: str | None = None, paint: Paint | float = 0.7, shared: bool = False
) -> np.ndarray:
    """The maps of one image side by side, each with its method or class: (H, W, 3) uint8.

    Args:
        image: its name; the first where None.
        paint: how, or the opacity alone.
        shared: one scale for all, as for classes of one method; else each has its own, up to its own highest value,
            since methods have no common unit.

    Raises:
        UsageError: no map belongs to an image of that name.
    """
    name = image or result.rows[0].image
    places = [index for index, row in enumerate(result.rows) if row.image == name]
    if not places:
        raise UsageError(
            f"no map of an image {name!r}; {nearest(name, [row.image for row in result.rows])}",
            code="no-such-image",
            image=name,
        )
    paint = paint if isinstance(paint, Paint) else Paint(paint)
    if shared:
        paint = replace(paint, peak=max(paint.highest(result.maps[index]) for index in places) or None)
    pixels = at_most(result.images[places[0]].pixels, 240)
    tiles = [pixels] + [overlay(pixels, result.maps[index], paint) for index in places]
    labels = [Label(name, "")] + [_compared(result, index) for index in places]
    rows = [result.rows[index] for index in places]
    body = labelled_grid(tiles, labels, min(len(tiles), 5))
    title = f"Regions that support {', '.join(dict.fromkeys(row.explained for row in rows))}"
    best = ", ".join(prediction.text for prediction in rows[0].predictions[:3])
    where = ", ".join(dict.fromkeys(row.layer for row in rows if row.layer))
    lines = [f"prediction: {best}" if best else "", f"at {where}" if where else ""]
    if shared and paint.peak:
        lines.append(f"one scale, up to {paint.peak:.3g}")
    return page(body, title, " · ".join(filter(None, lines)))


def _compared(result: Heatmap, index: int) -> Label:
    row = result.rows[index]
    others = [other for other in result.rows if other.image == row.image]
    one_method = len({other.method for other in others}) == 1
    name = row.text if one_method else row.method
    flags = (row.explained,) if not one_method and len({other.explained for other in others}) > 1 else ()
    badge = row.check.badge if row.check else ""
    return Label(name, badge, flags + (() if row.status == "ok" else (row.status,)))


def renderings(result: Heatmap) -> Iterator[tuple[str, np.ndarray]]:
    """A panel for each map."""
    for index, stem in enumerate(stems(result)):
        yield stem, panel(result, index)


def stems(result: Heatmap) -> list[str]:
    """The name of each map's files: the image's, with its method and class where an image has several."""
    methods = len({row.method for row in result.rows}) > 1
    found = []
    for row in result.rows:
        classes = {other.explained for other in result.rows if other.image == row.image}
        parts = [row.image, *([row.explained] if len(classes) > 1 else []), *([row.method] if methods else [])]
        found.append(safe_name(".".join(safe_name(part) for part in parts)))
    return found


def plot(result: Heatmap, ax: Axes | None = None, index: int = 0, paint: Paint | float = 0.7) -> Axes:
    """The overlay with its class as title; returns the matplotlib axes."""
    ax = ax or axes(5, 5)
    ax.imshow(overlaid(result, index, paint))
    entitle(ax, result.rows[index].text)
    ax.set_axis_off()
    return ax
