"""Loops: the same calls over and over, in which the memory has to stay flat."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from trials import memory
from trials.outcomes import LOOP_GROWTH, MIB, STEADY_AFTER, Answer, Place

_CALLS, _SECONDS = 1000, 200


def attempt(place: Place, net: str) -> Answer:
    """1,000 calls of one technique on one runtime, or as many as fit into some minutes: the number says which."""
    calls = _opening(place) if net == "open" else _techniques(place, net)
    name = list(calls)[place.number % len(calls)]
    sizes = _sizes(calls[name], _SECONDS)
    counts, growth = Counter(accepted=len(sizes)), _growth(sizes)
    if growth is None or growth <= LOOP_GROWTH:
        return Answer(counts, (), len(sizes))
    said = f"{name} grows by {growth / MIB:.1f} MiB in 1,000 calls ({len(sizes)} were made)"
    return Answer(counts + Counter(memory=1), (("memory", said),), len(sizes))


def _sizes(call: Callable[[], Any], seconds: float) -> list[int]:
    """The resident memory after each call."""
    sizes, end = [], time.monotonic() + seconds
    for number in range(_CALLS):
        call()
        if number % 50 == 0:
            gc.collect()
        sizes.append(sum(memory.resident(pid)[0] for pid in memory.family(os.getpid())))
        if time.monotonic() > end:
            break
    return sizes


def _growth(sizes: list[int]) -> float | None:
    """Bytes for 1,000 calls, by a line through what came after the start; None where too few calls were made."""
    steady = np.array(sizes[STEADY_AFTER:], float)
    if len(steady) < 100:
        return None
    return 1000 * float(np.polyfit(np.arange(len(steady)), steady, 1)[0])


def _opening(place: Place) -> dict[str, Callable[[], Any]]:
    from convscope.networks import open_model

    files = {"opening TorchScript": "script-plain-traced.pt", "opening an exported program": "export-plain.pt2"}
    return {name: lambda file=file: open_model(str(place.bases / file)) for name, file in files.items()}  # type: ignore[misc]


def _techniques(place: Place, net: str) -> dict[str, Callable[[], Any]]:
    import convscope

    network, image = _network(place, net), np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    maps = [layer.path for layer in network.layers if len(layer.shape) == 3]
    return {
        "activations": lambda: convscope.activations(network, image),
        "heatmap": lambda: convscope.heatmap(network, image),
        "filters": lambda: convscope.filters(network, maps[0], [0], steps=1, size=24),
    }


def _network(place: Place, net: str) -> Any:
    from convscope.networks import open_model

    if net == "torch":
        return open_model(f"{place.bases / 'net.py'}:plain")
    if net == "onnx":
        return open_model(str(place.bases / "onnx-plain.onnx"))
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    return open_model(
        keras.Sequential(
            [
                keras.Input((24, 24, 3)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(5),
            ]
        )
    )
