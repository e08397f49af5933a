"""Two versions of convscope side by side, in one run: are the results identical, and how do the times compare?

    python -m benchmarks.versions OTHER [--rounds 3]

OTHER is another checkout of convscope. Each round runs both versions one after the other, in a process each; every
workload is called twice there, and the second call counts (the first one compiles). A ratio is the least time of this
version divided by the least time of the other one; below 1 this version is faster. Results are compared by hashes of
their arrays.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SLOW = {"score-cam", "rise", "smoothgrad", "integrated-gradients"}  # these get a budget
RECIPES = ("classic", "fast", "fourier", "maco", "accentuation", "deepdream")


def networks() -> Iterator[tuple[str, Any, str]]:
    """A name, an opened network and the path of a layer: the shipped demo, and a PyTorch module."""
    import torch

    import convscope
    from convscope.demo import CLASSES, MODEL

    yield "demo (Keras)", convscope.open_model(str(MODEL), classes=CLASSES), "block3_conv"
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10),
    ]  # fmt: skip
    module = torch.nn.Sequential(*layers).eval()
    yield "module (PyTorch)", convscope.open_model(module, size=96, preprocess="0..1"), "3"


def workloads(network: Any, layer: str) -> Iterator[tuple[str, Callable[[], list[np.ndarray]]]]:
    """A name and a call that returns the arrays of a result, for each technique, heatmap method and recipe."""
    import convscope
    from convscope.demo import PHOTOS
    from convscope.techniques.heatmaps import METHODS

    images = [str(path) for path in PHOTOS[:2]]
    named = "image" if "image" in inspect.signature(convscope.filters).parameters else "photo"

    def heatmaps(**options: Any) -> Callable[[], list[np.ndarray]]:
        return lambda: [np.asarray(one) for one in convscope.heatmap(network, images, **options).maps]

    def ascent(recipe: str) -> Callable[[], list[np.ndarray]]:
        given = {named: images[0]} if recipe in ("accentuation", "deepdream") else {}
        options = {"recipe": recipe, "steps": 8, "size": 96, "batch": 8, **given}
        return lambda: [convscope.filters(network, layer, range(8), **options).values]

    yield "activations", lambda: list(convscope.activations(network, images).arrays.values())
    for method in METHODS:
        yield f"heatmap {method}", heatmaps(method=method, **({"budget": 32} if method in SLOW else {}))
    yield "heatmap with a check", heatmaps(check=True)
    yield "heatmap of three classes", heatmaps(target="top3")
    yield "concepts", lambda: [(found := convscope.concepts(network, images, count=3)).values, found.vectors]
    for recipe in RECIPES:
        yield f"filters {recipe}", ascent(recipe)


def measure() -> dict[str, dict[str, Any]]:
    """The hashes and the seconds of every workload, with the version of convscope that is imported here."""
    found = {}
    for name, network, layer in networks():
        for what, call in workloads(network, layer):
            try:
                call()
                begun = time.perf_counter()
                arrays = call()
                seconds = time.perf_counter() - begun
            except Exception as reason:  # a method that does not fit the network is refused by both versions
                found[f"{name}: {what}"] = {"hashes": [type(reason).__name__], "seconds": 0.0}
                continue
            hashes = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]
            found[f"{name}: {what}"] = {"hashes": hashes, "seconds": seconds}
    return found


def measured_in(checkout: Path) -> dict[str, dict[str, Any]]:
    """What `measure` returns in a new process with the package of a checkout."""
    path = os.pathsep.join([str(checkout / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.versions", "--measure"],
        env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure()))
        return
    if asked.other is None or not (asked.other / "src" / "convscope").is_dir():
        parser.error("give the folder of another checkout of convscope")
    rounds = [(measured_in(ROOT), measured_in(asked.other.resolve())) for _ in range(asked.rounds)]
    print("\n".join(table(rounds)))


def table(rounds: list[tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]]) -> Iterator[str]:
    """A line for each workload, and the sums."""
    shared = [name for name in rounds[0][0] if name in rounds[0][1]]
    yield f"{'workload':45} {'results':>12} {'this s':>8} {'other s':>8} {'ratio':>6}"
    sums, same = [0.0, 0.0], 0
    for name in shared:
        times = [min(one[side][name]["seconds"] for one in rounds) for side in (0, 1)]
        sums = [total + seconds for total, seconds in zip(sums, times, strict=True)]
        ours, theirs = (rounds[0][side][name]["hashes"] for side in (0, 1))
        others = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
        same += not others
        ratio = f"{times[0] / times[1]:6.2f}" if times[1] else "     –"
        yield f"{name:45} {f'{others} differ' if others else 'identical':>12} {times[0]:8.3f} {times[1]:8.3f} {ratio}"
    ratios = sorted(
        min(one[0][name]["seconds"] for one in rounds) / min(one[1][name]["seconds"] for one in rounds)
        for name in shared
        if rounds[0][1][name]["seconds"]
    )
    yield f"{same} of {len(shared)} identical"
    yield f"all together {sums[0]:.2f} s against {sums[1]:.2f} s, ratio {sums[0] / sums[1]:.3f}"
    yield f"median ratio {ratios[len(ratios) // 2]:.3f}, of {len(ratios)} workloads and {len(rounds)} rounds"


if __name__ == "__main__":
    main()
