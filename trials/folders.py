"""Saved results whose JSON, arrays and names were changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from trials import mutations
from trials.outcomes import Case, Place

_BOUND = 400 * 2**20


def generate(place: Place, result: str) -> Case:
    """A saved folder, changed."""
    rng, folder = place.rng, place.folder / "saved"
    shutil.copytree(place.bases / f"result-{result}", folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    texts = [path for path in files if path.suffix == ".json"]
    arrays = [path for path in files if path.suffix in (".npy", ".npz")]
    chance = rng.random()
    if chance < 0.03:
        what = "whole"
    elif chance < 0.4:
        what = _json(rng.choice(texts), place, mutations.mutated)
    elif chance < 0.55:
        what = _json(rng.choice(texts), place, _names)
    elif chance < 0.75 and arrays:
        what = _array(rng.choice(arrays), place)
    else:
        what = _file(rng.choice(files), files, place)
    return Case("load", folder, f"{result}, {what}", _BOUND)


def _json(path: Path, place: Place, change: Any) -> str:
    if place.rng.random() < 0.2:
        path.write_bytes(mutations.damaged(path.read_bytes(), place.rng))
        return f"damaged bytes of {path.name}"
    path.write_bytes(mutations.dumped(change(json.loads(path.read_text(encoding="utf-8")), place)))
    return f"{path.name} changed"


def _names(tree: Any, place: Place) -> Any:
    """Names of files that lie elsewhere."""
    holders = [
        (holder, key)
        for holder in mutations.holders_in(tree)
        for key in (holder if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], str)
    ]
    files = [(holder, key) for holder, key in holders if "." in holder[key] and len(holder[key]) < 80]
    for holder, key in place.rng.sample(files or holders, min(len(files or holders), 2)):
        name = holder[key].rpartition("/")[2]
        holder[key] = place.rng.choice(
            (
                f"../outside/{name}",
                str(place.outside / "secret.txt"),
                "../outside/pipe",
                str(place.outside / "weights.bin"),
                ".",
                "..",
                "",
                f"photos/../../outside/{name}",
                "/dev/zero",
                "a\0b",
                f"./{name}",
                "\x1b[31m.png",
                "x" * 300,
            )
        )
    return tree


def _array(path: Path, place: Place) -> str:
    """An array of another shape, type or size, with a header that lies, or that is a pickle."""
    rng, what = place.rng, place.rng.choice(("bytes", "shape", "type", "header", "pickle", "large", "nan"))
    if path.suffix == ".npz":
        if rng.random() < 0.5:
            data, said = mutations.damaged_zip(mutations.members(path), place)
            path.write_bytes(data)
            return f"{path.name}: {said}"
        contents = mutations.members(path)
        key = rng.choice(list(contents))
        contents[key] = npy(contents[key], what, place)
        path.write_bytes(mutations.rezipped(contents, place))
    else:
        path.write_bytes(npy(path.read_bytes(), what, place))
    return f"{path.name}: {what}"


def npy(data: bytes, what: str, place: Place) -> bytes:
    """A `.npy` file with a random change."""
    import io

    rng, out = place.rng, io.BytesIO()
    if what == "bytes":
        return mutations.damaged(data, rng)
    if what == "pickle":
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        return (
            b"\x93NUMPY\x01\x00"
            + len(header).to_bytes(2, "little")
            + header
            + b"\x80\x02"
            + mutations.code_pickle(place)
            + b"."
        )
    if what in ("header", "large"):
        shape = (
            rng.choice(((2**40,), (10**6, 10**6), (-1,), (2**31, 2**31, 2**31), ()))
            if what == "large"
            else rng.choice(((True,), "x", (1.5,), (1, "a"), [2]))
        )
        kind = rng.choice(("'<f4'", "'|O'", "[('a', '<f4')]", "'<U1000000000'", "'<M8[ns]'", "__import__('os')"))
        kind = kind if what == "header" else "'<f4'"
        header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data[128:]
    values = np.load(io.BytesIO(data), allow_pickle=False)
    new = {
        "shape": lambda: rng.choice((values.ravel(), values[None], values[..., :0], np.zeros(()))),
        "type": lambda: values.astype(rng.choice(("f8", "i1", "c8", "S3", "U3", "?"))),
        "nan": lambda: np.full(values.shape, rng.choice((np.nan, np.inf, 1e38))),
    }[what]()
    np.save(out, new)
    return out.getvalue()


def _file(path: Path, files: list[Path], place: Place) -> str:
    """A file that is missing, empty, damaged, a link, a pipe, or another's."""
    rng, what = (
        place.rng,
        place.rng.choice(("missing", "empty", "damaged", "link", "pipe", "folder", "swapped", "ring", "device")),
    )
    data = path.read_bytes()
    path.unlink()
    if what == "empty":
        path.touch()
    elif what == "damaged":
        path.write_bytes(mutations.damaged(data, rng))
    elif what == "swapped":
        others = [other for other in files if other != path]
        path.write_bytes(rng.choice(others).read_bytes())
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what != "missing":
        path.symlink_to({"link": place.outside / "secret.txt", "ring": path.name, "device": "/dev/zero"}[what])
    return f"{path.name}: {what}"
