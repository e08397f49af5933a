"""From objectives to finished pictures: sizes one after another, filters that are stuck, memory that runs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.events import Progress
from convscope.imaging import resize_map
from convscope.networks import Layer, Network
from convscope.techniques.filters.ascent import Climb, Course, Task, ascend, lifted
from convscope.techniques.filters.objectives import Bound, Objective, bind
from convscope.techniques.filters.recipes import Recipe

FROM_PHOTO = "from a photo"
TRIES = 3  # starts of a filter that has no gradient
LIFTED_STEPS = 16  # before its own non-linearity, as lucid lets gradients through for 16 steps
BATCH = 16
LEAST_CELLS = 4  # of a map's side, for a smaller size to be worth a step


@dataclass(frozen=True)
class Plan:
    """How all pictures of one call are made.

    Attributes:
        network, recipe, seed, precision: as for `Climb`.
        size: `(h, w)` of the final pictures.
        batch: lanes side by side.
        frames: pictures to keep on the way.
        progress: called after each step.
    """

    network: Network
    recipe: Recipe
    size: tuple[int, int]
    seed: int = 0
    precision: str = "float32"
    batch: int = BATCH
    frames: int = 0
    progress: Progress = None

    def bind(self, objective: Objective, size: tuple[int, int] | None = None) -> Bound:
        """The objective on the layers as they are at `size`."""
        layers: dict[str, Layer] = {la.path: la for la in self.network.layers_at(size or self.size)}
        return bind(self.network, objective, layers, self.recipe.border_for)

    def climb(self, bound: Bound) -> Climb:
        """At the final size."""
        return Climb(self.network, bound.form, self.recipe, self.size, self.seed, self.precision)


@dataclass(frozen=True, eq=False)
class Goal:
    """One picture that is wanted.

    Attributes:
        bound: the objective at the final size.
        key: of its random numbers, with the seed.
        start: a picture `(h, w, c)` in the network's range to begin with, instead of noise.
        group: see `Task.group`.
        hint: a picture that is known to excite it, for a start where noise does not.
    """

    bound: Bound
    key: tuple[int, ...]
    start: np.ndarray | None = None
    group: int = 0
    hint: np.ndarray | None = None


def pursue(plan: Plan, goals: Sequence[Goal], courses: list[Course]) -> None:
    """Make the picture of each goal; `courses`, one for each and empty, are filled in as they finish."""
    by_form: dict[object, list[int]] = {}
    for index, goal in enumerate(goals):
        by_form.setdefault(goal.bound.form, []).append(index)
    for indices in by_form.values():
        part = [goals[index] for index in indices]
        made = [courses[index] for index in indices]
        starts = _smaller_sizes(plan, part)
        _climb(plan, part, made, starts)


def _climb(plan: Plan, goals: Sequence[Goal], courses: list[Course], starts: Sequence[np.ndarray | None]) -> None:
    """At the final size, from the pictures `starts` or from noise; then again for those that were stuck."""
    climb = plan.climb(goals[0].bound)
    last = replace(climb, recipe=_with_steps(plan.recipe, _steps(plan, goals)[-1]))
    tasks = [_task(plan, goal, start) for goal, start in zip(goals, starts, strict=True)]
    _ascend(plan, last, tasks, courses)
    stuck = [index for index, course in enumerate(courses) if course.stuck]
    if stuck:
        _free(plan, climb, [goals[index] for index in stuck], [courses[index] for index in stuck])


def _task(plan: Plan, goal: Goal, picture: np.ndarray | None) -> Task:
    start = None if picture is None else plan.recipe.canvas.of(plan.network, picture[None])[0]
    photo = None if goal.start is None else _resized(goal.start, plan.size)
    return Task(goal.bound, goal.key, start, goal.group, photo)


def _ascend(plan: Plan, climb: Climb, tasks: Sequence[Task], courses: list[Course]) -> None:
    """`ascend` for what is not finished yet, with half as many lanes each time that the memory runs out."""
    batch = plan.batch
    grouped = any(slot.measure == "diversity" for slot in climb.form.slots)
    while True:
        left = [index for index, course in enumerate(courses) if not course.finished]
        try:
            return ascend(
                climb,
                [tasks[index] for index in left],
                [courses[index] for index in left],
                batch if grouped else min(batch, len(left)),
                plan.frames,
                plan.progress,
            )
        except Exception as error:
            if batch == 1 or grouped or not plan.network.out_of_memory(error):
                raise
            batch //= 2
            for index in left:
                if not courses[index].finished:
                    courses[index].forget()


# -- smaller sizes first ---------------------------------------------------------------------------------


def _steps(plan: Plan, goals: Sequence[Goal]) -> list[int]:
    """How many of the steps belong to each of the sizes that can be used."""
    octaves = _octaves(plan, goals)
    shares = np.array([share for _, share in octaves])
    steps = np.maximum(1, np.round(plan.recipe.steps * shares / shares.sum())).astype(int)
    return steps.tolist()


def _octaves(plan: Plan, goals: Sequence[Goal]) -> list[tuple[float, float]]:
    """The recipe's sizes that these objectives allow: a place means another one, and a dense layer takes one size."""
    whole = plan.recipe.octaves[-1]
    bound = goals[0].bound
    free = not bound.form.scores and all(term.place is None for goal in goals for term in goal.bound.objective.terms)
    if not free or len(plan.recipe.octaves) == 1:
        return [whole]
    return [octave for octave in plan.recipe.octaves[:-1] if _fits(plan, bound, octave[0])] + [whole]


def _fits(plan: Plan, bound: Bound, fraction: float) -> bool:
    layers = {layer.path: layer for layer in plan.network.layers_at(_at(plan.size, fraction))}
    found = [layers.get(path) for path in bound.form.paths]
    return all(layer is not None and layer.spatial and min(layer.shape[:2]) >= LEAST_CELLS for layer in found)


def _at(size: tuple[int, int], fraction: float) -> tuple[int, int]:
    return max(1, round(size[0] * fraction)), max(1, round(size[1] * fraction))


def _smaller_sizes(plan: Plan, goals: Sequence[Goal]) -> list[np.ndarray | None]:
    """The pictures to begin with at the final size, from the recipe's smaller sizes where it has some."""
    octaves, steps = _octaves(plan, goals), _steps(plan, goals)
    starts = [goal.start for goal in goals]
    for (fraction, _), count in zip(octaves[:-1], steps, strict=False):
        size = _at(plan.size, fraction)
        small = replace(plan, size=size, recipe=_with_steps(plan.recipe, count), frames=0)
        bounds = [small.bind(goal.bound.objective, size) for goal in goals]
        parts = [replace(goal, bound=bound) for goal, bound in zip(goals, bounds, strict=True)]
        courses = [Course() for _ in goals]
        tasks = [_task(small, goal, start) for goal, start in zip(parts, _at_size(small, parts, starts), strict=True)]
        _ascend(small, small.climb(bounds[0]), tasks, courses)
        starts = [start if course.stuck else course.picture for course, start in zip(courses, starts, strict=True)]
    return _at_size(plan, goals, starts)


def _at_size(plan: Plan, goals: Sequence[Goal], starts: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """Pictures brought to the plan's size; to those that began as a photo goes what it shows at this size only."""
    found: list[np.ndarray | None] = []
    for goal, start in zip(goals, starts, strict=True):
        if start is None or goal.start is None:
            found.append(None if start is None else _grown(plan.recipe, start, plan.size))
            continue
        coarse = _resized(_resized(goal.start, start.shape[:2]), plan.size)
        found.append(_resized(start, plan.size) + _resized(goal.start, plan.size) - coarse)
    return found


def _resized(picture: np.ndarray, size: Sequence[int]) -> np.ndarray:
    if picture.shape[:2] == tuple(size):
        return picture
    return np.stack([resize_map(picture[..., k], *size) for k in range(picture.shape[-1])], axis=-1)


def _grown(recipe: Recipe, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture brought to another size: enlarged, or with its mirror images around it, which keeps its scale."""
    if recipe.grow == "resize" or size[0] < picture.shape[0] or size[1] < picture.shape[1]:
        return _resized(picture, size)
    missing = [side - have for side, have in zip(size, picture.shape, strict=False)]
    around = [(lack // 2, lack - lack // 2) for lack in missing]
    return np.pad(picture, [*around, (0, 0)], mode="symmetric")


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    return replace(recipe, steps=steps)


# -- filters without a gradient --------------------------------------------------------------------------


def _free(plan: Plan, climb: Climb, goals: Sequence[Goal], courses: list[Course]) -> None:
    """New starts for filters whose gradient is zero: from before their non-linearity, from other seeds, from a photo.

    Where all fail and there is something before the non-linearity, the picture is what raises that.
    """
    linear = plan.network.linearisable(climb.form.paths[0]) if len(climb.form.paths) == 1 else ()
    # From the same seed again only where something before the non-linearity can be raised first.
    attempts = range(TRIES) if linear else range(1, TRIES)
    for tries, attempt in enumerate(attempts, start=2):
        left = [index for index, course in enumerate(courses) if course.stuck]
        if not left:
            return
        part = [_of_another_seed(goals[index], attempt) for index in left]
        starts = _lifted_starts(plan, climb, part, linear, LIFTED_STEPS * 2**attempt) if linear else None
        _again(plan, climb, part, [courses[index] for index in left], starts, tries)
    left = [index for index, course in enumerate(courses) if course.stuck and goals[index].hint is not None]
    if left:
        hints = [goals[index].hint for index in left]
        _again(plan, climb, [goals[i] for i in left], [courses[i] for i in left], hints, len(attempts) + 2, FROM_PHOTO)
    left = [index for index, course in enumerate(courses) if course.stuck]
    if left and linear:
        _raise_what_is_before(plan, climb, [goals[i] for i in left], [courses[i] for i in left], linear)


def _of_another_seed(goal: Goal, attempt: int) -> Goal:
    return replace(goal, key=(*goal.key, attempt)) if attempt else goal


def _lifted_starts(
    plan: Plan, climb: Climb, goals: Sequence[Goal], linear: tuple[str, ...], steps: int
) -> list[np.ndarray | None]:
    """Pictures that some steps on the pre-activation lead to."""
    courses = [Course() for _ in goals]
    lower = replace(plan, frames=0)
    _ascend(lower, lifted(climb, linear, steps), [_task(plan, goal, goal.start) for goal in goals], courses)
    return [course.picture for course in courses]


def _again(
    plan: Plan,
    climb: Climb,
    goals: Sequence[Goal],
    courses: list[Course],
    starts: Sequence[np.ndarray | None] | None,
    tries: int,
    note: str = "",
) -> None:
    """Climb once more; a course is replaced only where it is not stuck now."""
    fresh = [Course() for _ in goals]
    begun = starts or [goal.start for goal in goals]
    _ascend(plan, climb, [_task(plan, goal, start) for goal, start in zip(goals, begun, strict=True)], fresh)
    lifted_note = (
        f"from a start {LIFTED_STEPS} or more steps before its non-linearity" if starts else "from another seed"
    )
    for course, new in zip(courses, fresh, strict=True):
        if not new.stuck:
            course.take(new, note or lifted_note)
        course.tries = tries


def _raise_what_is_before(
    plan: Plan, climb: Climb, goals: Sequence[Goal], courses: list[Course], linear: tuple[str, ...]
) -> None:
    fresh = [Course() for _ in goals]
    _ascend(plan, lifted(climb, linear, plan.recipe.steps), [_task(plan, goal, goal.start) for goal in goals], fresh)
    for course, new in zip(courses, fresh, strict=True):
        if not new.stuck:
            course.picture, course.parameters, course.heat = new.picture, new.parameters, new.heat
            course.lifted = (new.activations[0], new.activations[-1])
