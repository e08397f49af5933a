"""A small set of images with the statistics of natural ones, from the images that convscope ships.

Networks are measured on it (`networks/measured.py`), so it has to resemble what they were trained on. The five shipped
images are redder than natural ones are on average and spread less; so their colours are changed by one affine map,
after which their mean and covariance are those of ImageNet's.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

# ImageNet's mean, red, green and blue, on 0..1.
MEAN = (0.485, 0.456, 0.406)
# Its colours, decorrelated (Olah et al. 2017, Feature Visualization): red, green and blue of three independent axes of
# deviation 1, on 0..1.
COLOURS = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])

NAMES = ("cat", "coffee", "photographer", "retina", "mosaic")
# Parts of each image: the share of its shorter side, and the place from the left and from the top.
_PARTS = ((1.0, 0.5, 0.5), (0.75, 0.0, 0.0), (0.75, 1.0, 1.0))
_PIXELS = len(_PARTS) * 224 * 224  # of one image's parts, at most where there are two parts or more
_EACH = 20_000  # pixels of an image that its share of the statistics is from


def natural_images(height: int, width: int, channels: int) -> np.ndarray:
    """Images of `height` and `width`, in groups of one of each shipped image.

    Args:
        height, width: of each; a part of that shape is cut out of a shipped image, and none is stretched.
        channels: 1 or 3.

    Returns:
        `(n, height, width, channels)` float32, values 0..255; 15 of them, fewer of large ones.

    Example:
        >>> natural_images(32, 48, 3).shape
        (15, 32, 48, 3)
    """
    count = int(np.clip(_PIXELS // (height * width), 1, len(_PARTS)))
    cut = [_part(image, height, width, *part) for part in _PARTS[:count] for image in _images()]
    pixels = np.stack([np.asarray(one.convert("L") if channels == 1 else one) for one in cut])
    return pixels.reshape(len(cut), height, width, channels).astype(np.float32)


def _part(image: Image.Image, height: int, width: int, share: float, left: float, top: float) -> Image.Image:
    scale = share * min(image.height / height, image.width / width)
    x, y = left * (image.width - scale * width), top * (image.height - scale * height)
    box = (x, y, x + scale * width, y + scale * height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box)


@cache
def _images() -> tuple[Image.Image, ...]:
    """The shipped images with natural colours."""
    pixels = [_read(name) for name in NAMES]
    some = np.concatenate([_spread(one.reshape(-1, 3)) for one in pixels])
    mean, covariance = 255 * np.array(MEAN), 255**2 * COLOURS @ COLOURS.T
    change = _transport(np.cov(some.T), covariance)
    return tuple(
        Image.fromarray(np.clip((one - some.mean(axis=0)) @ change + mean, 0, 255).round().astype(np.uint8))
        for one in pixels
    )


def _read(name: str) -> np.ndarray:
    with (files("convscope") / "demo" / "photos" / f"{name}.jpg").open("rb") as file:
        return np.asarray(Image.open(file, formats=("JPEG",)).convert("RGB"), np.float64)


def _spread(pixels: np.ndarray) -> np.ndarray:
    """As many pixels of each image, evenly chosen."""
    return pixels[np.linspace(0, len(pixels) - 1, _EACH).astype(int)]


def _transport(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The symmetric matrix that turns the covariance `of` into `to`, and moves values least in the mean."""
    root, inverse = _power(of, 0.5), _power(of, -0.5)
    return inverse @ _power(root @ to @ root, 0.5) @ inverse


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T
