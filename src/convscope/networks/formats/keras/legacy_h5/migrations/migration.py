"""One change of the file format of Keras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from convscope.networks.formats.keras.legacy_h5.nodes import Node
from convscope.networks.formats.keras.legacy_h5.stored import Stored


@dataclass(frozen=True)
class Migration:
    """One change of the format.

    Attributes:
        said: the line in `Opened.translated` when the migration changed something.
        change: given a layer of the config and the facts of the file; True if it changed the layer.
    """

    said: str
    change: Callable[[Node, Stored], bool]
