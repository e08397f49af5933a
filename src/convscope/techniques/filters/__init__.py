"""What each filter of a layer looks for: the picture that raises its activation, by gradient ascent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from convscope.errors import UsageError
from convscope.events import Progress, Started, tell
from convscope.images.decode import InputImage, read_images
from convscope.images.source import hold
from convscope.networks import Layer, Network, open_model
from convscope.results import FilterParameters, FilterRow, Filters, RecipeParameters, array_sha256, origin
from convscope.techniques.filters.ascent import FRESH, FRESH_DRAWS, Climb, Course, Task, ascend, kept_steps, look_at
from convscope.techniques.filters.courses import BATCH, FROM_PHOTO, Goal, Plan, pursue
from convscope.techniques.filters.objectives import (
    BESIDE,
    LOGITS,
    Bound,
    Objective,
    channel,
    distinct_masks,
    diversity,
    likeness,
    parse,
    values_of,
)
from convscope.techniques.filters.objectives import layer as whole_layer
from convscope.techniques.filters.recipes import DEFAULT_RECIPE, RECIPES, Recipe, recipe_named

__all__ = ["DEFAULT_RECIPE", "RECIPES", "Recipe", "filters", "first_that_climb", "parse_channels"]

NOISE_PICTURES = 128
PERCENTILE = 99
CLASSIC_CHANNELS = 64  # as many as the sheet of the classic procedure shows
MOST_LOOKED_AT = 256  # channels asked for a gradient by `first_that_climb`
DIVERSITY = 1.0  # weight of being unlike each other, relative to the activation


@dataclass(frozen=True, eq=False)
class Wanted:
    """One row of the result, before it is made: an objective, its key and which variant of it this is."""

    objective: Objective
    key: tuple[int, ...]
    variant: int = 0


def filters(
    network: Network | Any,
    layer: str | None = None,
    channels: str | int | Iterable[int] | None = None,
    *,
    objectives: Sequence[Objective | str] = (),
    recipe: str | Recipe = DEFAULT_RECIPE,
    steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    seeds: int = 1,
    variants: int = 1,
    photos: Any = (),
    photo: Any = None,
    frames: int = 0,
    precision: str = "auto",
    batch: int | None = None,
    progress: Progress = None,
) -> Filters:
    """The picture that excites each filter of a layer most, found by gradient ascent.

    Args:
        network: an opened network, or what `open_model` takes.
        layer: path of any layer with channels; of the output layer, the logits are raised.
        channels: numbers, or text such as "0-63,70"; all where None (the first 64 for recipe "classic").
        objectives: what to raise instead of the channels of `layer`: see `objectives`, or their text.
        recipe: one of `RECIPES`, or a `Recipe`.
        steps, size: instead of the recipe's; `size` in pixels, a side or `(h, w)`, for layers that take it.
        seed: start pictures are bit-equal for a (seed, channel).
        seeds: how many seeds to climb from, to see whether they agree; the pictures are those of the first.
        variants: how many pictures of each objective, made to differ from each other.
        photos: pictures whose activations an alive filter must exceed as well as noise.
        photo: the picture that recipes such as "deepdream" and "accentuation" start from.
        frames: how many pictures on the way to keep of each.
        precision: "float32", "bfloat16", or "auto": bfloat16 for the ascent where the machine gains by it. The final
            activations and those of photos are measured in float32 either way.
        batch: how many filters are raised side by side; pictures are bit-equal at equal `batch`.
        progress: called with each event (`convscope.events`).

    Returns:
        canvases, activations at each step, and for each filter whether it is alive, weak or dead. If interrupted
        (Ctrl-C), what is finished, and `parameters.interrupted` is True.

    Raises:
        UsageError: no such layer, channel, objective or recipe, or a size that the network can't take.
    """
    network = open_model(network)
    chosen = _adapted(recipe, steps)
    references = _read(photos, network)
    begin = _photo(chosen, photo)
    size_in_pixels = _size(network, chosen, size, begin)
    if layer is not None and not objectives:
        _check_layer(network, layer, size_in_pixels)
    wanted = _wanted(network, layer, channels, objectives, chosen, variants)
    if begin is None and any(term.measure == "likeness" for item in wanted for term in item.objective.terms):
        raise UsageError("a likeness needs a photo to be like; give one with photo= (--photo IMAGE).")
    plan = Plan(
        network,
        chosen,
        size_in_pixels,
        seed,
        _precision(network, precision),
        _batch(batch, chosen, variants),
        frames,
        progress,
    )
    bounds = [plan.bind(item.objective) for item in wanted]
    judge = _Judge(plan, bounds, references)
    courses, interrupted = _made(plan, wanted, bounds, judge, begin)
    done = [index for index, course in enumerate(courses) if course.finished]
    if interrupted and not done:
        raise KeyboardInterrupt
    agreement = {} if seeds < 2 or interrupted else _agreement(plan, wanted, bounds, judge, courses, begin, seeds)
    rows = judge.rows([wanted[i] for i in done], [bounds[i] for i in done], [courses[i] for i in done])
    rows = [replace(row, agreement=agreement.get(index)) for index, row in zip(done, rows, strict=True)]
    note = _cut_off(plan, bounds[0]) if size is not None else ""
    parameters = replace(
        _parameters(plan, bounds), variants=variants, seeds=seeds, frames=frames, interrupted=interrupted, note=note
    )
    details = {
        **_details(network, bounds),
        "raised": [str(item.objective) for item in wanted[::variants]] if objectives else None,
        "directions": _directions(wanted),
    }
    made = origin(network, "filters", references, {"start": begin}, details)
    return replace(_result(plan, bounds, [courses[i] for i in done], rows), origin=made, parameters=parameters)


def first_that_climb(
    network: Network, layer: str, count: int, *, recipe: str = DEFAULT_RECIPE, seed: int = 0, batch: int = BATCH
) -> tuple[list[int], int, int]:
    """The first channels that have a gradient at their start picture, for a page that has room for a few.

    Args:
        network, layer, recipe, seed, batch: as for `filters`.
        count: how many are wanted.

    Returns:
        their numbers, filled up with channels that have none where too few do; how many channels were looked at; how
        many of these have no gradient.
    """
    chosen = replace(recipe_named(recipe), steps=1, octaves=((1.0, 1.0),))
    size = _size(network, chosen, None, None)
    target = _check_layer(network, layer, size)
    plan = Plan(network, chosen, size, seed, batch=batch)
    climbing: list[int] = []
    stuck: list[int] = []
    for start in range(0, min(target.channels, MOST_LOOKED_AT), batch):
        numbers = list(range(start, min(start + batch, target.channels)))
        bounds = [plan.bind(channel(target.path, number)) for number in numbers]
        for number, norm in zip(numbers, first_gradients(plan, bounds, numbers), strict=True):
            (climbing if norm > 0 else stuck).append(number)
        if len(climbing) >= count:
            break
    return sorted((climbing + stuck)[:count]), len(climbing) + len(stuck), len(stuck)


def parse_channels(channels: str | int | Iterable[int] | None, count: int) -> list[int]:
    """Channel numbers from "0-63,70", "all", a number or numbers; in the order given, each once.

    Raises:
        UsageError: not understood, or out of the range 0 .. count - 1.
    """
    if channels is None:
        return list(range(count))
    if isinstance(channels, str):
        numbers = list(range(count)) if channels.strip() == "all" else _numbers(channels)
    else:
        numbers = [int(channels)] if isinstance(channels, int | np.integer) else [int(number) for number in channels]
    numbers = list(dict.fromkeys(numbers))
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise UsageError(
            f"channel {wrong[0]} is out of range: the layer has {count} channels, numbered from 0 to {count - 1}."
        )
    if not numbers:
        raise UsageError('no channels given; expected numbers such as "0-63,70", or "all".')
    return numbers


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise UsageError(
                f'channels {text!r} are not understood at {part!r}; expected numbers such as "0-63,70", or "all".'
            )
        low, high = int(first), int(last if dash else first)
        if high < low or high - low > 10**6:
            raise UsageError(f"channels {part!r} run backwards or too far; expected a range such as 0-63.")
        numbers.extend(range(low, high + 1))
    return numbers


# -- what is asked for -----------------------------------------------------------------------------------


def _some(photos: Any) -> bool:
    return photos is not None and not (isinstance(photos, Sequence) and len(photos) == 0)


def _read(photos: Any, network: Network) -> list[InputImage]:
    """Images that were read already go as they are."""
    if not _some(photos):
        return []
    if isinstance(photos, list | tuple) and all(isinstance(photo, InputImage) for photo in photos):
        return list(photos)
    return list(hold(photos, network.image_shape))


def _adapted(recipe: str | Recipe, steps: int | None) -> Recipe:
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if steps is None:
        return chosen
    if steps < 1:
        raise UsageError(f"steps must be at least 1, found {steps}.")
    return replace(chosen, steps=steps)


def _photo(recipe: Recipe, photo: Any) -> InputImage | None:
    if photo is None and recipe.photo:
        raise UsageError(f"recipe {recipe.name!r} starts from a photo; give one with photo= (--photo IMAGE).")
    return None if photo is None else read_images(photo if isinstance(photo, list | tuple) else [photo])[0]


def _precision(network: Network, precision: str) -> str:
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"precision {precision!r} is not known; expected auto, float32 or bfloat16.")
    return network.precision_for_ascent() if precision == "auto" else precision


def _batch(batch: int | None, recipe: Recipe, variants: int) -> int:
    """The number of lanes, whose views are seen together; the variants of an objective are climbed together."""
    wanted = max(1, BATCH // recipe.views) if batch is None else max(1, batch)
    return wanted if variants == 1 else max(variants, wanted // variants * variants)


def _size(
    network: Network, recipe: Recipe, size: int | tuple[int, int] | None, photo: InputImage | None
) -> tuple[int, int]:
    if size is not None:
        height, width = (size, size) if isinstance(size, int | np.integer) else size
        if min(height, width) < 1:
            raise UsageError(f"the size must be at least 1 pixel, found {min(height, width)}.")
        return int(height), int(width)
    if not network.inputs.free:
        return network.inputs.size
    if photo is None:
        return recipe.size, recipe.size
    # The photo keeps its proportions, its shorter side brought to the recipe's.
    scale = recipe.size / min(photo.pixels.shape[:2])
    return round(photo.pixels.shape[0] * scale), round(photo.pixels.shape[1] * scale)


def _cut_off(plan: Plan, bound: Bound) -> str:
    """What to say where a unit in the middle of the map sees both edges of the picture, and perhaps beyond; or ""."""
    layer, network = bound.form.slots[0].layer, plan.network
    if not layer.spatial:
        return ""

    def slope(run: Any, x: Any) -> Any:
        def score(x: Any) -> tuple:
            seen = run(x, record=(layer.path,), outputs=False).activations[layer.path]
            middle = seen[:, seen.shape[1] // 2, seen.shape[2] // 2]
            return network.ops.sum(network.ops.square(middle)), middle

        return network.value_and_grad(score)(x)[1]

    program = network.program(("sees", layer.path), lambda: network.compile(slope))
    black, white = network.preprocessing.range(network.inputs.channels)
    noise = black + np.random.default_rng(plan.seed).random((1, *plan.size, len(black))) * (white - black)
    seen = np.abs(network.numpy(program(network.tensor(noise.astype(np.float32))))[0]).sum(axis=-1) > 0
    edges = [seen[0].any(), seen[-1].any(), seen[:, 0].any(), seen[:, -1].any()]
    if not all(edges):
        return ""
    return (
        f"a unit of {layer.path} sees all {plan.size[0]}x{plan.size[1]} pixels or more: what it looks for may be cut "
        "off; a larger size shows the whole of it."
    )


def _check_layer(network: Network, path: str, size: tuple[int, int]) -> Layer:
    """The layer as it is for pictures of `size`."""
    wanted = network.layer(path).path
    target = next((layer for layer in network.layers_at(size) if layer.path == wanted), None)
    if target is None:
        height, width = network.inputs.size
        raise UsageError(
            f"layer {wanted!r} does not take pictures of {size[0]}x{size[1]} pixels in {network.name}; "
            f"leave --size out, or give {height if height == width else f'{height}x{width}'}."
        )
    if len(target.shape) not in (1, 3):
        raise UsageError(f"layer {wanted!r} has no channels to raise; its output has the shape {target.shape}.")
    if min(target.shape) < 1:
        raise UsageError(
            f"pictures of {size[0]}x{size[1]} pixels are too small for layer {wanted!r}; give a larger --size."
        )
    return target


def _wanted(
    network: Network,
    layer: str | None,
    channels: str | int | Iterable[int] | None,
    objectives: Sequence[Objective | str],
    recipe: Recipe,
    variants: int,
) -> list[Wanted]:
    if variants < 1:
        raise UsageError(f"variants must be at least 1, found {variants}.")
    if objectives:
        if isinstance(objectives, str | Objective):
            objectives = [objectives]
        chosen = [parse(objective) if isinstance(objective, str) else objective for objective in objectives]
        pairs = [(objective, (index,)) for index, objective in enumerate(chosen)]
    elif layer is None:
        raise UsageError("nothing to raise: give a layer, or objectives such as conv3:17.")
    elif recipe.photo and channels is None:
        pairs = [(whole_layer(layer), (0,))]
    else:
        count = network.layer(layer).channels
        if channels is None and recipe.look == "classic":
            channels = range(min(count, CLASSIC_CHANNELS))
        pairs = [(channel(layer, number), (number,)) for number in parse_channels(channels, count)]
    if recipe.tie:
        pairs = [(objective + recipe.tie * likeness(_halfway(network, objective)), key) for objective, key in pairs]
    if variants == 1:
        return [Wanted(objective, key) for objective, key in pairs]
    return [
        Wanted(
            objective + DIVERSITY * diversity(objective.terms[0].layer), (*key, variant) if variant else key, variant
        )
        for objective, key in pairs
        for variant in range(variants)
    ]


def _halfway(network: Network, objective: Objective) -> str:
    """The layer with a map in the middle of the way to the first layer of an objective."""
    before = [layer.path for layer in network.layers if layer.spatial and layer.on_path]
    first = objective.terms[0].layer
    path = None if first == LOGITS else network.layer(first).path
    upto = before.index(path) if path in before else len(before)
    return before[upto // 2]


# -- making them -----------------------------------------------------------------------------------------


def first_gradients(plan: Plan, bounds: Sequence[Bound], numbers: Sequence[int]) -> np.ndarray:
    """L2 norm `(n,)` of the gradient of each objective at its start."""
    courses = [Course() for _ in bounds]
    climb = plan.climb(bounds[0])
    tasks = [Task(bound, (number,)) for bound, number in zip(bounds, numbers, strict=True)]
    ascend(climb, tasks, courses, plan.batch)
    return np.array([course.gradients[0] for course in courses])


def _made(
    plan: Plan, wanted: Sequence[Wanted], bounds: Sequence[Bound], judge: _Judge, photo: InputImage | None
) -> tuple[list[Course], bool]:
    """A course for each that is wanted, and whether Ctrl-C came before the last was finished."""
    begin = None if photo is None else plan.network.prepare([photo], plan.size)[0]
    groups = {id(bound): index for index, bound in enumerate(bounds)}
    goals = [
        Goal(bound, item.key, begin, groups[id(bound)] - item.variant, judge.hint(bound))
        for item, bound in zip(wanted, bounds, strict=True)
    ]
    courses = [Course() for _ in goals]
    try:
        pursue(plan, goals, courses)
    except KeyboardInterrupt:
        return courses, True
    return courses, False


def _agreement(
    plan: Plan,
    wanted: Sequence[Wanted],
    bounds: Sequence[Bound],
    judge: _Judge,
    courses: Sequence[Course],
    photo: InputImage | None,
    seeds: int,
) -> dict[int, float]:
    """How alike the pictures of several seeds are to the layer: see `FilterRow.agreement`."""
    answers = [judge.profiles(bounds, courses)]
    for more in range(1, seeds):
        other, interrupted = _made(replace(plan, seed=plan.seed + more, frames=0), wanted, bounds, judge, photo)
        if interrupted:
            raise KeyboardInterrupt
        answers.append(judge.profiles(bounds, other))
    pairs = list(combinations(answers, 2))
    return {
        index: float(np.mean([_correlation(one[index], two[index]) for one, two in pairs]))
        for index in range(len(wanted))
    }


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    """The cosine of two vectors, 0 where one of them is zero."""
    size = np.linalg.norm(one) * np.linalg.norm(two)
    return float(one @ two / size) if size > 0 and np.isfinite(size) else 0.0


# -- judging them ----------------------------------------------------------------------------------------


class _Judge:
    """What noise and photos say to the objectives, measured before the ascent, and the verdicts after it."""

    def __init__(self, plan: Plan, bounds: Sequence[Bound], photos: Sequence[InputImage]) -> None:
        self.plan, self.photos = plan, photos
        self.network = plan.network
        self.forms: dict[Any, list[Bound]] = {}
        for bound in bounds:
            self.forms.setdefault(bound.form, []).append(bound)
        self.masks = {form: distinct_masks(members) for form, members in self.forms.items()}
        tell(plan.progress, Started(0, None, f"{NOISE_PICTURES} noise pictures"))
        # A percentile of noise is far less certain than what the ascent's precision rounds off.
        self.noise = {form: self._means(form, self._noise, NOISE_PICTURES, plan.precision) for form in self.forms}
        self.natural = {form: self._means(form, self._natural, len(photos)) for form in self.forms}

    def _climb(self, form: Any) -> Climb:
        return self.plan.climb(self.forms[form][0])

    def _means(self, form: Any, pictures: Any, count: int, precision: str = "float32") -> list[np.ndarray]:
        return look_at(self._climb(form), pictures, count, self.masks[form], precision=precision)

    def _noise(self, numbers: Sequence[int]) -> np.ndarray:
        # Noise must not repeat the starts that the ascent began from: numbers that no channel has.
        climb = self._climb(next(iter(self.forms)))
        return climb.pictures(np.stack([climb.start((number - NOISE_PICTURES,)) for number in numbers]))

    def _natural(self, numbers: Sequence[int]) -> np.ndarray:
        return self.network.prepare([self.photos[number] for number in numbers], self.plan.size)

    def _own(self, means: Sequence[np.ndarray], bound: Bound) -> np.ndarray:
        """The objective `(n,)` of each picture that the means are of."""
        return values_of(means, [bound], self.masks[bound.form])[:, 0]

    def hint(self, bound: Bound) -> np.ndarray | None:
        """The photo that excites an objective most, if one does."""
        if not self.photos:
            return None
        answers = self._own(self.natural[bound.form], bound)
        best = int(np.argmax(answers))
        return self._natural([best])[0] if answers[best] > 0 else None

    def profiles(self, bounds: Sequence[Bound], courses: Sequence[Course]) -> list[np.ndarray]:
        """What each picture says to every channel of the objective's first layer, less what noise says: `(c,)` each."""
        found: list[np.ndarray] = [np.zeros(0)] * len(bounds)
        for form in self.forms:
            indices = [index for index, bound in enumerate(bounds) if bound.form == form]
            means = self._of(form, [courses[index] for index in indices])[0]
            usual = self.noise[form][0].mean(axis=0)
            for index, mean in zip(indices, means, strict=True):
                found[index] = (mean - usual).ravel()
        return found

    def _of(self, form: Any, courses: Sequence[Course]) -> list[np.ndarray]:
        def pictures(numbers: Sequence[int]) -> np.ndarray:
            return np.stack([courses[number].picture for number in numbers])

        return look_at(self._climb(form), pictures, len(courses), self.masks[form])

    def _moved(self, form: Any, courses: Sequence[Course], keys: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The same of each picture under `FRESH_DRAWS` transforms one after another."""

        def pictures(numbers: Sequence[int]) -> np.ndarray:
            return np.stack([courses[number // FRESH_DRAWS].picture for number in numbers])

        def fresh(number: int) -> np.ndarray:
            index, draw = divmod(number, FRESH_DRAWS)
            return FRESH.draw((self.plan.seed, *keys[index], -1), draw, FRESH_DRAWS, self.plan.size)

        return look_at(
            self._climb(form), pictures, len(courses) * FRESH_DRAWS, self.masks[form], fresh, self.plan.precision
        )

    def rows(self, wanted: Sequence[Wanted], bounds: Sequence[Bound], courses: Sequence[Course]) -> list[FilterRow]:
        """The verdict on each."""
        rows: dict[int, FilterRow] = {}
        for form in self.forms:
            indices = [index for index, bound in enumerate(bounds) if bound.form == form]
            mine = [courses[index] for index in indices]
            final, moved = self._of(form, mine), self._moved(form, mine, [wanted[index].key for index in indices])
            for place, index in enumerate(indices):
                own = slice(place * FRESH_DRAWS, (place + 1) * FRESH_DRAWS)
                activation = float(self._own([part[place : place + 1] for part in final], bounds[index])[0])
                held = float(self._own([part[own] for part in moved], bounds[index]).mean())
                rows[index] = self._row(wanted[index], bounds[index], courses[index], activation, held)
        return [rows[index] for index in range(len(bounds))]

    def _row(self, wanted: Wanted, bound: Bound, course: Course, activation: float, held: float) -> FilterRow:
        noise, natural = self._own(self.noise[bound.form], bound), self._own(self.natural[bound.form], bound)
        threshold = float(np.percentile(noise, PERCENTILE))
        if len(natural):
            threshold = max(threshold, float(np.percentile(natural, PERCENTILE)))
        status, reason = _verdict(activation, threshold, course, natural)
        best = int(np.argmax(natural)) if len(natural) else None
        photo = "" if best is None else self.photos[best].name
        return FilterRow(
            channel=bound.channel,
            activation=activation,
            activations=tuple(course.activations),
            status=status,
            reason=reason,
            threshold=threshold,
            name=_name(bound),
            transformed=held,
            natural=None if best is None else float(natural[best]),
            natural_photo=photo,
            variant=wanted.variant,
            tries=course.tries,
            steps=len(course.activations),
            begun=photo if course.note == FROM_PHOTO else "",
        )


def _name(bound: Bound) -> str:
    objective = Objective(tuple(term for term in bound.objective.terms if term.measure not in BESIDE))
    return str(objective)


def _verdict(final: float, threshold: float, course: Course, natural: np.ndarray) -> tuple[str, str]:
    beyond = f"the {PERCENTILE}th percentile of noise{' and of the photos' if len(natural) else ''} ({threshold:.3g})"
    if course.overflowed or not np.isfinite(final):
        return "weak", f"stopped at step {len(course.gradients)}: the activation left the range of finite numbers"
    if course.stuck:
        return _silent(course, natural)
    found = f", found {course.note}" if course.note else ""
    if final > threshold:
        return "alive", f"reaches {final:.3g}, above {beyond}{found}"
    return "weak", f"reaches {final:.3g} only, not above {beyond}{found}"


def _silent(course: Course, natural: np.ndarray) -> tuple[str, str]:
    """The verdict on a filter that no start could move."""
    reason = f"the gradient is zero everywhere from {course.tries} starts, so there is nothing to climb"
    excited = len(natural) > 0 and natural.max() > 0
    if course.lifted is not None:
        first, last = course.lifted
        does = "the picture raises" if last > first else "nothing raises"
        reason += f"; {does} what is before its non-linearity, from {first:.3g} to {last:.3g}"
    if excited:
        return "weak", f"{reason}; yet the photos reach {natural.max():.3g}"
    return "dead", reason + (f"; none of {len(natural)} photos excites it" if len(natural) else "")


# -- the result ------------------------------------------------------------------------------------------


def _result(
    plan: Plan,
    bounds: Sequence[Bound],
    courses: Sequence[Course],
    rows: Sequence[FilterRow],
) -> Filters:
    recipe = plan.recipe
    most = max((len(course.frames) for course in courses), default=0)
    # A filter that was done early stays as it is while the others go on.
    frames = [course.frames + [course.picture] * (most - len(course.frames)) for course in courses]
    return Filters(
        layer=bounds[0].form.slots[0].layer if _channels(bounds) else None,
        values=np.stack([course.picture for course in courses]),
        rows=tuple(rows),
        preprocessing=plan.network.preprocessing,
        crop=recipe.crop_for(min(plan.size)),
        look=recipe.look,
        alpha=_alpha(courses) if recipe.transparent else None,
        frames=np.stack([np.stack(one) for one in frames]) if most else None,
    )


def _channels(bounds: Sequence[Bound]) -> tuple[int, ...] | None:
    """The channels that are raised; None where one of the objectives is none."""
    found = [bound.channel for bound in bounds if bound.channel is not None]
    return tuple(found) if len(found) == len(bounds) else None


def _parameters(plan: Plan, bounds: Sequence[Bound]) -> FilterParameters:
    recipe = plan.recipe
    return FilterParameters(
        layer=bounds[0].form.slots[0].layer.path,
        channels=_channels(bounds),
        recipe=RecipeParameters(recipe.name, recipe.steps, _described(recipe)),
        size=plan.size,
        seed=plan.seed,
        batch=plan.batch,
        precision=plan.precision,
        frame_steps=tuple(kept_steps(recipe.steps, plan.frames)),
    )


def _details(network: Network, bounds: Sequence[Bound]) -> dict[str, Any]:
    """What describes the objectives further, for the provenance."""
    objectives = None if _channels(bounds) else [_name(bound) for bound in bounds]
    return {"objective": _objective_text(network, bounds[0]), "objectives": objectives}


def _described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, its parts with their kinds: two canvases may have fields of the same names."""
    parts = {name: getattr(recipe, name) for name in ("canvas", "rule", "transforms")}
    return {**asdict(recipe), **{name: None if part is None else _part(part) for name, part in parts.items()}}


def _part(part: Any) -> dict[str, Any]:
    """A canvas, a rule or transforms, perhaps of the user's own."""
    values = asdict(part) if is_dataclass(part) and not isinstance(part, type) else {"repr": repr(part)}
    return {"kind": type(part).__name__, **values}


def _directions(wanted: Sequence[Wanted]) -> list[dict[str, str]]:
    """The directions that objectives name, which their text leaves out."""
    terms = dict.fromkeys(term for item in wanted for term in item.objective.terms if term.direction is not None)
    return [{"layer": term.layer, "sha256": array_sha256(np.array(term.direction))} for term in terms]


def _alpha(courses: Sequence[Course]) -> np.ndarray:
    """Where each picture mattered, 0..1: its summed absolute gradients over their 99th percentile (2306.06805)."""
    heat = np.stack([course.heat for course in courses])
    high = np.percentile(heat, 99, axis=(1, 2), keepdims=True)
    return np.clip(heat / np.maximum(high, 1e-12), 0, 1).astype(np.float32)


def _objective_text(network: Network, bound: Bound) -> str:
    slot = bound.form.slots[0]
    if slot.layer.path in (LOGITS, network.head.undone):
        head = network.head
        before = f", before its {head.activation}" if head.activation else ""
        return f"the {head.score} of each unit{before}"
    return "mean of the channel without its border" if slot.layer.spatial else "the unit"
