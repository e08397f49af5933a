"""Between a file and `network.py`: a Keras model and its origin."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.networks import preprocessing as pp
from convscope.networks.foreign import KerasModel
from convscope.networks.network import Source


@dataclass(frozen=True)
class OpenedModel:
    """A Keras model with its known origin.

    Attributes:
        model: any `keras.Model`; it stays as it is.
        source: where it came from.
        family: the collection that the model came from (`keras:NAME`), if known.
        imagenet: whether its classes are ImageNet's where it has as many and belongs to a family; not those of weights
            that are drawn, or of a model in memory.
    """

    model: KerasModel
    source: Source
    family: pp.Family | None = None
    imagenet: bool = True
