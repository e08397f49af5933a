"""Which part of a picture spoke for a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convscope.errors import UsageError
from convscope.networks import Layer, Network, open_model
from convscope.networks.network import check_finite
from convscope.pictures import Picture, read_pictures
from convscope.results import Heatmap, HeatmapRow, Progress, provenance
from convscope.techniques.heatmaps.cam import METHODS, Method, method_named

__all__ = ["METHODS", "as_targets", "heatmap", "maps_and_gradients"]

TOP = -1  # stands for the class with the highest score of each picture
BATCH = 8
SATURATED = 1 - 1e-6


def heatmap(
    network: Network | Any,
    images: Any,
    target: int | str | Sequence[int | str] = "top",
    layer: str = "auto",
    *,
    method: str = "grad-cam",
    batch: int = BATCH,
    progress: Progress = None,
) -> Heatmap:
    """Which part of each picture spoke for a class.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        target: a class by number or name, or "top" for each picture's own best; or one for each picture.
        layer: a path, or "auto" for the last layer whose map has more than one cell.
        method: one of `METHODS`.
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
    chosen = method_named(method)
    where = _layer(network, layer)
    classes = _classes(network, target, len(photos))
    x = network.prepare(photos)
    batch = max(1, min(batch, len(photos)))
    maps, rows = [], []
    for start in range(0, len(photos), batch):
        stop = min(start + batch, len(photos))
        logits, activations, gradients, explained = maps_and_gradients(
            network, where, x[start:stop], classes[start:stop], batch
        )
        check_finite(network, logits)
        raw = chosen.formula(activations, gradients)
        maps.append(np.where(np.isfinite(raw), raw, 0).astype(np.float32))
        rows += [
            _row(
                network,
                photos[start + index],
                where,
                chosen,
                logits[index],
                int(explained[index]),
                raw[index],
                gradients[index],
            )
            for index in range(stop - start)
        ]
        if progress:
            progress(stop, len(photos), photos[stop - 1].name)
    parameters = {
        "target": [one if isinstance(one, str) else int(one) for one in as_targets(target)],
        "output": network.output,
        "layer": where.path,
        "layer_rule": "the last layer whose map has more than one cell" if layer == "auto" else "given",
        "method": chosen.name,
        "paper": chosen.paper,
        "explained": network.head.text,
    }
    return Heatmap(provenance(network, "heatmap", photos, parameters), photos, np.concatenate(maps), tuple(rows))


def as_targets(target: Any) -> list[int | str]:
    """One class or several as a list; NumPy's integers count as numbers."""
    if isinstance(target, str):
        return [target]
    return [int(target)] if isinstance(target, int | np.integer) else list(target)


def _layer(network: Network, path: str) -> Layer:
    layer = network.last_spatial_layer() if path == "auto" else network.layer(path)
    if not layer.spatial:
        auto = network.last_spatial_layer().path
        raise UsageError(
            f"layer {layer.path!r} has no map (its output has the shape {layer.shape}); a heatmap needs one of "
            f"(height, width, channels), such as {auto!r}."
        )
    return layer


def _classes(network: Network, target: int | str | Sequence[int | str], count: int) -> np.ndarray:
    """The class of each picture `(n,)` int32, `TOP` where the picture decides."""
    given = as_targets(target)
    if len(given) not in (1, count):
        raise UsageError(f"expected one class, or one for each of the {count} pictures; found {len(given)}.")
    numbers = [TOP if one == "top" else network.class_index(one) for one in given]
    return np.asarray(numbers * (count if len(numbers) == 1 else 1), np.int32)


def maps_and_gradients(
    network: Network, layer: Layer, x: np.ndarray, classes: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the formulas work on, for at most `batch` pictures.

    Args:
        network, layer: where.
        x: prepared pictures `(n, h, w, c)`.
        classes: `(n,)` int32, -1 for each picture's own best.
        batch: the pictures are filled up to this number, so that one compiled program serves every chunk.

    Returns:
        logits `(n, k)`; the layer's maps and the gradients of the explained logits with respect to them, both
        `(n, h, w, c)`; the class explained `(n,)`.
    """
    program = network.program(("explain", layer.path), lambda: network.compile(_explaining(network, layer)))
    filled, numbers = np.resize(x, (batch, *x.shape[1:])), np.resize(classes, batch)
    delta = np.zeros((batch, *layer.shape), np.float32)
    found = program(*map(network.tensor, (filled, delta, numbers)))
    logits, maps, gradients, explained = (network.numpy(tensor)[: len(x)] for tensor in found)
    return logits, maps, gradients, explained


def _explaining(network: Network, layer: Layer) -> Callable:
    ops = network.ops

    def explain(run: Callable, x: Any, delta: Any, classes: Any) -> tuple:
        def score(delta: Any) -> tuple:
            seen = run(x, record=(layer.path,), rules={layer.path: lambda activation: activation + delta})
            best = ops.cast(ops.argmax(seen.logits, axis=-1), "int32")
            chosen = ops.where(ops.less(classes, 0), best, classes)
            scores = seen.logits * ops.one_hot(chosen, seen.logits.shape[-1], dtype="float32")
            return ops.sum(scores), (seen.logits, seen.activations[layer.path], chosen)

        (_, (logits, maps, chosen)), gradient = network.value_and_grad(score)(delta)
        return logits, maps, gradient, chosen

    return explain


def _row(
    network: Network,
    photo: Picture,
    layer: Layer,
    method: Method,
    logits: np.ndarray,
    index: int,
    raw: np.ndarray,
    gradient: np.ndarray,
) -> HeatmapRow:
    explained = network.prediction(logits, index)
    reason = _why_blank(raw, gradient, explained.probability, network.head.kind.endswith("_output"))
    return HeatmapRow(
        image=photo.name,
        class_index=index,
        class_name=explained.name,
        score=explained.logit,
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
