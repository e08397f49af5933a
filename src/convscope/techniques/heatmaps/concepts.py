"""Deep Feature Factorisation: the regions that a layer distinguishes, and the classes that each supports.

Collins et al. 2018, Deep Feature Factorization for Concept Discovery, arXiv:1806.10206.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convscope.errors import UsageError
from convscope.events import Advanced, Progress, Started, tell
from convscope.images.source import Images, hold
from convscope.networks import Layer, Network, Pass, Prediction, Run, open_model
from convscope.networks.foreign import Tensor
from convscope.results import Concept, ConceptParameters, Concepts, origin

BATCH = 8
SWEEPS = 200
EPSILON = 1e-12


def concepts(
    network: Network | object,
    images: Images,
    count: int = 5,
    layer: str = "auto",
    *,
    batch: int = BATCH,
    progress: Progress = None,
) -> Concepts:
    """The regions of some images that are similar to a layer.

    The positive part of the layer's maps of all images, a row for each place, is brought near a product of two
    matrices without negative values: the strength of each concept at a place, and the channels of a concept.

    Args:
        network: an opened network, or what `open_model` takes.
        images: paths, folders, arrays `(h, w[, c])` uint8 or PIL images, one or several.
        count: number of concepts.
        layer: a path, or "auto" for the last layer whose map has more than one cell.
        batch: number of images in one pass.
        progress: called with each event (`convscope.events`).

    Returns:
        the strength of each concept at each place, and for each the classes that a map full of it supports.

    Raises:
        UsageError: no such layer, or one without a map; more concepts than channels or places; ImageError.

    Example:
        >>> found = convscope.concepts(network, PHOTOS[:2], count=3)
        >>> found.values.shape, found.vectors.shape
        ((2, 28, 28, 3), (3, 96))
    """
    network = open_model(network)
    images = hold(images, network.image_shape)
    where = network.last_spatial_layer() if layer == "auto" else network.layer(layer)
    if not where.spatial:
        raise UsageError(
            f"layer {where.path!r} has no map; its output has the shape {where.shape}.",
            code="layer-without-map",
            layer=where.path,
            shape=list(where.shape),
        )
    tell(progress, Started(0, len(images), "maps"))
    parts = []
    for start in range(0, len(images), batch):
        x = network.prepare(images[start : start + batch])
        parts.append(network.forward(x, (where.path,))[1][where.path])
        tell(progress, Advanced(min(start + batch, len(images)), len(images), "maps"))
    maps = np.maximum(np.concatenate(parts).astype(np.float64), 0)
    table = maps.reshape(-1, maps.shape[-1])
    if not 1 <= count <= min(table.shape):
        raise UsageError(
            f"expected 1 to {min(table.shape)} concepts of {where.path}, found {count}.",
            code="concepts-out-of-range",
            layer=where.path,
            expected=min(table.shape),
            found=count,
        )
    if not table.any():
        raise UsageError(
            f"nothing in {where.path} is positive for these images, so there is nothing to factorise.",
            code="nothing-positive",
            layer=where.path,
        )
    shares, vectors = factorised(table, count)
    values = shares.reshape(*maps.shape[:3], count).astype(np.float32)
    rows = _rows(network, where, table, shares, vectors)
    parameters = ConceptParameters(where.path, count, batch, SWEEPS)
    made = origin(network, "concepts", images, details={"paper": "Collins et al. 2018, 1806.10206"})
    return Concepts(made, parameters, images, values, vectors.astype(np.float32), tuple(rows))


def factorised(table: np.ndarray, count: int, sweeps: int = SWEEPS) -> tuple[np.ndarray, np.ndarray]:
    """`table (m, c)` as nearly `shares (m, count) @ vectors (count, c)`, none negative, vectors of length 1.

    Multiplicative updates for the squared error (Lee and Seung 2001), from the start that the singular vectors give
    (Boutsidis and Gallopoulos 2008), so that the same table has the same factors. The strongest concept comes first.
    """
    shares, vectors = _start(table, count)
    for _ in range(sweeps):
        vectors *= (shares.T @ table) / np.maximum(shares.T @ shares @ vectors, EPSILON)
        shares *= (table @ vectors.T) / np.maximum(shares @ (vectors @ vectors.T), EPSILON)
    sizes = np.maximum(np.linalg.norm(vectors, axis=1), EPSILON)
    shares, vectors = shares * sizes, vectors / sizes[:, None]
    order = np.argsort(-(shares**2).sum(axis=0), kind="stable")
    return shares[:, order], vectors[order]


def _start(table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The positive parts of the first singular vectors; zeros get the table's mean, so that they can still grow."""
    squares, vectors_ = np.linalg.eigh(table.T @ table)
    sizes = np.sqrt(np.maximum(squares[::-1], 0))
    right = vectors_.T[::-1]
    left = table @ right[:count].T / np.maximum(sizes[:count], EPSILON)
    shares, vectors = np.zeros((len(table), count)), np.zeros((count, table.shape[1]))
    for k in range(count):
        sides = [(np.maximum(sign * left[:, k], 0), np.maximum(sign * right[k], 0)) for sign in (1, -1)]
        one, other = max(sides, key=lambda pair: np.linalg.norm(pair[0]) * np.linalg.norm(pair[1]))
        norms = np.linalg.norm(one), np.linalg.norm(other)
        size = np.sqrt(sizes[k] * norms[0] * norms[1])
        shares[:, k], vectors[k] = size * one / max(norms[0], EPSILON), size * other / max(norms[1], EPSILON)
    mean = table.mean() / 100
    return np.where(shares > 0, shares, mean), np.where(vectors > 0, vectors, mean)


def _rows(network: Network, layer: Layer, table: np.ndarray, shares: np.ndarray, vectors: np.ndarray) -> list[Concept]:
    total = float((table**2).sum())
    classes = _classes(network, layer, shares, vectors)
    rest = table - shares @ vectors
    rows = []
    for number in range(len(vectors)):
        # The increase of the squared error without it: |rest + s v|^2 - |rest|^2.
        share, vector = shares[:, number], vectors[number]
        gained = float(2 * share @ (rest @ vector) + (share @ share) * (vector @ vector)) / total
        rows.append(Concept(number, gained, classes[number]))
    return rows


def _classes(network: Network, layer: Layer, shares: np.ndarray, vectors: np.ndarray) -> list[tuple[Prediction, ...]]:
    """The best classes of a map that is full of each concept, at its 99th percentile.

    The path around the layer (the shortcut of a residual block) has the values of an image of zeros.
    """
    if network.head.spatial or not layer.on_path:
        return [()] * len(vectors)

    program = network.program(_filling, layer.path)
    strengths = np.percentile(shares, 99, axis=0)
    fills = (strengths[:, None] * vectors).astype(np.float32)[:, None, None, :]
    blank = np.zeros((len(vectors), *network.inputs.size, network.inputs.channels), np.float32)
    logits = network.numpy(program(network.tensor(blank), network.tensor(fills)))
    return [tuple(network.predictions(row, 3)) for row in logits]


def _filling(network: Network, path: str) -> Callable:
    """From images the logits that follow from a layer's map being full of a vector."""

    def replay(run: Run, x: Tensor, fills: Tensor) -> Tensor:
        return run(x, Pass(replace=(path,)), {path: lambda activation: activation * 0 + fills}).logits

    return replay
