"""The image that maximizes each filter: values and measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np

from convscope.errors import UsageError, nearest
from convscope.networks import Layer
from convscope.networks.preprocessing import Preprocessing
from convscope.results.base import Result
from convscope.results.parameters import FilterParameters
from convscope.schema import Json


@dataclass(frozen=True)
class FilterRow:
    """One filter in numbers.

    Attributes:
        channel: its number; None for an objective that is not one channel.
        activation: the objective of the final image.
        activations: the objective before each step.
        status: "alive", "weak" or "dead".
        reason: why that status.
        threshold: the activation that an alive filter exceeds.
        name: the objective's text, such as "class tabby"; the channel's number stands for it where it is empty.
        transformed: mean activation of the final image under new random transforms; NaN where that was not measured.
        natural: the highest activation among the user's natural images; None without these.
        natural_image: the name of that image.
        agreement: mean correlation of the images from several seeds, -1..1; None where one seed was used.
        variant: number of the image among several of one objective.
        tries: number of start images that were tried.
        steps: number of updates; 0 where that is not known.
        started_from: the name of the natural image that the ascent started from, where the filter has no gradient at
            noise; else empty.

    Example:
        >>> row = convscope.filters(network, "block4_conv", [7], steps=2, size=32).rows[0]
        >>> row.channel, row.steps, row.natural
        (7, 2, None)
    """

    channel: int | None
    activation: float
    activations: tuple[float, ...]
    status: str
    reason: str
    threshold: float
    name: str = ""
    transformed: float = float("nan")
    natural: float | None = None
    natural_image: str = ""
    agreement: float | None = None
    variant: int = 0
    tries: int = 1
    steps: int = 0
    started_from: str = ""

    @property
    def ratio(self) -> float | None:
        """The activation divided by the best natural one; None without one, or where no image excites the filter."""
        return self.activation / self.natural if self.natural is not None and self.natural > 0 else None

    @property
    def robustness(self) -> float | None:
        """Share of the activation left under new random transforms; None where it is not positive or not measured."""
        share = self.transformed / self.activation if self.activation > 0 else float("nan")
        return share if np.isfinite(share) else None

    @property
    def compared(self) -> str:
        """ "x0.83 natural" where there are natural images, else "x12 noise": the activation beside its reference."""
        if self.natural is not None:
            return "natural: none" if self.ratio is None else f"x{_times(self.ratio)} natural"
        return f"x{_times(self.activation / self.threshold)} noise" if self.threshold > 0 else "noise: none"

    @property
    def margin(self) -> float:
        """The activation divided by its reference: the best natural activation, or without one the noise threshold."""
        reference = self.threshold if self.natural is None else self.natural
        if not np.isfinite(self.activation):
            return -np.inf
        if reference > 0:
            return self.activation / reference
        return np.inf if self.activation > 0 else -np.inf


STATUSES = ("alive", "weak", "dead")
SORTS: dict[str, Callable] = {
    "status": lambda row: (STATUSES.index(row.status), -row.margin),
    "ratio": lambda row: -row.margin,
    "activation": lambda row: -row.activation if np.isfinite(row.activation) else np.inf,
    "holds": lambda row: np.inf if row.robustness is None else -row.robustness,
    "channel": lambda row: 0,
}


@dataclass(frozen=True, eq=False, repr=False)
class Filters(Result):
    """For each filter of a layer the image that excites it most.

    Attributes:
        layer: the layer of the filters; None for objectives that are not channels of one layer.
        values: final images `(n, h, w, c)` float32, in the range that the network takes.
        rows: the numbers, one for each filter.
        preprocessing: the preprocessing, which turns the values back into pixels.
        crop: pixels left out on each side of an image.
        style: "classic" (contrast brought to 0.15 around grey), "plain" (the image as it is) or "clipped" (stretched
            to the full range, but for 1 % of the values at each end).
        alpha: transparency `(n, h, w)` float32 in 0..1, where the recipe finds it.
        frames: intermediate images `(n, f, h, w, c)` float32, where they were asked for.

    Example:
        >>> found = convscope.filters(network, "block4_conv", [0, 7], steps=2, size=32)
        >>> found.name(1), sorted(found.order("activation")), found.order("channel")
        ('7', [0, 1], [0, 1])
    """

    parameters: FilterParameters = field(default_factory=FilterParameters)
    layer: Layer | None = None
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.float32))
    rows: tuple[FilterRow, ...] = ()
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing("none"))
    crop: int = 0
    style: str = "classic"
    alpha: np.ndarray | None = None
    frames: np.ndarray | None = None
    kind: ClassVar[str] = "filters"

    def name(self, index: int) -> str:
        """The name of the `index`-th filter: "17", its second image "17-1", an objective by its text."""
        row = self.rows[index]
        named = row.name and (self.layer is None or row.channel is None)
        return (row.name if named else str(row.channel)) + (f"-{row.variant}" if row.variant else "")

    def order(self, by: str = "status") -> list[int]:
        """The filters' places in `rows`, sorted; ties by channel, then as they were asked for.

        Args:
            by: "status" (alive, weak, dead, and among these by "ratio"), "ratio" (to the best natural activation, or
                without images to noise), "activation", "holds", "channel", or "given" (as they were asked for). The
                highest come first.

        Raises:
            UsageError: another word.
        """
        if by == "given":
            return list(range(len(self.rows)))
        if by not in SORTS:
            raise UsageError(
                f"filters can't be sorted by {by!r}; {nearest(by, [*SORTS, 'given'])}", code="order-unknown", name=by
            )

        def key(index: int) -> tuple:
            row = self.rows[index]
            return SORTS[by](row), np.inf if row.channel is None else row.channel, row.variant

        return sorted(range(len(self.rows)), key=key)

    @property
    def summary(self) -> str:
        """ "58 alive, 4 weak, 2 dead; median 0.91 times the best natural activation"."""
        counts = [f"{sum(row.status == status for row in self.rows)} {status}" for status in STATUSES]
        ratios = [row.ratio for row in self.rows if row.ratio is not None and np.isfinite(row.ratio)]
        median = f"; median {_times(float(np.median(ratios)))} times the best natural activation" if ratios else ""
        return ", ".join(counts) + median

    def to_json(self) -> dict[str, Json]:
        """See `Result.to_json`."""
        rows = [_row_json(row) for row in self.rows]
        return {"filters": rows, "provenance": self.provenance}


# The names in the JSON of fields that Python calls otherwise: programs rely on these.
JSON_NAMES = {"started_from": "begun", "natural_image": "natural_photo"}


def _row_json(row: FilterRow) -> dict[str, object]:
    values = {JSON_NAMES.get(name, name): value for name, value in asdict(row).items()}
    return {**values, "ratio": row.ratio, "holds": row.robustness}


def _times(factor: float) -> str:
    """A ratio with two digits: "0.83", "12", "340"."""
    return f"{float(f'{factor:.2g}'):g}" if abs(factor) >= 0.01 or not factor else f"{factor:.0e}"
