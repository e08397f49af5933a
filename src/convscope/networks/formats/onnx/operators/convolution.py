"""ONNX operators that convolve and pool."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.networks.formats.onnx.operators.node import Node, enter, operator


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
                count -= 1  # a window has to begin in the image or in the padding before it
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


enter(
    "global_pool",
    GlobalAveragePool=lambda x: x.mean(dim=_all_places(x), keepdim=True),
    GlobalMaxPool=lambda x: x.amax(dim=_all_places(x), keepdim=True),
)


@operator("global_pool", "GlobalLpPool")
def _global_lp_pool(n: Node, x: Tensor) -> Tensor:
    power = n.get("p", 2)
    return (x.abs() ** power).sum(dim=_all_places(x), keepdim=True) ** (1 / power)
