"""The inputs of a Keras model: the image's input, its shape, and the values of the others."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import keras
import numpy as np

from convscope.errors import ModelError, UsageError, option
from convscope.images.image import InputImage
from convscope.networks import preprocessing as pp
from convscope.networks.choices import Choices
from convscope.networks.feeding import described, fed_values, image_input, prepared
from convscope.networks.foreign import KerasLayer, KerasModel, Structure, Tensor
from convscope.networks.inputs import Inputs, check_dimensions, check_input, check_size, convolutions
from convscope.networks.keras.graph import CHANNELS_FIRST, kind_of


class Entry:
    """The model's inputs: the image's input, its shape, and the values of the others.

    Args:
        model: the model.
        operations: all below it, with their paths.
        choices: the user's options for it.
        family: that it belongs to, of which the size is known.
    """

    def __init__(
        self,
        model: KerasModel,
        operations: Sequence[tuple[str, KerasLayer]],
        choices: Choices,
        family: pp.Family | None,
    ) -> None:
        size, feed = choices.size, choices.feed
        self._specs = _input_specs(model, size)
        self._preprocessing: pp.Preprocessing | None = None
        graph = getattr(model, "_functional", None) or model  # a Sequential keeps its graph aside
        self._struct = getattr(graph, "_inputs_struct", None)
        name = image_input(choices.input, self._specs, feed)
        self.position = list(self._specs).index(name)
        spec = self._specs[name]
        if len(spec) != 4:  # of three axes it may be a grey image without one of channels
            check_dimensions(model.name, convolutions((path, type(layer).__name__) for path, layer in operations))
        self.channels_first = _is_channels_first(operations, spec)
        height, width, channels = _image_shape(name, spec, self.channels_first)
        self._rank = len(spec)
        self._others = fed_values([other for other in self._specs if other != name], self._specs, feed)
        fixed = height is not None and width is not None
        chosen = _size(fixed, (height, width), size, family)
        check_input(name, (*chosen, channels))
        others = {other: described(feed.get(other)) for other in self._others}
        self.inputs = Inputs(name, chosen, not fixed, channels, others)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs, in the order of the arguments."""
        return tuple(self._specs)

    def preparing(self, preprocessing: pp.Preprocessing) -> Entry:
        """This entry with the preprocessing of the image for the images that are fed."""
        found = copy.copy(self)
        found._preprocessing = preprocessing
        return found

    def feed(self, x: Tensor) -> Structure:
        """The arguments of the model for images `x` `(n, h, w, c)`: on torch copies, which it may change in place."""
        size = (x.shape[1], x.shape[2])
        x = self._laid_out(x, self._rank)
        if len(self._specs) == 1:
            flat = [x]
        else:
            flat = [x if name == self.inputs.name else self._repeated(name, x.shape[0], size) for name in self._specs]
        if self._struct is None:
            return flat[0] if len(flat) == 1 else flat
        return keras.tree.pack_sequence_as(self._struct, flat)

    def build(self, model: KerasModel, x: np.ndarray) -> None:
        """Build a model that was never called; its weights come into being here."""
        if not all(layer.built for layer in model._flatten_layers()):
            model(self.feed(keras.ops.convert_to_tensor(x)), training=False)

    def _laid_out(self, x: Tensor, rank: int) -> Tensor:
        """Images `(n, h, w, c)` with the axes of an input."""
        if self.channels_first:
            x = keras.ops.transpose(x, (0, 3, 1, 2))
        x = keras.ops.squeeze(x, axis=1 if self.channels_first else -1) if rank == 3 else x
        return keras.ops.copy(x) if keras.backend.backend() == "torch" else x  # elsewhere tensors never change

    def _repeated(self, name: str, count: int | None, size: tuple[int | None, int | None]) -> Tensor:
        value = self._others[name]
        if isinstance(value, InputImage):
            made = self._image(name, value, size)
        else:
            made = keras.ops.convert_to_tensor(value.astype(np.float32))
        return keras.ops.repeat(made, count, axis=0)

    def _image(self, name: str, image: InputImage, size: tuple[int | None, int | None]) -> Tensor:
        """A fed image, of the size of its input, or of the image that is explained where that is free."""
        height, width, channels = _image_shape(name, self._specs[name], self.channels_first)
        shape = (height or size[0] or self.inputs.size[0], width or size[1] or self.inputs.size[1], channels)
        made = keras.ops.convert_to_tensor(prepared(image, shape, self._preprocessing))
        return self._laid_out(made, len(self._specs[name]))


def _input_specs(model: KerasModel, size: tuple[int, int] | None) -> dict[str, tuple[int | None, ...]]:
    """Shape of each input by name, the batch first, None where free."""
    symbolic = getattr(model, "inputs", None)
    if symbolic:
        return {tensor.name: tuple(tensor.shape) for tensor in symbolic}
    built = (model.get_build_config() or {}).get("input_shape")
    if built and all(isinstance(side, int | type(None)) for side in built):
        return {"input": (None, *built[1:])}
    if size is None:
        raise UsageError(
            f"the model {model.name} was never built or called, so its input is unknown. "
            "Call it once on an image, or give size=(height, width).",
            code="size-missing",
            name=model.name,
        )
    return {"input": (None, *size, 3)}


def _is_channels_first(operations: Sequence[tuple[str, KerasLayer]], spec: tuple[int | None, ...]) -> bool:
    """From the first layer that has a `data_format`, else guessed from the shape."""
    for _, operation in operations:
        if getattr(operation, "data_format", None) and kind_of(operation) in ("conv", "pool", "global_pool"):
            return operation.data_format == CHANNELS_FIRST
    return len(spec) == 4 and spec[1] in (1, 3) and spec[3] not in (1, 3)


def _image_shape(name: str, spec: tuple[int | None, ...], channels_first: bool) -> tuple[int | None, int | None, int]:
    if len(spec) == 3:  # (n, h, w): a grey image without a channel axis
        return spec[1], spec[2], 1
    if len(spec) != 4:
        raise ModelError(
            f"the input {name!r} has the shape {spec[1:]}; expected an image (height, width, channels). "
            "convscope opens convolutional networks; if another input takes the image, choose it with "
            f"{option('open_model.input')}.",
            code="input-shape",
            name=name,
        )
    height, width, channels = (spec[2], spec[3], spec[1]) if channels_first else spec[1:]
    return height, width, channels or 3


def _size(
    fixed: bool, shape: tuple[int | None, int | None], asked: tuple[int, int] | None, family: pp.Family | None
) -> tuple[int, int]:
    if fixed:
        only = (int(shape[0] or 0), int(shape[1] or 0))
        check_size(only, asked)
        return only
    side = family.size if family else 224
    height, width = asked or (side, side)
    return shape[0] or height, shape[1] or width
