"""An ONNX graph as a PyTorch module: one `Step` for each node.

The well-known converters need a torchvision that fits the torch at hand, or know old operator sets only; the operators
that convolutional networks use are few, and `operators/` has them in a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from convscope import limits
from convscope.errors import ModelError
from convscope.networks.foreign import Structure
from convscope.networks.formats.onnx.builder import HALF, Builder, is_whole, refusal
from convscope.networks.formats.onnx.content import OnnxFile, Shape
from convscope.networks.formats.onnx.operators import TYPES
from convscope.networks.formats.onnx.step import Step, as_tuple
from convscope.networks.torch.limits import allowance


class OnnxModule(nn.Module):
    """A graph, node after node; a tensor is let go after its last use.

    Attributes:
        input_names, output_names: as in the file; input_shapes: `(n, ...)` by name, None for what is free.
        unbatched: inputs that are the same whole array for every batch.
        widened: True if values of half precision were made float32.
    """

    remembers_nothing = True  # of a pass

    def __init__(self, built: Builder, outputs: dict[str, str | torch.Tensor], image: str) -> None:
        super().__init__()
        inputs = built.file.inputs
        self.input_names, self.output_names = list(inputs), list(outputs)
        self.input_shapes = {name: item.shape for name, item in inputs.items() if item.shape is not None}
        self.unbatched = _unbatched(self.input_shapes, image)
        self.widened = built.widened or any(item.kind in HALF for item in inputs.values())
        # The image comes in float, whatever the file declares, so that it has a gradient.
        self._casts = {name: TYPES[item.kind] for name, item in inputs.items() if is_whole(item) and name != image}
        self._outputs = {name: value for name, value in outputs.items() if isinstance(value, str)}
        self._kept = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        self._image, self._batch = self.input_names.index(image), built.batch
        for number, step in enumerate(built.steps):
            self.add_module(str(number), step)
        self._gone = _last_uses(built.steps, keep=set(self._outputs.values()))

    @property
    def steps(self) -> list[Step]:
        """The nodes in the order of execution."""
        return [step for step in self.children() if isinstance(step, Step)]

    def forward(self, *given: torch.Tensor) -> object:
        """The output, or a dictionary of several; one tensor for each of `input_names`.

        Raises:
            ModelError: a node can't be computed, or all of them together take more than the limits allow.
        """
        values: dict[str, Structure] = {}
        for name, value in zip(self.input_names, given, strict=True):
            values[name] = value.to(self._casts[name]) if name in self._casts else value
        image = given[self._image]
        self._batch.actual = int(image.shape[0]) if image.dim() else 1
        left = _WHOLE * allowance(self._batch.actual, self._batch.held).size
        for step, gone in zip(self.steps, self._gone, strict=True):
            made = as_tuple(step(*(values[name] for name in step.inputs if name is not None)))
            left -= sum(value.numel() * value.element_size() for value in made)
            if left < 0:
                raise ModelError(
                    f"the nodes up to {step.node.name!r} compute more values for one image than the limit allows "
                    f"({limits.how_to_raise('values')}).",
                    code="input-too-large",
                    limit="values",
                )
            values.update(zip(step.outputs, made, strict=False))
            for name in gone:
                values.pop(name, None)
        returned = self._kept | {name: values[inner] for name, inner in self._outputs.items()}
        returned = {name: returned[name] for name in self.output_names}
        return returned if len(returned) > 1 else next(iter(returned.values()))


_WHOLE = 16  # so many times what one operation may make, for all of a pass


def _unbatched(shapes: dict[str, Shape], image: str) -> set[str]:
    """Inputs whose first side is a number that is no batch: sizes, anchors, a scalar."""
    batch = next(iter(shapes.get(image, ())), None)
    return {name for name, shape in shapes.items() if name != image and (not shape or shape[0] not in (None, 1, batch))}


def _last_uses(steps: Sequence[Step], keep: set[str]) -> list[list[str]]:
    """For each step the tensors that no later one needs."""
    last = {name: number for number, step in enumerate(steps) for name in (*step.inputs, *step.outputs) if name}
    gone: list[list[str]] = [[] for _ in steps]
    for name, number in last.items():
        if name not in keep:
            gone[number].append(name)
    return gone


def module_of(file: OnnxFile, image: str) -> OnnxModule:
    """A graph as a module.

    Raises:
        ModelError: it uses operators that can't be converted, or tensors that nothing makes.
    """
    built = Builder(file)
    try:
        outputs = built.build()
    except RecursionError as error:
        raise ModelError(
            f"{file.path} nests functions too deep.", code="input-too-large", path=str(file.path), limit="depth"
        ) from error
    if built.missing:
        raise refusal(file.path, built.missing)
    # Only now: constants that were folded above belong to no batch.
    shape = file.inputs[image].shape if image in file.inputs else None
    built.batch.declared = shape[0] if shape else None
    return OnnxModule(built, outputs, image)
