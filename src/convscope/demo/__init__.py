"""`convscope demo`: a small network and a few images that convscope ships, through all three techniques.

The network was trained by the project (`training/README.md`); the images are CC0 (`photos/README.md` beside this
file). Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from convscope import store
from convscope.events import Progress
from convscope.files import safe_name
from convscope.networks import Network
from convscope.reports import Choices, Study, study, write
from convscope.results import Result
from convscope.schema import Json

__all__ = ["CLASSES", "FIGURES", "MODEL", "PHOTOS", "run"]

_HERE = Path(__file__).parent

MODEL = _HERE / "model.keras"
PHOTOS = tuple(_HERE / "photos" / f"{name}.jpg" for name in ("cat", "coffee", "photographer", "retina", "mosaic"))
FIGURES: dict[str, Json] = json.loads((_HERE / "model.json").read_text(encoding="utf-8"))  # as training measured them
CLASSES: tuple[str, ...] = tuple(FIGURES["classes"])

TITLE = "Inside a small network"


def run(
    network: Network,
    out: str | PathLike,
    *,
    images: Sequence[str | PathLike] = PHOTOS,
    channels: int = 16,
    seed: int = 0,
    progress: Progress = None,
) -> dict[str, Json]:
    """Run all three techniques on the demo's images: renderings and numbers in folders, and a report of them all.

    Args:
        network: `MODEL`, opened with `CLASSES`.
        out: folder for `activations/`, `heatmap/`, `filters/LAYER/` and `report.html`.
        images: the images that the techniques are run on.
        channels: filters of each layer.
        seed: random seed of the start images of filters.
        progress: called with each event (`convscope.events`).

    Returns:
        the report's numbers, `figures` (the network's accuracy on held-out patches), `provenance`, and `files`, named
        from `out`.

    Raises:
        ConvscopeError: a file can't be written.

    Example:
        >>> data = convscope.demo.run(network, "demo", channels=2)                     # doctest: +SKIP
        >>> data["files"][0]                                                           # doctest: +SKIP
        'report.html'
    """
    found = study(network, list(images), Choices(channels=channels, seed=seed), progress)
    files = _save(found, Path(out), progress)
    data = write(found, Path(out) / "report.html", TITLE, about())
    return {**data, "figures": FIGURES, "files": ["report.html", *files]}


def _save(found: Study, out: Path, progress: Progress) -> list[str]:
    """Write each result into a folder of its own; returns the files, named from `out`."""
    written = store.save(found.activations, out / "activations", raw=False, progress=progress)
    files = [f"activations/{name}" for name in written]
    results: list[tuple[str, Result]] = [("heatmap", result) for result in found.heatmaps[:1]]
    results += [(f"filters/{safe_name(result.layer.path)}", result) for result in found.filters if result.layer]
    for folder, result in results:
        files += [f"{folder}/{name}" for name in store.save(result, out / folder)]
    return files


def about() -> list[str]:
    """The description and the accuracy of the network, with the figures of `model.json`."""
    accuracy, mosaics = FIGURES["accuracy"], FIGURES["mosaics"]
    shares = {
        f"{which}_{kind}": _percent(accuracy[kind][which])
        for kind in ("colour", "grey", "other_light")
        for which in ("network", "baseline")
    }
    return [
        paragraph.format(
            **shares,
            classes=", ".join(CLASSES),
            count=len(CLASSES),
            parameters=FIGURES["parameters"],
            patches=FIGURES["held_out"]["patches"],
            chance=_percent(accuracy["chance"]),
            mosaics=mosaics["mosaics"],
            mass=_percent(mosaics["heatmap"]["share"]["mean"]),
            by_chance=_percent(mosaics["chance"]),
            top_mass=_percent(mosaics["heatmap_top_class"]["share"]["mean"]),
            edges=_percent(mosaics["edges_top_class"]["share"]["mean"]),
        )
        for paragraph in _ABOUT
    ]


_ABOUT = (
    "This network classifies small pieces of {count} images: {classes}. It has {parameters:,} parameters and comes "
    "with convscope, which trained it from scratch on pieces of the same images. So it recognizes these images, and "
    "not cats or coffee in general.",
    "On {patches:,} pieces from a part of each image that was not used in training, its accuracy is {network_colour}; "
    "a classifier that uses only the mean and spread of the colours has {baseline_colour}, and chance is {chance}. "
    "Without colour the accuracy is {network_grey} against {baseline_grey}, in other light {network_other_light} "
    "against {baseline_other_light}: the network has learned texture, not colour alone.",
    "On {mosaics} mosaics of four such pieces, {mass} of a heatmap's mass lies on the piece of the explained class, "
    "against {by_chance} by chance; for the class that the network finds most probable it is {top_mass}, where a map "
    "of edges has {edges}.",
    "Images (CC0): cat by Stefan van der Walt, coffee by Rachel Michetti, photographer by Lav Varshney, retina "
    "by Mikael Häggström; the mosaic is made of cat, coffee and two textures (CC0Textures).",
)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
