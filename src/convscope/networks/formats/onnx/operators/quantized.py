"""ONNX operators of quantized values, which are kept in float."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.networks.formats.onnx.operators.node import Node, operator
from convscope.networks.formats.onnx.operators.shapes import TYPES


@operator("identity", "QuantizeLinear")
def _quantize(n: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The whole numbers, as float; the gradient passes the rounding by (Bengio et al. 2013, 1308.3432)."""
    kind = TYPES[n.get("output_dtype", 0) or 2] if zero is None else zero.dtype
    ends = torch.iinfo(kind)
    y = x / _along_axis(n, scale, x)
    y = y + (y.round() - y).detach()
    y = y if zero is None else y + _along_axis(n, zero, x)
    return y.clamp(ends.min, ends.max)


@operator("identity", "DequantizeLinear")
def _dequantize(n: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    y = x.to(scale.dtype)
    y = y if zero is None else y - _along_axis(n, zero, x)
    return y * _along_axis(n, scale, x)


def _along_axis(n: Node, scale: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point for the whole tensor, for each index of an axis, or for each block of it."""
    axis, block = n.get("axis", 1), n.get("block_size", 0)
    if scale.numel() == 1 and scale.dim() < 2:
        return scale.reshape(())
    if block:
        return scale.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    sides = [1] * x.dim()
    sides[axis] = -1
    return scale.reshape(sides)
