"""Named sets of choices for gradient ascent. A new recipe is one entry of `RECIPES`."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.errors import UsageError, nearest


@dataclass(frozen=True)
class Recipe:
    """How a filter's picture is found and shown.

    Amplitude and step are in units of half the range of the network's input, so that they mean the same for
    pixels in -1..1, 0..1 and 0..255.

    Attributes:
        name: as `--recipe` takes it.
        source: where it is from.
        steps: number of updates.
        step: length of an update along the gradient of unit L2 norm.
        amplitude: width of the uniform noise around mid-grey that the ascent starts from.
        size: pixels of a side, where the network takes any.
        border: cells of the layer's map left out on each side of the objective.
        crop: pixels left out on each side of the final picture, at `size`.
    """

    name: str
    source: str
    steps: int
    step: float
    amplitude: float
    size: int
    border: int
    crop: int

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
    step=10.0,
    amplitude=0.25,
    size=180,
    border=2,
    crop=25,
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (CLASSIC,)}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]
