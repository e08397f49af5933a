"""ONNX operators that resize maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.networks.formats.onnx.operators.node import Node, ints, of_batch, operator


@operator("resize", "Upsample")
def _upsample(n: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    given = n.get("scales") if scales is None else scales.tolist()
    if given is None:  # operator set 1
        given = [1.0, 1.0, n.get("height_scale"), n.get("width_scale")]
    return _resized(x, [float(scale) for scale in given], None, _Sampling(n, "asymmetric", "floor"))


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
        chosen = _kept_ratio(n, x, of_batch(n, x, ints(sizes)) if axes[0] == 0 else ints(sizes), axes)
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
    return _resized(x, factors, wanted, _Sampling(n, place, nearest, box))


def _kept_ratio(n: Node, x: Tensor, sizes: list[int], axes: list[int]) -> list[tuple[int, float]]:
    """Side and factor of each axis, as `keep_aspect_ratio_policy` defines them."""
    factors = [size / x.shape[axis] for size, axis in zip(sizes, axes, strict=True)]
    policy = n.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return list(zip(sizes, factors, strict=True))
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [(math.floor(x.shape[axis] * factor + 0.5), factor) for axis in axes]


@dataclass(frozen=True)
class _Sampling:
    """How a map is resized.

    Attributes:
        node: whose attributes say the rest.
        place: the mode of coordinates, as ONNX names it.
        nearest: the rounding where `mode` is "nearest".
        box: start and end of the part of each axis that is kept; all of it where None.
    """

    node: Node
    place: str
    nearest: str
    box: list[tuple[float, float]] | None = None

    def part(self, axis: int) -> tuple[float, float]:
        """Start and end of what is kept of an axis."""
        return self.box[axis] if self.box else (0.0, 1.0)


def _resized(x: Tensor, factors: list[float], wanted: list[int] | None, how: _Sampling) -> Tensor:
    """Each axis by itself: a product with a matrix of the weights of each old place in a new one."""
    for axis, factor in enumerate(factors):
        side = x.shape[axis]
        new = wanted[axis] if wanted else math.floor(side * factor)
        if new == side and factor == 1.0 and how.part(axis) == (0.0, 1.0):
            continue
        at = _places(side, new, factor, how.place, how.part(axis))
        matrix = _weights_of(at, side, factor, how)
        outside = (at < 0) | (at > side - 1)
        y = torch.tensordot(x.to(matrix.dtype), matrix.to(x.device), dims=([axis], [1])).movedim(-1, axis)
        if how.place == "tf_crop_and_resize":
            shape = [1] * x.dim()
            shape[axis] = -1
            y = torch.where(outside.reshape(shape).to(x.device), how.node.get("extrapolation_value", 0.0), y)
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


def _weights_of(at: Tensor, side: int, factor: float, how: _Sampling) -> Tensor:
    """`(new, side)`: how much of each old place goes into each new one."""
    n, mode = how.node, how.node.get("mode", "nearest")
    if mode == "nearest":
        index = _ROUNDINGS[how.nearest](at).clamp(0, side - 1).long()
        return F.one_hot(index, side).float()
    # A wider kernel where images shrink, so that no pixel is passed over.
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
