"""Renderings as the bytes of image files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from convscope.errors import UsageError


def animation(frames: Sequence[np.ndarray], kind: str = "webp", seconds: float = 4.0) -> bytes:
    """The bytes of an animation that repeats for ever, its last frame held for 1.5 s.

    Args:
        frames: images (h, w, 3) uint8 of one shape.
        kind: "webp" or "gif".
        seconds: that the frames together take, each between 0.04 and 0.4 s.

    Raises:
        UsageError: another kind, no frame, or a side that is longer than the formats allow.
    """
    if kind not in ("webp", "gif"):
        raise UsageError(f"an animation is 'webp' or 'gif', not {kind!r}", code="format-unknown", name=kind)
    if not len(frames):
        raise UsageError("an animation needs at least one frame, found none", code="no-frames")
    height, width = frames[0].shape[:2]
    if max(height, width) > 16383:
        raise UsageError(
            f"an animation allows 16383 pixels a side, found {height} x {width}",
            code="rendering-too-large",
            size=[height, width],
            expected=16383,
        )
    pace = round(1000 * min(0.4, max(0.04, seconds / len(frames))))
    first, *others = map(Image.fromarray, frames)
    times = [pace] * len(others) + [1500]
    buffer = io.BytesIO()
    first.save(buffer, kind.upper(), save_all=True, append_images=others, duration=times, loop=0, quality=80)
    return buffer.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file of an image (h, w), (h, w, 3) or (h, w, 4) uint8; lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encode_webp(image: np.ndarray, quality: int = 85) -> bytes:
    """The bytes of a WebP file of an image (h, w, 3) or (h, w, 4) uint8; `quality` 0..100.

    Raises:
        UsageError: a side is longer than the 16383 pixels that the format allows.
    """
    if max(image.shape[:2]) > 16383:
        height, width = image.shape[:2]
        raise UsageError(
            f"WebP allows 16383 pixels a side, but the image is {height} x {width}: use PNG",
            code="rendering-too-large",
            size=[height, width],
            expected=16383,
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def small_data_uri(image: np.ndarray, quality: int = 85) -> str:
    """An image (h, w, 3) or (h, w, 4) uint8 as a `data:` address: PNG, or WebP where that is smaller."""
    png = encode_png(image)
    webp = encode_webp(image, quality) if max(image.shape[:2]) <= 16383 else png
    return data_uri(png, "image/png") if len(png) <= len(webp) else data_uri(webp, "image/webp")


def image_tag(pixels: np.ndarray, text: str) -> str:
    """A rendering inside a page, with its text for those who can't see it."""
    source = data_uri(encode_png(pixels), "image/png")
    return f'<img src="{source}" alt="{html.escape(text, quote=True)}" style="max-width: 100%">'


def data_uri(data: bytes, mime: str) -> str:
    """`data` as a `data:` address, for a page that needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
