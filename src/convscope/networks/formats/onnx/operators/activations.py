"""ONNX operators that are activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.networks.formats.onnx.operators.node import Node, enter, operator

enter(
    "activation",
    Relu=torch.relu,
    Sigmoid=torch.sigmoid,
    Tanh=torch.tanh,
    Softplus=lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    Softsign=F.softsign,
    Mish=F.mish,
    HardSwish=F.hardswish,
)


@operator("activation", "PRelu")
def _prelu(n: Node, x: Tensor, slope: Tensor) -> Tensor:
    if n.opset < 7 and slope.dim() == 1 and x.dim() > 1:
        slope = slope.reshape(-1, *[1] * (x.dim() - 2))  # one for each channel
    return torch.where(x < 0, slope * x, x)


@operator("activation", "LeakyRelu")
def _leaky_relu(n: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, n.get("alpha", 0.01))


@operator("activation", "Elu")
def _elu(n: Node, x: Tensor) -> Tensor:
    return F.elu(x, n.get("alpha", 1.0))


@operator("activation", "Celu")
def _celu(n: Node, x: Tensor) -> Tensor:
    return F.celu(x, n.get("alpha", 1.0))


@operator("activation", "Selu")
def _selu(n: Node, x: Tensor) -> Tensor:
    alpha, gamma = n.get("alpha", 1.6732632423543772), n.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


@operator("activation", "HardSigmoid")
def _hard_sigmoid(n: Node, x: Tensor) -> Tensor:
    return (n.get("alpha", 0.2) * x + n.get("beta", 0.5)).clamp(0, 1)


@operator("activation", "ThresholdedRelu")
def _thresholded(n: Node, x: Tensor) -> Tensor:
    return torch.where(x > n.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("activation", "Shrink")
def _shrink(n: Node, x: Tensor) -> Tensor:
    bias, edge = n.get("bias", 0.0), n.get("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@operator("activation", "Gelu")
def _gelu(n: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=n.get("approximate", "none"))


@operator("activation", "Swish")
def _swish(n: Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(n.get("alpha", 1.0) * x)


@operator("activation", "Clip")
def _clip(n: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low, high = n.get("min", low), n.get("max", high)  # attributes up to operator set 10
    ends = [None if end is None else torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high)]
    return x if ends == [None, None] else torch.clamp(x, *ends)


def _along(n: Node, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A softmax-like function over an axis, or, up to operator set 12, over all axes from it on."""
    axis = n.get("axis", -1 if n.opset >= 13 else 1) % max(1, x.dim())
    if n.opset >= 13:
        return function(x, axis)
    return function(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)


@operator("activation", "Softmax")
def _softmax(n: Node, x: Tensor) -> Tensor:
    return _along(n, x, torch.softmax)


@operator("activation", "LogSoftmax")
def _log_softmax(n: Node, x: Tensor) -> Tensor:
    return _along(n, x, torch.log_softmax)


@operator("activation", "Hardmax")
def _hardmax(n: Node, x: Tensor) -> Tensor:
    def hard(x: Tensor, axis: int) -> Tensor:
        best = x.argmax(dim=axis, keepdim=True)
        return torch.zeros_like(x).scatter(axis, best, torch.ones_like(x))

    return _along(n, x, hard)
