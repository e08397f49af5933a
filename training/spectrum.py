"""Measure the mean magnitude spectrum of natural images, which `Phases` (recipe `maco`) gives to its images.

    python training/spectrum.py

The natural images are those of `PHOTOS` below, from scikit-image's wheel; `pictures.py` names sources and licences. Of
each, patches of 128 pixels are cut half a patch apart; their values are taken to the canvas' space (logits, with
decorrelated colours), windowed, and transformed. The magnitudes are averaged over patches, over the four quadrants
(natural images have no preferred direction), and over images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pictures import CLASSES, SOURCES, picture

from convscope.techniques.filters.parameterizations import colour_logits

PATCH = 128
COLOURED = ("astronaut", "cat", "coffee", "rocket")
GREY = ("brick", "grass", "gravel", "photographer")
PHOTOS = COLOURED + GREY
TARGET = Path(__file__).resolve().parent.parent / "src" / "convscope" / "techniques" / "filters" / "spectrum.npy"


def patches(pixels: np.ndarray) -> np.ndarray:
    """Patches `(n, PATCH, PATCH, 3)` of an image, half a patch apart."""
    height, width = pixels.shape[:2]
    places = [(y, x) for y in range(0, height - PATCH + 1, PATCH // 2) for x in range(0, width - PATCH + 1, PATCH // 2)]
    return np.stack([pixels[y : y + PATCH, x : x + PATCH] for y, x in places])


def magnitudes(values: np.ndarray) -> np.ndarray:
    """Mean magnitude `(PATCH // 2 + 1, PATCH // 2 + 1, c)` of patches `(n, PATCH, PATCH, c)`, per root pixel."""
    window = np.outer(np.hanning(PATCH), np.hanning(PATCH))[..., None]
    values = (values - values.mean(axis=(1, 2), keepdims=True)) * window
    found = np.abs(np.fft.fft2(values, axes=(1, 2))).mean(axis=0) / np.sqrt((window**2).sum())
    half = PATCH // 2 + 1
    mirrored = np.roll(found[::-1], 1, axis=0)
    found = (found + mirrored) / 2
    return ((found + np.roll(found[:, ::-1], 1, axis=1)) / 2)[:half, :half]


def main() -> None:
    """Write the spectrum and print its slope."""
    each = {name: magnitudes(colour_logits(patches(picture(SOURCES[CLASSES.index(name)])) / 255.0)) for name in PHOTOS}
    light = np.mean([each[name][..., 0] for name in PHOTOS], axis=0)
    colour = np.mean([each[name][..., 1:] for name in COLOURED], axis=0)
    spectrum = np.concatenate([light[..., None], colour], axis=-1)
    np.save(TARGET, spectrum.astype(np.float32))
    frequency = np.hypot(*np.mgrid[: PATCH // 2 + 1, : PATCH // 2 + 1])
    for channel in range(3):
        kept = (frequency >= 2) & (frequency <= 40)
        slope = np.polyfit(np.log(frequency[kept]), np.log(spectrum[..., channel][kept]), 1)[0]
        print(f"direction {channel}: falls with frequency to the power {slope:.2f}")
    print(f"{len(PHOTOS)} photographs, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
