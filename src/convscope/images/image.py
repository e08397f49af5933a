"""An image as an input, and its arrays as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from convscope.errors import UsageError
from convscope.images.values import MOST_CHANNELS, as_channels, resized

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class InputImage:
    """A decoded image.

    Attributes:
        name: the file's name without its suffix; "image" where there is no file.
        pixels: (h, w, 3) uint8, RGB, upright, read-only: what is shown.
        source: the path as it was given, None where there is no file.
        notes: descriptions of the changes by decoding, such as "transparency laid over white".
        sha256: of the file's bytes, in hexadecimal; None where there is no file.
        label: the class that it is known to show; None where that is not known.
        values: what the image holds beyond `pixels`: arrays (h, w, c) in units of 0..255, uint8 or float32 (of more
            than 8 bits, not rounded), one for each number of channels that a network may take.
        colour: False where `pixels` only show the image, whose channels have no colours.

    Example:
        >>> image = read_image(PHOTOS[0])
        >>> image.name, image.pixels.dtype.name, image.pixels.ndim
        ('cat', 'uint8', 3)
    """

    name: str
    pixels: np.ndarray
    source: str | None = None
    notes: tuple[str, ...] = ()
    sha256: str | None = None
    label: str | None = None
    values: tuple[np.ndarray, ...] = ()
    colour: bool = True

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The pixels and the values: all that results depend on."""
        return (self.pixels, *self.values)


def fit(image: InputImage, height: int, width: int, channels: int) -> np.ndarray:
    """The whole image as a network takes it: (height, width, channels) float32, values 0..255.

    The image is stretched to the size, not cropped, so its aspect may change: bilinear, averaged over
    whole pixels where it shrinks. One channel is the luma of ITU-R BT.601. Values of more than 8 bits keep their
    fractions.

    Raises:
        UsageError: the image has another number of channels, or the size is not positive.

    Example:
        >>> fit(read_image(PHOTOS[0]), 32, 48, channels=1).shape
        (32, 48, 1)
    """
    if height < 1 or width < 1:
        raise UsageError(
            f"an image needs a size of at least 1 x 1, not {height} x {width}: give a larger one",
            code="image-empty",
            size=[height, width],
        )
    values = _values_for(image, channels)
    if values is not None:
        return np.ascontiguousarray(as_channels(resized(values, height, width), channels))
    return fitted(image.pixels, height, width, channels).astype(np.float32).reshape(height, width, channels)


def _values_for(image: InputImage, channels: int) -> np.ndarray | None:
    """The values that make the channels that a network takes; None where the pixels do."""
    for values in image.values:
        if values.shape[-1] == channels:
            return values
    if channels in (1, 3) and image.colour:
        return next((values for values in image.values if values.shape[-1] in (1, 3)), None)
    raise _misfit(image, channels)


def _misfit(image: InputImage, channels: int) -> UsageError:
    found = sorted({values.shape[-1] for values in image.values} | ({3} if image.colour else set()))
    has = f"{' or '.join(map(str, found))} channels{' (RGB)' if found == [3] else ''}"
    remedy = (
        f"choose {channels} of them, and give an array (h, w, {channels})"
        if channels in (1, 3)
        else f"give an array (h, w, {channels}), as .npy too, or a TIFF of {channels} bands or {channels} grey pages"
        if 1 <= channels <= MOST_CHANNELS
        else f"images of 1 to {MOST_CHANNELS} channels are read"
    )
    return UsageError(
        f"the image {image.name!r} has {has}, but the model takes {channels}: {remedy}",
        code="channels-misfit",
        found=found,
        expected=channels,
    )


def fitted(pixels: np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
    """Pixels `(h, w, 3)` uint8 resized to `(height, width)` of grey, or `(height, width, 3)`; uint8."""
    decoded = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    return np.asarray(decoded.resize((width, height), Image.Resampling.BILINEAR))


def fit_batch(images: Sequence[InputImage], height: int, width: int, channels: int) -> np.ndarray:
    """`fit` for each image: (n, height, width, channels) float32, values 0..255."""
    out = np.empty((len(images), height, width, channels), np.float32)
    for row, image in zip(out, images, strict=True):
        row[:] = fit(image, height, width, channels)
    return out
