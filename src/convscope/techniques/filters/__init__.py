"""What each filter of a layer looks for: the picture that raises its activation, by gradient ascent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from convscope.errors import UsageError
from convscope.networks import Layer, Network, open_model
from convscope.pictures import Picture, read_pictures
from convscope.results import FilterRow, Filters, Progress, provenance
from convscope.techniques.filters.ascent import Ascent, Climb, ascend, first_gradients, responses
from convscope.techniques.filters.recipes import RECIPES, Recipe, recipe_named

__all__ = ["RECIPES", "Recipe", "filters", "first_that_climb", "parse_channels"]

NOISE_PICTURES = 256
PERCENTILE = 99
MOST_BY_DEFAULT = 64  # as many as the classic sheet shows
MOST_LOOKED_AT = 256  # channels asked for a gradient by `first_that_climb`
BATCH = 16


def filters(
    network: Network | Any,
    layer: str,
    channels: str | int | Iterable[int] | None = None,
    *,
    recipe: str | Recipe = "classic",
    steps: int | None = None,
    size: int | None = None,
    seed: int = 0,
    photos: Any = (),
    batch: int = BATCH,
    progress: Progress = None,
) -> Filters:
    """The picture that excites each filter of a layer most, found by gradient ascent.

    Args:
        network: an opened network, or what `open_model` takes.
        layer: path of any layer with channels; of the output layer, the logits are raised.
        channels: numbers, or text such as "0-63,70"; the first 64 where None.
        recipe: one of `RECIPES`, or a `Recipe`.
        steps, size: instead of the recipe's; `size` in pixels, for layers that take it.
        seed: start pictures are bit-equal for a (seed, channel).
        photos: pictures whose activations an alive filter must exceed as well as noise.
        batch: how many filters are raised side by side; pictures are bit-equal at equal `batch`.
        progress: called as `progress(done, total, text)`.

    Returns:
        canvases, activations at each step, and for each filter whether it is alive, weak or dead.

    Raises:
        UsageError: no such layer, channel or recipe, or a size that the network can't take.
    """
    network = open_model(network)
    chosen = _adapted(recipe, steps)
    size_in_pixels = _size(network, chosen, size)
    target = _target(network, layer, size_in_pixels)
    numbers = parse_channels(channels, target.channels)
    references = read_pictures(photos) if _some(photos) else []
    batch = max(1, min(batch, len(numbers)))

    climb = Climb(network, target, chosen, size_in_pixels, seed)
    ascent = ascend(climb, numbers, batch, progress)
    noise, natural = _references(climb, references, progress)
    rows = tuple(
        _row(index, number, ascent, noise[:, number], natural[:, number]) for index, number in enumerate(numbers)
    )
    parameters = {
        "layer": target.path,
        "objective": _objective_text(network, target),
        "channels": numbers,
        "recipe": asdict(chosen),
        "size": list(size_in_pixels),
        "seed": seed,
        "batch": batch,
    }
    return Filters(
        provenance(network, "filters", references, parameters),
        layer=target,
        values=ascent.pictures,
        rows=rows,
        preprocessing=network.preprocessing,
        crop=chosen.crop_for(min(size_in_pixels)),
        look=chosen.look,
    )


def first_that_climb(
    network: Network, layer: str, count: int, *, recipe: str = "classic", seed: int = 0, batch: int = BATCH
) -> tuple[list[int], int, int]:
    """The first channels that have a gradient at their start picture, for a page that has room for a few.

    Args:
        network, layer, recipe, seed, batch: as for `filters`.
        count: how many are wanted.

    Returns:
        their numbers, filled up with channels that have none where too few do; how many channels were looked at; how
        many of these have no gradient.
    """
    chosen = recipe_named(recipe)
    size = _size(network, chosen, None)
    target = _target(network, layer, size)

    climb = Climb(network, target, chosen, size, seed)
    climbing: list[int] = []
    stuck: list[int] = []
    for start in range(0, min(target.channels, MOST_LOOKED_AT), batch):
        numbers = list(range(start, min(start + batch, target.channels)))
        norms = first_gradients(climb, numbers)
        for number, norm in zip(numbers, norms, strict=True):
            (climbing if norm > 0 else stuck).append(number)
        if len(climbing) >= count:
            break
    return sorted((climbing + stuck)[:count]), len(climbing) + len(stuck), len(stuck)


def parse_channels(channels: str | int | Iterable[int] | None, count: int) -> list[int]:
    """Channel numbers from "0-63,70", "all", a number or numbers; in the order given, each once.

    Raises:
        UsageError: not understood, or out of the range 0 .. count - 1.
    """
    if channels is None:
        return list(range(min(count, MOST_BY_DEFAULT)))
    if isinstance(channels, str):
        numbers = list(range(count)) if channels.strip() == "all" else _numbers(channels)
    else:
        numbers = [int(channels)] if isinstance(channels, int | np.integer) else [int(number) for number in channels]
    numbers = list(dict.fromkeys(numbers))
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise UsageError(
            f"channel {wrong[0]} is out of range: the layer has {count} channels, numbered from 0 to {count - 1}."
        )
    if not numbers:
        raise UsageError('no channels given; expected numbers such as "0-63,70", or "all".')
    return numbers


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise UsageError(
                f'channels {text!r} are not understood at {part!r}; expected numbers such as "0-63,70", or "all".'
            )
        low, high = int(first), int(last if dash else first)
        if high < low or high - low > 10**6:
            raise UsageError(f"channels {part!r} run backwards or too far; expected a range such as 0-63.")
        numbers.extend(range(low, high + 1))
    return numbers


def _some(photos: Any) -> bool:
    return photos is not None and not (isinstance(photos, Sequence) and len(photos) == 0)


def _adapted(recipe: str | Recipe, steps: int | None) -> Recipe:
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if steps is None:
        return chosen
    if steps < 1:
        raise UsageError(f"steps must be at least 1, found {steps}.")
    return replace(chosen, steps=steps)


def _size(network: Network, recipe: Recipe, size: int | None) -> tuple[int, int]:
    if size is not None and size < 1:
        raise UsageError(f"the size must be at least 1 pixel, found {size}.")
    if size is not None:
        return size, size
    return (recipe.size, recipe.size) if network.inputs.free else network.inputs.size


def _target(network: Network, path: str, size: tuple[int, int]) -> Layer:
    """The layer as it is for pictures of `size`."""
    wanted = network.layer(path).path
    target = next((layer for layer in network.layers_at(size) if layer.path == wanted), None)
    if target is None:
        height, width = network.inputs.size
        raise UsageError(
            f"layer {wanted!r} does not take pictures of {size[0]}x{size[1]} pixels in {network.name}; "
            f"leave --size out, or give {height if height == width else f'{height}x{width}'}."
        )
    if len(target.shape) not in (1, 3):
        raise UsageError(f"layer {wanted!r} has no channels to raise; its output has the shape {target.shape}.")
    if min(target.shape) < 1:
        raise UsageError(
            f"pictures of {size[0]}x{size[1]} pixels are too small for layer {wanted!r}; give a larger --size."
        )
    return target


def _objective_text(network: Network, layer: Layer) -> str:
    if layer.path == network.head.layer:
        return f"the logit of each unit, before its {network.head.kind}"
    return "mean of the channel without its border" if layer.spatial else "the unit"


def _references(climb: Climb, photos: Sequence[Picture], progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """What every channel answers to noise `(256, c)` and to the photos `(m, c)`."""
    if progress:
        progress(0, 1, f"{NOISE_PICTURES} noise pictures")

    def noise(numbers: Sequence[int]) -> np.ndarray:
        # Noise must not repeat the starts that the ascent began from: numbers that no channel has.
        return climb.pictures(climb.starts([number - NOISE_PICTURES for number in numbers]))

    def natural(numbers: Sequence[int]) -> np.ndarray:
        return climb.network.prepare([photos[number] for number in numbers], climb.size)

    return responses(climb, noise, NOISE_PICTURES), responses(climb, natural, len(photos))


def _row(index: int, channel: int, ascent: Ascent, noise: np.ndarray, natural: np.ndarray) -> FilterRow:
    """The verdict on one filter; `noise` and `natural` are its answers to pictures that were not made for it."""
    course, final = ascent.activations[index], float(ascent.final[index])
    threshold = float(np.percentile(noise, PERCENTILE))
    if len(natural):
        threshold = max(threshold, float(np.percentile(natural, PERCENTILE)))
    status, reason = _verdict(final, threshold, ascent, index, natural)
    return FilterRow(channel, final, tuple(map(float, course)), status, reason, threshold)


def _verdict(final: float, threshold: float, ascent: Ascent, index: int, natural: np.ndarray) -> tuple[str, str]:
    beyond = f"the {PERCENTILE}th percentile of noise{' and of the photos' if len(natural) else ''} ({threshold:.3g})"
    if not np.isfinite(final):
        return "weak", "the activation left the range of finite numbers"
    if not ascent.gradients[index].any():
        seen = f"; the photos reach {natural.max():.3g}" if len(natural) and natural.max() > 0 else ""
        return "dead", f"the gradient is zero everywhere from this start, so there is nothing to climb{seen}"
    if final > threshold:
        return "alive", f"reaches {final:.3g}, above {beyond}"
    return "weak", f"reaches {final:.3g} only, not above {beyond}"
