"""What one run of a network is asked for, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convscope.networks.ops import Tensor

Rule = Callable[[Tensor], Tensor]
Recording = Sequence[str] | Mapping[str, Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Record:
    """What one pass through the network left behind, as tensors of its framework.

    Attributes:
        logits: `(n, classes)`, see `Head.logits`; None if the pass stopped before the output.
        activations: for each recorded path `(n, h, w, c)` or `(n, c)`, float32, or what the function given for it made.
    """

    logits: Tensor
    activations: Mapping[str, Any]


def as_recording(record: Recording) -> Mapping[str, Callable[[Tensor], Any]]:
    """What to keep of the activation at each path: itself, unless a function says otherwise."""
    return record if isinstance(record, Mapping) else dict.fromkeys(record, lambda activation: activation)
