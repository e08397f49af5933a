"""Valid files of Keras', old and new, made in a process of their own: `python -m trials.keras_bases FOLDER`."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import h5py
import keras
import numpy as np
import tensorflow as tf

from trials import tfjs

_GLOROT = {
    "class_name": "VarianceScaling",
    "config": {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None},
}
_ZEROS = {"class_name": "Zeros", "config": {}}


def main() -> None:
    """Write them all."""
    folder = Path(sys.argv[1])
    for name, model in {"sequential": _sequential(), "branched": _branched(), "nested": _nested()}.items():
        model.save(folder / f"keras-{name}.keras")
        model.save(folder / f"whole-{name}.h5")
        model.save_weights(folder / f"weights-{name}.weights.h5")
        if name != "nested":
            model.export(folder / f"saved-{name}", verbose=False)
        tfjs.write(folder / f"tfjs-{name}", model)
    _old(folder)
    _first_saved_model(folder / "saved-first")
    _functions(folder / "saved-functions")
    (folder / "class-names.json").write_text(json.dumps({str(i): [f"n{i:08}", f"class {i}"] for i in range(5)}))


def _sequential() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((24, 24, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(5, activation="softmax"),
        ]
    )


def _branched() -> keras.Model:
    keras.utils.set_random_seed(1)
    layers, inputs = keras.layers, keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(layers.Rescaling(1 / 255)(inputs))
    y = layers.SeparableConv2D(4, 3, padding="same")(x)
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()([layers.Add()([x, y]), x]))
    return keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(x)))


def _nested() -> keras.Model:
    keras.utils.set_random_seed(2)
    inputs = keras.Input((24, 24, 3))
    return keras.Model(inputs, keras.layers.Activation("sigmoid")(_sequential()(inputs)))


# -- files as old versions wrote them, by hand -----------------------------------------------------------


def _layer(class_name: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": name, "trainable": True, **config}}


def _weighted(class_name: str, name: str, **config: Any) -> dict[str, Any]:
    usual = {"use_bias": True, "activation": "linear", "kernel_initializer": _GLOROT, "bias_initializer": _ZEROS}
    return copy.deepcopy(_layer(class_name, name, **usual, **config))


def _old(folder: Path) -> None:
    rng = np.random.default_rng(0)
    kernel, matrix = rng.normal(size=(3, 3, 3, 4)).astype("f4"), rng.normal(size=(4, 5)).astype("f4")
    arrays = {
        "conv": [("kernel:0", kernel), ("bias:0", np.zeros(4, "f4"))],
        "pool": [],
        "dense": [("kernel:0", matrix), ("bias:0", np.zeros(5, "f4"))],
    }
    second = [
        _weighted(
            "Conv2D",
            "conv",
            filters=4,
            kernel_size=[3, 3],
            strides=[1, 1],
            padding="valid",
            data_format="channels_last",
            dilation_rate=[1, 1],
            batch_input_shape=[None, 16, 16, 3],
            dtype="float32",
        ),
        _layer("GlobalAveragePooling2D", "pool", data_format="channels_last"),
        _weighted("Dense", "dense", units=5),
    ]
    first = [
        _layer(
            "Convolution2D",
            "conv",
            nb_filter=4,
            nb_row=3,
            nb_col=3,
            border_mode="valid",
            subsample=[1, 1],
            dim_ordering="tf",
            init="glorot_uniform",
            activation="relu",
            bias=True,
            batch_input_shape=[None, 16, 16, 3],
            input_dtype="float32",
        ),
        _layer("GlobalAveragePooling2D", "pool", dim_ordering="tf"),
        _layer("Dense", "dense", output_dim=5, init="glorot_uniform", activation="softmax", bias=True, input_dim=4),
    ]
    code = _layer(
        "Lambda",
        "lambda",
        function=["4wEAAAAAAAAAAAAAAAEAAAABAAAAQwAAAHMEAAAAfAAAUygBAAAATigAAAAA", None, None],
        function_type="lambda",
        arguments={},
        output_shape=None,
        output_shape_type="raw",
    )
    configs = {
        "1.2.2": {"class_name": "Sequential", "config": first},
        "2.1.6": {"class_name": "Sequential", "config": second},
        "2.4.0": {"class_name": "Sequential", "config": {"name": "sequential", "layers": second}},
        "1.1.1": {"class_name": "Sequential", "config": [first[0], code, *first[1:]]},
    }
    for version, config in configs.items():
        with h5py.File(folder / f"old-{version}.h5", "w") as file:
            file.attrs["keras_version"] = version
            file.attrs["backend"] = "tensorflow"
            file.attrs["model_config"] = json.dumps(config)
            group = file.create_group("model_weights")
            group.attrs["layer_names"] = [name.encode() for name in arrays]
            for name, weights in arrays.items():
                inner = group.create_group(name)
                inner.attrs["weight_names"] = [f"{name}/{key}".encode() for key, _ in weights]
                for key, value in weights:
                    inner[f"{name}/{key}"] = value


# -- SavedModels -----------------------------------------------------------------------------------------


def _first_saved_model(folder: Path) -> None:
    """In TF1's format: a graph, a saver and a signature."""
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 16, 16, 3], name="x")
        kernel = tf.compat.v1.get_variable("kernel", [3, 3, 3, 4], use_resource=True)
        matrix = tf.compat.v1.get_variable("matrix", [4, 5], use_resource=True)
        h = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"), name="h")
        y = tf.nn.softmax(tf.matmul(tf.reduce_mean(h, [1, 2]), matrix), name="y")
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            builder = tf.compat.v1.saved_model.Builder(str(folder))
            signature = tf.compat.v1.saved_model.predict_signature_def({"x": x}, {"y": y})
            builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map={"serving_default": signature})
            builder.save()


def _functions(folder: Path) -> None:
    """A `tf.Module` with a function inside a function, and an asset."""

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = tf.Variable(tf.random.stateless_normal([3, 3, 3, 4], [1, 2]), name="kernel")

        @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, 3], tf.float32)])
        def inner(self, x):  # type: ignore[no-untyped-def]
            return tf.nn.relu(tf.nn.conv2d(x, self.kernel, 1, "SAME"))

        @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, 3], tf.float32)])
        def __call__(self, x):  # type: ignore[no-untyped-def]
            return tf.reduce_mean(self.inner(x), [1, 2])

    net = Net()
    tf.saved_model.save(net, str(folder), signatures=net.__call__.get_concrete_function())


if __name__ == "__main__":
    main()
