"""From jobs to finished images: sizes one after another, filters without a gradient, memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from convscope.cuts import Score, Strength, may_be_of_gradient
from convscope.errors import ModelError
from convscope.techniques.filters.ascent import Job, Plan, Trace, ascend, before_nonlinearity, resized
from convscope.techniques.filters.recipes import Recipe

TRIES = 3  # starts of a filter that has no gradient
LIFTED_STEPS = 16  # before its own non-linearity, as lucid lets gradients through for 16 steps
LEAST_CELLS = 4  # of a map's side, for a smaller size to be worth a step
BATCHES_AT_ONCE = 4  # number of images that begin at smaller sizes and are in memory together


def run(plan: Plan, jobs: Sequence[Job]) -> Iterator[tuple[int, Trace]]:
    """Make the image of each job: its number and its trace, as they finish.

    After Ctrl-C those that are finished but were to be tried again come too, and then the `KeyboardInterrupt`.
    """
    by_program: dict[object, list[int]] = {}
    for index, job in enumerate(jobs):
        by_program.setdefault(job.bound.key, []).append(index)
    for indices in by_program.values():
        for part in _parts(plan, jobs, indices):
            for place, trace in _made(plan, [jobs[index] for index in part]):
                yield part[place], trace


def _parts(plan: Plan, jobs: Sequence[Job], indices: Sequence[int]) -> list[Sequence[int]]:
    """Numbers of jobs in parts whose images at smaller sizes are in memory together; none is less than a batch."""
    if len(_octaves(plan, [jobs[index] for index in indices])) == 1:
        return [indices]
    some = BATCHES_AT_ONCE * plan.batch
    ends = [*range(some, len(indices) - plan.batch + 1, some), len(indices)]
    return [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _made(plan: Plan, jobs: Sequence[Job]) -> Iterator[tuple[int, Trace]]:
    """At the final size, from smaller sizes or from noise; then again for those that have no gradient there."""
    last = plan.with_steps(_steps(plan, jobs)[-1])
    begun = [replace(job, start=start) for job, start in zip(jobs, _smaller_sizes(plan, jobs), strict=True)]
    without: dict[int, Trace] = {}
    interrupted = None
    try:
        for index, trace in _ascended(last, begun):
            if trace.has_no_gradient:
                without[index] = trace
            else:
                yield index, trace
        without = dict(sorted(without.items()))
        if without and len(without) == len(jobs):
            refuse_cut(plan, jobs[0])
        if without:
            _retry(plan, [jobs[index] for index in without], list(without.values()))
    except KeyboardInterrupt as error:
        interrupted = error
    yield from without.items()
    if interrupted is not None:
        raise interrupted


def _ascended(plan: Plan, jobs: Sequence[Job]) -> Iterator[tuple[int, Trace]]:
    """`ascend` with half as many batch slots each time that the memory runs out."""
    specs = jobs[0].bound.key.specs
    grouped = any(spec.measure.together for spec in specs)
    left = list(range(len(jobs)))
    while left:
        now, traces = list(left), [Trace() for _ in left]
        try:
            smaller = plan if grouped else replace(plan, batch=min(plan.batch, len(now)))
            for place in ascend(smaller, [jobs[index] for index in now], traces):
                trace, traces[place] = traces[place], Trace()  # the receiver alone keeps it
                left.remove(now[place])
                yield now[place], trace
        except Exception as error:
            if not plan.network.out_of_memory(error):
                refuse_cut(plan, jobs[0], error)
                raise
            if plan.batch == 1 or grouped:
                raise
            plan = replace(plan, batch=plan.batch // 2)


def _all(plan: Plan, jobs: Sequence[Job]) -> list[Trace]:
    """The traces of jobs, all of them together."""
    found = dict(_ascended(replace(plan, frames=0), jobs))
    return [found[index] for index in range(len(jobs))]


# -- smaller sizes first ---------------------------------------------------------------------------------


def _steps(plan: Plan, jobs: Sequence[Job]) -> list[int]:
    """How many of the steps belong to each of the sizes that can be used."""
    octaves = _octaves(plan, jobs)
    shares = np.array([share for _, share in octaves])
    steps = np.maximum(1, np.round(plan.recipe.steps * shares / shares.sum())).astype(int)
    return steps.tolist()


def _octaves(plan: Plan, jobs: Sequence[Job]) -> list[tuple[float, float]]:
    """The recipe's sizes that these objectives allow: a place means another one, and a dense layer takes one size."""
    whole = plan.recipe.octaves[-1]
    key = jobs[0].bound.key
    free = not key.scores and all(term.anywhere for job in jobs for term in job.bound.objective.terms)
    if not free or len(plan.recipe.octaves) == 1:
        return [whole]
    return [octave for octave in plan.recipe.octaves[:-1] if _fits(plan, key.paths, octave[0])] + [whole]


def _fits(plan: Plan, paths: Sequence[str], fraction: float) -> bool:
    layers = {layer.path: layer for layer in plan.network.layers_at(_at(plan.size, fraction))}
    found = [layers.get(path) for path in paths]
    return all(layer is not None and layer.spatial and min(layer.shape[:2]) >= LEAST_CELLS for layer in found)


def _at(size: tuple[int, int], fraction: float) -> tuple[int, int]:
    return max(1, round(size[0] * fraction)), max(1, round(size[1] * fraction))


def _smaller_sizes(plan: Plan, jobs: Sequence[Job]) -> list[np.ndarray | None]:
    """The images to begin with at the final size, from the recipe's smaller sizes where it has some."""
    octaves, steps = _octaves(plan, jobs), _steps(plan, jobs)
    starts = [job.image for job in jobs]
    for (fraction, _), count in zip(octaves[:-1], steps, strict=False):
        small = replace(plan.with_steps(count), size=_at(plan.size, fraction))
        begun = _at_size(small, jobs, starts)
        parts = [
            replace(job, bound=small.bind(job.bound.objective), start=start)
            for job, start in zip(jobs, begun, strict=True)
        ]
        traces = _all(small, parts)
        starts = [start if trace.has_no_gradient else trace.image for trace, start in zip(traces, starts, strict=True)]
    return _at_size(plan, jobs, starts)


def _at_size(plan: Plan, jobs: Sequence[Job], starts: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """Images brought to the plan's size; those that began as an image get the details that it has at this size only."""
    found: list[np.ndarray | None] = []
    for job, start in zip(jobs, starts, strict=True):
        if start is None or job.image is None:
            found.append(None if start is None else _grown(plan.recipe, start, plan.size))
            continue
        coarse = resized(resized(job.image, start.shape[:2]), plan.size)
        found.append(resized(start, plan.size) + resized(job.image, plan.size) - coarse)
    return found


def _grown(recipe: Recipe, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image brought to another size: enlarged, or with its mirror images around it, which keeps its scale."""
    if recipe.grow == "resize" or size[0] < image.shape[0] or size[1] < image.shape[1]:
        return resized(image, size)
    missing = [side - have for side, have in zip(size, image.shape, strict=False)]
    around = [(lack // 2, lack - lack // 2) for lack in missing]
    return np.pad(image, [*around, (0, 0)], mode="symmetric")


# -- filters without a gradient --------------------------------------------------------------------------


def refuse_cut(plan: Plan, job: Job, error: Exception | None = None) -> None:
    """Refuse to follow a gradient that does not come back to the image, which is measured for all channels at once.

    Args:
        plan: the settings of the call.
        job: one of those without a gradient.
        error: of their pass, where it failed.

    Raises:
        ModelError: the graph is cut.
    """
    if error is not None and not may_be_of_gradient(plan.network, error):
        return
    network, key = plan.network, job.bound.key
    black, white = network.preprocessing.range(network.inputs.channels)
    noise = black + np.random.default_rng(plan.seed).random((1, *plan.size, len(black))) * (white - black)
    strength = Score(network, Strength(tuple(key.paths), key.scores), noise.astype(np.float32))
    if not strength.effect(None).is_cut:
        return
    cut = strength.cut(None)
    raise ModelError(
        f"{network.name} has no gradient from {' and '.join(key.paths) or 'the scores'} to the image, which filters "
        f"need: the graph is cut, {cut.text}. Remove torch.no_grad, detach or stop_gradient there; activations, and "
        "heatmaps by a method that needs no gradient, work as it is.",
        code="gradient-cut",
        name=network.name,
        before=cut.before,
        after=cut.after,
        reason=cut.error,
    ) from error


def _retry(plan: Plan, jobs: Sequence[Job], traces: Sequence[Trace]) -> None:
    """New starts for filters whose gradient is zero: from before their non-linearity, from other seeds, from an image.

    Where all fail and there is a pre-activation, the image is the one that raises it.
    """
    paths = jobs[0].bound.key.paths
    preactivations = plan.network.nonlinearities(paths[0]) if len(paths) == 1 else ()
    # From the same seed again only where a value before the non-linearity can be raised first.
    attempts = range(TRIES) if preactivations else range(1, TRIES)
    for tries, attempt in enumerate(attempts, start=2):
        left = [index for index, trace in enumerate(traces) if trace.has_no_gradient]
        if not left:
            return
        part = [_of_another_seed(jobs[index], attempt) for index in left]
        note = "from another seed"
        if preactivations:
            steps = LIFTED_STEPS * 2**attempt
            starts = [trace.image for trace in _all(plan.with_steps(steps), before_nonlinearity(part, preactivations))]
            part = [replace(job, start=start) for job, start in zip(part, starts, strict=True)]
            note = f"from a start {LIFTED_STEPS} or more steps before its non-linearity"
        _again(plan, part, [traces[index] for index in left], tries, note)
    left = [index for index, trace in enumerate(traces) if trace.has_no_gradient and jobs[index].hint is not None]
    if left:
        hinted = [replace(job, start=job.hint()) for job in (jobs[index] for index in left) if job.hint is not None]
        _again(plan, hinted, [traces[index] for index in left], len(attempts) + 2, "from an image", from_image=True)
    left = [index for index, trace in enumerate(traces) if trace.has_no_gradient]
    if left and preactivations:
        _raise_preactivation(plan, [jobs[index] for index in left], [traces[index] for index in left], preactivations)


def _of_another_seed(job: Job, attempt: int) -> Job:
    """The job as it begins: at its image, or at noise of another seed."""
    return replace(job, start=job.image, key=(*job.key, attempt) if attempt else job.key)


def _again(
    plan: Plan, jobs: Sequence[Job], traces: Sequence[Trace], tries: int, note: str, from_image: bool = False
) -> None:
    """Ascend once more; a trace is replaced only where the new one has a gradient."""
    found = dict(_ascended(plan, jobs))
    for index, trace in enumerate(traces):
        if not found[index].has_no_gradient:
            trace.take(found[index], note, from_image)
        trace.tries = tries


def _raise_preactivation(
    plan: Plan, jobs: Sequence[Job], traces: Sequence[Trace], preactivations: tuple[str, ...]
) -> None:
    begun = [replace(job, start=job.image) for job in before_nonlinearity(jobs, preactivations)]
    found = dict(_ascended(plan, begun))
    for index, trace in enumerate(traces):
        new = found[index]
        if not new.has_no_gradient:
            trace.image, trace.heat = new.image, new.heat
            trace.lifted = (new.activations[0], new.activations[-1])
