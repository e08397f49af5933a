"""From a model that can be watched to its network, in steps: each is a value that the next one takes.

`Watched` (the model and its inputs) -> `Trace` -> `Graph` -> grids of tokens, in the graph -> preprocessing ->
preprocessing measured where it would be a guess -> head -> class names -> the network.
The order stands here, for every framework; what a framework does in a step of its own way is its `Steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from convscope.networks.choices import Choices
from convscope.networks.failing import attempted
from convscope.networks.grids import measured_on, with_grids
from convscope.networks.head import Head
from convscope.networks.heads import Habits, head_of
from convscope.networks.inputs import Inputs
from convscope.networks.measured import Measurement, measured, settled
from convscope.networks.network import Network, Source, checked_names
from convscope.networks.preprocessing import GUESS, PRESETS, Preprocessing
from convscope.networks.scaling import preprocessing_of
from convscope.networks.trace import Graph, Trace, graph_of


class Watched(Protocol):
    """A model whose inputs are known, ready to be run and watched."""

    @property
    def name(self) -> str:
        """Its name, for titles and messages."""

    @property
    def source(self) -> Source:
        """Where it came from."""

    @property
    def inputs(self) -> Inputs:
        """The image that it takes."""

    def failing_layer(self, error: BaseException) -> str | None:
        """The path of the layer that raised an error, see `failing.failing_layer`."""

    def trace(self, size: tuple[int, int]) -> Trace:
        """The record of a run on a blank image of `size` `(h, w)`.

        Raises:
            ModelError: it can't be run on an image of its own size.
        """


@dataclass(frozen=True, eq=False)
class Inspection:
    """All that is found of a model before it is a network.

    Attributes:
        inputs: the image that it takes.
        graph: of an image of the size of `inputs`.
        preprocessing: the scaling of pixels.
        head: the relation of its outputs to classes.
        class_names: one for each class; None where they are not known.
        measured: whether the preprocessing was measured; measurement: what was found then.
    """

    inputs: Inputs
    graph: Graph
    preprocessing: Preprocessing
    head: Head
    class_names: tuple[str, ...] | None = None
    measured: bool = False
    measurement: Measurement | None = None


Made = TypeVar("Made", bound=Network)


@dataclass(frozen=True)
class Steps(Generic[Made]):
    """The steps that a framework does in its own way.

    Attributes:
        preprocessing: the usual one of such a model, where it does no scaling of its own.
        habits: what is usual for a model's outputs.
        class_names: known without the user, for a head; None where they are not.
        network: the network that is made of finished values.
    """

    preprocessing: Callable[[], Preprocessing]
    habits: Habits
    class_names: Callable[[Head], tuple[str, ...] | None]
    network: Callable[[Inspection], Made]


def inspected(watched: Watched, trace: Trace, choices: Choices, steps: Steps[Made]) -> Made:
    """The network of a model that was watched once; the user's choices come before what is found.

    Raises:
        UsageError: no such output, or not as many names as classes; see `Preprocessing.check_channels`.
    """
    graph = graph_of(trace, trace.output_named(choices.output))
    found = Inspection(watched.inputs, graph, choices.preprocess or PRESETS["none"], Head(graph.units))
    found = _with_grids(found, steps)
    if choices.preprocess is None:
        preprocessing = preprocessing_of(
            found.graph, watched.inputs.channels, lambda: steps.network(found), steps.preprocessing()
        )
        found = replace(found, preprocessing=preprocessing)
    found.preprocessing.check_channels(watched.inputs.channels)
    if found.preprocessing.certainty == GUESS and choices.preprocess is None:
        found = _settled(found, measured(steps.network(found)))
    head = head_of(found.graph, choices.head, steps.habits, lambda: _outputs(steps.network(found)))
    if choices.class_names is None:
        names = steps.class_names(head)
    else:
        names = checked_names(choices.class_names, head, watched.name)
    return steps.network(replace(found, head=head, class_names=names))


def _with_grids(found: Inspection, steps: Steps[Made]) -> Inspection:
    """What was found, with the layouts of tokens that are grids; the network is run where there may be some."""
    graph = with_grids(found.graph, found.inputs.channels, measured_on(lambda: steps.network(found)))
    return replace(found, graph=graph)


def _settled(found: Inspection, measurement: Measurement | None) -> Inspection:
    """What was found, with a guess of the preprocessing checked by a measurement."""
    preprocessing = settled(found.preprocessing, measurement)
    return replace(found, preprocessing=preprocessing, measured=True, measurement=measurement)


def _outputs(draft: Network) -> np.ndarray | None:
    """The outputs `(n, units)` for noise, black and white; None where it has no row of outputs for an image.

    Args:
        draft: takes its outputs as they are. It gets one image at a time: more may not fit it.
    """
    noise = np.random.default_rng(0).uniform(0, 255, (4, *draft.image_shape))
    pixels = np.concatenate([noise, np.zeros((1, *draft.image_shape)), np.full((1, *draft.image_shape), 255)])
    x = draft.preprocessing.apply(pixels.astype(np.float32))
    return attempted(draft, lambda: np.concatenate([draft.predict(one[None]) for one in x]))
