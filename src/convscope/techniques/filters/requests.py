"""Requests: channels, recipe, size, images and objectives, checked against the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.errors import UsageError, option
from convscope.events import Progress
from convscope.images.decode import Source, read_images
from convscope.images.image import InputImage
from convscope.images.source import Images, hold
from convscope.measures import LOGIT, LOGITS, is_target
from convscope.networks import Network
from convscope.networks.layers import check_channel
from convscope.objectives import Objective, as_objective, channel, diversity, dot_cosine, likeness
from convscope.objectives import layer as whole_layer
from convscope.techniques.filters.ascent import BATCH
from convscope.techniques.filters.baselines import Baselines
from convscope.techniques.filters.recipes import DEFAULT_RECIPE, Recipe, recipe_named

DIVERSITY = 1.0  # weight of the diversity, relative to the activation


def parse_channels(channels: str | int | Iterable[int] | None, count: int) -> list[int]:
    """Channel numbers from "0-63,70", "all", a number or numbers; in the order given, each once.

    Raises:
        UsageError: not understood, or out of the range 0 .. count - 1.

    Example:
        >>> parse_channels("0-2,5", count=64)
        [0, 1, 2, 5]
    """
    if channels is None:
        return list(range(count))
    if isinstance(channels, str):
        numbers = list(range(count)) if channels.strip() == "all" else _numbers(channels)
    else:
        numbers = [int(channels)] if isinstance(channels, int | np.integer) else [int(number) for number in channels]
    numbers = list(dict.fromkeys(numbers))
    for number in numbers:
        check_channel(number, count, "the layer")
    if not numbers:
        raise UsageError('no channels given; expected numbers such as "0-63,70", or "all".', code="channels-missing")
    return numbers


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise UsageError(
                f'channels {text!r} are not understood at {part!r}; expected numbers such as "0-63,70", or "all".',
                code="channels-not-understood",
                text=text,
                found=part,
            )
        low, high = int(first), int(last if dash else first)
        if high < low or high - low > 10**6:
            reason = "start exceeds end" if high < low else "more than a million channels"
            raise UsageError(
                f"invalid channel range {part!r}: {reason}; expected a range such as 0-63.",
                code="channel-range",
                range=part,
            )
        numbers.extend(range(low, high + 1))
    return numbers


def read_references(images: Images | None, network: Network) -> list[InputImage]:
    """The images whose activations an alive filter must exceed; those that were read already go as they are."""
    if images is None or (isinstance(images, Sequence) and len(images) == 0):
        return []
    if isinstance(images, list | tuple) and all(isinstance(image, InputImage) for image in images):
        return list(images)
    return list(hold(images, network.image_shape))


def adapted(recipe: str | Recipe, steps: int | None) -> Recipe:
    """The recipe, with another number of steps where one is given."""
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if steps is None:
        return chosen
    if steps < 1:
        raise UsageError(
            f"steps must be at least 1, found {steps}.",
            code="argument-too-small",
            name="steps",
            found=steps,
            expected=1,
        )
    return replace(chosen, steps=steps)


def start_image(recipe: Recipe, image: Source | None) -> InputImage | None:
    """The start image of the ascent, or the image to caricature."""
    if image is None and recipe.needs_image:
        raise UsageError(
            f"recipe {recipe.name!r} needs an image; give one with {option('image')}.",
            code="image-missing",
            recipe=recipe.name,
        )
    return None if image is None else read_images(image if isinstance(image, list | tuple) else [image])[0]


def precision_of(network: Network, precision: str) -> str:
    """The precision of the ascent."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(
            f"precision {precision!r} is not known; expected auto, float32 or bfloat16.",
            code="precision-unknown",
            name=precision,
        )
    return network.precision_for_ascent() if precision == "auto" else precision


def batch_of(batch: int | None, recipe: Recipe, variants: int) -> int:
    """The number of batch slots, whose views are passed together; variants of an objective are made side by side."""
    wanted = max(1, BATCH // recipe.views) if batch is None else max(1, batch)
    return wanted if variants == 1 else max(variants, wanted // variants * variants)


def size_of(
    network: Network, recipe: Recipe, size: int | tuple[int, int] | None, image: InputImage | None
) -> tuple[int, int]:
    """The size `(h, w)` of the images."""
    if size is not None:
        height, width = (size, size) if isinstance(size, int | np.integer) else size
        if min(height, width) < 1:
            raise UsageError(
                f"the size must be at least 1 pixel, found {min(height, width)}.",
                code="argument-too-small",
                name="size",
                found=min(height, width),
                expected=1,
            )
        return int(height), int(width)
    if not network.inputs.free:
        return network.inputs.size
    if image is None:
        return recipe.size, recipe.size
    # The image keeps its proportions, its shorter side brought to the recipe's.
    scale = recipe.size / min(image.pixels.shape[:2])
    return round(image.pixels.shape[0] * scale), round(image.pixels.shape[1] * scale)


@dataclass(frozen=True)
class FilterOptions:
    """The options of `filters` besides a layer and its channels; see there.

    Example:
        >>> FilterOptions(steps=8, size=64).recipe
        'fast'
    """

    objectives: Sequence[Objective | str | object] | Objective | str = ()
    recipe: str | Recipe = DEFAULT_RECIPE
    steps: int | None = None
    size: int | tuple[int, int] | None = None
    seed: int = 0
    seeds: int = 1
    variants: int = 1
    natural_images: Images | None = ()
    image: Source | None = None
    frames: int = 0
    precision: str = "auto"
    batch: int | None = None
    baselines: Baselines | None = None
    progress: Progress = None


@dataclass(frozen=True, eq=False)
class Wanted:
    """One requested objective and the key of its random numbers."""

    objective: Objective
    key: tuple[int, ...]


def wanted_objectives(
    network: Network,
    layer: str | None,
    channels: str | int | Iterable[int] | None,
    options: FilterOptions,
    recipe: Recipe,
    caricatured: np.ndarray | None,
) -> list[Wanted]:
    """The objectives, with the recipe's regularizer.

    Args:
        network, layer, channels: as for `filters`.
        options: the options with the objectives.
        recipe: the recipe, which has the objective where no channels are given.
        caricatured: the prepared image `(h, w, c)` of a caricature.
    """
    pairs = _objectives(network, layer, channels, options, recipe, caricatured)
    if recipe.regularizer_weight:
        weight = recipe.regularizer_weight
        pairs = [(objective + weight * likeness(_halfway(network, objective)), key) for objective, key in pairs]
    return [Wanted(objective, key) for objective, key in pairs]


def _objectives(
    network: Network,
    layer: str | None,
    channels: str | int | Iterable[int] | None,
    options: FilterOptions,
    recipe: Recipe,
    caricatured: np.ndarray | None,
) -> list[tuple[Objective, tuple[int, ...]]]:
    objectives = options.objectives
    if isinstance(objectives, str | Objective) or is_target(objectives):
        objectives = [objectives]
    if objectives:
        return [(as_objective(objective), (index,)) for index, objective in enumerate(objectives)]
    if layer is None:
        raise UsageError("nothing to raise: give a layer, or objectives such as conv3:17.", code="objective-missing")
    if recipe.raises == "caricature":
        if channels is not None or caricatured is None:
            raise UsageError(
                f"recipe {recipe.name!r} raises all channels of a layer; leave the channels out.",
                code="recipe-of-whole-layers",
                recipe=recipe.name,
            )
        path = network.layer(layer).path
        answer = network.forward(caricatured[None], (path,))[1][path][0]
        return [(dot_cosine(path, answer, recipe.power), (0,))]
    if recipe.raises == "layer" and channels is None:
        return [(whole_layer(layer), (0,))]
    count = network.layer(layer).channels
    if channels is None and recipe.first_channels is not None:
        channels = range(min(count, recipe.first_channels))
    return [(channel(layer, number), (number,)) for number in parse_channels(channels, count)]


def first_layer(objective: Objective) -> str:
    """The first layer that an objective reads, by the objective's own name for it, or `LOGITS` or `LOGIT`."""
    term = objective.terms[0]
    if term.own is None:
        return term.layer
    return next(iter(getattr(term.own, "record", ())), LOGITS)


def _halfway(network: Network, objective: Objective) -> str:
    """The layer with a map in the middle of the way to the first layer of an objective."""
    first = first_layer(objective)
    path = None if first in (LOGITS, LOGIT) else network.layer(first).path
    known = None if path is None else network.ancestors(path)
    leading = [layer for layer in network.layers if (layer.on_path if known is None else layer.path in known)]
    maps = [layer.path for layer in leading if layer.spatial]
    before = maps[: maps.index(path)] if path in maps else maps
    return before[len(before) // 2] if before else path or ""


def with_variants(wanted: Sequence[Wanted], variants: int) -> list[tuple[Wanted, int]]:
    """Each objective as often as there are variants of it, made to differ; with the number of the variant.

    Raises:
        UsageError: less than one variant.
    """
    if variants < 1:
        raise UsageError(
            f"variants must be at least 1, found {variants}.",
            code="argument-too-small",
            name="variants",
            found=variants,
            expected=1,
        )
    if variants == 1:
        return [(one, 0) for one in wanted]
    found = []
    for one in wanted:
        objective = one.objective + DIVERSITY * diversity(first_layer(one.objective))
        keys = [one.key, *((*one.key, variant) for variant in range(1, variants))]
        found += [(Wanted(objective, key), variant) for variant, key in enumerate(keys)]
    return found
