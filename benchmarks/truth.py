"""Images with a known region of a class, and measures of how well a heatmap finds the region."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.ascents import ASSETS, NotMeasured
from convscope.arrays import resize_map

SIDE = 224  # pixels, of mosaics and of images with a small image planted on them
PLANTED = 88  # side of what is planted
SURE = 0.5  # least probability for an image to count as recognized


@dataclass(frozen=True, eq=False)
class Case:
    """An image `(h, w, 3)` uint8, a class in it, and where that is `(h, w)` bool."""

    pixels: np.ndarray
    target: int
    mask: np.ndarray


# -- images --------------------------------------------------------------------------------------------


def known_photos(network: Any) -> list[tuple[np.ndarray, int]]:
    """Images that a network classifies correctly with high probability, cut to squares, with their classes.

    Raises:
        NotMeasured: the images are not here.
    """
    index, folder = ASSETS / "imagenet_class_index.json", ASSETS / "photos" / "imagenet"
    if not index.exists() or not folder.exists():
        raise NotMeasured("the images are not here")
    numbers = {wnid: int(number) for number, (wnid, _) in json.loads(index.read_text()).items()}
    found = []
    for file in sorted(folder.glob("*")):
        pixels = _square(Image.open(file).convert("RGB"), SIDE)
        found.append((pixels, numbers[file.name.partition("_")[0]]))
    logits = [network.predict(network.prepare(images_of([pixels]))) for pixels, _ in found]
    chances = network.head.probabilities(np.concatenate(logits))
    return [one for one, row in zip(found, chances, strict=True) if row[one[1]] > SURE and row.argmax() == one[1]]


def photo_mosaics(network: Any, count: int, seed: int = 0) -> list[Case]:
    """2x2 mosaics of images of four classes, each explained for the class that scores the highest of the four."""
    random, photos = np.random.default_rng(seed), known_photos(network)
    cases = []
    for _ in range(count):
        four = [photos[number] for number in random.choice(len(photos), 4, replace=False)]
        tiles = [_resized(pixels, SIDE // 2) for pixels, _ in four]
        pixels = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
        logits = network.predict(network.prepare(images_of([pixels])))[0]
        best = int(np.argmax([logits[label] for _, label in four]))
        cases.append(Case(pixels, four[best][1], _quarter(best, SIDE)))
    return cases


def demo_mosaics(count: int) -> list[Case]:
    """Mosaics of held-out images of the shipped demo's four classes, one of the four explained in turn.

    Raises:
        NotMeasured: the package with the demo's images is not installed.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
    try:
        from mosaics import mosaics

        images, contents = mosaics(count)
    except Exception as error:  # its images come with a package, or from the network
        raise NotMeasured(f"the demo's training images: {error}") from error
    finally:
        sys.path.pop(0)
    return [
        Case(image.astype(np.uint8), int(four[place]), _quarter(place, image.shape[0]))
        for number, (image, four) in enumerate(zip(images, contents, strict=True))
        for place in [number % 4]
    ]


def planted(network: Any, count: int, seed: int = 1) -> list[Case]:
    """A small image of one class somewhere on an image of another, explained for the small one."""
    random, photos = np.random.default_rng(seed), known_photos(network)
    cases = []
    for _ in range(count):
        (ground, _), (thing, label) = (photos[number] for number in random.choice(len(photos), 2, replace=False))
        row, column = random.integers(0, SIDE - PLANTED, 2)
        pixels, mask = ground.copy(), np.zeros((SIDE, SIDE), bool)
        area = slice(row, row + PLANTED), slice(column, column + PLANTED)
        pixels[area], mask[area] = _resized(thing, PLANTED), True
        cases.append(Case(pixels, label, mask))
    return cases


def images_of(pixels: Sequence[np.ndarray]) -> list[Any]:
    from convscope.images.decode import read_images

    return read_images(list(pixels))


def _quarter(place: int, side: int) -> np.ndarray:
    mask, half = np.zeros((side, side), bool), side // 2
    row, column = divmod(place, 2)
    mask[row * half : (row + 1) * half, column * half : (column + 1) * half] = True
    return mask


def _square(image: Image.Image, side: int) -> np.ndarray:
    """The middle of an image, resized."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box))


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


# -- measures --------------------------------------------------------------------------------------------


def positive(raw: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The positive part of a map at the image's size."""
    return np.maximum(resize_map(np.asarray(raw, np.float32), *shape), 0).astype(np.float64)


def pointed(raw: np.ndarray, case: Case) -> float:
    """1 if the highest place is inside of the mask; a map that is the same everywhere points nowhere."""
    heat = resize_map(np.asarray(raw, np.float32), *case.mask.shape)
    return float(case.mask.ravel()[heat.argmax()]) if heat.max() > heat.min() else 0.0


def mass(raw: np.ndarray, case: Case) -> float:
    """Share of the positive part inside of the mask; of a map without one, the mask's own share."""
    heat = positive(raw, case.mask.shape)
    return float(heat[case.mask].sum() / heat.sum()) if heat.sum() > 0 else float(case.mask.mean())


def best_overlap(raw: np.ndarray, case: Case) -> float:
    """The highest ratio of intersection to union with the mask, over all thresholds on the map."""
    heat = resize_map(np.asarray(raw, np.float32), *case.mask.shape)
    order = np.argsort(-heat.ravel(), kind="stable")
    inside = np.cumsum(case.mask.ravel()[order])
    union = case.mask.sum() + np.arange(1, order.size + 1) - inside
    ends = np.append(np.diff(heat.ravel()[order]) != 0, True)  # equal values go together
    return float((inside / union)[ends].max())


# -- controls --------------------------------------------------------------------------------------------


def controls(cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
    """Maps that don't depend on a network: noise, the middle of the image, its edges."""
    random = np.random.default_rng(0)
    return {
        "random": [random.random((7, 7)) for _ in cases],
        "centre": [centre_map(case.mask.shape) for case in cases],
        "edges": [edges(case.pixels) for case in cases],
    }


def centre_map(shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    return np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / (2 * 0.5**2))


def edges(pixels: np.ndarray) -> np.ndarray:
    """Size of the differences of brightness."""
    rows, columns = np.gradient(pixels.astype(np.float64).mean(axis=-1))
    return np.hypot(rows, columns)
