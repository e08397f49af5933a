"""How a network's output relates to class scores, and the scores and probabilities that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from convscope.networks.foreign import Tensor
from convscope.networks.ops import Operations
from convscope.schema import Json

HeadActivation = Literal["softmax", "sigmoid", "hard_sigmoid"]
HeadChoice = Literal["softmax", "sigmoid", "linear"]  # as the user's options name it


@dataclass(frozen=True)
class Head:
    """How the network's output relates to class scores.

    Attributes:
        units: number of output units; of a map with a class for each channel, of its channels.
        activation: makes probabilities of logits; None where the outputs are values and no probabilities.
        undone: path of the layer whose activation is left out of a pass, so that logits are explained; None where there
            is nothing to leave out.
        returns_logits: the network itself does not apply the activation.
        spatial: the output is a value for each place, so there are no class scores of the image.
        guess: the activation is inferred from the returned values alone, or not at all.
        also_left_out: paths of further layers that are left out with `undone`: of a logarithm, or of the parts of a
            softmax that is written out by hand.
        slope: of a hard sigmoid, at a logit of 0.
        map: path of the layer whose channels are the classes of each place, of an output that is a map; None where it
            is not known.

    Example:
        >>> Head(10, "softmax", undone="predictions").score
        'logit'
    """

    units: int
    activation: HeadActivation | None = None
    undone: str | None = None
    returns_logits: bool = False
    spatial: bool = False
    guess: bool = False
    also_left_out: tuple[str, ...] = ()
    slope: float = 1 / 6
    map: str | None = None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Paths of all layers that are left out of a pass, or whose activation is."""
        return () if self.undone is None else (self.undone, *self.also_left_out)

    @property
    def has_scores(self) -> bool:
        """True if there is a score for each class (or output) that can be explained."""
        return not self.spatial

    @property
    def linear(self) -> bool:
        """True if the outputs are taken as they are and have no probabilities."""
        return self.activation is None and not self.spatial

    @property
    def log_probabilities(self) -> bool:
        """True if the outputs are probabilities whose activation can't be left out: their logarithm is explained."""
        return self.activation is not None and self.undone is None and not self.returns_logits

    @property
    def independent(self) -> bool:
        """True if each unit has a probability of its own (sigmoid)."""
        return self.activation in ("sigmoid", "hard_sigmoid")

    @property
    def binary(self) -> bool:
        """One sigmoid unit: class 1 is its logit, class 0 is minus its logit."""
        return self.units == 1 and self.independent

    @property
    def paired(self) -> bool:
        """Two classes under one softmax: only the difference of their logits decides."""
        return self.units == 2 and self.activation == "softmax"

    @property
    def classes(self) -> int:
        """Number of classes that can be explained."""
        return 2 if self.binary else self.units

    @property
    def score(self) -> str:
        """Name of the number that is explained: "logit", "log p", "log p/(1-p)" or "value"."""
        if self.linear:
            return "value"
        if self.log_probabilities:
            return "log p/(1-p)" if self.independent else "log p"
        return "logit"

    @property
    def text(self) -> str:
        """The head as a sentence for people."""
        if self.spatial:
            return self._text_of_maps()
        if self.activation is None:
            one = self.units == 1
            return f"{self.units} linear output{'' if one else 's'}, explained as {'it is' if one else 'they are'}"
        if self.returns_logits:
            sure = " is a guess; give the head if it is another" if self.guess else ""
            one = self.units == 1
            how = "whose difference is explained" if self.paired else f"explained as {'it is' if one else 'they are'}"
            what = "1 logit" if one else f"{self.units} logits"
            of = "a probability is its" if one else "probabilities are their"
            return f"{what}, {how} (that {of} {self.activation}{sure})"
        name = str(self.activation).replace("_", " ")
        what = f"one {name} unit" if self.binary else f"{name} over {self.units} outputs"
        explained = f"the difference of the two {self.score}s" if self.paired else self.score
        if self.undone is not None:
            return f"{what}, undone at {self.undone}: {'' if self.paired else 'the '}{explained} is explained"
        sure = ", a guess by its values" if self.guess else ""
        return f"{what} that can't be taken away{sure}: {explained} is explained"

    def _text_of_maps(self) -> str:
        if self.map is None:
            return "a value for each place and not for each class, so there are no predictions"
        if self.activation is None:
            return f"a map of {self.units} channel{'' if self.units == 1 else 's'}, so there are no predictions"
        sure = " is a guess; give the head if it is another" if self.guess else ""
        logits = f"that probabilities are their {self.activation}{sure}"
        how = logits if self.returns_logits else f"{self.activation}, undone at {self.undone}"
        score = "its logit less the other one's" if self.paired else f"its {self.score}"
        return f"a map of {self.classes} classes ({how}), so there are no predictions; a class is explained by {score}"

    def describe(self) -> dict[str, Json]:
        """For provenance: plain JSON values. `kind` names the combination of fields in one word."""
        return {"kind": self._kind(), "units": self.units, "layer": self.undone, "text": self.text}

    def _kind(self) -> str:
        if self.spatial:
            return "maps"
        if self.activation is None:
            return "linear"
        if self.returns_logits:
            return "sigmoid_logits" if self.independent else "logits"
        return self.activation if self.undone is not None else f"{self.activation}_output"

    def logits(self, ops: Operations, outputs: Tensor) -> Tensor:
        """Scores `(n, classes)` to explain, from the network's output with its head undone `(n, units)`.

        Of a map `(n, h, w, units)` the scores of each place `(n, h, w, classes)`.
        """
        if self.log_probabilities and self.independent:
            clipped = ops.clip(outputs, 1e-7, 1 - 1e-7)
            outputs = ops.log(clipped) - ops.log(1 - clipped)
        elif self.log_probabilities:
            outputs = ops.log(ops.maximum(outputs, 1e-30))
        return ops.concatenate([-outputs, outputs], axis=-1) if self.binary else outputs

    def probabilities(self, logits: np.ndarray) -> np.ndarray | None:
        """Class probabilities `(n, classes)` from `logits` `(n, classes)`; None where the outputs are linear."""
        logits = logits.astype(np.float64)
        if self.linear:
            return None
        if self.activation == "hard_sigmoid":
            return np.clip(self.slope * logits + 0.5, 0, 1).astype(np.float32)
        if self.independent:
            return (1 / (1 + np.exp(-np.clip(logits, -700, 700)))).astype(np.float32)
        exponent = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return (exponent / exponent.sum(axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Prediction:
    """One class of one image: its index, name, logit and probability (None for linear outputs).

    Example:
        >>> image = convscope.images.decode.read_image(PHOTOS[0])
        >>> network.predictions(network.predict(network.prepare([image]))[0])[0].name
        'cat'
    """

    index: int
    name: str
    logit: float
    probability: float | None

    @property
    def text(self) -> str:
        """ "tabby 0.83", or the value itself where there is no probability."""
        value = self.logit if self.probability is None else self.probability
        return f"{self.name} {value:.3g}" if self.probability is None else f"{self.name} {value:.2f}"
