"""Shapes and types at the borders between rooms, checked by jaxtyping: NumPy, NHWC, float32."""

from typing import Any

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float, Float32, UInt8, jaxtyped

from convscope.images.decode import read_images
from convscope.images.image import InputImage, fit_batch
from convscope.networks.preprocessing import PRESETS, Preprocessing
from convscope.render.colour import colour, shared_tiles
from convscope.render.overlay import overlay
from convscope.techniques.heatmaps.methods import METHODS, Formula


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def photo(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@jaxtyped(typechecker=beartype)
def heatmap_method(
    name: str, maps: Float[np.ndarray, "n h w c"], gradients: Float[np.ndarray, "n h w c"]
) -> Float32[np.ndarray, "n h w"]:
    return METHODS[name].function(maps, gradients)


@jaxtyped(typechecker=beartype)
def preprocessed(preset: Preprocessing, pixels: Float32[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n h w c"]:
    return preset.apply(pixels)


@jaxtyped(typechecker=beartype)
def restored(preset: Preprocessing, x: Float32[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n h w c"]:
    return preset.restore(x)


@jaxtyped(typechecker=beartype)
def overlaid(image: UInt8[np.ndarray, "h w 3"], heatmap: Float[np.ndarray, "a b"]) -> UInt8[np.ndarray, "h w 3"]:
    return overlay(image, heatmap)


@jaxtyped(typechecker=beartype)
def coloured(levels: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    return colour(levels)


@jaxtyped(typechecker=beartype)
def tiled(activation: Float32[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    return shared_tiles(activation)


@jaxtyped(typechecker=beartype)
def batched(photos: list[InputImage], count: Any) -> Float32[np.ndarray, "n 20 24 3"]:
    made = fit_batch(photos, 20, 24, 3)
    assert len(made) == count
    return made


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, Formula)])
def test_heatmap_methods(name):
    # The same gradient at each place, since method cam takes no other.
    heatmap_method(name, random(2, 5, 7, 3), np.broadcast_to(random(2, 1, 1, 3), (2, 5, 7, 3)))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_preprocessing(name, channels):
    restored(PRESETS[name], preprocessed(PRESETS[name], random(2, 4, 5, channels)))


def test_drawing():
    overlaid(photo(30, 40), random(4, 5))
    coloured(photo(8, 9)[..., 0])
    tiled(random(6, 7, 5))


def test_batches():
    batched(read_images([photo(9, 50), photo(300, 20)]), 2)


def test_a_wrong_shape_would_be_noticed():
    with pytest.raises(Exception, match="Type-check error"):
        heatmap_method("grad-cam", random(2, 5, 7, 3), random(2, 5, 7, 4))
