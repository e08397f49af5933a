"""What is optimised: the pixels themselves, or a Fourier spectrum of them, and where they start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convscope.networks import Network

Tensor = Any

# The colours of ImageNet's photographs, decorrelated (Olah et al. 2017, Feature Visualization): red, green and blue of
# each of three independent directions.
COLOURS = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])


class Canvas(Protocol):
    """Parameters that a picture is made of."""

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """The parameters of one picture that the ascent begins with, float32."""

    def picture(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures `(n, h, w, c)` in the range that the network takes, of parameters `(n, ...)`."""

    def of(self, network: Network, pictures: np.ndarray) -> np.ndarray:
        """The parameters `(n, ...)` that give these pictures `(n, h, w, c)`, as nearly as the canvas can."""


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, from uniform noise around mid-grey.

    Attributes:
        amplitude: width of the noise, in units of half the network's range.
    """

    amplitude: float

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """`(h, w, c)`, in the network's range."""
        middle, half = middle_and_half(network)
        noise = generator.uniform(size=(*size, network.inputs.channels))
        return (middle + (noise - 0.5) * self.amplitude * half).astype(np.float32)

    def of(self, network: Network, pictures: np.ndarray) -> np.ndarray:
        """The pictures themselves."""
        return pictures

    def picture(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """The parameters as they are."""
        return parameters


@dataclass(frozen=True)
class Fourier:
    """The spectrum of a picture with decorrelated colours: steps of one length change all frequencies alike.

    After Olah et al. 2017 (Feature Visualization): a spectrum, scaled by sqrt(w h) / max(f, 1 / max(w, h)), its inverse
    real Fourier transform, a quarter of it, decorrelated colours, a sigmoid.

    Attributes:
        deviation: of the normal numbers that the spectrum starts with.
    """

    deviation: float = 0.01

    def start(self, network: Network, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """Real and imaginary parts `(2, h, w // 2 + 1, c)`."""
        height, width = size
        shape = (2, height, width // 2 + 1, network.inputs.channels)
        return generator.normal(0, self.deviation, shape).astype(np.float32)

    def picture(self, network: Network, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Never outside of the network's range, whatever the parameters are."""
        ops, channels = network.ops, network.inputs.channels
        values = self.values(parameters, size, channels, ops)
        black, white = (end.astype(np.float32) for end in network.preprocessing.range(channels))
        return ops.convert_to_tensor(black) + values * ops.convert_to_tensor(white - black)

    def of(self, network: Network, pictures: np.ndarray) -> np.ndarray:
        """The spectra `(n, 2, h, w // 2 + 1, c)` of pictures; values within 2 % of black and white come nearer."""
        black, white = network.preprocessing.range(network.inputs.channels)
        share = np.clip((pictures.astype(np.float64) - black) / (white - black), 0.02, 0.98)
        values = 4 * np.log(share / (1 - share))
        if values.shape[-1] == 3:
            values = values @ np.linalg.inv(_mix()).T
        spectrum = np.fft.rfft2(values, axes=(1, 2)) / spectrum_scale(pictures.shape[1:3])[..., None]
        return np.stack([spectrum.real, spectrum.imag], axis=1).astype(np.float32)

    def values(self, parameters: Tensor, size: tuple[int, int], channels: int, ops: Any) -> Tensor:
        """Pictures `(n, h, w, c)` in 0..1; the inverse transform is a product with cosines and sines on each axis,
        which every framework has and can differentiate.
        """
        rows, columns = _waves(size)
        scale = spectrum_scale(size)[None, :, :, None].astype(np.float32)
        scaled = [parameters[:, part] * ops.convert_to_tensor(scale) for part in (0, 1)]
        (cos_y, sin_y), (cos_x, sin_x) = ([ops.convert_to_tensor(wave) for wave in waves] for waves in (rows, columns))
        along, across = "yu,nufc->nyfc", "xf,nyfc->nyxc"
        real = ops.einsum(along, cos_y, scaled[0]) - ops.einsum(along, sin_y, scaled[1])
        imaginary = ops.einsum(along, sin_y, scaled[0]) + ops.einsum(along, cos_y, scaled[1])
        values = (ops.einsum(across, cos_x, real) - ops.einsum(across, sin_x, imaginary)) / 4
        if channels == 3:
            values = ops.einsum("nyxk,ck->nyxc", values, ops.convert_to_tensor(_mix().astype(np.float32)))
        return ops.sigmoid(values)


def _mix() -> np.ndarray:
    return COLOURS / np.linalg.norm(COLOURS, axis=0).max()


def spectrum_scale(size: tuple[int, int]) -> np.ndarray:
    """What a spectrum of ones is multiplied by `(h, w // 2 + 1)`, so that it falls off as in photographs."""
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
    """Mid-grey and half the range `(c,)` of what the network takes."""
    black, white = network.preprocessing.range(network.inputs.channels)
    return (black + white) / 2, (white - black) / 2


def generator(*numbers: int) -> np.random.Generator:
    """A fresh generator for whole numbers, negative ones among them."""
    # Seeds are natural numbers to NumPy: map ..., -2, -1, 0, 1, ... to 3, 1, 0, 2, ....
    folded = [2 * value if value >= 0 else -2 * value - 1 for value in numbers]
    return np.random.Generator(np.random.PCG64(folded))
