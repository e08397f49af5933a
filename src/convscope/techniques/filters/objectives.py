"""What gradient ascent raises: from a layer's activation to one score for each picture."""

from __future__ import annotations

from typing import Any

Tensor = Any


def channel_means(activation: Tensor, ops: Any, border: int) -> Tensor:
    """The mean of each channel without `border` cells on each side.

    Args:
        activation: `(n, h, w, c)`, or `(n, c)` of a dense layer, which has no border.
        ops: the framework's operations.
        border: cells on each side.

    Returns:
        `(n, c)`.
    """
    if len(activation.shape) == 2:
        return activation
    height, width = activation.shape[1:3]
    return ops.mean(activation[:, border : height - border, border : width - border, :], axis=(1, 2))


def of_channels(means: Tensor, channels: Tensor, ops: Any) -> Tensor:
    """For each picture the value `(n,)` of its own channel, from `means` `(n, c)` and `channels` `(n,)` int32.

    As a product with one-hot rows rather than a gather, whose gradient is a slow scatter.
    """
    return ops.sum(means * ops.one_hot(channels, means.shape[-1], dtype=means.dtype), axis=-1)
