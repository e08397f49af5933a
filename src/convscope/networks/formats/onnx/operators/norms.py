"""ONNX operators of dense layers and norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.errors import ModelError
from convscope.networks.foreign import Structure
from convscope.networks.formats.onnx.operators.node import Node, enter, operator


@operator("dense", "Gemm")
def _gemm(n: Node, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    a = a.t() if n.get("transA", 0) else a
    weight = weight.t() if n.get("transB", 0) else weight
    y = n.get("alpha", 1.0) * (a @ weight)
    return y if bias is None else y + n.get("beta", 1.0) * bias


enter("dense", MatMul=torch.matmul)


@operator("dense", "Einsum")
def _einsum(n: Node, *inputs: Tensor) -> Tensor:
    return torch.einsum(n.get("equation").replace(" ", ""), *inputs)


@operator("norm", "BatchNormalization")
def _batch_norm(n: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if n.get("training_mode", 0):
        raise ModelError(
            f"the node {n.name} normalises by the batch (training_mode); export the model in eval mode.",
            code="training-mode",
            name=n.name,
        )
    epsilon = n.get("epsilon", 1e-5)
    if not n.get("spatial", 1):  # up to operator set 8: statistics for each place
        return (x - mean) * torch.rsqrt(variance + epsilon) * weight + bias
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, epsilon)


@operator("norm", "InstanceNormalization")
def _instance_norm(n: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], weight, bias, n.get("epsilon", 1e-5))


@operator("norm", "GroupNormalization")
def _group_norm(n: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = n.get("num_groups")
    if weight.shape[0] == x.shape[1]:
        return F.group_norm(x, groups, weight, bias, n.get("epsilon", 1e-5))
    each = x.shape[1] // groups  # up to operator set 20 one scale for each group
    return F.group_norm(x, groups, weight.repeat_interleave(each), bias.repeat_interleave(each), n.get("epsilon", 1e-5))


@operator("norm", "LayerNormalization")
def _layer_norm(n: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Structure:
    axis = n.get("axis", -1) % x.dim()
    over = tuple(range(axis, x.dim()))
    mean = x.mean(dim=over, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(dim=over, keepdim=True) + n.get("epsilon", 1e-5))
    y = (x - mean) * inverse * weight
    y = y if bias is None else y + bias
    return (y, mean, inverse)[: n.outputs] if n.outputs > 1 else y


@operator("norm", "RMSNormalization")
def _rms_norm(n: Node, x: Tensor, weight: Tensor) -> Tensor:
    over = tuple(range(n.get("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(dim=over, keepdim=True) + n.get("epsilon", 1e-5)) * weight


@operator("norm", "LpNormalization")
def _lp_norm(n: Node, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, n.get("p", 2), dim=n.get("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


@operator("norm", "MeanVarianceNormalization")
def _mean_variance(n: Node, x: Tensor) -> Tensor:
    axes = tuple(n.get("axes", [0, 2, 3]))
    mean = x.mean(dim=axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=axes, keepdim=True).sqrt() + 1e-9)


@operator("norm", "LRN")
def _lrn(n: Node, x: Tensor) -> Tensor:
    size = n.get("size")
    square = F.pad(x.square().unsqueeze(1), [0, 0] * (x.dim() - 2) + [(size - 1) // 2, size // 2])
    sums = square.unfold(2, size, 1).sum(dim=-1).squeeze(1)
    return x / (n.get("bias", 1.0) + n.get("alpha", 1e-4) / size * sums) ** n.get("beta", 0.75)
