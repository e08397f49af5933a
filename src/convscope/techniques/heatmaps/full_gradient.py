"""FullGrad: the contributions of the pixels and the biases of a network to a score.

A network of affine layers and ReLUs is, around one image, a linear function, whose value is the sum of pixel times
gradient over all pixels and of bias times gradient over all biases. Integrated gradients explain the difference of
two scores, FullGrad explains one score completely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add

import numpy as np

from convscope.ancestry import layers_in
from convscope.arrays import resize_map
from convscope.networks import Layer, Network, Pass
from convscope.networks.foreign import Tensor
from convscope.techniques.heatmaps.evidence import ImageView
from convscope.techniques.heatmaps.methods import MethodResult, PerImageMethod, registered
from convscope.techniques.heatmaps.targets import Target


@registered
@dataclass(frozen=True)
class FullGrad(PerImageMethod):
    """Pixel times gradient and, of each layer, bias times gradient, as sizes over their layer's range (equation 6).

    The bias of a norm with fixed statistics is its output for zeros. Layers without places have no part in the map.
    The map `(h, w)` is not negative; the note has the difference of the sum of all signed contributions from the score
    (0 in a network of ReLUs).

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], "cat", method=FullGrad()).maps.shape
        (1, 224, 224)
    """

    name = "full-grad"
    paper = "Srinivas and Fleuret 2019, Full-Gradient Representation, arXiv:1905.00780"
    at_image = True

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`."""
        affine = _affine(view.network, view.target)
        layers = [one for one in affine if not _nonlinear(view.network, one) or view.network.nonlinearities(one.path)]
        contributions = _contributions(view, layers)
        size = view.x.shape[1:3]
        heat = np.zeros(size)
        for one in contributions:
            if one.ndim == 3 and max(one.shape[:2]) > 1:
                heat += resize_map(_over_range(np.abs(one)).sum(axis=-1), *size)
        total = sum(float(one.sum(dtype=np.float64)) for one in contributions)
        missing = abs(total - view.score) / max(abs(view.score), 1e-12)
        note = f"sums up to {total:.4g} of {view.score:.4g}: {100 * missing:.1f} % off"
        if len(layers) < len(affine):
            note += f", without the biases of {len(affine) - len(layers)} layers that are called more than once"
        return MethodResult(heat.astype(np.float32), note)


def _over_range(sizes: np.ndarray) -> np.ndarray:
    low, high = float(sizes.min()), float(sizes.max())
    return (sizes - low) / (high - low) if high > low else np.zeros_like(sizes)


def _contributions(view: ImageView, layers: Sequence[Layer]) -> list[np.ndarray]:
    """The contributions of the pixels `(h, w, c)` and of the biases of each of `layers`, `(h, w, c)` or `(c,)`."""
    network, target = view.network, view.target
    answering = network.program(_answering_zeros, target, tuple(layers))
    differentiating = network.program(_gradients, target, tuple(layers))
    x = network.tensor(view.x)
    zeros = tuple(network.tensor(np.zeros((1, *layer.shape), np.float32)) for layer in layers)
    at_pixels, *gradients = differentiating(x, zeros, *(network.tensor(argument[None]) for argument in view.arguments))
    found = [view.x[0] * network.numpy(at_pixels)[0]]
    for bias, gradient in zip(answering(x), gradients, strict=True):
        # 0 / 0, where one value that depends on the image is divided by another, is no bias.
        found.append(np.nan_to_num(network.numpy(bias)[0], nan=0, posinf=0, neginf=0) * network.numpy(gradient)[0])
    return found


def _affine(network: Network, target: Target) -> list[Layer]:
    """The affine layers on the way to the target."""
    return [layer for layer in layers_in(network, target) if layer.affine]


def _nonlinear(network: Network, layer: Layer) -> bool:
    """True if the layer ends in a non-linearity of its own, other than the head's, which is undone."""
    return layer.activation is not None and layer.path != network.head.undone


def _answering_zeros(network: Network, target: Target, layers: Sequence[Layer]) -> Callable:
    """From images the output of each of `layers` before its own non-linearity, where its input is zero."""
    silenced = [layer.path for layer in layers_in(network, target) if not layer.container]
    nonlinear = tuple(layer.path for layer in layers if _nonlinear(network, layer))

    def answer(run: Callable, x: Tensor) -> list:
        found: dict[str, Tensor] = {}

        def silence(path: str, activation: Tensor) -> Tensor:
            found[path] = activation
            return network.ops.zeros(activation.shape)

        rules = {path: partial(silence, path) for path in silenced}
        run(network.ops.zeros(x.shape), Pass(replace=tuple(rules), preactivations=nonlinear), rules)
        return [found[layer.path] for layer in layers]

    return answer


def _gradients(network: Network, target: Target, layers: Sequence[Layer]) -> Callable:
    """From images the gradients at their pixels and at the output of each of `layers` before its non-linearity."""

    before = tuple(layer.path for layer in layers if _nonlinear(network, layer))
    after = tuple(layer.path for layer in layers if layer.path not in before)
    request = Pass(record=tuple(target.record), replace=after, replace_preactivations=before, stop=not target.scores)

    def gradients(run: Callable, x: Tensor, zeros: tuple, *arguments: object) -> list:
        def score(changed: tuple) -> tuple:
            pixels, *deltas = changed
            rules = {layer.path: partial(add, delta) for layer, delta in zip(layers, deltas, strict=True)}
            seen = run(pixels, request, rules)
            values = target.score(network.ops, seen.logits, seen.activations, arguments)
            return network.ops.sum(values), values

        return list(network.value_and_grad(score)((x, *zeros))[1])

    return gradients
