"""Canvases, transforms and rules of the ascent against their formulas written out in NumPy."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from convscope.networks.preprocessing import PRESETS
from convscope.techniques.filters.optimizers import Adam, Normalised
from convscope.techniques.filters.parameterizations import (
    COLOURS,
    Fourier,
    Phases,
    Pixels,
    generator,
    natural_magnitudes,
)
from convscope.techniques.filters.transforms import Affine, Crops

if importlib.util.find_spec("keras"):
    import keras

    ops, to_numpy = keras.ops, keras.ops.convert_to_numpy
else:
    torch_ops = pytest.importorskip("convscope.networks.torch.ops")
    ops, to_numpy = torch_ops, lambda tensor: tensor.detach().numpy()

SIZES = [(8, 8), (9, 12), (12, 9), (7, 5)]


def network(channels=3, preprocess="-1..1"):
    return SimpleNamespace(ops=ops, inputs=SimpleNamespace(channels=channels), preprocessing=PRESETS[preprocess])


def start(canvas, net, size, count=2):
    return np.stack([canvas.start(net, size, generator(0, number)) for number in range(count)])


def fourier_image(parameters, size):
    """The Fourier canvas as its paper describes it, by NumPy's own transform: values in 0..1."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    scale = np.sqrt(width * height) / np.maximum(frequency, 1 / max(width, height))
    spectrum = (parameters[:, 0] + 1j * parameters[:, 1]) * scale[None, :, :, None]
    values = np.fft.irfft2(spectrum, s=size, axes=(1, 2)) / 4
    if values.shape[-1] == 3:
        matrix = COLOURS / np.sqrt((COLOURS**2).sum(axis=0)).max()
        values = np.einsum("ck,nyxk->nyxc", matrix, values)
    return 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_a_fourier_canvas_is_the_inverse_transform_of_its_spectrum(size, channels):
    net, canvas = network(channels), Fourier(deviation=0.3)
    parameters = start(canvas, net, size)
    drawn = to_numpy(canvas.image(net, ops.convert_to_tensor(parameters), size))
    np.testing.assert_allclose(drawn, 2 * fourier_image(parameters.astype(np.float64), size) - 1, atol=2e-4)
    assert drawn.std() > 0.05


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("canvas", [Fourier(), Pixels(0.25)])
def test_a_canvas_made_of_a_image_shows_it(canvas, size, channels):
    net = network(channels, "0..1")
    images = np.random.default_rng(1).uniform(0.05, 0.95, (2, *size, channels)).astype(np.float32)
    shown = to_numpy(canvas.image(net, ops.convert_to_tensor(canvas.parameters(net, images)), size))
    np.testing.assert_allclose(shown, images, atol=2e-4)


def test_colours_beyond_a_fourier_canvas_are_held_within_its_range():
    net = network(3, "0..1")
    shown = to_numpy(
        Fourier().image(net, ops.convert_to_tensor(Fourier().parameters(net, np.ones((1, 6, 6, 3)))), (6, 6))
    )
    np.testing.assert_allclose(shown, 0.98, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_phases_are_the_inverse_transform_of_natural_magnitudes(size, channels):
    net = network(channels)
    phases = start(Phases(), net, size)
    values = np.fft.irfft2(natural_magnitudes(size, channels) * np.exp(1j * phases), s=size, axes=(1, 2))
    if channels == 3:
        values = np.einsum("ck,nyxk->nyxc", COLOURS / np.sqrt((COLOURS**2).sum(axis=0)).max(), values)
    drawn = to_numpy(Phases().image(net, ops.convert_to_tensor(phases), size))
    np.testing.assert_allclose(drawn, 2 / (1 + np.exp(-values)) - 1, atol=2e-4)


def test_a_images_own_phases_bring_it_back():
    net, size = network(), (33, 49)  # odd sides: no number of the spectrum is real but the first
    drawn = to_numpy(Phases().image(net, ops.convert_to_tensor(start(Phases(), net, size)), size))
    again = to_numpy(Phases().image(net, ops.convert_to_tensor(Phases().parameters(net, drawn)), size))
    assert np.corrcoef(again.ravel(), drawn.ravel())[0, 1] > 0.98


def test_natural_magnitudes_fall_off_alike_at_every_size():
    """A random image of any size is about as rough, and as contrasted, as photographs are."""
    for size in [(64, 64), (128, 96), (224, 224), (300, 512)]:
        found = natural_magnitudes(size, 3)
        assert found.shape == (size[0], size[1] // 2 + 1, 3)
        assert (found[0, 0] == 0).all()
        # Per root pixel, the magnitude at a frequency does not depend on the size.
        one, other = found[size[0] // 4, 0] / np.sqrt(size[0] * size[1]), natural_magnitudes((128, 128), 3)[32, 0] / 128
        np.testing.assert_allclose(one, other, rtol=1e-5)
    large = natural_magnitudes((512, 512), 3)
    np.testing.assert_allclose(large[0, 1], 4 * large[0, 4], rtol=1e-5)  # below what was measured as 1 / f
    assert (np.diff(natural_magnitudes((128, 128), 3)[0, 1:40, 0]) < 0).mean() > 0.8
    np.testing.assert_array_equal(natural_magnitudes((32, 48), 5)[..., 4], natural_magnitudes((32, 48), 3)[..., 0])


def moved_slowly(image, matrix, middle):
    """Each pixel of the result looked up in the image, bilinearly, mid-grey outside."""
    height, width = image.shape[:2]
    out = np.zeros_like(image, dtype=np.float64)
    for y in range(height):
        for x in range(width):
            across = matrix[0] * x + matrix[1] * y + matrix[2]
            down = matrix[3] * x + matrix[4] * y + matrix[5]
            left, top = int(np.floor(across)), int(np.floor(down))
            for row in (top, top + 1):
                for column in (left, left + 1):
                    weight = (1 - abs(across - column)) * (1 - abs(down - row))
                    inside = 0 <= row < height and 0 <= column < width
                    out[y, x] += weight * (image[row, column] if inside else middle)
    return out


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_transform_is_a_bilinear_look_up_with_grey_outside(channels):
    transform, size = Affine(shift=0.2, scale=(0.7, 1.4), rotation=30.0), (9, 13)
    images = np.random.default_rng(0).uniform(-1, 1, (3, *size, channels)).astype(np.float32)
    draws = np.stack([transform.draw((4, number), 5, 10, size) for number in range(3)])
    middle = np.full(channels, 0.25)
    found = to_numpy(transform.apply(ops.convert_to_tensor(images), ops.convert_to_tensor(draws), middle, middle, ops))
    for image, draw, result in zip(images, draws, found, strict=True):
        np.testing.assert_allclose(result, moved_slowly(image, draw[0].astype(np.float64), middle), atol=1e-4)
    assert not np.allclose(found, images, atol=0.1)


def test_draws_stay_within_their_bounds_and_belong_to_a_key_and_step():
    transform, size = Affine(shift=0.1, scale=(0.9, 1.1), rotation=10.0), (40, 60)
    drawn = [transform.draw((0, key), step, 8, size)[0] for key in range(20) for step in range(8)]
    factors = [np.hypot(draw[0], draw[1]) for draw in drawn]
    assert 1 / 1.1 - 1e-6 <= min(factors) < 0.93
    assert 1.07 < max(factors) <= 1 / 0.9 + 1e-6
    angles = [np.rad2deg(np.arctan2(draw[3], draw[0])) for draw in drawn]
    assert 8 < max(np.abs(angles)) <= 10 + 1e-4
    np.testing.assert_array_equal(transform.draw((0, 3), 2, 8, size), transform.draw((0, 3), 2, 8, size))
    assert len({draw.tobytes() for draw in drawn}) == 160


@pytest.mark.parametrize(
    "transform", [Affine(0.1, (0.9, 1.1), 10.0, views=3), Crops(0.6, 0.3, 3, noise_std=0, brightness=0)]
)
def test_views_are_looked_up_one_after_another(transform):
    size, middle = (9, 13), np.zeros(3)
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    draws = np.stack([transform.draw((0, number), 2, 8, size) for number in range(2)])
    assert draws.shape == (2, 3, 8)
    found = to_numpy(
        transform.apply(ops.convert_to_tensor(images), ops.convert_to_tensor(draws), middle, middle + 1, ops)
    )
    wanted = [moved_slowly(images[n], draws[n, v].astype(np.float64), middle) for n in range(2) for v in range(3)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_crops_lie_inside_and_shrink_as_they_are_told():
    transform, size = Crops(first=0.8, last=0.2, views=50), (40, 60)
    for step, share in ((0, 0.8), (5, 0.5), (10, 0.2)):
        drawn = transform.draw((1, 2), step, 11, size)
        assert drawn[:, 0].mean() == pytest.approx(share, abs=0.03)
        np.testing.assert_array_equal(drawn[:, 0], drawn[:, 4])
        for scale, begin, side in ((drawn[:, 0], drawn[:, 2], 60), (drawn[:, 4], drawn[:, 5], 40)):
            # From the outer edge of the first pixel to that of the last.
            assert (begin - scale / 2 >= -0.5 - 1e-4).all()
            assert (begin + scale * (side - 0.5) <= side - 0.5 + 1e-4).all()
        assert np.abs(drawn[:, 6]).max() <= 0.04
    assert transform.draw((1, 2), 3, 11, size).tobytes() != transform.draw((1, 3), 3, 11, size).tobytes()


def test_the_noise_of_crops_is_normal_and_differs_between_views():
    transform, size = Crops(first=1.0, last=1.0, views=4, spread=0, noise_std=0.08, brightness=0.04), (64, 64)
    draws = transform.draw((1, 2), 0, 8, size)[None]
    flat, half = np.zeros((1, *size, 3), np.float32), np.full(3, 10.0)
    found = to_numpy(transform.apply(ops.convert_to_tensor(flat), ops.convert_to_tensor(draws), 0 * half, half, ops))
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 20 * draws[0, :, 6], atol=0.05)
    np.testing.assert_allclose(found.std(axis=(1, 2)), 1.6, rtol=0.05)
    rest = (found - found.mean(axis=(1, 2, 3), keepdims=True)).reshape(4, -1)
    assert np.abs(np.corrcoef(rest) - np.eye(4)).max() < 0.05


def test_nadam_looks_ahead():
    optimizer, rng = Adam(rate=0.3, nesterov=True), np.random.default_rng(0)
    slow = rng.normal(size=(2, 5)).astype(np.float32)
    memory = [ops.convert_to_tensor(array) for array in optimizer.init(slow)]
    moved, mean, spread = ops.convert_to_tensor(slow), 0.0, 0.0
    for step in range(1, 8):
        gradient = rng.normal(size=slow.shape).astype(np.float32)
        moved, *memory = optimizer.step(network(), moved, ops.convert_to_tensor(gradient), None, tuple(memory))
        mean, spread = 0.9 * mean + 0.1 * gradient, 0.999 * spread + 0.001 * gradient**2
        ahead = 0.9 * mean / (1 - 0.9 ** (step + 1)) + 0.1 * gradient / (1 - 0.9**step)
        slow = slow + 0.3 * ahead / (np.sqrt(spread / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(to_numpy(moved), slow, atol=1e-4)


def test_adam_is_its_algorithm():
    optimizer, rng = Adam(rate=0.05), np.random.default_rng(0)
    parameters = rng.normal(size=(2, 3, 4)).astype(np.float32)
    memory = [ops.convert_to_tensor(array) for array in optimizer.init(parameters)]
    assert all(len(array) == 2 for array in optimizer.init(parameters))  # a row for each image
    moved, mean, spread = ops.convert_to_tensor(parameters), 0.0, 0.0
    slow = parameters.astype(np.float64)
    for step in range(1, 8):
        gradient = rng.normal(size=parameters.shape).astype(np.float32)
        moved, *memory = optimizer.step(network(), moved, ops.convert_to_tensor(gradient), None, tuple(memory))
        mean = 0.9 * mean + 0.1 * gradient.astype(np.float64)
        spread = 0.999 * spread + 0.001 * gradient.astype(np.float64) ** 2
        slow = slow + 0.05 * (mean / (1 - 0.9**step)) / (np.sqrt(spread / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(to_numpy(moved), slow, atol=1e-5)


@pytest.mark.parametrize("optimizer", [Adam(rate=0.05), Normalised(length=1.0)])
def test_a_image_whose_gradient_overflows_stays(optimizer):
    parameters = np.ones((2, 3), np.float32)
    gradient = ops.convert_to_tensor(np.array([[np.nan, np.inf, -np.inf], [1, 2, 3]], np.float32))
    square = ops.sum(ops.square(gradient), axis=(1,), keepdims=True)
    memory = tuple(ops.convert_to_tensor(array) for array in optimizer.init(parameters))
    net = network(3)
    moved = to_numpy(optimizer.step(net, ops.convert_to_tensor(parameters), gradient, square, memory)[0])
    np.testing.assert_array_equal(moved[0], 1)
    assert (moved[1] > 1).all()
