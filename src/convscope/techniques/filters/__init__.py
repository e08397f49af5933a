"""The image that each filter of a layer responds to most, found by gradient ascent on its activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import combinations

import numpy as np

from convscope.binding import BoundObjective, ProgramKey, layer_with_channels
from convscope.errors import UsageError
from convscope.events import Progress
from convscope.images.decode import Source
from convscope.images.image import InputImage
from convscope.images.source import Images
from convscope.measures import LOGITS, Scored, described_own
from convscope.networks import Network, open_model
from convscope.objectives import Objective, channel
from convscope.results import FilterParameters, FilterRow, Filters, RecipeParameters, array_sha256, origin
from convscope.schema import Json
from convscope.techniques.filters.ascent import (
    BATCH,
    MEASURED_AT_ONCE,
    NOTHING,
    Job,
    Plan,
    Trace,
    ascend,
    kept_steps,
)
from convscope.techniques.filters.baselines import (
    NOISE_IMAGES,
    Baseline,
    Baselines,
    made_for,
    measure_baselines,
)
from convscope.techniques.filters.recipes import DEFAULT_RECIPE, RECIPES, Recipe, recipe_named
from convscope.techniques.filters.requests import (
    FilterOptions,
    adapted,
    batch_of,
    parse_channels,
    precision_of,
    read_references,
    size_of,
    start_image,
    wanted_objectives,
    with_variants,
)
from convscope.techniques.filters.runs import refuse_cut, run
from convscope.techniques.filters.verdicts import Judged, cut_off, judge

__all__ = [
    "DEFAULT_RECIPE",
    "NOISE_IMAGES",
    "RECIPES",
    "Baseline",
    "Baselines",
    "FilterItem",
    "FilterOptions",
    "FilterStream",
    "Recipe",
    "baselines",
    "filters",
    "first_with_gradient",
    "parse_channels",
]

MOST_LOOKED_AT = 256  # channels asked for a gradient by `first_with_gradient`


def filters(
    network: Network | object,
    layer: str | None = None,
    channels: str | int | Iterable[int] | None = None,
    *,
    objectives: Sequence[Objective | str | object] | Objective | str = (),
    recipe: str | Recipe = DEFAULT_RECIPE,
    steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    seeds: int = 1,
    variants: int = 1,
    natural_images: Images | None = (),
    image: Source | None = None,
    frames: int = 0,
    precision: str = "auto",
    batch: int | None = None,
    baselines: Baselines | None = None,
    progress: Progress = None,
) -> Filters:
    """The image that excites each filter of a layer most, found by gradient ascent.

    Args:
        network: an opened network, or what `open_model` takes.
        layer: path of any layer with channels; of the output layer, the logits are raised.
        channels: numbers, or text such as "0-63,70"; all where None (the first 64 for recipe "classic").
        objectives: raised instead of the channels of `layer`: objectives (see `convscope.objectives`), their
            text, or objects of your own with a `score` (see `convscope.measures.Target`).
        recipe: one of `RECIPES`, or a `Recipe`.
        steps, size: instead of the recipe's; `size` in pixels, a side or `(h, w)`, for layers that take it.
        seed: random seed; start images are bit-equal for a (seed, channel).
        seeds: number of random seeds, to measure how well their results agree; the images are those of the first.
        variants: number of images of each objective, made to differ from each other.
        natural_images: images whose activations an alive filter must exceed as well as noise.
        image: the image that recipes such as "deepdream", "accentuation" and "caricature" need.
        frames: number of intermediate images of each to keep.
        precision: of the optimization, "float32", "bfloat16", or "auto": bfloat16 where the machine gains by it. Final
            activations and those of natural images are always measured in float32.
        batch: number of filters that are raised side by side; images are bit-equal at equal `batch`.
        baselines: activations of noise and natural images, from `baselines`, instead of measuring them again.
        progress: called with each event (`convscope.events`).

    Returns:
        images, activations at each step, and for each filter whether it is alive, weak or dead. If interrupted
        (Ctrl-C), the finished ones, and `parameters.interrupted` is True.

    Raises:
        UsageError: no such layer, channel, objective or recipe, a size that the network can't take, or baselines of
            something else.

    Example:
        >>> found = convscope.filters(network, "block4_conv", [0, 7], steps=2, size=32)
        >>> found.values.shape, [row.channel for row in found.rows]
        ((2, 32, 32, 3), [0, 7])
        >>> found.rows[0].status in ("alive", "weak", "dead")
        True
    """
    options = FilterOptions(
        objectives=objectives,
        recipe=recipe,
        steps=steps,
        size=size,
        seed=seed,
        seeds=seeds,
        variants=variants,
        natural_images=natural_images,
        image=image,
        frames=frames,
        precision=precision,
        batch=batch,
        baselines=baselines,
        progress=progress,
    )
    stream = FilterStream(network, layer, channels, options)
    return _collected(stream, options)


def baselines(
    network: Network | object,
    layer: str | None = None,
    channels: str | int | Iterable[int] | None = None,
    options: FilterOptions | None = None,
) -> Baselines:
    """Activations of noise and natural images (`options.natural_images`), to give to `filters` any number of times.

    Args:
        network, layer, channels: as for `filters`; the baselines of one channel of a layer serve all of its channels.
        options: the same as for the later calls in recipe, size, seed, precision and objectives.

    Raises:
        UsageError: as for `filters`.

    Example:
        >>> options = FilterOptions(steps=2, size=32)
        >>> measured = baselines(network, "block4_conv", [0], options)
        >>> convscope.filters(network, "block4_conv", [0], steps=2, size=32, baselines=measured).values.shape
        (1, 32, 32, 3)
    """
    stream = FilterStream(network, layer, channels, options or FilterOptions())
    return replace(stream.baselines, made_for=made_for(stream.plan))


def first_with_gradient(
    network: Network, layer: str, count: int, *, recipe: str = DEFAULT_RECIPE, seed: int = 0, batch: int = BATCH
) -> tuple[list[int], int, int]:
    """The first channels that have a gradient at their start image, for a page that shows a few.

    Args:
        network, layer, recipe, seed, batch: as for `filters`.
        count: number of channels to find.

    Returns:
        their numbers, filled up with channels that have none where too few do; the number of channels checked; the
        number of these without a gradient.

    Example:
        >>> numbers, looked_at, without = first_with_gradient(network, "block4_conv", 2)
        >>> len(numbers), without < looked_at
        (2, True)
    """
    chosen = replace(recipe_named(recipe), steps=1, octaves=((1.0, 1.0),))
    size = size_of(network, chosen, None, None)
    target = layer_with_channels(network, layer, size)
    plan = Plan(network, chosen, size, seed, batch=batch)
    with_one: list[int] = []
    without: list[int] = []
    for start in range(0, min(target.channels, MOST_LOOKED_AT), batch):
        numbers = list(range(start, min(start + batch, target.channels)))
        jobs = [Job(plan.bind(channel(target.path, number)), (number,)) for number in numbers]
        traces = [Trace() for _ in jobs]
        for index in ascend(plan, jobs, traces):
            (without if traces[index].has_no_gradient else with_one).append(numbers[index])
        if without and not with_one:
            refuse_cut(plan, jobs[0])
        if len(with_one) >= count:
            break
    return sorted((sorted(with_one) + sorted(without))[:count]), len(with_one) + len(without), len(without)


# -- a stream of finished filters ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FilterItem:
    """One finished filter.

    Attributes:
        index: its place among the requested filters.
        row: its verdict and measures.
        image: `(h, w, c)` float32, in the range that the network takes.
        heat: the sum of the image's absolute gradients `(h, w)`.
        frames: intermediate images, where they were asked for.
        profile: activations of every channel of the layer on the image, less those on noise `(c,)`.

    Example:
        >>> item = next(iter(FilterStream(network, "block4_conv", [7], FilterOptions(steps=2, size=32))))
        >>> item.row.channel, item.image.shape, item.heat.shape
        (7, (32, 32, 3), (32, 32))
    """

    index: int
    row: FilterRow
    image: np.ndarray
    heat: np.ndarray
    frames: tuple[np.ndarray, ...]
    profile: np.ndarray


class FilterStream:
    """Filters one after another, as they are finished: for callers that must not hold all images, as `filters` does.

    At most a few batches of images are in memory. After Ctrl-C the finished ones follow, and `interrupted` is True.

    Args:
        network, layer, channels: as for `filters`.
        options: the other arguments of `filters`.

    Raises:
        UsageError: as `filters`.

    Example:
        >>> stream = FilterStream(network, "block4_conv", [0, 7], FilterOptions(steps=2, size=32))
        >>> sorted(item.row.channel for item in stream)
        [0, 7]
    """

    def __init__(
        self,
        network: Network | object,
        layer: str | None = None,
        channels: str | int | Iterable[int] | None = None,
        options: FilterOptions | None = None,
    ) -> None:
        options = options or FilterOptions()
        network, recipe = open_model(network), adapted(options.recipe, options.steps)
        references = read_references(options.natural_images, network)
        self.image = start_image(recipe, options.image)
        size = size_of(network, recipe, options.size, self.image)
        if layer is not None and not options.objectives:
            layer_with_channels(network, layer, size)
        prepared = None if self.image is None else network.prepare([self.image], size)[0]
        wanted = wanted_objectives(network, layer, channels, options, recipe, prepared)
        several = with_variants(wanted, options.variants)
        precision = precision_of(network, options.precision)
        batch = batch_of(options.batch, recipe, options.variants)
        self.plan = Plan(network, recipe, size, options.seed, precision, batch, options.frames, options.progress)
        begun = None if recipe.raises == "caricature" else prepared
        bounds = [self.plan.bind(one.objective) for one, _ in several]
        self._check_likeness(bounds, begun)
        self.asked, self.interrupted = [one.objective for one in wanted], False
        self.baselines = self._baselines(bounds, references, options.baselines)
        self.jobs = [
            Job(bound, one.key, variant, index - variant, begun, hint=self._hint(bound))
            for index, (bound, (one, variant)) in enumerate(zip(bounds, several, strict=True))
        ]

    def __iter__(self) -> Iterator[FilterItem]:
        """The filters, in the order in which they are finished."""
        return self.of_seed(0)

    def of_seed(self, number: int) -> Iterator[FilterItem]:
        """The filters of the random seed that is this far after the first."""
        plan = replace(self.plan, seed=self.plan.seed + number, frames=0 if number else self.plan.frames)
        counts: dict[ProgramKey, int] = {}
        for job in self.jobs:
            counts[job.bound.key] = counts.get(job.bound.key, 0) + 1
        waiting: dict[ProgramKey, list[tuple[int, Trace]]] = {key: [] for key in counts}
        try:
            for index, trace in run(plan, self.jobs):
                key = self.jobs[index].bound.key
                waiting[key].append((index, trace))
                if len(waiting[key]) == MEASURED_AT_ONCE:
                    items = self._items(plan, waiting[key], counts[key])
                    waiting[key] = []
                    yield from items
        except KeyboardInterrupt:
            self.interrupted = True
        for key, some in waiting.items():
            yield from self._items(plan, some, counts[key])

    def _items(self, plan: Plan, some: Sequence[tuple[int, Trace]], of: int) -> list[FilterItem]:
        if not some:
            return []
        jobs, traces = [self.jobs[index] for index, _ in some], [trace for _, trace in some]
        return [
            _item(index, trace, judged)
            for (index, trace), judged in zip(some, judge(plan, self.baselines, jobs, traces, of), strict=True)
        ]

    def _baselines(
        self, bounds: Sequence[BoundObjective], references: Sequence[InputImage], given: Baselines | None
    ) -> Baselines:
        if given is None:
            return measure_baselines(self.plan, bounds, references)
        if references:
            raise UsageError(
                "the baselines have natural images of their own; give natural images only when the baselines are made.",
                code="baselines-have-images",
            )
        given.check(self.plan, bounds)
        return given

    def _hint(self, bound: BoundObjective) -> Callable[[], np.ndarray] | None:
        """A function that returns the natural image that excites an objective most, if one does."""
        if not self.baselines.images:
            return None
        reached = self.baselines.natural(bound)
        best = int(np.argmax(reached))
        image = self.baselines.images[best]
        return (lambda: self.plan.network.prepare([image], self.plan.size)[0]) if reached[best] > 0 else None

    @staticmethod
    def _check_likeness(bounds: Sequence[BoundObjective], begun: np.ndarray | None) -> None:
        for bound in bounds if begun is None else ():
            for argument, spec in zip(bound.arguments, bound.key.specs, strict=True):
                spec.measure.argument(argument, None, 0)


def _item(index: int, trace: Trace, judged: Judged) -> FilterItem:
    return FilterItem(index, judged.row, trace.image, trace.heat, tuple(trace.frames), judged.profile)


# -- the result ------------------------------------------------------------------------------------------


def _collected(stream: FilterStream, options: FilterOptions) -> Filters:
    """All filters of a stream as one result."""
    plan, count = stream.plan, len(stream.jobs)
    images = np.zeros((count, *plan.size, plan.network.inputs.channels), np.float32)
    alpha = np.zeros((count, *plan.size), np.float32) if plan.recipe.transparent else None
    items: dict[int, FilterItem] = {}
    for item in stream:
        images[item.index] = item.image
        if alpha is not None:
            alpha[item.index] = _alpha(item.heat)
        # The result has copies of its own.
        items[item.index] = replace(item, image=NOTHING, heat=NOTHING)
    done = sorted(items)
    if stream.interrupted and not done:
        raise KeyboardInterrupt
    agreement = {} if options.seeds < 2 or stream.interrupted else _agreement(stream, items, options.seeds)
    if len(done) < count:
        images, alpha = images[done], None if alpha is None else alpha[done]
    rows = tuple(replace(items[index].row, agreement=agreement.get(index)) for index in done)
    frames = _frames([items[index].frames for index in done], images)
    bounds = [job.bound for job in stream.jobs]
    return Filters(
        origin(plan.network, "filters", stream.baselines.images, {"start": stream.image}, _details(stream, options)),
        parameters=_parameters(stream, options),
        layer=bounds[0].key.specs[0].layer if _channels(bounds) else None,
        values=images,
        rows=rows,
        preprocessing=plan.network.preprocessing,
        crop=plan.recipe.crop_for(min(plan.size)),
        style=plan.recipe.style,
        alpha=alpha,
        frames=frames,
    )


def _agreement(stream: FilterStream, items: Mapping[int, FilterItem], seeds: int) -> dict[int, float]:
    """Agreement of the images of several seeds in the layer: see `FilterRow.agreement`."""
    answers = [{index: item.profile for index, item in items.items()}]
    for number in range(1, seeds):
        answers.append({item.index: item.profile for item in stream.of_seed(number)})
        if stream.interrupted:
            raise KeyboardInterrupt
    pairs = list(combinations(answers, 2))
    return {index: float(np.mean([_correlation(one[index], two[index]) for one, two in pairs])) for index in items}


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    """The cosine of two vectors, 0 where one of them is zero."""
    size = np.linalg.norm(one) * np.linalg.norm(two)
    return float(one @ two / size) if size > 0 and np.isfinite(size) else 0.0


def _frames(kept: Sequence[tuple[np.ndarray, ...]], images: np.ndarray) -> np.ndarray | None:
    """Intermediate images `(n, f, h, w, c)`; a filter that was done early keeps its image while the others go on."""
    most = max((len(one) for one in kept), default=0)
    if not most:
        return None
    filled = [[*one, *[image] * (most - len(one))] for one, image in zip(kept, images, strict=True)]
    return np.stack([np.stack(one) for one in filled])


def _alpha(heat: np.ndarray) -> np.ndarray:
    """Importance of each place of an image, 0..1: summed absolute gradients over their 99th percentile (2306.06805)."""
    high = np.percentile(heat, 99, axis=(0, 1), keepdims=True)
    return np.clip(heat / np.maximum(high, 1e-12), 0, 1).astype(np.float32)


def _channels(bounds: Sequence[BoundObjective]) -> tuple[int, ...] | None:
    """The channels that are raised; None where one of the objectives is none."""
    found = [bound.channel for bound in bounds if bound.channel is not None]
    return tuple(found) if len(found) == len(bounds) else None


def _parameters(stream: FilterStream, options: FilterOptions) -> FilterParameters:
    plan, recipe, bounds = stream.plan, stream.plan.recipe, [job.bound for job in stream.jobs]
    return FilterParameters(
        layer=bounds[0].key.specs[0].layer.path,
        channels=_channels(bounds),
        recipe=RecipeParameters(recipe.name, recipe.steps, _described(recipe)),
        size=plan.size,
        seed=plan.seed,
        seeds=options.seeds,
        variants=options.variants,
        batch=plan.batch,
        precision=plan.precision,
        frames=options.frames,
        frame_steps=tuple(kept_steps(recipe.steps, plan.frames)),
        interrupted=stream.interrupted,
        note=cut_off(plan, bounds[0]) if options.size is not None else "",
    )


def _details(stream: FilterStream, options: FilterOptions) -> dict[str, object]:
    """Further descriptions of the objectives, for the provenance."""
    bounds = [job.bound for job in stream.jobs]
    return {
        "objective": _objective_text(stream.plan.network, bounds[0]),
        "objectives": None if _channels(bounds) else [bound.objective.label for bound in bounds],
        "raised": [str(objective) for objective in stream.asked] if options.objectives else None,
        "directions": _arrays(stream.asked),
        "own": _own(bounds),
    }


def _described(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain values, its parts with their kinds: two of them may have fields of the same names."""
    parts = {name: getattr(recipe, name) for name in ("parameterization", "optimizer", "transforms")}
    return {**asdict(recipe), **{name: None if part is None else _part(part) for name, part in parts.items()}}


def _part(part: object) -> dict[str, object]:
    """A parameterization, an optimizer or transforms, perhaps of the user's own."""
    values = asdict(part) if is_dataclass(part) and not isinstance(part, type) else {"repr": repr(part)}
    return {"kind": type(part).__name__, **values}


def _arrays(objectives: Iterable[Objective]) -> list[dict[str, object]]:
    """The arrays that objectives name: directions and given activations."""
    found: list[dict[str, Json]] = []
    for term in dict.fromkeys(term for objective in objectives for term in objective.terms):
        if term.direction is not None:
            found.append({"layer": term.layer, "sha256": array_sha256(np.array(term.direction))})
        if term.given is not None:
            found.append({"layer": term.layer, "sha256": array_sha256(term.given.array), **asdict(term.measure)})
    return found


def _own(bounds: Iterable[BoundObjective]) -> list[dict[str, object]]:
    """The user's own objects among the terms."""
    measures = dict.fromkeys(spec.measure for bound in bounds for spec in bound.key.specs)
    return [described_own(measure.own) for measure in measures if isinstance(measure, Scored)]


def _objective_text(network: Network, bound: BoundObjective) -> str:
    spec = bound.key.specs[0]
    if spec.layer.path in (LOGITS, network.head.undone):
        head = network.head
        before = f", before its {head.activation}" if head.activation else ""
        if head.paired and np.count_nonzero(bound.vectors[0]) == 2:
            return f"the difference of the two {head.score}s{before}"
        return f"the {head.score} of each unit{before}"
    return "mean of the channel without its border" if spec.layer.spatial else "the unit"
