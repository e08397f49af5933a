"""The choice of the layers at which heatmaps are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.ancestry import before, layers_in, layers_to, read_layers
from convscope.errors import UsageError
from convscope.images.image import InputImage
from convscope.networks import Layer, Network
from convscope.techniques.heatmaps.evidence import TraceSpec, trace
from convscope.techniques.heatmaps.faithfulness import better_layers
from convscope.techniques.heatmaps.methods import Method, Unfit, results_of
from convscope.techniques.heatmaps.targets import Goal, Similarity

TRIED_LAYERS, TRIED_IMAGES = 4, 4  # by layer="best"


@dataclass(frozen=True)
class Places:
    """The layers at which heatmaps are made.

    Attributes:
        layers: none where every method is one of the image's own places.
        choice: the kind of the choice, one of `LAYER_CHOICES` of `HeatmapParameters`.
        rule: the choice in words.
    """

    layers: tuple[Layer, ...]
    choice: str
    rule: str


AUTO_RULE = "the last layer with a map of more than one cell that has an effect on the target"
NONE = Places((), "none", "none: the method works at the image")


def chosen_places(
    given: str | Sequence[str], goal: Goal, methods: Sequence[Method], images: Sequence[InputImage], spec: TraceSpec
) -> Places:
    """The layers that "auto", "best" or paths stand for.

    Args:
        given: "auto", "best", a path or several.
        goal: the targets.
        methods: the methods that explain them.
        images: all images of the call.
        spec: network and target; its layer is filled in.

    Raises:
        UsageError: no such layer, or none with a map before the target.
    """
    at_layer = [one for one in methods if not one.at_image]
    if given in ("auto", "best") and not at_layer:
        return NONE
    if given == "best":
        return _best(goal, at_layer[0], images, spec)
    choice = "auto" if given == "auto" else "given"
    rule = (
        "the last layer with a map of more than one cell that has an effect on the target"
        if given == "auto"
        else choice
    )
    paths = [given] if isinstance(given, str) else given
    return Places(tuple(_layer(spec.network, path, goal) for path in paths), choice, rule)


def _best(goal: Goal, method: Method, images: Sequence[InputImage], spec: TraceSpec) -> Places:
    """The layer whose maps score best on the first images, and the scores of all."""
    network = spec.network
    rows = np.arange(min(len(goal.image_indices), TRIED_IMAGES))
    x = network.prepare([images[index] for index in goal.image_indices[rows]])
    arguments = tuple(argument[rows] for argument in goal.arguments)
    maps, refused = [], Unfit("no layer to try", code="no-map-layer")
    for layer in _candidates(network, goal):
        evidence = trace(replace(spec, layer=layer, batch=len(x)), x, arguments)
        try:
            maps.append((layer.path, [one.heat for one in results_of(method, evidence)]))
        except Unfit as error:  # the method may fit another layer
            refused = error
    if not maps:
        raise UsageError(refused.message, code=refused.code, **refused.data) from refused
    judged = better_layers(list(evidence.views()), maps)
    how = ", ".join(f"{one.layer} {one.value:.3f}" for one in judged)
    rule = f"the best of {len(judged)} by insertion less deletion of the first {len(x)}: {how}"
    return Places((network.layer(judged[0].layer),), "best", rule)


def _candidates(network: Network, goal: Goal) -> list[Layer]:
    """The last layer at each of the smallest sizes of map."""
    last = _last_before(network, goal)
    before = _leading(network, goal)
    by_size = {la.shape[:2]: la for la in before if la.spatial and la.computes and not la.pads}
    by_size[last.shape[:2]] = last
    sizes = sorted((size for size in by_size if min(size) > 1), key=lambda size: size[0] * size[1])
    return [by_size[size] for size in sizes[:TRIED_LAYERS]] or [last]


def _layer(network: Network, path: str, goal: Goal) -> Layer:
    if path == "auto":
        return _last_before(network, goal)
    layer = network.layer(path)
    # A container, which is on no path itself, is one for a target that reads the class scores too.
    if goal.target.record and not goal.target.scores and layer not in layers_in(network, goal.target):
        after = any(path in before(network, layer.path) for path in goal.target.record)
        where = "comes after" if after else "is in another branch than"
        raise UsageError(
            f"layer {layer.path!r} {where} the target {goal.target.text}; give a layer that the target is computed "
            "from, or auto.",
            code="layer-after-target" if after else "layer-beside-target",
            layer=layer.path,
            target=goal.target.text,
        )
    if not layer.spatial:
        auto = network.last_spatial_layer().path
        raise UsageError(
            f"layer {layer.path!r} has no map (its output has the shape {layer.shape}); a heatmap needs one of "
            f"(height, width, channels), such as {auto!r}. Methods that work at the image, such as occlusion, rise and "
            "saliency, need no layer.",
            code="layer-without-map",
            layer=layer.path,
            shape=list(layer.shape),
        )
    return layer


def _last_before(network: Network, goal: Goal) -> Layer:
    """The last layer with a map among those that all which the target reads is computed from."""
    record, leading = goal.target.record, _leading(network, goal)
    if record and not any(layer.spatial for layer in leading):
        raise UsageError(
            f"the target {' and '.join(record)} is not computed from any layer with a map; give that layer itself, or "
            "a method that works at the image, such as saliency or occlusion.",
            code="no-map-before-target",
            layer=record[0],
        )
    return network.last_spatial_layer(leading if record else None, read_layers(goal.target))


def _leading(network: Network, goal: Goal) -> list[Layer]:
    """The layers that can explain a target, in the order of execution.

    A similarity is one of means over places, so the layer in which it is measured has a map of its own to show.
    """
    if isinstance(goal.target, Similarity):
        return layers_in(network, goal.target)
    return layers_to(network, goal.target)
