"""The kind of a model file, by its content: the name only helps where the content does not decide."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from convscope import limits
from convscope.errors import ModelError, nearest
from convscope.networks.formats import archives
from convscope.networks.formats.hdf5 import is_hdf5
from convscope.networks.network import Source

# The names of the kinds for people.
KINDS = {
    "keras": "a .keras archive",
    "hdf5": "an HDF5 file",
    "saved_model": "a SavedModel folder",
    "tfjs": "a TensorFlow.js model",
    "onnx": "an ONNX model",
    "safetensors": "a .safetensors file",
    "torchscript": "a TorchScript archive",
    "exported": "a PyTorch exported program (.pt2)",
    "torch": "a PyTorch checkpoint",
    "pickle": "a Python pickle",
}
SAVED_MODEL_GRAPH = "saved_model.pb"
TFJS = "model.json"
EXPECTED = (
    "a .keras, .h5, .onnx, .pt, .pth, .pt2 or .safetensors file, a TensorFlow.js model.json, or a SavedModel folder"
)


@dataclass(frozen=True)
class ModelFile:
    """A model file with its kind, found once by its content: the argument of every reader.

    Attributes:
        path: of the file, or of the folder of a SavedModel.
        kind: one of `KINDS`.
    """

    path: Path
    kind: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's content, or of the graph of a SavedModel folder; weights in other files are not in it."""
        return sha256(self.path / SAVED_MODEL_GRAPH if self.kind == "saved_model" else self.path)

    def source(self, *notes: str, beside: Iterable[str] = ()) -> Source:
        """Where a network came from that the file holds.

        Args:
            notes: the steps that were needed to open it.
            beside: names of the other files that its weights were read from, relative to the folder that the file is
                in, or that it is.
        """
        folder = self.path if os.path.isdir(self.path) else self.path.parent
        return Source(self.path.name, str(self.path), self.sha256, notes, sha256_of_several(folder, beside))


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and the key of those that are meant.

    Attributes:
        path: of the file.
        key: of one of several state dicts in it; None where it was not given.
    """

    path: Path
    key: str | None = None


def weights_file(name: str) -> WeightsFile:
    """What `FILE` or `FILE::KEY` names; the names of files, and keys, may hold colons too."""
    marks = [] if os.path.exists(name) else [place.start() for place in re.finditer("::", name)]
    if not marks:
        return WeightsFile(Path(name))
    mark = next((mark for mark in marks if os.path.exists(name[:mark])), marks[0])
    return WeightsFile(Path(name[:mark]), name[mark + 2 :])


def sniff(path: Path) -> ModelFile:
    """Find the kind of a file, before any framework is imported.

    Raises:
        ModelError: it is missing, empty, can't be read, or is no model.
    """
    check_file(path)
    return ModelFile(path, kind_of_file(path))


def check_file(path: Path) -> None:
    """Report a fault of a model file before any framework is imported.

    Raises:
        ModelError: it is missing, a folder of another kind, empty, or can't be read.
    """
    if os.path.isdir(path):
        if os.path.exists(path / SAVED_MODEL_GRAPH):
            return
        inside = f"{path / TFJS}" if os.path.isfile(path / TFJS) else EXPECTED
        raise ModelError(
            f"expected a model file, found a folder: {path}. Give {inside}.", code="is-folder", path=str(path)
        )
    if not os.path.exists(path):
        raise ModelError(f"no model file at {path}; {_missing_hint(path)}", code="file-missing", path=str(path))
    if not os.path.isfile(path):
        raise ModelError(
            f"expected a model file, found a device or a pipe: {path}. Give {EXPECTED}.",
            code="no-regular-file",
            path=str(path),
        )
    if path.stat().st_size == 0:
        raise ModelError(
            f"the model file {path} is empty (0 bytes); copy or download it again.", code="file-empty", path=str(path)
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(
            f"the model file {path} can't be read ({error.strerror}); check its permissions.",
            code="file-unreadable",
            path=str(path),
        ) from error


def _missing_hint(path: Path) -> str:
    if re.match(r"\w+:/", path.as_posix()):  # Path makes one "/" of the two
        return "convscope does not download models, so fetch it first and give the file."
    if not os.path.isdir(path.parent):
        return f"there is no folder {path.parent} either, so check the path."
    try:
        return nearest(path.name, sorted(os.listdir(path.parent)))
    except OSError as error:
        return f"its folder can't be read ({error.strerror}), so check the path and its permissions."


def kind_of_file(path: Path) -> str:
    """Which of `KINDS` a file is.

    Raises:
        ModelError: none of them; the message has the kind that the content suggests.
    """
    if os.path.isdir(path):
        return "saved_model"
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if is_hdf5(path):
        return "hdf5"
    if re.match(rb'.{8}\s*\{\s*"', head, re.DOTALL) and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    # PyTorch's files before its zip archives: the number that they begin with, pickled.
    if head.startswith((b"\x80\x02\x8a\x0al\xfc\x9c", b"\x80\x02")):
        return "torch"
    if head.startswith(b"\x80") and head[1:2] in b"\x03\x04\x05":
        return "pickle"
    if path.suffix.lower() == ".onnx" or (head.startswith(b"\x08") and head[1:2] < b" " and b"\x12" in head):
        return "onnx"
    if head.lstrip().startswith(b"{") and _is_tfjs(path):
        return "tfjs"
    if path.suffix == ".py":
        raise ModelError(
            f"{path} is Python code: name the function in it that makes the model, {path}:FUNCTION.",
            code="function-missing",
            path=str(path),
        )
    raise ModelError(
        f"{path} is not a model that convscope opens: {_looks_like(head)}. Expected {EXPECTED}.",
        code="file-unknown",
        path=str(path),
    )


def _is_tfjs(path: Path) -> bool:
    """True for JSON with what TensorFlow.js writes; it is parsed by its reader."""
    with path.open("rb") as file:
        text = file.read(limits.current().text)
    return re.search(rb'"(weightsManifest|modelTopology)"\s*:', text) is not None


def _kind_of_zip(path: Path) -> str:
    whole = archives.member_names(path)
    names = [name.partition("/")[2] or name for name in whole]
    if "config.json" in whole:
        return "keras"
    if any(name.startswith("models/") or "serialized_exported_program" in name for name in (*names, *whole)):
        return "exported"
    if "constants.pkl" in names:
        return "torchscript"
    if "data.pkl" in names:
        return "torch"
    raise ModelError(
        f"{path} is another zip archive (it holds {', '.join(ascii(name)[1:61] for name in whole[:3]) or 'nothing'}, …)"
        ", not a model. "
        f"Expected {EXPECTED}.",
        code="file-unknown",
        path=str(path),
    )


def _looks_like(head: bytes) -> str:
    if head.startswith(b"PK"):
        return "it begins like a zip archive but has no end; it may have been cut off while copying"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")):
        return "it is an image"
    if head and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"it is text, beginning with {head[:24].decode()!r}"
    return f"it begins with the bytes {head[:8].hex(' ')}"


def beside(folder: Path, name: str) -> Path | None:
    """The place of a file that a model names, in its folder or below; None where that is elsewhere, also by a link.

    Args:
        folder: of the model file.
        name: as the model has it, with "/" or a backslash between its parts.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0].startswith("/") or ".." in parts or ":" in name or not name.isprintable():
        return None
    place = folder.joinpath(*parts)
    return place if is_inside(folder, place) else None


def is_inside(folder: Path, place: Path) -> bool:
    """True if a place lies in a folder or below, where links lead to."""
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))


def sha256_of_several(folder: Path, names: Iterable[str]) -> str | None:
    """One hash of files in a folder: of the lines "HASH  NAME" that `sha256sum` prints of them; None if there are none.

    Args:
        folder: that the names are relative to.
        names: with "/" between their parts, in any order.
    """
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(set(names)))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest() if lines else None


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
