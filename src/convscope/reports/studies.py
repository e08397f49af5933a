"""The study of a report: the results of the three techniques, before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from convscope.errors import UsageError
from convscope.events import Progress, within
from convscope.images.image import InputImage
from convscope.images.source import Images, hold
from convscope.networks import Layer, Network, Prediction, open_model
from convscope.networks.measured import Resemblance, resemblances
from convscope.networks.network import check_finite
from convscope.results import (
    Activations,
    Filters,
    Heatmap,
    HeatmapRow,
    origin,
)
from convscope.schema import Json
from convscope.techniques.activations import activations
from convscope.techniques.filters import filters, first_with_gradient
from convscope.techniques.heatmaps import as_targets, heatmap

SHEETS = 8  # of each image, where no layers are asked for
FILTER_LAYERS = 3
METHODS_SHOWN = ("grad-cam", "hirescam", "layercam", "grad-cam++", "eigen-cam")  # of heatmaps, all from one pass
RIVALS = 3  # classes explained beside the one that is asked for,
RIVAL_PROBABILITY = 0.05  # the first always, the others from this probability on

T = TypeVar("T")


@dataclass(frozen=True)
class Choices:
    """The content of a report.

    Attributes:
        target: class to explain, by number or name; "top" for each image's own best; or one for each image.
        layers: layers whose sheets are shown (see `Network.select`); a choice over the depth where None.
        filter_layers: paths of layers whose filters are shown; three over the depth where there is none.
        heatmap_layer: the layer of the heatmaps: a path, "auto", or "best" (see `heatmap`).
        channels: filters of each of them; 0 leaves the filters out.
        check: measure how far to trust the first heatmap of each image.
        seed: random seed of the start images of filters.
    """

    target: int | str | Sequence[int | str] = "top"
    layers: str | Sequence[str] | None = None
    filter_layers: Sequence[str] = ()
    heatmap_layer: str = "auto"
    channels: int = 16
    check: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Study:
    """The results of the techniques, before they are drawn.

    Attributes:
        network, images, choices: the network, the images and the content.
        activations: of every convolution and pooling, or of the layers that were asked for.
        sheets: paths of the layers whose sheets are shown.
        predictions: the best classes of each image, best first.
        heatmaps: the first explains the class that was asked for, the others the next best classes.
        methods: the same results by other methods, by name.
        rivals: for each image how many of these others are worth showing.
        filters: a result for each layer.
        stuck: for each of these the number of channels checked and the number of them without a gradient.
        missing: for a section that can't be, "heatmaps" or "filters", the reason.
        resemblances: how far each image lies from what the network was trained on; none where that can't be measured.
    """

    network: Network
    images: tuple[InputImage, ...]
    choices: Choices
    activations: Activations
    sheets: tuple[str, ...]
    predictions: tuple[tuple[Prediction, ...], ...]
    heatmaps: tuple[Heatmap, ...] = ()
    methods: Mapping[str, tuple[Heatmap, ...]] = field(default_factory=dict)
    rivals: tuple[int, ...] = ()
    filters: tuple[Filters, ...] = ()
    stuck: tuple[tuple[int, int], ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    resemblances: tuple[Resemblance, ...] = ()

    def maps(self, image: int) -> list[tuple[Heatmap, HeatmapRow, np.ndarray]]:
        """The heatmaps of one image that are worth showing: result, words and numbers, raw map `(h, w)`."""
        shown = self.heatmaps[: 1 + self.rivals[image]] if self.heatmaps else ()
        return [(result, result.rows[image], result.maps[image]) for result in shown]

    def by_method(self, image: int, place: int) -> dict[str, tuple[HeatmapRow, np.ndarray]]:
        """The same map as `maps(image)[place]` by each method, the first of `METHODS_SHOWN` first."""
        by_name = {METHODS_SHOWN[0]: self.heatmaps, **self.methods}
        return {name: (results[place].rows[image], results[place].maps[image]) for name, results in by_name.items()}

    def to_json(self) -> dict[str, Json]:
        """The numbers that the page shows, and the provenance."""
        explained = [
            result.to_json()["heatmaps"][image]
            for image in range(len(self.images))
            for result, _, _ in self.maps(image)
        ]
        return {
            "predictions": [
                {"image": image.name, "predictions": [asdict(row) for row in rows]}
                for image, rows in zip(self.images, self.predictions, strict=True)
            ],
            "heatmaps": explained,
            "activations": self.activations.to_json()["activations"],
            "filters": [
                {"layer": _path(result), "looked_at": seen, "stuck": stuck, **_without_provenance(result.to_json())}
                for result, (seen, stuck) in zip(self.filters, self.stuck, strict=True)
            ],
            "missing": dict(self.missing),
            "resemblance": [
                {"image": image.name, **found.describe()}
                for image, found in zip(self.images, self.resemblances, strict=False)
            ],
            "provenance": self._provenance(),
        }

    def _provenance(self) -> dict[str, Json]:
        parts = {
            "choices": asdict(self.choices),
            "sheets": list(self.sheets),
            "activations": self.activations.described(),
            "heatmaps": [result.described() for result in self.heatmaps],
            "filters": [result.described() for result in self.filters],
        }
        return origin(self.network, "report", self.images).provenance(parts)


def study(network: Network | object, images: Images, choices: Choices, progress: Progress = None) -> Study:
    """Run the three techniques; arguments and errors as in `report`."""
    network = open_model(network)
    with network.unchanging():  # each result has the hash of the weights: they are hashed once
        return _studied(network, images, choices, progress)


def _studied(network: Network, images: Images, choices: Choices, progress: Progress) -> Study:
    images = hold(images, network.image_shape)
    sheets = _sheet_layers(network, choices.layers)
    filter_layers = _filter_layers(network, choices)
    by_method, missing = _heatmaps(network, images, choices, within(progress, "heatmaps"))
    maps = by_method.pop(METHODS_SHOWN[0], ())
    seen = activations(network, images, choices.layers, progress=within(progress, "layers"))
    found, stuck, unfound = _filters(network, images, filter_layers, choices, progress)
    return Study(
        network,
        images,
        choices,
        activations=seen,
        sheets=tuple(sheets),
        predictions=_predictions(network, images, maps),
        heatmaps=maps,
        methods=by_method,
        rivals=tuple(len(_rivals(row)) for row in maps[0].rows) if maps else (),
        filters=found,
        stuck=stuck,
        missing={**missing, **unfound},
        resemblances=resemblances(network, images),
    )


def evenly_chosen(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(step * (len(items) - 1) / (count - 1))] for step in range(count)]


def has_map(layer: Layer) -> bool:
    """True for a layer whose output is a map of more than one cell."""
    return layer.spatial and layer.shape[0] * layer.shape[1] > 1


def _sheet_layers(network: Network, spec: str | Sequence[str] | None) -> list[str]:
    chosen = network.select(spec)
    if spec is None:
        chosen = evenly_chosen([layer for layer in chosen if has_map(layer)] or chosen, SHEETS)
    return [layer.path for layer in chosen]


def _filter_layers(network: Network, choices: Choices) -> list[Layer]:
    if not choices.channels:
        return []
    if choices.filter_layers:
        return [network.layer(path) for path in choices.filter_layers]
    convolutions = [layer for layer in network.layers if layer.convolves and has_map(layer)]
    # A depthwise convolution responds to what the one before it does, so its sheet adds little.
    own = [layer for layer in convolutions if "depthwise" not in layer.class_name.lower()]
    return evenly_chosen(own or convolutions, FILTER_LAYERS)


def _heatmaps(
    network: Network, images: Sequence[InputImage], choices: Choices, progress: Progress
) -> tuple[dict[str, tuple[Heatmap, ...]], dict[str, str]]:
    """By each method a result for the class that is asked for and one for each further rank; or why there is none."""
    if choices.heatmap_layer not in ("auto", "best"):
        network.layer(choices.heatmap_layer)
    try:
        network.check_scores()
        network.last_spatial_layer()
    except UsageError as reason:
        for one in as_targets(choices.target):
            if one != "top" and network.head.has_scores:
                network.class_index(one)  # a class that does not exist is still an error
        return {}, {"heatmaps": str(reason)}

    def explained(target: object, layer: str, **options: Any) -> Heatmap:
        return heatmap(network, images, target, layer, progress=progress, **options)

    first = explained(choices.target, choices.heatmap_layer, method=METHODS_SHOWN)
    layer = first.parameters.layer  # "best" is searched only once
    rows = first.only(METHODS_SHOWN[0]).rows
    rivals = [_rivals(row) for row in rows]
    results = [first]
    for rank in range(max(map(len, rivals))):
        # All images go along, so that the compiled program serves; uninteresting ones are left out later.
        classes = [
            rival[rank].index if rank < len(rival) else row.class_index for row, rival in zip(rows, rivals, strict=True)
        ]
        results.append(explained(classes, layer, method=METHODS_SHOWN))
    found = {name: tuple(result.only(name) for result in results) for name in METHODS_SHOWN}
    if choices.check:
        asked, *others = found[METHODS_SHOWN[0]]
        checked = explained(choices.target, layer, method=METHODS_SHOWN[0], check=True)
        found[METHODS_SHOWN[0]] = (replace(asked, rows=checked.rows), *others)
    return found, {}


def _rivals(row: HeatmapRow) -> list[Prediction]:
    """The best of the other classes, and those after it that the network takes seriously."""
    others = [prediction for prediction in row.predictions if prediction.index != row.class_index]
    serious = [other for other in others[1:] if (other.probability or 0) >= RIVAL_PROBABILITY]
    return (others[:1] + serious)[:RIVALS]


def _predictions(
    network: Network, images: Sequence[InputImage], maps: Sequence[Heatmap]
) -> tuple[tuple[Prediction, ...], ...]:
    if maps:
        return tuple(row.predictions for row in maps[0].rows)
    if not network.head.has_scores:
        return tuple(() for _ in images)
    logits = network.predict(network.prepare(images))
    check_finite(network, logits)
    return tuple(tuple(network.predictions(row)) for row in logits)


def _filters(
    network: Network, images: Sequence[InputImage], layers: Sequence[Layer], choices: Choices, progress: Progress
) -> tuple[tuple[Filters, ...], tuple[tuple[int, int], ...], dict[str, str]]:
    """The first channels of each layer that have a gradient; the rest are counted, not drawn."""
    found, stuck, reasons = [], [], []
    for layer in layers:
        try:
            channels, *counts = first_with_gradient(network, layer.path, choices.channels, seed=choices.seed)
            watch = within(progress, f"filters of {layer.path}")
            found.append(
                filters(network, layer.path, channels, seed=choices.seed, natural_images=images, progress=watch)
            )
            stuck.append((counts[0], counts[1]))
        except UsageError as reason:  # the layer and its channels exist, so it is the network that can't
            reasons.append(str(reason))
    if choices.channels and not layers:
        reasons.append("the network has no convolution whose output is a map of more than one cell.")
    return tuple(found), tuple(stuck), {"filters": " ".join(reasons)} if reasons else {}


def _path(result: Filters) -> str:
    return result.layer.path if result.layer else ""


def _without_provenance(data: dict[str, object]) -> dict[str, Json]:
    return {key: value for key, value in data.items() if key != "provenance"}
