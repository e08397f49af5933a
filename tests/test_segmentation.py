"""Networks whose output is a map with a class for each channel: one map however they are written, by closed forms."""

import importlib.util

import numpy as np
import pytest
from spellings import OF_TORCH, opened, prepared, runtimes

import convscope
from convscope.errors import UsageError

SIDE, FEATURES = 12, 5
NAMES = ("ground", "disc", "square")
HAS = {name: importlib.util.find_spec(name) is not None for name in ("keras", "torch")}


def weights(classes):
    """By Keras' shapes; scores so far apart that a softmax saturates at most places."""
    rng = np.random.default_rng(19)
    drawn = [rng.normal(0, 0.5, (3, 3, 3, FEATURES)), rng.normal(0, 0.1, FEATURES)]
    drawn += [rng.normal(0, 40, (1, 1, FEATURES, classes)), rng.normal(0, 1, classes)]
    return [array.astype(np.float32) for array in drawn]


def truth(x, classes):
    """Features after their ReLU `(h, w, c)`, and the scores of each place `(h, w, classes)`, float64, of one image."""
    kernel, shift, last, end = (array.astype(np.float64) for array in weights(classes))
    size = SIDE - 2
    maps = np.zeros((size, size, FEATURES))
    for row, column in np.ndindex(size, size):
        maps[row, column] = np.einsum("ijc,ijck->k", x[row : row + 3, column : column + 3], kernel) + shift
    maps = np.maximum(maps, 0)
    return maps, maps @ last[0, 0] + end


def keras_model(classes, spelling):
    import keras
    from keras import layers

    image = layers.Input((SIDE, SIDE, 3))
    features = layers.Conv2D(FEATURES, 3, activation="relu", name="features")
    fused = spelling.removeprefix("fused ") if spelling.startswith("fused") else None
    last = layers.Conv2D(classes, 1, activation=fused, name="scores")
    z = last(features(image))
    model = keras.Model(image, KERAS_ENDS[spelling](z) if fused is None else z)
    drawn = weights(classes)
    features.set_weights(drawn[:2])
    last.set_weights(drawn[2:])
    return model


def keras_ends():
    from keras import layers, ops

    places = (SIDE - 2) ** 2
    return {
        "linear": lambda z: z,
        "layer": layers.Softmax(name="soft"),
        "function": ops.softmax,
        "activation": layers.Activation("log_softmax"),
        "dropout after": lambda z: layers.Dropout(0.5)(layers.Softmax()(z)),
        "places in a row": lambda z: layers.Softmax()(layers.Reshape((places, 3))(z)),
        "sigmoid layer": layers.Activation("sigmoid"),
        "sigmoid function": ops.sigmoid,
    }


KERAS_ENDS = keras_ends() if HAS["keras"] else {}


def torch_module(classes, spelling):
    import torch
    from torch import nn

    ends = {
        "linear": lambda z: z,
        "module": nn.Softmax(dim=1),
        "over channels": nn.Softmax2d(),
        "function": lambda z: torch.softmax(z, dim=1),
        "log": lambda z: torch.log_softmax(z, dim=1),
        "sigmoid": torch.sigmoid,
    }

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.act, self.scores = nn.Conv2d(3, FEATURES, 3), nn.ReLU(), nn.Conv2d(FEATURES, classes, 1)
            self.end = ends[spelling] if isinstance(ends[spelling], nn.Module) else None

        def forward(self, x):
            z = self.scores(self.act(self.features(x)))
            return ends[spelling](z) if self.end is None else self.end(z)

    module = Network().eval()
    kernel, shift, last, end = map(torch.from_numpy, weights(classes))
    with torch.no_grad():
        module.features.weight.copy_(kernel.permute(3, 2, 0, 1))
        module.features.bias.copy_(shift)
        module.scores.weight.copy_(last.permute(3, 2, 0, 1))
        module.scores.bias.copy_(end)
    return module


def made(runtime, spelling, channels, folder, **options):
    build = keras_model if runtime == "keras" else torch_module
    return opened(runtime, build(channels, spelling), folder, SIDE, **options)


def with_relu(network):
    """The layer of the features after their ReLU."""
    return next(layer.path for layer in network.layers if (layer.activation or "").lower() == "relu")


SOFTMAX = [
    *[("keras", one) for one in ("fused softmax", "layer", "function", "activation", "dropout after")],
    *[("keras", one) for one in ("places in a row", "linear")],
    *[("torch", one) for one in ("module", "over channels", "function", "log", "linear")],
    *[(runtime, one) for runtime in OF_TORCH[1:] for one in ("module", "log")],
]
SIGMOID = [
    *[("keras", one) for one in ("fused sigmoid", "sigmoid layer", "sigmoid function", "linear")],
    *[(runtime, one) for runtime in OF_TORCH for one in ("sigmoid", "linear")],
]


def cases(pairs):
    """Parameters for pairs of a runtime and a spelling."""
    skips = {runtime: runtimes(runtime)[0].marks for runtime, _ in pairs}
    return [
        pytest.param(
            runtime, one, id=f"{runtime}, {one}", marks=[*skips[runtime], pytest.mark.filterwarnings("ignore")]
        )
        for runtime, one in pairs
    ]


@pytest.mark.parametrize(("runtime", "spelling"), cases(SOFTMAX))
def test_a_class_is_explained_by_its_logits_where_it_is_the_highest(runtime, spelling, photo, tmp_path):
    said = {"head": "softmax"} if spelling == "linear" and runtime == "keras" else {}
    network = made(runtime, spelling, 3, tmp_path, classes=NAMES, **said)
    (x,) = prepared(network, [photo])
    maps, scores = truth(x, 3)
    kernel = weights(3)[2][0, 0].astype(np.float64)
    layer, best = with_relu(network), scores.argmax(axis=-1)
    assert {int(number) for number in np.unique(best)} == {0, 1, 2}, "each class has its places"
    for number, name in enumerate(NAMES):
        own = best == number
        found = convscope.heatmap(network, photo, name)
        assert found.rows[0].layer == layer
        np.testing.assert_allclose(found.maps[0], maps @ kernel[:, number] / own.size, rtol=1e-4, atol=1e-5)
        assert found.rows[0].score == pytest.approx(scores[own][:, number].mean(), rel=1e-4)
        assert found.rows[0].class_name == f"{name} where it is the highest"
        placed = convscope.heatmap(network, photo, number, layer, method="hirescam")
        expected = maps @ kernel[:, number] * own / own.sum()
        np.testing.assert_allclose(placed.maps[0], expected, rtol=1e-4, atol=1e-5)
    one = convscope.heatmap(network, photo, "disc", against="square")
    difference = kernel[:, 1] - kernel[:, 2]
    np.testing.assert_allclose(one.maps[0], maps @ difference / own.size, rtol=1e-4, atol=1e-5)
    assert (one.rows[0].against, one.parameters.against_choice) == ("square", "given")


@pytest.mark.parametrize(("runtime", "spelling"), cases(SIGMOID))
def test_one_sigmoid_channel_has_two_classes(runtime, spelling, photo, tmp_path):
    said = {"head": "sigmoid"} if spelling == "linear" else {}
    network = made(runtime, spelling, 1, tmp_path, classes=("ground", "disc"), **said)
    maps, scores = truth(prepared(network, [photo])[0], 1)
    kernel = weights(1)[2][0, 0].astype(np.float64)[:, 0]
    for number, sign in ((0, -1), (1, 1)):
        own = (scores[..., 0] > 0) == (number == 1)
        assert own.any()
        found = convscope.heatmap(network, photo, number)
        assert found.rows[0].layer == with_relu(network)
        np.testing.assert_allclose(found.maps[0], sign * (maps @ kernel) / own.size, rtol=1e-4, atol=1e-5)
        assert found.rows[0].score == pytest.approx(sign * scores[own].mean(), rel=1e-4)
    assert found.rows[0].class_name.startswith("disc")


@pytest.mark.parametrize(("runtime", "spelling"), cases([("keras", "fused softmax"), ("torch", "function")]))
def test_two_channels_under_one_softmax_are_a_pair(runtime, spelling, photo, tmp_path):
    network = made(runtime, spelling, 2, tmp_path, classes=NAMES[:2])
    maps, scores = truth(prepared(network, [photo])[0], 2)
    kernel = weights(2)[2][0, 0].astype(np.float64)
    own = scores.argmax(axis=-1) == 1
    assert own.any()
    found = convscope.heatmap(network, photo, "disc")
    np.testing.assert_allclose(found.maps[0], maps @ (kernel[:, 1] - kernel[:, 0]) / own.size, rtol=1e-4, atol=1e-5)
    assert (found.rows[0].against, found.parameters.against_choice) == ("ground", "pair")
    assert found.rows[0].score == pytest.approx((scores[own][:, 1] - scores[own][:, 0]).mean(), rel=1e-4)
    alone = convscope.heatmap(network, photo, "logit:disc")
    np.testing.assert_allclose(alone.maps[0], maps @ kernel[:, 1] / own.size, rtol=1e-4, atol=1e-5)
    assert alone.parameters.against_choice == "none"


@pytest.mark.parametrize(("runtime", "spelling"), cases([("keras", "layer"), ("torch", "function")]))
def test_what_is_no_class_of_a_map_is_said(runtime, spelling, photo, tmp_path):
    network = made(runtime, spelling, 3, tmp_path)
    for target, against, code in (
        ("top", None, "no-class-scores"),
        (3, None, "class-out-of-range"),
        ("disc", None, "classes-unnamed"),
        (1, "rival", "rival-of-a-map"),
    ):
        with pytest.raises(UsageError) as error:
            convscope.heatmap(network, photo, target, against=against)
        assert error.value.code == code
    with pytest.raises(UsageError) as error:
        made(runtime, spelling, 3, tmp_path, classes=("one", "two"))
    assert error.value.code == "class-names-misfit"
    assert network.head.classes == 3
    assert "3 classes" in network.head.text


def test_a_class_that_is_nowhere_is_blank_with_the_reason(tmp_path, photo):
    runtime, spelling = ("keras", "fused softmax") if HAS["keras"] else ("torch", "function")
    build = keras_model if HAS["keras"] else torch_module
    model = build(3, spelling)
    if HAS["keras"]:
        kernel, bias = model.get_layer("scores").get_weights()
        model.get_layer("scores").set_weights([kernel, bias - np.array([0, 1e4, 0], np.float32)])
    else:
        import torch

        with torch.no_grad():
            model.scores.bias[1] -= 1e4
    row = convscope.heatmap(opened(runtime, model, tmp_path, SIDE, classes=NAMES), photo, "disc").rows[0]
    assert row.status == "blank"
    assert row.reason == "there is no place with disc where it is the highest"


@pytest.mark.parametrize(("runtime", "spelling"), cases([("keras", "linear"), ("torch", "linear")]))
def test_a_map_of_one_value_is_no_class(runtime, spelling, photo, tmp_path):
    """A depth or a logit: the graph does not tell. Its mean over the places where it is above 0 is explained."""
    network = made(runtime, spelling, 1, tmp_path)
    maps, scores = truth(prepared(network, [photo])[0], 1)
    found = convscope.heatmap(network, photo, 0)
    kernel = weights(1)[2][0, 0].astype(np.float64)[:, 0]
    np.testing.assert_allclose(found.maps[0], maps @ kernel / scores.size, rtol=1e-4, atol=1e-5)
    assert found.rows[0].score == pytest.approx(scores[scores > 0].mean(), rel=1e-4)
