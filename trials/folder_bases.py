"""A saved result of each kind: `python -m trials.folder_bases FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import convscope

NET = '''"""A network whose results are saved."""

import torch
from torch import nn


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
'''


def main() -> None:
    """Write them all."""
    folder = Path(sys.argv[1])
    (folder / "saved_net.py").write_text(NET)
    network = convscope.open_model(f"{folder / 'saved_net.py'}:plain")
    y, x = np.mgrid[:24, :32]
    image = np.stack([7 * x, 9 * y, 128 + 0 * x], -1).astype(np.uint8)
    results = {
        "activations": convscope.activations(network, [image, image[::-1]]),
        "filters": convscope.filters(network, "0", [0, 1], steps=2, size=24),
        "heatmap": convscope.heatmap(network, [image, image[::-1]]),
        "concepts": convscope.concepts(network, [image, image[::-1]], layer="2", count=2),
    }
    for name, result in results.items():
        convscope.save(result, folder / f"result-{name}", **({"raw": True} if name == "activations" else {}))


if __name__ == "__main__":
    main()
