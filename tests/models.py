"""Small Keras models for tests, with weights drawn from NumPy so that each backend has the same."""

import numpy as np
import pytest

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402


def seeded(model, seed=0):
    """Give `model` the same weights on every backend, none of them trivial."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        shape = tuple(variable.shape)
        if variable.dtype not in ("float32", "float16", "bfloat16"):
            continue
        if "variance" in variable.name or "gamma" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, shape))
        else:
            fan = max(1, int(np.prod(shape[:-1])))
            variable.assign(rng.normal(0, 1 / np.sqrt(fan), shape))
    return model


def plain(side=16, channels=3, classes=5, head="softmax", name="plain"):
    """conv, norm, relu, pool, conv with its own relu, global average pooling, dense."""
    return seeded(
        keras.Sequential(
            [
                layers.Input((side, side, channels)),
                layers.Conv2D(8, 3, name="conv_a"),
                layers.BatchNormalization(name="norm_a"),
                layers.ReLU(name="relu_a"),
                layers.MaxPooling2D(name="pool_a"),
                layers.Conv2D(6, 3, activation="relu", name="conv_b"),
                layers.GlobalAveragePooling2D(name="gap"),
                layers.Dense(classes, activation=head, name="out"),
            ],
            name=name,
        )
    )


def nested(side=16):
    """A model inside a model inside a model."""
    inner = keras.Sequential(
        [layers.Input((side, side, 4)), layers.Conv2D(5, 3, activation="relu", name="deep")], name="inner"
    )
    middle_in = layers.Input((side, side, 3))
    middle = keras.Model(middle_in, inner(layers.Conv2D(4, 3, padding="same", name="first")(middle_in)), name="middle")
    image = layers.Input((side, side, 3), name="picture")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="scale")(image)
    x = layers.GlobalAveragePooling2D(name="gap")(middle(x))
    return seeded(keras.Model(image, layers.Dense(3, activation="softmax", name="out")(x), name="outer"))


def shared(side=12):
    """One convolution called twice, then a sum that is no layer."""
    image = layers.Input((side, side, 3), name="picture")
    conv = layers.Conv2D(3, 3, padding="same", name="twice")
    first = keras.ops.relu(conv(image))
    second = conv(first)
    x = layers.GlobalAveragePooling2D(name="gap")(second + first)
    return seeded(keras.Model(image, layers.Dense(2, name="out")(x), name="shared"))


def two_in_two_out(side=12):
    """An image and a vector in, two named outputs."""
    image = layers.Input((side, side, 1), name="picture")
    extra = layers.Input((4,), name="extra")
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(image)
    x = layers.Concatenate(name="join")([layers.GlobalMaxPooling2D(name="gmp")(x), extra])
    digit = layers.Dense(3, activation="softmax", name="digit")(x)
    angle = layers.Dense(1, name="angle")(x)
    return seeded(keras.Model({"picture": image, "extra": extra}, {"digit": digit, "angle": angle}, name="two"))


@keras.saving.register_keras_serializable("convscope_tests")
class Subclassed(keras.Model):
    """A model whose graph Keras does not know; its softmax is a plain operation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(4, 3, name="conv")
        self.drop = layers.Dropout(0.5, name="drop")
        self.out = layers.Dense(3, name="out")
        self.reach = True

    def call(self, x, training=None):
        x = keras.ops.relu(self.conv(x)) if self.reach else keras.ops.relu(x[..., :1] * 1.0 + keras.ops.zeros((4,)))
        x = self.drop(x, training=training)
        return keras.ops.softmax(self.out(keras.ops.mean(x, axis=(1, 2))))


def subclassed(side=10):
    """`Subclassed`, built by a call."""
    model = Subclassed(name="subclassed")
    model(np.zeros((1, side, side, 3), np.float32))
    return seeded(model)


def ones_with(model, image):
    """Outputs of the untouched model as NumPy."""
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, image)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, model(tensors, training=False))
