"""The output of layers for images: raw values and statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np

from convscope.errors import UsageError, option
from convscope.images.image import InputImage
from convscope.networks.layers import Layer, check_channel, find_layer
from convscope.results.base import Result
from convscope.results.parameters import ActivationParameters
from convscope.schema import Json


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's activations on one image.

    Attributes:
        image, layer: the image and the layer.
        kind: of the layer.
        shape: `(h, w, c)` or `(c,)`.
        mean, max: of the raw activation.
        zeros: share of exact zeros, 0..1, counted after the non-linearity at `counted_at`; None where there is none.
        empty_channels: number of channels that are zero everywhere there; None where there is no non-linearity.
        counted_at: path of the layer after which the zeros were counted.

    Example:
        >>> row = convscope.activations(network, PHOTOS[0], "block4_conv").statistics[0]
        >>> row.layer, row.shape, row.counted_at
        ('block4_conv', (28, 28, 96), 'block4_conv')
    """

    image: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    max: float
    zeros: float | None
    empty_channels: int | None
    counted_at: str | None

    @property
    def cells(self) -> list[str]:
        """Image, layer, shape, max, zeros and empty channels as text for a table."""
        zeros = "n/a" if self.zeros is None else f"{100 * self.zeros:.0f} %"
        empty = "n/a" if self.empty_channels is None else str(self.empty_channels)
        return [self.image, self.layer, "×".join(map(str, self.shape)), f"{self.max:.3g}", zeros, empty]


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Result):
    """The activations of every chosen layer on every image.

    Attributes:
        images: the images.
        layers: in the order of execution.
        arrays: for each path the raw values `(n, h, w, c)` or `(n, c)`, float32, perhaps memory-mapped.
        statistics: a row for each image and layer.

    Example:
        >>> found = convscope.activations(network, PHOTOS[0], "block4_conv")
        >>> found["block4_conv"].shape, found.channel("block4_conv", 7).shape
        ((1, 28, 28, 96), (28, 28))
    """

    parameters: ActivationParameters = field(default_factory=ActivationParameters)
    images: tuple[InputImage, ...] = ()
    layers: tuple[Layer, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    statistics: tuple[LayerStatistics, ...] = ()
    scratch: tempfile.TemporaryDirectory | None = None  # kept while memory-mapped arrays live in it
    kind: ClassVar[str] = "activations"

    def __getitem__(self, layer: str) -> np.ndarray:
        """The raw values of one layer: `(n, h, w, c)` or `(n, c)`.

        Raises:
            UsageError: it was not computed, or there is no such layer.
        """
        return self.arrays[self.layer(layer).path]

    def channel(self, layer: str, channel: int, image: int = 0) -> np.ndarray:
        """One channel's map `(h, w)`, raw.

        Args:
            layer, channel: a path and a number; image: the number of the image, in the order of `images`.

        Raises:
            UsageError: no such layer or channel, or the layer has no map.
        """
        values = self[layer][image]
        if values.ndim != 3:
            raise UsageError(
                f"layer {layer!r} has no map to show; its output has the shape {values.shape}.",
                code="layer-without-map",
                layer=layer,
                shape=list(values.shape),
            )
        check_channel(channel, values.shape[-1], layer)
        return values[..., channel]

    def row(self, layer: str, image: int = 0) -> LayerStatistics:
        """The numbers of one layer and image; `image` is the number of the image, in the order of `images`.

        Raises:
            UsageError: no such layer. IndexError: no such image.
        """
        return self.statistics[image * len(self.layers) + self.layers.index(self.layer(layer))]

    def to_json(self) -> dict[str, Json]:
        """See `Result.to_json`."""
        return {"activations": [asdict(row) for row in self.statistics], "provenance": self.provenance}

    def rows_of(self, image: int) -> Sequence[LayerStatistics]:
        """The numbers of the image with the number `image`, a row for each layer."""
        return self.statistics[image * len(self.layers) : (image + 1) * len(self.layers)]

    def layer(self, path: str) -> Layer:
        """The layer at a path.

        Raises:
            UsageError: there is none, or it was not asked for.
        """
        try:
            return find_layer(self.layers, path)
        except UsageError as error:
            raise UsageError(
                f"{error.message} These are the {len(self.layers)} layers of this result; ask for others with "
                f"{option('layers')}.",
                code=error.code,
                **error.data,
            ) from None
