"""The images that the demo's network learns from, and the regions that it never sees.

The images are those that scikit-image carries in its wheel (`skimage/data`), so nothing is downloaded.
Of each image a band (30 % of its length, on the side named in `SOURCES`) is held out, and a gap of 8 pixels
beside it is not used: no training patch shares a pixel with a held-out patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PATCH = 64  # side of a patch, pixels
LONGEST = 640  # larger images are shrunk to this longest side
HELD_OUT = 0.3  # share of an image that training never sees
GAP = 8  # pixels between the two regions
LEAST_SPREAD = 8.0  # grey levels; a patch with a smaller standard deviation shows nothing and is not asked

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Source:
    """An image: the class it stands for, its file, the side that is held out, and its licence."""

    name: str
    file: str
    side: str
    licence: str


SOURCES = (
    Source("astronaut", "astronaut.png", "bottom", "public domain (NASA)"),
    Source("brick", "brick.png", "right", "CC0 (CC0Textures)"),
    Source("cat", "chelsea.png", "left", "CC0 (Stefan van der Walt)"),
    Source("coffee", "coffee.png", "left", "CC0 (Rachel Michetti)"),
    Source("coins", "coins.png", "bottom", "no known copyright restrictions (Brooklyn Museum)"),
    Source("galaxies", "hubble_deep_field.jpg", "right", "public domain (NASA)"),
    Source("grass", "grass.png", "right", "CC0 (DeviantArt, linolafett)"),
    Source("gravel", "gravel.png", "right", "CC0 (CC0Textures)"),
    Source("handwriting", "text.png", "right", "public domain (Wikipedia)"),
    Source("photographer", "camera.png", "right", "CC0 (Lav Varshney)"),
    Source("retina", "retina.jpg", "right", "CC0 (Mikael Häggström)"),
    Source("rocket", "rocket.jpg", "left", "public domain (SpaceX)"),
    Source("tissue", "ihc.png", "right", "no known copyright restrictions (CMMI)"),
)
CLASSES = tuple(source.name for source in SOURCES)


def picture(source: Source) -> np.ndarray:
    """The whole image, `(h, w, 3)` uint8, its longest side at most `LONGEST`."""
    image = Image.open(Path(skimage.__file__).parent / "data" / source.file).convert("RGB")
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(image)


def split(pixels: np.ndarray, side: str, share: float = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Cut `pixels` into the region to train on and the held-out band on `side`, `GAP` pixels apart."""
    if side in ("right", "bottom"):
        turned = np.flip(pixels, axis=(0, 1))
        rest, band = split(turned, {"right": "left", "bottom": "top"}[side], share)
        return np.flip(rest, axis=(0, 1)), np.flip(band, axis=(0, 1))
    length = pixels.shape[1 if side == "left" else 0]
    cut = max(round(share * length), PATCH)
    if side == "left":
        return pixels[:, cut + GAP :], pixels[:, :cut]
    return pixels[cut + GAP :], pixels[:cut]


def regions(validate: bool = False) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training and held-out regions of every image, in the order of `CLASSES`.

    With `validate` the held-out bands are put away altogether and the bands next to them take their place, so
    that choices can be made without the real ones.
    """
    kept, held = [], []
    for source in SOURCES:
        rest, band = split(picture(source), source.side)
        if validate:
            rest, band = split(rest, source.side)
        kept.append(np.ascontiguousarray(rest))
        held.append(np.ascontiguousarray(band))
    return kept, held


def grey(pixels: np.ndarray) -> np.ndarray:
    """The same images without colour, still with three channels, float32."""
    return np.repeat((pixels.astype(np.float32) @ LUMA)[..., None], 3, axis=-1)


def cut(
    region: np.ndarray, rng: np.random.Generator, least: int = PATCH, most: int = PATCH, size: int = PATCH
) -> np.ndarray:
    """A random square of `least` to `most` pixels with some contrast, resized to `size`, uint8."""
    height, width = region.shape[:2]
    for _ in range(1000):
        side = int(np.exp(rng.uniform(np.log(least), np.log(min(most, height, width) + 1e-6))))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        patch = region[top : top + side, left : left + side]
        if (patch @ LUMA).std() >= LEAST_SPREAD:
            break
    else:
        raise ValueError("no patch with anything to see in it: the region is plain")
    if side == size:
        return patch
    return np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BICUBIC))


def patches(areas: list[np.ndarray], each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`each` patches of every region at their own scale: `(n, PATCH, PATCH, 3)` uint8, and their classes."""
    rng = np.random.default_rng(seed)
    found = [cut(area, rng) for area in areas for _ in range(each)]
    return np.stack(found), np.repeat(np.arange(len(areas)), each)
