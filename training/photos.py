"""Write the images that `convscope demo` shows, and print the predictions of the shipped network.

    python training/photos.py

All of them are CC0 (`src/convscope/demo/photos/README.md` names sources and authors). The mosaic is put
together from held-out bands alone; of the other images the network has seen all but their held-out band.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from pathlib import Path

import keras
import numpy as np
from mosaics import mosaic
from pictures import CLASSES, SOURCES, cut, picture, regions
from PIL import Image

PHOTOS = Path(__file__).resolve().parent.parent / "src" / "convscope" / "demo" / "photos"
SEED = 4100
WHOLE = ("cat", "coffee", "photographer", "retina")
TILES = ("cat", "gravel", "coffee", "brick")  # row by row
SIDE = 128  # of a tile
LONGEST = 512  # longest side of an image
QUALITY = 88


def whole(name: str) -> Image.Image:
    """The whole image of a class."""
    image = Image.fromarray(picture(SOURCES[CLASSES.index(name)]))
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def tiles() -> Image.Image:
    """A 2x2 mosaic of held-out tiles of `TILES`."""
    _, held = regions()
    rng = np.random.default_rng(SEED)
    return Image.fromarray(mosaic([cut(held[CLASSES.index(name)], rng, SIDE, SIDE, SIDE) for name in TILES]))


def main() -> None:
    """Write the images and print the network's three most probable classes for each."""
    PHOTOS.mkdir(parents=True, exist_ok=True)
    for name, image in {**{name: whole(name) for name in WHOLE}, "mosaic": tiles()}.items():
        image.save(PHOTOS / f"{name}.jpg", quality=QUALITY, optimize=True)
    network = keras.saving.load_model(PHOTOS.parent / "model.keras", compile=False)
    for file in sorted(PHOTOS.glob("*.jpg")):
        image = Image.open(file)
        batch = np.asarray(image, np.float32)[None]
        (found,) = keras.ops.convert_to_numpy(network(batch, training=False))
        best = ", ".join(f"{CLASSES[i]} {found[i]:.1%}" for i in found.argsort()[::-1][:4])
        print(f"{file.name:18} {image.width}x{image.height} {file.stat().st_size / 1000:4.0f} kB  {best}")


if __name__ == "__main__":
    main()
