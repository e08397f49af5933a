"""Which part of a picture spoke for a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convscope.errors import UsageError
from convscope.events import Advanced, ItemFinished, Progress, Started, tell
from convscope.images.decode import InputImage, read_images
from convscope.imaging import resize_map
from convscope.networks import Layer, Network, open_model
from convscope.networks.network import check_finite
from convscope.results import Check, Heatmap, HeatmapParameters, HeatmapRow, origin
from convscope.techniques.heatmaps import (  # noqa: F401  they register their methods
    cam,
    full_gradient,
    perturbation,
    pixels,
)
from convscope.techniques.heatmaps.evidence import Asked, Evidence, Single, look
from convscope.techniques.heatmaps.faithfulness import better_layers
from convscope.techniques.heatmaps.faithfulness import check as checked_map
from convscope.techniques.heatmaps.methods import METHODS, Made, Method, Unfit, method_named
from convscope.techniques.heatmaps.targets import (
    Channel,
    ClassScore,
    Custom,
    Goal,
    Likeness,
    Target,
    as_targets,
    channel_target,
    chosen,
    described,
    goal_of,
    is_target,
    likeness_target,
)

__all__ = [
    "METHODS",
    "Channel",
    "Custom",
    "Likeness",
    "Target",
    "as_targets",
    "channel_target",
    "heatmap",
    "is_target",
    "likeness_target",
]

BATCH = 8
SATURATED = 1 - 1e-6
SHIFT = 1 / 16  # of a side, by which smoothing moves a picture
TRIED_LAYERS, TRIED_PHOTOS = 4, 4  # by layer="best"
NOT_LOOKED_AT = ("model", "reshape", "padding", "dropout", "identity")


def heatmap(
    network: Network | Any,
    images: Any,
    target: Any = "top",
    layer: str | Sequence[str] = "auto",
    *,
    against: int | str | Sequence[int | str] | None = None,
    method: str | Sequence[str] = "grad-cam",
    smooth: bool = False,
    budget: int | None = None,
    check: bool = False,
    precision: str = "float32",
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress = None,
) -> Heatmap:
    """Which part of each picture spoke for a class.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        target: a class by number or name, or "top" for each picture's own best; or one for each picture. "top3": the
            three best of each. "conv3:17" is a channel of a layer and "conv3:17@4,5" it at one place; of a network that
            answers with a map, a number is the class where it is the highest. Or what `channel_target` and
            `likeness_target` make, a `Custom` function of the network's answers, or a `Target` of your own.
        layer: a path, "auto" for the last layer whose map has more than one cell, or "best" for the one of the last
            layers at each size of map that does best in insertion less deletion on a few of the pictures; or several,
            whose maps are fused: positive parts, each over its highest value, their mean.
        against: a class whose logit is taken from the target's, so that the map shows what speaks for the one and not
            for the other: by number or name, or "rival" for each picture's best other class; or one for each picture.
            Of two classes under one softmax only this difference means anything.
        method: one of `METHODS`, several, or "all" for all that work on one pass. With several, each picture has a map
            for each method, one after another; of "all", a method that does not fit the network is left out and says
            why in the provenance.
        smooth: the mean over the picture, moved a little in four directions, and the mirror images of these.
        budget: passes that a sampling method may spend on a picture: channels of Score-CAM, masks of RISE, noisy copies
            of SmoothGrad, steps of integrated gradients.
        check: measure how far each map can be believed: see `faithfulness`.
        precision: "bfloat16", or "auto" where the machine gains by it, of the passes of Score-CAM and RISE.
        seed: of what is drawn.
        batch: pictures at a time.
        progress: called with each event (`convscope.events`).

    Returns:
        raw signed maps, `(n, h, w)` at the layer's size, or at the picture's size where they are smoothed or the method
        is one of pixels (of several sizes, a tuple of them); a map in which nothing is to be seen has its reason.

    Raises:
        UsageError: no such class, layer or method, or a layer without a map; ImageError, ModelError.
    """
    network = open_model(network)
    photos = tuple(read_images(images))
    methods, skip = _methods(method), method == "all"
    if budget is not None and budget < 2:
        raise UsageError(f"a budget must be at least 2 passes, found {budget}.")
    goal = goal_of(network, target, against, len(photos), lambda: _ranked(network, photos, batch))
    asked = Asked(budget, seed, _precision(network, precision))
    layers, choice, rule = _layers(network, layer, goal, methods, photos, asked)
    batch = max(1, min(batch, len(goal.photos)))
    work = _Work(network, layers, goal, methods, smooth, check, asked, batch, {} if skip else None)
    tell(progress, Started(0, len(goal.photos), "heatmaps"))
    shown, maps, rows = [], [], []
    for start in range(0, len(goal.photos), batch):
        some = np.arange(start, min(start + batch, len(goal.photos)))
        for photo, raw, row in work.explain([photos[index] for index in goal.photos[some]], some):
            shown.append(photo)
            maps.append(np.where(np.isfinite(raw), raw, 0).astype(np.float32))
            rows.append(row)
            tell(progress, ItemFinished(start, len(goal.photos), photo.name, item=(photo, maps[-1], row)))
        tell(progress, Advanced(int(some[-1]) + 1, len(goal.photos), photos[goal.photos[some[-1]]].name))
    details = {
        "target": as_targets(target),
        "against": None if against is None else as_targets(against),
        **work.details(),
    }
    like = {"like": goal.target.photo} if isinstance(goal.target, Likeness) else {}
    made = origin(network, "heatmap", photos, like, details)
    return Heatmap(made, work.parameters(choice, rule), tuple(shown), _stacked(maps), tuple(rows))


def _precision(network: Network, precision: str) -> str:
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"precision {precision!r} is not known; expected auto, float32 or bfloat16.")
    return network.precision_for_ascent() if precision == "auto" else precision


def _stacked(maps: list[np.ndarray]) -> Any:
    """One array where all maps have one size, else a tuple of them."""
    return np.stack(maps) if len({one.shape for one in maps}) == 1 else tuple(maps)


def _ranked(network: Network, photos: Sequence[InputImage], batch: int) -> np.ndarray:
    """The classes of each picture `(n, classes)`, best first."""
    parts = [network.predict(network.prepare(photos[at : at + batch])) for at in range(0, len(photos), batch)]
    return np.argsort(-np.concatenate(parts), axis=1, kind="stable")


def _methods(given: str | Sequence[str]) -> list[Method]:
    """Of "all" those that share one pass."""
    if given == "all":
        return [one for one in METHODS.values() if one.one_pass]
    return [method_named(name) for name in ([given] if isinstance(given, str) else given)]


def _layers(
    network: Network,
    given: str | Sequence[str],
    goal: Goal,
    methods: Sequence[Method],
    photos: Sequence[InputImage],
    asked: Asked,
) -> tuple[list[Layer], str, str]:
    """The layers that are looked at, none where every method is one of the picture's own places; how they were chosen
    (one of `LAYER_CHOICES`), and the rule in words.
    """
    if given == "auto" and all(one.at_picture for one in methods):
        return [], "none", "none: the method looks at the picture"
    if given == "best":
        return _best(network, goal, next((one for one in methods if not one.at_picture), None), photos, asked)
    rule = "the last layer whose map has more than one cell" if given == "auto" else "given"
    chosen_by = "auto" if given == "auto" else "given"
    return [_layer(network, path, goal) for path in ([given] if isinstance(given, str) else given)], chosen_by, rule


def _best(
    network: Network, goal: Goal, method: Method | None, photos: Sequence[InputImage], asked: Asked
) -> tuple[list[Layer], str, str]:
    """The layer whose maps of the first pictures do best, and how all did."""
    if method is None:
        return [], "none", "none: the method looks at the picture"
    rows = np.arange(min(len(goal.photos), TRIED_PHOTOS))
    x = network.prepare([photos[index] for index in goal.photos[rows]])
    arguments = tuple(argument[rows] for argument in goal.arguments)
    maps, refused = [], ""
    for layer in _candidates(network, goal):
        seen = look(network, layer, goal.target, x, arguments, len(x), asked=asked)
        try:
            maps.append((layer.path, [_raw(made) for made in method.explain(seen)]))
        except Unfit as error:  # the method may fit another layer
            refused = str(error)
    if not maps:
        raise UsageError(refused)
    judged = better_layers(list(seen.singles()), maps)
    how = ", ".join(f"{one.layer} {one.value:.3f}" for one in judged)
    rule = f"the best of {len(judged)} by insertion less deletion of the first {len(x)}: {how}"
    return [network.layer(judged[0].layer)], "best", rule


def _candidates(network: Network, goal: Goal) -> list[Layer]:
    """The last layer at each of the smallest sizes of map."""
    last = _last_before(network, goal)
    before = network.layers[: network.layers.index(last) + 1]
    by_size = {la.shape[:2]: la for la in before if la.on_path and la.spatial and la.kind not in NOT_LOOKED_AT}
    by_size[last.shape[:2]] = last
    sizes = sorted((size for size in by_size if min(size) > 1), key=lambda size: size[0] * size[1])
    return [by_size[size] for size in sizes[:TRIED_LAYERS]] or [last]


def _raw(made: Made) -> np.ndarray:
    return made[0] if isinstance(made, tuple) else made


def _note(made: Made) -> str:
    return made[1] if isinstance(made, tuple) else ""


def _layer(network: Network, path: str, goal: Goal) -> Layer:
    if path == "auto":
        return _last_before(network, goal)
    layer = network.layer(path)
    names = [one.path for one in network.layers]
    if goal.target.record and names.index(layer.path) > max(map(names.index, goal.target.record)):
        raise UsageError(
            f"layer {layer.path!r} comes after {goal.target.text}, which is explained; give a layer before it, or auto."
        )
    if not layer.spatial:
        auto = network.last_spatial_layer().path
        raise UsageError(
            f"layer {layer.path!r} has no map (its output has the shape {layer.shape}); a heatmap needs one of "
            f"(height, width, channels), such as {auto!r}."
        )
    return layer


def _last_before(network: Network, goal: Goal) -> Layer:
    """The last layer with a map; before the first that the target reads, where it reads layers.

    A likeness is one of means over places, so the layer in which it is measured has a map of its own to show.
    """
    record = goal.target.record
    if not record:
        return network.last_spatial_layer()
    names = [layer.path for layer in network.layers]
    first = min(map(names.index, record))
    end = first + 1 if isinstance(goal.target, Likeness) else first
    if not any(layer.spatial for layer in network.layers[:end]):
        raise UsageError(
            f"no layer with a map lies before {names[first]}, which is explained; give that layer itself with --layer, "
            "or a method that looks at the picture, such as saliency or occlusion."
        )
    return network.last_spatial_layer(end)


@dataclass(frozen=True, eq=False)
class _Work:
    """What is the same for all pictures of one call; `left_out` takes the methods of "all" that do not fit, and why."""

    network: Network
    layers: Sequence[Layer]
    goal: Goal
    methods: Sequence[Method]
    smooth: bool
    checked: bool
    asked: Asked
    batch: int
    left_out: dict[str, str] | None

    def explain(
        self, photos: Sequence[InputImage], rows: np.ndarray
    ) -> Iterator[tuple[InputImage, np.ndarray, HeatmapRow]]:
        """For each photo and method the photo, the raw map `(h, w)` and the row."""
        x = self.network.prepare(photos)
        arguments = tuple(argument[rows] for argument in self.goal.arguments)
        seen = [self._look(layer, x, arguments, self.batch) for layer in self._places]
        if seen[0].logits is not None:
            check_finite(self.network, seen[0].logits)
        self._check_rivals(seen[0], photos)
        made = [(one, maps) for one in self.methods if (maps := self._made(one, seen)) is not None]
        singles = list(seen[0].singles())
        for index, photo in enumerate(photos):
            for one, maps in made:
                raw = _raw(maps[index])
                row = _row(seen[0], index, photo, one, raw, _note(maps[index]), [layer.path for layer in self.layers])
                if self.checked:
                    row = replace(row, check=self._check(one, singles[index], raw))
                yield photo, raw, row

    def parameters(self, choice: str, rule: str) -> HeatmapParameters:
        """What was asked for, once it is done; `choice` and `rule` say how the layer was chosen."""
        target = self.goal.target
        return HeatmapParameters(
            layer=", ".join(one.path for one in self.layers),
            layer_choice=choice,
            layer_rule=rule,
            method=", ".join(one.name for one in self._used),
            left_out=self.left_out or {},
            explained=self.network.head.text if isinstance(target, ClassScore) else target.text,
            output=self.network.output,
            smooth=self.smooth,
            check=self.checked,
            batch=self.batch,
            budget=self.asked.budget,
            precision=self.asked.precision,
            seed=self.asked.seed,
        )

    def details(self) -> dict[str, Any]:
        """What describes the arguments further, for the provenance."""
        return {
            "paper": "; ".join(one.paper for one in self._used),
            "target_details": described(self.goal.target),
        }

    @property
    def _used(self) -> list[Method]:
        return [one for one in self.methods if one.name not in (self.left_out or {})]

    def _check_rivals(self, seen: Evidence, photos: Sequence[InputImage]) -> None:
        """A picture's own best class may turn out to be the one that was to be set against it."""
        for index, photo in enumerate(photos if isinstance(seen.target, ClassScore) else ()):
            if not seen.arguments[0][index].any():
                best = self.network.class_name(int(np.argmax(seen.logits[index]))) if seen.logits is not None else ""
                raise UsageError(
                    f"class {best!r} is the best one of {photo.name}, so it can't be set against itself; say which "
                    "class it is to be set against, or rival for the next best."
                )

    def _check(self, one: Method, single: Single, raw: np.ndarray) -> Check:
        rows = tuple(argument[None] for argument in single.arguments)

        def remake(x: np.ndarray) -> np.ndarray:
            return _raw(self._of([self._look(layer, x, rows, 1, resolved=True) for layer in self._places], one)[0])

        return checked_map(single, raw, remake, self.asked.seed)

    @property
    def _places(self) -> Sequence[Layer | None]:
        return self.layers or [None]

    def _look(
        self, layer: Layer | None, x: np.ndarray, arguments: tuple[np.ndarray, ...], batch: int, resolved: bool = False
    ) -> Evidence:
        target = self.goal.target
        return look(self.network, layer, target, x, arguments, batch, resolved=resolved, asked=self.asked)

    def _made(self, one: Method, seen: Sequence[Evidence]) -> Sequence[Made] | None:
        """The maps of one method for each picture; None where it does not fit and may be left out."""
        if self.left_out and one.name in self.left_out:
            return None
        try:
            return self._of(seen, one)
        except Unfit as error:
            if self.left_out is None:
                raise
            self.left_out[one.name] = str(error)
            return None

    def _of(self, seen: Sequence[Evidence], one: Method) -> Sequence[Made]:
        """The maps of one method from the evidence at each layer."""
        parts = [_smoothed(one, evidence) if self.smooth else one.explain(evidence) for evidence in seen]
        return parts[0] if len(parts) == 1 or one.at_picture else [_fused(maps) for maps in zip(*parts, strict=True)]


def _fused(maps: Sequence[Made]) -> Made:
    """The mean of several layers' maps, the positive part of each over its highest value, at the largest one's size.

    Where none has a positive part it is the mean of the maps, each over its size.
    """
    raw, note = [_raw(one) for one in maps], "; ".join(_note(one) for one in maps if _note(one))
    kept = [np.maximum(one, 0) for one in raw] if any(one.max() > 0 for one in raw) else raw
    size = max((one.shape for one in raw), key=lambda shape: shape[0] * shape[1])
    return np.mean([resize_map(one, *size) / max(float(np.abs(one).max()), 1e-12) for one in kept], axis=0), note


def _smoothed(one: Method, evidence: Evidence) -> list[Made]:
    """The mean of a method's maps `(h, w)` over moved and mirrored pictures, each put back to where it belongs.

    What is explained stays what it is of the picture as it is.
    """
    size = evidence.x.shape[1:3]
    step = max(1, round(size[0] * SHIFT)), max(1, round(size[1] * SHIFT))
    total: list[np.ndarray] = [np.zeros(size) for _ in evidence.x]
    notes = [""] * len(evidence.x)
    moves = [(0, 0), (step[0], 0), (-step[0], 0), (0, step[1]), (0, -step[1])]
    for rows, columns in moves:
        for mirrored in (False, True):
            x = _moved(evidence.x, rows, columns)[:, :, :: -1 if mirrored else 1]
            for index, found in enumerate(one.explain(evidence.again(np.ascontiguousarray(x)))):
                raw = resize_map(_raw(found), *size)
                total[index] += _moved(raw[None, :, :: -1 if mirrored else 1], -rows, -columns)[0]
                notes[index] = notes[index] or _note(found)  # of the picture as it is, which comes first
    return [(one / (2 * len(moves)), note) for one, note in zip(total, notes, strict=True)]


def _moved(pictures: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Pictures `(n, h, w, ...)` moved, the edge repeated where they leave something open."""
    height, width = pictures.shape[1:3]
    at_rows = np.clip(np.arange(height) - rows, 0, height - 1)
    at_columns = np.clip(np.arange(width) - columns, 0, width - 1)
    return pictures[:, at_rows][:, :, at_columns]


# -- what is said beside a map ---------------------------------------------------------------------------


def _row(
    seen: Evidence, index: int, photo: InputImage, method: Method, raw: np.ndarray, note: str, layers: Sequence[str]
) -> HeatmapRow:
    network, logits = seen.network, None if seen.logits is None else seen.logits[index]
    row = HeatmapRow(
        image=photo.name,
        class_index=None,
        class_name=seen.target.text,
        score=float(seen.scores[index]),
        probability=None,
        layer="" if method.at_picture else ", ".join(layers),
        method=method.name,
        status="ok",
        reason="",
        predictions=() if logits is None else tuple(network.predictions(logits)),
        note="; ".join(filter(None, (note, method.warning))),
    )
    if isinstance(seen.target, ClassScore) and logits is not None:
        target, rival = chosen(seen.arguments[0][index])
        explained = network.prediction(logits, target)
        row = replace(
            row,
            class_index=target,
            class_name=explained.name,
            probability=explained.probability,
            against=None if rival is None else network.class_name(rival),
        )
    reason = _why_blank(raw, seen.gradients[index], row.probability, network.head.kind.endswith("_output"))
    if isinstance(seen.target, Channel) and not seen.arguments[0][index].any():
        reason = f"there is no place with {seen.target.text}"
    return replace(row, status="blank" if reason else "ok", reason=reason)


def _why_blank(raw: np.ndarray, gradient: np.ndarray, probability: float | None, saturates: bool) -> str:
    """Why nothing is to be seen in a map, or "" where something is."""
    if not np.isfinite(raw).all():
        return "the map holds values that are not finite numbers"
    if raw.max() > 0:
        return ""
    if not gradient.any():
        if saturates and probability is not None and not 1 - SATURATED < probability < SATURATED:
            end = round(probability)
            return f"saturated: the probability is {end} as far as the computer can tell, so its gradient is zero"
        return "zero gradient: nothing in this layer changes the score of this class"
    if not raw.any():
        return "the map is zero everywhere: the channels that matter for this class are silent"
    return "all negative: every place in this layer speaks against this class"
