"""Train the small network that `convscope demo` shows, measure it, and write it with its figures.

    python training/train_demo.py              # trains, measures on the held-out bands, writes the files
    python training/train_demo.py --validate   # measures on other bands, writes nothing: to try things out

The task: from which of the images does a patch come? Needs `pip install -e ".[train,tensorflow]"`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import argparse
import io
import json
import platform
import time
from pathlib import Path

import keras
import numpy as np
import scipy
import skimage
import tensorflow as tf
from baseline import strongest
from keras import layers
from pictures import CLASSES, GAP, HELD_OUT, LEAST_SPREAD, PATCH, SOURCES, cut, grey, patches, regions
from PIL import Image

DEMO = Path(__file__).resolve().parent.parent / "src" / "convscope" / "demo"
SEED = 2026
BATCH = 52  # four patches of each class
STEPS = 2800
MIXED = 0.5  # share of the training patches that are put together from four
WIDTHS = (16, 32, 64, 96)
SCALES = (40, 96)  # a training patch is a square of 40 to 96 pixels, resized to PATCH
EACH_HELD_OUT = 100  # held-out patches of each image
EACH_BASELINE = 400  # training patches of each image that the baseline learns from


def trainable() -> keras.Model:
    """Blocks of convolution, batch normalisation, ReLU and pooling; global average pooling; a softmax."""
    picture = x = keras.Input((None, None, 3), name="picture")
    x = layers.Rescaling(1 / 255, name="rescaling")(x)
    for block, width in enumerate(WIDTHS, start=1):
        if block > 1:
            x = layers.MaxPooling2D(2, name=f"block{block - 1}_pool")(x)
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"block{block}_conv")(x)
        x = layers.BatchNormalization(momentum=0.95, name=f"block{block}_norm")(x)
        x = layers.ReLU(name=f"block{block}_relu")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    x = layers.Dense(len(CLASSES), activation="softmax", name="classes")(x)
    return keras.Model(picture, x, name="convscope_demo_training")


def plain() -> keras.Model:
    """The network that is shipped: the same function, with each normalisation inside its convolution."""
    picture = x = keras.Input((None, None, 3), name="picture")
    x = layers.Rescaling(1 / 255, name="rescaling")(x)
    for block, width in enumerate(WIDTHS, start=1):
        if block > 1:
            x = layers.MaxPooling2D(2, name=f"block{block - 1}_pool")(x)
        x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    x = layers.Dense(len(CLASSES), activation="softmax", name="classes")(x)
    return keras.Model(picture, x, name="convscope_demo")


def fold(trained: keras.Model) -> keras.Model:
    """Put each batch normalisation of `trained` into its convolution, and centre the logits.

    A softmax leaves open what all logits have in common. Here it is taken out (their mean is 0), so that
    a logit shows how much more probable a class is than the others. No probability changes.
    """
    network = plain()
    for block in range(1, len(WIDTHS) + 1):
        (kernel,) = trained.get_layer(f"block{block}_conv").get_weights()
        gamma, beta, mean, variance = trained.get_layer(f"block{block}_norm").get_weights()
        gain = gamma / np.sqrt(variance + trained.get_layer(f"block{block}_norm").epsilon)
        network.get_layer(f"block{block}_conv").set_weights([kernel * gain, beta - mean * gain])
    kernel, bias = trained.get_layer("classes").get_weights()
    kernel, bias = kernel - kernel.mean(axis=1, keepdims=True), bias - bias.mean()
    network.get_layer("classes").set_weights([kernel, bias])
    return network


def jpeg(patch: np.ndarray, quality: int) -> np.ndarray:
    """The patch after JPEG compression, so that no image is known by its noise alone."""
    file = io.BytesIO()
    Image.fromarray(patch).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def jitter(batch: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Other light and other colours: gain and offset of each channel and of all together, float32 0..255."""
    n = len(batch)
    x = batch.astype(np.float32)
    level = x.mean(axis=(1, 2, 3), keepdims=True)
    gain = np.exp(rng.uniform(-0.4, 0.4, (n, 1, 1, 3)) * strength)
    contrast = np.exp(rng.uniform(-0.5, 0.4, (n, 1, 1, 1)) * strength)
    offset = rng.uniform(-20, 20, (n, 1, 1, 3)) + rng.uniform(-40, 40, (n, 1, 1, 1))
    x = ((x - level) * contrast + level) * gain + offset * strength
    return np.clip(x, 0, 255).astype(np.float32)


def training_batch(areas: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`BATCH` patches and their labels, `(n, classes)`: as many of each class, and half of them mixed.

    They have other sizes, are flipped, compressed, seen in other light, and half of them are grey.
    """
    labels = np.tile(np.arange(len(areas)), BATCH // len(areas))
    found = []
    for label in labels:
        patch = cut(areas[label], rng, *SCALES)
        patch = patch[:, ::-1] if rng.random() < 0.5 else patch
        patch = patch[::-1] if rng.random() < 0.5 else patch
        found.append(jpeg(patch, int(rng.integers(50, 96))) if rng.random() < 0.5 else patch)
    batch = jitter(np.stack(found), rng)
    colourless = rng.random(BATCH) < 0.5
    batch[colourless] = grey(batch[colourless])
    batch += rng.normal(0, rng.uniform(0, 5, (BATCH, 1, 1, 1)), batch.shape)
    batch, shares = mix(np.clip(batch, 0, 255).astype(np.float32), np.eye(len(areas))[labels], rng)
    return batch, shares.astype(np.float32)


def mix(batch: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put some patches together from the corners of four; their classes' shares go by area (CutMix).

    Without it an image of several contents is assigned to the class whose own patches are the most varied.
    """
    mixed, parts = batch.copy(), shares.copy()
    for i in np.flatnonzero(rng.random(len(batch)) < MIXED):
        row, column = rng.integers(PATCH // 4, PATCH * 3 // 4 + 1, 2)
        parts[i] = 0
        for rows in (slice(0, row), slice(row, PATCH)):
            for columns in (slice(0, column), slice(column, PATCH)):
                other = rng.integers(len(batch))
                mixed[i, rows, columns] = batch[other, rows, columns]
                area = (rows.stop - rows.start) * (columns.stop - columns.start) / PATCH**2
                parts[i] += area * shares[other]
    return mixed, parts


def train(areas: list[np.ndarray]) -> keras.Model:
    """Train from scratch; the same seed gives the same network on the same machine."""
    keras.utils.set_random_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = trainable()
    rate = keras.optimizers.schedules.CosineDecay(0.0, STEPS - 100, warmup_target=3e-3, warmup_steps=100)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01)
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    start = time.monotonic()
    for step in range(1, STEPS + 1):
        loss, accuracy = model.train_on_batch(*training_batch(areas, rng))
        if step % 200 == 0:
            took = time.monotonic() - start
            print(f"step {step:5}  loss {loss:.3f}  largest part right {accuracy:.3f}  {took:.0f} s", flush=True)
            model.reset_metrics()
    return model


def right(network: keras.Model, batch: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each patch was classified correctly, `(n,)` bool."""
    return network.predict(batch.astype(np.float32), verbose=0).argmax(axis=1) == labels


def measure(network: keras.Model, kept: list[np.ndarray], held: list[np.ndarray]) -> dict:
    """Accuracy on held-out patches in colour, in grey and in other light, beside the strongest baseline's."""
    known, known_labels = patches(kept, EACH_BASELINE, SEED + 1)
    asked, labels = patches(held, EACH_HELD_OUT, SEED + 2)
    lit = [jitter(x, np.random.default_rng(SEED + i)) for i, x in ((3, known), (4, asked))]
    conditions = {"colour": (known, asked), "grey": (grey(known), grey(asked)), "other_light": tuple(lit)}
    figures = {}
    for name, (learned, question) in conditions.items():
        hits = right(network, question, labels)
        rule, score = strongest(learned, known_labels, question, labels)
        each = {c: round(float(hits[labels == i].mean()), 3) for i, c in enumerate(CLASSES)}
        figures[name] = {
            "network": round(float(hits.mean()), 4),
            "baseline": round(score, 4),
            "baseline_rule": rule,
            "network_each_class": each,
        }
    return figures


def table(figures: dict) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| held-out patches | network | mean and spread of the colours | chance |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        label, base = name.replace("_", " "), f"{row['baseline']:.1%} ({row['baseline_rule']})"
        lines.append(f"| {label} | {row['network']:.1%} | {base} | {1 / len(CLASSES):.1%} |")
    return "\n".join(lines)


def story(network: keras.Model, figures: dict) -> dict:
    """The content of `model.json`: the classes, the task, the figures and their versions."""
    return {
        "name": network.name,
        "classes": list(CLASSES),
        "input": "RGB pictures of any size, values 0..255 (the network divides by 255 itself)",
        "task": "from which picture does a patch come",
        "parameters": network.count_params(),
        "patch": PATCH,
        "held_out": {
            "rule": f"a band of {HELD_OUT:.0%} of each picture, {GAP} pixels from the training region",
            "sides": {source.name: source.side for source in SOURCES},
            "least_spread": LEAST_SPREAD,
            "patches": EACH_HELD_OUT * len(CLASSES),
        },
        "accuracy": {**figures, "chance": round(1 / len(CLASSES), 4)},
        "training": {"seed": SEED, "steps": STEPS, "batch": BATCH, "scales": list(SCALES), "mixed": MIXED},
        "licences": {source.name: source.licence for source in SOURCES},
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-image": skimage.__version__,
        },
    }


def main() -> None:
    """Train, fold, measure, and unless validating write `model.keras` and `model.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="measure on other bands, write nothing")
    validate = parser.parse_args().validate
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    kept, held = regions(validate)
    trained = train(kept)
    network = fold(trained)
    sample = patches(kept, 4, SEED)[0].astype(np.float32)
    difference = np.abs(trained.predict(sample, verbose=0) - network.predict(sample, verbose=0)).max()
    print(f"folding the normalisations changed the probabilities by at most {difference:.1e}")
    figures = measure(network, kept, held)
    print(table(figures))
    for name in figures:
        print(name, figures[name]["network_each_class"])
    if not validate:
        DEMO.mkdir(parents=True, exist_ok=True)
        network.save(DEMO / "model.keras")
        text = json.dumps(story(network, figures), indent=2, ensure_ascii=False)
        (DEMO / "model.json").write_text(text + "\n", encoding="utf-8")
        print(f"model.keras: {(DEMO / 'model.keras').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
