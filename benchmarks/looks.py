"""Measures of filter images, the same for every tool: the numbers of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from benchmarks.ascents import ASSETS, from_shares, opened
from convscope.images.decode import read_readable_images
from convscope.images.image import fit_batch
from convscope.objectives import channel
from convscope.techniques.filters.ascent import Moved, Plan, measured
from convscope.techniques.filters.recipes import FAST
from convscope.techniques.filters.transforms import Affine

# Drawn from other numbers than any ascent's, and wider than those that recipe `fast` uses.
HELD_OUT = Affine(shift=0.08, scale=(0.92, 1.08), rotation=8.0)
DRAWS = 8
PHOTOS = 120  # natural images


class Judge:
    """The activations of a layer's channels.

    Args:
        network: a key of `ascents.NETWORKS`.
        layer: its path.
        channels: the channels whose images are measured.
        size: of the images, a side in pixels.
    """

    def __init__(self, network: str, layer: str, channels: Sequence[int], size: int = 224) -> None:
        self.network, self.layer, self.size = opened(network), layer, (size, size)
        self.channels = np.array(channels)
        self._plan = Plan(self.network, FAST, self.size)
        self._bound = self._plan.bind(channel(layer, 0))

    def activations(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The channel's mean over its map `(n,)`: of each image as it is, and moved (the mean of `DRAWS` draws)."""
        images = from_shares(self.network, shares)
        own = np.arange(len(self.channels))
        clean = self._means(images)[own, self.channels]
        moved = self._moved(images).reshape(len(images), DRAWS, -1).mean(axis=1)[own, self.channels]
        return clean, moved

    def answers(self, shares: np.ndarray) -> np.ndarray:
        """Means of all channels `(n, c)` of each image, less those of a mid-grey image."""
        grey = self._means(from_shares(self.network, np.full((1, *shares.shape[1:]), 0.5)))
        return self._means(from_shares(self.network, shares)) - grey

    def natural(self) -> np.ndarray:
        """The highest activation of each channel over natural images `(n,)`."""
        return self._means(self.network.prepare(photographs(), self.size)).max(axis=0)[self.channels]

    def _means(self, images: np.ndarray) -> np.ndarray:
        masks = [self._bound.arguments[0][None]]
        return measured(self._plan, [self._bound], masks, lambda at: images[at], len(images))[0][:, 0]

    def _moved(self, images: np.ndarray) -> np.ndarray:
        def fresh(number: int) -> np.ndarray:
            return HELD_OUT.draw((987654321, number // DRAWS), number % DRAWS, DRAWS, self.size)

        def repeated(at: Sequence[int]) -> np.ndarray:
            return images[[number // DRAWS for number in at]]

        masks, count = [self._bound.arguments[0][None]], len(images) * DRAWS
        return measured(self._plan, [self._bound], masks, repeated, count, Moved(fresh))[0][:, 0]


@cache
def photographs() -> list:
    """Natural images of many classes."""
    files = sorted((ASSETS / "photos" / "imagenet").glob("*"))
    return read_readable_images([str(file) for file in files[:: max(1, len(files) // PHOTOS)]])[0]


def spectrum(shares: np.ndarray) -> np.ndarray:
    """Log mean power of brightness over rings of frequency `(n, rings)`, less its mean: the roughness of images."""
    light = np.clip(shares, 0, 1).mean(axis=-1)
    light = light - light.mean(axis=(1, 2), keepdims=True)
    window = np.outer(np.hanning(light.shape[1]), np.hanning(light.shape[2]))
    power = np.abs(np.fft.fft2(light * window)) ** 2
    rows, columns = np.fft.fftfreq(light.shape[1])[:, None], np.fft.fftfreq(light.shape[2])[None]
    ring = np.round(np.hypot(rows, columns) * 64).astype(int)
    rings = np.stack([power[:, ring == number].mean(axis=1) for number in range(1, 32)], axis=-1)
    logs = np.log10(np.maximum(rings, 1e-12))
    return logs - logs.mean(axis=1, keepdims=True)


def natural_spectrum(size: int = 224) -> np.ndarray:
    """The mean of `spectrum` over natural images `(rings,)`."""
    return spectrum(fit_batch(photographs(), size, size, 3) / 255.0).mean(axis=0)
