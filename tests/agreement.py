"""What one backend says of one small network, written to a file; `test_backends_agree.py` runs one for each."""

import sys

import models
import numpy as np
from keras import layers

import convscope
from convscope.techniques.filters.ascent import step_of
from convscope.techniques.filters.canvas import starts
from convscope.techniques.filters.recipes import CLASSIC


def network():
    """Every common kind of layer: convolutions, depthwise, norms, activations, pooling, sums and joins."""
    keras = models.keras
    picture = layers.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="conv")(picture)
    x = layers.BatchNormalization(name="norm")(x)
    skip = layers.ReLU(6.0, name="relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(skip)
    x = layers.Activation("swish", name="swish")(x)
    x = layers.Add(name="add")([x, skip])
    x = layers.Concatenate(name="join")(
        [layers.MaxPooling2D(2, name="max")(x), layers.AveragePooling2D(2, name="mean")(x)]
    )
    x = layers.Conv2D(6, 3, activation="elu", name="last")(x)
    x = layers.Dense(4, activation="softmax", name="out")(layers.GlobalAveragePooling2D(name="gap")(x))
    return convscope.open_model(models.seeded(keras.Model(picture, x)), preprocess="-1..1")


def answers() -> dict[str, np.ndarray]:
    """Logits, every activation, gradients at three depths, heatmaps, and one step of the classic ascent."""
    net = network()
    photos = [np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8) for index in range(3)]
    seen = convscope.activations(net, photos, "all")
    found = {f"activation {path}": np.asarray(values) for path, values in seen.arrays.items()}
    found["logits"] = net.predict(net.prepare(seen.photos))
    for path in ("conv", "swish", "last"):
        explained = convscope.heatmap(net, photos, 2, layer=path)
        found[f"heatmap {path}"] = explained.maps
    layer = net.layer("last")
    step = net.compile(step_of(net, layer, CLASSIC))
    begin = starts(net, CLASSIC, (32, 32), 0, [0, 1, 5])
    numbers = np.array([0, 1, 5], np.int32)
    value, norm, moved = map(net.numpy, step(net.tensor(begin), net.tensor(numbers)))
    found |= {"start": begin, "objective": value, "gradient norm": norm, "gradient": moved - begin}
    final = convscope.filters(net, "last", [0, 1, 5], steps=20)
    return found | {"final": np.array([row.activation for row in final.rows])}


if __name__ == "__main__":
    np.savez(sys.argv[1], **answers())
