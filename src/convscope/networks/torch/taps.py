"""Taps on PyTorch modules: forward hooks, and a mode for the operations that are no modules, for one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import cast

import torch
from torch import Tensor, nn

from convscope.networks.foreign import Operation, Structure
from convscope.networks.graph import Call, flat_outputs
from convscope.networks.ops import Operations
from convscope.networks.passes import Pass, Reduction, Rule
from convscope.networks.restoring import checkpoint
from convscope.networks.torch import ops as torch_ops
from convscope.networks.torch.graph import FunctionMode, Places, Watch, tensors_of
from convscope.networks.torch.quantized import dequantized, in_type_of
from convscope.networks.trace import Calls
from convscope.networks.traced import Enough, Taps

OPS = cast(Operations, torch_ops)


class TorchTaps(Taps):
    """Hooks for one pass: they record outputs, apply rules, undo the head, and stop the pass."""

    def __init__(
        self,
        calls: Calls,
        modules: Mapping[nn.Module, str],
        request: Pass,
        given: tuple[Mapping[str, Rule], Mapping[str, Reduction]],
        left_out: set[str],
        images: int,
    ) -> None:
        super().__init__(calls, request, *given, images)
        self._modules, self._left_out = modules, left_out
        self._at |= {path: calls[path] for path in left_out}
        self._count: dict[object, int] = {}
        self._busy = False
        self._recording = torch.is_grad_enabled()  # where a pass is to be differentiated

    def place(self, undo: ExitStack) -> None:
        """Tap; `undo` takes the taps away."""
        taps: dict[Operation, list[tuple[str, Call, int]]] = {}
        for path, (call, index) in self._at.items():
            taps.setdefault(call.operation, []).append((path, call, index))
        functions = {key: at for key, at in taps.items() if isinstance(key, str)}
        for module, at in taps.items():
            if module not in functions:
                if any(path in self._left_out for path, _, _ in at):
                    _not_in_place(module, undo)
                undo.callback(module.register_forward_hook(self._hook(module, at), with_kwargs=True).remove)
        if functions:
            places = Places(self._modules)
            places.follow(undo)
            undo.enter_context(FunctionMode(places, self._mode(functions)))

    def _hook(self, module: nn.Module, at: list[tuple[str, Call, int]]) -> Callable:
        def hook(_: nn.Module, args: object, kwargs: object, result: object) -> object:
            return self._touched(module, at, (args, kwargs), result)

        return hook

    def _mode(self, functions: Mapping[str, list[tuple[str, Call, int]]]) -> Callable:
        undone = {self._at[path][0].operation for path in self._left_out}

        def seen(path: str, name: str, args: object, kwargs: object, run: Callable) -> Structure:
            if path in undone:  # it may work in place, and its input is needed
                given = _first_of((args, kwargs)).clone()
                result = run()
                args, kwargs = (given,), {}
            else:
                result = run()
            if self._busy:
                return result
            tensors = tensors_of(result)
            if path not in functions or not any(tensor.dim() > 0 for tensor in tensors):
                return result
            return self._touched(path, functions[path], (args, kwargs), result)

        return seen

    def _touched(self, operation: object, at: list[tuple[str, Call, int]], given: object, result: object) -> object:
        checkpoint()
        nth = self._count[operation] = self._count.get(operation, -1) + 1
        self._busy = True  # operations of a rule are no part of the network
        for path, call, index in at:
            if call.nth == nth:
                result = self._touch(path, call, index, given, result)
        self._busy = False
        if self._stops_here:
            raise Enough
        return result

    def _differentiates(self, call: Call, index: int) -> bool:
        """True if a gradient is to come back to the output of a call that a rule replaces.

        The module's own `no_grad` is about the layers before: a score has a gradient at this output, if layers after it
        are outside of that. One that is overwritten in there would get the gradient of what was not overwritten.
        """
        return torch.is_grad_enabled() or (self._recording and index not in call.facts.get("overwritten", ()))

    def _touch(self, path: str, call: Call, index: int, given: object, result: object) -> Structure:
        tensor, layout = flat_outputs(result)[index][1], call.layout(index)
        if path in self._left_out:
            before = _first_of(given)
            result, tensor = _replaced(result, tensor, before), before
        self._left.discard(path)
        overwritten = self._is_overwritten(call, index)
        if path in self._record:
            self._check_rows(path, layout.by_image(tensor.shape))
        if path in self._rules:
            differentiates = self._differentiates(call, index)
            with torch.inference_mode(False), torch.set_grad_enabled(differentiates):
                values = dequantized(tensor.clone() if tensor.is_inference() else tensor)
                replaced = layout.output_of(OPS, self._rules[path](layout.map_of(OPS, values)), values)
                changed = in_type_of(replaced, tensor)
                changed = changed.clone() if overwritten else changed  # the rule may keep what it returned
                activation = layout.map_of(OPS, dequantized(changed))
            result, tensor = _replaced(result, tensor, changed), changed
        else:
            activation = layout.map_of(OPS, dequantized(tensor))
        if path in self._record:
            # A copy before the reduction: that may return a part of the map, in the map's memory.
            self.recorded[path] = self._record[path](activation.clone() if overwritten else activation)
        return result


def _first_of(given: object) -> Tensor:
    """The first tensor with values for images; a number that it is combined with may be a tensor too."""
    return next(tensor for tensor in tensors_of(given) if tensor.dim() > 0)


def _not_in_place(module: nn.Module, undo: ExitStack) -> None:
    """A module's input is needed afterwards, so it must not overwrite it."""
    if getattr(module, "inplace", False):
        undo.callback(setattr, module, "inplace", True)
        module.inplace = False  # type: ignore[assignment]


# Functions that modules call while they are watched and tapped.
OWN_CODE = {function.__code__ for function in (TorchTaps._touched, Watch._before, Watch._after)}


def _replaced(structure: object, old: Tensor, new: Tensor) -> Structure:
    """Nested outputs with one tensor in another's place."""
    if structure is old:
        return new
    if is_dataclass(structure) and not isinstance(structure, type):
        same = copy.copy(structure)
        for item in fields(structure):
            object.__setattr__(same, item.name, _replaced(getattr(structure, item.name), old, new))
        return same
    if isinstance(structure, Mapping):
        changed = copy.copy(structure)
        for key, value in structure.items():
            changed[key] = _replaced(value, old, new)  # type: ignore[index]
        return changed
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_replaced(value, old, new) for value in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(_replaced(value, old, new) for value in structure)
    return structure
