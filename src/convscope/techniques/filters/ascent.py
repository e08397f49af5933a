"""Gradient ascent on pictures: one driver owns the loop, the chunks and what is written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscope.networks import Layer, Network
from convscope.results import Progress
from convscope.techniques.filters.canvas import middle_and_half, starts
from convscope.techniques.filters.objectives import channel_means, of_channels
from convscope.techniques.filters.recipes import Recipe

RESPONSES_BATCH = 32


@dataclass(frozen=True)
class Climb:
    """What is climbed and how: everything that a compiled step depends on.

    Attributes:
        network: to climb in.
        layer: whose channels, with its shape at the size of the pictures.
        recipe: canvas, rule, transforms and number of steps.
        size: `(h, w)` of the pictures.
        seed: of start pictures and transforms.
    """

    network: Network
    layer: Layer
    recipe: Recipe
    size: tuple[int, int]
    seed: int = 0

    def starts(self, numbers: Sequence[int]) -> np.ndarray:
        """The parameters that the channels begin with; negative numbers are noise that belongs to none."""
        return starts(self.network, self.recipe, self.size, self.seed, numbers)

    def pictures(self, parameters: np.ndarray) -> np.ndarray:
        """The pictures `(n, h, w, c)` that parameters stand for."""
        draw = self.network.program(
            ("canvas", self.recipe.canvas, self.size, self.network.preprocessing),
            lambda: self.network.compile(
                lambda run, parameters: self.recipe.canvas.picture(self.network, parameters, self.size)
            ),
        )
        return self.network.numpy(draw(self.network.tensor(parameters)))

    def draws(self, channels: Sequence[int], step: int) -> tuple[np.ndarray, ...]:
        """The transforms of a step, where there are any."""
        transforms = self.recipe.transforms
        return () if transforms is None else (transforms.draw(self.seed, channels, step, self.size),)

    def step(self) -> Callable:
        """One compiled update; see `step_of`."""
        key = ("ascent step", self.layer.path, self.layer.shape, self.recipe, self.size, self.network.preprocessing)
        return self.network.program(key, lambda: self.network.compile(step_of(self)))

    def look(self) -> Callable:
        """The compiled objective of every channel `(n, c)` for pictures."""
        key = ("channel means", self.layer.path, self.layer.shape, self.recipe.border)
        return self.network.program(key, lambda: self.network.compile(_looking(self)))

    @property
    def border(self) -> int:
        """Cells of the layer's map that the objective leaves out on each side."""
        return self.recipe.border_for(min(self.layer.shape[:2])) if self.layer.spatial else 0


@dataclass(frozen=True)
class Ascent:
    """The course of an ascent.

    Attributes:
        pictures: final pictures `(n, h, w, c)` float32.
        activations: the objective before each step `(n, steps)`, under the transforms of the step.
        final: the objective of the final pictures `(n,)`, without transforms.
        gradients: L2 norm of the gradient at each step `(n, steps)`.
    """

    pictures: np.ndarray
    activations: np.ndarray
    final: np.ndarray
    gradients: np.ndarray


def ascend(climb: Climb, channels: Sequence[int], batch: int, progress: Progress = None) -> Ascent:
    """Raise each of `n` channels, `batch` of them side by side.

    One compiled step serves every chunk: the channel numbers are an argument, and the last chunk is filled up.
    A picture's ascent does not depend on which others share its batch.

    Args:
        climb: what and how.
        channels: `n` numbers.
        batch: pictures at a time.
        progress: called after each step.
    """
    network, steps = climb.network, climb.recipe.steps
    step, look = climb.step(), climb.look()
    total = -(-len(channels) // batch) * steps
    parts = []
    for start in range(0, len(channels), batch):
        chunk = np.resize(np.asarray(channels[start : start + batch], np.int32), batch)
        begun = climb.starts(chunk.tolist())
        canvas, numbers = network.tensor(begun), network.tensor(chunk)
        memory = [network.tensor(array) for array in climb.recipe.rule.begin(begun)]
        course = []
        for done in range(steps):
            draws = map(network.tensor, climb.draws(chunk.tolist(), done))
            value, norm, canvas, *memory = step(canvas, numbers, *memory, *draws)
            course.append((network.numpy(value), network.numpy(norm)))
            if progress:
                progress(start // batch * steps + done + 1, total, f"channels {chunk[0]} … {chunk[-1]}")
        pictures = climb.pictures(network.numpy(canvas))
        final = network.numpy(look(network.tensor(pictures)))[np.arange(batch), chunk]
        kept = len(channels[start : start + batch])
        parts.append((pictures[:kept], *np.stack(course, axis=-1)[:, :kept], final[:kept]))
    pictures, activations, gradients, finals = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Ascent(pictures, activations, finals, gradients)


def first_gradients(climb: Climb, channels: Sequence[int]) -> np.ndarray:
    """L2 norm `(n,)` of the gradient of each channel at its start."""
    network, begun = climb.network, climb.starts(channels)
    numbers = np.asarray(channels, np.int32)
    arrays = (begun, numbers, *climb.recipe.rule.begin(begun), *climb.draws(channels, 0))
    return network.numpy(climb.step()(*map(network.tensor, arrays))[1])


def step_of(climb: Climb) -> Callable:
    """One update `step(run, canvas, channels, *memory, *draws) -> (objective (n,), gradient norm (n,), next canvas,
    *memory)`; memory is the rule's, draws are those of the transforms.
    """
    network, layer, recipe, ops = climb.network, climb.layer, climb.recipe, climb.network.ops
    middle = middle_and_half(network)[0]

    def step(run: Callable, canvas: Any, channels: Any, *more: Any) -> tuple:
        memory = more if recipe.transforms is None else more[:-1]

        def score(canvas: Any) -> tuple:
            pictures = recipe.canvas.picture(network, canvas, climb.size)
            if recipe.transforms is not None:
                pictures = recipe.transforms.apply(pictures, more[-1], middle, ops)
            activation = run(pictures, record=(layer.path,), outputs=False).activations[layer.path]
            values = of_channels(channel_means(activation, ops, climb.border), channels, ops)
            return ops.sum(values), values

        (_, values), gradient = network.value_and_grad(score)(canvas)
        square = ops.sum(ops.square(gradient), axis=tuple(range(1, len(gradient.shape))), keepdims=True)
        moved = recipe.rule.move(network, canvas, gradient, square, memory)
        return values, ops.sqrt(ops.reshape(square, (-1,))), *moved

    return step


def responses(climb: Climb, pictures: Callable[[Sequence[int]], np.ndarray], count: int) -> np.ndarray:
    """The objective of every channel `(count, c)` for the prepared pictures that `pictures(numbers)` gives.

    They are asked for a chunk at a time, so that many large ones need not be in memory together.
    """
    network, look, parts = climb.network, climb.look(), []
    batch = min(RESPONSES_BATCH, max(1, count))
    for start in range(0, count, batch):
        numbers = np.minimum(np.arange(start, start + batch), count - 1)  # filled up: one shape, one compile
        parts.append(network.numpy(look(network.tensor(pictures(numbers.tolist())))))
    return np.concatenate(parts)[:count] if parts else np.zeros((0, climb.layer.channels), np.float32)


def _looking(climb: Climb) -> Callable:
    ops, path = climb.network.ops, climb.layer.path

    def look(run: Callable, x: Any) -> Any:
        return channel_means(run(x, record=(path,), outputs=False).activations[path], ops, climb.border)

    return look
