"""TensorFlow.js layers models: `model.json` with a config of Keras and a manifest of weights, and shards beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials import mutations
from trials.keras_files import hostile_config
from trials.models import tried
from trials.outcomes import Case, Place
from trials.saved_models import damaged_files

CONFIG = "model.json"


def generate(place: Place) -> Case:
    """A model, damaged at one of the levels."""
    rng, base = place.rng, place.base("tfjs-*")
    folder = place.folder / "net"
    shutil.copytree(base, folder)
    path, chance = folder / CONFIG, rng.random()
    if chance < 0.05:
        return tried(place, path, f"{base.name} whole")
    if chance < 0.15:
        file = rng.choice(sorted(folder.iterdir()))
        file.write_bytes(mutations.damaged(file.read_bytes(), rng))
        return tried(place, path, f"{base.name}, damaged bytes of {file.name}")
    if chance < 0.25:
        return tried(place, path, f"{base.name}, {damaged_files(folder, place, CONFIG)}")
    told = json.loads(path.read_text())
    if chance < 0.5:
        what, told = "values changed", mutations.mutated(told, place)
    else:
        what = rng.choice(list(_HOSTILE))
        _HOSTILE[what](told, place)
    path.write_bytes(mutations.dumped(told))
    return tried(place, path, f"{base.name}, {what}")


def _weight(told: Any, place: Place) -> dict[str, Any]:
    return place.rng.choice(told["weightsManifest"][0]["weights"])


def _code(told: Any, place: Place) -> None:
    topology = told["modelTopology"]
    topology["model_config"] = hostile_config(topology["model_config"], place)


def _shards(told: Any, place: Place) -> None:
    """Shards that lie elsewhere, are there many times, or are the config itself."""
    group = told["weightsManifest"][0]
    group["paths"] = place.rng.choice(
        (
            ["../outside/weights.bin"],
            [str(place.outside / "weights.bin")],
            [str(place.outside / "pipe")],
            ["//host/share/weights.bin"],
            ["http://127.0.0.1:9/weights.bin"],
            ["file:///etc/passwd"],
            [CONFIG],
            ["."],
            group["paths"] * place.rng.choice((2, 1000, 10**5)),
            [],
        )
    )


def _shape(told: Any, place: Place) -> None:
    _weight(told, place)["shape"] = place.rng.choice(
        ([2**31] * 3, [-1], [2**63], [0], [], [1.5], ["3"], None, [[3]], [True], [1] * 1000, [float("nan")])
    )


def _type(told: Any, place: Place) -> None:
    rng = place.rng
    item = _weight(told, place)
    if rng.random() < 0.4:
        item["dtype"] = rng.choice(("string", "object", "bool", "complex64", "float64", "O", "V1000000", "<f4", "", 3))
        return
    item["quantization"] = rng.choice(
        (
            {"dtype": "uint8", "min": float("nan"), "scale": float("inf")},
            {"dtype": "uint8", "min": "0", "scale": None},
            {"dtype": "object", "min": 0, "scale": 1},
            {"dtype": "float16"},
            {"dtype": "uint16", "min": -1e308, "scale": 1e308},
            {},
            [],
            "uint8",
        )
    )


def _many(told: Any, place: Place) -> None:
    group = told["weightsManifest"][0]
    item = _weight(told, place)
    group["weights"] += [{**item, "name": f"w{number}"} for number in range(place.rng.choice((1, 1000, 300_000)))]


def _twice(told: Any, place: Place) -> None:
    told["weightsManifest"] *= place.rng.choice((2, 3, 1000))


def _deep(told: Any, place: Place) -> None:
    holder = place.rng.choice(mutations.holders_in(told))
    key = place.rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key] = mutations.nested(place.rng.choice((50, 150, 3000, 10**5)))


def _graph(told: Any, place: Place) -> None:
    told["format"] = place.rng.choice(("graph-model", "layers-model", "", None, 3, "tfjs-graph-model"))
    if place.rng.random() < 0.5:
        told["modelTopology"] = {"node": [{"name": "x", "op": "WriteFile"}], "library": {}}


_HOSTILE: dict[str, Callable[[Any, Place], None]] = {
    "a config that names code": _code,
    "shards elsewhere": _shards,
    "an odd shape": _shape,
    "an odd type": _type,
    "many weights": _many,
    "a manifest that repeats": _twice,
    "deep nesting": _deep,
    "a graph": _graph,
}


def write(folder: Path, model: Any, shard: int = 4000) -> None:
    """A model as TensorFlow.js's converter writes it: float32, and every second weight packed as uint8."""
    import numpy as np

    folder.mkdir(exist_ok=True)
    told, data = [], b""
    for number, variable in enumerate(model.weights):
        value = np.asarray(variable.value, "<f4")
        item: dict[str, Any] = {"name": variable.path, "shape": list(value.shape), "dtype": "float32"}
        if number % 2:
            least, scale = float(value.min()), float(np.ptp(value)) / 255 or 1.0
            item["quantization"] = {"dtype": "uint8", "min": least, "scale": scale, "original_dtype": "float32"}
            value = np.round((value - least) / scale).astype(np.uint8)
        told.append(item)
        data += value.tobytes()
    pieces = [data[start : start + shard] for start in range(0, len(data), shard)]
    names = [f"group1-shard{number + 1}of{len(pieces)}.bin" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        (folder / name).write_bytes(piece)
    topology = {"keras_version": "3", "backend": "tensorflow", "model_config": json.loads(model.to_json())}
    whole = {
        "format": "layers-model",
        "modelTopology": topology,
        "weightsManifest": [{"paths": names, "weights": told}],
    }
    (folder / CONFIG).write_text(json.dumps(whole))
