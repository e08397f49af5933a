"""ONNX operators in PyTorch: one entry each, for every version of the operator set in which it exists.

An operator is a function of the node (its attributes, the version of the operator set) and its inputs, None where an
optional one is left out. What ONNX means by each is in its operator documents; `tests/test_onnx.py` runs the project's
own cases of every operator here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx.defs
import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.errors import ModelError


@dataclass
class Batch:
    """What the nodes of a graph share.

    Attributes:
        declared: the batch that the graph declares; actual: the one that it is run with.
        held: bytes of the file's own arrays.
        met: what has been found to be within the limits: operators, with the shapes and numbers that go in.
    """

    declared: int | None = None
    actual: int = 1
    held: int = 0
    met: set[Any] = field(default_factory=set)


@dataclass(frozen=True)
class Node:
    """What an operator has to know beside its inputs."""

    name: str
    operator: str
    opset: int
    attributes: dict[str, Any]
    outputs: int = 1
    batch: Batch = field(default_factory=Batch)

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(key, default)


Operator = Callable[..., Any]
OPERATORS: dict[str, tuple[str, Operator]] = {}


def operator(kind: str, *names: str) -> Callable[[Operator], Operator]:
    """Enter a function as the operators `names`, layers of `kind`."""

    def entered(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, (kind, function)))
        return function

    return entered


def _enter(kind: str, **functions: Callable[..., Any]) -> None:
    for name, function in functions.items():
        OPERATORS[name] = (kind, lambda n, *inputs, _of=function: _of(*inputs))


# Operators whose inputs after the first are numbers for Python: shapes, axes, amounts.
READS_NUMBERS = frozenset(
    {
        *("Reshape", "Squeeze", "Unsqueeze", "Expand", "Tile", "Slice", "Split", "Pad", "Resize", "Upsample"),
        *("ConstantOfShape", "Range", "TopK", "CumSum", "Trilu", "Dropout"),
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
        *("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
    }
)


# -- what a node may look like ---------------------------------------------------------------------------

_KINDS: dict[str, tuple[type, ...]] = {"FLOAT": (int, float), "INT": (int,), "STRING": (str,), "TENSOR": (np.ndarray,)}


@dataclass(frozen=True)
class Signature:
    """How often an operator takes and makes tensors, and its attributes, over all operator sets that have it."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    attributes: dict[str, set[str]]

    def joined(self, other: Signature) -> Signature:
        """What one or the other allows."""
        keys = {**self.attributes, **other.attributes}
        kinds = {key: self.attributes.get(key, set()) | other.attributes.get(key, set()) for key in keys}
        return Signature(_widest(self.inputs, other.inputs), _widest(self.outputs, other.outputs), kinds)


def _widest(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
    return min(one[0], two[0]), max(one[1], two[1])


@cache
def signatures() -> dict[str, Signature]:
    """What the ONNX project says of each of its operators."""
    found: dict[str, Signature] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.name in OPERATORS:
            attributes = {key: {str(item.type).rpartition(".")[2]} for key, item in schema.attributes.items()}
            ends = (schema.min_input, schema.max_input), (schema.min_output, schema.max_output)
            own = Signature(*ends, attributes)
            found[schema.name] = found[schema.name].joined(own) if schema.name in found else own
    return found


# The least that whole numbers may be: below it they mean nothing, and not all of torch's code looks.
_LEAST = {
    **{"kernel_shape": 1, "strides": 1, "dilations": 1, "group": 1, "num_groups": 1, "blocksize": 1, "size": 1},
    **{
        "output_padding": 0,
        "output_shape": 0,
        "block_size": 0,
        "batch_dims": 0,
        "pads": -(2**31),
        "paddings": -(2**31),
    },
}
_MOST = 2**31 - 1


def check_node(
    operator: str,
    inputs: Sequence[Any],
    outputs: Sequence[str],
    attributes: dict[str, Any],
    refused: Callable[[str], ModelError],
) -> None:
    """Make sure that a node looks as ONNX says; attributes that ONNX does not name are dropped.

    An input is None where it is left out.

    Raises:
        ModelError: as `refused` makes it, of a text that says what is wrong.
    """
    known = signatures().get(operator)
    if known is None:
        raise refused("the onnx that is installed does not know its operator; run: pip install --upgrade onnx")
    for what, given, (least, most) in (("inputs", inputs, known.inputs), ("outputs", outputs, known.outputs)):
        found = len(given)
        if not least <= found <= most:
            raise refused(f"it has {found} {what}; expected {least if least == most else f'{least} to {most}'}")
    for place, given in enumerate(inputs[: known.inputs[0]]):
        if given is None:
            raise refused(f"its input number {place + 1} is left out")
    for name in list(attributes):
        if name not in known.attributes:
            del attributes[name]
        elif not _fits(attributes[name], known.attributes[name]):
            raise refused(f"its attribute {name!r} is of another type than ONNX says")
        elif name in _LEAST and not all(_LEAST[name] <= value <= _MOST for value in _listed(attributes[name])):
            raise refused(f"its attribute {name!r} is {attributes[name]!r:.80}")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _fits(value: Any, kinds: set[str]) -> bool:
    if not isinstance(value, list):
        return any(isinstance(value, _KINDS.get(kind, ())) for kind in kinds)
    items = [_KINDS.get(kind.removesuffix("S"), ()) for kind in kinds if kind.endswith("S")]
    return any(all(isinstance(item, kind) for item in value) for kind in items)


def _ints(x: Any) -> list[int]:
    return [int(value) for value in (x.reshape(-1).tolist() if isinstance(x, Tensor) else x)]


def _of_batch(n: Node, x: Tensor, sides: list[int]) -> list[int]:
    """The sides that a file gives for `x`: one that declares a batch may have its number in there."""
    batch = n.batch
    if sides and batch.declared not in (None, batch.actual) and x.shape[:1] == (batch.actual,):
        return [batch.actual if sides[0] == batch.declared else sides[0], *sides[1:]]
    return sides


# -- convolution and pooling -----------------------------------------------------------------------------


def _padded(n: Node, x: Tensor, kernel: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """`x` padded as `pads` or `auto_pad` say, where PyTorch's own symmetric padding can't; and that padding."""
    rank = len(kernel)
    pads = _pads(n, x.shape[2:], kernel)
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    flat = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    return F.pad(x, flat, value=value), [0] * rank


def _pads(n: Node, sides: Sequence[int], kernel: Sequence[int]) -> list[int]:
    rank, mode = len(kernel), n.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return list(n.get("pads", [0] * 2 * rank))
    if mode == "VALID":
        return [0] * 2 * rank
    strides, dilations = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    totals = [
        max(0, (math.ceil(side / stride) - 1) * stride + (size - 1) * dilation + 1 - side)
        for side, size, stride, dilation in zip(sides, kernel, strides, dilations, strict=True)
    ]
    less = [total // 2 for total in totals]
    more = [total - half for total, half in zip(totals, less, strict=True)]
    return [*less, *more] if mode == "SAME_UPPER" else [*more, *less]


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("conv", "Conv")
def _conv(n: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    x, padding = _padded(n, x, kernel)
    strides, dilations = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    return _CONVOLUTIONS[rank](x, weight, bias, strides, padding, dilations, n.get("group", 1))


@operator("conv", "ConvTranspose")
def _conv_transpose(n: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    strides, dilations = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    extra, shape = n.get("output_padding", [0] * rank), n.get("output_shape")
    full = [
        stride * (side - 1) + (size - 1) * dilation + 1 + more
        for side, size, stride, dilation, more in zip(x.shape[2:], kernel, strides, dilations, extra, strict=True)
    ]
    mode = n.get("auto_pad", "NOTSET")
    if shape is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        shape = [side * stride for side, stride in zip(x.shape[2:], strides, strict=True)]
    if shape is None:
        pads = n.get("pads", [0] * 2 * rank) if mode != "VALID" else [0] * 2 * rank
    else:
        totals = [size - wanted for size, wanted in zip(full, shape[-rank:], strict=True)]
        halves = [total // 2 for total in totals]
        rests = [total - half for total, half in zip(totals, halves, strict=True)]
        pads = [*halves, *rests] if mode == "SAME_UPPER" else [*rests, *halves]
    y = _TRANSPOSED[rank](x, weight, None, strides, 0, 0, n.get("group", 1), dilations)
    grown = [size - have for size, have in zip(full, y.shape[2:], strict=True)]
    y = F.pad(y, [side for more in reversed(grown) for side in (0, more)])
    # Cut, or widened where the padding is negative; only then the bias, which belongs to every place.
    flat = [-side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    y = F.pad(y, flat)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * rank)


def _windows(n: Node, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and the padding that `ceil_mode` adds at the end of each axis."""
    rank = len(kernel)
    strides, dilations = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    pads = _pads(n, x.shape[2:], kernel)
    more = [0] * rank
    if n.get("ceil_mode", 0):
        for axis in range(rank):
            side = x.shape[2 + axis] + pads[axis] + pads[axis + rank]
            span = (kernel[axis] - 1) * dilations[axis] + 1
            count = math.ceil((side - span) / strides[axis]) + 1
            if (count - 1) * strides[axis] >= x.shape[2 + axis] + pads[axis]:
                count -= 1  # a window has to begin in the picture or in the padding before it
            more[axis] = max(0, (count - 1) * strides[axis] + span - side)
    return strides, dilations, more


def _pad_all(n: Node, x: Tensor, kernel: Sequence[int], more: Sequence[int], value: float) -> Tensor:
    rank, pads = len(kernel), _pads(n, x.shape[2:], kernel)
    flat = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank] + more[axis])]
    return F.pad(x, flat, value=value) if any(flat) else x


_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@operator("pool", "MaxPool")
def _max_pool(n: Node, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    kernel = n.get("kernel_shape")
    strides, dilations, more = _windows(n, x, kernel)
    pads, rank = _pads(n, x.shape[2:], kernel), len(kernel)
    small = all(2 * pad <= size for pad, size in zip(pads[:rank], kernel, strict=True))
    if not any(more) and pads[:rank] == pads[rank:] and small and n.outputs == 1 and x.is_floating_point():
        return _MAX_POOLS[rank](x, kernel, strides, pads[:rank], dilations)
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    y = _pad_all(n, x if x.is_floating_point() else x.double(), kernel, more, lowest)
    if n.outputs == 1:
        return _MAX_POOLS[rank](y, kernel, strides, 0, dilations).to(x.dtype)
    values, places = _MAX_POOLS[rank](y, kernel, strides, 0, dilations, False, True)
    return values.to(x.dtype), _unpadded_places(n, x, y, places, pads)


def _unpadded_places(n: Node, x: Tensor, padded: Tensor, places: Tensor, pads: Sequence[int]) -> Tensor:
    """Indices in the flattened input, from those in one padded channel."""
    sides, index, axes = padded.shape[2:], places, []
    for side in reversed(sides):
        axes.append(index % side)
        index = index // side
    flat = torch.zeros_like(places)
    order = range(len(sides)) if not n.get("storage_order", 0) else reversed(range(len(sides)))
    for axis in order:
        flat = flat * x.shape[2 + axis] + (list(reversed(axes))[axis] - pads[axis])
    channel = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    channel = channel.reshape(x.shape[0], x.shape[1], *[1] * len(sides))
    return flat + channel * math.prod(x.shape[2:])


@operator("pool", "AveragePool")
def _average_pool(n: Node, x: Tensor) -> Tensor:
    kernel = n.get("kernel_shape")
    strides, dilations, more = _windows(n, x, kernel)
    rank = len(kernel)
    sums = _window_sums(_pad_all(n, x, kernel, more, 0.0), kernel, strides, dilations)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if n.get("count_include_pad", 0):
        counted = _pad_all(n, counted, kernel, [0] * rank, 1.0)
        counted = F.pad(counted, [side for extra in reversed(more) for side in (0, extra)])
    else:
        counted = _pad_all(n, counted, kernel, more, 0.0)
    return sums / _window_sums(counted, kernel, strides, dilations)


def _window_sums(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    if all(dilation == 1 for dilation in dilations):
        return _MEAN_POOLS[len(kernel)](x, kernel, strides) * math.prod(kernel)
    ones = torch.ones((x.shape[1], 1, *kernel), dtype=x.dtype, device=x.device)
    return _CONVOLUTIONS[len(kernel)](x, ones, None, strides, 0, dilations, x.shape[1])


@operator("pool", "LpPool")
def _lp_pool(n: Node, x: Tensor) -> Tensor:
    kernel, power = n.get("kernel_shape"), n.get("p", 2)
    strides, dilations, more = _windows(n, x, kernel)
    sums = _window_sums(_pad_all(n, x.abs() ** power, kernel, more, 0.0), kernel, strides, dilations)
    return sums ** (1 / power)


def _all_places(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


_enter(
    "global_pool",
    GlobalAveragePool=lambda x: x.mean(dim=_all_places(x), keepdim=True),
    GlobalMaxPool=lambda x: x.amax(dim=_all_places(x), keepdim=True),
)


@operator("global_pool", "GlobalLpPool")
def _global_lp_pool(n: Node, x: Tensor) -> Tensor:
    power = n.get("p", 2)
    return (x.abs() ** power).sum(dim=_all_places(x), keepdim=True) ** (1 / power)


# -- dense -----------------------------------------------------------------------------------------------


@operator("dense", "Gemm")
def _gemm(n: Node, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    a = a.t() if n.get("transA", 0) else a
    weight = weight.t() if n.get("transB", 0) else weight
    y = n.get("alpha", 1.0) * (a @ weight)
    return y if bias is None else y + n.get("beta", 1.0) * bias


_enter("dense", MatMul=torch.matmul)


@operator("dense", "Einsum")
def _einsum(n: Node, *inputs: Tensor) -> Tensor:
    return torch.einsum(n.get("equation").replace(" ", ""), *inputs)


# -- norms -----------------------------------------------------------------------------------------------


@operator("norm", "BatchNormalization")
def _batch_norm(n: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if n.get("training_mode", 0):
        raise ModelError(f"the node {n.name} normalises by the batch (training_mode); export the model in eval mode.")
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
def _layer_norm(n: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
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


# -- activations -----------------------------------------------------------------------------------------

_enter(
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


# -- arithmetic ------------------------------------------------------------------------------------------


def _aligned(n: Node, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Before operator set 7, `b` was laid along `a` from `axis` on."""
    if n.opset < 7 and n.get("broadcast", 0) and n.get("axis") is not None:
        axis = n.get("axis") % a.dim()
        b = b.reshape(*b.shape, *[1] * (a.dim() - axis - b.dim()))
    return a, b


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


_BINARY: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "Add": ("merge", torch.add),
    "Sub": ("merge", torch.sub),
    "Mul": ("merge", torch.mul),
    "Div": ("merge", _divided),
    "And": ("other", torch.logical_and),
    "Or": ("other", torch.logical_or),
    "Xor": ("other", torch.logical_xor),
    "Equal": ("other", torch.eq),
    "Greater": ("other", torch.gt),
    "GreaterOrEqual": ("other", torch.ge),
    "Less": ("other", torch.lt),
    "LessOrEqual": ("other", torch.le),
}
for _name, (_kind, _function) in _BINARY.items():
    OPERATORS[_name] = (_kind, lambda n, a, b, _of=_function: _of(*_aligned(n, a, b)))


@operator("other", "Pow")
def _pow(n: Node, x: Tensor, power: Tensor) -> Tensor:
    x, power = _aligned(n, x, power)
    return torch.pow(x, power).to(x.dtype)


@operator("other", "Mod")
def _mod(n: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if n.get("fmod", 0) else torch.remainder(a, b)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def all_of(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return all_of


_enter(
    "merge",
    Sum=_folded(torch.add),
    Max=_folded(torch.maximum),
    Min=_folded(torch.minimum),
    Mean=lambda *inputs: _folded(torch.add)(*inputs) / len(inputs),
)
_enter(
    "other",
    Abs=torch.abs,
    Acos=torch.acos,
    Acosh=torch.acosh,
    Asin=torch.asin,
    Asinh=torch.asinh,
    Atan=torch.atan,
    Atanh=torch.atanh,
    Ceil=torch.ceil,
    Cos=torch.cos,
    Cosh=torch.cosh,
    Det=torch.linalg.det,
    Erf=torch.erf,
    Exp=torch.exp,
    Floor=torch.floor,
    IsNaN=torch.isnan,
    Log=torch.log,
    Neg=torch.neg,
    Not=torch.logical_not,
    Reciprocal=lambda x: 1 / x,
    Round=torch.round,
    Sign=torch.sign,
    Sin=torch.sin,
    Sinh=torch.sinh,
    Sqrt=torch.sqrt,
    Tan=torch.tan,
    Where=torch.where,
)
_enter("identity", Identity=lambda x: x)


@operator("other", "IsInf")
def _is_inf(n: Node, x: Tensor) -> Tensor:
    up, down = n.get("detect_positive", 1), n.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(up)) | (torch.isneginf(x) & bool(down))


@operator("other", "CumSum")
def _cumsum(n: Node, x: Tensor, axis: Tensor) -> Tensor:
    dim = int(axis)
    x = x.flip(dim) if n.get("reverse", 0) else x
    y = torch.cumsum(x, dim).to(x.dtype)
    y = y - x if n.get("exclusive", 0) else y
    return y.flip(dim) if n.get("reverse", 0) else y


@operator("other", "Trilu")
def _trilu(n: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if n.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))


# -- reductions ------------------------------------------------------------------------------------------


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x.double(), axes, keep).to(x.dtype)


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).double().sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduced(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else _ints(axes)
    if not given and n.get("noop_with_empty_axes", 0):
        given = ()
        if n.operator in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
            return x
    dims = tuple(given) if given else tuple(range(x.dim()))
    if given == ():
        dims = ()
        x = x.unsqueeze(-1)
        return _REDUCTIONS[n.operator](x, (-1,), False).to(x.dtype)
    if x.dtype == torch.bool:
        return _REDUCTIONS[n.operator](x.to(torch.uint8), dims, bool(n.get("keepdims", 1))).bool()
    return _REDUCTIONS[n.operator](x, dims, bool(n.get("keepdims", 1))).to(x.dtype) if dims else x


for _name in _REDUCTIONS:
    OPERATORS[_name] = ("global_pool" if _name == "ReduceMean" else "other", _reduced)


@operator("other", "ReduceProd")
def _reduce_prod(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else _ints(axes)
    if not given and n.get("noop_with_empty_axes", 0):
        return x
    keep = bool(n.get("keepdims", 1))
    for axis in sorted((axis % x.dim() for axis in given or range(x.dim())), reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


def _arg(n: Node, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    axis = n.get("axis", 0)
    keep = bool(n.get("keepdims", 1))
    if not n.get("select_last_index", 0):
        return function(x, dim=axis, keepdim=keep)
    return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)


@operator("other", "ArgMax")
def _argmax(n: Node, x: Tensor) -> Tensor:
    return _arg(n, x, torch.argmax)


@operator("other", "ArgMin")
def _argmin(n: Node, x: Tensor) -> Tensor:
    return _arg(n, x, torch.argmin)


@operator("other", "TopK")
def _top_k(n: Node, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = int(n.get("k") if k is None else k)
    axis, largest = n.get("axis", -1), bool(n.get("largest", 1))
    order = torch.argsort(x, dim=axis, descending=largest, stable=True)  # of equal values the first comes first
    places = order.narrow(axis, 0, count)
    return torch.gather(x, axis, places), places


# -- shapes ----------------------------------------------------------------------------------------------


@operator("reshape", "Reshape")
def _reshape(n: Node, x: Tensor, shape: Tensor | None = None) -> Tensor:
    wanted = list(n.get("shape", [])) if shape is None else _ints(shape)
    if not n.get("allowzero", 0):
        wanted = [x.shape[axis] if side == 0 else side for axis, side in enumerate(wanted)]
    return x.reshape(_of_batch(n, x, wanted))


@operator("reshape", "Flatten")
def _flatten(n: Node, x: Tensor) -> Tensor:
    axis = n.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1) if x.numel() else x.reshape(math.prod(x.shape[:axis]), 0)


@operator("reshape", "Transpose")
def _transpose(n: Node, x: Tensor) -> Tensor:
    return x.permute(n.get("perm", list(reversed(range(x.dim())))))


@operator("reshape", "Squeeze")
def _squeeze(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else _ints(axes)
    if given is None:
        # A batch of one is a batch all the same.
        first = n.batch.declared is not None and x.dim() > 1 and x.shape[0] == n.batch.actual
        given = [axis for axis in range(int(first), x.dim()) if x.shape[axis] == 1]
    return x.squeeze(tuple(given))


@operator("reshape", "Unsqueeze")
def _unsqueeze(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else _ints(axes)
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


@operator("merge", "Concat")
def _concat(n: Node, *inputs: Tensor) -> Tensor:
    axis, batch = n.get("axis", 1) % inputs[0].dim(), n.batch
    if axis and batch.declared == 1 and {x.shape[0] for x in inputs} == {1, batch.actual}:
        # What was made once for the one declared picture, as a transformer's class token, goes to each.
        inputs = tuple(x.expand(batch.actual, *x.shape[1:]) for x in inputs)
    return torch.cat(inputs, dim=axis)


@operator("reshape", "Split")
def _split(n: Node, x: Tensor, sizes: Tensor | None = None) -> Any:
    axis = n.get("axis", 0)
    given = n.get("split") if sizes is None else _ints(sizes)
    if given is None:
        each = math.ceil(x.shape[axis] / n.outputs)
        given = [min(each, x.shape[axis] - each * index) for index in range(n.outputs)]
    parts = torch.split(x, list(given), dim=axis)
    return parts if n.outputs > 1 else parts[0]


@operator("reshape", "Slice")
def _slice(n: Node, x: Tensor, *inputs: Tensor | None) -> Tensor:
    given = [None if item is None else _ints(item) for item in inputs] + [None] * (4 - len(inputs))
    starts, ends = given[0] or n.get("starts"), given[1] or n.get("ends")
    axes = given[2] or n.get("axes") or list(range(len(starts)))
    steps = given[3] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[axis])[_bounded(start, x.shape[axis]) : _bounded(end, x.shape[axis], step) : step]
        if step == 1:
            x = x.narrow(axis, places.start, len(places)) if len(places) else x.narrow(axis, 0, 0)
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _bounded(index: int, side: int, step: int = 1) -> int | None:
    """An end before the first value, for negative steps, is none at all to Python."""
    return None if step < 0 and index < -side else index


@operator("other", "Gather")
def _gather(n: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = n.get("axis", 0) % x.dim()
    flat = indices.reshape(-1).long() % x.shape[axis]
    picked = x.index_select(axis, flat.to(x.device))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("other", "GatherElements")
def _gather_elements(n: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = n.get("axis", 0)
    return torch.gather(x, axis, indices.long() % x.shape[axis])


@operator("other", "GatherND")
def _gather_nd(n: Node, x: Tensor, indices: Tensor) -> Tensor:
    batch = n.get("batch_dims", 0)
    if batch == 0:
        return x[tuple(indices.long().unbind(-1))]
    flat = x.reshape(-1, *x.shape[batch:])
    rows = indices.reshape(-1, *indices.shape[batch:])
    picked = [one[tuple(index.long().unbind(-1))] for one, index in zip(flat, rows, strict=True)]
    return torch.stack(picked).reshape(*indices.shape[:batch], *picked[0].shape)


@operator("other", "ScatterElements")
def _scatter_elements(n: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = n.get("axis", 0), n.get("reduction", "none")
    places = indices.long() % x.shape[axis]
    if how == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCERS[how])


_REDUCERS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("other", "ScatterND")
def _scatter_nd(n: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    deep, how = indices.shape[-1], n.get("reduction", "none")
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis in range(deep):
        flat = flat * x.shape[axis] + indices[..., axis].long() % x.shape[axis]
    rows = x.reshape(math.prod(x.shape[:deep]), -1)
    places = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    given = updates.reshape(-1, rows.shape[1])
    made = rows.scatter(0, places, given) if how == "none" else rows.scatter_reduce(0, places, given, _REDUCERS[how])
    return made.reshape(x.shape)


@operator("other", "Compress")
def _compress(n: Node, x: Tensor, condition: Tensor) -> Tensor:
    axis = n.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, condition.nonzero().reshape(-1))


_enter("other", NonZero=lambda x: torch.nonzero(x).t())


@operator("resize", "GridSample")
def _grid_sample(n: Node, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(n.get("mode", "linear"), n.get("mode", "linear"))
    return F.grid_sample(x, grid, mode, n.get("padding_mode", "zeros"), bool(n.get("align_corners", 0)))


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("padding", "Pad")
def _pad(n: Node, x: Tensor, pads: Tensor | None = None, value: Any = None, axes: Tensor | None = None) -> Tensor:
    given = list(n.get("pads", n.get("paddings", []))) if pads is None else _ints(pads)
    over = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in _ints(axes)]
    constant = float(n.get("value", 0.0) if value is None else value)
    mode = _PAD_MODES[n.get("mode", "constant")]
    sides = {axis: (given[i], given[i + len(over)]) for i, axis in enumerate(over)}
    if mode == "constant":
        flat = [side for axis in reversed(range(x.dim())) for side in sides.get(axis, (0, 0))]
        return F.pad(x, flat, value=constant)
    for axis, (before, after) in sides.items():
        x = _extended(x, axis, before, after, mode)
    return x


def _extended(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Padding of one axis by values of the tensor itself, also by more than its side."""
    side = x.shape[axis]
    places = torch.arange(-before, side + after, device=x.device)
    if mode == "replicate":
        places = places.clamp(0, side - 1)
    elif mode == "circular":
        places = places % side
    else:
        period = max(1, 2 * (side - 1))
        places = places % period
        places = torch.where(places >= side, period - places, places)
    return x.index_select(axis, places)


@operator("reshape", "Tile")
def _tile(n: Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(_ints(repeats))


@operator("reshape", "Expand")
def _expand(n: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(_ints(shape))))


@operator("reshape", "DepthToSpace")
def _depth_to_space(n: Node, x: Tensor) -> Tensor:
    size = n.get("blocksize")
    if n.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    count, channels, height, width = x.shape
    y = x.reshape(count, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(count, channels // size**2, height * size, width * size)


@operator("reshape", "SpaceToDepth")
def _space_to_depth(n: Node, x: Tensor) -> Tensor:
    size = n.get("blocksize")
    count, channels, height, width = x.shape
    y = x.reshape(count, channels, height // size, size, width // size, size)
    y = y.permute(0, 1, 3, 5, 2, 4) if n.get("mode", "DCR") == "CRD" else y.permute(0, 3, 5, 1, 2, 4)
    return y.reshape(count, channels * size**2, height // size, width // size)


# By the numbers that ONNX gives to types.
TYPES = {
    **{1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64},
    **{9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16},
    **{4: torch.uint16, 12: torch.uint32, 13: torch.uint64},
}
# Up to operator set 5 a cast names its type.
_TYPE_NAMES = {"FLOAT": 1, "UINT8": 2, "INT8": 3, "INT16": 5, "INT32": 6, "INT64": 7, "BOOL": 9, "DOUBLE": 11}


@operator("identity", "Cast")
def _cast(n: Node, x: Tensor) -> Tensor:
    kind = _TYPE_NAMES.get(n.get("to"), n.get("to"))
    if kind not in TYPES:
        raise ModelError(f"the node {n.name} casts to a type that PyTorch does not have (ONNX's number {kind}).")
    return x.to(TYPES[kind])


_enter("identity", CastLike=lambda x, like: x.to(like.dtype))


# -- quantised values, kept in float ---------------------------------------------------------------------


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


@operator("other", "Shape")
def _shape(n: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[slice(n.get("start", 0), n.get("end"))], dtype=torch.int64)


_enter("other", Size=lambda x: torch.tensor(x.numel(), dtype=torch.int64))


@operator("other", "ConstantOfShape")
def _constant_of_shape(n: Node, shape: Tensor) -> Tensor:
    value = n.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand(_ints(shape)).clone()


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
def _dropout(n: Node, x: Tensor, ratio: Any = None, training: Any = None) -> Any:
    if training is not None and bool(training) and float(0.5 if ratio is None else ratio) > 0:
        raise ModelError(f"the node {n.name} drops values (training_mode); export the model in eval mode.")
    if n.outputs == 1:
        return x
    return x, torch.ones(x.shape, dtype=torch.bool if n.opset >= 10 else x.dtype, device=x.device)


# -- resizing --------------------------------------------------------------------------------------------


@operator("resize", "Upsample")
def _upsample(n: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    given = n.get("scales") if scales is None else scales.tolist()
    if given is None:  # operator set 1
        given = [1.0, 1.0, n.get("height_scale"), n.get("width_scale")]
    return _resized(x, [float(scale) for scale in given], None, n.get("mode", "nearest"), "asymmetric", "floor", n)


@operator("resize", "Resize")
def _resize(n: Node, x: Tensor, *inputs: Tensor | None) -> Tensor:
    if n.opset < 11:
        scales, sizes, given = inputs[0], None, inputs
        place, nearest = "asymmetric", "floor"
    else:
        given = (*inputs, None, None, None)
        scales, sizes = given[1], given[2]
        place, nearest = (
            n.get("coordinate_transformation_mode", "half_pixel"),
            n.get("nearest_mode", "round_prefer_floor"),
        )
    region = given[0].tolist() if n.opset >= 11 and given[0] is not None and given[0].numel() else None
    axes = [axis % x.dim() for axis in n.get("axes", range(x.dim()))]
    wanted = None
    factors = [1.0] * x.dim()
    if sizes is not None and sizes.numel():
        wanted = list(x.shape)
        chosen = _kept_ratio(n, x, _of_batch(n, x, _ints(sizes)) if axes[0] == 0 else _ints(sizes), axes)
        for axis, (side, factor) in zip(axes, chosen, strict=True):
            wanted[axis], factors[axis] = side, factor
    elif scales is not None:
        for axis, factor in zip(axes, scales.tolist(), strict=True):
            factors[axis] = float(factor)
    box = None
    if region is not None and place == "tf_crop_and_resize":
        box = [(0.0, 1.0)] * x.dim()
        for index, axis in enumerate(axes):
            box[axis] = (region[index], region[index + len(axes)])
    return _resized(x, factors, wanted, n.get("mode", "nearest"), place, nearest, n, box)


def _kept_ratio(n: Node, x: Tensor, sizes: list[int], axes: list[int]) -> list[tuple[int, float]]:
    """Side and factor of each axis, as `keep_aspect_ratio_policy` wants them."""
    factors = [size / x.shape[axis] for size, axis in zip(sizes, axes, strict=True)]
    policy = n.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return list(zip(sizes, factors, strict=True))
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [(math.floor(x.shape[axis] * factor + 0.5), factor) for axis in axes]


def _resized(
    x: Tensor,
    factors: list[float],
    wanted: list[int] | None,
    mode: str,
    place: str,
    nearest: str,
    n: Node,
    box: list[tuple[float, float]] | None = None,
) -> Tensor:
    """Each axis by itself: a product with a matrix that says how much of each old place goes into a new one."""
    for axis, factor in enumerate(factors):
        side = x.shape[axis]
        new = wanted[axis] if wanted else math.floor(side * factor)
        if new == side and factor == 1.0 and (box is None or box[axis] == (0.0, 1.0)):
            continue
        at = _places(side, new, factor, place, box[axis] if box else (0.0, 1.0))
        matrix = _weights_of(at, side, factor, mode, nearest, n)
        outside = (at < 0) | (at > side - 1)
        y = torch.tensordot(x.to(matrix.dtype), matrix.to(x.device), dims=([axis], [1])).movedim(-1, axis)
        if place == "tf_crop_and_resize":
            shape = [1] * x.dim()
            shape[axis] = -1
            y = torch.where(outside.reshape(shape).to(x.device), n.get("extrapolation_value", 0.0), y)
        x = y.to(x.dtype)
    return x


def _places(side: int, new: int, factor: float, mode: str, box: tuple[float, float]) -> Tensor:
    """Where in the old axis the new places lie."""
    at = torch.arange(new, dtype=torch.float64)
    if mode == "align_corners":
        full = side * factor  # not rounded
        return at * (side - 1) / (full - 1) if new > 1 else torch.zeros(1, dtype=torch.float64)
    if mode == "asymmetric":
        return at / factor
    if mode == "pytorch_half_pixel" and new <= 1:
        return torch.zeros(new, dtype=torch.float64)
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5) / factor
    if mode == "tf_crop_and_resize":
        start, end = box
        if new > 1:
            return start * (side - 1) + at * (end - start) * (side - 1) / (new - 1)
        return torch.full((1,), 0.5 * (start + end) * (side - 1), dtype=torch.float64)
    if mode == "half_pixel_symmetric":
        full = side * factor
        offset = side / 2 * (1 - new / full)
        return offset + (at + 0.5) / factor - 0.5
    return (at + 0.5) / factor - 0.5


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _weights_of(at: Tensor, side: int, factor: float, mode: str, nearest: str, n: Node) -> Tensor:
    """`(new, side)`: how much of each old place goes into each new one."""
    if mode == "nearest":
        index = _ROUNDINGS[nearest](at).clamp(0, side - 1).long()
        return F.one_hot(index, side).float()
    # A wider kernel where pictures shrink, so that no pixel is passed over.
    stretch = 1 / factor if n.get("antialias", 0) and factor < 1 else 1.0
    reach = (2 if mode == "cubic" else 1) * stretch
    first = torch.floor(at - reach).long()
    taps = torch.arange(2 * math.ceil(reach) + 2)
    index = first[:, None] + taps
    weight = _kernel((index - at[:, None]) / stretch, mode, n.get("cubic_coeff_a", -0.75))
    if n.get("exclude_outside", 0):
        weight = weight * ((index >= 0) & (index < side))
    weight = weight / weight.sum(dim=1, keepdim=True)
    matrix = torch.zeros(len(at), side, dtype=torch.float64)
    return matrix.scatter_add_(1, index.clamp(0, side - 1), weight).float()


def _kernel(distance: Tensor, mode: str, a: float) -> Tensor:
    x = distance.abs()
    if mode in ("linear", "bilinear"):
        return (1 - x).clamp(min=0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
