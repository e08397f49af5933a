"""A network that compares two images, and what its heatmaps have to be: f(a) . f(b), f a convolution, ReLU and mean."""

from __future__ import annotations

import numpy as np

SIDE, CHANNELS = 12, 4
RANDOM = np.random.default_rng(5)
KERNEL = RANDOM.normal(size=(3, 3, 3, CHANNELS)).astype(np.float32)  # (kh, kw, in, out)
BIAS = RANDOM.normal(size=CHANNELS).astype(np.float32)
LEFT, RIGHT = (RANDOM.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(2))


def maps_of(pixels):
    """The activations `(h, w, c)` of an image, cell by cell."""
    x = pixels.astype(np.float64) / 255
    out = np.zeros((SIDE - 2, SIDE - 2, CHANNELS))
    for row in range(SIDE - 2):
        for column in range(SIDE - 2):
            patch = x[row : row + 3, column : column + 3]
            out[row, column] = (patch[..., None] * KERNEL).sum((0, 1, 2)) + BIAS
    return np.maximum(out, 0)


def score(a, b):
    """What the network returns."""
    return float(maps_of(a).mean((0, 1)) @ maps_of(b).mean((0, 1)))


def grad_cam(explained, other):
    """The gradient of the score at each cell is the mean activation of the other image, divided by the cells."""
    maps = maps_of(explained)
    weights = maps_of(other).mean((0, 1)) / maps[..., 0].size
    return maps @ weights


def check_sides(opened):
    """Both sides are explained, the other one fed as an array or as an image; the layers say whose they are.

    Args:
        opened: opens the network with options of `open_model`.
    """
    import convscope
    from convscope.images.decode import read_image

    sides = {"left": LEFT, "right": RIGHT}
    for side, other in (("left", "right"), ("right", "left")):
        array = sides[other][None].astype(np.float32) / 255
        for options in (
            {"input": side, "feed": {other: read_image(sides[other])}},
            {"feed": {other: read_image(sides[other])}},
        ):
            network = opened(preprocess="0..1", **options)
            assert network.inputs.name == side
            x = network.prepare([read_image(sides[side])])
            np.testing.assert_allclose(network.predict(x)[0, 0], score(sides[side], sides[other]), rtol=1e-4)
            result = convscope.heatmap(network, sides[side], target=0)
            np.testing.assert_allclose(result.maps[0], grad_cam(sides[side], sides[other]), rtol=1e-3, atol=1e-6)
            (layer,) = [layer for layer in network.layers if layer.path == result.rows[0].layer]
            assert layer.inputs == (side,)
            assert {layer.inputs for layer in network.layers if layer.kind == "conv"} == {("left",), ("right",)}
            assert network.layers[-1].inputs == ("left", "right")
        raw = opened(
            preprocess="0..1", feed={other: array if network_takes_last(network) else array.transpose(0, 3, 1, 2)}
        )
        np.testing.assert_allclose(raw.predict(x), network.predict(x), rtol=1e-5)


def network_takes_last(network):
    """Whether arrays are fed with the channels last."""
    return network.framework.startswith("keras")
