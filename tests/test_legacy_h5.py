"""Old Keras files: each format is written here with h5py and read back, against a forward pass in NumPy."""

import contextlib
import copy
import functools
import json
import marshal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")

from assets import ASSETS, needs_assets  # noqa: E402
from PIL import Image  # noqa: E402

from convscope.errors import ModelError  # noqa: E402
from convscope.networks.formats.files import sniff  # noqa: E402
from convscope.networks.formats.hdf5 import is_hdf5  # noqa: E402
from convscope.networks.formats.keras.legacy_h5 import files as legacy_h5  # noqa: E402
from convscope.networks.formats.keras.legacy_h5.migrations.table import MIGRATIONS  # noqa: E402


def read(path, trust=False):
    return legacy_h5.read(sniff(path), trust)


# ------------------------------------------------------------------------------------------------------------
# A forward pass in NumPy, straight from the definitions.


def conv(x, kernel, bias=0.0, padding="valid"):
    """(n,h,w,c) correlated with (kh,kw,c,f), stride 1."""
    kh, kw = kernel.shape[:2]
    if padding == "same":
        x = np.pad(x, ((0, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2), (0, 0)))
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    terms = [x[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(kh) for j in range(kw)]
    return sum(terms) + bias


def depthwise(x, kernel):
    """Each channel with its own kernels, (kh,kw,c,m), "valid"."""
    channels, multiplier = kernel.shape[2:]
    parts = [conv(x[..., channel : channel + 1], kernel[:, :, channel : channel + 1, :]) for channel in range(channels)]
    return np.stack(parts, axis=-2).reshape(*parts[0].shape[:3], channels * multiplier)


def convolved(x, kernel, bias=0.0):
    """A convolution as Theano and mathematics mean it: kernel turned round."""
    return conv(x, kernel[::-1, ::-1], bias)


def norm(x, gamma, beta, mean, variance, epsilon=1e-3):
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def pool(x):
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def relu(x):
    return np.maximum(x, 0)


def flat(x):
    return x.reshape(len(x), -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------------------------------------------------
# Configs as old versions of Keras wrote them.

GLOROT = {
    "class_name": "VarianceScaling",
    "config": {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None},
}
ZEROS = {"class_name": "Zeros", "config": {}}


def layer(class_name, name, **config):
    return {"class_name": class_name, "config": {"name": name, "trainable": True, **config}}


def weighted(class_name, name, **config):
    """What Conv2D and Dense have in common."""
    usual = {
        "use_bias": True,
        "activation": "linear",
        "kernel_initializer": GLOROT,
        "bias_initializer": ZEROS,
    }
    none = (
        "kernel_regularizer",
        "bias_regularizer",
        "activity_regularizer",
        "kernel_constraint",
        "bias_constraint",
    )
    return copy.deepcopy(layer(class_name, name, **{**usual, **dict.fromkeys(none), **config}))


def _with(node, **config):
    return {**node, "config": {**node["config"], **config}}


def conv2d(name, filters, size=3, **config):
    shared = {"strides": [1, 1], "padding": "valid", "data_format": "channels_last", "dilation_rate": [1, 1]}
    return weighted("Conv2D", name, filters=filters, kernel_size=[size, size], **{**shared, **config})


def dense(name, units, **config):
    return weighted("Dense", name, units=units, **config)


def batch_norm(name, **config):
    return layer("BatchNormalization", name, axis=-1, momentum=0.99, epsilon=0.001, center=True, scale=True, **config)


def input_layer(name, shape):
    return layer("InputLayer", name, batch_input_shape=[None, *shape], dtype="float32", sparse=False) | {"name": name}


def node(item, *inputs):
    """The layer in a functional model, called on "name", ("name", node) or ("name", node, keywords)."""
    calls = [(entry, 0, {}) if isinstance(entry, str) else (*entry, {})[:3] for entry in inputs]
    inbound = [[[name, index, 0, keywords] for name, index, keywords in calls]] if calls else []
    return {**item, "name": item["config"]["name"], "inbound_nodes": inbound}


def model(name, layers, inputs, outputs, class_name="Model"):
    tensors = {
        "input_layers": [[item, 0, 0] for item in inputs],
        "output_layers": [[*item, 0] for item in outputs],
    }
    return {"class_name": class_name, "config": {"name": name, "layers": layers, **tensors}}


def sequential(name, *layers):
    return {"class_name": "Sequential", "config": {"name": name, "layers": list(layers)}}


def arrays(*shapes, seed=0):
    """Values for weights; vectors are positive, so that they can be variances too."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.1 if len(shape) == 1 else -1, 1, shape).astype("float32") for shape in shapes]


def images(*shape, seed=9):
    return np.random.default_rng(seed).uniform(-1, 1, (3, *shape)).astype("float32")


@dataclass
class Sample:
    """A file to write and what the model in it answers.

    `weights` maps each layer, in the order of the file, to its datasets in the order of the file.
    """

    version: str
    config: dict
    weights: dict
    x: np.ndarray
    expected: np.ndarray
    said: tuple = ()
    backend: str = "tensorflow"
    top: dict = field(default_factory=dict)


def write(path, sample):
    """Write `sample` as Keras wrote its HDF5 files, with an optimizer beside the model."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = sample.version.encode()
        if sample.backend:
            file.attrs["backend"] = sample.backend.encode()
        file.attrs["model_config"] = json.dumps(sample.config).encode()
        file.attrs["training_config"] = json.dumps({"loss": "mse"}).encode()
        file["optimizer_weights/training/Adam/iterations:0"] = np.int64(3)
        top = file.create_group("model_weights")
        top.attrs["layer_names"] = [name.encode() for name in sample.weights]
        for name, weights in sample.weights.items():
            group = top.require_group(name)  # conv1 may be there for the sake of conv1/bn
            group.attrs["weight_names"] = [key.encode() for key in weights]
            for key, value in weights.items():
                group[key] = value
        for key, value in sample.top.items():
            top[key] = value
    return path


def written(tmp_path, sample, name="model.h5"):
    return write(tmp_path / name, sample)


def answers(network, x):
    return keras.ops.convert_to_numpy(network(x, training=False))


def check(opened, sample, tolerance=2e-5):
    got = answers(opened.model, sample.x)
    assert got.shape == sample.expected.shape
    np.testing.assert_allclose(got, sample.expected, rtol=tolerance, atol=tolerance * np.abs(sample.expected).max())


# ------------------------------------------------------------------------------------------------------------
# Samples. Between them they use every migration; `said` names words of the migrations that have to show.

SAMPLES = {}


def sample(function):
    SAMPLES[function.__name__] = function
    return function


def two_convs(version, layers_of, said, scope="{}"):
    """conv_a, pool, conv_b (both kernels alike in shape), flatten, dense; NumPy beside it."""
    k1, b1, k2, b2, k3, b3 = arrays((3, 3, 4, 4), (4,), (3, 3, 4, 4), (4,), (36, 2), (2,))
    x = images(12, 12, 4)
    hidden = relu(conv(pool(relu(conv(x, k1, b1))), k2, b2))
    expected = sigmoid((flat(hidden) @ k3 + b3) / 50)
    a, b, c = (scope.format(name) for name in ("conv_a", "conv_b", "dense"))
    weights = {
        "conv_a": {f"{a}/kernel:0": k1, f"{a}/bias:0": b1},
        "pool": {},
        "conv_b": {f"{b}/kernel:0": k2, f"{b}/bias:0": b2},
        "flatten": {},
        "dropout": {},
        "dense": {f"{c}/kernel:0": k3 / 50, f"{c}/bias:0": b3 / 50},
    }
    return Sample(version, layers_of(first=[None, 12, 12, 4]), weights, x, expected, said)


def stack(first=None, **more):
    """The layers of `two_convs`, the shape of the input in the first one."""
    given = {"batch_input_shape": first} if first else {}
    return [
        conv2d("conv_a", 4, activation="relu", **given, **more),
        layer(
            "MaxPooling2D",
            "pool",
            pool_size=[2, 2],
            strides=[2, 2],
            padding="valid",
            data_format="channels_last",
        ),
        conv2d("conv_b", 4, activation="relu", **more),
        layer("Flatten", "flatten", data_format="channels_last"),
        layer("Dropout", "dropout", rate=0.5, noise_shape=None, seed=None),
        dense("dense", 2, activation="sigmoid"),
    ]


@sample
def list_config_216():
    def config(first):
        return {"class_name": "Sequential", "config": stack(first, dtype="float32")}

    return two_convs("2.1.6", config, ("list of layers", "InputLayer"))


@sample
def first_layer_shape_224():
    return two_convs("2.2.4", lambda first: sequential("net", *stack(first)), ("InputLayer",))


@sample
def input_layer_210():
    def config(first):
        given = input_layer("conv_a_input", first[1:])
        given["config"]["ragged"] = False
        return sequential("net", given, *stack(first, groups=1))

    return two_convs("2.10.0", config, ("batch_input_shape",))


@sample
def modules_and_policies_213():
    """tf.keras 2.13 gave inner objects modules, registered names and build configs."""
    policy = {"class_name": "Policy", "config": {"name": "float32"}, "module": "keras.mixed_precision"}

    def config(first):
        layers = [input_layer("given", first[1:]), *stack(groups=1, dtype=policy)]
        for item in layers:
            module = {"module": "keras.src.layers.elsewhere", "registered_name": None}
            item.update(module, build_config={"input_shape": first}, shared_object_id=3)
        return sequential("net", *layers)

    return two_convs("2.13.1", config, ("policies",))


@sample
def initializers_of_tf_1():
    old = {"class_name": "GlorotUniform", "config": {"seed": None, "dtype": "float32"}}

    def config(first):
        return sequential("net", *stack(first, kernel_initializer=old))

    return two_convs("2.2.4-tf", config, ("dtype of initializers",))


@sample
def functional_205():
    """Nested-list nodes, class `Model`, scopes numbered a second time, two branches added."""
    k1, k2, b2 = arrays((3, 3, 2, 3), (1, 1, 3, 3), (3,))
    gamma, beta, mean, variance = arrays((3,), (3,), (3,), (3,), seed=4)
    layers = [
        node(input_layer("input_1", (6, 6, 2))),
        node(conv2d("conv2d_1", 3, use_bias=False), "input_1"),
        node(batch_norm("batch_normalization_1"), "conv2d_1"),
        node(conv2d("conv2d_2", 3, size=1), "batch_normalization_1"),
        node(layer("Add", "add_1"), "conv2d_2", "batch_normalization_1"),
    ]
    x = images(6, 6, 2)
    hidden = norm(conv(x, k1), gamma, beta, mean, variance)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    values = (gamma, beta, mean, variance)
    weights = {
        "input_1": {},
        "conv2d_1": {"conv2d_1_1/kernel:0": k1},
        "batch_normalization_1": {
            f"batch_normalization_1_1/{name}:0": value for name, value in zip(names, values, strict=True)
        },
        "conv2d_2": {"conv2d_2_1/kernel:0": k2, "conv2d_2_1/bias:0": b2},
        "add_1": {},
    }
    config = model("model_1", layers, ["input_1"], [("add_1", 0)])
    return Sample("2.0.5", config, weights, x, conv(hidden, k2, b2) + hidden, ("out of its list",))


@sample
def separable_and_depthwise():
    """Arguments that Keras 3 refuses; an axis in a list; depthwise_kernel is kernel today."""
    depth, point, bias, alone, alone_bias = arrays((3, 3, 2, 2), (1, 1, 4, 3), (3,), (3, 3, 3, 1), (3,))
    gamma, beta, mean, variance = arrays((3,), (3,), (3,), (3,), seed=4)
    separable = conv2d("separable", 3, depth_multiplier=2, groups=1, depthwise_initializer=GLOROT)
    separable["config"].update(pointwise_initializer=GLOROT)
    alone_layer = conv2d("alone", 3, groups=1, depth_multiplier=1, depthwise_initializer=GLOROT)
    for key in ("filters", "kernel_initializer", "kernel_regularizer", "kernel_constraint"):
        del alone_layer["config"][key]
    layers = [
        input_layer("given", (8, 8, 2)),
        {**separable, "class_name": "SeparableConv2D"},
        batch_norm("bn") | {"config": {**batch_norm("bn")["config"], "axis": [3]}},
        layer("SpatialDropout2D", "drop", rate=0.5, noise_shape=None, seed=None),
        {**alone_layer, "class_name": "DepthwiseConv2D"},
    ]
    x = images(8, 8, 2)
    hidden = norm(depthwise(x, depth) @ point[0, 0] + bias, gamma, beta, mean, variance)
    weights = {
        "separable": {
            "separable_1/depthwise_kernel:0": depth,
            "separable_1/pointwise_kernel:0": point,
            "separable_1/bias:0": bias,
        },
        "bn": {
            "bn_1/gamma:0": gamma, "bn_1/beta:0": beta,
            "bn_1/moving_mean:0": mean, "bn_1/moving_variance:0": variance,
        },
        "drop": {},
        "alone": {"alone_1/depthwise_kernel:0": alone, "alone_1/bias:0": alone_bias},
    }  # fmt: skip
    expected = depthwise(hidden, alone) + alone_bias
    return Sample("2.9.0", sequential("net", *layers), weights, x, expected, ("arguments that Keras 3", "axis"))


def inner_model(kind, name="inner"):
    """Two convolutions of the same shape, as a functional model or a Sequential."""
    first, second = conv2d("conv_1", 2, padding="same"), conv2d("conv_2", 2, padding="same")
    if kind == "Sequential":
        return sequential(name, _with(first, batch_input_shape=[None, 5, 5, 2]), second)
    layers = [node(input_layer("inside", (5, 5, 2))), node(first, "inside"), node(second, "conv_1")]
    return model(name, layers, ["inside"], [("conv_2", 0)])


def inner_weights(scope="", a="conv_1", b="conv_2"):
    k1, b1, k2, b2 = arrays((3, 3, 2, 2), (2,), (3, 3, 2, 2), (2,), seed=5)
    datasets = {
        f"{scope}{a}/kernel:0": k1, f"{scope}{a}/bias:0": b1,
        f"{scope}{b}/kernel:0": k2, f"{scope}{b}/bias:0": b2,
    }  # fmt: skip

    def forward(x):
        return conv(conv(x, k1, b1, "same"), k2, b2, "same")

    return datasets, forward


@sample
def model_in_sequential():
    datasets, forward = inner_weights()
    kernel, bias = arrays((50, 2), (2,))
    x = images(5, 5, 2)
    config = sequential("net", inner_model("Model"), layer("Flatten", "flatten"), dense("dense", 2))
    weights = {"inner": datasets, "flatten": {}, "dense": {"dense/kernel:0": kernel, "dense/bias:0": bias}}
    return Sample("2.3.1", config, weights, x, flat(forward(x)) @ kernel + bias)


def twice(kind):
    """A nested model called twice, the second time on its own output, and being the output of the whole."""
    datasets, forward = inner_weights(scope="inner/")
    inside = {**inner_model(kind), "name": "inner"}
    inside["inbound_nodes"] = [[["given", 0, 0, {}]], [["inner", 1, 0, {"training": False}]]]
    x = images(5, 5, 2)
    config = model("outer", [node(input_layer("given", (5, 5, 2))), inside], ["given"], [("inner", 2)])
    return Sample("2.4.0", config, {"given": {}, "inner": datasets}, x, forward(forward(x)), ("counted from 0",))


@sample
def model_in_model():
    return twice("Model")


@sample
def sequential_in_model():
    return twice("Sequential")


@sample
def nameless_sequential_216():
    """In a list config a nested Sequential has no name: only the groups of weights know it."""
    datasets, forward = inner_weights()
    other = {key: value * 0.5 for key, value in datasets.items()}
    halves = list(other.values())

    def half(x):
        return conv(conv(x, *halves[:2], "same"), *halves[2:], "same")

    nested = [{"class_name": "Sequential", "config": inner_model("Sequential")["config"]["layers"]} for _ in "ab"]
    config = {"class_name": "Sequential", "config": nested}
    x = images(5, 5, 2)
    weights = {"sequential_7": datasets, "sequential_3": other}
    return Sample("2.1.6", config, weights, x, half(forward(x)), ("names of nested Sequentials",))


@sample
def names_with_slashes():
    """DenseNet's layers were called conv1/bn; one layer is even the prefix of another."""
    k1, k2, k3 = arrays((1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 2))
    layers = [
        node(input_layer("given", (4, 4, 2))),
        node(conv2d("block/a", 2, size=1, use_bias=False), "given"),
        node(conv2d("block", 2, size=1, use_bias=False), "block/a"),
        node(conv2d("block/b", 2, size=1, use_bias=False), "block"),
    ]
    x = images(4, 4, 2)
    weights = {
        "block/a": {"block/a/kernel:0": k1},
        "block": {"block/kernel:0": k2},
        "block/b": {"block/b/kernel:0": k3},
    }
    config = model("net", layers, ["given"], [("block/b", 0)], "Functional")
    return Sample("2.6.0", config, weights, x, conv(conv(conv(x, k1), k2), k3), ('"/" in layer names',))


@sample
def nested_names_with_slashes():
    datasets, forward = inner_weights(a="conv1/one", b="conv1/two")
    inside = json.loads(json.dumps(inner_model("Model")).replace("conv_1", "conv1/one").replace("conv_2", "conv1/two"))
    x = images(5, 5, 2)
    return Sample("2.6.0", sequential("net", inside), {"inner": datasets}, x, forward(x))


@sample
def tensorflow_operations():
    """`relu(x / 127.5 - 1)` in a functional model of tf.keras 2.6."""
    (kernel,) = arrays((1, 1, 3, 2))

    def operation(name, function, before, **keywords):
        item = layer("TFOpLambda", name, dtype="float32", function=function)
        return {**item, "name": name, "inbound_nodes": [[before, 0, 0, {**keywords, "name": None}]]}

    layers = [
        node(input_layer("given", (4, 4, 3))),
        operation("tf.math.truediv", "math.truediv", "given", y=127.5),
        operation("tf.math.subtract", "math.subtract", "tf.math.truediv", y=1.0),
        operation("tf.nn.relu", "nn.relu", "tf.math.subtract"),
        node(conv2d("conv", 2, size=1, use_bias=False), "tf.nn.relu"),
    ]
    x = 255 * np.abs(images(4, 4, 3))
    config = model("net", layers, ["given"], [("conv", 0)], "Functional")
    expected = conv(relu(x / 127.5 - 1), kernel)
    return Sample("2.6.0", config, {"conv": {"conv/kernel:0": kernel}}, x, expected, ("TensorFlow operations",))


@sample
def functions_of_keras_applications():
    """`Lambda(vgg16.preprocess_input)`: Keras 2 stored the module of the function beside its name."""
    (kernel,) = arrays((1, 1, 3, 2))
    stored = {"function_type": "function", "module": "keras.applications.vgg16", "arguments": {}}
    shape = {"output_shape": None, "output_shape_type": "raw", "output_shape_module": None}
    layers = [
        layer("Lambda", "prepare", function="preprocess_input", batch_input_shape=[None, 4, 4, 3], **stored, **shape),
        conv2d("conv", 2, size=1, use_bias=False),
    ]
    x = 255 * np.abs(images(4, 4, 3))
    expected = conv(x[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32), kernel)
    weights = {"prepare": {}, "conv": {"conv/kernel:0": kernel}}
    return Sample("2.6.0", sequential("net", *layers), weights, x, expected, ("'prepare' is that of keras",))


@sample
def activations_and_classes():
    """hard_sigmoid had another slope, LeakyReLU another argument; ThresholdedReLU, RandomHeight are gone."""
    (kernel,) = arrays((1, 1, 2, 3))
    cap = layer("ReLU", "cap", max_value=0.9, negative_slope=1.0, threshold=0.0)  # a layer as an activation
    layers = [
        conv2d("conv", 3, size=1, use_bias=False, activation=cap, batch_input_shape=[None, 4, 4, 2]),
        layer("RandomHeight", "grow", factor=0.2, interpolation="bilinear", seed=None),
        layer("LeakyReLU", "leaky", alpha=0.25),
        layer("ThresholdedReLU", "thresholded", theta=0.1),
        layer("Activation", "hard", activation="hard_sigmoid"),
        layer("Activation", "soft", activation="softmax_v2"),
    ]
    x = images(4, 4, 2)
    y = np.minimum(conv(x, kernel), 0.9)
    y = np.where(y > 0, y, 0.25 * y)
    y = np.clip(0.2 * np.where(y > 0.1, y, 0) + 0.5, 0, 1)
    expected = np.exp(y) / np.exp(y).sum(axis=-1, keepdims=True)
    said = ("alpha of LeakyReLU", "layer classes of Keras 2", "activations")
    return Sample("2.3.0-tf", sequential("net", *layers), {"conv": {"conv/kernel:0": kernel}}, x, expected, said)


@sample
def wrapped_in_time():
    """A wrapper's layer has no module before 2.12, and its weights bear the wrapper's name alone."""
    kernel, bias = arrays((3, 3, 2, 3), (3,))
    gamma, beta, mean, variance = arrays((3,), (3,), (3,), (3,), seed=4)
    inside = conv2d("inside", 3)
    inside_norm = batch_norm("inside_norm")
    inside_norm["config"]["axis"] = [3]
    layers = [
        layer("TimeDistributed", "each", layer=inside, batch_input_shape=[None, 2, 5, 5, 2]),
        layer("TimeDistributed", "each_norm", layer=inside_norm),
    ]
    x = images(2, 5, 5, 2)
    y = np.stack([conv(x[:, step], kernel, bias) for step in range(2)], axis=1)
    weights = {
        "each": {"each/kernel:0": kernel, "each/bias:0": bias},
        "each_norm": {
            "each_norm/gamma:0": gamma, "each_norm/beta:0": beta,
            "each_norm/moving_mean:0": mean, "each_norm/moving_variance:0": variance,
        },
    }  # fmt: skip
    return Sample("2.3.1", sequential("net", *layers), weights, x, norm(y, gamma, beta, mean, variance), ("axis",))


@sample
def normalization_layers():
    """Normalization computes what it uses from mean, variance and count, which lie in the file."""
    mean, variance = arrays((2,), (2,))
    layers = [
        input_layer("given", (4, 4, 2)),
        layer("Rescaling", "scale", scale=0.5, offset=0.25),
        layer("Normalization", "norm", axis=[-1]),
    ]
    x = images(4, 4, 2)
    datasets = {"norm/mean:0": mean, "norm/variance:0": variance, "norm/count:0": np.int64(7)}
    expected = (0.5 * x + 0.25 - mean) / np.sqrt(variance)
    return Sample("2.6.0", sequential("net", *layers), {"scale": {}, "norm": datasets}, x, expected)


@sample
def gru_of_keras_20():
    """A GRU before `reset_after`; the oracle is a Keras 3 layer with its weights set by hand."""
    kernel, recurrent, bias = arrays((2, 9), (3, 9), (9,))
    old = weighted("GRU", "gru", units=3, recurrent_activation="sigmoid", recurrent_initializer=GLOROT)
    old["config"].update(batch_input_shape=[None, 4, 2], dropout=0.0, recurrent_dropout=0.0, implementation=0)
    x = images(4, 2)
    fresh = keras.layers.GRU(3, reset_after=False, activation="linear", recurrent_activation="sigmoid")
    fresh.build((None, 4, 2))
    fresh.set_weights([kernel, recurrent, bias])
    weights = {"gru": {"gru/kernel:0": kernel, "gru/recurrent_kernel:0": recurrent, "gru/bias:0": bias}}
    expected = keras.ops.convert_to_numpy(fresh(x))
    return Sample("2.0.8", sequential("net", old), weights, x, expected, ("GRU",))


@sample
def attention_by_keyword():
    """A tensor among the keywords; the oracle is a Keras 3 layer with its weights set by hand."""
    shapes = {"query": ((2, 1, 2), (1, 2)), "key": ((2, 1, 2), (1, 2)), "value": ((2, 1, 2), (1, 2))}
    shapes["attention_output"] = ((1, 2, 2), (2,))
    values = {name: arrays(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    attention = layer("MultiHeadAttention", "mha", num_heads=1, key_dim=2, value_dim=2, query_shape=[None, 3, 2])
    layers = [
        node(input_layer("given", (3, 2))),
        node(layer("Permute", "same", dims=[1, 2]), "given"),
        node(attention, ("given", 0, {"value": ["same", 0, 0]})),
    ]
    x = images(3, 2)
    fresh = keras.layers.MultiHeadAttention(1, 2)
    fresh.build((None, 3, 2), (None, 3, 2))
    fresh.set_weights([value for pair in values.values() for value in pair])
    datasets = {
        f"mha/{name}/{kind}:0": value
        for name, pair in values.items()
        for kind, value in zip(("kernel", "bias"), pair, strict=True)
    }
    config = model("net", layers, ["given"], [("mha", 0)], "Functional")
    expected = keras.ops.convert_to_numpy(fresh(x, x))
    return Sample("2.8.0", config, {"mha": datasets}, x, expected, ("given by keyword",))


def convolution_1(name, filters, ordering="tf", **config):
    """Convolution2D as Keras 1.2 wrote it."""
    nothing = dict.fromkeys(("W_constraint", "b_constraint", "b_regularizer", "activity_regularizer"))
    penalty = {"name": "L1L2Regularizer", "l1": 0.0, "l2": 0.01}
    shape = {"nb_filter": filters, "nb_row": 3, "nb_col": 2, "subsample": [1, 1], "border_mode": "valid"}
    rest = {"bias": True, "activation": "relu", "init": "uniform", "W_regularizer": penalty}
    return layer("Convolution2D", name, **nothing, **shape, **rest, **{"dim_ordering": ordering, **config})


def dense_1(name, units, **config):
    rest = {
        "bias": True,
        "activation": "linear",
        "init": "zero",
        "W_regularizer": None,
        "b_regularizer": None,
    }
    return layer("Dense", name, output_dim=units, input_dim=None, **rest, **config)


@sample
def keras_1_tf():
    """Keras 1 on TensorFlow: names, padding of four numbers, dropout, batch norm with a mode."""
    kernel, bias, k2, b2 = arrays((3, 2, 2, 3), (3,), (3 * 4 * 3, 2), (2,))
    gamma, beta, mean, variance = arrays((3,), (3,), (3,), (3,), seed=4)
    layers = [
        layer(
            "ZeroPadding2D",
            "pad",
            padding=[1, 0, 0, 2],
            batch_input_shape=[None, 4, 3, 2],
            input_dtype="float32",
        ),
        convolution_1("conv", 3),
        layer("BatchNormalization", "bn", mode=0, axis=-1, epsilon=1e-5, momentum=0.9, gamma_regularizer=None),
        layer("Dropout", "drop", p=0.5),
        layer("Flatten", "flat"),
        dense_1("dense", 2),
    ]
    x = images(4, 3, 2)
    y = relu(conv(np.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0))), kernel, bias))
    expected = flat(norm(y, gamma, beta, mean, variance, epsilon=1e-5)) @ k2 + b2
    weights = {
        "pad": {},
        "conv": {"conv_W:0": kernel, "conv_b:0": bias},
        "bn": {
            "bn_gamma:0": gamma,
            "bn_beta:0": beta,
            "bn_running_mean:0": mean,
            "bn_running_std:0": variance,
        },
        "drop": {},
        "flat": {},
        "dense": {"dense_W_1:0": k2, "dense_b_1:0": b2},
    }
    said = (
        "layer classes of Keras 1",
        "nb_row",
        "four numbers",
        "regularizers",
        "mode of BatchNormalization",
    )
    config = {"class_name": "Sequential", "config": layers}
    return Sample("1.2.1", config, weights, x, expected, said, backend="")


@sample
def keras_1_theano():
    """Keras 1 with Theano: channels first, kernels (filters, channels, rows, columns), true convolution.

    The width of the maps is not the number of filters: there Keras 3 on TensorFlow adds the bias along the
    width (its `ops.add` takes the last axis for the channels).
    """
    kernel, bias = arrays((3, 2, 2, 4), (4,))
    k2, b2 = arrays((8 * 2 * 3, 2), (2,))
    layers = [
        node(layer("InputLayer", "given", batch_input_shape=[None, 2, 4, 4], input_dtype="float32", sparse=False)),
        node(convolution_1("conv", 4, "th"), "given"),
        node(layer("Merge", "both", mode="concat", concat_axis=1, mode_type="raw"), "conv", "conv"),
        node(layer("Flatten", "flat"), "both"),
        node(dense_1("dense", 2), "flat"),
    ]
    x = images(4, 4, 2)
    y = relu(convolved(x, kernel, bias)).transpose(0, 3, 1, 2)
    expected = flat(np.concatenate([y, y], axis=1)) @ k2 + b2
    weights = {
        "conv": {"conv_W": kernel.transpose(3, 2, 0, 1), "conv_b": bias},
        "dense": {"dense_W": k2, "dense_b": b2},
    }
    config = model("net", layers, ["given"], [("dense", 0)])
    said = ("Merge", "input_dtype", "transposed", "180 degrees")
    return Sample("1.0.8", config, weights, x.transpose(0, 3, 1, 2), expected, said, backend="")


@sample
def keras_2_theano():
    """Keras 2 says which backend wrote the kernels."""
    kernel, bias = arrays((3, 3, 2, 3), (3,))
    x = images(5, 5, 2)
    config = sequential("net", conv2d("conv", 3, batch_input_shape=[None, 5, 5, 2]))
    weights = {"conv": {"conv/kernel:0": kernel, "conv/bias:0": bias}}
    return Sample("2.1.6", config, weights, x, convolved(x, kernel, bias), ("180 degrees",), backend="theano")


@pytest.fixture(scope="module")
def opened_sample(tmp_path_factory):
    """Each sample read once: name to (sample, what was read)."""

    @functools.cache
    def opened(name):
        sample = SAMPLES[name]()
        return sample, read(written(tmp_path_factory.mktemp(name), sample))

    return opened


@pytest.mark.parametrize("name", SAMPLES)
def test_old_format_answers_as_the_definition_says(name, opened_sample):
    sample, opened = opened_sample(name)
    check(opened, sample)
    assert opened.version == sample.version
    for word in sample.said:
        assert any(word in line for line in opened.translated), (word, opened.translated)


def test_every_migration_has_a_sample(opened_sample):
    said = {line for name in SAMPLES for line in opened_sample(name)[1].translated}
    assert {migration.said for migration in MIGRATIONS} - said == set()
    assert all(migration.change.__doc__ for migration in MIGRATIONS)


# ------------------------------------------------------------------------------------------------------------
# Files by content


def test_hdf5_is_told_by_content(tmp_path):
    sample = input_layer_210()
    for name in ("model.keras", "model", "model.zip"):
        path = written(tmp_path, sample, name)
        assert is_hdf5(path)
        check(read(path), sample)
    (tmp_path / "fake.h5").write_bytes(b"PK\x03\x04 not HDF5")
    (tmp_path / "empty.h5").write_bytes(b"")
    assert not any(is_hdf5(tmp_path / name) for name in ("fake.h5", "empty.h5", "absent.h5", "."))


def test_hdf5_behind_a_user_block(tmp_path):
    with h5py.File(tmp_path / "blocked.h5", "w", userblock_size=1024):
        pass
    assert is_hdf5(str(tmp_path / "blocked.h5"))


def test_file_of_keras_3_is_taken_as_it_is(tmp_path):
    inner = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.Conv2D(2, 3, padding="same")], name="inner")
    given = keras.Input((6, 6, 2))
    y = keras.layers.BatchNormalization()(inner(inner(given)))
    y = keras.layers.SeparableConv2D(3, 3, activation="relu")(keras.layers.RandomFlip()(y))
    fresh = keras.Model(given, [y, keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.5, seed=1)(y))])
    fresh.save(tmp_path / "model.h5")
    opened = read(tmp_path / "model.h5")
    assert opened.version == keras.__version__
    assert opened.translated == ()
    x = images(6, 6, 2)
    for got, wanted in zip(opened.model(x, training=False), fresh(x, training=False), strict=True):
        got, wanted = keras.ops.convert_to_numpy(got), keras.ops.convert_to_numpy(wanted)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Weights land by name


def swapped(sample, one, other):
    """The same file with the values of two datasets, given as (layer, name), exchanged."""
    sample = copy.deepcopy(sample)
    (a, b), (c, d) = one, other
    sample.weights[a][b], sample.weights[c][d] = sample.weights[c][d], sample.weights[a][b]
    return sample


def test_swapped_kernels_of_one_shape_change_the_answer(tmp_path):
    sample = first_layer_shape_224()
    after = swapped(sample, ("conv_a", "conv_a/kernel:0"), ("conv_b", "conv_b/kernel:0"))
    a, b, c = (list(after.weights[name].values()) for name in ("conv_a", "conv_b", "dense"))
    after.expected = sigmoid(flat(relu(conv(pool(relu(conv(sample.x, *a))), *b))) @ c[0] + c[1])
    assert np.abs(after.expected - sample.expected).max() > 1e-3
    check(read(written(tmp_path, after)), after)


def test_swapped_kernels_in_a_nested_model_change_the_answer(tmp_path):
    sample = model_in_sequential()
    after = swapped(sample, ("inner", "conv_1/kernel:0"), ("inner", "conv_2/kernel:0"))
    (k1, b1, k2, b2), (k3, b3) = (list(after.weights[name].values()) for name in ("inner", "dense"))
    after.expected = flat(conv(conv(sample.x, k1, b1, "same"), k2, b2, "same")) @ k3 + b3
    assert np.abs(after.expected - sample.expected).max() > 1e-3
    check(read(written(tmp_path, after)), after)


@pytest.mark.parametrize("name", ["first_layer_shape_224", "functional_205", "model_in_sequential", "keras_1_tf"])
def test_order_in_the_file_does_not_matter(name, tmp_path):
    sample = SAMPLES[name]()
    layers = reversed(sample.weights.items())
    sample.weights = {name: dict(reversed(weights.items())) for name, weights in layers}
    opened = read(written(tmp_path, sample))
    check(opened, sample)
    assert not any("order" in line for line in opened.translated)


def test_scopes_of_a_nested_model_numbered_again(tmp_path):
    """conv_1 became conv_1_1, and conv, taken before, became conv_1: names still decide, in any order."""
    datasets, forward = inner_weights(a="conv_1", b="conv_1_1")
    config = json.loads(json.dumps(inner_model("Model")).replace("conv_1", "conv").replace("conv_2", "conv_1"))
    x = images(5, 5, 2)
    reverse = dict(reversed(datasets.items()))
    sample = Sample("2.2.4", sequential("net", config), {"inner": reverse}, x, forward(x))
    opened = read(written(tmp_path, sample))
    check(opened, sample)
    assert not any("order" in line for line in opened.translated)


def test_all_scopes_around_a_nested_model_numbered_again(tmp_path):
    datasets, forward = inner_weights(scope="inner_1/", a="conv_1_1", b="conv_2_1")
    x = images(5, 5, 2)
    reverse = dict(reversed(datasets.items()))
    sample = Sample("2.2.4", sequential("net", inner_model("Model")), {"inner": reverse}, x, forward(x))
    opened = read(written(tmp_path, sample))
    check(opened, sample)
    assert not any("order" in line for line in opened.translated)


def test_numbers_alone_differ_then_the_order_decides_and_is_said(tmp_path):
    datasets, forward = inner_weights(a="conv_17", b="conv_18")
    x = images(5, 5, 2)
    sample = Sample("2.2.4", sequential("net", inner_model("Model")), {"inner": datasets}, x, forward(x))
    opened = read(written(tmp_path, sample))
    check(opened, sample)
    assert any("inner" in line and "order" in line for line in opened.translated)


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [("stem", "head", "inner/stem/kernel:0"), ("conv_7", "conv_1", "inner/conv_7/kernel:0")],
)
def test_order_does_not_decide_against_names(a, b, named, tmp_path):
    """Other names than the model's, or numbers of which one speaks for another place."""
    datasets, forward = inner_weights(a=a, b=b)
    x = images(5, 5, 2)
    sample = Sample("2.2.4", sequential("net", inner_model("Model")), {"inner": datasets}, x, forward(x))
    with pytest.raises(ModelError, match=rf"{named} of the file has no place"):
        read(written(tmp_path, sample))


def test_layer_renamed_after_it_was_built(tmp_path):
    """`layer._name = ...` left the old name before the weights; alone in a layer, their own names suffice."""
    sample = two_convs("2.9.0", lambda first: sequential("net", *stack(first)), (), scope="conv2d_of_{}_9")
    check(read(written(tmp_path, sample)), sample)


# ------------------------------------------------------------------------------------------------------------
# Weights and architecture that do not fit


def failing(tmp_path, sample, **options):
    with pytest.raises(ModelError) as raised:
        read(written(tmp_path, sample), **options)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("model.h5: expected ")
    return str(raised.value)


def test_leftover_dataset(tmp_path):
    sample = first_layer_shape_224()
    sample.weights["conv_a"]["conv_a/scale:0"] = np.ones(4)
    assert "conv_a/conv_a/scale:0 of the file has no place in the model" in failing(tmp_path, sample)


@pytest.mark.parametrize("key", ["stray/kernel:0", "lonely", "top_level_model_weights/counter:0"])
def test_leftover_dataset_of_no_layer(key, tmp_path):
    sample = first_layer_shape_224()
    sample.top[key] = np.ones(4)
    assert f"{key} of the file has no place in the model" in failing(tmp_path, sample)


def test_missing_dataset(tmp_path):
    sample = first_layer_shape_224()
    del sample.weights["conv_b"]["conv_b/bias:0"]
    assert "conv_b/bias of the model is not in the file" in failing(tmp_path, sample)


def test_missing_group(tmp_path):
    sample = first_layer_shape_224()
    del sample.weights["conv_b"]
    message = failing(tmp_path, sample)
    assert "conv_b/kernel of the model is not in the file; conv_b/bias of the model" in message


def test_renamed_dataset_is_missing_and_left_over(tmp_path):
    sample = first_layer_shape_224()
    sample.weights["conv_a"]["conv_a/offset:0"] = sample.weights["conv_a"].pop("conv_a/bias:0")
    message = failing(tmp_path, sample)
    assert "offset:0 of the file has no place" in message
    assert "conv_a/bias of the model is not in the file" in message


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (4, 3, 3, 4), (9, 4, 4), (1,)])
def test_other_shape(shape, tmp_path):
    sample = first_layer_shape_224()
    sample.weights["conv_a"]["conv_a/kernel:0"] = np.ones(shape)
    assert f"conv_a/kernel is {shape} in the file and (3, 3, 4, 4) in the model" in failing(tmp_path, sample)


def test_text_in_place_of_numbers(tmp_path):
    sample = first_layer_shape_224()
    sample.weights["conv_a"]["conv_a/bias:0"] = np.array([b"a", b"b", b"c", b"d"])
    assert "conv_a/bias is no numbers" in failing(tmp_path, sample)


def test_states_of_random_generators_do_not_count(tmp_path):
    sample = first_layer_shape_224()
    sample.weights["dropout"] = {"dropout/StateVar:0": np.zeros(3, "int64")}
    check(read(written(tmp_path, sample)), sample)


def test_weights_of_another_file_are_not_followed(tmp_path):
    sample = first_layer_shape_224()
    kernel = sample.weights["conv_a"].pop("conv_a/kernel:0")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["kernel"] = kernel
    path = written(tmp_path, sample)
    with h5py.File(path, "a") as file:
        file["model_weights/conv_a/conv_a/kernel:0"] = h5py.ExternalLink(tmp_path / "other.h5", "kernel")
    with pytest.raises(ModelError, match="conv_a/kernel of the model is not in the file"):
        read(path)


# ------------------------------------------------------------------------------------------------------------
# Code in the file


def bytecode(marker):
    """A lambda that leaves a marker when it runs, as Keras 1 and 2 stored it."""
    code = compile(f"lambda x: (open({str(marker)!r}, 'w'), x)[1]", "model.py", "eval").co_consts[0]
    return [marshal.dumps(code).decode("latin-1"), None, None]


def places(item):
    """A Lambda at the top, in a wrapper, in a nested model, in a nested Sequential written as a list."""
    given = {"batch_input_shape": [None, 4, 4, 2]}
    inside = [node(input_layer("inside", (4, 4, 2))), node(item, "inside")]
    return {
        "top": sequential("net", _with(item, **given)),
        "wrapper": sequential("net", layer("TimeDistributed", "each", layer=item, **given)),
        "model": sequential("net", model("inner", inside, ["inside"], [("secret", 0)])),
        "list": {"class_name": "Sequential", "config": [{"class_name": "Sequential", "config": [item]}]},
    }


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("version", ["1.2.1", "2.2.4", "3.9.0"])
@pytest.mark.parametrize("where", ["top", "wrapper", "model", "list"])
def test_old_bytecode_is_never_run(where, version, trust, tmp_path):
    marker = tmp_path / "ran"
    item = layer("Lambda", "secret", function=bytecode(marker), function_type="lambda", arguments={})
    sample = Sample(version, places(item)[where], {"secret": {}}, None, None)
    message = failing(tmp_path, sample, trust=trust)
    assert "Lambda layer 'secret'" in message
    assert "no other Python can run" in message
    assert "weights=" in message
    assert not marker.exists()


def test_old_merge_function_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    merge = layer("Merge", "secret", mode=bytecode(marker), mode_type="lambda")
    layers = [node(input_layer("given", (4, 4, 2))), node(merge, "given", "given")]
    sample = Sample("1.2.0", model("net", layers, ["given"], [("secret", 0)]), {}, None, None)
    assert "Merge layer 'secret'" in failing(tmp_path, sample, trust=True)
    assert not marker.exists()


def test_lambda_of_keras_3_runs_with_trust_alone(tmp_path):
    marker = str(tmp_path / "ran")
    code = keras.layers.Lambda(lambda x: (open(marker, "w").close(), 2 * x)[1], name="secret")
    keras.Sequential([keras.Input((4, 4, 2)), code]).save(tmp_path / "model.h5")
    Path(marker).unlink()
    with pytest.raises(ModelError, match=r"expected no code .* Lambda layer 'secret'.*give trust=True to run it"):
        read(tmp_path / "model.h5")
    assert not Path(marker).exists()
    opened = read(tmp_path / "model.h5", trust=True)
    x = images(4, 4, 2)
    np.testing.assert_allclose(answers(opened.model, x), 2 * x)
    assert Path(marker).exists()


@pytest.mark.parametrize("class_name", ["TorchModuleWrapper", "TFSMLayer"])
def test_layers_that_load_code_are_refused(class_name, tmp_path):
    item = layer(class_name, "secret", module=bytecode(tmp_path / "ran")[0], filepath="elsewhere")
    sample = Sample("3.9.0", sequential("net", input_layer("given", (4, 4, 2)), item), {}, None, None)
    assert f"{class_name} layer 'secret'" in failing(tmp_path, sample)


def test_modules_named_in_the_file_are_not_imported(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    item = layer("Conv2D", "conv") | {"module": "evil", "registered_name": "evil>Conv2D"}
    for name, version in [("Conv2D", "2.13.0"), ("Evil", "2.13.0"), ("Evil", "3.9.0")]:
        item["class_name"] = name
        config = sequential("net", input_layer("given", (4, 4, 2)), item)
        failing(tmp_path, Sample(version, config, {}, None, None))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------
# Files that are something else


def test_weights_only_file_says_so(tmp_path):
    sample = first_layer_shape_224()
    path = written(tmp_path, sample)
    with h5py.File(path) as whole, h5py.File(tmp_path / "weights.h5", "w") as weights:
        for name in sample.weights:
            whole.copy(f"model_weights/{name}", weights)
        weights.attrs.update(whole["model_weights"].attrs)
    with pytest.raises(ModelError, match=r"found weights without an architecture \(of the layers conv_a, pool, conv"):
        read(tmp_path / "weights.h5")


def test_weights_only_file_of_keras_3_says_so(tmp_path):
    network = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Conv2D(2, 3, name="stem")])
    network.save_weights(tmp_path / "some.weights.h5")
    with pytest.raises(ModelError, match="found weights without an architecture"):
        read(tmp_path / "some.weights.h5")


def test_architecture_only_file_says_so(tmp_path):
    path = written(tmp_path, first_layer_shape_224())
    with h5py.File(path, "a") as file:
        del file["model_weights"]
    with pytest.raises(ModelError, match="found the architecture alone"):
        read(path)


def test_hdf5_of_others_names_its_groups(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["images/train"] = np.zeros(3)
        file["labels"] = np.zeros(3)
    with pytest.raises(ModelError, match=r"data.h5: expected a model saved by Keras, .* holds 'images', 'labels'"):
        read(tmp_path / "data.h5")


def test_other_formats_and_absent_files(tmp_path):
    (tmp_path / "fake.h5").write_bytes(b"\x80\x04 not HDF5")
    with pytest.raises(ModelError, match=r"fake\.h5: expected a model in an HDF5 file, found a Python pickle"):
        read(tmp_path / "fake.h5")
    (tmp_path / "cut.h5").write_bytes(b"PK\x03\x04 not HDF5")
    with pytest.raises(ModelError, match=r"cut\.h5 .*(can't be read|zip archive|damaged)"):
        read(tmp_path / "cut.h5")
    with pytest.raises(ModelError, match=r"no model file at .*absent\.h5"):
        read(tmp_path / "absent.h5")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file(share, tmp_path):
    path = written(tmp_path, first_layer_shape_224())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ModelError, match=r"model.h5: expected a whole HDF5 file, found it truncated or damaged"
    ) as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_damaged_files_raise_model_errors_alone(tmp_path):
    """Bytes drawn at random are overwritten; what comes of it is the model or a ModelError."""
    path = written(tmp_path, names_with_slashes())
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.integers(8, len(content), size=4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            read(path)


@pytest.mark.parametrize("config", ["{", "[]", "null", '{"class_name": "Sequential"}', "[" * 100000])
def test_config_that_is_none(config, tmp_path):
    path = written(tmp_path, first_layer_shape_224())
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = config
    with pytest.raises(ModelError, match="in its model_config"):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"name": "net", "layers": 5}},
        {"config": {"name": "net", "layers": [{"class_name": "Conv2D", "config": {"name": "a", "axis": 1}}]}},
        {"config": {"name": "net", "layers": []}},
        {"config": {"name": "net", "layers": [layer("ZeroPadding2D", "pad", padding=7)]}},
    ],
)
def test_config_that_keras_did_not_write(change, tmp_path):
    sample = first_layer_shape_224()
    sample.version, sample.config = "1.2.0", {**sample.config, **change}
    failing(tmp_path, sample)


# ------------------------------------------------------------------------------------------------------------
# Layers of the user


def custom_sample():
    (kernel,) = arrays((1, 1, 2, 2))
    x = images(4, 4, 2)
    own = layer("DoublingForTest", "twice", factor=2)
    layers = [
        conv2d("conv", 2, 1, use_bias=False, activation="square_for_test", batch_input_shape=[None, 4, 4, 2]),
        own,
    ]
    return Sample("2.4.0", sequential("net", *layers), {"conv": {"conv/kernel:0": kernel}}, x, 2 * conv(x, kernel) ** 2)


def test_unknown_layers_are_all_named(tmp_path):
    sample = custom_sample()
    sample.config["config"]["layers"].append(layer("LocallyConnected2D", "local"))
    message = failing(tmp_path, sample)
    for name in ("DoublingForTest", "LocallyConnected2D", "square_for_test"):
        assert repr(name) in message
    assert "keras.saving.register_keras_serializable" in message


def test_registered_layers_are_found(tmp_path):
    class DoublingForTest(keras.layers.Layer):
        def __init__(self, factor, **options):
            super().__init__(**options)
            self.factor = factor

        def call(self, x):
            return self.factor * x

    def square_for_test(x):
        return x * x

    sample = custom_sample()
    known = {"tests>DoublingForTest": DoublingForTest, "tests>square_for_test": square_for_test}
    with keras.saving.custom_object_scope({}):
        before = dict(keras.saving.get_custom_objects())
        keras.saving.get_custom_objects().update(known)
        try:
            check(read(written(tmp_path, sample)), sample)
        finally:
            keras.saving.get_custom_objects().clear()
            keras.saving.get_custom_objects().update(before)


def test_unsupported_tensorflow_operation_is_named(tmp_path):
    sample = tensorflow_operations()
    sample.config["config"]["layers"][1]["config"]["function"] = "math.reduce_std"
    assert "'TFOpLambda' (in the layer 'tf.math.truediv')" in failing(tmp_path, sample)


# ------------------------------------------------------------------------------------------------------------
# Real files


def photos(folder, size, mode="RGB", scale=lambda x: x / 255):
    files = sorted((ASSETS / "photos" / folder).glob("*.*"))
    assert files
    decoded = [np.asarray(Image.open(file).convert(mode).resize((size, size), Image.BILINEAR)) for file in files]
    return scale(np.stack(decoded).astype("float32").reshape(len(files), size, size, -1))


def real(name):
    return read(ASSETS / "keras" / name)


@needs_assets
@pytest.mark.parametrize(
    ("file", "version", "size", "mode", "least"),
    [
        ("cats_vs_dogs_150px.keras", "2.10.0", 150, "RGB", 0.95),
        ("cats_and_dogs_small_1.h5", "2.1.6", 50, "RGB", 0.58),
        ("dogs_vs_cats_32px.h5", "2.2.4", 32, "RGB", 0.8),
        ("cats_vs_dogs_gray_112px.h5", "2.4.0", 112, "L", 0.9),
    ],
)
def test_real_cats_and_dogs(file, version, size, mode, least):
    """Of 30 cats and 30 dogs; the README's shares are of 400 photos."""
    opened = real(file)
    assert opened.version == version
    x = np.concatenate([photos("cats", size, mode), photos("dogs", size, mode)])
    y = np.concatenate([answers(opened.model, part) for part in np.array_split(x, 6)])
    dog = y[:, 1] > y[:, 0] if y.shape[1] == 2 else y[:, 0] > 0.5
    assert np.mean(dog == (np.arange(60) >= 30)) >= least


@needs_assets
def test_real_weak_network_computes_what_its_datasets_say():
    """At 68 % accuracy says little: here all of the network, in NumPy, from the datasets."""
    x = photos("cats", 50)[:4]
    with h5py.File(ASSETS / "keras" / "cats_and_dogs_small_1.h5") as file:
        y = x
        for name in ("conv2d_4", "conv2d_5", "conv2d_6"):
            group = file[f"model_weights/{name}/{name}"]
            y = pool(relu(conv(y, group["kernel:0"][()], group["bias:0"][()])))
        y = flat(y)
        for name, end in (("dense_3", relu), ("dense_4", sigmoid)):
            group = file[f"model_weights/{name}/{name}"]
            y = end(y @ group["kernel:0"][()] + group["bias:0"][()])
    np.testing.assert_allclose(answers(real("cats_and_dogs_small_1.h5").model, x), y, rtol=1e-4, atol=1e-5)


@needs_assets
def test_real_digits():
    opened = real("mnist_cnn.h5")
    assert opened.translated == ()
    right = [
        np.argmax(answers(opened.model, photos(f"digits/{digit}", 28, "L")), axis=1) == digit for digit in range(10)
    ]
    assert np.mean(right) >= 0.97


@needs_assets
def test_real_emotions():
    opened = real("emotions_mini_xception.hdf5")
    x = photos("cats", 64, "L", lambda x: x / 127.5 - 1)[:4]
    y = answers(opened.model, x)
    assert y.shape == (4, 7)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-5)
    assert np.ptp(y, axis=0).max() > 0.05


@needs_assets
def test_real_keras_1():
    opened = real("steering_keras1.h5")
    assert opened.version == "1.2.1"
    y = answers(opened.model, images(64, 96, 3))
    assert y.shape == (3, 1)
    assert np.isfinite(y).all()
    assert np.ptp(y) > 0


@needs_assets
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("steering_keras1_lambda.h5", "Lambda layer 'lambda_1'.* no other Python can run"),
        ("steering_weights_only.h5", "weights without an architecture .*lambda_1, cropping2d_1, conv2d_1"),
    ],
)
def test_real_files_that_must_be_refused(file, message):
    with pytest.raises(ModelError, match=message):
        read(ASSETS / "keras" / file, trust=True)


# ------------------------------------------------------------------------------------------------------------
# Keras 1, layer by layer: what Keras 1.2.2's get_config gave, and what the layer has to be today.

W = {"init": "uniform", "W_regularizer": None, "W_constraint": None}
B = {"b_regularizer": None, "b_constraint": None, "bias": False}
C2 = {"nb_filter": 4, "nb_row": 3, "nb_col": 2, "subsample": [2, 2], "border_mode": "same", "dim_ordering": "tf"}
RNN = {
    **{"output_dim": 3, "init": "glorot_uniform", "inner_init": "orthogonal", "activation": "tanh"},
    **{"inner_activation": "sigmoid", "W_regularizer": None, "U_regularizer": None, "b_regularizer": None},
    **{"dropout_W": 0.25, "dropout_U": 0.5, "return_sequences": True, "go_backwards": False, "stateful": False},
    **{"unroll": False, "consume_less": "cpu", "input_dim": None, "input_length": None},
}
RNN_NOW = {"units": 3, "dropout": 0.25, "recurrent_dropout": 0.5, "return_sequences": True}
IMAGE, SERIES, VOLUME = (8, 8, 3), (8, 3), (6, 6, 6, 2)
KERAS_1 = [
    ("Dense", {"output_dim": 4, "activation": "relu", "input_dim": None, **W, **B}, SERIES, {"units": 4}),
    ("TimeDistributedDense", {"output_dim": 4, "input_length": None, **W, **B}, SERIES, {"use_bias": False}),
    ("Convolution2D", {"activation": "linear", **C2, **W, **B}, IMAGE, {"kernel_size": (3, 2), "strides": (2, 2)}),
    (
        "AtrousConvolution2D",
        {**C2, **W, **B, "subsample": [1, 1], "atrous_rate": [2, 2]},
        IMAGE,
        {"dilation_rate": (2, 2), "padding": "same"},
    ),
    ("SeparableConvolution2D", {**C2, **W, **B, "depth_multiplier": 2}, IMAGE, {"depth_multiplier": 2, "filters": 4}),
    (
        "Convolution1D",
        {"nb_filter": 4, "filter_length": 3, "subsample_length": 2, "border_mode": "same", "input_dim": 3, **W, **B},
        SERIES,
        {"kernel_size": (3,), "strides": (2,)},
    ),
    (
        "Convolution3D",
        {
            **{"nb_filter": 4, "kernel_dim1": 3, "kernel_dim2": 2, "kernel_dim3": 1, "subsample": [1, 1, 1]},
            **{"border_mode": "valid", "dim_ordering": "tf", **W, **B},
        },
        VOLUME,
        {"kernel_size": (3, 2, 1)},
    ),
    ("MaxPooling1D", {"pool_length": 2, "stride": 2, "border_mode": "valid"}, SERIES, {"pool_size": (2,)}),
    (
        "MaxPooling2D",
        {"pool_size": [2, 2], "strides": [1, 1], "border_mode": "same", "dim_ordering": "tf"},
        IMAGE,
        {"strides": (1, 1), "padding": "same"},
    ),
    ("GlobalAveragePooling2D", {"dim_ordering": "tf"}, IMAGE, {"data_format": "channels_last"}),
    ("UpSampling1D", {"length": 3}, SERIES, {"size": 3}),
    ("UpSampling2D", {"size": [2, 2]}, IMAGE, {"size": (2, 2)}),
    ("Cropping2D", {"cropping": [[1, 1], [0, 2]], "dim_ordering": "tf"}, IMAGE, {"cropping": ((1, 1), (0, 2))}),
    ("Dropout", {"p": 0.25}, IMAGE, {"rate": 0.25}),
    ("SpatialDropout2D", {"p": 0.25}, IMAGE, {"rate": 0.25}),
    ("GaussianDropout", {"p": 0.25}, IMAGE, {"rate": 0.25}),
    ("GaussianNoise", {"sigma": 0.25}, IMAGE, {"stddev": 0.25}),
    ("LeakyReLU", {"alpha": 0.25}, IMAGE, {"negative_slope": 0.25}),
    ("ELU", {"alpha": 0.25}, IMAGE, {"alpha": 0.25}),
    ("ThresholdedReLU", {"theta": 0.25}, IMAGE, {"threshold": 0.25}),
    ("PReLU", {"init": "zero"}, IMAGE, {"shared_axes": None}),
    ("PReLU", {"init": "one", "shared_axes": [1, 2]}, IMAGE, {"shared_axes": [1, 2]}),
    (
        "BatchNormalization",
        {"gamma_init": "one", "beta_init": "zero", "mode": 0, "axis": -1, "epsilon": 0.5, "momentum": 0.9},
        IMAGE,
        {"epsilon": 0.5},
    ),
    (
        "Embedding",
        {
            **{"input_dim": 7, "output_dim": 3, "input_length": 8, "init": "uniform", "mask_zero": False},
            **{"activity_regularizer": None, "W_regularizer": None, "W_constraint": None, "dropout": 0.0},
        },
        (8,),
        {"input_dim": 7, "output_dim": 3},
    ),
    ("SimpleRNN", {key: value for key, value in RNN.items() if key != "inner_activation"}, SERIES, RNN_NOW),
    ("GRU", RNN, SERIES, {**RNN_NOW, "reset_after": False, "recurrent_activation": "sigmoid"}),
    ("LSTM", {**RNN, "forget_bias_init": "one"}, SERIES, {**RNN_NOW, "unit_forget_bias": True}),
    (
        "ConvLSTM2D",
        {
            **{key: value for key, value in RNN.items() if key not in ("output_dim", "input_dim", "input_length")},
            **{**C2, "forget_bias_init": "one", "subsample": [1, 1]},
        },
        (2, *IMAGE),
        {"filters": 4, "kernel_size": (3, 2), "dropout": 0.25},
    ),
]
INITIALIZERS = {
    "PReLU": ("alpha_initializer", ("Zeros", "Ones")),
    "Embedding": ("embeddings_initializer", ("RandomUniform",)),
    "Dense": ("kernel_initializer", ("RandomUniform",)),
    "BatchNormalization": ("gamma_initializer", ("Ones",)),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("class_name", "config", "shape", "now"), KERAS_1, ids=[f"{item[0]}{n}" for n, item in enumerate(KERAS_1)]
)
def test_arguments_of_each_layer_of_keras_1(class_name, config, shape, now, wrapped):
    item = layer(class_name, "it", **config)
    if wrapped:
        item, shape = layer("TimeDistributed", "each", layer=item), (2, *shape)
    item["config"]["batch_input_shape"] = [None, *shape]
    network, _ = legacy_h5.build(Path("model.h5"), "1.2.2", {"class_name": "Sequential", "config": [item]}, 0, False)
    made = network.layers[0].layer if wrapped else network.layers[0]
    got = made.get_config()
    plain = lambda value: tuple(map(plain, value)) if isinstance(value, list | tuple) else value  # noqa: E731
    assert {key: plain(got[key]) for key in now} == {key: plain(value) for key, value in now.items()}
    key, kinds = INITIALIZERS.get(class_name, (None, ()))
    assert key is None or got[key]["class_name"] in kinds


def test_a_prelu_of_keras_1_answers_as_the_definition_says(tmp_path):
    kernel, bias, alpha = arrays((3, 2, 2, 3), (3,), (3, 2, 3), seed=3)
    layers = [
        _with(convolution_1("conv", 3), activation="linear", batch_input_shape=[None, 5, 3, 2]),
        layer("PReLU", "prelu_1", init="zero"),
    ]
    x = images(5, 3, 2)
    y = conv(x, kernel, bias)
    weights = {"conv": {"conv_W": kernel, "conv_b": bias}, "prelu_1": {"prelu_1_alphas": alpha}}
    sample = Sample(
        "1.2.2", {"class_name": "Sequential", "config": layers}, weights, x, np.where(y > 0, y, alpha * y), backend=""
    )
    check(read(written(tmp_path, sample)), sample)


def test_arguments_of_a_users_own_layer_are_left_alone():
    """A layer of the user's may call its arguments as Keras 1 did."""

    class OwnWithP(keras.layers.Layer):
        def __init__(self, p, init, **options):
            super().__init__(**options)
            self.p, self.init = p, init

        def call(self, x):
            return x

    own = layer("OwnWithP", "own", p=3, init="zero", batch_input_shape=[None, 4])
    with keras.saving.custom_object_scope({}):
        keras.saving.get_custom_objects()["tests>OwnWithP"] = OwnWithP
        try:
            config = {"class_name": "Sequential", "config": [own]}
            network, _ = legacy_h5.build(Path("model.h5"), "1.2.2", config, 0, False)
        finally:
            del keras.saving.get_custom_objects()["tests>OwnWithP"]
    assert (network.layers[0].p, network.layers[0].init) == (3, "zero")
