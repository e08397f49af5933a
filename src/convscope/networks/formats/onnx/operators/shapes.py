"""ONNX operators that move values: shapes, slices, padding, types."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.errors import ModelError
from convscope.networks.foreign import Structure
from convscope.networks.formats.onnx.operators.node import Node, enter, ints, of_batch, operator


@operator("reshape", "Reshape")
def _reshape(n: Node, x: Tensor, shape: Tensor | None = None) -> Tensor:
    wanted = list(n.get("shape", [])) if shape is None else ints(shape)
    if not n.get("allowzero", 0):
        wanted = [x.shape[axis] if side == 0 else side for axis, side in enumerate(wanted)]
    return x.reshape(of_batch(n, x, wanted))


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
    given = n.get("axes") if axes is None else ints(axes)
    if given is None:
        # A batch of one is a batch all the same.
        first = n.batch.declared is not None and x.dim() > 1 and x.shape[0] == n.batch.actual
        given = [axis for axis in range(int(first), x.dim()) if x.shape[axis] == 1]
    return x.squeeze(tuple(given))


@operator("reshape", "Unsqueeze")
def _unsqueeze(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else ints(axes)
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


@operator("merge", "Concat")
def _concat(n: Node, *inputs: Tensor) -> Tensor:
    axis, batch = n.get("axis", 1) % inputs[0].dim(), n.batch
    if axis and batch.declared == 1 and {x.shape[0] for x in inputs} == {1, batch.actual}:
        # What was made once for the one declared image, as a transformer's class token, goes to each.
        inputs = tuple(x.expand(batch.actual, *x.shape[1:]) for x in inputs)
    return torch.cat(inputs, dim=axis)


@operator("reshape", "Split")
def _split(n: Node, x: Tensor, sizes: Tensor | None = None) -> Structure:
    axis = n.get("axis", 0)
    given = n.get("split") if sizes is None else ints(sizes)
    if given is None:
        each = math.ceil(x.shape[axis] / n.outputs)
        given = [min(each, x.shape[axis] - each * index) for index in range(n.outputs)]
    parts = torch.split(x, list(given), dim=axis)
    return parts if n.outputs > 1 else parts[0]


@operator("reshape", "Slice")
def _slice(n: Node, x: Tensor, *inputs: Tensor | None) -> Tensor:
    given = [None if item is None else ints(item) for item in inputs] + [None] * (4 - len(inputs))
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


enter("other", NonZero=lambda x: torch.nonzero(x).t())


@operator("resize", "GridSample")
def _grid_sample(n: Node, x: Tensor, grid: Tensor) -> Tensor:
    name: str = n.get("mode", "linear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(name, name)
    return F.grid_sample(x, grid, mode, n.get("padding_mode", "zeros"), bool(n.get("align_corners", 0)))


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("padding", "Pad")
def _pad(n: Node, x: Tensor, pads: Tensor | None = None, value: Structure = None, axes: Tensor | None = None) -> Tensor:
    given = list(n.get("pads", n.get("paddings", []))) if pads is None else ints(pads)
    over = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in ints(axes)]
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
    return x.repeat(ints(repeats))


@operator("reshape", "Expand")
def _expand(n: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape))))


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
        raise ModelError(
            f"the node {n.name} casts to a type that PyTorch does not have (ONNX's number {kind}).",
            code="values-unsupported",
            name=n.name,
            found=kind,
        )
    return x.to(TYPES[kind])


enter("identity", CastLike=lambda x, like: x.to(like.dtype))
