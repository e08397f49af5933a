"""Small transformers in Keras 3, with `MultiHeadAttention`, each with another way from maps to tokens."""

import pytest

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402
from models import seeded  # noqa: E402

SIDE, PATCH, WIDTH, HEADS, CLASSES = 32, 8, 12, 3, 5
GRID = SIDE // PATCH


@keras.saving.register_keras_serializable("transformers_keras")
class ExtraTokens(layers.Layer):
    """Learned tokens in front of others, or behind them."""

    def __init__(self, count, behind=False, **kwargs):
        super().__init__(**kwargs)
        self.count, self.behind = count, behind

    def build(self, shape):
        self.extra = self.add_weight(shape=(1, self.count, shape[-1]), name="extra")

    def call(self, x):
        extra = keras.ops.broadcast_to(self.extra, (keras.ops.shape(x)[0], self.count, x.shape[-1]))
        return keras.ops.concatenate([x, extra] if self.behind else [extra, x], axis=1)

    def get_config(self):
        return {**super().get_config(), "count": self.count, "behind": self.behind}


@keras.saving.register_keras_serializable("transformers_keras")
class Positions(layers.Layer):
    """A learned embedding of each place is added."""

    def build(self, shape):
        self.places = self.add_weight(shape=(1, *shape[1:]), name="places")

    def call(self, x):
        return x + self.places


def block(x, name):
    """Attention and two dense layers, each after a norm and beside a sum."""
    y = layers.LayerNormalization(name=f"{name}_norm1")(x)
    y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"{name}_attention")(y, y)
    x = layers.Add(name=f"{name}_sum1")([x, y])
    y = layers.LayerNormalization(name=f"{name}_norm2")(x)
    y = layers.Dense(2 * WIDTH, activation="gelu", name=f"{name}_dense1")(y)
    return layers.Add(name=f"{name}_sum2")([x, layers.Dense(WIDTH, name=f"{name}_dense2")(y)])


def vit(front=1, behind=0, depth=2):
    """A vision transformer: a class token in front, or the mean of all tokens where there is none."""
    image = layers.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(WIDTH, PATCH, PATCH, name="patches")(image)
    x = layers.Reshape((GRID * GRID, WIDTH), name="tokens")(x)
    if front:
        x = ExtraTokens(front, name="front")(x)
    if behind:
        x = ExtraTokens(behind, behind=True, name="behind")(x)
    x = Positions(name="positions")(x)
    for number in range(depth):
        x = block(x, f"block{number}")
    x = layers.LayerNormalization(name="norm")(x)
    x = x[:, 0] if front else layers.GlobalAveragePooling1D(name="mean")(x)
    return seeded(keras.Model(image, layers.Dense(CLASSES, name="head")(x), name="vit"))


def hybrid():
    """Two convolutions that overlap, then a transformer without a class token."""
    image = layers.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(8, 3, 2, padding="same", activation="relu", name="conv1")(image)
    x = layers.Conv2D(WIDTH, 3, 4, padding="same", activation="relu", name="conv2")(x)
    x = Positions(name="positions")(layers.Reshape((GRID * GRID, WIDTH), name="tokens")(x))
    x = block(x, "block0")
    x = layers.GlobalAveragePooling1D(name="mean")(layers.LayerNormalization(name="norm")(x))
    return seeded(keras.Model(image, layers.Dense(CLASSES, name="head")(x), name="hybrid"))


@keras.saving.register_keras_serializable("transformers_keras")
class Merge(layers.Layer):
    """Each square of four tokens becomes one (Liu et al. 2021, 2103.14030, section 3.1)."""

    def __init__(self, side, width, **kwargs):
        super().__init__(**kwargs)
        self.side, self.width = side, width
        self.norm, self.reduction = layers.LayerNormalization(), layers.Dense(width, use_bias=False)

    def build(self, shape):
        self.norm.build((None, None, 4 * shape[-1]))
        self.reduction.build((None, None, 4 * shape[-1]))

    def call(self, x):
        half, width = self.side // 2, x.shape[-1]
        x = keras.ops.reshape(x, (-1, half, 2, half, 2, width))
        x = keras.ops.reshape(keras.ops.transpose(x, (0, 1, 3, 4, 2, 5)), (-1, half * half, 4 * width))
        return self.reduction(self.norm(x))

    def get_config(self):
        return {**super().get_config(), "side": self.side, "width": self.width}


def merging():
    """Tokens whose grid halves after the first block, as in Swin."""
    image = layers.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(WIDTH, PATCH, PATCH, name="patches")(image)
    x = Positions(name="positions")(layers.Reshape((GRID * GRID, WIDTH), name="tokens")(x))
    x = Merge(GRID, WIDTH, name="merge")(block(x, "block0"))
    x = block(x, "block1")
    x = layers.GlobalAveragePooling1D(name="mean")(layers.LayerNormalization(name="norm")(x))
    return seeded(keras.Model(image, layers.Dense(CLASSES, name="head")(x), name="merging"))


@keras.saving.register_keras_serializable("transformers_keras")
class Patches(layers.Layer):
    """The image cut into squares, each a token with all of its pixels."""

    def call(self, x):
        x = keras.ops.image.extract_patches(x, PATCH)
        return keras.ops.reshape(x, (-1, GRID * GRID, 3 * PATCH * PATCH))


def patched():
    """Patches that go through a dense layer; the head takes all tokens in a row."""
    image = layers.Input((SIDE, SIDE, 3))
    x = layers.Dense(WIDTH, name="projection")(Patches(name="patches")(image))
    x = block(Positions(name="positions")(x), "block0")
    x = layers.Flatten(name="flatten")(layers.LayerNormalization(name="norm")(x))
    return seeded(keras.Model(image, layers.Dense(CLASSES, name="head")(x), name="patched"))
