"""Detection of a model's properties, and a test of the three techniques on it: `convscope doctor`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from convscope.errors import ConvscopeError, one_line
from convscope.images.decode import Source, read_image
from convscope.networks import Network, open_model
from convscope.networks.formats.files import KINDS, kind_of_file, sha256
from convscope.networks.measured import Resemblance, resemblances
from convscope.networks.preprocessing import GUESS
from convscope.results import versions
from convscope.schema import Json
from convscope.techniques.activations import activations
from convscope.techniques.filters import filters, first_with_gradient
from convscope.techniques.heatmaps import heatmap

CHANNELS, STEPS = 2, 3  # of the dry run of `filters`
MIB = 2**20


@dataclass(frozen=True)
class Trial:
    """One step of the dry run.

    Attributes:
        name: "open", "activations", "filters" or "heatmap".
        ok: whether it worked; found: its result, or the reason for the failure.
        doubt: a remark on an unusual result, or "".
        seconds: of wall-clock time, the first call with all that has to be compiled for it.
        peak_bytes: the most memory that the process has held so far; None where the system does not report it.
    """

    name: str
    ok: bool
    found: str
    seconds: float
    peak_bytes: int | None
    doubt: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The findings, as plain values.

    Attributes:
        file: path, bytes, kind and hash of the model file; empty where the model is none.
        network: see `Network.describe`; empty where the model can't be opened.
        layers: their number, kinds, the ones that activations show by default, the heatmap's, and the filters'.
        trials: the dry run, opening first.
        doubts: the guesses, with the options that set them; problems: the failures, with their reasons.
        resemblance: how far the user's image lies from what the network was trained on (`networks.measured`); None
            where there is no image or that can't be measured.
    """

    file: dict[str, Json]
    network: dict[str, Json]
    layers: dict[str, Json]
    trials: tuple[Trial, ...]
    doubts: tuple[str, ...]
    problems: tuple[str, ...]
    resemblance: Resemblance | None = None

    @property
    def ok(self) -> bool:
        """True if everything works."""
        return not self.problems

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values, with the versions of the libraries."""
        resemblance = None if self.resemblance is None else self.resemblance.describe()
        return {"ok": self.ok, **asdict(self), "resemblance": resemblance, "versions": versions()}


def doctor(model: object, image: Source | None = None, **opening: Json) -> Diagnosis:
    """Report the detected properties of a model, and try the three techniques on it.

    Args:
        model: what `open_model` takes, or an opened network.
        image: what `read_image` takes, for the dry run; None for an image that convscope draws.
        opening: the options of `open_model`.

    Returns:
        a diagnosis, also of a model that can't be opened: then `problems` has the reason.

    Example:
        >>> convscope.doctor(network).ok                                               # doctest: +SKIP
        True
    """
    network: Network | None = None

    def opened() -> str:
        nonlocal network
        network = open_model(model, **opening)
        return f"{len(network.layers)} layers, {network.parameters:,} parameters"

    trials = [_trial("open", opened)]
    if network is None:
        return Diagnosis(_file(model), {}, {}, tuple(trials), (), (trials[0].found,))
    tried = _drawn(network) if image is None else image
    layers = _layers(network)
    trials += [
        _trial("activations", lambda: _activations(network, tried)),
        _trial("filters", lambda: _filters(network, layers["filters"])),
        _trial("heatmap", lambda: _heatmap(network, tried)),
    ]
    problems = tuple(f"{trial.name}: {trial.found}" for trial in trials if not trial.ok)
    doubts = (*_doubts(network), *(f"{trial.name}: {trial.doubt}" for trial in trials if trial.doubt))
    resemblance = None if image is None else _resemblance(network, image)
    return Diagnosis(_file(model), network.describe(), layers, tuple(trials), doubts, problems, resemblance)


def _resemblance(network: Network, image: Source) -> Resemblance | None:
    """How far the user's image lies from what the network was trained on; None where that can't be measured."""
    try:
        return next(iter(resemblances(network, [read_image(image)])), None)
    except ConvscopeError:  # a step of the dry run has said why
        return None


def _trial(name: str, run: Callable[[], str | tuple[str, str]]) -> Trial:
    """One step of the dry run; `run` returns what it found, perhaps with a doubt about it."""
    start, doubt = time.perf_counter(), ""
    try:
        ok, returned = True, run()
        found, doubt = returned if isinstance(returned, tuple) else (returned, "")
    except ConvscopeError as error:
        ok, found = False, str(error)
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        # A framework's own errors: the other techniques may work all the same, and a doctor goes on.
        ok, found = False, f"{type(error).__name__}: {one_line(error)}"
    return Trial(name, ok, found, time.perf_counter() - start, _peak_bytes(), doubt)


def _peak_bytes() -> int | None:
    """The most memory that this process has held, in bytes; None on systems that don't report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _file(model: object) -> dict[str, Json]:
    if not isinstance(model, str | PathLike) or not os.path.exists(model):
        return {}
    path = Path(fspath(model))
    try:
        kind = KINDS[kind_of_file(path)]
    except (ConvscopeError, OSError):
        kind = "unknown"
    files = [path] if os.path.isfile(path) else [entry for entry in sorted(path.rglob("*")) if os.path.isfile(entry)]
    return {
        "path": str(path),
        "bytes": sum(entry.stat().st_size for entry in files),
        "kind": kind,
        "sha256": sha256(path) if os.path.isfile(path) else None,
    }


def _drawn(network: Network) -> np.ndarray:
    """An image with edges, a gradient and texture, `(h, w, c)` uint8: so that a trained network responds."""
    height, width, channels = network.image_shape
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.sin(40 * x + 10 * np.sin(7 * y))
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06
    image = np.stack([200 * y, 120 + 80 * waves, 60 + 150 * x], axis=-1)
    image[disc] = (230, 200, 40)
    rgb = np.clip(image, 0, 255).astype(np.uint8)
    if channels in (1, 3):
        return rgb
    return np.resize(rgb.transpose(2, 0, 1), (channels, height, width)).transpose(1, 2, 0)


def _layers(network: Network) -> dict[str, Json]:
    kinds: dict[str, int] = {}
    for layer in network.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    try:
        last = network.last_spatial_layer().path
    except ConvscopeError:
        last = None
    rows = [layer for layer in network.layers if layer.convolves and layer.on_path] or [
        layer for layer in network.layers if layer.on_path and not layer.container
    ]
    return {
        "count": len(network.layers),
        "kinds": kinds,
        "activations": [layer.path for layer in network.select(None)],
        "heatmap": last,
        "filters": rows[len(rows) // 2].path if rows else None,
    }


def _activations(network: Network, image: Source) -> str:
    found = activations(network, [image])
    size = sum(array.nbytes for array in found.arrays.values())
    counted = [row for row in found.statistics if row.zeros is not None]
    count = sum(row.empty_channels or 0 for row in counted)
    empty = f", {count} empty channel{'' if count == 1 else 's'}" if counted else ""
    return f"{len(found.arrays)} layers, {size / MIB:.1f} MiB per image{empty}"


def _filters(network: Network, path: str | None) -> tuple[str, str]:
    if path is None:
        raise ConvscopeError("the network has no layer that the image passes.", code="no-layer-with-a-filter")
    channels, looked, stuck = first_with_gradient(network, path, CHANNELS, batch=CHANNELS)
    if stuck == looked:
        kind = network.layer(path).class_name
        raise ConvscopeError(
            f"none of the {looked} filters of {path} ({kind}) that were tried has a gradient.",
            code="no-gradient",
            layer=path,
            count=looked,
        )
    result = filters(network, path, channels, steps=STEPS)
    climbed = sum(row.activation > row.activations[0] for row in result.rows)
    doubt = "" if climbed else "no activation rose; try more steps, or check the preprocessing."
    return f"{climbed} of {len(result.rows)} filters of {path} rose in {STEPS} steps", doubt


def _heatmap(network: Network, image: Source) -> str:
    row = heatmap(network, [image]).rows[0]
    how = f" (blank: {row.reason})" if row.status == "blank" else ""
    return f"{row.method} of {row.explained} at {row.layer}{how}"


def _doubts(network: Network) -> tuple[str, ...]:
    found = []
    if network.preprocessing.certainty == GUESS:
        found.append(f"preprocessing: {network.preprocessing.text}.")
    if network.contradiction:
        found.append(f"preprocessing: {network.contradiction}.")
    if network.inputs.note:
        found.append(f"input size: {network.inputs.note}.")
    if network.head.guess:
        found.append(f"outputs: {network.head.text}.")
    return tuple(found)
