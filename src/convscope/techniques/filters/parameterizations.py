"""Parameterizations: the pixels themselves, their Fourier spectrum, or only its phases; and their start values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from convscope.images.natural import COLOURS
from convscope.networks import Network
from convscope.networks.foreign import Tensor
from convscope.networks.ops import Operations


class Parameterization(Protocol):
    """Parameters that an image is made of. Any frozen dataclass with these methods is one.

    Example:
        >>> from dataclasses import dataclass, replace
        >>> from convscope.techniques.filters import RECIPES
        >>> @dataclass(frozen=True)
        ... class OneMap:
        ...     def start(self, network, size, generator):
        ...         return generator.normal(0, 0.01, (*size, 1)).astype(np.float32)
        ...     def image(self, network, parameters, size):
        ...         return in_range(network, network.ops.repeat(parameters, network.inputs.channels, axis=-1))
        ...     def parameters(self, network, images):
        ...         return logits_of(network, images).mean(axis=-1, keepdims=True).astype(np.float32)
        >>> recipe = replace(RECIPES["fast"], name="one-map", parameterization=OneMap())
        >>> convscope.filters(network, "block4_conv", [7], recipe=recipe, steps=2, size=32).values.shape
        (1, 32, 32, 3)
    """

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """The parameters of one image that the ascent begins with, float32."""

    def image(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Images `(n, h, w, c)` in the range that the network takes, of parameters `(n, ...)`."""

    def parameters(self, network: Network, images: np.ndarray) -> np.ndarray:
        """The parameters `(n, ...)` that give these images `(n, h, w, c)`, as nearly as it can."""


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, from uniform noise around mid-grey.

    Attributes:
        amplitude: width of the noise, in units of half the network's range.
        clamp: values beyond black and white are shown as black and white.

    Example:
        >>> Pixels(amplitude=0.25).start(network, (8, 8), np.random.default_rng(0)).shape
        (8, 8, 3)
    """

    amplitude: float
    clamp: bool = False

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """`(h, w, c)`, in the network's range."""
        middle, half = middle_and_half(network)
        noise = generator.uniform(size=(*size, network.inputs.channels))
        return (middle + (noise - 0.5) * self.amplitude * half).astype(np.float32)

    def parameters(self, network: Network, images: np.ndarray) -> np.ndarray:
        """The images themselves."""
        return images

    def image(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """The parameters as they are, or clamped to the range."""
        if not self.clamp:
            return parameters
        ops = network.ops
        black, white = (end.astype(np.float32) for end in network.preprocessing.range(network.inputs.channels))
        share = ops.clip((parameters - ops.convert_to_tensor(black)) / ops.convert_to_tensor(white - black), 0.0, 1.0)
        return ops.convert_to_tensor(black) + share * ops.convert_to_tensor(white - black)


@dataclass(frozen=True)
class Fourier:
    """The spectrum of an image with decorrelated colours: steps of one length change all frequencies alike.

    After Olah et al. 2017 (Feature Visualization): a spectrum, scaled by sqrt(w h) / max(f, 1 / max(w, h)), its inverse
    real Fourier transform, a quarter of it, decorrelated colours, a sigmoid.

    Attributes:
        deviation: of the normal numbers that the spectrum starts with.

    Example:
        >>> Fourier().start(network, (8, 8), np.random.default_rng(0)).shape
        (2, 8, 5, 3)
    """

    deviation: float = 0.01

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """Real and imaginary parts `(2, h, w // 2 + 1, c)`."""
        height, width = size
        shape = (2, height, width // 2 + 1, network.inputs.channels)
        return generator.normal(0, self.deviation, shape).astype(np.float32)

    def image(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Parameterization.image`; always inside of the network's range."""
        ops = network.ops
        scale = ops.convert_to_tensor((spectrum_scale(size) / 4)[None, None, :, :, None].astype(np.float32))
        return in_range(network, inverse_transform(parameters * scale, size, ops))

    def parameters(self, network: Network, images: np.ndarray) -> np.ndarray:
        """The spectra `(n, 2, h, w // 2 + 1, c)` of images; values within 2 % of black and white come nearer."""
        spectrum = (
            np.fft.rfft2(logits_of(network, images), axes=(1, 2)) / (spectrum_scale(images.shape[1:3]) / 4)[..., None]
        )
        return np.stack([spectrum.real, spectrum.imag], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Phases:
    """The phases of a spectrum with the mean magnitudes of natural images.

    After Fel et al. 2023 (MaCo, 2306.06805), with magnitudes of our own: see `natural_magnitudes`.

    Example:
        >>> Phases().start(network, (8, 8), np.random.default_rng(0)).shape
        (8, 5, 3)
    """

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """Phases `(h, w // 2 + 1, c)` in radians, uniform: a texture as rough as natural images."""
        height, width = size
        shape = (height, width // 2 + 1, network.inputs.channels)
        return generator.uniform(-np.pi, np.pi, shape).astype(np.float32)

    def image(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Parameterization.image`; always inside of the network's range."""
        ops = network.ops
        magnitudes = ops.convert_to_tensor(natural_magnitudes(size, network.inputs.channels)[None])
        spectra = ops.stack([magnitudes * ops.cos(parameters), magnitudes * ops.sin(parameters)], axis=1)
        return in_range(network, inverse_transform(spectra, size, ops))

    def parameters(self, network: Network, images: np.ndarray) -> np.ndarray:
        """The phases of images: their edges stay, their magnitudes become the mean ones."""
        return np.angle(np.fft.rfft2(logits_of(network, images), axes=(1, 2))).astype(np.float32)


def inverse_transform(spectra: Tensor, size: tuple[int, int], ops: Operations) -> Tensor:
    """The inverse real Fourier transform `(n, h, w, c)` of real and imaginary parts `(n, 2, h, w // 2 + 1, c)`.

    A product with cosines and sines on each axis, which every framework has and can differentiate.
    """
    (cos_y, sin_y), (cos_x, sin_x) = _waves(size)
    height, half, channels = size[0], size[1] // 2 + 1, spectra.shape[-1]
    down = ops.convert_to_tensor(np.block([[cos_y, -sin_y], [sin_y, cos_y]]))  # of both parts at once
    right = ops.convert_to_tensor(np.concatenate([cos_x, -sin_x], axis=1).T)
    both = ops.matmul(down, ops.reshape(spectra, (-1, 2 * height, half * channels)))
    # The frequencies last, so that they are one long product.
    both = ops.transpose(ops.reshape(both, (-1, 2, height, half, channels)), (0, 2, 4, 1, 3))
    values = ops.matmul(ops.reshape(both, (-1, 2 * half)), right)
    return ops.transpose(ops.reshape(values, (-1, height, channels, size[1])), (0, 1, 3, 2))


def in_range(network: Network, values: Tensor) -> Tensor:
    """Images `(n, h, w, c)` of logits of shares between black and white; three channels have decorrelated colours.

    Example:
        >>> values = network.tensor(np.zeros((1, 8, 8, 3), np.float32))
        >>> bool(np.allclose(network.numpy(in_range(network, values))[0, 0, 0], middle_and_half(network)[0]))
        True
    """
    ops, channels = network.ops, network.inputs.channels
    if channels == 3:
        values = ops.einsum("nyxk,ck->nyxc", values, ops.convert_to_tensor(_mix().astype(np.float32)))
    black, white = (end.astype(np.float32) for end in network.preprocessing.range(channels))
    return ops.convert_to_tensor(black) + ops.sigmoid(values) * ops.convert_to_tensor(white - black)


def logits_of(network: Network, images: np.ndarray) -> np.ndarray:
    """The inverse of `in_range`, in NumPy."""
    black, white = network.preprocessing.range(network.inputs.channels)
    return colour_logits((images.astype(np.float64) - black) / (white - black))


def colour_logits(shares: np.ndarray) -> np.ndarray:
    """Logits of shares between black and white `(n, h, w, c)`, with decorrelated colours where there are three.

    Values within 2 % of black and white come nearer.
    """
    shares = np.clip(shares, 0.02, 0.98)
    values = np.log(shares / (1 - shares))
    return values @ np.linalg.inv(_mix()).T if values.shape[-1] == 3 else values


@cache
def natural_magnitudes(size: tuple[int, int], channels: int) -> np.ndarray:
    """Mean magnitudes `(h, w // 2 + 1, c)` float32 of natural images of this size, in the space of `in_range`.

    Measured by `training/spectrum.py` on patches of 128 pixels; between its frequencies interpolated, below the lowest
    continued as 1 / f. Nothing at frequency 0: the mean is mid-grey. Channels that are not three colours have the
    magnitudes of brightness.
    """
    measured = np.log(np.load(Path(__file__).with_name("spectrum.npy")).astype(np.float64))
    patch = 2 * (len(measured) - 1)
    down, right = np.abs(np.fft.fftfreq(size[0]))[:, None] * patch, np.fft.rfftfreq(size[1])[None] * patch
    radius = np.hypot(down, right)
    beyond = np.maximum(1, 1 / np.maximum(radius, 1e-12))  # brings a frequency to the lowest measured one
    found = np.exp(_between(measured, down * beyond, right * beyond)) * beyond[..., None]
    found[0, 0] = 0
    found = found if channels == 3 else np.repeat(found[..., :1], channels, axis=-1)
    return (found * np.sqrt(size[0] * size[1])).astype(np.float32)


def _between(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A table `(h, w, c)` looked up bilinearly at places `(...)`: `(..., c)`."""
    rows, columns = np.broadcast_arrays(rows, columns)
    top = np.clip(np.floor(rows).astype(int), 0, table.shape[0] - 2)
    left = np.clip(np.floor(columns).astype(int), 0, table.shape[1] - 2)
    lower, further = (rows - top)[..., None], (columns - left)[..., None]
    upper_row = table[top, left] * (1 - further) + table[top, left + 1] * further
    lower_row = table[top + 1, left] * (1 - further) + table[top + 1, left + 1] * further
    return upper_row * (1 - lower) + lower_row * lower


def _mix() -> np.ndarray:
    return COLOURS / np.linalg.norm(COLOURS, axis=0).max()


def spectrum_scale(size: tuple[int, int]) -> np.ndarray:
    """Factors `(h, w // 2 + 1)` that make a spectrum of ones fall off as in natural images."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    return np.sqrt(width * height) / np.maximum(frequency, 1 / max(width, height))


def _waves(size: tuple[int, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cosines and sines of the inverse real Fourier transform: over rows `(h, h)`, over columns `(w, w // 2 + 1)`."""
    height, width = size
    down = 2 * np.pi * np.outer(np.arange(height), np.arange(height)) / height
    half = width // 2 + 1
    right = 2 * np.pi * np.outer(np.arange(width), np.arange(half)) / width
    # Of each frequency but the first (and the last of an even width) the other half of the spectrum has a mirror image.
    twice = np.full(half, 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    rows = [np.cos(down) / height, np.sin(down) / height]
    columns = [np.cos(right) * twice / width, np.sin(right) * twice / width]
    return [wave.astype(np.float32) for wave in rows], [wave.astype(np.float32) for wave in columns]


def middle_and_half(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Mid-grey and half the range `(c,)` of the network's input.

    Example:
        >>> middle, half = middle_and_half(network)
        >>> middle.shape, half.shape
        ((3,), (3,))
    """
    black, white = network.preprocessing.range(network.inputs.channels)
    return (black + white) / 2, (white - black) / 2


def generator(*numbers: int) -> np.random.Generator:
    """A fresh generator for whole numbers, negative ones among them."""
    # Seeds are natural numbers to NumPy: map ..., -2, -1, 0, 1, ... to 3, 1, 0, 2, ....
    folded = [2 * value if value >= 0 else -2 * value - 1 for value in numbers]
    return np.random.Generator(np.random.PCG64(folded))
