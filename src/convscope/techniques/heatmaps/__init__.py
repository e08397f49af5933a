"""Which part of a picture spoke for a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from convscope.errors import UsageError
from convscope.networks import Layer, Network, open_model
from convscope.networks.network import check_finite
from convscope.pictures import Picture, read_pictures
from convscope.results import Heatmap, HeatmapRow, Progress, provenance
from convscope.techniques.heatmaps.cam import METHODS, Method, method_named
from convscope.techniques.heatmaps.perturbation import Replay

__all__ = ["METHODS", "as_targets", "heatmap", "maps_and_gradients"]

TOP = -1  # stands for the class with the highest score of each picture
RIVAL, NONE = -1, -2  # stand for the highest of the other classes, and for no class to set against
BATCH = 8
SATURATED = 1 - 1e-6


def heatmap(
    network: Network | Any,
    images: Any,
    target: int | str | Sequence[int | str] = "top",
    layer: str = "auto",
    *,
    against: int | str | Sequence[int | str] | None = None,
    method: str | Sequence[str] = "grad-cam",
    batch: int = BATCH,
    progress: Progress = None,
) -> Heatmap:
    """Which part of each picture spoke for a class.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        target: a class by number or name, or "top" for each picture's own best; or one for each picture.
        layer: a path, or "auto" for the last layer whose map has more than one cell.
        against: a class whose logit is taken from the target's, so that the map shows what speaks for the one and not
            for the other: by number or name, or "rival" for each picture's best other class; or one for each picture.
            Of two classes under one softmax only this difference means anything.
        method: one of `METHODS`, several, or "all" for all that work on one pass. With several, each picture has a map
            for each method, one after another; of "all", a method that does not fit the network is left out and says
            why in the provenance.
        batch: pictures at a time.
        progress: called as `progress(done, total, text)`.

    Returns:
        raw signed maps `(n, h, w)` at the layer's size; a map in which nothing is to be seen has its reason.

    Raises:
        UsageError: no such class, layer or method, or a layer without a map; PictureError, ModelError.
    """
    network = open_model(network)
    network.check_scores()
    photos = tuple(read_pictures(images))
    chosen, skip = _methods(method), method == "all"
    where = _layer(network, layer)
    classes = _classes(network, target, len(photos), {"top": TOP})
    rivals = np.full(len(photos), NONE, np.int32)
    if against is not None:
        rivals = _against(network, against, classes)
    x = network.prepare(photos)
    batch = max(1, min(batch, len(photos)))
    maps, rows = [], []
    left_out: dict[str, str] = {}
    for start in range(0, len(photos), batch):
        some = slice(start, min(start + batch, len(photos)))
        seen = maps_and_gradients(network, where, x[some], classes[some], batch, rivals[some])
        check_finite(network, seen[0])
        for raw, row in _explained(network, where, chosen, photos[some], x[some], seen, left_out if skip else None):
            maps.append(np.where(np.isfinite(raw), raw, 0).astype(np.float32))
            rows.append(row)
        if progress:
            progress(some.stop, len(photos), photos[some.stop - 1].name)
    used = [one for one in chosen if one.name not in left_out]
    parameters = {
        "target": as_targets(target),
        "against": None if against is None else as_targets(against),
        "output": network.output,
        "layer": where.path,
        "layer_rule": "the last layer whose map has more than one cell" if layer == "auto" else "given",
        "method": ", ".join(one.name for one in used),
        "paper": "; ".join(one.paper for one in used),
        "left_out": left_out,
        "explained": network.head.text,
    }
    shown = tuple(photo for photo in photos for _ in used)
    return Heatmap(provenance(network, "heatmap", photos, parameters), shown, np.stack(maps), tuple(rows))


def _explained(
    network: Network,
    layer: Layer,
    chosen: Sequence[Method],
    photos: Sequence[Picture],
    x: np.ndarray,
    seen: tuple[np.ndarray, ...],
    left_out: dict[str, str] | None,
) -> Iterator[tuple[np.ndarray, HeatmapRow]]:
    """The raw map `(h, w)` and the row of each photo and method, from what `maps_and_gradients` saw."""
    logits, activations, gradients, explained, others = seen
    made = _formulas([one for one in chosen if one.formula], activations, gradients, left_out)
    replays = [
        Replay(network, layer, x[index][None], activations[index], int(explained[index]), _rival(others[index]))
        for index in range(len(photos))
    ]
    made += [(one, np.stack(list(map(one.replay, replays)))) for one in chosen if one.replay]
    for index, photo in enumerate(photos):
        target, rival = int(explained[index]), _rival(others[index])
        for one, raw in made:
            yield (
                raw[index],
                _row(network, photo, layer, one, logits[index], target, rival, raw[index], gradients[index]),
            )


def _rival(number: int) -> int | None:
    return None if number == NONE else int(number)


def _methods(given: str | Sequence[str]) -> list[Method]:
    """Of "all" those that share one pass."""
    if given == "all":
        return [one for one in METHODS.values() if one.formula]
    return [method_named(name) for name in ([given] if isinstance(given, str) else given)]


def _formulas(
    chosen: Sequence[Method], maps: np.ndarray, gradients: np.ndarray, left_out: dict[str, str] | None
) -> list[tuple[Method, np.ndarray]]:
    """Each method with its heatmaps `(n, h, w)`; into `left_out`, if it is there, go those that do not fit, and why."""
    made = []
    for one in chosen:
        try:
            if one.formula and (left_out is None or one.name not in left_out):
                made.append((one, one.formula(maps, gradients)))
        except UsageError as error:
            if left_out is None:
                raise
            left_out[one.name] = str(error)
    return made


def as_targets(target: Any) -> list[int | str]:
    """One class or several as a list; NumPy's integers count as numbers."""
    several = [target] if isinstance(target, str | int | np.integer) else target
    return [one if isinstance(one, str) else int(one) for one in several]


def _layer(network: Network, path: str) -> Layer:
    layer = network.last_spatial_layer() if path == "auto" else network.layer(path)
    if not layer.spatial:
        auto = network.last_spatial_layer().path
        raise UsageError(
            f"layer {layer.path!r} has no map (its output has the shape {layer.shape}); a heatmap needs one of "
            f"(height, width, channels), such as {auto!r}."
        )
    return layer


def _classes(network: Network, target: Any, count: int, words: dict[str, int]) -> np.ndarray:
    """The class of each picture `(n,)` int32, or what stands for one of `words`."""
    given = as_targets(target)
    if len(given) not in (1, count):
        raise UsageError(f"expected one class, or one for each of the {count} pictures; found {len(given)}.")
    numbers = [words[one] if one in words else network.class_index(one) for one in given]
    return np.asarray(numbers * (count if len(numbers) == 1 else 1), np.int32)


def _against(network: Network, against: Any, classes: np.ndarray) -> np.ndarray:
    """The class to set against that of each picture `(n,)`, or `RIVAL`."""
    if network.head.classes < 2:
        raise UsageError("the network has one output, so there is no other to set against it.")
    rivals = _classes(network, against, len(classes), {"rival": RIVAL})
    same = [int(one) for one, other in zip(classes, rivals, strict=True) if one == other >= 0]
    if same:
        raise UsageError(f"class {network.class_name(same[0])!r} can't be set against itself; choose another.")
    return rivals


def maps_and_gradients(
    network: Network,
    layer: Layer,
    x: np.ndarray,
    classes: np.ndarray,
    batch: int,
    rivals: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the formulas work on, for at most `batch` pictures.

    Args:
        network, layer: where.
        x: prepared pictures `(n, h, w, c)`.
        classes: `(n,)` int32, `TOP` for each picture's own best.
        batch: the pictures are filled up to this number, so that one compiled program serves every chunk.
        rivals: `(n,)` int32, classes whose logits are subtracted, `RIVAL` for the best other class, `NONE` for none.

    Returns:
        logits `(n, k)`; the layer's maps and the gradients of the explained logits with respect to them, both
        `(n, h, w, c)`; the class explained and the one set against it `(n,)`.
    """
    program = network.program(("explain", layer.path), lambda: network.compile(_explaining(network, layer)))
    rivals = np.full(len(x), NONE, np.int32) if rivals is None else rivals
    filled = np.resize(x, (batch, *x.shape[1:]))
    delta = np.zeros((batch, *layer.shape), np.float32)
    numbers = np.resize(classes, batch), np.resize(rivals, batch)
    found = program(*map(network.tensor, (filled, delta, *numbers)))
    logits, maps, gradients, explained, others = (network.numpy(tensor)[: len(x)] for tensor in found)
    return logits, maps, gradients, explained, others


def _explaining(network: Network, layer: Layer) -> Callable:
    ops = network.ops

    def explain(run: Callable, x: Any, delta: Any, classes: Any, rivals: Any) -> tuple:
        def score(delta: Any) -> tuple:
            seen = run(x, record=(layer.path,), rules={layer.path: lambda activation: activation + delta})
            count = seen.logits.shape[-1]
            best = ops.cast(ops.argmax(seen.logits, axis=-1), "int32")
            chosen = ops.where(ops.less(classes, 0), best, classes)
            mine = ops.one_hot(chosen, count, dtype="float32")
            other = ops.cast(ops.argmax(seen.logits - 1e30 * mine, axis=-1), "int32")
            rival = ops.where(ops.equal(rivals, RIVAL), other, rivals)
            theirs = ops.one_hot(ops.maximum(rival, 0), count, dtype="float32")
            theirs = theirs * ops.reshape(1 - ops.cast(ops.less(rival, 0), "float32"), (-1, 1))
            return ops.sum(seen.logits * (mine - theirs)), (seen.logits, seen.activations[layer.path], chosen, rival)

        (_, (logits, maps, chosen, rival)), gradient = network.value_and_grad(score)(delta)
        return logits, maps, gradient, chosen, rival

    return explain


def _row(
    network: Network,
    photo: Picture,
    layer: Layer,
    method: Method,
    logits: np.ndarray,
    index: int,
    rival: int | None,
    raw: np.ndarray,
    gradient: np.ndarray,
) -> HeatmapRow:
    explained = network.prediction(logits, index)
    reason = _why_blank(raw, gradient, explained.probability, network.head.kind.endswith("_output"))
    return HeatmapRow(
        image=photo.name,
        class_index=index,
        class_name=explained.name,
        against=None if rival is None else network.class_name(rival),
        score=explained.logit - (0.0 if rival is None else float(logits[rival])),
        probability=explained.probability,
        layer=layer.path,
        method=method.name,
        status="blank" if reason else "ok",
        reason=reason,
        predictions=tuple(network.predictions(logits)),
    )


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
