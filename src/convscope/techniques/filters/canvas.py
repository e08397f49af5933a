"""What is optimised: the pixels themselves, and where they start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convscope.networks import Network
from convscope.techniques.filters.recipes import Recipe


def starts(network: Network, recipe: Recipe, size: tuple[int, int], seed: int, numbers: Sequence[int]) -> np.ndarray:
    """Start pictures `(n, h, w, c)` float32: uniform noise around mid-grey, in the network's range.

    Bit-equal for a (seed, number), whatever the backend and whichever others are drawn beside it.

    Args:
        network: whose range and channels.
        recipe: its amplitude, in units of half the range.
        size: `(h, w)` in pixels.
        seed: any integer.
        numbers: one for each picture; a channel's number, or a negative one for noise that belongs to none.
    """
    middle, half = middle_and_half(network)
    shape = (*size, network.inputs.channels)

    def start(number: int) -> np.ndarray:
        noise = _generator(seed, number).uniform(size=shape)
        return (middle + (noise - 0.5) * recipe.amplitude * half).astype(np.float32)

    return np.stack([start(number) for number in numbers])


def middle_and_half(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Mid-grey and half the range `(c,)` of what the network takes."""
    black, white = network.preprocessing.range(network.inputs.channels)
    return (black + white) / 2, (white - black) / 2


def _generator(seed: int, number: int) -> np.random.Generator:
    # Seeds are natural numbers to NumPy: map ..., -2, -1, 0, 1, ... to 3, 1, 0, 2, ....
    folded = [2 * value if value >= 0 else -2 * value - 1 for value in (seed, number)]
    return np.random.Generator(np.random.PCG64(folded))
