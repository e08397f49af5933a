"""The heads that networks have, on each runtime, against closed forms: what is a probability, and what is explained.

Every network here is one small convolution with tanh, a global average and a dense layer that makes the scores `z`;
only what follows differs. The truth is computed by NumPy in float64 from the same weights.
"""

import importlib.util
import os

import numpy as np
import pytest
from spellings import OF_TORCH, opened, returned, runtimes

from convscope.techniques.heatmaps import Custom
from convscope.techniques.heatmaps.evidence import TraceSpec, input_gradients
from convscope.techniques.heatmaps.targets import goal_of

SIDE, FEATURES = 9, 6
X = np.random.default_rng(5).uniform(0, 1, (3, SIDE, SIDE, 3)).astype(np.float32)


# -- the truth -------------------------------------------------------------------------------------------


def weights(units, bias=0.0):
    """Of the convolution and of the dense layer, by Keras' shapes."""
    rng = np.random.default_rng(11)
    drawn = [rng.normal(0, 0.5, (3, 3, 3, FEATURES)), rng.normal(0, 0.2, FEATURES)]
    drawn += [rng.normal(0, 1.5, (FEATURES, units)), rng.normal(0, 0.5, units) + bias]
    return [array.astype(np.float32) for array in drawn]


def scores(x, units, bias=0.0):
    """z `(n, units)` float64."""
    kernel, shift, dense, last = (array.astype(np.float64) for array in weights(units, bias))
    size = x.shape[1] - 2
    maps = np.zeros((len(x), size, size, FEATURES))
    for row, column in np.ndindex(size, size):
        maps[:, row, column] = np.einsum("nijc,ijck->nk", x[:, row : row + 3, column : column + 3], kernel) + shift
    return np.tanh(maps).mean(axis=(1, 2)) @ dense + last


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def hard(z):
    return np.clip(z / 6 + 0.5, 0, 1)


def log_softmax(z):
    return np.log(softmax(z))


def same(z):
    return z


def both(values):
    """Of one unit, the class that it is not, and the one that it is."""
    return lambda z: np.concatenate([1 - values(z), values(z)], axis=-1)


def signs(z):
    return np.concatenate([-z, z], axis=-1)


# What a head should be: its word in the provenance, the logits for z, the probabilities for z (None: there are none).
SOFTMAX = ("softmax", same, softmax)
SIGMOIDS = ("sigmoid", same, sigmoid)
ONE_SIGMOID = ("sigmoid", signs, both(sigmoid))
HARD = ("hard_sigmoid", same, hard)
LOG_P = ("softmax_output", log_softmax, softmax)
LOGITS = ("logits", same, softmax)
SIGMOID_LOGITS = ("sigmoid_logits", same, sigmoid)
ONE_SIGMOID_LOGIT = ("sigmoid_logits", signs, both(sigmoid))


def value(function=same):
    """The output is explained as it is."""
    return ("linear", function, None)


# -- Keras -----------------------------------------------------------------------------------------------


def keras_heads():
    """By name: what follows z, the number of units, the bias of z, the user's option, and what the head should be."""
    import keras
    from keras import layers, ops

    backend = keras.backend.backend()
    library = {"tensorflow": lambda: __import__("tensorflow").nn, "jax": lambda: __import__("jax").nn}
    nn = library.get(backend, lambda: __import__("torch").nn.functional)()
    keras_softmax = layers.Softmax

    def twice(z):
        return layers.Average()([layers.Softmax(name="one")(z), layers.Softmax(name="two")(2 * z)])

    def shifted(z):
        e = ops.exp(z - ops.max(z, axis=-1, keepdims=True))
        return e / ops.sum(e, axis=-1, keepdims=True)

    def by_hand(z):
        e = ops.exp(z)
        return e / ops.sum(e, axis=-1, keepdims=True)

    def two(z):
        return (softmax(z) + softmax(2 * z)) / 2

    return {
        # the graph ends linear: an option says what logits mean
        "linear, one unit": (same, 1, 0, None, value()),
        "linear": (same, 3, 0, None, value()),
        "logit": (same, 1, 0.2, "sigmoid", ONE_SIGMOID_LOGIT),
        "small logit": (lambda z: 0.01 * z, 1, 30, "sigmoid", scaled(ONE_SIGMOID_LOGIT, 0.01)),
        "logits": (same, 3, 0, "softmax", LOGITS),
        "many logits": (same, 3, 0, "sigmoid", SIGMOID_LOGITS),
        # the graph shows another last step
        "relu": (layers.ReLU(), 1, 1, None, value(lambda z: np.maximum(z, 0))),
        "clip": (lambda z: ops.clip(z, 0.0, 1.0), 1, 0.5, None, value(lambda z: np.clip(z, 0, 1))),
        "sqrt": (lambda z: ops.sqrt(ops.abs(z)), 1, 0.3, None, value(lambda z: np.sqrt(np.abs(z)))),
        "tanh": (layers.Activation("tanh"), 2, 0, None, value(np.tanh)),
        "unit length": (layers.UnitNormalization(), 3, 0, None, value(unit_length)),
        "scaled sigmoid": (lambda z: layers.Rescaling(100.0)(ops.sigmoid(z)), 1, 0, None, value(percent)),
        "rounded": (lambda z: ops.square(ops.sin(z)), 1, 0, None, value(lambda z: np.sin(z) ** 2)),
        # a softmax
        "softmax": (layers.Activation("softmax"), 4, 0, None, SOFTMAX),
        "softmax layer, axis": (keras_softmax(axis=1), 4, 0, None, SOFTMAX),
        "ops.softmax": (ops.softmax, 4, 0, None, SOFTMAX),
        "temperature": (lambda z: ops.softmax(z / 2.5), 4, 0, None, scaled(SOFTMAX, 1 / 2.5)),
        "by hand": (by_hand, 4, 0, None, SOFTMAX),
        "by hand, less the highest": (shifted, 4, 0, None, SOFTMAX),
        "the library's": (layers.Activation(nn.softmax), 4, 0, None, SOFTMAX),
        "the library's in a Lambda": (layers.Lambda(nn.softmax, output_shape=(4,)), 4, 0, None, SOFTMAX),
        "own code": (layers.Lambda(lambda z: nn.softmax(z), output_shape=(4,)), 4, 0, None, LOG_P),
        "log softmax": (layers.Activation("log_softmax"), 4, 0, None, SOFTMAX),
        "ops.log_softmax": (ops.log_softmax, 4, 0, None, SOFTMAX),
        "log of softmax": (lambda z: ops.log(ops.softmax(z)), 4, 0, None, SOFTMAX),
        "log softmax by hand": (lambda z: z - ops.logsumexp(z, axis=-1, keepdims=True), 4, 0, None, SOFTMAX),
        "dropout after": (lambda z: layers.Dropout(0.3)(ops.softmax(z)), 4, 0, None, SOFTMAX),
        "reshape after": (lambda z: layers.Reshape((4,))(layers.Softmax()(z)), 4, 0, None, SOFTMAX),
        "flatten after": (lambda z: layers.Flatten()(layers.Softmax()(layers.Reshape((1, 4))(z))), 4, 0, None, SOFTMAX),
        "cast after": (lambda z: ops.cast(ops.cast(ops.softmax(z), "float64"), "float32"), 4, 0, None, SOFTMAX),
        "clip after": (lambda z: ops.clip(ops.softmax(z), 1e-7, 1 - 1e-7), 4, 0, None, SOFTMAX),
        "mean of two": (twice, 3, 0, None, ("softmax_output", lambda z: np.log(two(z)), two)),
        "softmax, taken as it is": (ops.softmax, 4, 0, "linear", value(softmax)),
        # a sigmoid
        "sigmoid": (layers.Activation("sigmoid", dtype="float32"), 1, 0, None, ONE_SIGMOID),
        "sigmoids": (ops.sigmoid, 3, 0, None, SIGMOIDS),
        "squeezed": (lambda z: ops.squeeze(ops.sigmoid(z), -1), 1, 0, None, ONE_SIGMOID),
        "log sigmoid": (layers.Activation("log_sigmoid"), 3, 0, None, SIGMOIDS),
        "sigmoid by hand": (lambda z: 1.0 / (1.0 + ops.exp(-z)), 1, 0, None, ONE_SIGMOID),
        "hard sigmoid": (layers.Activation("hard_sigmoid"), 3, 0, None, HARD),
        "ops.hard_sigmoid": (ops.hard_sigmoid, 3, 0, None, HARD),
        "the graph decides": (ops.sigmoid, 3, 0, "softmax", SIGMOIDS),
    }


FUSED = {"softmax": SOFTMAX, "log_softmax": SOFTMAX, "sigmoid": SIGMOIDS, "hard_sigmoid": HARD, "tanh": value(np.tanh)}


def keras_model(follow, units, bias, activation=None):
    import keras
    from keras import layers

    image = layers.Input((SIDE, SIDE, 3))
    conv, dense = layers.Conv2D(FEATURES, 3, activation="tanh"), layers.Dense(units, activation=activation)
    z = dense(layers.GlobalAveragePooling2D()(conv(image)))
    model = keras.Model(image, z if follow is same else follow(z))
    kernel, shift, last, end = weights(units, bias)
    conv.set_weights([kernel, shift])
    dense.set_weights([last, end])
    return model


def unit_length(z):
    return z / np.sqrt((z**2).sum(axis=-1, keepdims=True))


def percent(z):
    return 100 * sigmoid(z)


def scaled(head, factor):
    """The same head of z times a factor."""
    kind, logits, probabilities = head
    return kind, lambda z: logits(factor * z), lambda z: probabilities(factor * z)


# -- PyTorch ---------------------------------------------------------------------------------------------


def torch_heads():
    """See `keras_heads`."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def by_hand(z):
        e = torch.exp(z - z.max(dim=1, keepdim=True).values)
        return e / e.sum(dim=1, keepdim=True)

    return {
        "linear, one unit": (same, 1, 0, None, value()),
        "linear": (same, 3, 0, None, LOGITS),
        "logit": (same, 1, 0.2, "sigmoid", ONE_SIGMOID_LOGIT),
        "many logits": (same, 3, 0, "sigmoid", SIGMOID_LOGITS),
        "values": (same, 3, 0, "linear", value()),
        "relu": (torch.relu, 1, 1, None, value(lambda z: np.maximum(z, 0))),
        "clamp": (lambda z: z.clamp(0, 1), 1, 0.5, None, value(lambda z: np.clip(z, 0, 1))),
        "sqrt": (lambda z: z.abs().sqrt(), 1, 0.3, None, value(lambda z: np.sqrt(np.abs(z)))),
        "unit length": (lambda z: F.normalize(z, dim=1), 3, 0, None, value(unit_length)),
        "scaled sigmoid": (lambda z: 100 * torch.sigmoid(z), 1, 0, None, value(percent)),
        "softmax": (lambda z: F.softmax(z, dim=1), 4, 0, None, SOFTMAX),
        "softmax, last axis": (lambda z: z.softmax(-1), 4, 0, None, SOFTMAX),
        "module": (nn.Softmax(dim=-1), 4, 0, None, SOFTMAX),
        "temperature": (lambda z: torch.softmax(z / 2.5, 1), 4, 0, None, scaled(SOFTMAX, 1 / 2.5)),
        "by hand": (by_hand, 4, 0, None, SOFTMAX),
        "log softmax": (lambda z: torch.log_softmax(z, 1), 4, 0, None, SOFTMAX),
        "log softmax module": (nn.LogSoftmax(dim=1), 4, 0, None, SOFTMAX),
        "log of softmax": (lambda z: torch.softmax(z, 1).log(), 4, 0, None, SOFTMAX),
        "log softmax by hand": (lambda z: z - torch.logsumexp(z, 1, keepdim=True), 4, 0, None, SOFTMAX),
        "dropout after": (nn.Sequential(nn.Softmax(dim=1), nn.Dropout(0.3)), 4, 0, None, SOFTMAX),
        "reshape after": (lambda z: torch.softmax(z, 1).reshape(-1, 4), 4, 0, None, SOFTMAX),
        "places after": (lambda z: torch.softmax(z[:, :, None, None], 1).flatten(1), 4, 0, None, SOFTMAX),
        "cast after": (lambda z: torch.softmax(z, 1).double().float(), 4, 0, None, SOFTMAX),
        "clamp after": (lambda z: z.softmax(-1).clamp(1e-6, 1), 4, 0, None, SOFTMAX),
        "clamp before": (lambda z: z.clamp(min=0).softmax(-1), 4, 0, None, ramp(SOFTMAX)),
        "one of two": (lambda z: torch.softmax(z, 1)[:, 1], 2, 0, None, value(lambda z: softmax(z)[:, 1:])),
        "sigmoid": (nn.Sigmoid(), 1, 0, None, ONE_SIGMOID),
        "sigmoids": (torch.sigmoid, 3, 0, None, SIGMOIDS),
        "squeezed": (lambda z: torch.sigmoid(z).squeeze(-1), 1, 0, None, ONE_SIGMOID),
        "squeezed logit": (lambda z: z.squeeze(1), 1, 0, "sigmoid", ONE_SIGMOID_LOGIT),
        "log sigmoid": (F.logsigmoid, 3, 0, None, SIGMOIDS),
        "sigmoid by hand": (lambda z: 1 / (1 + torch.exp(-z)), 1, 0, None, ONE_SIGMOID),
        "hard sigmoid": (nn.Hardsigmoid(), 3, 0, None, HARD),
        "the graph decides": (torch.sigmoid, 3, 0, "softmax", SIGMOIDS),
    }


def ramp(head):
    """The same head of the positive part of z."""
    kind, logits, probabilities = head
    return kind, lambda z: logits(np.maximum(z, 0)), lambda z: probabilities(np.maximum(z, 0))


def torch_module(follow, units, bias):
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dense = nn.Conv2d(3, FEATURES, 3), nn.Linear(FEATURES, units)
            self.follow = follow if isinstance(follow, nn.Module) else None

        def forward(self, x):
            z = self.dense(torch.tanh(self.conv(x)).mean(dim=(2, 3)))
            return follow(z) if self.follow is None else self.follow(z)

    module = Network().eval()
    kernel, shift, last, end = map(torch.from_numpy, weights(units, bias))
    with torch.no_grad():
        module.conv.weight.copy_(kernel.permute(3, 2, 0, 1))
        module.conv.bias.copy_(shift)
        module.dense.weight.copy_(last.T)
        module.dense.bias.copy_(end)
    return module


# -- the comparison --------------------------------------------------------------------------------------


def assert_head(network, z, expected):
    """The head is the expected one; logits and probabilities are those of z; the logit's gradient is its slope."""
    kind, logits, chances = expected
    assert network.head.describe()["kind"] == kind, network.head.text
    found = network.predict(X)
    np.testing.assert_allclose(found, logits(z), atol=2e-5, rtol=1e-5)
    made = network.head.probabilities(found)
    if chances is None:
        assert made is None
        assert not network.head.guess or kind == "linear"
    else:
        np.testing.assert_allclose(made, chances(z), atol=1e-6, rtol=1e-5)
    assert network.head.classes == found.shape[-1]


def assert_gradient(network, logits, units, bias):
    """The slope of each class's score along a random direction, by central differences of the closed form."""
    direction = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
    step = 1e-4
    ahead, behind = (logits(scores(X.astype(np.float64) + sign * step * direction, units, bias)) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    for number in range(expected.shape[-1]):
        target = Custom(lambda ops, logits, activations, number=number: logits[:, number])
        goal = goal_of(network, target, None, len(X), lambda: None)
        gradients, _ = input_gradients(TraceSpec(network, None, goal.target, len(X)), X, goal.arguments)
        found = (gradients * direction).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(found, expected[:, number], atol=1e-3, rtol=2e-3)


HAS = {name: importlib.util.find_spec(name) is not None for name in ("keras", "torch")}
KERAS_HEADS = keras_heads() if HAS["keras"] else {}
TORCH_HEADS = torch_heads() if HAS["torch"] else {}
# One backend computes all gradients; the others compute those of a few heads.
FIRST = os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"


def checked_head(runtime, make, case, name, folder):
    """The network of a case of `keras_heads` or `torch_heads`, whose head and, where seen, probabilities are right."""
    follow, units, bias, asked, expected = case
    model = make(follow, units, bias)
    network = opened(runtime, model, folder, SIDE, head=asked)
    z = scores(X, units, bias)
    assert_head(network, z, expected)
    if network.head.activation and not network.head.returns_logits and "log" not in name:
        own = returned(model, X).reshape(len(X), -1)
        np.testing.assert_allclose(own, expected[2](z)[:, -units:], atol=1e-5)
    return network


@pytest.mark.skipif(not HAS["keras"], reason="keras is not installed")
@pytest.mark.parametrize("name", KERAS_HEADS)
def test_a_head_of_keras(name, tmp_path):
    _, units, bias, _, expected = KERAS_HEADS[name]
    network = checked_head("keras", keras_model, KERAS_HEADS[name], name, tmp_path)
    if FIRST or name in ("by hand, less the highest", "sigmoid by hand", "hard sigmoid"):
        assert_gradient(network, expected[1], units, bias)


@pytest.mark.skipif(not HAS["keras"], reason="keras is not installed")
@pytest.mark.parametrize("activation", FUSED)
def test_a_head_in_the_activation_of_a_layer(activation, tmp_path):
    network = opened("keras", keras_model(same, 4, 0, activation), tmp_path, SIDE)
    assert_head(network, scores(X, 4), FUSED[activation])
    assert_gradient(network, FUSED[activation][1], 4, 0)


@pytest.mark.skipif(not HAS["torch"], reason="torch is not installed")
@pytest.mark.without_keras
@pytest.mark.parametrize("name", TORCH_HEADS)
def test_a_head_of_torch(name, tmp_path):
    _, units, bias, _, expected = TORCH_HEADS[name]
    network = checked_head("torch", torch_module, TORCH_HEADS[name], name, tmp_path)
    assert_gradient(network, expected[1], units, bias)


IN_FILES = ("linear", "softmax", "module", "temperature", "by hand", "log softmax", "log softmax module")
IN_FILES += ("clamp after", "relu", "clamp", "scaled sigmoid", "squeezed", "hard sigmoid", "sigmoids")


@pytest.mark.without_keras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_FILES)
@pytest.mark.parametrize("runtime", runtimes(*OF_TORCH[1:]))
def test_a_head_in_a_file_of_torch(runtime, name, tmp_path):
    follow, units, bias, asked, expected = TORCH_HEADS[name]
    network = opened(runtime, torch_module(follow, units, bias), tmp_path, SIDE, head=asked)
    assert_head(network, scores(X, units, bias), expected)
    assert_gradient(network, expected[1], units, bias)


# Nothing inside a SavedModel is seen, so the output's values tell.
OPAQUE = {
    "softmax": ("softmax", 4, 0, None, LOG_P),
    "sigmoids": ("sigmoid", 3, 0, None, ("sigmoid_output", same, sigmoid)),
    "logits": (None, 3, 0, None, value()),
    "logits, said": (None, 3, 0, "softmax", LOGITS),
    "logit, said": (None, 1, 0.2, "sigmoid", ONE_SIGMOID_LOGIT),
    "softmax, said": ("softmax", 4, 0, "softmax", LOG_P),
    "softmax, taken as it is": ("softmax", 4, 0, "linear", value(softmax)),
}


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.parametrize("runtime", runtimes("saved_model"))
def test_a_head_in_a_saved_model(runtime, name, tmp_path):
    activation, units, bias, asked, expected = OPAQUE[name]
    network = opened(runtime, keras_model(same, units, bias, activation), tmp_path, SIDE, head=asked)
    assert_head(network, scores(X, units, bias), expected)
