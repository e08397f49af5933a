"""The preprocessing that a network was trained with, measured from the stored statistics of its first batch norms.

A batch norm stores the mean and the variance, for each channel, of all that entered it in training. Natural images have
known statistics, so a preprocessing shows there: with the right one the images that convscope ships give about the
stored values at the first norms, with another one they don't.

The distance of a preprocessing is the Kullback-Leibler divergence KL(N(mean, variance) || N(stored mean, stored
variance)) of a channel, of which the median over the channels of a norm is taken, and the mean over the first three
norms. Order of colours does not show: red and blue are too alike in natural images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from convscope.arrays import batched
from convscope.images.image import InputImage
from convscope.images.natural import natural_images
from convscope.networks import preprocessing as pp
from convscope.networks.failing import attempted
from convscope.networks.foreign import Structure, Tensor
from convscope.networks.passes import Pass, Run
from convscope.schema import Json

if TYPE_CHECKING:
    from convscope.networks.network import Network

BATCH = 5  # images: one of each that convscope ships
NORMS = 3  # the first ones: later ones depend on what a network learned
LARGEST_KL = 0.15  # of a preprocessing that fits,
MARGIN = 3.0  # and the least distance of the next kind, as a multiple of it
CANDIDATES = ("none", "0..1", "-0.5..0.5", "-1..1", "caffe", "torch")
GREY_CANDIDATES = ("none", "0..1", "-0.5..0.5", "-1..1")


@dataclass(frozen=True, eq=False)
class StoredNorm:
    """A batch norm with what it stored in training.

    Attributes:
        path: of the norm.
        before: path of the layer whose output enters it; None where the prepared image itself does.
        mean, variance: `(c,)` of what entered it in training.
    """

    path: str
    before: str | None
    mean: np.ndarray
    variance: np.ndarray

    @property
    def trained(self) -> bool:
        """False if it stores what every norm does before training."""
        return not (np.all(self.mean == 0) and np.all(self.variance == 1))

    def distances(self, seen: Moments) -> np.ndarray:
        """KL(N(seen) || N(stored)) of each channel `(c,)`; infinite where what is seen is no number."""
        stored = np.maximum(np.asarray(self.variance, np.float64), _LEAST)
        variance = np.maximum(seen.variance, _LEAST)
        with np.errstate(all="ignore"):
            apart = (variance + np.square(seen.mean - self.mean)) / stored
            distances = 0.5 * (np.log(stored) - np.log(variance) + apart - 1)
        return np.where(np.isfinite(distances), distances, np.inf)


_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean and the variance of each channel: `(c,)` of several images, `(n, c)` of each of them; float64."""

    mean: np.ndarray
    variance: np.ndarray

    @property
    def together(self) -> Moments:
        """Those of all images, from those of each."""
        return Moments(self.mean.mean(axis=0), self.variance.mean(axis=0) + self.mean.var(axis=0))

    def of(self, image: int) -> Moments:
        """Those of one image."""
        return Moments(self.mean[image], self.variance[image])


@dataclass(frozen=True)
class Fit:
    """A preprocessing, by name, and its distance from the stored statistics."""

    name: str
    kl: float

    @property
    def text(self) -> str:
        """The distance, for people."""
        return _short(self.kl)


def _short(kl: float) -> str:
    return f"{kl:.2g}" if kl < 100 else f"{kl:.0f}"


def _number(kl: float) -> float | None:
    return kl if np.isfinite(kl) else None


@dataclass(frozen=True)
class Measurement:
    """The distances of all candidates.

    Attributes:
        fits: of each candidate, the best first.
        norms: paths of the norms; images: number of the images that it was measured on.
        other: of the preprocessing that the user gave or the model states, where it is no candidate.

    Example:
        >>> found = Measurement((Fit("-1..1", 0.02), Fit("torch", 0.17)), ("norm_1",), 15)
        >>> found.clear, found.text
        (True, 'KL 0.02 at the first batch norm, against 0.17 for the next kind, torch')
    """

    fits: tuple[Fit, ...]
    norms: tuple[str, ...]
    images: int
    other: Fit | None = None

    @property
    def best(self) -> Fit:
        """The candidate of the least distance."""
        return self.fits[0]

    @property
    def next(self) -> Fit:
        """The candidate after it."""
        return self.fits[1]

    @property
    def clear(self) -> bool:
        """True if the best one fits and no other does: then it is known and no guess."""
        return self.best.kl <= LARGEST_KL and self.next.kl >= MARGIN * self.best.kl

    def of(self, name: str) -> Fit | None:
        """The distance of the preprocessing `name`; None where it was not measured."""
        every = self.fits if self.other is None else (*self.fits, self.other)
        return next((fit for fit in every if fit.name == name), None)

    def contradiction(self, known: pp.Preprocessing) -> str:
        """The contradiction to what the user gave or the model states, for people; "" where there is none."""
        used = self.of(known.name)
        if not self.clear or used is None or used.kl < MARGIN * self.best.kl:
            return ""
        said = {pp.SET: "was given", pp.FOUND: "was found in the model"}.get(known.certainty, "is in use")
        return f"{self.best.name} fits better than {used.name}, which {said}: {self.text}; {used.name} has {used.text}"

    @property
    def text(self) -> str:
        """The numbers, for people."""
        norms = "the first batch norm" if len(self.norms) == 1 else f"the first {len(self.norms)} batch norms"
        if self.clear:
            return f"KL {self.best.text} at {norms}, against {self.next.text} for the next kind, {self.next.name}"
        if self.best.kl > LARGEST_KL:
            return f"natural images don't fit {norms}: KL {self.best.text} for {self.best.name}, the nearest"
        return f"{norms} don't decide: KL {self.best.text} for {self.best.name}, {self.next.text} for {self.next.name}"

    def describe(self) -> dict[str, Json]:
        """Plain JSON values; a distance that is no number is null."""
        return {
            "kl": {fit.name: _number(fit.kl) for fit in self.fits},
            "other": None if self.other is None else {"name": self.other.name, "kl": _number(self.other.kl)},
            "clear": self.clear,
            "norms": list(self.norms),
            "images": self.images,
        }


@dataclass(frozen=True)
class Resemblance:
    """How far one image lies from what the first norms saw in training, beside single natural images.

    One image varies less than all of a training set, so no single one has a distance of 0.

    Attributes:
        kl: of the image.
        natural: of each of the images that convscope ships.

    Example:
        >>> Resemblance(0.9, (0.1, 0.2, 0.4)).text
        'KL 0.9 from what the network was trained on, farther than each of 3 natural images (0.1 to 0.4)'
    """

    kl: float
    natural: tuple[float, ...]

    @property
    def farther(self) -> bool:
        """True if every natural image is nearer."""
        return self.kl > max(self.natural)

    @property
    def text(self) -> str:
        """The numbers, for people."""
        least, most = (_short(value) for value in (min(self.natural), max(self.natural)))
        place = "farther than each" if self.farther else "as near as some"
        return (
            f"KL {_short(self.kl)} from what the network was trained on, {place} of {len(self.natural)} natural images "
            f"({least} to {most})"
        )

    def describe(self) -> dict[str, Json]:
        """Plain JSON values; a distance that is no number is null."""
        return {
            "kl": _number(self.kl),
            "natural": [_number(min(self.natural)), _number(max(self.natural))],
            "farther_than_natural": self.farther,
        }


class Meter:
    """Measures what enters the first norms of a network.

    Args:
        network: it may be a draft, without a head.
        norms: its first ones, at least one.
    """

    def __init__(self, network: Network, norms: Sequence[StoredNorm]) -> None:
        self._network, self._norms = network, tuple(norms)
        paths = dict.fromkeys(norm.before for norm in norms if norm.before is not None)
        self._request = Pass(record=tuple(paths), logits=False, stop=True)
        self._program = network.program(_moments_at, self._request) if paths else None
        self._batch = BATCH

    def together(self, x: np.ndarray) -> float:
        """The distance of prepared images `x` `(n, h, w, c)` as one set."""
        return self._distance([moments.together for moments in self._seen(x)])

    def each(self, x: np.ndarray) -> tuple[float, ...]:
        """The distance of each of some prepared images."""
        seen = self._seen(x)
        return tuple(self._distance([moments.of(image) for moments in seen]) for image in range(len(x)))

    def _distance(self, seen: Sequence[Moments]) -> float:
        medians = [np.median(norm.distances(moments)) for norm, moments in zip(self._norms, seen, strict=True)]
        return float(np.mean(medians))

    def _seen(self, x: np.ndarray) -> list[Moments]:
        """What enters each norm, for each image."""
        own = Moments(x.mean(axis=(1, 2), dtype=np.float64), x.var(axis=(1, 2), dtype=np.float64))
        try:
            found = self._run(x)
        except Exception:
            if self._batch == 1:
                raise
            self._batch = 1  # a model may take one image at a time, or the memory suffice for one
            found = self._run(x)
        return [own if norm.before is None else found[norm.before] for norm in self._norms]

    def _run(self, x: np.ndarray) -> dict[str, Moments]:
        if self._program is None:
            return {}
        parts = [(some.count, self._program(self._network.tensor(some.arrays[0]))) for some in batched(self._batch, x)]

        def joined(path: str, which: int) -> np.ndarray:
            rows = [self._network.numpy(found[path][which])[:count] for count, found in parts]
            return np.concatenate(rows).astype(np.float64)

        return {path: Moments(joined(path, 0), joined(path, 1)) for path in self._request.record}


def _moments_at(network: Network, request: Pass) -> Callable:
    """The program of the mean and the variance of each channel of each image, at the paths that `request` records."""
    ops = network.ops

    def moments(activation: Tensor) -> tuple[Tensor, Tensor]:
        mean = ops.mean(activation, axis=(1, 2), keepdims=True)
        return ops.mean(activation, axis=(1, 2)), ops.mean(ops.square(activation - mean), axis=(1, 2))

    def recorded(run: Run, x: Tensor) -> dict[str, Structure]:
        return dict(run(x, request, None, dict.fromkeys(request.record, moments)).activations)

    return recorded


def measured(network: Network) -> Measurement | None:
    """The distances of the candidates, and of the network's preprocessing where it is none.

    Returns:
        None for a network without trained batch norms, or that can't be measured.
    """
    norms = network.stored_norms(NORMS)
    if not norms or network.inputs.channels not in (1, 3):
        return None
    pixels = natural_images(*network.image_shape)
    names = CANDIDATES if pixels.shape[-1] == 3 else GREY_CANDIDATES
    used = network.preprocessing
    meter = Meter(network, norms)

    def measurement() -> Measurement:
        fits = [Fit(name, meter.together(pp.PRESETS[name].apply(pixels))) for name in names]
        other = None if used.name in names else Fit(used.name, meter.together(used.apply(pixels)))
        fits.sort(key=lambda fit: fit.kl)
        return Measurement(tuple(fits), tuple(norm.path for norm in norms), len(pixels), other)

    return attempted(network, measurement)


def resemblances(network: Network, images: Sequence[InputImage]) -> tuple[Resemblance, ...]:
    """For each image its distance from what the network was trained on; empty where that can't be measured."""
    norms = network.stored_norms(NORMS)
    if not norms or not images or network.inputs.channels not in (1, 3):
        return ()
    meter = Meter(network, norms)

    x = network.prepare(images)

    def found() -> tuple[Resemblance, ...]:
        natural = meter.each(network.preprocessing.apply(natural_images(*network.image_shape)))
        return tuple(Resemblance(kl, natural) for kl in meter.each(x))

    return attempted(network, found) or ()


def settled(guess: pp.Preprocessing, found: Measurement | None) -> pp.Preprocessing:
    """The preprocessing after a measurement.

    A clear one wins. Where it is not clear, the guess stays, with the numbers; but one that goes by no name, and is
    much farther than the nearest, gives way to that, which is a guess too.
    """
    if found is None:
        return guess
    other, nearest = found.of(guess.name), pp.PRESETS[found.best.name]
    numbers = f", KL {other.text}" if other else ""
    if found.clear and nearest.name == guess.name:
        return replace(guess, certainty=pp.MEASURED, reason=found.text)
    if found.clear:
        reason = f"{found.text}; that contradicts the guess of {guess.name}{numbers} ({guess.reason})"
        return replace(nearest, certainty=pp.MEASURED, reason=reason, instead_of=guess.name)
    if guess.named_after is None and other is not None and other.kl >= MARGIN * found.best.kl:
        reason = f"the usual, {guess.name}, is much farther{numbers}; {found.text}"
        return replace(nearest, certainty=pp.GUESS, reason=reason, instead_of=guess.name)
    return guess.because(pp.GUESS, f"{guess.reason}; not measured, since {found.text}")
