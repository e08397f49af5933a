"""Memory of streams against that of lists, in one run: images of a data set, and filters of a layer.

    python -m benchmarks.streams --images 60 --megapixels 12 --filters 2048

Images are decoded all at once, or come from an image source. Filters are collected by `filters`, or taken one by one
from a `FilterStream`, of all channels and of 64 of them: a stream's peak must not depend on their number. Each way runs
in a process of its own, which reads its peak of resident memory (`ru_maxrss`) and that of its reader process; the ratio
is what counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from convscope.networks import Network

SHAPE = (224, 224, 3)
WIDEST = 2048  # channels


def write(folder: Path, count: int, megapixels: float) -> None:
    """JPEG files of different smooth noise, with the aspect ratio of photographs."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8))
        coarse.resize((height * 4 // 3, height), Image.Resampling.BICUBIC).save(
            folder / f"{number:04d}.jpg", quality=88
        )


def by_list(folder: Path) -> int:
    """Every image decoded at its own size, as `read_images` does."""
    from convscope.images.decode import read_images
    from convscope.images.image import fit_batch

    return len(fit_batch(read_images(folder), *SHAPE))


def by_source(folder: Path) -> int:
    """A stream in batches of 16."""
    from convscope.images.image import fit_batch
    from convscope.images.source import image_source, stream

    with stream(image_source(folder), 16, SHAPE) as batches:
        return sum(len(fit_batch(batch.images, *SHAPE)) for batch in batches)


def wide_network() -> Network:
    """A network whose only convolution has many channels and is cheap, so that the images are what takes memory."""
    import torch

    import convscope

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, WIDEST, 16, stride=16), torch.nn.ReLU())
    return convscope.open_model(module.eval(), size=SHAPE[:2], preprocess="-1..1", head="linear")


def collected_filters(count: int) -> int:
    """So many filters of the layer in one result, as `filters` returns them."""
    import convscope

    options = {"recipe": "classic", "steps": 2, "size": SHAPE[0], "precision": "float32"}
    return len(convscope.filters(wide_network(), "1", range(count), **options).rows)


def streamed_filters(count: int) -> int:
    """So many filters of the layer, one after another; each is dropped."""
    from convscope.techniques.filters import FilterOptions, FilterStream

    options = FilterOptions(recipe="classic", steps=2, size=SHAPE[0], precision="float32")
    return sum(1 for _ in FilterStream(wide_network(), "1", range(count), options))


IMAGE_WAYS = {"list": by_list, "source": by_source}
FILTER_WAYS = {"filters": collected_filters, "stream": streamed_filters}


def measured(way: str, given: str) -> dict[str, float]:
    """Seconds, items, and the peaks of this process and of its children in MB; `given` is a folder or a number."""
    begun = time.perf_counter()
    count = IMAGE_WAYS[way](Path(given)) if way in IMAGE_WAYS else FILTER_WAYS[way](int(given))
    seconds = time.perf_counter() - begun
    import atexit

    atexit._run_exitfuncs()  # ends the reader process, whose peak is known only then
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "items": count, "process": own, "reader": child}


def in_own_process(way: str, given: str) -> dict[str, float]:
    """What `measured` returns, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.streams", "--way", way, "--given", given]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def table(title: str, rows: Mapping[str, dict[str, float]], pair: tuple[str, str]) -> None:
    """Print the rows, and the ratios of two of them."""
    print(f"| {title} | process MB | reader MB | seconds |")
    print("| --- | ---: | ---: | ---: |")
    for name, one in rows.items():
        print(f"| {name} | {one['process']:.0f} | {one['reader']:.0f} | {one['seconds']:.1f} |")
    ratios = [rows[pair[0]][key] / max(rows[pair[1]][key], 1e-9) for key in ("process", "seconds")]
    print(f"| {pair[0]} / {pair[1]} | {ratios[0]:.1f} | | {ratios[1]:.1f} |", flush=True)


def main() -> None:
    """Measure each way, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--filters", type=int, default=WIDEST, help=f"at most {WIDEST}")
    parser.add_argument("--way", choices=[*IMAGE_WAYS, *FILTER_WAYS])
    parser.add_argument("--given", default="")
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measured(asked.way, asked.given)))
        return
    if asked.images:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), asked.images, asked.megapixels)
            rows = {way: in_own_process(way, folder) for way in IMAGE_WAYS}
        table(f"{asked.images} images of {asked.megapixels:g} megapixels", rows, ("list", "source"))
    few = in_own_process("stream", "64")
    rows = {way: in_own_process(way, str(asked.filters)) for way in FILTER_WAYS} | {"stream of 64": few}
    table(f"{asked.filters} filters of {SHAPE[0]}x{SHAPE[1]}", rows, ("filters", "stream"))


if __name__ == "__main__":
    main()
