"""Gradient ascent on pictures: one driver owns the loop, the chunks and what is written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscope.networks import Layer, Network
from convscope.results import Progress
from convscope.techniques.filters.canvas import middle_and_half
from convscope.techniques.filters.objectives import channel_means, of_channels
from convscope.techniques.filters.recipes import Recipe

TINY = 1e-12  # guards the squared norm of a gradient, as TensorFlow's l2_normalize does
RESPONSES_BATCH = 32


@dataclass(frozen=True)
class Ascent:
    """The course of an ascent.

    Attributes:
        pictures: final canvases `(n, h, w, c)` float32.
        activations: the objective before each step `(n, steps)`.
        final: the objective of the final pictures `(n,)`.
        gradients: L2 norm of the gradient at each step `(n, steps)`.
    """

    pictures: np.ndarray
    activations: np.ndarray
    final: np.ndarray
    gradients: np.ndarray


def ascend(
    network: Network,
    layer: Layer,
    channels: Sequence[int],
    recipe: Recipe,
    begin: Callable[[Sequence[int]], np.ndarray],
    batch: int,
    progress: Progress = None,
) -> Ascent:
    """Raise one channel for each start picture, `batch` of them side by side.

    One compiled step serves every chunk: the channel numbers are an argument, and the last chunk is filled up.
    A picture's ascent does not depend on which others share its batch.

    Args:
        network: to climb in.
        layer: whose channels, with its shape at the size of the pictures.
        channels: `n` numbers.
        recipe: the step and the number of steps.
        begin: from channel numbers to start pictures `(n, h, w, c)` in the network's range.
        batch: pictures at a time.
        progress: called after each step.
    """
    step, look = _step(network, layer, recipe), _look(network, layer, recipe)
    total = -(-len(channels) // batch) * recipe.steps
    parts = []
    for start in range(0, len(channels), batch):
        chunk = np.resize(np.asarray(channels[start : start + batch], np.int32), batch)
        canvas, numbers = network.tensor(begin(chunk.tolist())), network.tensor(chunk)
        course = []
        for done in range(recipe.steps):
            value, norm, canvas = step(canvas, numbers)
            course.append((network.numpy(value), network.numpy(norm)))
            if progress:
                progress(start // batch * recipe.steps + done + 1, total, f"channels {chunk[0]} … {chunk[-1]}")
        final = network.numpy(look(canvas))[np.arange(batch), chunk]
        kept = len(channels[start : start + batch])
        parts.append((network.numpy(canvas)[:kept], *np.stack(course, axis=-1)[:, :kept], final[:kept]))
    pictures, activations, gradients, finals = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Ascent(pictures, activations, finals, gradients)


def first_gradients(
    network: Network,
    layer: Layer,
    channels: Sequence[int],
    recipe: Recipe,
    begin: Callable[[Sequence[int]], np.ndarray],
) -> np.ndarray:
    """L2 norm `(n,)` of the gradient of each channel at its start picture; the arguments are those of `ascend`."""
    numbers = np.asarray(channels, np.int32)
    canvas = network.tensor(begin(channels))
    return network.numpy(_step(network, layer, recipe)(canvas, network.tensor(numbers))[1])


def _step(network: Network, layer: Layer, recipe: Recipe) -> Callable:
    key = ("ascent step", layer.path, layer.shape, recipe, network.preprocessing)
    return network.program(key, lambda: network.compile(step_of(network, layer, recipe)))


def _look(network: Network, layer: Layer, recipe: Recipe) -> Callable:
    key = ("channel means", layer.path, layer.shape, recipe)
    return network.program(key, lambda: network.compile(_looking(network, layer, recipe)))


def step_of(network: Network, layer: Layer, recipe: Recipe) -> Callable:
    """One update `step(run, canvas, channels) -> (objective (n,), gradient norm (n,), next canvas)`."""
    ops, border = network.ops, _border(layer, recipe)
    stride = (recipe.step * middle_and_half(network)[1]).astype(np.float32)

    def step(run: Callable, canvas: Any, channels: Any) -> tuple:
        def score(canvas: Any) -> tuple:
            activation = run(canvas, record=(layer.path,), outputs=False).activations[layer.path]
            values = of_channels(channel_means(activation, ops, border), channels, ops)
            return ops.sum(values), values

        (_, values), gradient = network.value_and_grad(score)(canvas)
        square = ops.sum(ops.square(gradient), axis=(1, 2, 3), keepdims=True)
        direction = gradient * ops.rsqrt(ops.maximum(square, TINY))
        # Where a network overflows, its picture stays as it is and the others go on.
        moved = canvas + ops.convert_to_tensor(stride) * ops.where(ops.isfinite(direction), direction, 0.0)
        return values, ops.sqrt(square[:, 0, 0, 0]), moved

    return step


def responses(
    network: Network, layer: Layer, recipe: Recipe, pictures: Callable[[Sequence[int]], np.ndarray], count: int
) -> np.ndarray:
    """The objective of every channel `(count, c)` for the prepared pictures that `pictures(numbers)` gives.

    They are asked for a chunk at a time, so that many large ones need not be in memory together.
    """
    look, parts = _look(network, layer, recipe), []
    batch = min(RESPONSES_BATCH, max(1, count))
    for start in range(0, count, batch):
        numbers = np.minimum(np.arange(start, start + batch), count - 1)  # filled up: one shape, one compile
        parts.append(network.numpy(look(network.tensor(pictures(numbers.tolist())))))
    return np.concatenate(parts)[:count] if parts else np.zeros((0, layer.channels), np.float32)


def _looking(network: Network, layer: Layer, recipe: Recipe) -> Callable:
    ops, border = network.ops, _border(layer, recipe)

    def look(run: Callable, x: Any) -> Any:
        return channel_means(run(x, record=(layer.path,), outputs=False).activations[layer.path], ops, border)

    return look


def _border(layer: Layer, recipe: Recipe) -> int:
    return recipe.border_for(min(layer.shape[:2])) if layer.spatial else 0
