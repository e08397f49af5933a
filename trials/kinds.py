"""The kinds of tries: the rows of the table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The groups' weights in the time: in an hour of two jobs some 20,000 interrupts fit, and the others many times.
GROUPS = {"images": 6, "models": 18, "interrupts": 22, "kills": 8, "loops": 6, "folders": 2}
# Packages that a worker's runtime needs.
NEEDS = {
    "plain": (),
    "torch": ("torch",),
    "tensorflow": ("keras", "tensorflow", "h5py"),
    "jax": ("keras", "jax"),
    "keras-torch": ("keras", "torch"),
    "torch-forked": ("torch",),
    "keras-forked": ("keras",),
}


@dataclass(frozen=True)
class Kind:
    """One row.

    Attributes:
        name: as --repeat and --only take it.
        group: one of GROUPS.
        runtime: the runtime that the worker imports.
        function: "module:function" in trials, from a `Place` to a `Case` or an `Answer`.
        share: of its group's minutes.
        seconds: after which a try is a hang.
        slice: seconds that a worker stays with it, at least.
        least: seconds that the first try takes: it is not begun where less is left.
        needs: modules beside the runtime's.
    """

    name: str
    group: str
    runtime: str
    function: str
    share: float = 1
    seconds: float = 40
    slice: float = 5
    least: float = 0
    needs: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def makes_files(self) -> bool:
        """True if its function makes a file, and the worker opens that."""
        return self.group in ("images", "models", "folders")

    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        own = f"trials.{self.function.partition(':')[0]}"
        return [name for name in (own, *NEEDS[self.runtime], *self.needs) if not _found(name)]

    def load(self) -> Callable[..., Any]:
        """Its function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"trials.{module}"), name)


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _images() -> list[Kind]:
    shares = {"tiff": 3, "png": 3, "jpeg": 2}
    names = ("png", "jpeg", "webp", "gif", "tiff", "bmp", "avif", "jpeg2000", "ppm", "posing", "numpy")
    return [
        Kind(f"image-{name}", "images", "plain", f"images:generate_{name}", shares.get(name, 1))
        for name in names
        if name != "numpy"
    ]


def _models() -> list[Kind]:
    torch = [
        ("state-dict", "torch_files:state_dict", 2, ()),
        ("state-dict-legacy", "torch_files:legacy", 1, ()),
        ("torchscript", "torch_files:torchscript", 2, ()),
        ("pt2", "torch_files:exported", 2, ()),
        ("safetensors", "torch_files:safetensors", 1, ("safetensors",)),
        ("onnx", "onnx_simple:generate", 1, ("onnx",)),
        ("onnx-malformed", "onnx_wrapped:generate", 3, ("onnx", "trials.onnx_files")),
        ("classes", "side_files:classes", 0.5, ()),
        ("feed", "side_files:feed", 0.5, ("onnx",)),
    ]
    keras = [
        ("keras", "keras_files:keras_archive", 3, ()),
        ("hdf5", "keras_files:hdf5", 2, ()),
        ("hdf5-old", "keras_files:hdf5_old", 2, ()),
        ("saved-model", "saved_models:generate", 4, ()),
        ("tfjs", "tfjs:generate", 1, ()),
    ]
    return [Kind(name, "models", "torch", function, share, needs=needs) for name, function, share, needs in torch] + [
        Kind(name, "models", "tensorflow", function, share, slice=15, needs=needs)
        for name, function, share, needs in keras
    ]


def _long() -> list[Kind]:
    runtimes = ("torch", "tensorflow", "jax", "keras-torch")
    interrupts = [
        Kind(
            f"interrupts-{name}",
            "interrupts",
            "plain",  # each starts a process of its own
            "interrupts_wrapped:attempt",
            seconds=500,
            slice=30,
            least=30,
            needs=("trials.interrupts", *NEEDS[name]),
            share=2 if name == "torch" else 1,
            arguments={"runtime": {"tensorflow": "keras-tensorflow", "jax": "keras-jax"}.get(name, name)},
        )
        for name in runtimes
    ]
    loops = [
        Kind(
            f"loops-{name}",
            "loops",
            runtime,
            "loops:attempt",
            seconds=300,
            slice=1,
            least=25,
            needs=needs,
            arguments={"net": name},
        )
        for name, runtime, needs in (
            *((name, name, ()) for name in runtimes),
            ("onnx", "torch", ("onnx",)),
            ("open", "torch", ()),
        )
    ]
    commands = ("activations", "filters", "film", "heatmap", "concepts", "report")
    kills = [
        Kind(
            f"kills-{name}",
            "kills",
            "torch-forked",
            "kills:attempt",
            seconds=200,
            slice=20,
            least=20,
            arguments={"command": name, "seconds": 60},
        )
        for name in commands
    ]
    kills.append(
        Kind(
            *("kills-demo", "kills", "keras-forked", "kills:attempt", 1, 1900, 20, 300),
            arguments={"command": "demo", "seconds": 600},
        )
    )
    kills.append(
        Kind(
            *("kills-keras", "kills", "keras-forked", "kills:attempt", 1, 320, 20, 40),
            arguments={"command": "keras", "seconds": 100},
        )
    )
    return interrupts + loops + kills


def _folders() -> list[Kind]:
    results = ("activations", "filters", "heatmap", "concepts")
    return [
        Kind(f"folder-{name}", "folders", "plain", "folders:generate", arguments={"result": name}, needs=("torch",))
        for name in results
    ]


def all_kinds() -> dict[str, Kind]:
    """Every kind by its name."""
    return {kind.name: kind for kind in (*_images(), *_models(), *_folders(), *_long())}


def chosen(only: str | None, given: dict[str, Kind]) -> list[Kind]:
    """Those that `--only images,keras` names, by group or name.

    Raises:
        ValueError: there is none of that name.
    """
    names = [name.strip() for name in (only or ",".join(GROUPS)).split(",")]
    unknown = [name for name in names if name not in GROUPS and name not in given]
    if unknown:
        raise ValueError(f"there is no group or kind {unknown[0]!r}; there are {', '.join((*GROUPS, *given))}")
    return [kind for kind in given.values() if kind.group in names or kind.name in names]


HERE = Path(__file__).parent
