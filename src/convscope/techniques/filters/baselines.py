"""Baselines: activations of noise and natural images, computed once as a value that `filters` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convscope.binding import BoundObjective, ProgramKey, distinct_arguments, values_of
from convscope.errors import UsageError
from convscope.events import Started, tell
from convscope.images.image import InputImage
from convscope.techniques.filters.ascent import Plan, measured

NOISE_IMAGES = 128
PERCENTILE = 99


@dataclass(frozen=True, eq=False)
class Baseline:
    """Activations of noise and natural images for the objectives of one program.

    Attributes:
        arguments: for each term the arguments `(u, ...)` of its measure.
        noise, natural: for each term the activations of the images, `(n, u, c)`.

    Example:
        >>> from convscope.techniques.filters import FilterOptions, baselines
        >>> (one,) = baselines(network, "block4_conv", [0], FilterOptions(size=32)).of.values()
        >>> one.noise[0].shape[0] == NOISE_IMAGES
        True
    """

    arguments: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]
    natural: tuple[np.ndarray, ...]

    def covers(self, bound: BoundObjective) -> bool:
        """True if it was measured for this objective too."""
        return all(
            any(np.array_equal(argument, other) for other in arguments)
            for argument, arguments in zip(bound.arguments, self.arguments, strict=True)
        )

    def values(self, means: Sequence[np.ndarray], bound: BoundObjective) -> np.ndarray:
        """The objective `(n,)` of each image that the means are of."""
        return values_of(means, [bound], self.arguments)[:, 0]


@dataclass(frozen=True, eq=False)
class Baselines:
    """Activations of noise and natural images, for some objectives on one network.

    Attributes:
        made_for: everything that they depend on except the objectives: see `made_for`.
        images: the natural images.
        of: the activations, by program.

    Example:
        >>> from convscope.techniques.filters import FilterOptions, baselines
        >>> measured = baselines(network, "block4_conv", [0], FilterOptions(size=32, natural_images=PHOTOS[:2]))
        >>> [image.name for image in measured.images]
        ['cat', 'coffee']
    """

    made_for: Mapping[str, object]
    images: tuple[InputImage, ...]
    of: Mapping[ProgramKey, Baseline]

    def noise(self, bound: BoundObjective) -> np.ndarray:
        """The activation of each noise image `(128,)`."""
        mine = self.of[bound.key]
        return mine.values(mine.noise, bound)

    def natural(self, bound: BoundObjective) -> np.ndarray:
        """The activation of each natural image `(n,)`."""
        mine = self.of[bound.key]
        return mine.values(mine.natural, bound)

    def threshold(self, bound: BoundObjective) -> float:
        """The threshold of an alive filter: the 99th percentile of noise, and of natural images."""
        reached = (self.noise(bound), self.natural(bound))
        return max(float(np.percentile(part, PERCENTILE)) for part in reached if len(part))

    def check(self, plan: Plan, bounds: Iterable[BoundObjective]) -> None:
        """Check that they were made for this plan.

        Raises:
            UsageError: they were made for something else.
        """
        for what, value in made_for(plan).items():
            if self.made_for[what] != value:
                raise UsageError(
                    f"the baselines were made for another {what}: {self.made_for[what]}, not {value}.",
                    code="baselines-misfit",
                    name=what,
                    expected=str(value),
                    found=str(self.made_for[what]),
                )
        for bound in bounds:
            if bound.key not in self.of or not self.of[bound.key].covers(bound):
                raise UsageError(
                    f"the baselines do not cover {bound.objective.label}; make them for it too.",
                    code="baselines-lacking",
                    name=bound.objective.label,
                )


def made_for(plan: Plan) -> dict[str, object]:
    """The values that baselines depend on besides the objectives: network, noise, size, border and precision."""
    recipe = plan.recipe
    return {
        "network": (plan.network.name, plan.network.weights_sha256()),
        "preprocessing": plan.network.preprocessing,
        "size": plan.size,
        "seed": plan.seed,
        "precision": plan.precision,
        "parameterization": recipe.parameterization,
    }


def measure_baselines(plan: Plan, bounds: Sequence[BoundObjective], images: Sequence[InputImage]) -> Baselines:
    """Measure the activations of noise and natural images.

    Args:
        plan: network, size, seed, and the recipe, whose start images are the noise.
        bounds: the objectives.
        images: the natural images.

    Returns:
        the baselines, without `made_for`, which takes the weights' hash.
    """
    tell(plan.progress, Started(0, None, f"{NOISE_IMAGES} noise images"))
    by_program: dict[ProgramKey, list[BoundObjective]] = {}
    for bound in bounds:
        by_program.setdefault(bound.key, []).append(bound)

    def noise(numbers: Sequence[int]) -> np.ndarray:
        # Noise must not repeat the starts that the ascent began from: numbers that no channel has.
        return plan.images(np.stack([plan.start((number - NOISE_IMAGES,)) for number in numbers]))

    def natural(numbers: Sequence[int]) -> np.ndarray:
        return plan.network.prepare([images[number] for number in numbers], plan.size)

    found = {}
    for key, some in by_program.items():
        arguments = distinct_arguments(some)
        # A percentile of noise is far less certain than the rounding of the ascent's precision.
        reached = measured(plan, some, arguments, noise, NOISE_IMAGES, precision=plan.precision)
        theirs = measured(plan, some, arguments, natural, len(images))
        found[key] = Baseline(tuple(arguments), tuple(reached), tuple(theirs))
    return Baselines({}, tuple(images), found)
