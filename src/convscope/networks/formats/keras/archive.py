"""`.keras` archives: unpacked in the reader process, with limits, and packed again clean for Keras' own loader.

Of an archive only the members that Keras reads are read, by their exact names. Keras is given an archive
of convscope's own, so that it does not matter how another zip library would have understood the file.
"""

from __future__ import annotations

import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from convscope import limits
from convscope.errors import ModelError, one_line
from convscope.networks.formats import hdf5
from convscope.networks.formats.hdf5 import Contents
from convscope.networks.formats.keras import config as keras_config
from convscope.schema import Json

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"

# The files of a layer beside its weights: word lists. A name is a path of plain names.
_ASSET = re.compile(r"assets(/[\w-][\w.-]*)+")


@dataclass(frozen=True)
class Archive:
    """The content of an archive.

    Attributes:
        config: the architecture, as parsed JSON.
        version: of the Keras that wrote it, "of unknown version" where it is not recorded.
        weights: None where there are none.
        assets: files of layers, by name.
    """

    config: Json
    version: str
    weights: Contents | None
    assets: dict[str, bytes]


def read(path: Path) -> Archive:
    """The content of the archive at `path`.

    Raises:
        ModelError: it is damaged, holds no architecture, or is larger than the limits; BackendError: no h5py.
    """
    hdf5.check_installed(path)
    size = path.stat().st_size
    function = "convscope.networks.formats.keras.archive:members"
    found = hdf5.in_reader(path, function, path, memory=hdf5.memory_for(size) + size)
    metadata = keras_config.parse(found["metadata"] or "{}", path.name)
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    return Archive(
        keras_config.parse(found["config"], path.name),
        version if isinstance(version, str) and re.match(r"\d+\.", version) else "of unknown version",
        hdf5.unpacked(found["weights"]) if found["weights"] is not None else None,
        found["assets"],
    )


@contextmanager
def clean(archive: Archive) -> Iterator[Path]:
    """The archive written anew, to a file that is there for the length of the block."""
    with TemporaryDirectory() as folder:
        weights, path = Path(folder) / WEIGHTS, Path(folder) / "model.keras"
        hdf5.write(weights, archive.weights or Contents({}, {}))
        with zipfile.ZipFile(path, "w") as made:
            made.writestr(METADATA, json.dumps({"keras_version": archive.version}))
            made.writestr(CONFIG, json.dumps(archive.config))
            made.write(weights, WEIGHTS)
            for name, data in archive.assets.items():
                made.writestr(name, data)
        yield path


# -- the reader's side -----------------------------------------------------------------------------------


def members(path: str) -> dict[str, Json]:
    """The members that Keras reads: the texts, plain values of the weights, and the assets. Runs in the reader."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = _listed(archive)
            if CONFIG not in found:
                raise ModelError(
                    f"expected a .keras archive, found one without {CONFIG}. Copy or download it again.",
                    code="file-damaged",
                    name=CONFIG,
                )
            config, metadata = (_text(archive, found.get(name)) for name in (CONFIG, METADATA))
            weights = _bytes(archive, found.get(WEIGHTS), "weights")
            assets = {name: _bytes(archive, info, "text") for name, info in found.items() if _ASSET.fullmatch(name)}
    except _DAMAGED as error:
        raise ModelError(
            f"the archive can't be read whole: {one_line(error)}. Copy or download it again.",
            code="file-damaged",
            reason=one_line(error),
        ) from error
    kept = None if weights is None else hdf5.contents_of_bytes(weights, BESIDE, str(path))
    return {"config": config, "metadata": metadata, "weights": kept, "assets": assets}


# What Keras keeps in the same file for going on with the training: its values are not read.
BESIDE = r"_?(optimizer|metrics|compile_metrics)(_weights)?(/|$)"
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
)


def _listed(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members that are read, by name; others are left alone."""
    infos = archive.infolist()
    if len(infos) > limits.current().entries:
        raise ModelError(
            f"expected a .keras archive, found too many members ({limits.how_to_raise('entries')}).",
            code="input-too-large",
            limit="entries",
        )
    read = [info for info in infos if info.filename in (CONFIG, METADATA, WEIGHTS) or _ASSET.fullmatch(info.filename)]
    names = [info.filename for info in read]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ModelError(
            f"expected each part of the archive once, found {twice} twice. Download it again.",
            code="file-invalid",
            name=twice,
        )
    return {info.filename: info for info in read}


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> str:
    return (_bytes(archive, info, "text") or b"").decode()


def _bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, limit: str) -> bytes | None:
    """The content of a member, if its declared size is within a limit; zipfile unpacks no more than is declared."""
    if info is None:
        return None
    name, size, limit_of = info.filename, info.file_size, getattr(limits.current(), limit)
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ModelError(
            f"expected the part {name} stored or deflated, found it encrypted or packed otherwise.",
            code="file-invalid",
            name=name,
        )
    if size > limit_of:
        raise ModelError(
            f"the part {name} would unpack to {size:,} bytes ({limits.how_to_raise(limit)}).",
            code="input-too-large",
            limit=limit,
        )
    if size > limits.most_unpacked(info.compress_size):
        raise ModelError(
            f"the part {name} of {info.compress_size:,} bytes would unpack to {size:,} bytes.",
            code="file-invalid",
            name=name,
            found=size,
        )
    return archive.read(info)
