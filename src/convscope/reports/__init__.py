"""One self-contained HTML page about a network and some images, made of the three techniques' results.

`report` is `study` (run the techniques) and then `write` (draw the page). All content of the page comes from
the results, and its JSON has the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from convscope.errors import UsageError
from convscope.events import Progress
from convscope.images.source import Images
from convscope.networks import Network, open_model
from convscope.reports.page import write
from convscope.reports.studies import Choices, Study, study
from convscope.schema import Json
from convscope.techniques.heatmaps import as_targets, is_target, names_one_class

__all__ = ["Choices", "Study", "report", "study", "write"]


def report(
    network: Network | object,
    images: Images,
    path: str | PathLike,
    *,
    target: int | str | Sequence[int | str] = "top",
    layers: str | Sequence[str] | None = None,
    filter_layers: Sequence[str] = (),
    heatmap_layer: str = "auto",
    channels: int = 16,
    check: bool = False,
    seed: int = 0,
    title: str | None = None,
    progress: Progress = None,
) -> dict[str, Json]:
    """Write one HTML page about a network: its layers, predictions, heatmaps, activations and filters.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        path: of the page; it needs no other file and no connection.
        target, layers, filter_layers, heatmap_layer, channels, check, seed: see `Choices`.
        title: of the page.
        progress: called with each event (`convscope.events`).

    Returns:
        the numbers that the page shows, `provenance`, and `files`: the page.

    Raises:
        UsageError: no such class or layer; ImageError, ModelError; ConvscopeError: the page can't be written.

    Example:
        >>> data = convscope.report(network, PHOTOS[0], "report.html", channels=2)      # doctest: +SKIP
        >>> data["files"]                                                              # doctest: +SKIP
        ['report.html']
    """
    network = open_model(network)
    if is_target(target) or not all(names_one_class(network, one) for one in as_targets(target)):
        raise UsageError(
            f"a report explains classes, by number or name, or top; found {target!r}. A heatmap explains it.",
            code="not-a-class",
            target=str(target),
        )
    choices = Choices(target, layers, tuple(filter_layers), heatmap_layer, channels, check, seed)
    return write(study(network, images, choices, progress), path, title)
