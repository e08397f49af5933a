"""The guess of preprocessing from a batch norm's statistics, on real photographs through random kernels."""

from pathlib import Path

import numpy as np
import pytest

import convscope
from convscope.images.decode import read_images
from convscope.images.image import fit_batch
from convscope.networks.preprocessing import PRESETS, guess_from_statistics, seen_by_batch_norm

pytestmark = pytest.mark.without_keras

PHOTOS = Path(convscope.__file__).parent / "demo" / "photos"


def statistics(preset, seed):
    """Running mean and variance of a 3x3 convolution's output on the demo's photos, cell by cell in NumPy."""
    photos = fit_batch(read_images(sorted(PHOTOS.glob("*.jpg"))), 96, 96, 3)
    x = PRESETS[preset].apply(photos)
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(0, 0.3, (3, 3, 3, 24)), rng.normal(0, 0.1, 24)
    # Trained first layers hold smoothing kernels beside edge detectors.
    kernel[..., :6] = np.abs(kernel[..., :6]) * np.sign(rng.normal(size=6))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    out = np.einsum("nhwcij,ijck->nhwk", windows, kernel) + bias
    return kernel, bias, out.mean(axis=(0, 1, 2)), out.var(axis=(0, 1, 2))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(4))
def test_each_preset_is_told_from_the_others(preset, seed):
    seen = seen_by_batch_norm(*statistics(preset, seed))
    guess = guess_from_statistics(*seen)
    assert guess is not None
    assert guess.name == preset
    assert guess.certainty == "guess"


def test_untrained_statistics_tell_nothing():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 8))
    assert seen_by_batch_norm(kernel, np.zeros(8), np.zeros(8), np.ones(8)) is None


def test_values_that_no_photograph_has_give_no_guess():
    assert guess_from_statistics(40.0, 1.0) is None
