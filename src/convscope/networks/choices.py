"""The user's options for a model, as every subclass of `Network` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from convscope.networks.feeding import Feed
from convscope.networks.head import HeadChoice
from convscope.networks.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class Choices:
    """The user's options for a model; None where convscope detects the value.

    Attributes:
        input: name of the input that gets the image, where there are several.
        output: name of the output that is explained, where there are several.
        size: `(h, w)` to bring images to, for a model of free size; needed for a Keras model that was never built.
        feed: values for the other inputs, by name: `(1, ...)` arrays, or images.
        preprocess: the preprocessing of images.
        class_names: one for each class.
        head: the kind of the outputs.
    """

    input: str | None = None
    output: str | None = None
    size: tuple[int, int] | None = None
    feed: Mapping[str, Feed] = field(default_factory=dict)
    preprocess: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    head: HeadChoice | None = None
