"""One call of the technique: from the request to finished heatmaps, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.errors import UsageError
from convscope.images.image import InputImage
from convscope.images.source import Images, hold
from convscope.networks import Network, open_model
from convscope.networks.network import check_finite
from convscope.results import Check, HeatmapParameters, HeatmapRow
from convscope.results.parameters import MethodParameters
from convscope.techniques.heatmaps.combining import combined
from convscope.techniques.heatmaps.evidence import CallOptions, Evidence, ImageView, TraceSpec, trace
from convscope.techniques.heatmaps.faithfulness import check
from convscope.techniques.heatmaps.methods import Method, MethodResult, Unfit, as_methods, labels
from convscope.techniques.heatmaps.places import Places, chosen_places
from convscope.techniques.heatmaps.rows import row_of
from convscope.techniques.heatmaps.targets import ClassScore, Goal, described, goal_of

BATCH = 8
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class HeatmapOptions:
    """The options of `heatmap`, which describes them.

    Example:
        >>> HeatmapOptions(method="rise", budget=20).seed
        0
    """

    against: object = None
    method: object = "grad-cam"
    smooth: bool = False
    budget: int | None = None
    check: bool = False
    precision: str = "float32"
    seed: int = 0
    batch: int = BATCH


@dataclass(frozen=True, eq=False)
class HeatmapItem:
    """A finished heatmap.

    Attributes:
        number: number of the target, from 0: several methods explain the same target.
        image: the explained image.
        heat: the map `(h, w)` float32, raw and signed; values that are not finite are 0.
        row: the words and numbers beside it.

    Example:
        >>> from convscope.techniques.heatmaps import iter_heatmaps
        >>> item = next(iter_heatmaps(network, PHOTOS[0]))
        >>> item.number, item.image.name, item.heat.shape
        (0, 'cat', (28, 28))
    """

    number: int
    image: InputImage
    heat: np.ndarray
    row: HeatmapRow


@dataclass(frozen=True, eq=False)
class HeatmapRun:
    """The settings that all images of one call share.

    Attributes:
        images: all images.
        goal: the targets, with a row for each image and target.
        methods: the methods, in the order in which they explain each image.
        places: the layers.
        specs: the trace to make at each layer; one without a layer where no method works at one.
        options: the options of the call.
        left_out: the methods of "all" that do not fit, and why, once that is known; None where none may be left out.
    """

    images: tuple[InputImage, ...]
    goal: Goal
    methods: tuple[Method, ...]
    places: Places
    specs: tuple[TraceSpec, ...]
    options: HeatmapOptions
    left_out: dict[str, str] | None

    def __len__(self) -> int:
        """The number of targets; each method makes a map of each."""
        return len(self.goal.image_indices)

    def items(self) -> Iterator[HeatmapItem]:
        """Each heatmap when it is finished, the methods of one image one after another."""
        batch = self.specs[0].batch
        for start in range(0, len(self), batch):
            yield from self._of(np.arange(start, min(start + batch, len(self))))

    def parameters(self) -> HeatmapParameters:
        """The parameters of the result, once the run is done."""
        network, options = self.specs[0].network, self.options
        return HeatmapParameters(
            layer=", ".join(one.path for one in self.places.layers),
            layer_choice=self.places.choice,
            layer_rule=self.places.rule,
            method=", ".join(labels(self._used)),
            methods=tuple(MethodParameters(one.name, one.values) for one in self._used),
            left_out=self.left_out or {},
            explained=_explained(network, self.goal),
            against_choice=self.goal.against,
            output=network.output,
            smooth=options.smooth,
            check=options.check,
            batch=self.specs[0].batch,
            budget=options.budget,
            precision=self.specs[0].call.precision,
            seed=options.seed,
        )

    def details(self) -> dict[str, object]:
        """Further descriptions of the arguments, for the provenance."""
        return {
            "paper": "; ".join(one.paper for one in self._used),
            "target_details": described(self.goal.target),
            "method_details": [one.described() for one in self._used],
        }

    @property
    def _used(self) -> list[Method]:
        return [one for one in self.methods if one.name not in (self.left_out or {})]

    def _of(self, rows: np.ndarray) -> Iterator[HeatmapItem]:
        """The heatmaps of one batch: some rows of the goal."""
        images = [self.images[index] for index in self.goal.image_indices[rows]]
        arguments = tuple(argument[rows] for argument in self.goal.arguments)
        x = self.specs[0].network.prepare(images)
        evidence = [trace(spec, x, arguments) for spec in self.specs]
        if evidence[0].logits is not None:
            check_finite(evidence[0].network, evidence[0].logits)
        _check_rivals(evidence[0], images)
        results = [self._results(method, evidence) for method in self.methods]
        views = list(evidence[0].views())
        for index, image in enumerate(images):
            for method, label, made in zip(self.methods, labels(self.methods), results, strict=True):
                if made is not None:
                    row = replace(self._row(evidence[0], index, image, method, made[index]), method=label)
                    if self.options.check:
                        row = replace(row, check=self._check(method, views[index], made[index].heat))
                    heat = np.where(np.isfinite(made[index].heat), made[index].heat, 0).astype(np.float32)
                    yield HeatmapItem(int(rows[index]), image, heat, row)

    def _row(
        self, evidence: Evidence, index: int, image: InputImage, method: Method, result: MethodResult
    ) -> HeatmapRow:
        row = row_of(evidence, index, image, method, result)
        return row if method.at_image else replace(row, layer=", ".join(layer.path for layer in self.places.layers))

    def _results(self, method: Method, evidence: Sequence[Evidence]) -> Sequence[MethodResult] | None:
        """The maps of one method for each image; None where it does not fit and may be left out."""
        if self.left_out and method.name in self.left_out:
            return None
        try:
            return combined(method, evidence, self.options.smooth)
        except Unfit as error:
            if self.left_out is None:
                raise
            self.left_out[method.name] = str(error)
            return None

    def _check(self, method: Method, view: ImageView, heat: np.ndarray) -> Check:
        rows = tuple(argument[None] for argument in view.arguments)
        specs = [replace(spec, batch=1) for spec in self.specs]

        def remake(x: np.ndarray) -> np.ndarray:
            evidence = [trace(spec, x, rows, resolved=True) for spec in specs]
            return combined(method, evidence, self.options.smooth)[0].heat

        return check(view, heat, remake, self.options.seed)


def begin(
    network: Network | object, images: Images, target: object, layer: str | Sequence[str], options: HeatmapOptions
) -> HeatmapRun:
    """The checked request of `heatmap` and `iter_heatmaps`; nothing is explained yet.

    Raises:
        UsageError: no such class, layer, method or option, or no map there; ModelError; ImageError.
    """
    network = open_model(network)
    read = hold(images, network.image_shape)
    methods = tuple(as_methods(options.method))
    if options.budget is not None:
        if options.budget < 2:
            raise UsageError(
                f"a budget must be at least 2 passes, found {options.budget}.",
                code="argument-too-small",
                name="budget",
                found=options.budget,
                expected=2,
            )
        methods = tuple(one.with_budget(options.budget) for one in methods)
    goal = goal_of(network, target, options.against, len(read), lambda: _ranked(network, read, options.batch))
    batch = max(1, min(options.batch, len(goal.image_indices)))
    call = CallOptions(options.seed, _precision(network, options.precision))
    spec = TraceSpec(network, None, goal.target, batch, call)
    places = chosen_places(layer, goal, methods, read, spec)
    specs = tuple(replace(spec, layer=one) for one in places.layers) or (spec,)
    skip = isinstance(options.method, str) and options.method == "all"
    return HeatmapRun(read, goal, methods, places, specs, options, {} if skip else None)


def _explained(network: Network, goal: Goal) -> str:
    """The number that is explained, in words."""
    if not isinstance(goal.target, ClassScore):
        return goal.target.text
    alone = network.head.paired and goal.against == "none"
    return f"the {network.head.score} of one class alone, of two under one softmax" if alone else network.head.text


def _precision(network: Network, precision: str) -> str:
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not known; expected auto, float32 or bfloat16.",
            code="precision-unknown",
            name=precision,
        )
    return network.precision_for_ascent() if precision == "auto" else precision


def _ranked(network: Network, images: Sequence[InputImage], batch: int) -> np.ndarray:
    """The classes of each image `(n, classes)`, best first."""
    parts = [network.predict(network.prepare(images[at : at + batch])) for at in range(0, len(images), batch)]
    return np.argsort(-np.concatenate(parts), axis=1, kind="stable")


def _check_rivals(evidence: Evidence, images: Sequence[InputImage]) -> None:
    """Refuse a rival that is the image's own best class."""
    for index, image in enumerate(images if isinstance(evidence.target, ClassScore) else ()):
        if not evidence.arguments[0][index].any():
            logits = evidence.logits
            best = evidence.network.class_name(int(np.argmax(logits[index]))) if logits is not None else ""
            raise UsageError(
                f"class {best!r} is the best one of {image.name}, so it can't be set against itself; give another "
                "class to set against it, or rival for the next best.",
                code="class-against-itself",
                name=best,
                image=image.name,
            )
