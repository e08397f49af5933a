"""Rewrites that make a pass cheaper and keep its numbers, except for rounding.

Frozen batch norms are taken into the convolution before them, or done in one step; a first convolution that strides
runs over blocks of pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import keras

from convscope.networks.foreign import KerasLayer, Tensor
from convscope.networks.graph import Call, Flow, Value
from convscope.networks.keras.graph import CHANNELS_FIRST, patch


@dataclass(frozen=True, eq=False)
class Fold:
    """A convolution without an activation, and the frozen batch norm that alone takes its output."""

    conv: Call
    norm: Call

    def scaled(self, scale: Tensor) -> Tensor:
        """The convolution's kernel, each of its filters times the norm's `scale` `(c,)`."""
        kernel = self.conv.operation.kernel
        if type(self.conv.operation) is keras.layers.DepthwiseConv2D:
            scale = keras.ops.reshape(scale, (1, 1, *kernel.shape[2:]))
        return keras.ops.cast(kernel.value, "float32") * scale


def folds_of(calls: Sequence[Call], flow: Flow, returned: Sequence[Value]) -> list[Fold]:
    """The norms of a pass that can be taken into the convolution before them, exactly but for rounding.

    Args:
        calls, flow: those of the pass; returned: the model's outputs, which must stay as they are.
    """
    times = Counter(id(call.operation) for call in calls)
    kept = {value.key for value in returned}
    found = []
    for conv in calls:
        norm = flow.only_taker(conv) if _is_plain(conv) else None
        if norm is None or conv.outputs[0][1].key in kept or not _is_over_filters(conv.operation, norm.operation):
            continue
        if times[id(conv.operation)] == times[id(norm.operation)] == 1:
            found.append(Fold(conv, norm))
    return found


def _is_over_filters(conv: KerasLayer, norm: KerasLayer) -> bool:
    """True for a plain batch norm over the filters of a convolution."""
    return is_frozen_norm(norm) and norm.axis % 4 == (1 if conv.data_format == CHANNELS_FIRST else 3)


def _is_plain(call: Call) -> bool:
    """True for a convolution that uses its kernel unchanged and ends in no activation."""
    operation = call.operation
    known = type(operation) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D) and len(call.outputs) == 1
    special = getattr(operation, "lora_enabled", False) or getattr(operation, "quantization_mode", None)
    return known and call.activation is None and not special


def is_frozen_norm(operation: KerasLayer) -> bool:
    """True for Keras' own batch norm in its plain form."""
    return type(operation) is keras.layers.BatchNormalization and not operation.renorm


FEW = 4  # channels of an image
LARGE = 5  # side of a kernel


def first_in_blocks(undo: ExitStack, operations: Sequence[KerasLayer]) -> None:
    """Until `undo` is run strided convolutions over images take blocks of pixels as channels.

    A 7x7 convolution of stride 2 over 3 channels is a 4x4 one over 12. TensorFlow takes the gradient of the first at
    the image at an eighth of its matrix rate; the second takes half the time, which is a tenth of a ResNet50V2's step
    up to its third stage.
    """
    for operation in operations:
        if strides_over_image(operation):
            patch(undo, operation, "call", _in_blocks(operation))


def strides_over_image(operation: KerasLayer) -> bool:
    """Whether an operation is a large convolution over few channels whose stride is more than 1."""
    if type(operation) is not keras.layers.Conv2D or not operation.built or operation.groups != 1:
        return False
    plain = operation.data_format != CHANNELS_FIRST and tuple(operation.dilation_rate) == (1, 1)
    known = plain and operation.padding in ("valid", "same") and not getattr(operation, "quantization_mode", None)
    stride = operation.strides
    large = min(operation.kernel_size) >= LARGE and stride[0] == stride[1] > 1
    return known and large and operation.kernel.shape[2] <= FEW


def _in_blocks(conv: KerasLayer) -> Callable:
    ops = keras.ops

    def call(x: Tensor, *_: object, **__: object) -> Tensor:
        stride, kernel = conv.strides[0], ops.cast(conv.kernel.value, conv.compute_dtype)
        x = _padded(ops.cast(x, conv.compute_dtype), conv.kernel_size, stride, conv.padding)
        sides = [(0, -side % stride) for side in conv.kernel_size]
        kernel = _blocks(ops.pad(kernel, (*sides, (0, 0), (0, 0)))[None], stride)[0]
        made = ops.conv(_blocks(x, stride), kernel, strides=1, padding="valid")
        if conv.use_bias:
            made = made + ops.cast(conv.bias.value, made.dtype)
        return made if conv.activation is None else conv.activation(made)

    return call


def _padded(x: Tensor, kernel: Sequence[int], stride: int, padding: str) -> Tensor:
    """An image `(n, h, w, c)` with just as much around it as the blocks of a convolution cover."""
    widths, kept = [], []
    for side, length in zip(kernel, x.shape[1:3], strict=True):
        outputs = -(-length // stride) if padding == "same" else (length - side) // stride + 1
        before = max(0, (outputs - 1) * stride + side - length) // 2 if padding == "same" else 0
        covered = (outputs - 1) * stride + side + -side % stride
        widths.append((before, max(0, covered - before - length)))
        kept.append(covered)
    return keras.ops.pad(x, ((0, 0), *widths, (0, 0)))[:, : kept[0], : kept[1]]


def _blocks(x: Tensor, side: int) -> Tensor:
    """`(n, h, w, ...)` to `(n, h / side, w / side, side * side * c, ...)`: the pixels of a block are channels."""
    ops, (count, height, width, channels, *rest) = keras.ops, x.shape
    x = ops.reshape(x, (-1 if count is None else count, height // side, side, width // side, side, channels, *rest))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5, *range(6, 6 + len(rest))))
    return ops.reshape(
        x, (-1 if count is None else count, height // side, width // side, side * side * channels, *rest)
    )


def norms_folded(
    undo: ExitStack, operations: Sequence[KerasLayer], folds: Sequence[Fold], scope: keras.StatelessScope
) -> None:
    """For a pass inside `scope`, until `undo` is run: norms of `folds` are part of their convolutions, others are one
    multiplication and addition.

    Keras' own norm goes to float32, and does it in more steps: on a processor that computes in bfloat16 that is a
    quarter of a ResNet50V2's time. The scope's values of the kernels are changed as each convolution is called, so
    that layers which do not run cost nothing.
    """
    folded = {id(fold.norm.operation) for fold in folds}
    for fold in folds:
        patch(undo, fold.conv.operation, "call", _with_norm(fold, scope))
        patch(undo, fold.norm.operation, "call", _handing_on)
    for operation in operations:
        if is_frozen_norm(operation) and id(operation) not in folded:
            patch(undo, operation, "call", _multiply_and_add(operation))


def _handing_on(x: Tensor, training: bool | None = None, mask: object = None) -> Tensor:
    return x


def _scale_and_shift(norm: KerasLayer) -> tuple[Tensor, Tensor]:
    """The factors and offsets of a frozen norm, `(c,)` each, float32."""
    ops = keras.ops
    scale = ops.rsqrt(ops.cast(norm.moving_variance, "float32") + norm.epsilon)
    if norm.scale:
        scale = scale * ops.cast(norm.gamma, "float32")
    shift = -ops.cast(norm.moving_mean, "float32") * scale
    if norm.center:
        shift = shift + ops.cast(norm.beta, "float32")
    return scale, shift


def _with_norm(fold: Fold, scope: keras.StatelessScope) -> Callable:
    conv, original = fold.conv.operation, fold.conv.operation.call

    def call(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        scale, shift = _scale_and_shift(fold.norm.operation)
        scope.add_update((conv.kernel, fold.scaled(scale)))
        if conv.use_bias:
            scope.add_update((conv.bias, keras.ops.cast(conv.bias.value, "float32") * scale + shift))
            return original(x, *args, **kwargs)
        made = original(x, *args, **kwargs)
        shape = (1, -1, 1, 1) if conv.data_format == CHANNELS_FIRST else (1, 1, 1, -1)
        return made + keras.ops.cast(keras.ops.reshape(shift, shape), made.dtype)

    return call


def _multiply_and_add(norm: KerasLayer) -> Callable:
    ops = keras.ops

    def call(x: Tensor, training: bool | None = None, mask: object = None) -> Tensor:
        shape = [1] * len(x.shape)
        shape[norm.axis] = x.shape[norm.axis]
        parts = (ops.cast(ops.reshape(part, shape), norm.compute_dtype) for part in _scale_and_shift(norm))
        scale, shift = parts
        return ops.cast(x, norm.compute_dtype) * scale + shift

    return call
