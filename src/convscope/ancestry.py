"""The layers on the way from the image to what a target reads, as the network's graph has them."""

from __future__ import annotations

from convscope.measures import Target
from convscope.networks import Layer, Network


def layers_to(network: Network, target: Target) -> list[Layer]:
    """The layers that all the values which a target reads are computed from, in the order of execution.

    The layers that it reads are none of them, unless another one that it reads is computed from them.
    """
    whole = target.scores or not target.record
    found = {layer.path for layer in network.layers if layer.on_path} if whole else None
    for path in target.record:
        leading = before(network, path)
        found = leading if found is None else found & leading
    return [layer for layer in network.layers if layer.path in (found or ())]


def layers_in(network: Network, target: Target) -> list[Layer]:
    """The layers that some value which a target reads is computed from, and those that it reads."""
    whole = target.scores or not target.record
    found = {layer.path for layer in network.layers if layer.on_path} if whole else set()
    found = found.union(target.record, *(before(network, path) for path in target.record))
    return [layer for layer in network.layers if layer.path in found]


def layers_after(network: Network, path: str | None, target: Target) -> list[Layer]:
    """The layers of `layers_in` that are computed from the output at `path`, or from the image where None."""
    layers = layers_in(network, target)
    if path is None:
        return layers
    return [layer for layer in layers if path != layer.path and path in before(network, layer.path)]


def before(network: Network, path: str) -> set[str]:
    """Paths of the layers that lead to `path`; all that are executed before it where the graph does not tell."""
    known = network.ancestors(path)
    if known is not None:
        return set(known)
    names = [layer.path for layer in network.layers]
    return set(names[: names.index(path)])


def read_layers(target: Target) -> tuple[str, ...]:
    """Paths of the layers that a target reads; none where it reads class scores, which are computed from them."""
    return () if target.scores else tuple(target.record)
