"""The inputs of a network: the image, and the values of the others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from convscope import limits
from convscope.errors import ModelError, UsageError


@dataclass(frozen=True)
class Inputs:
    """The image that a network takes.

    Attributes:
        name: name of the input that gets the image.
        size: `(h, w)` in pixels that images are brought to.
        free: True if the network would take other sizes too.
        channels: 1 for grey, 3 for RGB.
        others: names of further inputs, and their values.
        note: a remark on the size, where it is a guess.

    Example:
        >>> network.inputs.size, network.inputs.channels, network.inputs.free
        ((224, 224), 3, True)
    """

    name: str
    size: tuple[int, int]
    free: bool
    channels: int
    others: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def check_size(only: tuple[int, int], asked: tuple[int, int] | None) -> None:
    """Refuse a size `(h, w)` of the user's that is not the one that a model of a fixed size takes.

    Raises:
        UsageError: it is another one.
    """
    if asked not in (None, only):
        raise UsageError(
            f"the model takes images of {only[0]}x{only[1]} pixels only, not {asked[0]}x{asked[1]}.",
            code="size-misfit",
            expected=list(only),
            found=list(asked),
        )


def check_dimensions(name: str, found: Sequence[tuple[str, int]]) -> None:
    """Refuse a network of signals or volumes, which would fail with an error of its first layer.

    Args:
        name: of the model.
        found: for each convolution, or else each input, what it is in a message and its number of dimensions: 1 for
            signals, 2 for images, 3 for volumes and videos.

    Raises:
        ModelError: all are of another number than 2.

    Example:
        >>> check_dimensions("net", [("the layer 'stem' (Conv2D)", 2), ("the layer 'gate' (Conv1D)", 1)])
    """
    if not found or any(count == 2 for _, count in found):
        return
    what, count = found[0]
    raise ModelError(
        f"{name} takes {'signals' if count == 1 else 'volumes or videos'}, not images: {what} is {count}-D. convscope "
        f"opens networks with 2-D convolutions; {count}-D networks are not supported yet.",
        code="dimensions-unsupported",
        name=name,
        dimensions=count,
    )


_CONVOLUTION = re.compile(r"Conv[A-Za-z]*?([123])d", re.IGNORECASE)


def convolutions(layers: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    """What each convolution is, and its number of dimensions, which the name of its class has.

    Args:
        layers: the path and the name of the class of each.

    Example:
        >>> convolutions([("a", "SeparableConv1D"), ("b", "ConvTranspose3d"), ("c", "Dense")])
        [("the layer 'a' (SeparableConv1D)", 1), ("the layer 'b' (ConvTranspose3d)", 3)]
    """
    named = ((path, name, _CONVOLUTION.search(name)) for path, name in layers)
    return [(f"the layer {path!r} ({name})", int(found[1])) for path, name, found in named if found]


def check_input(name: str, shape: Sequence[int]) -> None:
    """Refuse an input before it is made.

    Args:
        name: of the input.
        shape: for one image; of an image the channels last.

    Raises:
        ModelError: a side is no positive number, or the array is larger than the limits allow.
    """
    sides = [int(side) for side in shape]
    if any(side < 1 for side in sides):
        raise ModelError(
            f"the input {name!r} has the shape {tuple(sides)}; expected positive numbers.",
            code="input-shape",
            name=name,
            shape=list(sides),
        )
    if len(sides) == 3 and sides[0] * sides[1] > limits.current().pixels:
        raise ModelError(
            f"the input {name!r} takes images of {sides[0]}x{sides[1]} pixels ({limits.how_to_raise('pixels')}).",
            code="input-too-large",
            limit="pixels",
        )
    taken = 4 * math.prod(sides)
    if taken > limits.current().values:
        raise ModelError(
            f"the input {name!r} has the shape {tuple(sides)}, which takes {limits.shown('values', taken)} "
            f"({limits.how_to_raise('values')}).",
            code="input-too-large",
            limit="values",
        )


def blank_input(name: str, shape: Sequence[int | None], whole: bool = False) -> np.ndarray:
    """Zeros for an input that does not get the image, of a declared `shape`.

    Args:
        name: of the input.
        shape: its first side is the batch, of which one is made.
        whole: its first side is no batch.

    Raises:
        ModelError: see `check_input`.
    """
    sides = [side or 1 for side in shape]
    sides = sides if whole else [1, *sides[1:]]
    check_input(name, sides)
    return np.zeros(sides)
