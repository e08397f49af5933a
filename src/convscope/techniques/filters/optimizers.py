"""Optimizers: update rules for parameters from their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from convscope.networks import Network
from convscope.networks.foreign import Tensor
from convscope.techniques.filters.parameterizations import middle_and_half

TINY = 1e-12  # guards the squared norm of a gradient, as TensorFlow's l2_normalize does


class Optimizer(Protocol):
    """An update rule for parameters. Any frozen dataclass with these methods is one.

    Example:
        >>> from dataclasses import dataclass, replace
        >>> from convscope.techniques.filters import RECIPES
        >>> @dataclass(frozen=True)
        ... class Ascent:
        ...     rate: float
        ...     def init(self, parameters):
        ...         return ()
        ...     def step(self, network, parameters, gradient, square, memory):
        ...         return (parameters + self.rate * gradient,)
        >>> recipe = replace(RECIPES["fast"], name="plain", optimizer=Ascent(0.1))
        >>> convscope.filters(network, "block4_conv", [7], recipe=recipe, steps=2, size=32).values.shape
        (1, 32, 32, 3)
    """

    def init(self, parameters: np.ndarray) -> tuple[np.ndarray, ...]:
        """The initial memory, which is kept from step to step."""

    def step(
        self, network: Network, parameters: Tensor, gradient: Tensor, square: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The next parameters and memory.

        Args:
            network: for its operations and range.
            parameters, gradient: `(n, ...)`.
            square: squared L2 norm of the gradient of each image, `(n, 1, ...)`.
            memory: the memory from the step before.
        """


@dataclass(frozen=True)
class Normalised:
    """A step of one length along the gradient of each image.

    Attributes:
        length: of the step, in units of half the network's range.

    Example:
        >>> Normalised(length=10.0).init(np.zeros((1, 8, 8, 3), np.float32))
        ()
    """

    length: float

    def init(self, parameters: np.ndarray) -> tuple[np.ndarray, ...]:
        """An empty memory."""
        return ()

    def step(
        self, network: Network, parameters: Tensor, gradient: Tensor, square: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """See `Optimizer.step`."""
        ops = network.ops
        stride = (self.length * middle_and_half(network)[1]).astype(np.float32)
        direction = gradient * ops.rsqrt(ops.maximum(square, TINY))
        # Where a network overflows, its image stays as it is and the others go on.
        return (parameters + ops.convert_to_tensor(stride) * ops.where(ops.isfinite(direction), direction, 0.0),)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2014, 1412.6980, algorithm 1), each image for itself.

    Attributes:
        rate: of the step; first, second: decay of the gradient's mean and of its square's.
        nesterov: use the mean of the next step in advance (Dozat 2016, Incorporating Nesterov Momentum into
            Adam).

    Example:
        >>> mean, spread, count = Adam(rate=0.05).init(np.zeros((1, 8, 8, 3), np.float32))
        >>> mean.shape, count.shape
        ((1, 8, 8, 3), (1, 1, 1, 1))
    """

    rate: float
    first: float = 0.9
    second: float = 0.999
    tiny: float = 1e-8
    nesterov: bool = False

    def init(self, parameters: np.ndarray) -> tuple[np.ndarray, ...]:
        """Means of the gradient and of its square, and the number of steps."""
        return (
            np.zeros_like(parameters),
            np.zeros_like(parameters),
            np.zeros((len(parameters), *[1] * (parameters.ndim - 1)), np.float32),
        )

    def step(
        self, network: Network, parameters: Tensor, gradient: Tensor, square: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """See `Optimizer.step`."""
        ops, (mean, spread, count) = network.ops, memory
        gradient = ops.where(ops.isfinite(gradient), gradient, 0.0)
        count = count + 1.0
        mean = self.first * mean + (1 - self.first) * gradient
        spread = self.second * spread + (1 - self.second) * ops.square(gradient)
        grown = 1 - ops.exp(count * float(np.log(self.first)))
        widened = 1 - ops.exp(count * float(np.log(self.second)))
        ahead = mean / grown
        if self.nesterov:
            later = 1 - ops.exp((count + 1.0) * float(np.log(self.first)))
            ahead = self.first * mean / later + (1 - self.first) * gradient / grown
        moved = parameters + self.rate * ahead / (ops.sqrt(spread / widened) + self.tiny)
        return moved, mean, spread, count
