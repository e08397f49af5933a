"""The scaling that a model does on its own input, before its first layer that learned something.

The graph says where it is: `first_steps_of` goes from the image through every operation but convolutions, dense layers,
norms, pools and non-linearities, and finds the tensors that all later ones are computed from. What the operations
compute is measured there, whatever they are written as: images of one colour go in, and the values that come out are
fitted by a matrix over the channels and an offset, once for each range that the pixels may have (0..255, 0..1, -1..1).
The range is shown where only one of them gives values of a range that networks are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from convscope.networks import preprocessing as pp
from convscope.networks.failing import attempted
from convscope.networks.foreign import Tensor
from convscope.networks.graph import Call
from convscope.networks.passes import Pass, Run
from convscope.networks.trace import Graph

if TYPE_CHECKING:
    from convscope.networks.network import Network

# Ranges that pixels may have before the model's own scaling, by the name of the preprocessing that makes them.
RANGES = {"none": (0.0, 255.0), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}
_LEARNED = ("conv", "dense", "norm", "pool", "global_pool", "activation")
_CHANGING = ("rescaling", "merge", "other", "conv")  # other kinds move pixels, and scale none
_NEAR = 0.5  # the largest distance from a known range, in widths of it,
_EXACT = 0.05  # and that of -1..1, which is rare before a model's own scaling
_CLEAR = 2e-3  # the least distance of the range that comes second
_SAME = 3e-4  # a shift or a scaling up to this is none,
_NEGLIGIBLE = 1e-2  # and one up to this would be of no use to anybody: the range is another one
_AFFINE = 1e-2  # the largest error of the fit, in widths of the values: bfloat16 has 8 bits


@dataclass(frozen=True, eq=False)
class FirstSteps:
    """The operations that an image passes before the first layer that learned something.

    Attributes:
        bottlenecks: paths of the tensors that all later ones are computed from, in the order of execution.
        steps: the calls up to there.
        seen: False where what follows takes a tensor that the author's own code made without a trace.
    """

    bottlenecks: tuple[str, ...]
    steps: tuple[Call, ...]
    seen: bool

    @property
    def changes(self) -> bool:
        """True if some step may change values."""
        return any(step.kind in _CHANGING for step in self.steps)

    @property
    def unknown(self) -> str | None:
        """What is not known of the steps, for people; None where they are all operations of a library."""
        opaque = next((step.path for step in self.steps if step.facts.get("opaque")), None)
        if opaque is not None:
            return f"its first step, {opaque}, is the author's own code"
        untraced = "the author's own code, which convscope can't trace, comes before its first layers"
        return None if self.seen else untraced


@dataclass(frozen=True, eq=False)
class Response:
    """The values at a bottleneck for pixels of one range: `unit @ matrix + offset`, for colours `unit` in 0..1.

    Attributes:
        matrix: `(c, k)`; offset: `(k,)`.
        black, white: `(k,)` as they were seen, for the least and the highest pixels.
        clips: values beyond the ends of the range are those at its ends.
    """

    matrix: np.ndarray
    offset: np.ndarray
    black: np.ndarray
    white: np.ndarray
    clips: bool

    @property
    def low(self) -> np.ndarray:
        """The least value of each channel."""
        return self.offset + np.minimum(self.matrix, 0).sum(axis=0)

    @property
    def high(self) -> np.ndarray:
        """The highest value of each channel."""
        return self.offset + np.maximum(self.matrix, 0).sum(axis=0)

    def differs(self, limits: tuple[float, float]) -> float:
        """The largest difference of black and white from the ends of the range that went in, in widths of it."""
        apart = max(np.abs(self.black - limits[0]).max(), np.abs(self.white - limits[1]).max())
        return float(apart) / (limits[1] - limits[0])

    def equals(self, other: Response | None) -> bool:
        """True if the values are the same: steps between have moved pixels at most."""
        if other is None or other.matrix.shape != self.matrix.shape:
            return False
        return np.allclose(self.matrix, other.matrix, 1e-4, 1e-6) and np.allclose(self.offset, other.offset, 1e-4, 1e-6)

    @property
    def reverses(self) -> bool:
        """True if red and blue change places."""
        return self.matrix.shape == (3, 3) and bool((np.abs(self.matrix).argmax(axis=0) == [2, 1, 0]).all())


def preprocessing_of(
    graph: Graph, channels: int, draft: Callable[[], Network], usual: pp.Preprocessing
) -> pp.Preprocessing:
    """The preprocessing before a model that may scale its input itself.

    Args:
        graph: the model's graph.
        channels: of the images that it takes.
        draft: the network, which takes images `(n, h, w, c)` as they are; called only where the graph has something
            to measure.
        usual: where the model does no scaling of its own.
    """
    first = first_steps_of(graph, channels)
    if first.seen and not first.changes:
        return usual
    responses = responses_at(draft(), first.bottlenecks) if first.bottlenecks else {}
    for path in reversed(first.bottlenecks):
        name = shown_range(responses[path])
        if name is not None:
            response = responses[path][name]
            made = next(one for one in first.bottlenecks if response.equals(responses[one].get(name)))
            return pp.PRESETS[name].because(pp.FOUND, _scales(made, name, response))
    last = next((responses[path] for path in reversed(first.bottlenecks) if responses[path]), {})
    return _not_shown(graph, first, last, usual)


def _not_shown(
    graph: Graph, first: FirstSteps, responses: Mapping[str, Response], usual: pp.Preprocessing
) -> pp.Preprocessing:
    """The preprocessing where no range of pixels is shown."""
    unknown, response = first.unknown, responses.get("none")
    if unknown is not None and not responses:
        if not any(call.kind in _LEARNED for call in graph.trace.calls):
            return usual  # nothing of the model is seen, so its first step is not one before its layers
        reason = (
            f"the range of pixels that the model takes is not known: {unknown}; "
            "set the preprocessing if it does not take raw pixels"
        )
        return pp.PRESETS["none"].because(pp.GUESS, reason)
    if response is None:
        return usual
    if response.differs(RANGES["none"]) > _SAME:
        factor = float(np.abs(response.matrix).sum(axis=0).mean()) / 255
        reason = f"the model does arithmetic on its own input up to {first.bottlenecks[-1]}"
        made = f"{reason}, where 0..255 become {_span(response)}, which does not show the range of the pixels"
        return pp.PRESETS[pp.range_before_scaling(factor)].because(pp.GUESS, made)
    named = usual.certainty == pp.FOUND or usual.named_after is not None
    return _reversed(usual, first.bottlenecks[-1]) if response.reverses and named else usual


def _scales(path: str, name: str, response: Response) -> str:
    low, high = RANGES[name]
    order = ", blue first" if response.reverses else ""
    return f"the model scales its own input: {low:g}..{high:g} become {_span(response)}{order} in {path}"


def _span(response: Response) -> str:
    low, high = response.low.min(), response.high.max()
    digits = 2 - int(np.floor(np.log10(high - low)))  # of which the fit is sure
    return f"{round(low, digits) + 0:g}..{round(high, digits) + 0:g}"


def _reversed(usual: pp.Preprocessing, path: str) -> pp.Preprocessing:
    """The same values in front of a step that has red and blue change places."""
    reason = f"{usual.reason}; red and blue change places in {path}, inside the model"
    return replace(usual, name="mean,std", mean=usual.mean[::-1], std=usual.std[::-1], bgr=not usual.bgr, reason=reason)


# -- the graph ---------------------------------------------------------------------------------------------


def first_steps_of(graph: Graph, channels: int) -> FirstSteps:
    """What an image passes before the first layer that learned something."""
    image = graph.trace.image
    steps, values, seen = graph.trace.flow.entrance(image, _is_step)
    paths: dict[Hashable, str] = {}
    for layer, (path, (call, index)) in zip(graph.layers, graph.calls.items(), strict=True):
        # A model may take grey images without an axis of channels.
        grey = len(image.shape) == 3 and len(layer.shape) == 2
        if call.kind != "model" and (grey or (layer.spatial and layer.channels in (1, 3, channels))):
            paths.setdefault(call.outputs[index][1].key, path)
    return FirstSteps(tuple(paths[value.key] for value in values if value.key in paths), tuple(steps), seen)


def _is_step(call: Call) -> bool:
    if call.kind != "conv":
        return call.kind not in _LEARNED
    # A depthwise convolution of 1x1 pixels is a factor for each channel, and perhaps an offset.
    made = call.outputs[0][1].shape if len(call.outputs) == 1 else ()
    axis = 1 if call.channels_first else -1
    return len(made) == 4 and made == call.inputs[0].shape and call.parameters in (made[axis], 2 * made[axis])


# -- the measurement ---------------------------------------------------------------------------------------


def responses_at(network: Network, paths: Sequence[str]) -> dict[str, dict[str, Response]]:
    """For each path the responses to pixels of each of `RANGES`, without those that are no affine map.

    None are known of a model that can't be run on one of the ranges.

    Args:
        network: takes images `(n, h, w, c)` as they are.
        paths: of layers with maps of one or more channels.
    """
    return attempted(network, lambda: _responses(network, paths)) or {path: {} for path in paths}


def _responses(network: Network, paths: Sequence[str]) -> dict[str, dict[str, Response]]:
    channels, found = network.inputs.channels, {path: dict[str, Response]() for path in paths}
    units = _colours(channels)
    program = network.program(centres_at, Pass(record=tuple(paths), logits=False, stop=True))
    for name, (low, high) in RANGES.items():
        colours = low + (high - low) * units
        seen = [_seen(network, program, np.round(one) if high == 255 else one) for one in colours]
        for path in paths:
            response = _fitted(units, np.stack([values[path] for values in seen]))
            if response is not None:
                found[path][name] = response
    return found


def _colours(channels: int) -> np.ndarray:
    """Colours `(m, c)`: the corners of 0..1, five inside, and the last two outside; multiples of 1/255."""
    inside = np.random.default_rng(0).integers(0, 256, (5, channels)) / 255
    ends = np.array([0.0, 1.0, -51 / 255, 306 / 255])
    outer = np.repeat(ends[:, None], channels, axis=1)
    return np.concatenate([outer[:2], np.eye(channels), inside, outer[2:]])


def _seen(network: Network, program: Callable, colour: np.ndarray) -> dict[str, np.ndarray]:
    """The values at each path for one image of one colour; more than one may not fit the model."""
    image = np.broadcast_to(colour.astype(np.float32), (1, *network.image_shape))
    made = program(network.tensor(np.ascontiguousarray(image)))
    return {path: network.numpy(values).reshape(-1).astype(np.float64) for path, values in made.items()}


def centres_at(network: Network, request: Pass) -> Callable:
    """The program of the values in the middle of each recorded map: the edges may be padded."""

    def centre(activation: Tensor) -> Tensor:
        return activation[:, activation.shape[1] // 2, activation.shape[2] // 2]

    def recorded(run: Run, x: Tensor) -> Mapping[str, Tensor]:
        return dict(run(x, request, None, dict.fromkeys(request.record, centre)).activations)

    return recorded


def _fitted(units: np.ndarray, values: np.ndarray) -> Response | None:
    """The affine map of colours `(m, c)` to values `(m, k)`; None where they are none, or don't depend on them.

    The last two colours lie outside of the range, and are not fitted.
    """
    inner = np.concatenate([units[:-2], np.ones((len(units) - 2, 1))], axis=1)
    if not np.isfinite(values).all():
        return None
    solved = np.linalg.lstsq(inner, values[:-2], rcond=None)[0]
    matrix, offset = solved[:-1], solved[-1]
    width = np.abs(matrix).sum(axis=0)
    if width.min() <= 1e-9 or (np.abs(inner @ solved - values[:-2]) > _AFFINE * width).any():
        return None
    clips = bool((np.abs(values[:2] - values[-2:]) <= _AFFINE * width).all())
    return Response(matrix, offset, values[0], values[1], clips)


# -- the range ---------------------------------------------------------------------------------------------


def shown_range(responses: Mapping[str, Response]) -> str | None:
    """The range of pixels that a model's own scaling shows, by its name in `RANGES`; None where it shows none."""
    clipped = [name for name, response in responses.items() if response.clips]
    if len(clipped) == 1:
        return clipped[0]
    distances = {name: _distance(name, response) for name, response in responses.items()}
    if not distances:
        return None
    best = min(distances, key=lambda name: distances[name])
    second = min((distance for name, distance in distances.items() if name != best), default=np.inf)
    far = distances[best] > (_EXACT if best == "-1..1" else _NEAR)
    return None if far or second < max(2 * distances[best], _CLEAR) else best


def _distance(name: str, response: Response) -> float:
    """How far the values of a response are from the nearest range that networks are trained on."""
    if _SAME < response.differs(RANGES[name]) <= _NEGLIGIBLE:
        return np.inf
    return min(_apart(response, *known.range(len(response.offset))) for known in _KNOWN)


def _apart(response: Response, black: np.ndarray, white: np.ndarray) -> float:
    apart = np.abs(response.low - black) + np.abs(response.high - white)
    return float(np.mean(apart / np.abs(white - black)))


# What networks are trained on: the presets, ImageNet's mean in either order, and the statistics of MNIST.
_KNOWN = (
    *pp.PRESETS.values(),
    replace(pp.PRESETS["caffe"], mean=pp.PRESETS["caffe"].mean[::-1], bgr=False),
    replace(pp.PRESETS["torch"], mean=pp.PRESETS["torch"].mean[::-1], std=pp.PRESETS["torch"].std[::-1], bgr=True),
    pp.Preprocessing("mean,std", (0.1307 * 255,), (0.3081 * 255,)),
)
