"""The regions of images that are alike to a layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np

from convscope.images.image import InputImage
from convscope.networks import Prediction
from convscope.results.base import Result
from convscope.results.parameters import ConceptParameters
from convscope.schema import Json


@dataclass(frozen=True)
class Concept:
    """A concept of a layer: a direction of its activations, found without labels.

    Attributes:
        number: from 0, the strongest first.
        share: of the maps' squares that would be lost without it, 0..1.
        predictions: the classes that a map full of it supports, best first; none where there are no classes.

    Example:
        >>> row = convscope.concepts(network, PHOTOS[:2], count=2).rows[0]
        >>> row.number, 0 <= row.share <= 1
        (0, True)
    """

    number: int
    share: float
    predictions: tuple[Prediction, ...]

    @property
    def text(self) -> str:
        """ "concept 0: tabby 0.83"."""
        return f"concept {self.number}" + (f": {self.predictions[0].text}" if self.predictions else "")


@dataclass(frozen=True, eq=False, repr=False)
class Concepts(Result):
    """The regions of some images that are alike in a layer.

    Attributes:
        images: the images.
        values: strength of each concept at each place `(n, h, w, k)` float32, not negative.
        vectors: the channels of each concept `(k, c)` float32, not negative, of length 1.
        rows: the words and numbers, one for each concept.

    Example:
        >>> found = convscope.concepts(network, PHOTOS[:2], count=2)
        >>> found.kind, len(found.rows), bool((found.values >= 0).all())
        ('concepts', 2, True)
    """

    parameters: ConceptParameters = field(default_factory=ConceptParameters)
    images: tuple[InputImage, ...] = ()
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 1), np.float32))
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    rows: tuple[Concept, ...] = ()
    kind: ClassVar[str] = "concepts"

    def to_json(self) -> dict[str, Json]:
        """See `Result.to_json`."""
        return {"concepts": [asdict(row) for row in self.rows], "provenance": self.provenance}
