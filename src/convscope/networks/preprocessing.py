"""The scaling of pixels before they enter a network, and its certainty.

Every preprocessing here is affine for each channel: `x = (pixel - mean) / std` on pixels 0..255, in RGB or BGR
order. So one small class applies it, undoes it and knows the range that the network sees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope import schema
from convscope.errors import UsageError, option
from convscope.images.natural import MEAN as IMAGENET_MEAN
from convscope.schema import Json

CERTAINTIES = FOUND, GUESS, MEASURED, SET = ("found", "guess", "measured", "set")

# ImageNet's channel deviations as torchvision and keras.applications use them, RGB on 0..1.
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Caffe's means, on 0..255 in the order blue, green, red.
_CAFFE_MEAN = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class Preprocessing:
    """`x = (pixel - mean) / std` for each channel.

    Attributes:
        name: "none", "0..1", "-0.5..0.5", "-1..1", "caffe", "torch" or "mean,std".
        mean, std: one value, or one for each channel, in pixel units 0..255 and in the network's order.
        bgr: True if the network takes blue first.
        certainty: one of `CERTAINTIES`: "found" (in the model), "measured" (on the model: see `measured`), "guess" or
            "set" (by the user).
        reason: why this one, for people.
        named_after: the name that a guess goes by, of the model or of one in it; None where it goes by no name.
        instead_of: the name of the guess that a measurement contradicts; None where there is none.
    """

    name: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    bgr: bool = False
    certainty: str = SET
    reason: str = "set by the user"
    named_after: str | None = None
    instead_of: str | None = None

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels `(..., c)` in 0..255 as the network takes them, float32."""
        pixels = pixels[..., ::-1] if self.bgr and pixels.shape[-1] == 3 else pixels
        return ((pixels - self._mean(pixels)) / self._std(pixels)).astype(np.float32)

    def restore(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `apply`: pixels `(..., c)` around 0..255, not clipped, float32."""
        pixels = (x * self._std(x) + self._mean(x)).astype(np.float32)
        return pixels[..., ::-1] if self.bgr and pixels.shape[-1] == 3 else pixels

    def range(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """The values `(c,)` that black and white pixels take."""
        black = self.apply(np.zeros((1, channels), np.float32))[0]
        white = self.apply(np.full((1, channels), 255, np.float32))[0]
        return black, white

    def because(self, certainty: str, reason: str) -> Preprocessing:
        """The same preprocessing with another certainty and reason."""
        return replace(self, certainty=certainty, reason=reason)

    @property
    def values(self) -> str:
        """What pixels become, for people."""
        return _VALUES.get(self.name, f"minus {_numbers(self.mean)}, divided by {_numbers(self.std)}")

    @property
    def text(self) -> str:
        """One line for people; a guess is called a guess."""
        prefix = {GUESS: "a guess: ", FOUND: "found: ", MEASURED: "measured: ", SET: ""}[self.certainty]
        return f"{self.values} ({prefix}{self.reason})"

    def describe(self) -> dict[str, Json]:
        """Plain JSON values for provenance."""
        return {
            "name": self.name,
            "text": self.text,
            "mean": list(self.mean),
            "std": list(self.std),
            "order": "bgr" if self.bgr else "rgb",
            "certainty": self.certainty,
            "reason": self.reason,
            "named_after": self.named_after,
            "instead_of": self.instead_of,
        }

    def check_channels(self, channels: int) -> None:
        """Refuse numbers of the user's for another number of channels; those of presets are averaged.

        Raises:
            UsageError: a mean or a deviation for neither all channels nor each of them.
        """
        own = self.certainty == SET and self.name not in PRESETS
        counts = (len(self.mean), len(self.std))
        if own and not set(counts) <= {1, channels}:
            several = channels > 1
            each = f", or {channels} means and then {channels} deviations" if several else ""
            raise UsageError(
                f"the network takes images of {channels} channel{'s' if several else ''}, so {option('preprocess')} "
                f"needs one mean and one deviation{each}; found {counts[0]} and {counts[1]}.",
                code="preprocessing-misfit",
                expected=channels,
                found=list(counts),
            )

    def _mean(self, x: np.ndarray) -> np.ndarray:
        return _for_channels(self.mean, x.shape[-1])

    def _std(self, x: np.ndarray) -> np.ndarray:
        return _for_channels(self.std, x.shape[-1])


def _deviation(value: object, where: str) -> float:
    found = schema.number(value, where)
    if found <= 0:
        raise schema.Misfit(where, "a deviation above 0", schema.shown(value))
    return found


# The reader of the fields of a preprocessing as JSON has them.
RECORD = schema.record(
    Preprocessing,
    mean=schema.sequence(schema.number, 1),
    std=schema.sequence(_deviation, 1),
    certainty=schema.one_of(*CERTAINTIES),
)
_DESCRIBED = schema.entries(
    dict.fromkeys(("name", "mean", "std", "certainty", "reason"), schema.anything),
    {"order": schema.one_of("rgb", "bgr")},
)


def read(value: object, where: str) -> Preprocessing:
    """The preprocessing that `Preprocessing.describe` wrote; a reader as those of `schema`."""
    found = _DESCRIBED(value, where)
    return RECORD({**found, "bgr": found.get("order") == "bgr"}, where)


_VALUES = {
    "none": "none, pixels 0..255 go in unchanged",
    "0..1": "pixels scaled to 0..1",
    "-0.5..0.5": "pixels scaled to -0.5..0.5",
    "-1..1": "pixels scaled to -1..1",
    "caffe": "BGR minus ImageNet's mean",
    "torch": "ImageNet's mean and deviation",
}


def _for_channels(values: tuple[float, ...], channels: int) -> np.ndarray:
    """One value for each channel; RGB statistics on another number of channels are averaged."""
    array = np.asarray(values, np.float32)
    return array if len(values) in (1, channels) else np.full(channels, array.mean(), np.float32)


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


PRESETS = {
    preset.name: preset
    for preset in (
        Preprocessing("none"),
        Preprocessing("0..1", std=(255.0,)),
        Preprocessing("-0.5..0.5", mean=(127.5,), std=(255.0,)),
        Preprocessing("-1..1", mean=(127.5,), std=(127.5,)),
        Preprocessing("caffe", mean=_CAFFE_MEAN, bgr=True),
        Preprocessing(
            "torch",
            mean=tuple(255 * value for value in IMAGENET_MEAN),
            std=tuple(255 * value for value in _IMAGENET_STD),
        ),
    )
}


@dataclass(frozen=True)
class Family:
    """A family of `keras.applications`: the range of its prepared images."""

    pattern: str
    preset: str
    size: int = 224


# Each pattern is matched against a model's name (and the name after "keras:") in lower case; first match wins.
FAMILIES = (
    Family(r"resnet(50|101|152)v2", "-1..1"),
    Family(r"resnet(50|101|152)", "caffe"),
    Family(r"vgg(16|19)", "caffe"),
    Family(r"mobilenet_?v3.*", "none"),
    Family(r"mobilenet.*", "-1..1"),
    Family(r"densenet.*", "torch"),
    Family(r"inception_?v3|inception_?resnet_?v2|xception", "-1..1", 299),
    Family(r"nasnet_?large", "-1..1", 331),
    Family(r"nasnet.*", "-1..1"),
    Family(r"(efficientnet|convnext).*", "none"),
)


def family_of(name: str) -> Family | None:
    """The family whose pattern the whole of `name` answers to, or None."""
    return next((family for family in FAMILIES if re.fullmatch(family.pattern, name.lower())), None)


def range_before_scaling(factor: float) -> str:
    """ "none" or "0..1": the pixels that a layer inside the model expects, which multiplies them by `factor`.

    Networks see values that spread over about 1 to 5 units (0..1, -1..1, ImageNet's deviations), so the factor shows
    whether 0..255 or 0..1 is expected.
    """
    return "none" if abs(np.log(255 * abs(factor) / 2)) < abs(np.log(abs(factor) / 2)) else "0..1"


def parse(given: str | Sequence[float]) -> Preprocessing:
    """The preprocessing that a text or numbers name.

    Args:
        given: a preset's name, or "MEAN,STD" (two numbers, or the means and then the deviations of each channel)
            in pixel units 0..255: `x = (pixel - MEAN) / STD`; or these numbers in a sequence.

    Raises:
        UsageError: neither a preset nor as many means as positive deviations. Whether there are as many as the network
            has channels is checked when it is opened.

    Example:
        >>> parse("1,2,3,4,10,10,10,20").std
        (10.0, 10.0, 10.0, 20.0)
    """
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    try:
        numbers = [float(part) for part in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        numbers = []
    half = len(numbers) // 2
    if not half or len(numbers) != 2 * half or min(numbers[half:]) <= 0 or not np.isfinite(numbers).all():
        raise UsageError(
            f"preprocessing {given!r:.80} is not known. Expected one of {', '.join(PRESETS)}, or MEAN,STD in pixels "
            'such as "127.5,127.5": a mean and a deviation above 0, or the means of all channels and then their '
            "deviations.",
            code="preprocessing-unknown",
            name=f"{given!r:.80}" if not isinstance(given, str) else given,
        )
    return Preprocessing("mean,std", tuple(numbers[:half]), tuple(numbers[half:]))
