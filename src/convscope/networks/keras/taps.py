"""Taps on Keras operations: an operation's `call` or activation is patched for the length of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import cast

import keras

from convscope.networks.foreign import KerasLayer, Structure, Tensor
from convscope.networks.graph import Call, flat_outputs
from convscope.networks.keras.graph import Observer, call_method, is_recurrent, patch, python_call
from convscope.networks.layouts import Layout
from convscope.networks.ops import Operations
from convscope.networks.passes import Rule
from convscope.networks.restoring import checkpoint
from convscope.networks.trace import Calls
from convscope.networks.traced import Enough, Taps

OPS = cast(Operations, keras.ops)


class KerasTaps(Taps):
    """Wraps the calls of the tapped operations for one pass: records outputs and applies rules."""

    @property
    def operations(self) -> set[int]:
        """The tapped operations, by their `id`."""
        return {id(call.operation) for call, _ in self._at.values()}

    def place(self, undo: ExitStack) -> None:
        """Tap, until `undo` is run."""
        by_operation: dict[int, list[tuple[str, Call, int]]] = {}
        for path, (call, index) in self._at.items():
            by_operation.setdefault(id(call.operation), []).append((path, call, index))
        for taps in by_operation.values():
            operation = taps[0][1].operation
            method = call_method(operation)
            patch(undo, operation, method, self._tapped(operation, method, taps))

    def _tapped(self, operation: KerasLayer, method: str, taps: list[tuple[str, Call, int]]) -> Callable:
        original, calls = python_call(operation, method), 0

        def tapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            checkpoint()
            result = original(*args, **kwargs)
            for path, call, index in taps:
                if call.nth == calls:
                    result = self._touch(path, call, index, result)
            calls += 1
            if self._stops_here:
                raise Enough
            return result

        return tapped

    def _touch(self, path: str, call: Call, index: int, result: object) -> Structure:
        (_, tensor), self._left = flat_outputs(result)[index], self._left - {path}
        layout, overwritten = call.layout(index), self._is_overwritten(call, index)
        if path in self._record:
            self._check_rows(path, layout.by_image(tensor.shape))
        activation = layout.map_of(OPS, tensor)
        if path in self._rules:
            activation = self._rules[path](activation)
            replaced = keras.ops.cast(layout.output_of(OPS, activation, tensor), tensor.dtype)
            replaced = keras.ops.copy(replaced) if overwritten else replaced  # the rule may keep what it returned
            result = keras.tree.map_structure(lambda item: replaced if item is tensor else item, result)
        if path in self._record:
            # A copy before the reduction: that may return a part of the map, in the map's memory.
            self.recorded[path] = self._record[path](keras.ops.copy(activation) if overwritten else activation)
        return result


def called_once(calls: Calls, operation: KerasLayer) -> bool:
    """True if an operation has one call in the network."""
    return len({id(call) for call, _ in calls.values() if call.operation is operation}) == 1


def has_activation(operation: KerasLayer) -> bool:
    """True if an operation ends in a non-linearity of its own."""
    if is_recurrent(operation):
        return False
    activation = getattr(operation, "activation", None)
    return callable(activation) and activation is not keras.activations.linear


def without_nonlinearity(operation: KerasLayer) -> tuple[KerasLayer, str, object]:
    """The patches that remove an operation's non-linearity: its activation, or its whole call."""
    if callable(getattr(operation, "activation", None)):
        return operation, "activation", keras.activations.linear
    return operation, call_method(operation), _first_tensor


def _first_tensor(*args: object, **kwargs: object) -> Structure:
    """The first tensor that a call takes; a number that it is combined with is none."""
    return next(item for item in keras.tree.flatten((args, kwargs)) if len(getattr(item, "shape", ())) > 0)


def early_patch(path: str, call: Call, early: dict[str, Rule]) -> tuple[KerasLayer, str, object]:
    """The patches that apply a rule to the argument of an operation's activation; the rule fires once."""
    original, layout = call.operation.activation, call.layout(0)

    def activation(x: Tensor) -> Tensor:
        changed = _by_rule(early.pop(path), x, layout)
        return original(keras.ops.cast(layout.output_of(OPS, changed, x), x.dtype))

    return call.operation, "activation", activation


def _by_rule(rule: Rule, x: Tensor, layout: Layout) -> Tensor:
    return rule(layout.map_of(OPS, x))


# Functions that layers call while they are tapped.
OWN_CODE = {function.__code__ for function in (KerasTaps._touch, _by_rule, Observer._call)}


def in_bfloat16(undo: ExitStack, operations: Sequence[KerasLayer]) -> None:
    """Layers that compute in float32 compute in bfloat16; their weights stay as they are."""
    policy = keras.DTypePolicy("mixed_bfloat16")
    for operation in operations:
        if getattr(getattr(operation, "_dtype_policy", None), "name", None) == "float32":
            patch(undo, operation, "_dtype_policy", policy)
