"""Zip archives of models, read with limits: the declared size of a member is checked before it is unpacked."""

from __future__ import annotations

import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from convscope import limits
from convscope.errors import ModelError
from convscope.networks.formats.damage import check_unpacked, damaged

# What zipfile raises for archives that are damaged, encrypted, or packed in a way that it does not know.
DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, OSError),
    *(zlib.error, lzma.LZMAError, struct.error, ValueError, OverflowError, UnicodeError),
)
_SMALLEST_ENTRY, _USUAL_ENTRY = 46, 256  # bytes of the directory
_MOST_PACKED = 1100  # deflate makes 1032 bytes of one at most


@dataclass(frozen=True)
class Archive:
    """An archive that is open.

    Attributes:
        path: of the file.
        root: the folder that all members lie in, with its slash; "" where they lie in none.
        members: the directory's entry of each, by its name below the root.
    """

    path: Path
    root: str
    members: Mapping[str, zipfile.ZipInfo]
    _zip: zipfile.ZipFile

    def read(self, name: str) -> bytearray:
        """The bytes of a member: as many as it declares, with their checksum.

        Raises:
            ModelError: it is missing or damaged.
        """
        if name not in self.members:
            raise ModelError(
                f"{self.path} lacks its member {name!r}. Copy or download it again.",
                code="file-damaged",
                path=str(self.path),
                name=name,
            )
        entry = self.members[name]
        held = bytearray(entry.file_size)
        try:
            with self._zip.open(entry) as member:
                done = _fill(member, memoryview(held))
                if done != len(held) or member.read(1):
                    raise zipfile.BadZipFile(f"{name!r} has another length than it declares")
        except DAMAGE as error:
            raise damaged(self.path, error, " whole") from error
        return held

    def text(self, name: str) -> bytes:
        """The bytes of a member that is text, a pickle or a configuration.

        Raises:
            ModelError: it is larger than the limit for one text, missing or damaged.
        """
        entry = self.members.get(name)
        if entry is not None and entry.file_size > limits.current().text:
            raise ModelError(
                f"{self.path} holds the text {name!r} of {entry.file_size} bytes ({limits.how_to_raise('text')}).",
                code="input-too-large",
                limit="text",
            )
        return bytes(self.read(name))


def _fill(member: IO[bytes], into: memoryview) -> int:
    done = 0
    while done < len(into):
        more = member.readinto(into[done : done + 2**24])  # type: ignore[attr-defined]
        if not more:
            break
        done += more
    return done


def member_names(path: Path) -> list[str]:
    """The names of an archive's members, in the order of its directory.

    Raises:
        ModelError: it is damaged, or has more members than the limit.
    """
    with _directory(path) as archive:
        return archive.namelist()


@contextmanager
def opened(path: Path, inner: bytes | bytearray | None = None) -> Iterator[Archive]:
    """An archive whose members lie in one folder or in none, each name once, within the limits.

    Args:
        path: the file.
        inner: the bytes of an archive that is a member of it, to open that.

    Raises:
        ModelError: it is damaged, declares more than the limits, or is no such archive.
    """
    with _directory(path, inner) as archive:
        size = path.stat().st_size if inner is None else len(inner)
        entries = archive.infolist()
        root = _root([entry.filename for entry in entries])
        members: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.removeprefix(root)
            if name in members:
                raise ModelError(
                    f"the archive {path} holds two members named {name!r}; PyTorch writes one of each.",
                    code="file-invalid",
                    path=str(path),
                    name=name,
                )
            _check_entry(path, entry, size)
            members[name] = entry
        check_unpacked(str(path), sum(entry.file_size for entry in entries), size)
        yield Archive(path, root, members, archive)


@contextmanager
def _directory(path: Path, inner: bytes | bytearray | None = None) -> Iterator[zipfile.ZipFile]:
    with path.open("rb") if inner is None else io.BytesIO(inner) as file:
        try:
            _check_directory(path, file)
            archive = zipfile.ZipFile(file)
        except DAMAGE as error:
            raise damaged(path, error, " whole") from error
        with archive:
            _check_count(path, len(archive.infolist()))
            yield archive


def _check_directory(path: Path, file: IO[bytes]) -> None:
    """zipfile reads the whole directory into memory: its size is checked first."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 2**16 - 22 - 76)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("its end is missing; it may have been cut off while copying")
    directory = struct.unpack_from("<L", tail, end + 12)[0]
    if tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):  # what tells of a large one stands right before
        large = end - 20 - 56
        if large < 0 or tail[large : large + 4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("its directory is described in a way that no program writes")
        directory = struct.unpack_from("<Q", tail, large + 40)[0]
    if min(directory, size) > limits.current().entries * _USUAL_ENTRY:
        _check_count(path, directory // _SMALLEST_ENTRY)
    file.seek(0)


def _check_count(path: Path, count: int) -> None:
    if count > limits.current().entries:
        raise ModelError(
            f"the archive {path} has {count} members ({limits.how_to_raise('entries')}).",
            code="input-too-large",
            limit="entries",
        )


def _check_entry(path: Path, entry: zipfile.ZipInfo, size: int) -> None:
    """Refuse sizes that can't be true, before memory is taken for them."""
    packed, stored = entry.compress_size, entry.compress_type == zipfile.ZIP_STORED
    most = packed if stored else packed * _MOST_PACKED
    if packed > size or entry.file_size > most or (stored and entry.file_size != packed):
        raise ModelError(
            f"the archive {path} says that {packed} bytes hold its member {entry.filename!r} of {entry.file_size} "
            "bytes, which can't be. Copy or download it again.",
            code="file-damaged",
            path=str(path),
            name=entry.filename,
        )


def _root(names: list[str]) -> str:
    """The folder that all lie in."""
    folders = {name.partition("/")[0] + "/" if "/" in name else "" for name in names}
    return folders.pop() if len(folders) == 1 else ""


def packed(members: Iterable[tuple[str, bytes | bytearray]]) -> io.BytesIO:
    """A new archive in memory: another library then reads the checked content, and nothing else."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    made.seek(0)
    return made
