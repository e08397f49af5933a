"""Named sets of choices for gradient ascent. A new recipe is one entry of `RECIPES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convscope.errors import UsageError, nearest
from convscope.techniques.filters.optimizers import Adam, Normalised, Optimizer
from convscope.techniques.filters.parameterizations import Fourier, Parameterization, Phases, Pixels
from convscope.techniques.filters.transforms import Affine, Crops, Transforms


@dataclass(frozen=True)
class Recipe:
    """The settings by which a filter's image is optimized and rendered.

    Attributes:
        name: as `--recipe` takes it.
        source: the publication or tool that it is from.
        steps: number of updates.
        size: pixels of a side, where the network takes any.
        parameterization: the variables of the optimization; optimizer: their update rule; transforms: applied to the
            image before each step.
        border: cells of the layer's map left out on each side of the objective.
        crop: pixels left out on each side of the final image, at `size`.
        style: of the rendering: "classic" (contrast brought to 0.15 around grey), "plain" (the image as it is) or
            "clipped" (stretched to the full range, but for 1 % of the values at each end).
        octaves: (fraction of the final size, share of the steps) of the sizes that are optimized one after another.
        grow: the step to the next size: "resize", or "mirror", which keeps its scale and adds a margin.
        settle: a filter is done when it gained less than this share in 8 steps; 0 takes all steps.
        needs_image: it needs an image.
        raises: the objective where neither channels nor objectives are given: "channels", "layer" (its mean square) or
            "caricature" (the activations of the image; the ascent then begins with noise, else with the image).
        power: exponent of the cosine, for a caricature.
        first_channels: number of a layer's first channels to use where none are chosen; None for all.
        regularizer_weight: weight of the likeness to that image halfway to the layer, relative to the activation.
        transparent: the result includes the importance of each place of an image.

    Example:
        >>> from dataclasses import replace
        >>> long = replace(RECIPES["fourier"], name="long", steps=512)
        >>> long.steps, long.optimizer
        (512, Adam(rate=0.05, first=0.9, second=0.999, tiny=1e-08, nesterov=False))
    """

    name: str
    source: str
    steps: int
    size: int
    parameterization: Parameterization
    optimizer: Optimizer
    transforms: Transforms | None = None
    border: int = 0
    crop: int = 0
    style: str = "plain"
    octaves: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    grow: str = "resize"
    settle: float = 0.0
    needs_image: bool = False
    raises: Literal["channels", "layer", "caricature"] = "channels"
    power: float = 2.0
    first_channels: int | None = None
    regularizer_weight: float = 0.0
    transparent: bool = False

    @property
    def views(self) -> int:
        """The number of views of each image in a step."""
        return 1 if self.transforms is None else self.transforms.views

    def border_for(self, side: int) -> int:
        """Border cells of a map whose shorter side is `side` cells: at least one cell stays."""
        return max(0, min(self.border, (side - 1) // 2))

    def crop_for(self, side: int) -> int:
        """Pixels to leave out on each side of an image whose shorter side is `side` pixels."""
        return round(self.crop * side / self.size)


CLASSIC = Recipe(
    name="classic",
    source="F. Chollet, Visualizing what convnets learn: plain pixels, normalised gradient, 30 steps",
    steps=30,
    size=180,
    parameterization=Pixels(amplitude=0.25),
    optimizer=Normalised(length=10.0),
    border=2,
    crop=25,
    style="classic",
    first_channels=64,  # as many as the sheet of the classic procedure shows
)

FOURIER = Recipe(
    name="fourier",
    source="Olah et al. 2017, Feature Visualization: spectrum, decorrelated colours, Adam 0.05, small transforms",
    steps=256,
    size=128,
    parameterization=Fourier(deviation=0.01),
    optimizer=Adam(rate=0.05),
    # Jitter of 8 and then of 4 pixels of 128, as one shift.
    transforms=Affine(shift=12 / 128, scale=(0.9, 1.1), rotation=10.0),
)

FAST = Recipe(
    name="fast",
    source="convscope: fourier with a step that is twice as long and forgets sooner, and gentler transforms; "
    "what has settled makes room for the next",
    steps=48,
    size=128,
    parameterization=Fourier(deviation=0.01),
    optimizer=Adam(rate=0.1, first=0.8, second=0.95),
    transforms=Affine(shift=1 / 16, scale=(0.95, 1.05), rotation=5.0),
    settle=0.02,
)

# The paper's crops are 0.5 to 0.05 of images many times as large as the network's input. On an image of the input's
# own size they enlarge a filter's pattern until it excites nothing unchanged, so here they are 0.9.
MACO = Recipe(
    name="maco",
    source="Fel et al. 2023, MaCo, 2306.06805: phases only, crops with noise, NAdam",
    steps=128,
    size=224,
    parameterization=Phases(),
    optimizer=Adam(rate=0.3, nesterov=True),
    transforms=Crops(first=0.9, last=0.9, views=4, noise_std=0.02, brightness=0.01),
    style="clipped",
    transparent=True,
)

ACCENTUATION = Recipe(
    name="accentuation",
    source="Hamblin et al. 2024, Feature Accentuation, 2402.10039: from an image, near it halfway to the layer",
    steps=100,
    size=224,
    parameterization=Fourier(deviation=0.01),
    optimizer=Adam(rate=0.05),
    transforms=Crops(first=0.9, last=0.9, views=16, brightness=0.0, noise_std=0.02),
    needs_image=True,
    raises="layer",
    regularizer_weight=1.0,
    transparent=True,
)

DEEPDREAM = Recipe(
    name="deepdream",
    source="Mordvintsev et al. 2015, Inceptionism: an image at growing sizes, with its details given back at each",
    steps=40,
    size=320,
    parameterization=Pixels(amplitude=0.25, clamp=True),
    optimizer=Normalised(length=10.0),
    transforms=Affine(shift=1 / 32, scale=(1.0, 1.0), rotation=0.0),
    octaves=((0.36, 1.0), (0.51, 1.0), (0.71, 1.0), (1.0, 1.0)),
    needs_image=True,
    raises="layer",
)

CARICATURE = Recipe(
    name="caricature",
    source="lucid, Caricature: dot product with the activations of an image times a power of their cosine, as fourier",
    steps=256,
    size=224,
    parameterization=Fourier(deviation=0.01),
    optimizer=Adam(rate=0.05),
    transforms=Affine(shift=1 / 32, scale=(0.98, 1.02), rotation=2.0),
    needs_image=True,
    raises="caricature",
)

DEFAULT_RECIPE = "fast"
ALL = (CLASSIC, FAST, FOURIER, MACO, ACCENTUATION, DEEPDREAM, CARICATURE)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in ALL}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none.

    Example:
        >>> recipe_named("fast").steps
        48
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; {nearest(name, RECIPES)}", code="recipe-unknown", name=name)
    return RECIPES[name]
