"""Plots with matplotlib, which is imported when the first is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

Axes = Any  # of Matplotlib


def axes(width: float, height: float) -> Axes:
    """New axes of a figure of pyplot, its sides in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def entitle(ax: Axes, text: str) -> None:
    """Write a title above a plot."""
    # A name may hold dollar signs, between which matplotlib would read formulas.
    ax.set_title(text, fontsize=11, parse_math=False)


def png(draw: Callable[[Axes], object], width: float, height: float) -> bytes:
    """A plot as PNG, without pyplot's global state or a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    buffer = io.BytesIO()
    # Without these the file would hold the version and so differ between machines.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # boxes in a title are clear enough
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
