"""Which of Keras' backends is fastest on this machine for convscope's own work; one process each.

    python -m benchmarks.backends

MobileNet-sized and ResNet-sized networks with random weights; the first call (with its compile) and a later one
are printed apart, and the later ones also as ratios to the fastest. Compare machines by the ratios.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

BACKENDS = ("tensorflow", "torch", "jax")


def measure() -> dict[str, tuple[float, float]]:
    """Seconds of the first and of a second call of each technique, on this process' backend."""
    import numpy as np

    import convscope

    photos = [np.random.default_rng(index).integers(0, 256, (224, 224, 3), np.uint8) for index in range(8)]
    network = convscope.open_model("keras:ResNet50V2?weights=none&include_top=false", preprocess="-1..1")
    small = convscope.open_model("keras:MobileNet?weights=none", preprocess="-1..1")
    work: dict[str, Callable] = {
        "filters, ResNet50V2, 16 filters, 10 steps": lambda: convscope.filters(
            network, "conv3_block4_out", range(16), recipe="classic", steps=10
        ),
        "heatmap, MobileNet, 8 images": lambda: convscope.heatmap(small, photos),
        "activations, MobileNet, 8 images": lambda: convscope.activations(small, photos),
    }
    return {name: (_seconds(call), _seconds(call)) for name, call in work.items()}


def _seconds(call: Callable) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure each installed backend in a process of its own and print a table."""
    if "--child" in sys.argv:
        print(json.dumps(measure()))
        return
    found: dict[str, dict[str, list[float]]] = {}
    for backend in BACKENDS:
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "benchmarks.backends", "--child"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[backend] = json.loads(done.stdout.splitlines()[-1])
        else:
            print(f"{backend}: not measured ({(done.stderr.splitlines() or ['no reason given'])[-1]})")
    for name in next(iter(found.values()), {}):
        best = min(times[name][1] for times in found.values())
        print(name)
        for backend, times in found.items():
            first, again = times[name]
            print(f"  {backend:<11} first {first:6.1f} s   again {again:6.1f} s   {again / best:5.2f} x the fastest")


if __name__ == "__main__":
    main()
