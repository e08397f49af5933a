"""Gradient ascent on pictures: what is compiled (`Climb`), and the loop that keeps its lanes full (`ascend`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from convscope.events import Advanced, ItemFinished, Progress, tell
from convscope.networks import Network
from convscope.techniques.filters.canvas import generator, middle_and_half
from convscope.techniques.filters.objectives import BESIDE, Bound, Form
from convscope.techniques.filters.recipes import Recipe
from convscope.techniques.filters.transforms import Affine

Tensor = Any
NOTHING = np.zeros((0, 0, 0), np.float32)
LOOKED_AT = 16  # pictures that are looked at together: no more memory than the ascent itself
# What a picture has to withstand afterwards: gentler than what the recipes do, and drawn from other numbers.
FRESH = Affine(shift=1 / 16, scale=(0.95, 1.05), rotation=5.0)
FRESH_DRAWS = 2
SETTLED_OVER = 8  # steps without the recipe's gain after which a filter has settled


@dataclass(frozen=True)
class Climb:
    """What is climbed and how: everything that a compiled step depends on.

    Attributes:
        network: to climb in.
        form: what the objectives have in common.
        recipe: canvas, rule, transforms and number of steps.
        size: `(h, w)` of the pictures.
        seed: of start pictures and transforms.
        precision: "float32" or "bfloat16", of the passes through the network; canvas and rule are always float32.
    """

    network: Network
    form: Form
    recipe: Recipe
    size: tuple[int, int]
    seed: int = 0
    precision: str = "float32"

    def start(self, key: Sequence[int]) -> np.ndarray:
        """The parameters that a picture begins with; bit-equal for a (seed, key), on each backend and in any batch."""
        return self.recipe.canvas.start(self.network, self.size, generator(self.seed, *key))

    def draw(self, key: Sequence[int], step: int) -> np.ndarray:
        """The numbers `(views, 8)` of a step's transforms."""
        if self.recipe.transforms is None:
            return np.zeros((0, 8), np.float32)
        return self.recipe.transforms.draw((self.seed, *key), step, self.recipe.steps, self.size)

    def pictures(self, parameters: np.ndarray) -> np.ndarray:
        """The pictures `(n, h, w, c)` that parameters stand for."""
        key = ("canvas", self.recipe.canvas, self.size, self.network.preprocessing)
        made = self.network.program(key, lambda: self.network.compile(lambda run, p: self.picture_of(p)))
        return self.network.numpy(made(self.network.tensor(parameters)))

    def picture_of(self, parameters: Tensor) -> Tensor:
        """The same on tensors, inside a program."""
        return self.recipe.canvas.picture(self.network, parameters, self.size)

    def step(self) -> Callable:
        """One compiled update; see `step_of`."""
        key = ("ascent", self.form, self.recipe, self.size, self.network.preprocessing, self.precision)
        return self.network.program(key, lambda: self.network.compile(step_of(self)))

    def look(self, moved: bool = False, precision: str = "float32") -> Callable:
        """What pictures say to each slot: `look(pictures, masks[, draws]) -> list of (n, u, c)`."""
        key = ("look", self.form, self.size, moved, self.network.preprocessing, precision)
        return self.network.program(key, lambda: self.network.compile(_looking(self, moved, precision)))


def step_of(climb: Climb) -> Callable:
    """One update: `step(run, canvas (n, ...), memory, heat (n, h, w), arguments, draws (n, views, 8))`.

    It returns the objective `(n,)` and the gradient's L2 norm `(n,)` before the step, then canvas, memory and heat (the
    sum of the picture's absolute gradients) after it. Memory is the rule's; arguments are for each slot the masks
    `(n, h, w)` and vectors `(n, c)` of the objectives.
    """
    network, recipe, ops = climb.network, climb.recipe, climb.network.ops

    def step(run: Callable, canvas: Tensor, memory: Any, heat: Tensor, arguments: Any, draws: Tensor) -> tuple:
        def score(given: tuple[Tensor, Tensor]) -> tuple:
            parameters, nothing = given
            pictures = climb.picture_of(parameters) + nothing
            seen = _seen(climb, run, _views(climb, pictures, draws), climb.precision)
            values = _values(climb, seen, arguments)
            beside = _beside(climb, run, seen, arguments, draws)
            # Relative to what is raised, whose scale no one knows beforehand.
            return ops.sum(values + ops.stop_gradient(ops.maximum(values, -values)) * beside), values

        # The gradient at what is added to the pictures is the one at the pictures.
        nothing = ops.zeros((canvas.shape[0], *climb.size, network.inputs.channels), dtype="float32")
        (_, values), (gradient, slope) = network.value_and_grad(score)((canvas, nothing))
        square = ops.sum(ops.square(gradient), axis=tuple(range(1, len(gradient.shape))), keepdims=True)
        canvas, *memory = recipe.rule.move(network, canvas, gradient, square, tuple(memory))
        heat = heat + ops.sum(ops.maximum(slope, -slope), axis=-1)
        return values, ops.sqrt(ops.reshape(square, (-1,))), canvas, tuple(memory), heat

    return step


def _views(climb: Climb, pictures: Tensor, draws: Tensor) -> Tensor:
    transforms = climb.recipe.transforms
    if transforms is None:
        return pictures
    middle, half = middle_and_half(climb.network)
    return transforms.apply(pictures, draws, middle, half, climb.network.ops)


def _seen(climb: Climb, run: Callable, pictures: Tensor, precision: str) -> list[Tensor]:
    form = climb.form
    options = {"linear": form.linear, "precision": precision, "folded": True}
    return form.maps(run(pictures, record=form.paths, outputs=form.scores, **options))


def _values(climb: Climb, seen: Sequence[Tensor], arguments: Any) -> Tensor:
    """The objective of each picture `(n,)`, the mean over its views."""
    ops, views, total = climb.network.ops, climb.recipe.views, None
    for slot, activation, (masks, vectors) in zip(climb.form.slots, seen, arguments, strict=True):
        if slot.measure in BESIDE:
            continue
        masks = ops.repeat(masks, views, axis=0) if views > 1 else masks
        means = slot.reduce(activation, masks, ops)
        if views > 1:
            means = ops.mean(ops.reshape(means, (-1, views, means.shape[-1])), axis=1)
        value = ops.sum(means * vectors, axis=-1)
        total = value if total is None else total + value
    return total


def _beside(climb: Climb, run: Callable, seen: Sequence[Tensor], arguments: Any, draws: Tensor) -> Tensor:
    """What is raised too and is no part of the activation `(n,)`: see `objectives.BESIDE`."""
    ops, total = climb.network.ops, 0.0
    for place, slot in enumerate(climb.form.slots):
        # In the place of a mask is the photo, or the number of the group that a picture belongs to.
        other, vectors = arguments[place]
        if slot.measure == "diversity":
            measured = _unlikeness(climb, seen[place], other[:, 0, 0])
        elif slot.measure == "likeness":
            photos = _seen(climb, run, _views(climb, other, draws), climb.precision)[place]
            measured = _nearness(climb, seen[place], ops.stop_gradient(photos))
        else:
            continue
        total = total + ops.sum(vectors, axis=-1) * measured
    return total


def _nearness(climb: Climb, activation: Tensor, photos: Tensor) -> Tensor:
    """Minus the squared distance `(n,)` of maps from those of the photo, as a share of the photo's square."""
    ops, axes = climb.network.ops, tuple(range(1, len(activation.shape)))
    apart = ops.sum(ops.square(activation - photos), axis=axes)
    share = apart / ops.maximum(ops.sum(ops.square(photos), axis=axes), 1e-12)
    return -ops.mean(ops.reshape(share, (-1, climb.recipe.views)), axis=-1)


def _unlikeness(climb: Climb, activation: Tensor, groups: Tensor) -> Tensor:
    """Minus the mean cosine `(n,)` of a picture's Gram matrix with those of the others of its group."""
    ops, views = climb.network.ops, climb.recipe.views
    flat = ops.reshape(activation, (activation.shape[0], -1, activation.shape[-1]))
    grams = ops.einsum("npc,npd->ncd", flat, flat)
    grams = ops.reshape(grams, (grams.shape[0] // views, views, -1))
    grams = ops.mean(grams, axis=1)
    grams = grams * ops.rsqrt(ops.maximum(ops.sum(ops.square(grams), axis=-1, keepdims=True), 1e-12))
    together = ops.cast(ops.equal(groups[:, None], groups[None, :]), "float32")
    others = together * ops.convert_to_tensor(1 - np.eye(grams.shape[0], dtype=np.float32))
    count = ops.maximum(ops.sum(others, axis=-1), 1.0)
    return -ops.sum(others * ops.einsum("nd,md->nm", grams, grams), axis=-1) / count


def _looking(climb: Climb, moved: bool, precision: str) -> Callable:
    network, ops = climb.network, climb.network.ops

    def look(run: Callable, pictures: Tensor, masks: Any, draws: Tensor = None) -> list[Tensor]:
        if moved:
            pictures = FRESH.apply(pictures, draws, *middle_and_half(network), ops)
        seen = _seen(climb, run, pictures, precision)
        return [slot.means(a, m, ops) for slot, a, m in zip(climb.form.slots, seen, masks, strict=True)]

    return look


def look_at(
    climb: Climb,
    pictures: Callable[[Sequence[int]], np.ndarray],
    count: int,
    masks: Sequence[np.ndarray],
    fresh: Callable[[int], np.ndarray] | None = None,
    precision: str = "float32",
) -> list[np.ndarray]:
    """What `count` prepared pictures say to each slot of the form: a list of `(count, u, c)`.

    Args:
        climb: whose network and form.
        pictures: gives those of some numbers `(n, h, w, c)`, so that many need not be in memory together.
        count: how many.
        masks: for each slot `(u, h, w)`.
        fresh: gives the draws `(1, 8)` of `FRESH` for a number, where the pictures are to be moved before.
        precision: that the network is passed in.
    """
    network, look, parts = climb.network, climb.look(fresh is not None, precision), []
    weights = [network.tensor(mask) for mask in masks]
    for start in range(0, count, LOOKED_AT):
        numbers = np.minimum(np.arange(start, start + min(LOOKED_AT, count)), count - 1).tolist()  # one shape
        more = [] if fresh is None else [network.tensor(np.stack([fresh(number) for number in numbers]))]
        found = look(network.tensor(pictures(numbers)), weights, *more)
        parts.append([network.numpy(tensor) for tensor in found])
    if not parts:
        slots = zip(climb.form.slots, masks, strict=True)
        return [np.zeros((0, len(mask), slot.layer.channels), np.float32) for slot, mask in slots]
    return [np.concatenate(part)[:count] for part in zip(*parts, strict=True)]


# -- the loop --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """One picture to make.

    Attributes:
        bound: the objective.
        key: with the seed, of its start and its transforms: the channel's number, and the variant's where there are
            several.
        start: the parameters to begin with; drawn for the key where None.
        group: pictures of one group are kept unlike each other, where the objective has a term of diversity.
        photo: `(h, w, c)` in the network's range, which the picture stays near where the objective has a term of
            likeness.
    """

    bound: Bound
    key: tuple[int, ...]
    start: np.ndarray | None = None
    group: int = 0
    photo: np.ndarray | None = None


@dataclass(eq=False)
class Course:
    """How one picture was made.

    Attributes:
        activations: the objective before each step, under the transforms of the step.
        gradients: L2 norm of the gradient at each step.
        parameters: of the canvas in the end; picture: the final one `(h, w, c)`.
        heat: sum of the picture's absolute gradients `(h, w)`.
        frames: pictures on the way.
        tries: starts that were tried.
        note: what had to be done to find it.
        lifted: where nothing could be climbed, the first and last value of what is before the non-linearity, which the
            picture raises instead.
    """

    activations: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    parameters: np.ndarray = field(default_factory=lambda: NOTHING)
    picture: np.ndarray = field(default_factory=lambda: NOTHING)
    heat: np.ndarray = field(default_factory=lambda: NOTHING)
    frames: list[np.ndarray] = field(default_factory=list)
    tries: int = 1
    note: str = ""
    lifted: tuple[float, float] | None = None

    @property
    def finished(self) -> bool:
        """True if there is a picture."""
        return self.picture.size > 0

    @property
    def stuck(self) -> bool:
        """True if there was nothing to climb from the start."""
        return bool(self.gradients) and self.gradients[0] == 0

    @property
    def overflowed(self) -> bool:
        """True if the objective or its gradient left the range of finite numbers."""
        return bool(self.gradients) and not np.isfinite([self.gradients[-1], self.activations[-1]]).all()

    def forget(self) -> None:
        """Begin again."""
        self.activations, self.gradients, self.frames = [], [], []

    def take(self, other: Course, note: str) -> None:
        """Become what another course of the same objective is."""
        self.activations, self.gradients, self.frames = other.activations, other.gradients, other.frames
        self.parameters, self.picture, self.heat, self.note = other.parameters, other.picture, other.heat, note


def ascend(
    climb: Climb, tasks: Sequence[Task], courses: list[Course], batch: int, frames: int = 0, progress: Progress = None
) -> None:
    """Climb for each task, `batch` of them side by side in lanes; `courses` are filled in as they finish.

    One compiled step serves all: objectives are arguments, and a lane that is done goes on with the next task. What a
    picture becomes does not depend on which others are beside it.

    Args:
        climb: what and how.
        tasks: what for; of one form.
        courses: one for each task, empty.
        batch: number of lanes.
        frames: pictures to keep on the way, evenly over the steps.
        progress: called with an event after each step, and for each run that is finished.
    """
    lanes = _Lanes(climb, tasks, courses, batch, frames)
    total = len(tasks) * climb.recipe.steps
    text = f"{tasks[0].bound.form.slots[0].layer.path}, {len(tasks)} filters"
    with climb.network.unchanging():
        while lanes.busy:
            before = [course.finished for course in courses]
            lanes.advance()
            done = sum(len(course.gradients) if not course.finished else climb.recipe.steps for course in courses)
            for was, course in zip(before, courses, strict=True):
                if course.finished and not was:
                    tell(progress, ItemFinished(done, total, text, item=course))
            tell(progress, Advanced(done, total, text))


def kept_steps(steps: int, frames: int) -> list[int]:
    """The steps before which `frames` pictures are kept, evenly from the first to the last."""
    return sorted({round(step) for step in np.linspace(0, steps - 1, frames)})


def settled(activations: Sequence[float], gain: float) -> bool:
    """True if the mean of the last `SETTLED_OVER` values differs from that of those before by less than `gain`.

    One that falls has overshot, and comes back: it is not done.
    """
    if not gain or len(activations) < 2 * SETTLED_OVER:
        return False
    before, now = np.mean(activations[-2 * SETTLED_OVER : -SETTLED_OVER]), np.mean(activations[-SETTLED_OVER:])
    return bool(abs(now - before) < gain * abs(before))


class _Lanes:
    """The pictures that are climbed side by side: tensors of the framework, a row for each lane."""

    state: list[Any]
    arguments: tuple[tuple[Tensor, Tensor], ...]

    def __init__(self, climb: Climb, tasks: Sequence[Task], courses: list[Course], batch: int, frames: int) -> None:
        self.climb, self.tasks, self.courses = climb, tasks, courses
        self.steps = climb.recipe.steps
        self.waiting = deque(range(len(tasks)))
        self.kept_at = set(kept_steps(self.steps, frames))
        self.step = climb.step()
        self.at = [self.waiting.popleft() for _ in range(min(batch, len(tasks)))]
        self.at += [self.at[0]] * (batch - len(self.at))  # filled up: one shape, one compile
        self.active = [index < len(tasks) for index in range(batch)]
        start = np.stack([self._start(task) for task in self.at])
        memory = climb.recipe.rule.begin(start)
        heat = np.zeros((batch, *climb.size), np.float32)
        self._place(start, memory, heat)

    @property
    def busy(self) -> bool:
        """True while a lane has something to do."""
        return any(self.active)

    def advance(self) -> None:
        """One step of all lanes; those that are done hand in their picture and take the next task."""
        if self.kept_at:
            self._keep_frames()
        draws = [self.climb.draw(self.tasks[task].key, min(self._done(task), self.steps - 1)) for task in self.at]
        values, norms, *self.state = self.step(*self.state, self.arguments, self._tensor(np.stack(draws)))
        values, norms = self._numpy(values), self._numpy(norms)
        finished = []
        for lane, task in enumerate(self.at):
            if self.active[lane]:
                self.courses[task].activations.append(float(values[lane]))
                self.courses[task].gradients.append(float(norms[lane]))
                if self._is_over(self.courses[task]):
                    finished.append(lane)
        if finished:
            self._hand_in(finished)

    def _is_over(self, course: Course) -> bool:
        done = len(course.gradients)
        return (
            done >= self.steps
            or course.stuck
            or course.overflowed
            or settled(course.activations, self.climb.recipe.settle)
        )

    def _done(self, task: int) -> int:
        return len(self.courses[task].gradients)

    def _start(self, task: int) -> np.ndarray:
        begun = self.tasks[task].start
        return self.climb.start(self.tasks[task].key) if begun is None else begun

    def _place(self, canvas: np.ndarray, memory: Sequence[np.ndarray], heat: np.ndarray) -> None:
        self.state = [self._tensor(canvas), tuple(map(self._tensor, memory)), self._tensor(heat)]
        bounds = [self.tasks[task].bound for task in self.at]
        self.arguments = tuple(
            (self._tensor(self._masks(slot, bounds)), self._tensor(np.stack([b.vectors[slot] for b in bounds])))
            for slot in range(len(bounds[0].masks))
        )

    def _masks(self, slot: int, bounds: Sequence[Bound]) -> np.ndarray:
        if self.climb.form.slots[slot].measure == "likeness":
            return np.stack([photo for task in self.at if (photo := self.tasks[task].photo) is not None])
        masks = np.stack([bound.masks[slot] for bound in bounds])
        if self.climb.form.slots[slot].measure == "diversity":
            # A lane that only fills up belongs to no group.
            groups = [self.tasks[task].group if self.active[lane] else -1 - lane for lane, task in enumerate(self.at)]
            masks[:] = np.asarray(groups, np.float32).reshape(-1, *[1] * (masks.ndim - 1))
        return masks

    def _keep_frames(self) -> None:
        wanted = [i for i, t in enumerate(self.at) if self.active[i] and self._done(t) in self.kept_at]
        if wanted:
            pictures = self.climb.pictures(self._numpy(self.state[0]))
            for lane in wanted:
                self.courses[self.at[lane]].frames.append(pictures[lane])

    def _hand_in(self, finished: Sequence[int]) -> None:
        canvas, memory, heat = (
            self._numpy(self.state[0]),
            [*map(self._numpy, self.state[1])],
            self._numpy(self.state[2]),
        )
        canvas, memory, heat = canvas.copy(), [array.copy() for array in memory], heat.copy()
        pictures = self.climb.pictures(canvas)
        for lane in finished:
            course = self.courses[self.at[lane]]
            course.parameters, course.heat = canvas[lane].copy(), heat[lane].copy()
            course.picture = pictures[lane].copy()
            self.active[lane] = bool(self.waiting)
            if self.waiting:
                self.at[lane] = self.waiting.popleft()
                canvas[lane] = self._start(self.at[lane])
                for array, begun in zip(memory, self.climb.recipe.rule.begin(canvas[lane : lane + 1]), strict=True):
                    array[lane] = begun[0]
                heat[lane] = 0
        if self.busy:
            self._place(canvas, memory, heat)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self.climb.network.tensor(array)

    def _numpy(self, tensor: Tensor) -> np.ndarray:
        return self.climb.network.numpy(tensor)


def lifted(climb: Climb, linear: tuple[str, ...], steps: int) -> Climb:
    """The climb on what comes before the non-linearities at the paths `linear`."""
    form = replace(climb.form, linear=linear)
    return replace(climb, form=form, recipe=replace(climb.recipe, steps=steps))
