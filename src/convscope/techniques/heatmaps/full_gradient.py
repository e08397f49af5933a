"""FullGrad: what the pixels and the biases of a network add up to.

A network of affine layers and ReLUs is, around one picture, a linear function, whose value is the sum of pixel times
gradient over all pixels and of bias times gradient over all biases. No other map accounts for the whole score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import add
from typing import Any

import numpy as np

from convscope.imaging import resize_map
from convscope.networks import Layer, Network
from convscope.techniques.heatmaps.evidence import Single
from convscope.techniques.heatmaps.methods import Made, replayed
from convscope.techniques.heatmaps.targets import Target

# Kinds of layers that are affine, so that what they answer to zeros is their bias.
AFFINE = frozenset({"conv", "dense", "norm", "rescaling", "merge"})


@replayed("full-grad", "Srinivas and Fleuret 2019, Full-Gradient Representation, arXiv:1905.00780", at_picture=True)
def full_grad(single: Single) -> Made:
    """Pixel times gradient and, of each layer, bias times gradient, as sizes over their layer's range (equation 6).

    The bias of a norm with fixed statistics is what it answers to zeros. Layers without places have no part in the map.

    Returns:
        `(h, w)`, not negative, and how far all contributions, signed, are from the score (0 in a network of ReLUs).
    """
    contributions = _contributions(single)
    size = single.x.shape[1:3]
    heat = np.zeros(size)
    for one in contributions:
        if one.ndim == 3 and max(one.shape[:2]) > 1:
            heat += resize_map(_over_range(np.abs(one)).sum(axis=-1), *size)
    total = sum(float(one.sum(dtype=np.float64)) for one in contributions)
    missing = abs(total - single.whole) / max(abs(single.whole), 1e-12)
    return heat.astype(np.float32), f"sums up to {total:.4g} of {single.whole:.4g}: {100 * missing:.1f} % off"


def _over_range(sizes: np.ndarray) -> np.ndarray:
    low, high = float(sizes.min()), float(sizes.max())
    return (sizes - low) / (high - low) if high > low else np.zeros_like(sizes)


def _contributions(single: Single) -> list[np.ndarray]:
    """What the pixels `(h, w, c)` and each layer's biases, `(h, w, c)` or `(c,)`, add to the score."""
    network, target = single.network, single.target
    layers = _biased(network, target)
    key = (target, single.x.shape)
    answering = network.program(("biases", *key), lambda: network.compile(_answering_zeros(network, layers)))
    sloping = network.program(("full gradient", *key), lambda: network.compile(_sloping(network, target, layers)))
    x = network.tensor(single.x)
    zeros = tuple(network.tensor(np.zeros((1, *layer.shape), np.float32)) for layer in layers)
    at_pixels, *gradients = sloping(x, zeros, *(network.tensor(argument[None]) for argument in single.arguments))
    biased = zip(answering(x), gradients, strict=True)
    products = [network.numpy(bias)[0] * network.numpy(gradient)[0] for bias, gradient in biased]
    return [single.x[0] * network.numpy(at_pixels)[0], *products]


def _biased(network: Network, target: Target) -> list[Layer]:
    """The affine layers on the way to what is explained, as far as they can be seen before their non-linearity."""
    names = [layer.path for layer in network.layers]
    last = max((names.index(path) for path in target.record), default=len(names) - 1)
    affine = [layer for layer in network.layers[: last + 1] if layer.on_path and layer.kind in AFFINE]
    return [layer for layer in affine if not _bent(network, layer) or network.linearisable(layer.path)]


def _bent(network: Network, layer: Layer) -> bool:
    """True if the layer ends in a non-linearity of its own, other than the head's, which is undone."""
    return layer.activation is not None and layer.path != network.head.layer


def _answering_zeros(network: Network, layers: Sequence[Layer]) -> Callable:
    """From pictures what each of `layers` answers where all that comes from the picture is zero."""
    silenced = [layer.path for layer in network.layers if layer.on_path and layer.kind != "model"]

    def answer(run: Callable, x: Any) -> list:
        found: dict[str, Any] = {}

        def silence(path: str, activation: Any) -> Any:
            found.setdefault(path, activation)  # where a layer is seen twice, what comes before its non-linearity
            return network.ops.zeros(activation.shape)

        rules = {path: partial(silence, path) for path in silenced}
        run(network.ops.zeros(x.shape), rules=rules, before=_bent_ones(network, layers, rules))
        return [found[layer.path] for layer in layers]

    return answer


def _sloping(network: Network, target: Target, layers: Sequence[Layer]) -> Callable:
    """From pictures the gradient at their pixels, and at what each of `layers` answers."""

    def slope(run: Callable, x: Any, zeros: tuple, *arguments: Any) -> list:
        def score(changed: tuple) -> tuple:
            pixels, *deltas = changed
            rules = {layer.path: partial(add, delta) for layer, delta in zip(layers, deltas, strict=True)}
            before = _bent_ones(network, layers, rules)
            after = {path: rule for path, rule in rules.items() if path not in before}
            seen = run(pixels, record=target.record, rules=after, before=before, outputs=target.scores)
            values = target.score(network.ops, seen.logits, seen.activations, arguments)
            return network.ops.sum(values), values

        return list(network.value_and_grad(score)((x, *zeros))[1])

    return slope


def _bent_ones(network: Network, layers: Sequence[Layer], rules: Mapping[str, Callable]) -> dict[str, Callable]:
    """The rules of those layers that end in a non-linearity of their own."""
    return {layer.path: rules[layer.path] for layer in layers if _bent(network, layer)}
