"""Whether a filter is alive: its final image against noise, natural images and small movements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from convscope.binding import BoundObjective
from convscope.networks import Network, Pass, Run
from convscope.networks.foreign import Tensor
from convscope.results import FilterRow
from convscope.techniques.filters.ascent import FRESH, FRESH_DRAWS, Job, Moved, Plan, Trace, measured
from convscope.techniques.filters.baselines import PERCENTILE, Baselines


@dataclass(frozen=True, eq=False)
class Judged:
    """The verdict on one image.

    Attributes:
        row: the verdict and measures.
        profile: activation of every channel of the objective's first term on the image, less that on noise `(c,)`.
    """

    row: FilterRow
    profile: np.ndarray


def judge(plan: Plan, baselines: Baselines, jobs: Sequence[Job], traces: Sequence[Trace], of: int) -> list[Judged]:
    """The verdicts on finished images whose objectives have one program.

    Args:
        plan: the settings that they were made with.
        baselines: activations of noise and natural images.
        jobs, traces: of the images.
        of: number of images of this program that are judged altogether.
    """
    bounds = [job.bound for job in jobs]
    baseline = baselines.of[bounds[0].key]
    final = _profiles(plan, bounds, baselines, traces, of)

    def images(numbers: Sequence[int]) -> np.ndarray:
        return np.stack([traces[number // FRESH_DRAWS].image for number in numbers])

    def draw(number: int) -> np.ndarray:
        index, at = divmod(number, FRESH_DRAWS)
        return FRESH.draw((plan.seed, *jobs[index].key, -1), at, FRESH_DRAWS, plan.size)

    count = len(jobs) * FRESH_DRAWS
    moved = measured(
        *(plan, bounds, baseline.arguments, images, count, Moved(draw)), plan.precision, of=of * FRESH_DRAWS
    )
    found = []
    for place, (job, trace) in enumerate(zip(jobs, traces, strict=True)):
        own = slice(place * FRESH_DRAWS, (place + 1) * FRESH_DRAWS)
        activation = float(baseline.values([part[place : place + 1] for part in final], job.bound)[0])
        transformed = float(baseline.values([part[own] for part in moved], job.bound).mean())
        row = _row(baselines, job, trace, activation, transformed)
        found.append(Judged(row, _profile(baselines, job.bound, final, place)))
    return found


def profiles(
    plan: Plan, baselines: Baselines, jobs: Sequence[Job], traces: Sequence[Trace], of: int
) -> list[np.ndarray]:
    """The profiles alone: see `Judged`."""
    bounds = [job.bound for job in jobs]
    final = _profiles(plan, bounds, baselines, traces, of)
    return [_profile(baselines, bound, final, place) for place, bound in enumerate(bounds)]


def _profiles(
    plan: Plan, bounds: Sequence[BoundObjective], baselines: Baselines, traces: Sequence[Trace], of: int
) -> list[np.ndarray]:
    def images(numbers: Sequence[int]) -> np.ndarray:
        return np.stack([traces[number].image for number in numbers])

    return measured(plan, bounds, baselines.of[bounds[0].key].arguments, images, len(traces), of=of)


def _profile(baselines: Baselines, bound: BoundObjective, final: Sequence[np.ndarray], place: int) -> np.ndarray:
    term = next(index for index, spec in enumerate(bound.key.specs) if not spec.measure.regularizer)
    usual = baselines.of[bound.key].noise[term].mean(axis=0)
    return np.asarray(final[term][place] - usual).ravel()


def _row(baselines: Baselines, job: Job, trace: Trace, activation: float, transformed: float) -> FilterRow:
    natural, threshold = baselines.natural(job.bound), baselines.threshold(job.bound)
    status, reason = _verdict(activation, threshold, trace, natural)
    best = int(np.argmax(natural)) if len(natural) else None
    name = "" if best is None else baselines.images[best].name
    return FilterRow(
        channel=job.bound.channel,
        activation=activation,
        activations=tuple(trace.activations),
        status=status,
        reason=reason,
        threshold=threshold,
        name=job.bound.objective.label,
        transformed=transformed,
        natural=None if best is None else float(natural[best]),
        natural_image=name,
        variant=job.variant,
        tries=trace.tries,
        steps=len(trace.activations),
        started_from=name if trace.from_image else "",
    )


def _verdict(final: float, threshold: float, trace: Trace, natural: np.ndarray) -> tuple[str, str]:
    images = " and of the images" if len(natural) else ""
    beyond = f"the {PERCENTILE}th percentile of noise{images} ({threshold:.3g})"
    if trace.overflowed or not np.isfinite(final):
        return "weak", f"stopped at step {len(trace.gradients)}: the activation left the range of finite numbers"
    if trace.has_no_gradient:
        return _without_gradient(trace, natural)
    found = f", found {trace.note}" if trace.note else ""
    if final > threshold:
        return "alive", f"reaches {final:.3g}, above {beyond}{found}"
    return "weak", f"reaches {final:.3g} only, not above {beyond}{found}"


def _without_gradient(trace: Trace, natural: np.ndarray) -> tuple[str, str]:
    """The verdict on a filter without a gradient at any start."""
    reason = f"the gradient is zero everywhere from {trace.tries} starts, so the filter has no gradient to follow"
    excited = len(natural) > 0 and natural.max() > 0
    if trace.lifted is not None:
        first, last = trace.lifted
        does = "rises" if last > first else "does not rise"
        reason += f"; the value before its non-linearity {does}, from {first:.3g} to {last:.3g}"
    if excited:
        return "weak", f"{reason}; but natural images reach {natural.max():.3g}"
    return "dead", reason + (f"; none of {len(natural)} images excites it" if len(natural) else "")


def cut_off(plan: Plan, bound: BoundObjective) -> str:
    """A remark where the receptive field of the middle unit reaches both edges of the image; or ""."""
    layer, network = bound.key.specs[0].layer, plan.network
    if not layer.spatial:
        return ""

    program = network.program(_middle_gradient, layer.path)
    black, white = network.preprocessing.range(network.inputs.channels)
    noise = black + np.random.default_rng(plan.seed).random((1, *plan.size, len(black))) * (white - black)
    seen = np.abs(network.numpy(program(network.tensor(noise.astype(np.float32))))[0]).sum(axis=-1) > 0
    edges = [seen[0].any(), seen[-1].any(), seen[:, 0].any(), seen[:, -1].any()]
    if not all(edges):
        return ""
    return (
        f"a unit of {layer.path} sees all {plan.size[0]}x{plan.size[1]} pixels or more: the pattern that excites it "
        "may be cut off; a larger size shows all of it."
    )


def _middle_gradient(network: Network, path: str) -> Callable:
    """From images the gradient, at their pixels, of the squares in the middle of a layer's map."""

    def gradient(run: Run, x: Tensor) -> Tensor:
        def score(x: Tensor) -> tuple:
            seen = run(x, Pass(record=(path,), stop=True)).activations[path]
            middle = seen[:, seen.shape[1] // 2, seen.shape[2] // 2]
            return network.ops.sum(network.ops.square(middle)), middle

        return network.value_and_grad(score)(x)[1]

    return gradient
