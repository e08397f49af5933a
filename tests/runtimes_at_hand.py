"""Small networks of each framework at hand, for tests that concern every one: Keras on its backend, and PyTorch."""

import importlib.util

import numpy as np
import pytest

import convscope

SIDE = 16
LAYERS = {"keras": ("one", "two"), "torch": ("0", "2")}


def keras_model(names=("one", "two"), first=None):
    """Two convolutions and a dense layer with softmax; `first` is a convolution that it shares with another model."""
    keras = pytest.importorskip("keras")
    from models import seeded

    image = keras.layers.Input((SIDE, SIDE, 3), name="image")
    x = (first or keras.layers.Conv2D(6, 3, activation="relu", name=names[0]))(image)
    x = keras.layers.Conv2D(8, 3, activation="relu", name=names[1])(x)
    x = keras.layers.Dense(5, activation="softmax", name="out")(keras.layers.GlobalAveragePooling2D(name="gap")(x))
    return seeded(keras.Model(image, x, name="small"))


def torch_model(first=None):
    """The same for PyTorch, with logits."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        *(first or nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()


def opened(runtime, model=None):
    """A network of "keras" or "torch"."""
    if runtime == "torch":
        return convscope.open_model(model or torch_model(), size=SIDE, preprocess="0..1")
    return convscope.open_model(model or keras_model(), preprocess="0..1")


def two_that_share(runtime):
    """Two networks whose first convolution is the same object."""
    one = torch_model() if runtime == "torch" else keras_model()
    other = torch_model(one[0]) if runtime == "torch" else keras_model(("one", "other"), one.get_layer("one"))
    return opened(runtime, one), opened(runtime, other)


def multiply(network, factor):
    """Train, in a manner: every value of the first kernel times `factor`."""
    if hasattr(network, "module"):
        import torch

        with torch.no_grad():
            network.module[0].weight.mul_(factor)
    else:
        kernel = network.model.get_layer("one").kernel
        kernel.assign(factor * kernel)


def images(count, seed=0):
    """Arrays `(h, w, 3)` uint8."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, 20, 24, 3), np.uint8))


def arrays(result):
    """The raw values of a result, by name."""
    if hasattr(result, "maps"):
        return {str(number): one for number, one in enumerate(result.maps)}
    if hasattr(result, "arrays"):
        return dict(result.arrays)
    return {name: getattr(result, name) for name in ("values", "vectors", "frames") if hasattr(result, name)}


def assert_same(one, other):
    """Two results are equal to the last bit, and in what they say of themselves."""
    ours, theirs = one.provenance, other.provenance
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert list(ours) == list(theirs)
    ours, theirs = arrays(one), arrays(other)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    for rows in ("rows", "statistics"):
        assert getattr(one, rows, ()) == getattr(other, rows, ())


def runtimes():
    """Parameters for "keras" and "torch", skipped where they are not installed."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
        )
        for name in ("keras", "torch")
    ]
