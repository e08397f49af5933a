"""Gradient ascent on images: the compiled programs (`Plan`), and the loop that fills the batch slots (`ascend`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from convscope.arrays import resize_map
from convscope.binding import Binder, BoundObjective, ProgramKey
from convscope.errors import ModelError
from convscope.events import Advanced, ItemFinished, Progress, tell
from convscope.measures import INPUT, Arguments, Views
from convscope.networks import Network, Pass, Record, Run
from convscope.networks.foreign import Tensor
from convscope.objectives import Objective
from convscope.techniques.filters.parameterizations import Parameterization, generator, middle_and_half
from convscope.techniques.filters.recipes import Recipe
from convscope.techniques.filters.transforms import Affine

NOTHING = np.zeros((0, 0, 0), np.float32)
BATCH = 16
MEASURED_AT_ONCE = 16  # images that are measured together: no more memory than the ascent itself
# The transforms of the robustness test: gentler than those of the recipes, and drawn from other numbers.
FRESH = Affine(shift=1 / 16, scale=(0.95, 1.05), rotation=5.0)
FRESH_DRAWS = 2
SETTLED_OVER = 8  # steps without the recipe's gain after which a filter has settled


@dataclass(frozen=True)
class Plan:
    """The settings that all images of one call share.

    Attributes:
        network: the network.
        recipe: parameterization, optimizer, transforms and number of steps.
        size: `(h, w)` of the images.
        seed: random seed of start images and transforms.
        precision: "float32" or "bfloat16", of the passes through the network; parameterization and optimizer are always
            float32.
        batch: number of batch slots.
        frames: number of intermediate images to keep.
        progress: called with an event after each step, and for each run that is finished.
    """

    network: Network
    recipe: Recipe
    size: tuple[int, int]
    seed: int = 0
    precision: str = "float32"
    batch: int = BATCH
    frames: int = 0
    progress: Progress = None

    def bind(self, objective: Objective) -> BoundObjective:
        """The objective bound to the layers at `size`."""
        return Binder(self.network, self.size, self.recipe.border_for).bind(objective)

    def with_steps(self, steps: int) -> Plan:
        """The same with another number of steps."""
        return replace(self, recipe=replace(self.recipe, steps=steps))

    def start(self, key: Sequence[int]) -> np.ndarray:
        """The parameters that an image begins with; bit-equal for a (seed, key), on each backend and in any batch."""
        return self.recipe.parameterization.start(self.network, self.size, generator(self.seed, *key))

    def draw(self, key: Sequence[int], step: int) -> np.ndarray:
        """The numbers `(views, 8)` of a step's transforms."""
        if self.recipe.transforms is None:
            return np.zeros((0, 8), np.float32)
        return self.recipe.transforms.draw((self.seed, *key), step, self.recipe.steps, self.size)

    def images(self, parameters: np.ndarray) -> np.ndarray:
        """The images `(n, h, w, c)` of some parameters."""
        made = self.network.program(_drawing, self.recipe.parameterization, self.size)
        return self.network.numpy(made(self.network.tensor(parameters)))

    def image_of(self, parameters: Tensor) -> Tensor:
        """The same on tensors, inside a program."""
        return self.recipe.parameterization.image(self.network, parameters, self.size)

    def step(self, program: ProgramKey) -> Callable:
        """One compiled update; see `step_of`."""
        return self.network.program(_stepping, program, self.recipe, self.size, self.precision)

    def measuring(self, program: ProgramKey, moved: bool = False, precision: str = "float32") -> Callable:
        """Activations of images for each term: `measure(images, arguments[, draws]) -> list of (n, u, c)`."""
        return self.network.program(_measuring, program, moved, precision)


def _drawing(network: Network, parameterization: Parameterization, size: tuple[int, int]) -> Callable:
    return lambda run, parameters: parameterization.image(network, parameters, size)


def _stepping(network: Network, program: ProgramKey, recipe: Recipe, size: tuple[int, int], precision: str) -> Callable:
    """The parts of a plan that a step depends on."""
    return step_of(Plan(network, recipe, size, precision=precision), program)


def step_of(plan: Plan, program: ProgramKey) -> Callable:
    """One update: `step(run, parameters (n, ...), memory, heat (n, h, w), arguments, draws (n, views, 8))`.

    It returns the objective `(n,)` and the gradient's L2 norm `(n,)` before the step, then parameters, memory and heat
    (the sum of the image's absolute gradients) after it. Memory is the optimizer's; arguments are for each term the
    argument `(n, ...)` of its measure and the vectors `(n, c)` that weight its values.
    """
    network, recipe, ops = plan.network, plan.recipe, plan.network.ops

    def step(run: Run, parameters: Tensor, memory: Tensor, heat: Tensor, arguments: Arguments, draws: Tensor) -> tuple:
        def again(images: Tensor) -> Record:
            return _seen(network, program, run, _views(plan, images, draws), plan.precision)

        def score(given: tuple[Tensor, Tensor]) -> tuple:
            parameters, nothing = given
            images = plan.image_of(parameters) + nothing
            record = again(images)
            values = _values(plan, program, record, arguments)
            beside = _regularized(plan, program, images, record, again, arguments)
            # Relative to the objective, whose scale is not known beforehand.
            return ops.sum(values + ops.stop_gradient(ops.maximum(values, -values)) * beside), values

        # The gradient at a delta that is added to the images is the gradient at the images.
        nothing = ops.zeros((parameters.shape[0], *plan.size, network.inputs.channels), dtype="float32")
        (_, values), (gradient, at_images) = network.value_and_grad(score)((parameters, nothing))
        square = ops.sum(ops.square(gradient), axis=tuple(range(1, len(gradient.shape))), keepdims=True)
        parameters, *memory = recipe.optimizer.step(network, parameters, gradient, square, tuple(memory))
        heat = heat + ops.sum(ops.maximum(at_images, -at_images), axis=-1)
        return values, ops.sqrt(ops.reshape(square, (-1,))), parameters, tuple(memory), heat

    return step


def _views(plan: Plan, images: Tensor, draws: Tensor) -> Tensor:
    transforms = plan.recipe.transforms
    if transforms is None:
        return images
    middle, half = middle_and_half(plan.network)
    return transforms.apply(images, draws, middle, half, plan.network.ops)


def _seen(network: Network, program: ProgramKey, run: Run, images: Tensor, precision: str) -> Record:
    request = Pass(
        record=program.paths,
        preactivations=program.preactivations,
        stop=not program.scores,
        precision=precision,
        folded=network.folds_norms,
    )
    found = run(images, request)
    for path in program.paths:
        rows = found.activations[path].shape[0]
        if rows not in (None, images.shape[0]):  # windows of images: none of the rows is one image's
            raise ModelError(
                f"the layer {path} has {rows} rows of values for a batch of {images.shape[0]}: expected a row for each "
                "image. Choose another layer.",
                code="not-per-image",
                layer=path,
            )
    return Record(found.logits, {**found.activations, INPUT: images})


def _values(plan: Plan, program: ProgramKey, record: Record, arguments: Arguments) -> Tensor:
    """The objective of each image `(n,)`, the mean over its views."""
    ops, views, total = plan.network.ops, plan.recipe.views, None
    for spec, (given, vectors) in zip(program.specs, arguments, strict=True):
        if spec.measure.regularizer:
            continue
        given = ops.repeat(given, views, axis=0) if views > 1 else given
        means = spec.measure.reduce(ops, record, spec.layer, given)
        if views > 1:
            means = ops.mean(ops.reshape(means, (-1, views, means.shape[-1])), axis=1)
        value = ops.sum(means * vectors, axis=-1)
        total = value if total is None else total + value
    return total


def _regularized(
    plan: Plan,
    program: ProgramKey,
    images: Tensor,
    record: Record,
    again: Callable[[Tensor], Record],
    arguments: Arguments,
) -> Tensor:
    """The sum of the regularizers, which are raised too and are no part of the activation `(n,)`."""
    ops, total = plan.network.ops, 0.0
    if not any(spec.measure.regularizer for spec in program.specs):
        return total
    middle, half = (ops.convert_to_tensor(part.astype(np.float32)) for part in middle_and_half(plan.network))
    views = Views(ops, plan.recipe.views, (images - middle) / half, record, again)
    for spec, (given, vectors) in zip(program.specs, arguments, strict=True):
        if spec.measure.regularizer:
            total = total + ops.sum(vectors, axis=-1) * spec.measure.regularize(views, spec.layer, given)
    return total


def _measuring(network: Network, program: ProgramKey, moved: bool, precision: str) -> Callable:
    ops = network.ops

    def measure(run: Run, images: Tensor, arguments: Arguments, draws: Tensor = None) -> list[Tensor]:
        if moved:
            images = FRESH.apply(images, draws, *middle_and_half(network), ops)
        record, found = _seen(network, program, run, images, precision), []
        for spec, given in zip(program.specs, arguments, strict=True):
            if spec.measure.regularizer:
                found.append(ops.zeros((images.shape[0], 1, 1), dtype="float32"))
            else:
                found.append(spec.measure.means(ops, record, spec.layer, given))
        return found

    return measure


@dataclass(frozen=True)
class Moved:
    """Draws of `FRESH` for images that are transformed before they are measured.

    Attributes:
        draw: returns the draws `(1, 8)` of the image with a number.
    """

    draw: Callable[[int], np.ndarray]


def measured(
    plan: Plan,
    bounds: Sequence[BoundObjective],
    arguments: Sequence[np.ndarray],
    images: Callable[[Sequence[int]], np.ndarray],
    count: int,
    moved: Moved | None = None,
    precision: str = "float32",
    of: int = 0,
) -> list[np.ndarray]:
    """Activations of `count` prepared images for each term of one program's objectives: a list of `(count, u, c)`.

    Args:
        plan: the plan with the network.
        bounds: the objectives.
        arguments: for each term `(u, ...)`, as `distinct_arguments` gives them.
        images: returns the images `(n, h, w, c)` with some numbers, so that they need not be in memory together.
        count: number of images.
        moved: the transforms that are applied before.
        precision: precision of the passes.
        of: number of images measured altogether, in several calls: one compiled program serves all.
    """
    network, program, parts = plan.network, bounds[0].key, []
    measure = plan.measuring(program, moved is not None, precision)
    given = [network.tensor(argument) for argument in arguments]
    at_once = min(MEASURED_AT_ONCE, max(count, of, 1))
    for start in range(0, count, at_once):
        numbers = np.minimum(np.arange(start, start + at_once), count - 1).tolist()  # one shape
        more = [] if moved is None else [network.tensor(np.stack([moved.draw(number) for number in numbers]))]
        found = measure(network.tensor(images(numbers)), given, *more)
        parts.append([network.numpy(tensor) for tensor in found])
    if not parts:
        each = zip(bounds[0].vectors, arguments, strict=True)
        return [np.zeros((0, len(argument), len(vector)), np.float32) for vector, argument in each]
    return [np.concatenate(part)[:count] for part in zip(*parts, strict=True)]


# -- the loop --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """One image to make.

    Attributes:
        bound: the objective at the size of the plan.
        key: key of its random numbers, with the seed: the channel's number, and the variant's where there are several.
        variant: number of the image among several of one objective.
        group: images of one group are variants of one objective.
        image: `(h, w, c)` in the network's range that the ascent begins with instead of noise, and that regularizers
            compare with.
        start: `(h, w, c)` at the plan's size to begin with instead of either, from an ascent before.
        hint: returns an image that is known to excite it, for a start where noise has no gradient.
    """

    bound: BoundObjective
    key: tuple[int, ...]
    variant: int = 0
    group: int = 0
    image: np.ndarray | None = None
    start: np.ndarray | None = None
    hint: Callable[[], np.ndarray] | None = None


@dataclass(eq=False)
class Trace:
    """The record of one ascent run.

    Attributes:
        activations: the objective before each step, under the transforms of the step.
        gradients: L2 norm of the gradient at each step.
        image: the final image `(h, w, c)`.
        heat: sum of the image's absolute gradients `(h, w)`.
        frames: intermediate images.
        tries: number of starts that were tried.
        note: a remark on the start that was needed.
        from_image: the start that was needed is a natural image.
        lifted: where it has no gradient, the first and last value of its pre-activation, which it raises.
    """

    activations: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    image: np.ndarray = field(default_factory=lambda: NOTHING)
    heat: np.ndarray = field(default_factory=lambda: NOTHING)
    frames: list[np.ndarray] = field(default_factory=list)
    tries: int = 1
    note: str = ""
    from_image: bool = False
    lifted: tuple[float, float] | None = None

    @property
    def finished(self) -> bool:
        """True if there is an image."""
        return self.image.size > 0

    @property
    def has_no_gradient(self) -> bool:
        """True if the gradient was zero at the start."""
        return bool(self.gradients) and self.gradients[0] == 0

    @property
    def overflowed(self) -> bool:
        """True if the objective or its gradient left the range of finite numbers."""
        return bool(self.gradients) and not np.isfinite([self.gradients[-1], self.activations[-1]]).all()

    def forget(self) -> None:
        """Reset the trace for another start."""
        self.activations, self.gradients, self.frames = [], [], []

    def take(self, other: Trace, note: str, from_image: bool = False) -> None:
        """Take over all values of another trace of the same objective, and the description of its start."""
        self.activations, self.gradients, self.frames = other.activations, other.gradients, other.frames
        self.image, self.heat = other.image, other.heat
        self.note, self.from_image = note, from_image


def ascend(plan: Plan, jobs: Sequence[Job], traces: Sequence[Trace]) -> Iterator[int]:
    """Ascend for each job, `plan.batch` of them side by side: the numbers of those that are finished, as they finish.

    One compiled step serves all: objectives are arguments, and a batch slot that is done takes the next job. The
    result of an image does not depend on the others beside it.

    Args:
        plan: the settings of all runs.
        jobs: the images to make; their objectives have one program.
        traces: one for each job, empty; they are filled in.
    """
    slots = Slots(plan, jobs, traces)
    total = len(jobs) * plan.recipe.steps
    text = f"{jobs[0].bound.key.specs[0].layer.path}, {len(jobs)} filters"
    with plan.network.unchanging():
        while slots.busy:
            finished = slots.advance()
            done = slots.handed_in * plan.recipe.steps + sum(len(traces[job].gradients) for job in slots.in_work)
            for job in finished:
                trace = traces[job]
                yield job
                tell(plan.progress, ItemFinished(done, total, text, item=trace))
            tell(plan.progress, Advanced(done, total, text))


def kept_steps(steps: int, frames: int) -> list[int]:
    """The steps before which `frames` images are kept, evenly from the first to the last."""
    return sorted({round(step) for step in np.linspace(0, steps - 1, frames)})


def settled(activations: Sequence[float], gain: float) -> bool:
    """True if the mean of the last `SETTLED_OVER` values differs from that of those before by less than `gain`.

    An activation that falls has overshot and recovers: the run is not done.
    """
    if not gain or len(activations) < 2 * SETTLED_OVER:
        return False
    before, now = np.mean(activations[-2 * SETTLED_OVER : -SETTLED_OVER]), np.mean(activations[-SETTLED_OVER:])
    return bool(abs(now - before) < gain * abs(before))


class Slots:
    """The images that are made side by side: tensors of the framework, a row for each batch slot."""

    state: list[Tensor]
    arguments: tuple[tuple[Tensor, Tensor], ...]

    def __init__(self, plan: Plan, jobs: Sequence[Job], traces: Sequence[Trace]) -> None:
        self.plan, self.jobs, self.traces = plan, jobs, traces
        self.steps, self.handed_in = plan.recipe.steps, 0
        self.waiting = deque(range(len(jobs)))
        self.kept_at = set(kept_steps(self.steps, plan.frames))
        self.step = plan.step(jobs[0].bound.key)
        self.at = [self.waiting.popleft() for _ in range(min(plan.batch, len(jobs)))]
        self.at += [self.at[0]] * (plan.batch - len(self.at))  # filled up: one shape, one compile
        self.active = [index < len(jobs) for index in range(plan.batch)]
        start = np.stack([self._start(self.jobs[job]) for job in self.at])
        memory = plan.recipe.optimizer.init(start)
        heat = np.zeros((plan.batch, *plan.size), np.float32)
        self._place(start, memory, heat)

    @property
    def busy(self) -> bool:
        """True while a slot has a job."""
        return any(self.active)

    @property
    def in_work(self) -> set[int]:
        """The jobs that are in a slot now."""
        return {job for job, active in zip(self.at, self.active, strict=True) if active}

    def advance(self) -> list[int]:
        """One step of all slots; those that are done return their image and take the next job.

        Returns:
            the numbers of the jobs that are done.
        """
        if self.kept_at:
            self._keep_frames()
        draws = [self.plan.draw(self.jobs[job].key, min(self._done(job), self.steps - 1)) for job in self.at]
        values, norms, *self.state = self.step(*self.state, self.arguments, self._tensor(np.stack(draws)))
        values, norms = self._numpy(values), self._numpy(norms)
        finished = []
        for slot, job in enumerate(self.at):
            if self.active[slot]:
                self.traces[job].activations.append(float(values[slot]))
                self.traces[job].gradients.append(float(norms[slot]))
                if self._is_over(self.traces[job]):
                    finished.append(slot)
        done = [self.at[slot] for slot in finished]
        if finished:
            self._hand_in(finished)
            self.handed_in += len(done)
        return done

    def _is_over(self, trace: Trace) -> bool:
        return (
            len(trace.gradients) >= self.steps
            or trace.has_no_gradient
            or trace.overflowed
            or settled(trace.activations, self.plan.recipe.settle)
        )

    def _done(self, job: int) -> int:
        return len(self.traces[job].gradients)

    def _start(self, job: Job) -> np.ndarray:
        """The parameters that a job begins with."""
        if job.start is None:
            return self.plan.start(job.key)
        return self.plan.recipe.parameterization.parameters(self.plan.network, job.start[None])[0]

    def _place(self, parameters: np.ndarray, memory: Sequence[np.ndarray], heat: np.ndarray) -> None:
        self.state = [self._tensor(parameters), tuple(map(self._tensor, memory)), self._tensor(heat)]
        bounds = [self.jobs[job].bound for job in self.at]
        self.arguments = tuple(
            (self._tensor(self._arguments(place)), self._tensor(np.stack([bound.vectors[place] for bound in bounds])))
            for place in range(len(bounds[0].arguments))
        )

    def _arguments(self, place: int) -> np.ndarray:
        """The arguments of one term, a row for each slot."""
        found = []
        for slot, number in enumerate(self.at):
            job = self.jobs[number]
            group = job.group if self.active[slot] else -1 - slot  # a slot that only fills up belongs to no group
            image = None if job.image is None else resized(job.image, self.plan.size)
            found.append(job.bound.key.specs[place].measure.argument(job.bound.arguments[place], image, group))
        return np.stack(found)

    def _keep_frames(self) -> None:
        wanted = [i for i, t in enumerate(self.at) if self.active[i] and self._done(t) in self.kept_at]
        if wanted:
            images = self.plan.images(self._numpy(self.state[0]))
            for slot in wanted:
                self.traces[self.at[slot]].frames.append(images[slot])

    def _hand_in(self, finished: Sequence[int]) -> None:
        parameters, memory, heat = (
            self._numpy(self.state[0]),
            [*map(self._numpy, self.state[1])],
            self._numpy(self.state[2]),
        )
        parameters, memory, heat = parameters.copy(), [array.copy() for array in memory], heat.copy()
        images = self.plan.images(parameters)
        for slot in finished:
            trace = self.traces[self.at[slot]]
            trace.image, trace.heat = images[slot].copy(), heat[slot].copy()
            self.active[slot] = bool(self.waiting)
            if self.waiting:
                self.at[slot] = self.waiting.popleft()
                parameters[slot] = self._start(self.jobs[self.at[slot]])
                fresh = self.plan.recipe.optimizer.init(parameters[slot : slot + 1])
                for array, begun in zip(memory, fresh, strict=True):
                    array[slot] = begun[0]
                heat[slot] = 0
        if self.busy:
            self._place(parameters, memory, heat)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self.plan.network.tensor(array)

    def _numpy(self, tensor: Tensor) -> np.ndarray:
        return self.plan.network.numpy(tensor)


def resized(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """An image `(h, w, c)` brought to another size."""
    if image.shape[:2] == tuple(size):
        return image
    return np.stack([resize_map(image[..., k], *size) for k in range(image.shape[-1])], axis=-1)


def before_nonlinearity(jobs: Sequence[Job], preactivations: tuple[str, ...]) -> list[Job]:
    """The jobs with the non-linearities at the paths `preactivations` left out."""
    found = []
    for job in jobs:
        bound = job.bound
        key = replace(bound.key, preactivations=preactivations)
        found.append(replace(job, bound=replace(bound, key=key)))
    return found
