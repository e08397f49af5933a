"""Does the heatmap find the right region? Measured on 100 mosaics of four known contents.

    python training/mosaics.py

Each mosaic is 2x2 tiles of the held-out bands of four different images. Each of the four classes is
explained in turn; measured are the share of the heatmap's positive mass that lies on the tile of the
explained class, whether that tile has more of it than any other, and whether the highest point lies on
it (the pointing game). Controls: chance (a quarter), and the edges of the mosaic.

Edges don't depend on the class, so over all four classes their share is a quarter.
They could do better on the class that the network finds most probable, if the network went for the tile
with most edges: so that class is measured on its own, too.

The figures are printed and added to `model.json`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import json
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from pictures import CLASSES, LUMA, PATCH, cut, regions
from scipy import ndimage

import convscope

DEMO = Path(__file__).resolve().parent.parent / "src" / "convscope" / "demo"
SEED = 4100
MOSAICS = 100


def grad_cam(network: keras.Model, pictures: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Grad-CAM on the logits at the last spatial layer, written out: the signed map, `(n, h, w)` float32.

    A slow, clear reference. `network` ends in global average pooling and one dense softmax layer.
    """
    last = [layer for layer in network.layers if len(layer.output.shape) == 4][-1]
    head = network.layers[-1]
    activation = keras.Model(network.input, last.output)(pictures, training=False)
    with tf.GradientTape() as tape:
        tape.watch(activation)
        logits = tf.reduce_mean(activation, axis=(1, 2)) @ head.kernel + head.bias
        score = tf.gather(logits, classes, batch_dims=1)
    weights = tf.reduce_mean(tape.gradient(score, activation), axis=(1, 2), keepdims=True)
    return tf.reduce_sum(weights * activation, axis=-1).numpy()


def explain(network: keras.Model, pictures: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The heatmaps that are measured, `(n, h, w)`: convscope's own, as its users get them.

    They are compared with `grad_cam`, the same formula written out.
    """
    opened = convscope.open_model(network, size=pictures.shape[1:3])
    maps = convscope.heatmap(opened, list(pictures.astype(np.uint8)), [int(label) for label in classes]).maps
    np.testing.assert_allclose(maps, grad_cam(network, pictures, classes), atol=1e-4 * np.abs(maps).max())
    return maps


def mosaic(tiles: list[np.ndarray]) -> np.ndarray:
    """Four tiles, put together row by row."""
    return np.concatenate([np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)])


def mosaics(count: int = MOSAICS, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """`(count, 128, 128, 3)` float32 images of held-out tiles, and the class of each tile, `(count, 4)`."""
    rng = np.random.default_rng(seed)
    _, held = regions()
    contents = np.stack([rng.choice(len(CLASSES), 4, replace=False) for _ in range(count)])
    made = [mosaic([cut(held[label], rng) for label in four]) for four in contents]
    return np.stack(made).astype(np.float32), contents


def edges(pictures: np.ndarray) -> np.ndarray:
    """Size of the gradient of the grey image, `(n, h, w)`: a control that does not depend on the class."""
    luma = pictures @ LUMA
    return np.hypot(ndimage.sobel(luma, axis=1), ndimage.sobel(luma, axis=2))


def quarters(maps: np.ndarray) -> np.ndarray:
    """The maps cut into their four tiles, row by row: `(n, 4, pixels)`."""
    n, height, width = maps.shape
    cut_up = maps.reshape(n, 2, height // 2, 2, width // 2).transpose(0, 1, 3, 2, 4)
    return cut_up.reshape(n, 4, -1)


def shares(maps: np.ndarray) -> np.ndarray:
    """Share of the positive mass on each tile, `(n, 4)`; a map without any counts a quarter for each."""
    mass = np.maximum(quarters(maps), 0).sum(axis=2)
    total = mass.sum(axis=1, keepdims=True)
    return np.where(total > 0, mass / np.where(total > 0, total, 1), 0.25)


def pointed(maps: np.ndarray) -> np.ndarray:
    """Whether the highest point lies on each tile, `(n, 4)` bool; a constant map points nowhere."""
    peak = quarters(maps).max(axis=2)
    flat = np.ptp(maps, axis=(1, 2)) == 0
    return (peak == peak.max(axis=1, keepdims=True)) & ~flat[:, None]


def interval(values: np.ndarray, seed: int = SEED, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; drawn are whole mosaics (rows of `values`)."""
    each = values.reshape(len(values), -1).mean(axis=1)
    means = np.random.default_rng(seed).choice(each, (draws, len(each))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def figure(values: np.ndarray) -> dict:
    """Mean and interval, rounded."""
    low, high = interval(values)
    return {"mean": round(float(values.mean()), 4), "interval": [round(low, 4), round(high, 4)]}


def measure(network: keras.Model) -> dict:
    """All figures of the mosaics: each class explained in turn, and the most probable class alone."""
    pictures, contents = mosaics()
    probabilities = network.predict(pictures, verbose=0)
    top = np.take_along_axis(probabilities, contents, axis=1).argmax(axis=1)
    maps = [explain(network, pictures, contents[:, tile]) for tile in range(4)]
    heat = judged(maps)
    edge = judged([edges(pictures)] * 4)
    present = (contents == probabilities.argmax(axis=1)[:, None]).any(axis=1)
    return {
        "mosaics": len(pictures),
        "tile": PATCH,
        "seed": SEED,
        "chance": 0.25,
        "heatmap": {name: figure(values) for name, values in heat.items()},
        "edges": {name: figure(values) for name, values in edge.items()},
        "heatmap_top_class": {name: figure(of(values, top)) for name, values in heat.items()},
        "edges_top_class": {name: figure(of(values, top)) for name, values in edge.items()},
        "heatmap_share_each_class": {
            name: round(float(heat["share"][contents == i].mean()), 3) for i, name in enumerate(CLASSES)
        },
        "prediction_is_one_of_the_four": round(float(present.mean()), 4),
    }


def judged(maps: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Measures of the map of each tile's class, `(n, 4)`: its share of the mass, most mass, highest point."""
    mass = np.stack([shares(m) for m in maps], axis=1)
    hits = np.stack([pointed(m) for m in maps], axis=1)
    own = np.einsum("nii->ni", mass)
    return {
        "share": own,
        "most": (own == mass.max(axis=2)) & (own > 0.25),
        "pointing": np.einsum("nii->ni", hits),
    }


def of(values: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """One of the four values of each mosaic, `(n,)`."""
    return np.take_along_axis(values, tile[:, None], axis=1)[:, 0]


def table(figures: dict) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| on the right tile | share of the mass | most of the mass | highest point |",
        "| --- | --- | --- | --- |",
    ]
    rows = {
        "heatmap, each class in turn": "heatmap",
        "edges, each class in turn": "edges",
        "heatmap, most probable class": "heatmap_top_class",
        "edges, most probable class": "edges_top_class",
    }
    for label, key in rows.items():
        lines.append(f"| {label} | {' | '.join(map(cell, figures[key].values()))} |")
    return "\n".join([*lines, "| chance | 25.0% | 25.0% | 25.0% |"])


def cell(value: dict) -> str:
    """Mean and interval of a figure as text."""
    low, high = value["interval"]
    return f"{value['mean']:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    """Measure the shipped network and add the figures to `model.json`."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    network = keras.saving.load_model(DEMO / "model.keras", compile=False)
    figures = measure(network)
    print(table(figures))
    print("share for each class:", figures["heatmap_share_each_class"])
    print(f"the prediction is one of the four: {figures['prediction_is_one_of_the_four']:.0%} of the mosaics")
    story = json.loads((DEMO / "model.json").read_text(encoding="utf-8"))
    text = json.dumps({**story, "mosaics": figures}, indent=2, ensure_ascii=False)
    (DEMO / "model.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
