"""Frozen batch norms made cheaper for the length of one pass: taken into the convolution before them, or one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import keras

from convscope.networks.backends import Tensor
from convscope.networks.graph import Call, Flow, Value
from convscope.networks.keras_graph import CHANNELS_FIRST, patched


@dataclass(frozen=True, eq=False)
class Fold:
    """A convolution without an activation, and the frozen batch norm that alone takes what it made."""

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
        calls, flow: of the pass; returned: what the model gives back, which must stay as it is.
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


def _is_over_filters(conv: Any, norm: Any) -> bool:
    """True for a plain batch norm over the filters of a convolution."""
    return is_frozen_norm(norm) and norm.axis % 4 == (1 if conv.data_format == CHANNELS_FIRST else 3)


def _is_plain(call: Call) -> bool:
    """True for a convolution whose kernel is what it computes with, and that ends in no activation."""
    operation = call.operation
    known = type(operation) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D) and len(call.outputs) == 1
    special = getattr(operation, "lora_enabled", False) or getattr(operation, "quantization_mode", None)
    return known and call.activation is None and not special


def is_frozen_norm(operation: Any) -> bool:
    """True for Keras' own batch norm in its plain form."""
    return type(operation) is keras.layers.BatchNormalization and not operation.renorm


@contextmanager
def norms_folded(operations: Sequence[Any], folds: Sequence[Fold], scope: keras.StatelessScope) -> Iterator[None]:
    """For the length of a pass inside `scope`: norms of `folds` are part of their convolutions, others are one
    multiplication and addition.

    Keras' own norm goes to float32, and does it in more steps: on a processor that computes in bfloat16 that is a
    quarter of a ResNet50V2's time. What the scope holds for the kernels is changed as each convolution is called, so
    that layers which do not run cost nothing.
    """
    folded = {id(fold.norm.operation) for fold in folds}
    with ExitStack() as stack:
        for fold in folds:
            stack.enter_context(patched(fold.conv.operation, "call", _with_norm(fold, scope)))
            stack.enter_context(patched(fold.norm.operation, "call", _handing_on))
        for operation in operations:
            if is_frozen_norm(operation) and id(operation) not in folded:
                stack.enter_context(patched(operation, "call", _multiply_and_add(operation)))
        yield


def _handing_on(x: Tensor, training: bool | None = None, mask: Any = None) -> Tensor:
    return x


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a frozen norm multiplies by and adds, `(c,)` each, float32."""
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

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale, shift = _scale_and_shift(fold.norm.operation)
        scope.add_update((conv.kernel, fold.scaled(scale)))
        if conv.use_bias:
            scope.add_update((conv.bias, keras.ops.cast(conv.bias.value, "float32") * scale + shift))
            return original(x, *args, **kwargs)
        made = original(x, *args, **kwargs)
        shape = (1, -1, 1, 1) if conv.data_format == CHANNELS_FIRST else (1, 1, 1, -1)
        return made + keras.ops.cast(keras.ops.reshape(shift, shape), made.dtype)

    return call


def _multiply_and_add(norm: Any) -> Callable:
    ops = keras.ops

    def call(x: Tensor, training: bool | None = None, mask: Any = None) -> Tensor:
        shape = [1] * len(x.shape)
        shape[norm.axis] = x.shape[norm.axis]
        parts = (ops.cast(ops.reshape(part, shape), norm.compute_dtype) for part in _scale_and_shift(norm))
        scale, shift = parts
        return ops.cast(x, norm.compute_dtype) * scale + shift

    return call
