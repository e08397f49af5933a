"""ONNX operators that make tensors of shapes and numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.errors import ModelError
from convscope.networks.foreign import Structure
from convscope.networks.formats.onnx.operators.node import Node, enter, ints, operator
from convscope.networks.formats.onnx.operators.shapes import TYPES


@operator("other", "Shape")
def _shape(n: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[slice(n.get("start", 0), n.get("end"))], dtype=torch.int64)


enter("other", Size=lambda x: torch.tensor(x.numel(), dtype=torch.int64))


@operator("other", "ConstantOfShape")
def _constant_of_shape(n: Node, shape: Tensor) -> Tensor:
    value = n.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand(ints(shape)).clone()


@operator("other", "Range")
def _range(n: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    count = max(0, math.ceil((limit.item() - start.item()) / step.item()))
    return start + step * torch.arange(count, dtype=start.dtype)


@operator("other", "OneHot")
def _one_hot(n: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth), n.get("axis", -1)
    inside = (indices >= -count) & (indices < count)
    hot = F.one_hot(indices.long() % count, count).to(values.dtype) * inside.unsqueeze(-1)
    hot = values[0] + hot * (values[1] - values[0])
    return hot.movedim(-1, axis)


@operator("other", "EyeLike")
def _eye_like(n: Node, x: Tensor) -> Tensor:
    dtype = TYPES[n.get("dtype")] if n.get("dtype") else x.dtype
    rows, columns = x.shape
    row, column = torch.arange(rows, device=x.device)[:, None], torch.arange(columns, device=x.device)
    return (column - row == n.get("k", 0)).to(dtype)


@operator("dropout", "Dropout")
def _dropout(n: Node, x: Tensor, ratio: Structure = None, training: object = None) -> object:
    if training is not None and bool(training) and float(0.5 if ratio is None else ratio) > 0:
        raise ModelError(
            f"the node {n.name} drops values (training_mode); export the model in eval mode.",
            code="training-mode",
            name=n.name,
        )
    if n.outputs == 1:
        return x
    return x, torch.ones(x.shape, dtype=torch.bool if n.opset >= 10 else x.dtype, device=x.device)
