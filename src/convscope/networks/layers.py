"""The layers of a network, and the user's names for them: a path, a kind, a pattern, a place."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from convscope.errors import UsageError, nearest
from convscope.networks.layouts import Tokens

KINDS = (
    *("conv", "pool", "global_pool", "dense", "norm", "activation", "merge", "reshape", "padding", "resize"),
    *("recurrent", "rescaling", "augmentation", "dropout", "identity", "model", "other"),
)
# Layers of these kinds return their input outside training.
PASSING = frozenset({"dropout", "identity"})


@dataclass(frozen=True)
class Layer:
    """One node of the network: one output of one call of one layer.

    Attributes:
        path: names from the top as the framework joins them, "/" in Keras and "." in PyTorch; "#k" marks the k-th
            call of a layer that is called more than once, "[i]" the i-th of several outputs.
        kind: "conv", "pool", "global_pool", "dense", "norm", "activation", "merge", "model", ... .
        class_name: the framework's own name of the layer's class.
        shape: of the output for one image, channels last: `(h, w, c)` or `(c,)`. Tokens that are a grid are a map.
        parameters: number of weights, trainable or not, counted at the first call only.
        rectified: path of the layer after whose non-linearity this layer's zeros are counted: itself, the
            activation that follows a linear convolution, or None where there is none.
        on_path: False if the image does not reach the chosen output through this layer (another branch, or a call
            on another input).
        inputs: names of the inputs that it is computed from, of a network with several.
        tokens: how the map lies in the tokens of a transformer; None where it does not.
        has_map: False for an output that has three axes and is no map, such as the heads of an attention.

    Example:
        >>> found = network.layer("block4_conv")
        >>> found.kind, found.shape, found.channels, found.spatial
        ('conv', (28, 28, 96), 96, True)
    """

    path: str
    kind: str
    class_name: str
    shape: tuple[int, ...]
    parameters: int
    rectified: str | None = None
    on_path: bool = True
    activation: str | None = None
    inputs: tuple[str, ...] = ()
    tokens: Tokens | None = None
    has_map: bool = True

    @property
    def spatial(self) -> bool:
        """True if the output is a map: `(h, w, c)`."""
        return self.has_map and len(self.shape) == 3

    @property
    def has_channels(self) -> bool:
        """True if the output is a map, or a row of units `(c,)`."""
        return self.spatial or len(self.shape) == 1

    @property
    def in_block(self) -> bool:
        """True if it is a step inside a transformer's block, in its attention or between its dense layers."""
        return self.tokens is not None and self.kind not in ("norm", "merge")

    @property
    def channels(self) -> int:
        """Number of channels (units of a dense layer)."""
        return self.shape[-1]

    @property
    def container(self) -> bool:
        """True if it is a model that contains other layers."""
        return self.kind == "model"

    @property
    def structural(self) -> bool:
        """True if it only contains layers or rearranges their outputs."""
        return self.kind in ("model", "reshape")

    @property
    def passing(self) -> bool:
        """True if it returns its input outside training."""
        return self.kind in PASSING

    @property
    def computes(self) -> bool:
        """True if its values are its own, and not those of other layers."""
        return not (self.structural or self.passing)

    @property
    def stops_gradients(self) -> bool:
        """True if it returns its input, and no gradient comes back through it: the first layer with one is itself."""
        return self.class_name.lower() in ("detach", "stopgradient")

    @property
    def pads(self) -> bool:
        """True if it only puts a border around its input."""
        return self.kind == "padding"

    @property
    def convolves(self) -> bool:
        """True for a convolution of any sort."""
        return self.kind == "conv"

    @property
    def makes_features(self) -> bool:
        """True for convolutions, pooling, recurrent and dense layers: those that a network is made of in a diagram."""
        return self.kind in ("conv", "pool", "global_pool", "recurrent", "dense")

    @property
    def affine(self) -> bool:
        """True if it is affine apart from its own non-linearity, so that its output for zeros is its bias."""
        return self.kind in ("conv", "dense", "norm", "rescaling", "merge", "padding")


def find_layer(layers: Sequence[Layer], path: str) -> Layer:
    """The one layer at `path`; a last part that is unique will do ("conv3_block4_out" in a nested model, "1.conv2").

    Raises:
        UsageError: no layer, or more than one, matches `path`; the message has the nearest names.
    """
    for candidates in (
        [layer for layer in layers if layer.path == path],
        [layer for layer in layers if base_path(layer.path) == path],
        [layer for layer in layers if _ends_with(layer.path, path) or _ends_with(base_path(layer.path), path)],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            several = ", ".join(
                f"{layer.path} (of input {' and '.join(layer.inputs)})" if layer.inputs else layer.path
                for layer in candidates
            )
            raise UsageError(
                f"layer {path!r} stands for more than one: {several}. Name one of them.",
                code="layer-ambiguous",
                name=path,
            )
    raise UsageError(
        f"no layer {path!r}; {nearest(path, [layer.path for layer in layers])}", code="layer-unknown", name=path
    )


def _ends_with(path: str, end: str) -> bool:
    return path.endswith(("/" + end, "." + end))


def base_path(path: str) -> str:
    """The path without the marks for one of several calls or outputs."""
    return re.sub(r"(#\d+)?(\[[^\]]*\])?$", "", path)


def select_layers(layers: Sequence[Layer], spec: str | Sequence[str] | None = None) -> list[Layer]:
    """Layers by kind, glob and place, in the order of execution.

    Args:
        layers: to choose from.
        spec: None for "conv|pool"; kinds or globs of paths joined by "|" or ","; a slice of the chosen
            (":8" the first eight, "2:5", "conv:4:" from the fifth convolution on); or a sequence of such texts.

    Raises:
        UsageError: some part of `spec` names nothing.
    """
    if spec is None:
        return [layer for layer in layers if layer.kind in ("conv", "pool")] or list(layers)
    parts = [spec] if isinstance(spec, str) else spec
    chosen = {layer.path for part in parts for layer in _by_spec(layers, part)}
    if not chosen:
        raise UsageError(
            f"{spec!r} chooses none of the {len(layers)} layers; expected kinds, globs or places such as ':8'.",
            code="layer-unknown",
            name=spec,
        )
    return [layer for layer in layers if layer.path in chosen]


def _by_spec(layers: Sequence[Layer], spec: str) -> list[Layer]:
    if re.fullmatch(r"-?\d*:-?\d*", spec):  # as Python writes slices: "2:5", ":8"
        spec = f":{spec}"
    place = re.fullmatch(r"(?P<names>[^:]*):(?P<start>(-?\d+)?)(?P<range>:(?P<stop>(-?\d+)?))?", spec)
    if place is None:
        return _by_names(layers, spec)
    start, stop = (place["start"], place["stop"]) if place["range"] is not None else ("", place["start"])
    # ":8" counts among all layers, as the notes' `model.layers[:8]` does; a container is not one of them.
    chosen = _by_names(layers, place["names"]) if place["names"] else [la for la in layers if not la.container]
    return chosen[slice(int(start) if start else None, int(stop) if stop else None)]


def _by_names(layers: Sequence[Layer], spec: str) -> list[Layer]:
    wanted: set[str] = set()
    names = [part.strip() for part in re.split(r"[|,]", spec) if part.strip()]
    for name in names:
        found = [layer.path for layer in layers if _answers(layer, name)]
        # "conv|pool" is a fair question to a network that never pools.
        if not found and not (name in KINDS and len(names) > 1):
            kinds = sorted({layer.kind for layer in layers})
            hint = nearest(name, [*kinds, *(layer.path for layer in layers)])
            raise UsageError(
                f"no layer of the kind or name {name!r}; {hint} Kinds here: {', '.join(kinds)}.",
                code="layer-unknown",
                name=name,
            )
        wanted.update(found)
    return [layer for layer in layers if layer.path in wanted]


def _answers(layer: Layer, name: str) -> bool:
    if name == layer.kind or name in ("*", "all"):
        return True
    # A path has brackets where a layer has several outputs; a glob would take them as a set of letters.
    pattern = name.replace("[", "[[]")
    return any(
        fnmatch.fnmatchcase(path, start + pattern)
        for path in (layer.path, base_path(layer.path))
        for start in ("", "*/", "*.")
    )


def check_channel(number: int, count: int, where: str) -> None:
    """Check that a channel is one of the `count` channels of `where`, numbered from 0; all techniques use this.

    Raises:
        UsageError: with code "channel-out-of-range", `channel`, `count` and `layer`.

    Example:
        >>> check_channel(5, 6, "conv2")
    """
    if not 0 <= number < count:
        raise UsageError(
            f"channel {number} is out of range: {where} has {count} channels, numbered from 0 to {count - 1}.",
            code="channel-out-of-range",
            channel=number,
            count=count,
            layer=where,
        )
