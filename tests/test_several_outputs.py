"""Operations with several outputs (chunk, split, unbind, topk, layers that return tuples): the output that is returned,
and that the image's scores come from, is the one that is explained.
"""

import numpy as np
import pytest
from spellings import OF_TORCH, opened, runtimes

import convscope

SIDE, CLASSES = 8, 4
X = np.random.default_rng(3).uniform(0, 1, (2, SIDE, SIDE, 3)).astype(np.float32)


def kernel(outputs, seed=1):
    return np.random.default_rng(seed).normal(0, 1, (3, outputs)).astype(np.float32)


def maps(which, parts=2):
    """Part `which` of the channels that a 1x1 convolution makes of `X`."""
    return (X @ kernel(parts * CLASSES))[..., which * CLASSES : (which + 1) * CLASSES]


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def assert_map(network, expected):
    """The layer whose channels are the classes has the expected values, and class 1 is explained by its own."""
    assert network.head.spatial
    assert network.head.classes == CLASSES
    logits = network.forward(X, [network.head.map])[1][network.head.map]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    image = convscope.images.decode.read_image((255 * X[0]).astype(np.float32))
    found = convscope.heatmap(network, image, target=1, method="saliency", layer="auto")
    own = expected[0][..., 1][expected[0].argmax(axis=-1) == 1]
    np.testing.assert_allclose(found.rows[0].score, own.mean() if len(own) else 0, atol=1e-4)


# -- PyTorch ---------------------------------------------------------------------------------------------


def parts_of_torch():
    """By name: from maps `(n, 2 * CLASSES, h, w)` to two halves."""
    import torch

    return {
        "chunk": lambda x: torch.chunk(x, 2, 1),
        "chunk method": lambda x: x.chunk(2, dim=1),
        "split": lambda x: torch.split(x, CLASSES, 1),
        "split sizes": lambda x: x.split([CLASSES, CLASSES], dim=1),
        "tensor_split": lambda x: torch.tensor_split(x, 2, 1),
        "unbind": lambda x: torch.unbind(x.reshape(len(x), 2, CLASSES, SIDE, SIDE), 1),
        "iteration": lambda x: tuple(x.reshape(len(x), 2, CLASSES, SIDE, SIDE).transpose(0, 1)),
    }


def torch_module(parts, follow):
    """A 1x1 convolution with `kernel`, its parts, and what follows them."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2 * CLASSES, 1, bias=False)

        def forward(self, x):
            return follow(parts(self.conv(x)))

    module = Network().eval()
    with torch.no_grad():
        module.conv.weight.copy_(torch.tensor(kernel(2 * CLASSES).T[..., None, None]))
    return module


OF_MAPS = ("chunk", "chunk method", "split", "split sizes", "tensor_split", "unbind")


@pytest.mark.without_keras
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", OF_MAPS)
def test_of_several_maps_of_torch_the_returned_one_is_explained(name, which, tmp_path):
    pytest.importorskip("torch")
    module = torch_module(parts_of_torch()[name], lambda parts: parts[which])
    assert_map(opened("torch", module, tmp_path, SIDE), maps(which))


@pytest.mark.without_keras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["chunk", "split"])
@pytest.mark.parametrize("runtime", runtimes(*OF_TORCH[1:]))
def test_of_several_maps_in_a_file_the_returned_one_is_explained(runtime, name, which, tmp_path):
    module = torch_module(parts_of_torch()[name], lambda parts: parts[which])
    assert_map(opened(runtime, module, tmp_path, SIDE), maps(which))


@pytest.mark.without_keras
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", OF_MAPS)
def test_a_softmax_of_one_of_several_maps_of_torch_is_undone(name, which, tmp_path):
    torch = pytest.importorskip("torch")
    module = torch_module(parts_of_torch()[name], lambda parts: torch.softmax(parts[which], 1).flatten(2))
    network = opened("torch", module, tmp_path, SIDE)
    assert network.head.activation == "softmax"
    assert network.head.undone is not None
    assert_map(network, maps(which))


@pytest.mark.without_keras
@pytest.mark.parametrize("name", [*OF_MAPS, "iteration"])
@pytest.mark.parametrize("which", [0, 1])
def test_scores_of_one_of_several_maps_of_torch(name, which, tmp_path):
    """Class scores that follow one half: the other one is not on the way to them."""
    torch = pytest.importorskip("torch")
    parts = parts_of_torch()[name]
    module = torch_module(parts, lambda halves: torch.softmax(parts_of_mean(halves[which]), 1))
    network = opened("torch", module, tmp_path, SIDE)
    z = maps(which).mean(axis=(1, 2))
    np.testing.assert_allclose(network.predict(X), z, atol=1e-5)
    np.testing.assert_allclose(network.head.probabilities(network.predict(X)), softmax(z), atol=1e-5)
    halves = [layer for layer in network.layers if layer.path.endswith(("[0]", "[1]"))]
    assert [layer.on_path for layer in halves] == [which == number for number in range(len(halves))]


def parts_of_mean(half):
    return half.mean(dim=(2, 3))


@pytest.mark.without_keras
@pytest.mark.parametrize("form", ["module", "function"])
def test_the_indices_of_a_pooling_are_no_map_to_explain(form, tmp_path):
    torch = pytest.importorskip("torch")
    pool = torch.nn.MaxPool2d(2, return_indices=True)
    functions = {"module": pool, "function": lambda x: torch.nn.functional.max_pool2d(x, 2, return_indices=True)}
    module = torch_module(functions[form], lambda pooled: pooled[0].mean(dim=(2, 3)))
    network = opened("torch", module, tmp_path, SIDE)
    values = X @ kernel(2 * CLASSES)
    pooled = values.reshape(2, SIDE // 2, 2, SIDE // 2, 2, -1).max(axis=(2, 4))
    path = network.last_spatial_layer().path
    np.testing.assert_allclose(network.forward(X, [path])[1][path], pooled, atol=1e-5)


@pytest.mark.without_keras
def test_the_highest_values_and_not_their_places_are_explained(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch_module(lambda x: torch.topk(x, CLASSES, dim=1), lambda found: found[0].mean(dim=(2, 3)))
    network = opened("torch", module, tmp_path, SIDE)
    highest = -np.sort(-(X @ kernel(2 * CLASSES)), axis=-1)[..., :CLASSES]
    np.testing.assert_allclose(network.predict(X), highest.mean(axis=(1, 2)), atol=1e-5)
    path = network.last_spatial_layer().path
    np.testing.assert_allclose(network.forward(X, [path])[1][path], highest, atol=1e-5)


# -- Keras -----------------------------------------------------------------------------------------------


def parts_of_keras():
    """By name: from maps `(n, h, w, 2 * CLASSES)` to two halves."""
    keras = pytest.importorskip("keras")
    ops = keras.ops

    class Halves(keras.layers.Layer):
        def call(self, x):
            return x[..., :CLASSES], x[..., CLASSES:]

    class Named(keras.layers.Layer):
        def call(self, x):
            return {"first": x[..., :CLASSES], "second": x[..., CLASSES:]}

    def named(x):
        found = Named()(x)
        return found["first"], found["second"]

    return {
        "split": lambda x: ops.split(x, 2, axis=-1),
        "split indices": lambda x: ops.split(x, [CLASSES], axis=-1),
        "unstack": lambda x: ops.unstack(ops.reshape(x, (-1, SIDE, SIDE, 2, CLASSES)), axis=3),
        "layer": lambda x: Halves()(x),
        "layer with names": named,
    }


OF_KERAS = ("split", "split indices", "unstack", "layer", "layer with names")


def keras_model(name, follow):
    keras = pytest.importorskip("keras")
    image = keras.layers.Input((SIDE, SIDE, 3))
    conv = keras.layers.Conv2D(2 * CLASSES, 1, use_bias=False)
    model = keras.Model(image, follow(parts_of_keras()[name](conv(image))))
    conv.set_weights([kernel(2 * CLASSES)[None, None]])
    return model


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", OF_KERAS)
def test_of_several_maps_of_keras_the_returned_one_is_explained(name, which, tmp_path):
    model = keras_model(name, lambda parts: parts[which])
    assert_map(opened("keras", model, tmp_path, SIDE, head="softmax"), maps(which))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", OF_KERAS)
def test_a_softmax_of_one_of_several_maps_of_keras_is_undone(name, which, tmp_path):
    keras = pytest.importorskip("keras")
    network = opened("keras", keras_model(name, lambda parts: keras.ops.softmax(parts[which])), tmp_path, SIDE)
    assert network.head.undone is not None
    assert_map(network, maps(which))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", OF_KERAS)
def test_scores_of_one_of_several_maps_of_keras(name, which, tmp_path):
    """Class scores that follow one half: the last map is that half, and a heatmap of it shows something."""
    keras = pytest.importorskip("keras")
    model = keras_model(name, lambda parts: keras.layers.GlobalAveragePooling2D()(parts[which]))
    network = opened("keras", model, tmp_path, SIDE)
    np.testing.assert_allclose(network.predict(X), maps(which).mean(axis=(1, 2)), atol=1e-5)
    path = network.last_spatial_layer().path
    np.testing.assert_allclose(network.forward(X, [path])[1][path], maps(which), atol=1e-5)
    image = convscope.images.decode.read_image((255 * X[0]).astype(np.float32))
    found = convscope.heatmap(network, image, target=2, method="hirescam", layer="auto")
    np.testing.assert_allclose(found.maps[0], maps(which)[0, ..., 2] / SIDE**2, atol=1e-5)


def test_a_layer_that_returns_its_input_beside_its_own_values(tmp_path):
    keras = pytest.importorskip("keras")

    class Beside(keras.layers.Layer):
        def call(self, x):
            return x, 2 * x

    image = keras.layers.Input((SIDE, SIDE, 3))
    conv = keras.layers.Conv2D(CLASSES, 1, use_bias=False, name="conv")
    before, after = Beside(name="beside")(conv(image))
    for kept, factor in ((before, 1), (after, 2)):
        network = opened("keras", keras.Model(image, kept), tmp_path, SIDE, head="softmax")
        conv.set_weights([kernel(CLASSES)[None, None]])
        assert_map(network, factor * (X @ kernel(CLASSES)))


def test_a_layer_with_a_softmax_that_returns_its_features_too(tmp_path):
    keras = pytest.importorskip("keras")

    class Scores(keras.layers.Dense):
        def call(self, x):
            return x, super().call(x)

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape), keras.KerasTensor((*x.shape[:-1], CLASSES))

    image = keras.layers.Input((SIDE, SIDE, 3))
    scores = Scores(CLASSES, activation="softmax", use_bias=False, name="scores")
    model = keras.Model(image, scores(keras.layers.GlobalAveragePooling2D()(image) * 1.0)[1])
    scores.set_weights([kernel(CLASSES)])
    network = opened("keras", model, tmp_path, SIDE)
    z = X.mean(axis=(1, 2)) @ kernel(CLASSES)
    np.testing.assert_allclose(network.predict(X), z, atol=1e-5)
    np.testing.assert_allclose(network.head.probabilities(network.predict(X)), softmax(z), atol=1e-5)
