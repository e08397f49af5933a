"""One node of an ONNX graph as a PyTorch module, named as Netron names it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.foreign import Structure
from convscope.networks.formats.onnx.operators import OPERATORS, READS_NUMBERS, Node
from convscope.networks.graph import Fact
from convscope.networks.torch.limits import BeyondLimits, allowance, held_to
from convscope.networks.torch.modules import Described

# Names of an operator's inputs that are weights: as in `torch.nn`.
_WEIGHTS = {
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Gemm": ("", "weight", "bias"),
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "InstanceNormalization": ("", "weight", "bias"),
    "LayerNormalization": ("", "weight", "bias"),
    "GroupNormalization": ("", "weight", "bias"),
}


class Step(nn.Module):
    """One node of the graph.

    Args:
        node: the context of the operator.
        inputs: for each input the name of its tensor, or the constant itself, or None where it is left out.
        outputs: names of its outputs, "" where one is not used.
    """

    def __init__(self, node: Node, inputs: Sequence[str | torch.Tensor | None], outputs: Sequence[str]) -> None:
        super().__init__()
        kind, self._operator = OPERATORS[node.operator]
        self.node, self.outputs = node, tuple(outputs)
        self.described = Described(node.operator, kind, node.name)
        self.inputs: list[str | None] = [name if isinstance(name, str) else None for name in inputs]
        self._held: list[str | None] = [
            self._hold(place, value) if isinstance(value, torch.Tensor) else None for place, value in enumerate(inputs)
        ]
        self._like = (node.operator, node.opset, node.outputs, repr(sorted(node.attributes.items())))
        self._numbers = _are_numbers(node.operator, len(inputs))
        self._forms = [
            _form_of(value, is_number) if isinstance(value, torch.Tensor) else None
            for value, is_number in zip(inputs, self._numbers, strict=True)
        ]
        self.groups = int(node.get("group", 1))
        kernel = getattr(self, "weight", None)
        if node.operator == "Conv" and kernel is not None and kernel.dim() > 2:
            self.in_channels = int(kernel.shape[1]) * self.groups

    def _hold(self, place: int, value: torch.Tensor) -> str:
        """Keep a constant, and say under which name: weights and what is computed with as PyTorch's modules do."""
        names = _WEIGHTS.get(self.node.operator, ())
        name = names[place] if place < len(names) and names[place] else f"input_{place}"
        learned = not name.startswith("running") and value.numel() > 1 and self.node.operator not in READS_NUMBERS
        if value.is_floating_point() and (name in ("weight", "bias") or learned):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        elif value.is_floating_point() and not (place and self.node.operator in READS_NUMBERS):
            self.register_buffer(name, value)
        else:
            # Shapes, axes and indices stay on the CPU, where Python reads them without waiting for a device.
            object.__setattr__(self, name, value)
        return name

    @property
    def constants(self) -> list[torch.Tensor]:
        """The inputs that are constants."""
        return [getattr(self, held) for held in self._held if held is not None]

    @property
    def facts(self) -> dict[str, Fact]:
        """See `Call.facts`: the axes of a softmax, the bounds of a clip, the slope of a hard sigmoid."""
        node = self.node
        if node.operator in ("Softmax", "LogSoftmax"):
            axis = int(node.get("axis", -1 if node.opset >= 13 else 1))
            return {"axes": slice(axis, axis + 1 or None) if node.opset >= 13 else slice(axis, None)}
        if node.operator == "Clip":
            if any(name is not None for name in self.inputs[1:]):
                return {"bounds": (1.0, 0.0)}  # they are computed
            held = [None if name is None else getattr(self, name) for name in (*self._held[1:], None, None)]
            ends = node.get("min", held[0]), node.get("max", held[1])
            return {"bounds": tuple(None if end is None else float(end) for end in ends)}
        if node.operator == "HardSigmoid":
            return {"slope": float(node.get("alpha", 0.2)) if node.get("beta", 0.5) == 0.5 else None}
        return {}

    def forward(self, *given: torch.Tensor) -> object:
        """The output of the operator for the tensors that are no constants.

        Raises:
            ModelError: they don't fit it, or it would take more than the limits allow.
        """
        tensors = iter(given)
        values = [
            next(tensors) if name is not None else (None if held is None else getattr(self, held))
            for name, held in zip(self.inputs, self._held, strict=True)
        ]
        if self.node.operator not in READS_NUMBERS:
            values = _together(values)
        try:
            return self._within_limits(values)
        except BeyondLimits as error:
            found = {"name": self.node.name, **error.data}
            raise ModelError(self._cant(error), code=error.code, **found) from error
        except (torch.OutOfMemoryError, ModelError):
            raise
        except Exception as error:  # whatever Python, NumPy or torch raise at values that don't fit
            reason = one_line(error)[:200]
            raise ModelError(self._cant(error), code="node-failed", name=self.node.name, reason=reason) from error

    def _within_limits(self, values: list[object]) -> object:
        """The output of the operator. Shapes and numbers that no such node has met yet are checked beforehand."""
        batch = self.node.batch
        form = self._form(values)
        if form is not None and form in batch.met:
            return self._operator(self.node, *values)
        with held_to(allowance(batch.actual, batch.held)):
            made = self._operator(self.node, *values)
        if form is not None:
            batch.met.add(form)
        return made

    def _form(self, values: list[Structure]) -> object:
        """Everything that decides how much the operator makes; None if that is a lot of numbers."""
        form: list[object] = [self._like, self.node.batch.actual]
        for value, held, is_number in zip(values, self._forms, self._numbers, strict=True):
            if held is not None:
                form.append(held)
            elif value is not None and is_number and value.numel() > MOST_NUMBERS:
                return None
            elif value is not None:
                form.append(_form_of(value, is_number))
        return tuple(form)

    def _cant(self, error: Exception) -> str:
        batch = self.node.batch
        reason = one_line(error)[:200].rstrip(".")
        why = f"the node {self.node.name!r} ({self.node.operator}) can't be computed: {reason}."
        if batch.declared not in (None, batch.actual):
            why += f" The file declares batches of {batch.declared}, and this one has {batch.actual}: "
            why += "export it with a free batch."
        return why


MOST_NUMBERS = 64


def _form_of(value: torch.Tensor, is_number: bool) -> object:
    return value.shape, value.dtype, tuple(value.reshape(-1).tolist()) if is_number else ()


def _are_numbers(operator: str, count: int) -> list[bool]:
    """For each input whether its values decide how much is made."""
    reads = operator in READS_NUMBERS or operator == "OneHot"
    return [reads and (place > 0 or operator in ("ConstantOfShape", "Range")) for place in range(count)]


def _together(values: list[object]) -> list[object]:
    """Numbers made from shapes are on the CPU; beside a tensor on another device they follow it."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return values
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


def as_tuple(made: Structure) -> tuple[torch.Tensor, ...]:
    """The output of an operator: one tensor or several."""
    return tuple(made) if isinstance(made, tuple | list) else (made,)
