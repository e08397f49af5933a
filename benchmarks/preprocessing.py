"""How often the measured preprocessing is right: networks of the assets with batch norm, and small ones trained here.

    python -m benchmarks.preprocessing [--steps 250] [--out docs/preprocessing-measured.md]

The small networks are trained with a preprocessing that is known, on the photos of the assets, none of which is among
the images that convscope measures with; without the assets on textures of natural spectra and colours. Some are
trained on other images (digits, traffic signs, a road), which natural images don't resemble.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import torch
from keras import layers
from PIL import Image
from torch import nn

import convscope
from benchmarks.ascents import ASSETS
from convscope.errors import ConvscopeError
from convscope.images.natural import COLOURS, MEAN
from convscope.networks import Network
from convscope.networks.preprocessing import PRESETS, Preprocessing

SIDE, CROPS, CLASSES, BATCH = 32, 1500, 10, 32
SUFFIXES = (".jpg", ".jpeg", ".png")
# The preprocessing of each network of the assets that has batch norms, from its README.
TRUTH = {
    "cat_mood_nested_mobilenetv2.keras": "-1..1",
    "emotions_mini_xception.hdf5": "-1..1",
    "mobilenet_v1_0.25_224.keras": "-1..1",
    "digits_torchscript.pt": "0..1",
    "resnet20_cifar10.th": "torch",
}


@dataclass(frozen=True)
class Trained:
    """A small network to train.

    Attributes:
        kind: "norm, ReLU", "ReLU, norm", "norm on the image", "5x5" or "depthwise".
        preset: the preprocessing that it is trained with.
        framework: "torch" or "keras".
        grey: takes one channel; bgr: blue first; images: the folders of the assets that it is trained on.
    """

    kind: str
    preset: str
    framework: str = "torch"
    grey: bool = False
    bgr: bool = False
    images: tuple[str, ...] = ("imagenet", "cats", "dogs")

    @property
    def text(self) -> str:
        """For the table."""
        what = [self.framework, self.kind]
        what += ["grey"] * self.grey + ["blue first"] * self.bgr
        what += [f"trained on {', '.join(self.images)}"] * (self.images != Trained.images)
        return "; ".join(what)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that it is trained with."""
        preset = PRESETS[self.preset]
        return replace(preset, bgr=preset.bgr or self.bgr)


@dataclass(frozen=True)
class Row:
    """One network: the truth, the guess without the measurement, and the network with it."""

    text: str
    truth: str
    guess: str
    used: Preprocessing
    numbers: str

    @property
    def verdict(self) -> str:
        """ "right", "wrong" or "undecided" of the measurement."""
        if self.used.certainty != "measured":
            return "undecided"
        return "right" if self.used.name == self.truth else "wrong"


def small_networks() -> Iterator[Trained]:
    """The networks to train."""
    for number, preset in enumerate(PRESETS):
        yield Trained("norm, ReLU", preset)
        yield Trained("ReLU, norm", preset, "keras")
        yield Trained("norm on the image", preset, ("torch", "keras")[number % 2])
    for number, preset in enumerate(("none", "0..1", "-0.5..0.5", "-1..1")):
        yield Trained("norm, ReLU", preset, ("torch", "keras")[number % 2], grey=True)
    for preset in ("0..1", "torch"):
        yield Trained("5x5", preset)
    for preset in ("none", "-1..1"):
        yield Trained("depthwise", preset, "keras")
        yield Trained("norm, ReLU", preset, bgr=True)


def other_domains() -> Iterator[Trained]:
    """Networks that are trained on images which natural ones don't resemble."""
    for folder in ("digits", "trafficsigns", "steering"):
        for preset in ("none", "0..1", "-1..1"):
            yield Trained("norm, ReLU", preset, images=(folder,))


# -- training --------------------------------------------------------------------------------------------------


@cache
def crops(folders: tuple[str, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Squares cut out of photos `(n, 32, 32, 3)` float32, and the number of the photo of each, by ten."""
    files = sorted(
        file for name in folders for file in (ASSETS / "photos" / name).rglob("*") if file.suffix in SUFFIXES
    )
    rng = np.random.default_rng(seed)
    if not files:
        made = textures(CROPS, rng)
        return made, np.arange(CROPS) % CLASSES
    numbers = rng.integers(0, len(files), CROPS)
    found = np.empty((CROPS, SIDE, SIDE, 3), np.float32)
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            photo = opened.convert("RGB")
        for place in np.flatnonzero(numbers == number):
            side = rng.uniform(0.6, 1) * min(photo.size)
            x, y = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
            box = (x, y, x + side, y + side)
            found[place] = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
    return found, numbers % CLASSES


def textures(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random images whose amplitudes fall with the frequency, in natural colours."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 0.5 / SIDE
    shape = (count, 3, *frequency.shape)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency**1.1
    maps = np.fft.irfft2(spectrum, s=(SIDE, SIDE)).transpose(0, 2, 3, 1)
    return (255 * np.clip(maps / maps.std(axis=(0, 1, 2)) @ COLOURS.T + MEAN, 0, 1)).astype(np.float32)


def trained(which: Trained, steps: int, seed: int) -> Network:
    """The network after its training, opened as a user would, with nothing said of its preprocessing."""
    pixels, labels = crops(which.images)
    if which.grey:
        pixels = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
    x = which.preprocessing.apply(pixels)
    rng = np.random.default_rng(seed)
    batches = [rng.integers(0, len(x), BATCH) for _ in range(steps)]
    if which.framework == "torch":
        return convscope.open_model(_train_torch(which, x, labels, batches), size=SIDE)
    return convscope.open_model(_train_keras(which, x, labels, batches))


def _train_torch(which: Trained, x: np.ndarray, labels: np.ndarray, batches: Sequence[np.ndarray]) -> nn.Module:
    torch.manual_seed(len(batches))
    model = _torch_model(which, x.shape[-1])
    images, targets = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(labels)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch in batches:
        loss = nn.functional.cross_entropy(model(images[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _torch_model(which: Trained, channels: int) -> nn.Module:
    side = 5 if which.kind == "5x5" else 3
    made: list[nn.Module] = [nn.BatchNorm2d(channels)] if which.kind == "norm on the image" else []
    for width in (12, 16, 24):
        made.append(nn.Conv2d(channels, width, side, padding=side // 2))
        made += [nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def _train_keras(which: Trained, x: np.ndarray, labels: np.ndarray, batches: Sequence[np.ndarray]) -> keras.Model:
    keras.utils.set_random_seed(len(batches))
    model = _keras_model(which, x.shape[1:])
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy())
    order = np.concatenate(batches)
    model.fit(x[order], labels[order], batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return model


def _keras_model(which: Trained, shape: tuple[int, ...]) -> keras.Model:
    made: list[keras.layers.Layer] = [layers.Input(shape)]
    if which.kind == "norm on the image":
        made.append(layers.BatchNormalization(momentum=0.9))
    for number, width in enumerate((12, 16, 24)):
        if which.kind == "depthwise" and number:
            made += [layers.DepthwiseConv2D(3, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
        made.append(layers.Conv2D(width, 1 if which.kind == "depthwise" and number else 3, padding="same"))
        after = [layers.BatchNormalization(momentum=0.9), layers.ReLU()]
        made += after[::-1] if which.kind == "ReLU, norm" else after
        made.append(layers.MaxPooling2D())
    return keras.Sequential([*made, layers.GlobalAveragePooling2D(), layers.Dense(CLASSES, activation="softmax")])


# -- the networks of the assets --------------------------------------------------------------------------------


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride = 2 if width > channels else 1
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, self.stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        side = (y.shape[1] - x.shape[1]) // 2
        x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class _CifarResNet(nn.Module):
    """ResNet-20 for CIFAR-10, with the names of `resnet20_cifar10.th`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(_Block(16, 32), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64), _Block(64, 64), _Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def cifar_resnet() -> nn.Module:
    """For `open_model("benchmarks/preprocessing.py:cifar_resnet", weights=...)`."""
    return _CifarResNet()


def of_assets() -> Iterator[tuple[str, Network]]:
    """Every network of the assets that opens and has trained batch norms."""
    for file in sorted(file for folder in ("keras", "torch", "onnx") for file in (ASSETS / folder).glob("*")):
        try:
            if file.name == "resnet20_cifar10.th":
                network = convscope.open_model(f"{Path(__file__)}:cifar_resnet", weights=file, size=SIDE)
            else:
                network = convscope.open_model(file)
        except ConvscopeError:
            continue  # weights alone, labels, code that is not run
        if network.measurement is not None:
            yield file.name, network


# -- the tables ------------------------------------------------------------------------------------------------


def row_of(text: str, truth: str, network: Network) -> Row:
    """The row of a network."""
    used, found = network.preprocessing, network.measurement
    assert found is not None
    numbers = f"{found.best.name} {found.best.text} | {found.next.name} {found.next.text}"
    return Row(text, truth, used.instead_of or used.name, used, numbers)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table, and their sum."""
    yield "| network | truth | guess without | with | certainty | nearest, KL | next, KL | measured |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        yield (
            f"| {row.text} | {row.truth} | {row.guess} | {row.used.name} | {row.used.certainty} | {row.numbers} "
            f"| {row.verdict} |"
        )
    verdicts = [row.verdict for row in rows]
    without, used = (sum(name == row.truth for row, name in pairs) for pairs in _pairs(rows))
    yield ""
    yield (
        f"Of {len(rows)}: without the measurement {without} guesses right, {len(rows) - without} wrong; measured "
        f"{verdicts.count('right')} right, {verdicts.count('wrong')} wrong, {verdicts.count('undecided')} undecided; "
        f"what is used, measured or guessed, is right for {used}."
    )
    yield ""


def _pairs(rows: Sequence[Row]) -> tuple[list[tuple[Row, str]], list[tuple[Row, str]]]:
    return [(row, row.guess) for row in rows], [(row, row.used.name) for row in rows]


def lines(steps: int) -> Iterator[str]:
    """The page."""
    source = "photos of the assets" if (ASSETS / "photos").is_dir() else "textures, as the assets are not here"
    yield "# Measured preprocessing: how often it is right"
    yield ""
    yield "Made by `python -m benchmarks.preprocessing --out docs/preprocessing-measured.md`; the method is in"
    yield "[preprocessing.md](preprocessing.md). `guess without` is what convscope would take without the measurement."
    yield ""
    if ASSETS.is_dir():
        yield "## Networks that others trained"
        yield ""
        yield from table([row_of(name, TRUTH.get(name, "unknown"), network) for name, network in of_assets()])
    yield "## Small networks trained here"
    yield ""
    yield f"{steps} steps of {BATCH} crops of {SIDE}x{SIDE} pixels ({source}); three convolutions."
    yield ""
    yield from table(_trained_rows(small_networks(), steps))
    if ASSETS.is_dir():
        yield "## Small networks trained on images that natural ones don't resemble"
        yield ""
        yield from table(_trained_rows(other_domains(), steps))


def _trained_rows(which: Iterator[Trained], steps: int) -> list[Row]:
    rows = []
    for seed, one in enumerate(which):
        rows.append(row_of(one.text, one.preset, trained(one, steps, seed)))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", help="a Markdown file to write")
    options = parser.parse_args()
    text = "\n".join(lines(options.steps)).rstrip() + "\n"
    print(text)
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
