"""Memory of a data set: all images decoded at once against an image source, in one run.

    python -m benchmarks.streams --images 60 --megapixels 12

Each way runs in a process of its own, which reads its peak of resident memory (`ru_maxrss`) and that of its reader
process; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (224, 224, 3)


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


WAYS = {"list": by_list, "source": by_source}


def measured(way: str, folder: Path) -> dict[str, float]:
    """Seconds, images, and the peaks of this process and of its children in MB."""
    begun = time.perf_counter()
    count = WAYS[way](folder)
    seconds = time.perf_counter() - begun
    import atexit

    atexit._run_exitfuncs()  # ends the reader process, whose peak is known only then
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "images": count, "process": own, "reader": child}


def main() -> None:
    """Write the files, measure both ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measured(asked.way, asked.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), asked.images, asked.megapixels)
        found = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.streams", "--way", way, "--folder", folder]
            found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"| {asked.images} images of {asked.megapixels:g} megapixels | process MB | reader MB | seconds |")
    print("| --- | ---: | ---: | ---: |")
    for way, one in found.items():
        print(f"| {way} | {one['process']:.0f} | {one['reader']:.0f} | {one['seconds']:.1f} |")
    ratios = [found["list"][name] / found["source"][name] for name in ("process", "reader", "seconds")]
    print(f"| list / source | {ratios[0]:.1f} | {ratios[1]:.1f} | {ratios[2]:.1f} |")


if __name__ == "__main__":
    main()
