"""The weights of an old Keras file, put into the variables of a model: all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from convscope.errors import ModelError
from convscope.networks.foreign import KerasLayer, KerasModel
from convscope.networks.formats.keras.legacy_h5.matching import Slot, match
from convscope.networks.formats.keras.legacy_h5.nodes import Scope
from convscope.networks.formats.keras.legacy_h5.stored import TOP, Stored, Weight


@dataclass(frozen=True)
class Layout:
    """One way in which old files laid out the values of a weight.

    Attributes:
        said: the line in `Opened.translated`.
        applies: given the variable and the facts of the file.
        change: the values of the file as today's Keras needs them.
    """

    said: str
    applies: Callable[[Slot, Stored], bool]
    change: Callable[[np.ndarray], np.ndarray]


def _is_kernel(slot: Slot, *classes: str) -> bool:
    return type(slot.owner).__name__ in classes and slot.variable.name.endswith("kernel")


def _filters_first(slot: Slot, stored: Stored) -> bool:
    """Keras 1 with dim_ordering "th" kept a kernel as (filters, channels, rows, columns)."""
    old = stored.major < 2 and _is_kernel(slot, "Conv2D", "SeparableConv2D", "Conv3D")
    return old and slot.owner.data_format == "channels_first"


def _by_theano(slot: Slot, stored: Stored) -> bool:
    """Theano turns kernels round when it convolves. Keras 1 named no backend; "th" is Theano's layout."""
    if not _is_kernel(slot, "Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose"):
        return False
    unnamed = stored.major < 2 and not stored.backend and slot.owner.data_format == "channels_first"
    return stored.backend == "theano" or unnamed


def _turned(kernel: np.ndarray) -> np.ndarray:
    return np.flip(kernel, axis=tuple(range(kernel.ndim - 2)))


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "kernels transposed from (filters, channels, rows, columns) (Keras 1, dim_ordering th)",
        _filters_first,
        lambda kernel: kernel.transpose(*range(2, kernel.ndim), 1, 0),
    ),
    Layout("kernels turned by 180 degrees (from Theano, or Keras 1 in its layout)", _by_theano, _turned),
)


def fill_model(model: KerasModel, stored: Stored) -> list[str]:
    """Assign each variable its dataset; returns the notes.

    Raises:
        ModelError: a dataset without a variable, a variable without a dataset, or other shapes.
    """
    pairs, said, problems = [], [], _strays(model, stored)
    for name, slots in _places(model):
        matched = match(stored.weights.get(name, []), slots)
        pairs += matched.pairs
        said += [f"{name}: {matched.said}"] if matched.said else []
        problems += [_homeless(name, weight) for weight in matched.weights]
        problems += [f"{slot.path} of the model is not in the file" for slot in matched.slots]
    problems += [problem for weight, slot in pairs for problem in _misfits(weight, slot, stored)]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ModelError(
            f"{stored.path.name}: expected its weights to fit its architecture, found: {shown}.",
            code="weights-misfit",
            path=stored.path.name,
            reasons=problems,
        )
    used = [layout for layout in LAYOUTS if any(layout.applies(slot, stored) for _, slot in pairs)]
    _assign(pairs, stored)
    _finalize(model)
    return said + [layout.said for layout in used]


def _places(model: KerasModel) -> Iterator[tuple[str, list[Slot]]]:
    """For each group of weights its name and the variables, in the order of the file format."""
    inside: set[int] = set()
    for layer in model.layers:
        slots = _slots(layer, (layer.name,))
        inside |= {id(slot.variable) for slot in slots}
        yield layer.name, slots
    yield TOP, [Slot((), model, variable) for variable in model.weights if id(variable) not in inside]


def _slots(layer: KerasLayer, scope: Scope) -> list[Slot]:
    """The variables in and below a layer, the trainable ones first: so the file format orders them."""
    found = {id(slot.variable): slot for slot in _walk(layer, scope)}
    return [found[id(variable)] for variable in [*layer.trainable_weights, *layer.non_trainable_weights]]


def _walk(layer: KerasLayer, scope: Scope) -> Iterator[Slot]:
    children = layer._flatten_layers(include_self=False, recursive=False)
    below = [slot for child in children for slot in _walk(child, (*scope, child.name))]
    taken = {id(slot.variable) for slot in below}
    yield from (Slot(scope, layer, variable) for variable in layer.weights if id(variable) not in taken)
    yield from below


def _strays(model: KerasModel, stored: Stored) -> list[str]:
    """Datasets in groups of layers that the model does not have."""
    known = {layer.name for layer in model.layers} | {TOP}
    strays = {name: weights for name, weights in stored.weights.items() if name not in known}
    return [_homeless(name, weight) for name, weights in strays.items() for weight in weights]


def _homeless(layer: str, weight: Weight) -> str:
    return f"{layer}/{weight.path}".strip("/") + " of the file has no place in the model"


def _layouts(slot: Slot, stored: Stored) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.applies(slot, stored)]


def _misfits(weight: Weight, slot: Slot, stored: Stored) -> Iterable[str]:
    """Why the dataset can't be the variable's value, without reading it."""
    shape, wanted = weight.shape, tuple(slot.variable.shape)
    if not weight.dataset.numbers or weight.dataset.values is None:
        return [f"{slot.path} is no numbers in the file ({weight.dataset.dtype})"]
    if prod(shape) == prod(wanted) and len(shape) == len(wanted):
        value = np.broadcast_to(np.float32(0), shape)  # the shape without the memory
        for layout in _layouts(slot, stored):
            value = layout.change(value)
        shape = value.shape
    return [] if shape == wanted else [f"{slot.path} is {weight.shape} in the file and {wanted} in the model"]


def _assign(pairs: Sequence[tuple[Weight, Slot]], stored: Stored) -> None:
    for weight, slot in pairs:
        value = weight.dataset.array
        for layout in _layouts(slot, stored):
            value = layout.change(value)
        slot.variable.assign(np.array(value))  # a copy: torch takes no negative strides


def _finalize(model: KerasModel) -> None:
    """Normalization computes what it uses from its weights when told that they are there."""
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
