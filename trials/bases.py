"""Valid files, made once and kept, which the generators damage."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import convscope

# Which maker (a module of this package) each kind's files come from.
_MAKERS = {
    "torch_bases": ("state-dict", "state-dict-legacy", "torchscript", "pt2", "safetensors", "kills", "loops", "feed"),
    "keras_bases": ("keras", "hdf5", "hdf5-old", "saved-model", "tfjs", "kills", "loops"),
    "onnx_bases": ("onnx", "kills", "loops", "feed"),
    "folder_bases": ("folder",),
}
_LIBRARIES = ("convscope", "torch", "keras", "tensorflow", "onnx", "h5py")


def made(kinds: set[str]) -> Path:
    """The folder of the valid files that these kinds need; made where it is not there yet.

    Kept from one run to the next, so that a try can be repeated exactly.

    Raises:
        RuntimeError: they can't be made.
    """
    folder = (
        Path(tempfile.gettempdir()) / f"convscope-trial-files-{os.getuid() if hasattr(os, 'getuid') else 0}-{_key()}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    for maker, names in _MAKERS.items():
        done = folder / f"{maker}.done"
        wanted = any(kind == name or kind.startswith(f"{name}-") for kind in kinds for name in names)
        if wanted and not done.exists() and _can(maker):
            _make(maker, folder)
            done.touch()
    return folder


def _can(maker: str) -> bool:
    import importlib.util

    needed = {
        "torch_bases": ("torch",),
        "keras_bases": ("keras", "h5py", "tensorflow"),
        "onnx_bases": ("onnx", "torch"),
        "folder_bases": ("torch",),
    }
    return all(importlib.util.find_spec(name) is not None for name in (*needed[maker], f"trials.{maker}"))


def _make(maker: str, folder: Path) -> None:
    from trials.supervisor import environment

    command = [sys.executable, "-m", f"trials.{maker}", str(folder)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{maker} failed: {done.stderr[-2000:]}")


def _key() -> str:
    """The dependencies of the files: the code and the libraries that make them."""
    here = Path(__file__).parent
    store = Path(convscope.__file__).parent / "store"  # results are written by convscope itself
    makers = [*sorted(here.glob("*_bases.py")), here / "attacks.py", *sorted(store.glob("*.py"))]
    sources = [path.read_bytes() for path in makers]
    versions = []
    for name in _LIBRARIES:
        try:
            versions.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            versions.append("none")
    return hashlib.sha256(b"".join((*sources, *(version.encode() for version in versions)))).hexdigest()[:12]
