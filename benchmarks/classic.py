"""The classic workload, plainly and by convscope, in one process on TensorFlow: times, ratio and agreement.

    python -m benchmarks.classic [--filters 64] [--steps 30] [--out DIR]

The plain side is the procedure as its notes write it: one filter at a time, a `tf.function` step that takes the
filter's number as a Python integer (and so is traced anew for each filter). Both sides start from the same
images in ResNet50V2 with the same random weights, at layer conv3_block4_out, 180 x 180 pixels. Compare machines
by the ratio, not by the seconds.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import convscope
from convscope.techniques.filters.ascent import Plan
from convscope.techniques.filters.recipes import CLASSIC

LAYER = "conv3_block4_out"


def plain(model: keras.Model, begin: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The procedure written out: final images and final activations, filter after filter."""
    extractor = keras.Model(inputs=model.inputs, outputs=model.get_layer(LAYER).output)

    def loss_of(image: tf.Tensor, channel: int) -> tf.Tensor:
        return tf.reduce_mean(extractor([image])[:, 2:-2, 2:-2, channel])

    @tf.function
    def step(image: tf.Tensor, channel: int, rate: float) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = loss_of(image, channel)
        gradient = tf.math.l2_normalize(tape.gradient(loss, image))
        return loss, image + rate * gradient

    images, finals = [], []
    for number in range(len(begin)):
        image = tf.constant(begin[number : number + 1])
        for _ in range(steps):
            _, image = step(image, number, 10.0)
        images.append(image.numpy()[0])
        finals.append(float(loss_of(image, number)))
    return np.stack(images), np.array(finals)


def main() -> None:
    """Run both sides and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--out", help="folder for convscope's sheet")
    options = parser.parse_args()
    network = convscope.open_model("keras:ResNet50V2?weights=none&include_top=false", preprocess="-1..1")
    plan = Plan(network, CLASSIC, (180, 180))
    begin = np.stack([plan.start((number,)) for number in range(options.filters)])

    started = time.perf_counter()
    result = convscope.filters(
        network, LAYER, range(options.filters), recipe="classic", steps=options.steps, precision=options.precision
    )
    ours = time.perf_counter() - started
    started = time.perf_counter()
    _, finals = plain(network.model, begin, options.steps)
    theirs = time.perf_counter() - started

    if options.out:
        convscope.save(result, options.out)
    reached = np.array([row.activation for row in result.rows])
    apart = np.abs(reached - finals) / np.abs(finals)
    statuses = [row.status for row in result.rows]
    print(f"{options.filters} filters of {LAYER}, {options.steps} steps, 180 x 180 pixels, tensorflow {tf.__version__}")
    print(f"plain procedure {theirs:.1f} s, convscope with its noise images {ours:.1f} s")
    print(f"computed in {result.parameters.precision}")
    print(f"ratio {theirs / ours:.2f}")
    print(f"final activations apart: median {np.median(apart):.2e}, largest {apart.max():.2e}")
    print(", ".join(f"{statuses.count(status)} {status}" for status in ("alive", "weak", "dead")))


if __name__ == "__main__":
    main()
