"""Small results of each kind, made without a network, and what a stranger may do to the folders they are saved in."""

import copy
import hashlib
import json
import math
import os
import random

import numpy as np

from convscope.images.image import InputImage
from convscope.networks import Layer, Prediction
from convscope.networks.preprocessing import Preprocessing
from convscope.results import (
    ActivationParameters,
    Activations,
    Check,
    Concept,
    ConceptParameters,
    Concepts,
    FilterParameters,
    FilterRow,
    Filters,
    Heatmap,
    HeatmapParameters,
    HeatmapRow,
    LayerStatistics,
    Origin,
    RecipeParameters,
)


def photo(name, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)
    return InputImage(name, pixels, f"folder/{name}.jpg", ("turned",), "0" * 64)


def origin(photos):
    images = [{"name": one.name, "pixels_sha256": hashlib.sha256(one.pixels.tobytes()).hexdigest()} for one in photos]
    network = {"name": "net", "input": {"height": 9, "width": 8}}
    return Origin("net", (9, 8), {"technique": "t", "network": network, "pictures": images}, {"paper": "none"})


def activations():
    photos = (photo("cat"), photo("dog", 1))
    layers = (Layer("a/conv", "conv", "Conv2D", (4, 3, 2), 10, "a/conv"), Layer("dense", "dense", "Dense", (5,), 3))
    rng = np.random.default_rng(0)
    arrays = {layer.path: rng.random((2, *layer.shape)).astype(np.float32) for layer in layers}
    rows = tuple(
        LayerStatistics(one.name, la.path, la.kind, la.shape, 0.1, 0.9, 0.5, 1, "a/conv")
        for one in photos
        for la in layers
    )
    return Activations(origin(photos), ActivationParameters(("a/conv", "dense"), "2GB"), photos, layers, arrays, rows)


def filters():
    rng = np.random.default_rng(0)
    rows = (
        FilterRow(3, 2.0, (0.5, 1.5), "alive", "reaches 2", 0.7, transformed=1.0, natural=2.5, natural_image="cat"),
        FilterRow(4, math.nan, (0.5,), "weak", "overflowed", 0.7),
    )
    return Filters(
        origin(()),
        FilterParameters(
            "conv", recipe=RecipeParameters("fast", 2, {"name": "fast", "steps": 2}), seed=0, frame_steps=(0, 2)
        ),
        Layer("conv", "conv", "Conv2D", (4, 4, 8), 10),
        rng.random((2, 12, 12, 3)).astype(np.float32),
        rows,
        Preprocessing("0..1", (0.0,), (255.0,)),
        1,
        "plain",
        rng.random((2, 12, 12)).astype(np.float32),
        rng.random((2, 2, 12, 12, 3)).astype(np.float32),
    )


def heatmap():
    photos = (photo("cat"), photo("dog", 1))
    check = Check(0.1, 0.2, 0.3, 1.0, 0.4, 0.5, None, "pass", "good")
    best = (Prediction(1, "tabby", 2.0, 0.8), Prediction(0, "boxer", 1.0, 0.1))
    rows = tuple(
        HeatmapRow(one.name, 1, "tabby", 2.0, 0.8, "conv", "grad-cam", "ok", "", best, None, "", check)
        for one in photos
    )
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    parameters = HeatmapParameters("conv", "best", "the best of 2", "grad-cam", {"cam": "no pooling"})
    return Heatmap(origin(photos), parameters, photos, maps, rows)


def concepts():
    photos = (photo("cat"),)
    rng = np.random.default_rng(0)
    rows = (Concept(0, 0.5, (Prediction(1, "tabby", 2.0, 0.8),)), Concept(1, 0.2, ()))
    values, vectors = rng.random((1, 3, 3, 2)).astype(np.float32), rng.random((2, 6)).astype(np.float32)
    return Concepts(origin(photos), ConceptParameters("conv", 2), photos, values, vectors, rows)


MAKERS = {"activations": activations, "filters": filters, "heatmaps": heatmap, "concepts": concepts}


# -- what a stranger may do ------------------------------------------------------------------------------

HOSTILE = (
    None, True, False, -1, 0, 1, 2**31, -(2**63), 2**64, 10**400, 1e308, -1.5, "", "x", "1", "../x.png", "/etc/passwd",
    "..", ".", "C:\\x.npy", "photos/../x.png", "photos//x.png", "a\0b.npy", "con.npy", "\ud800", "\u202e", "\n",
    "y" * 20000, [], {}, [[]], [None], ["x"], {"x": 1}, [1, 2, 3],
)  # fmt: skip
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 200 + "]" * 200, "[" * 100_000 + "]" * 100_000)


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def changed(report, rng):
    """The text of a report with one or several changes, chosen by `rng`."""
    report, marks = copy.deepcopy(report), {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(report))[1:])
        holder, key = at(report, path[:-1]), path[-1]
        match rng.choice(("delete", "value", "value", "value", "swap", "nest", "raw", "repeat")):
            case "delete":
                del holder[key]
            case "value":
                holder[key] = rng.choice(HOSTILE)
            case "swap":
                holder[key] = copy.deepcopy(at(report, rng.choice(list(places(report))[1:])))
            case "nest":
                holder[key] = rng.choice(([holder[key]], {"x": holder[key]}))
            case "raw":
                mark = f"@{len(marks)}@"
                holder[key] = mark
                marks[mark] = rng.choice(RAW)
            case "repeat" if isinstance(holder, list):
                holder.extend(copy.deepcopy(holder[key]) for _ in range(rng.choice((1, 50))))
    text = json.dumps(report)
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def damaged(data, rng):
    """The bytes of a file with one change, chosen by `rng`."""
    place = rng.randrange(max(1, min(len(data), rng.choice((16, 128, len(data) or 1)))))
    match rng.choice(("byte", "cut", "insert", "empty", "header")):
        case "byte":
            return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        case "cut":
            return data[:place]
        case "insert":
            return data[:place] + rng.randbytes(rng.choice((1, 100))) + data[place:]
        case "empty":
            return b""
    return rng.choice(HEADERS)() + data[128:]


def header(descr="'<f4'", shape="(3, 4)", fortran="False", more=""):
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, {more}}}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1")


HEADERS = (
    lambda: header(shape="(1000000, 1000000)"),
    lambda: header(shape=f"({10**18},)"),
    lambda: header(shape=f"({10**30},)"),
    lambda: header(shape="(0, 1000000000000000000, 1000000000000000000)"),
    lambda: header(shape="(-3, -4)"),
    lambda: header(shape="(3, 4)", descr="'|O'"),
    lambda: header(descr="'<f8'"),
    lambda: header(descr="'<c8'"),
    lambda: header(descr="'|S4'"),
    lambda: header(descr="'<M8[s]'"),
    lambda: header(descr="[('a', '<f4')]"),
    lambda: header(shape="(" * 2000 + ")" * 2000),
    lambda: header(shape="(3, 4) if True else 0"),
    lambda: header(shape="(True, 4)"),
    lambda: header(shape="()"),
    lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    lambda: b"PK\x03\x04",
)


def stranger(folder, file, rng, outside):
    """Do something to a saved folder that its owner would not do."""
    json_file = folder / file
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".png"))
    if rng.random() < 0.7 or not others:
        report = json.loads(json_file.read_text())
        json_file.write_text(changed(report, rng), errors="surrogatepass")
        return
    chosen = rng.choice(others)
    match rng.choice(("bytes", "bytes", "bytes", "link", "folder", "fifo", "gone", "other")):
        case "bytes":
            chosen.write_bytes(damaged(chosen.read_bytes(), rng))
        case "link":
            chosen.unlink()
            chosen.symlink_to(rng.choice((outside, "/dev/zero", "/dev/stdin", "nowhere")))
        case "folder":
            chosen.unlink()
            chosen.mkdir()
        case "fifo":
            chosen.unlink()
            os.mkfifo(chosen)
        case "gone":
            chosen.unlink()
        case "other":
            chosen.write_bytes(rng.choice(others).read_bytes())


def seeded(*parts):
    return random.Random("/".join(map(str, parts)))
