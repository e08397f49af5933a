"""Loops: the same calls over and over, in which the memory has to stay flat."""

from __future__ import annotations

import contextlib
import ctypes
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
_EVERY = 25  # calls between two measurements of the memory


def attempt(place: Place, net: str) -> Answer:
    """1,000 calls of one technique on one runtime, or as many as fit into some minutes: the number says which."""
    calls = _opening(place) if net == "open" else _techniques(place, net)
    name = list(calls)[place.number % len(calls)]
    made, growth = repeated(calls[name], _SECONDS)
    counts = Counter(accepted=made)
    if growth is None or growth <= LOOP_GROWTH:
        return Answer(counts, (), made)
    said = f"{name} grows by {growth / MIB:.1f} MiB in 1,000 calls ({made} were made)"
    return Answer(counts + Counter(memory=1), (("memory", said),), made)


def repeated(call: Callable[[], Any], seconds: float) -> tuple[int, float | None]:
    """Call it 1,000 times, or for some seconds: how often, and how many bytes the process grows by in 1,000 calls.

    The growth is that of a line through what was held after the start; None where too few calls were made to tell.
    """
    sizes, end, number = [], time.monotonic() + seconds, 0
    while number < _CALLS and time.monotonic() < end:
        call()
        number += 1
        if number % _EVERY == 0:
            sizes.append(_held())
    steady = np.array(sizes[STEADY_AFTER // _EVERY :], float)
    if len(steady) < 4:
        return number, None
    return number, 1000 / _EVERY * float(np.polyfit(np.arange(len(steady)), steady, 1)[0])


def _held() -> int:
    """Bytes that the process and those below it hold.

    What the C library keeps of freed memory is given back first. Of 400 openings of a TorchScript file it kept 1 to 10
    MiB, more or less after each hundred; without it they held 0.04 MiB more at the end than at the start.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # it is in glibc only
        ctypes.CDLL(None).malloc_trim(0)
    return sum(memory.resident(pid)[0] for pid in memory.family(os.getpid()))


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
