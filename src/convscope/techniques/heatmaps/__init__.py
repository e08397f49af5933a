"""Which image regions support a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from convscope.events import ItemFinished, Progress, Started, tell
from convscope.images.source import Images
from convscope.measures import Custom, Target, is_target
from convscope.networks import Network
from convscope.results import Heatmap, origin
from convscope.techniques.heatmaps.cam import FinerCAM, ShapleyCAM
from convscope.techniques.heatmaps.full_gradient import FullGrad
from convscope.techniques.heatmaps.methods import (
    METHODS,
    Formula,
    Method,
    MethodResult,
    PerImageMethod,
    Unfit,
    as_methods,
    with_options,
)
from convscope.techniques.heatmaps.options import option
from convscope.techniques.heatmaps.perturbation import RISE, AblationCAM, Occlusion, ScoreCAM
from convscope.techniques.heatmaps.pixels import GuidedBackprop, IntegratedGradients, SmoothGrad
from convscope.techniques.heatmaps.run import BATCH, HeatmapItem, HeatmapOptions, begin
from convscope.techniques.heatmaps.targets import (
    Channel,
    Similarity,
    as_targets,
    channel_target,
    names_one_class,
    similarity_target,
)

__all__ = [
    "METHODS",
    "RISE",
    "AblationCAM",
    "Channel",
    "Custom",
    "FinerCAM",
    "Formula",
    "FullGrad",
    "GuidedBackprop",
    "HeatmapItem",
    "HeatmapOptions",
    "IntegratedGradients",
    "Method",
    "MethodResult",
    "Occlusion",
    "PerImageMethod",
    "ScoreCAM",
    "ShapleyCAM",
    "Similarity",
    "SmoothGrad",
    "Target",
    "Unfit",
    "as_methods",
    "as_targets",
    "channel_target",
    "heatmap",
    "is_target",
    "iter_heatmaps",
    "names_one_class",
    "option",
    "similarity_target",
    "with_options",
]


def heatmap(
    network: Network | object,
    images: Images,
    target: object = "top",
    layer: str | Sequence[str] = "auto",
    *,
    against: int | str | Sequence[int | str] | None = None,
    method: object = "grad-cam",
    smooth: bool = False,
    budget: int | None = None,
    check: bool = False,
    precision: str = "float32",
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress = None,
) -> Heatmap:
    """Which regions of each image support a class.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        target: a class by number or name, or "top" for each image's own best; or one for each image. "top3": the
            three best of each. "conv3:17" is a channel of a layer and "conv3:17@4,5" it at one place; of a network that
            outputs a map, a number is the class where it is the highest. Or the result of `channel_target` or
            `similarity_target`, an objective or its text ("a:3 - 0.5*tabby", see `convscope.objectives`), a
            `Custom` function of the network's activations, or a `Target` of your own.
        layer: a path, "auto" for the last layer whose map has more than one cell, or "best" for the one of the last
            layers at each size of map that does best in insertion less deletion on a few of the images; or several,
            whose maps are fused: positive parts, each over its highest value, their mean.
        against: a class whose logit is subtracted from the target's, so that the map shows regions that support the one
            and not the other: by number or name, or "rival" for each image's best other class; or one for each image.
            Of two classes under one softmax only this difference has a meaning, so it is explained where None; the
            target "logit:cat" is the logit of one class alone.
        method: one of `METHODS` by name or as an object with options, such as `SmoothGrad(noise=0.1)`, one of your own
            (see `Method`), several, or "all" for all that work on one pass. With several, each image has a map
            for each method, one after another; of "all", a method that does not fit the network is left out, and
            the provenance has the reason.
        smooth: the mean over the image, moved a little in four directions, and the mirror images of these.
        budget: passes that a sampling method may spend on an image: channels of Score-CAM, masks of RISE, noisy copies
            of SmoothGrad, steps of integrated gradients. It comes before their own option.
        check: measure how far to trust each map: see `faithfulness`.
        precision: "bfloat16", or "auto" where the machine gains by it, of the passes of Score-CAM and RISE.
        seed: random seed.
        batch: number of images in one pass.
        progress: called with each event (`convscope.events`); a finished item has its `HeatmapItem`.

    Returns:
        raw signed maps, `(n, h, w)` at the layer's size, or at the image's size where they are smoothed or the method
        is one of pixels (of several sizes, a tuple of them); a map that shows nothing has its reason.

    Raises:
        UsageError: no such class, layer, method or option, or a layer without a map; ImageError, ModelError.

    Example:
        >>> found = convscope.heatmap(network, PHOTOS[0], target="cat", method=["grad-cam", "hirescam"])
        >>> found.maps.shape, [(row.class_name, row.method) for row in found.rows]
        ((2, 28, 28), [('cat', 'grad-cam'), ('cat', 'hirescam')])
        >>> convscope.heatmap(network, PHOTOS[0], "cat - 0.5*coffee").rows[0].class_name
        'class:cat - 0.5*class:coffee'
    """
    options = HeatmapOptions(against, method, smooth, budget, check, precision, seed, batch)
    run = begin(network, images, target, layer, options)
    tell(progress, Started(0, len(run), "heatmaps"))
    items: list[HeatmapItem] = []
    for item in run.items():
        items.append(item)
        tell(progress, ItemFinished(item.number + 1, len(run), item.image.name, item=item))
    details = {
        "target": as_targets(target),
        "against": None if against is None else as_targets(against),
        **run.details(),
    }
    like = {"like": run.goal.target.image} if isinstance(run.goal.target, Similarity) else {}
    made = origin(run.specs[0].network, "heatmap", run.images, like, details)
    maps = _stacked([one.heat for one in items])
    return Heatmap(made, run.parameters(), tuple(one.image for one in items), maps, tuple(one.row for one in items))


def iter_heatmaps(
    network: Network | object,
    images: Images,
    target: object = "top",
    layer: str | Sequence[str] = "auto",
    options: HeatmapOptions | None = None,
) -> Iterator[HeatmapItem]:
    """Each heatmap as soon as it is finished; `heatmap` collects the same ones.

    At most a batch of images is in work. The maps of one image by several methods come one after another.

    Args:
        network, images, target, layer: see `heatmap`.
        options: all other arguments of `heatmap`.

    Raises:
        UsageError: see `heatmap`; the request is checked before the first heatmap is made.

    Example:
        >>> for item in iter_heatmaps(network, PHOTOS[:2], options=HeatmapOptions(method="hirescam")):
        ...     print(item.image.name, item.heat.shape, item.row.method)
        cat (28, 28) hirescam
        coffee (28, 28) hirescam
    """
    return begin(network, images, target, layer, HeatmapOptions() if options is None else options).items()


def _stacked(maps: list[np.ndarray]) -> np.ndarray | tuple[np.ndarray, ...]:
    """One array where all maps have one size, else a tuple of them."""
    return np.stack(maps) if len({one.shape for one in maps}) == 1 else tuple(maps)
