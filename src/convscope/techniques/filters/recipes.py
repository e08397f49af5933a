"""Named sets of choices for gradient ascent. A new recipe is one entry of `RECIPES`."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.errors import UsageError, nearest
from convscope.techniques.filters.canvas import Canvas, Fourier, Pixels
from convscope.techniques.filters.rules import Adam, Normalised, Rule
from convscope.techniques.filters.transforms import Affine


@dataclass(frozen=True)
class Recipe:
    """How a filter's picture is found and shown.

    Attributes:
        name: as `--recipe` takes it.
        source: where it is from.
        steps: number of updates.
        size: pixels of a side, where the network takes any.
        canvas: what is optimised; rule: how it moves; transforms: what is done to the picture before each step.
        border: cells of the layer's map left out on each side of the objective.
        crop: pixels left out on each side of the final picture, at `size`.
        look: "classic" (contrast brought to 0.15 around grey) or "plain" (the picture as it is).
    """

    name: str
    source: str
    steps: int
    size: int
    canvas: Canvas
    rule: Rule
    transforms: Affine | None = None
    border: int = 0
    crop: int = 0
    look: str = "plain"
    octaves: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    grow: str = "resize"
    settle: float = 0.0
    photo: bool = False
    tie: float = 0.0
    transparent: bool = False

    @property
    def views(self) -> int:
        """How many views of each picture a step looks at."""
        return 1 if self.transforms is None else self.transforms.views

    def border_for(self, side: int) -> int:
        """Border cells of a map whose shorter side is `side` cells: at least one cell stays."""
        return max(0, min(self.border, (side - 1) // 2))

    def crop_for(self, side: int) -> int:
        """Pixels to leave out on each side of a picture whose shorter side is `side` pixels."""
        return round(self.crop * side / self.size)


CLASSIC = Recipe(
    name="classic",
    source="F. Chollet, Visualizing what convnets learn: plain pixels, normalised gradient, 30 steps",
    steps=30,
    size=180,
    canvas=Pixels(amplitude=0.25),
    rule=Normalised(step=10.0),
    border=2,
    crop=25,
    look="classic",
)

FOURIER = Recipe(
    name="fourier",
    source="Olah et al. 2017, Feature Visualization: spectrum, decorrelated colours, Adam 0.05, small transforms",
    steps=256,
    size=128,
    canvas=Fourier(deviation=0.01),
    rule=Adam(rate=0.05),
    # Jitter of 8 and then of 4 pixels of 128, as one shift.
    transforms=Affine(shift=12 / 128, scale=(0.9, 1.1), rotation=10.0),
)

DEFAULT_RECIPE = "classic"
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (CLASSIC, FOURIER)}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]
