"""Valid files of PyTorch's, made in a process of their own: `python -m trials.torch_bases FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from trials import attacks

NET = '''"""A small network that the weights of the trial belong to."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.head = nn.Conv2d(3, 4, 3, stride=2), Block(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.first(x))).mean([2, 3]))


def make():
    torch.manual_seed(0)
    return Net().eval()


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
'''


def main() -> None:
    """Write them all."""
    folder = Path(sys.argv[1])
    (folder / "net.py").write_text(NET)
    y, x = np.mgrid[:48, :64]
    Image.fromarray(np.stack([4 * x, 5 * y, 128 + 0 * x], -1).astype(np.uint8)).save(folder / "photo.png")
    names: dict = {}
    exec(compile(NET, "net.py", "exec"), names)
    sys.modules["net"] = type(sys)("net")
    for name, build in {"net": names["make"], "plain": names["plain"]}.items():
        _state_dicts(folder, name, build())
        _programs(folder, name, build, names)
    attacks.write(folder)


def _state_dicts(folder: Path, name: str, module: nn.Module) -> None:
    state = module.state_dict()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    beside = {
        "epoch": 3,
        "best": np.float64(0.5),
        "args": argparse.Namespace(lr=0.1),
        "optimizer": optimizer.state_dict(),
    }
    for kind, value in {
        "plain": state,
        "wrapped": {"state_dict": state, **beside},
        "module": {f"module.{key}": tensor for key, tensor in state.items()},
    }.items():
        torch.save(value, folder / f"state-{name}-{kind}.pth")
        torch.save(value, folder / f"legacy-{name}-{kind}.pth", _use_new_zipfile_serialization=False)
    try:
        from safetensors.torch import save_file

        save_file(
            {key: tensor.contiguous() for key, tensor in state.items()},
            folder / f"{name}.safetensors",
            {"format": "pt"},
        )
    except ImportError:
        pass


def _programs(folder: Path, name: str, build, names) -> None:  # type: ignore[no-untyped-def]
    example = torch.zeros(1, 3, 32, 32)
    traced = torch.jit.trace(build(), example)
    torch.jit.save(traced, folder / f"script-{name}-traced.pt")
    if name == "plain":
        torch.jit.save(torch.jit.script(build()), folder / f"script-{name}-scripted.pt")
    torch.export.save(torch.export.export(build(), (example,)), folder / f"export-{name}.pt2")
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.export.save(
        torch.export.export(build(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(batch,)),
        folder / f"export-{name}-batch.pt2",
    )


if __name__ == "__main__":
    main()
