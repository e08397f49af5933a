"""Activations of every convolution and pooling of a ResNet-50 in PyTorch, against one plain forward pass.

    python -m benchmarks.torch_activations [PICTURES]

Times alternate in one process, and the ratio is of their medians. Peak memory is that of the process above what it held
before the call (Linux); the returned arrays are the activations themselves.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import convscope
from benchmarks.torch_networks import ResNet50
from convscope.images.decode import read_images

ROUNDS = 15
MIB = 2**20


def main(images: int = 8) -> None:
    """Print times, their ratio, and peak memory."""
    torch.manual_seed(0)
    module = ResNet50().eval()
    network = convscope.open_model(module)
    rng = np.random.default_rng(0)
    photos = read_images([rng.integers(0, 256, (224, 224, 3), np.uint8) for _ in range(images)])
    x = torch.from_numpy(network.prepare(photos)).permute(0, 3, 1, 2)
    layouts = {"contiguous": x.contiguous(), "channels_last": x}

    def forward(layout: str) -> torch.Tensor:
        with torch.no_grad():
            return module(layouts[layout])

    def looked() -> convscope.results.Activations:
        return convscope.activations(network, photos)

    runs: dict[str, Callable] = {
        "forward pass, contiguous": lambda: forward("contiguous"),
        "forward pass, channels_last": lambda: forward("channels_last"),
        "convscope.activations, whole call": looked,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            kept = run()
            seconds = time.perf_counter() - start
            del kept
            if round_ >= 2:  # the first two warm up
                times[name].append(seconds)
    print(f"ResNet-50, {images} images of 224x224, torch {torch.__version__}, {torch.get_num_threads()} threads")
    medians = {name: statistics.median(found) for name, found in times.items()}
    least = min(medians["forward pass, contiguous"], medians["forward pass, channels_last"])
    for name, found in times.items():
        print(f"{name}: {medians[name] * 1e3:.1f} ms (quartiles {_quartiles(found)}), {medians[name] / least:.2f} x")
    _memory(runs, looked)


def _quartiles(found: list[float]) -> str:
    low, _, high = statistics.quantiles(found, n=4)
    return f"{low * 1e3:.1f} to {high * 1e3:.1f}"


def _memory(runs: dict[str, Callable], looked: Callable) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("peak memory: not measured, this system does not tell")
        return
    peaks = {name: min(_peak(run) for _ in range(5)) for name, run in runs.items()}
    returned = sum(array.nbytes for array in looked().arrays.values())
    for name, peak in peaks.items():
        print(f"{name}: peak {peak / MIB:.0f} MiB")
    bound = min(peaks["forward pass, contiguous"], peaks["forward pass, channels_last"]) + returned
    print(f"returned arrays: {returned / MIB:.0f} MiB; forward pass and returned arrays: {bound / MIB:.0f} MiB")
    print(f"activations' peak / that: {peaks['convscope.activations, whole call'] / bound:.2f}")


def _peak(run: Callable) -> int:
    """Bytes above the memory of the process before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return peak


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
