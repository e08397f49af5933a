"""The image regions that support a class: raw maps and their measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import numpy as np

from convscope.errors import UsageError, nearest
from convscope.images.image import InputImage
from convscope.networks import Prediction
from convscope.results.base import Result
from convscope.results.parameters import HeatmapParameters
from convscope.schema import Json


@dataclass(frozen=True)
class Check:
    """How far to trust a heatmap; see `heatmaps.faithfulness` for the definition of each measure.

    Attributes:
        deletion: area under the probability while the most important pixels go, 0..1; less is better. Where the
            target has no probability, of the score over the size of the whole image's, from that of grey on.
        insertion: the same while they come back; more is better.
        drop: share of the score that is lost seen through the map alone, 0..1.
        increase: 1 if the score rises instead, else 0.
        road: score without the least important pixels less that without the most important ones, -1..1.
        stability: rank correlation with the maps of noisy copies, -1..1.
        randomisation: rank correlation with the maps of scrambled weights, 0..1; less is better; None where there are
            no weights to scramble.
        badge: "pass", "doubtful" or "fail"; reason: why.

    Example:
        >>> check = convscope.heatmap(network, PHOTOS[0], check=True).rows[0].check
        >>> check.badge in ("pass", "doubtful", "fail"), 0 <= check.deletion <= 1
        (True, True)
    """

    deletion: float
    insertion: float
    drop: float
    increase: float
    road: float
    stability: float
    randomisation: float | None
    badge: str
    reason: str


@dataclass(frozen=True)
class HeatmapRow:
    """One heatmap in words and numbers.

    Attributes:
        image: name of the image.
        class_index, class_name: the explained class; None and a description where the target is no class.
        score: the explained number: a logit, or the number that `Head.score` names; less that of `against`.
        probability: of the class; None for linear outputs.
        layer, method: the layer and the method.
        status: "ok", or "blank" with the `reason`.
        reason: the reason for a blank map; empty where the status is "ok".
        predictions: the best classes of the image, best first.
        against: the class whose score was subtracted, or None; of two classes under one softmax, the other one.
        note: a remark to show beside the map.
        check: how far to trust it, where that was measured.

    Example:
        >>> row = convscope.heatmap(network, PHOTOS[0], against="coffee").rows[0]
        >>> row.class_name, row.explained, row.layer, row.status
        ('cat', 'cat against coffee', 'block4_conv', 'ok')
    """

    image: str
    class_index: int | None
    class_name: str
    score: float
    probability: float | None
    layer: str
    method: str
    status: str
    reason: str
    predictions: tuple[Prediction, ...]
    against: str | None = None
    note: str = ""
    check: Check | None = None

    @property
    def explained(self) -> str:
        """ "tabby", or "tabby against boxer"."""
        return self.class_name + (f" against {self.against}" if self.against else "")

    @property
    def text(self) -> str:
        """ "tabby 0.83"."""
        if self.class_index is None:
            return f"{self.class_name} {self.score:.3g}"
        return Prediction(self.class_index, self.class_name, self.score, self.probability).text


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap(Result):
    """The regions of each image that support a class.

    Attributes:
        images: the images.
        maps: `(n, h, w)` float32, raw and signed, at the layer's size or the image's; a tuple of `(h, w)` where
            methods differ in it.
        rows: the words and numbers, one for each map.

    Example:
        >>> found = convscope.heatmap(network, PHOTOS[0], method=["grad-cam", "hirescam"])
        >>> found.only("hirescam").maps.shape
        (1, 28, 28)
    """

    parameters: HeatmapParameters = field(default_factory=HeatmapParameters)
    images: tuple[InputImage, ...] = ()
    maps: np.ndarray | tuple[np.ndarray, ...] = field(default_factory=lambda: np.zeros((0, 1, 1), np.float32))
    rows: tuple[HeatmapRow, ...] = ()
    kind: ClassVar[str] = "heatmaps"

    def only(self, method: str) -> Heatmap:
        """The maps of one method alone.

        Raises:
            UsageError: there are none.
        """
        places = [index for index, row in enumerate(self.rows) if row.method == method]
        if not places:
            raise UsageError(
                f"no map is by {method!r}; {nearest(method, [row.method for row in self.rows])}",
                code="method-not-in-result",
                name=method,
            )
        return replace(
            self,
            parameters=replace(self.parameters, method=method),
            images=tuple(self.images[index] for index in places),
            maps=np.stack([self.maps[index] for index in places]),
            rows=tuple(self.rows[index] for index in places),
        )

    def to_json(self) -> dict[str, Json]:
        """See `Result.to_json`."""
        return {"heatmaps": [_heatmap_entry(row) for row in self.rows], "provenance": self.provenance}


def _heatmap_entry(row: HeatmapRow) -> dict[str, object]:
    return {"class" if key == "class_index" else key: value for key, value in asdict(row).items()}
