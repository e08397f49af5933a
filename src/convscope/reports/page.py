"""The page of a report: a study becomes HTML that needs no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from os import PathLike, fspath

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from convscope.arrays import scale_pixels
from convscope.files import dump, write_file
from convscope.networks import Layer, Network, Prediction
from convscope.render import filters as filter_views
from convscope.render.channels import channel_grid
from convscope.render.colour import colour
from convscope.render.encode import data_uri, encode_png, small_data_uri
from convscope.render.overlay import tint
from convscope.reports.studies import Study, has_map
from convscope.results import (
    Activations,
    Filters,
    HeatmapRow,
    LayerStatistics,
    versions,
)
from convscope.schema import Json

LARGEST_PHOTO, SMALLEST_PHOTO = 720, 240
OPACITY = 70  # per cent at first, as Heatmap.overlay has it
SLABS_NAMED = 14  # a network of more layers is drawn in stages


def write(study: Study, path: str | PathLike, title: str | None = None, about: Iterable[str] = ()) -> dict[str, Json]:
    """Draw the page of a study and write it, whole or not at all.

    Args:
        study: the study to show.
        path: of the page.
        title: its heading; the model's name where None.
        about: paragraphs of plain text below the heading.

    Returns:
        the numbers that the page shows, `provenance`, and `files`: the page.

    Raises:
        ConvscopeError: the page can't be written.
    """
    title = title or f"Inside {_called(study.network)}"
    data = {"title": title, **study.to_json(), "files": [fspath(path)]}
    write_file(path, _render(study, title, list(about), json.loads(dump(data))))
    return data


def _render(study: Study, title: str, about: list[str], data: dict[str, object]) -> str:
    # Names of layers, classes and images come from files of others: everything is escaped.
    pages = Environment(
        loader=PackageLoader("convscope", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(number=_number, percent=_percent, size=_size, breakable=_breakable)
    script = _text(pages, "report.js")
    return pages.get_template("report.html").render(
        title=title,
        about=about,
        style=Markup(_text(pages, "report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        network=study.network,
        facts=_facts(study.network),
        stages=_stages(study.network),
        kinds={layer.kind for layer in study.network.layers},
        score=_score_word(study.network),
        photos=[_photo(study, index) for index in range(len(study.images))],
        filters=[_filter_section(result, *stuck) for result, stuck in zip(study.filters, study.stuck, strict=True)],
        missing=study.missing,
        scale=data_uri(encode_png(_colour_scale()), "image/png"),
        opacity=OPACITY,
        data=data,
        versions=versions(),
        seed=study.choices.seed,
        provenance=dump(data["provenance"]),
    )


def _text(pages: Environment, name: str) -> str:
    assert pages.loader is not None
    return pages.loader.get_source(pages, name)[0]


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _percent(share: float) -> str:
    """0.834 as "83.4 %"; never 0 or 100 where it is not."""
    if 0 < share < 0.001:
        return "< 0.1\N{NO-BREAK SPACE}%"
    if 0.999 < share < 1:
        return "> 99.9\N{NO-BREAK SPACE}%"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _breakable(name: str) -> Markup:
    """A name that a narrow screen may break behind its "_", "." and "/"."""
    return Markup("<wbr>").join(re.split(r"(?<=[_./])(?=[^_./])", name))


def _score_word(network: Network) -> str:
    """The description of the number that a heatmap explains."""
    return f"difference of the {network.head.score}s" if network.head.paired else network.head.score


def _called(network: Network) -> str:
    return network.source.name if network.source.file else network.name


_NUMBERS = "; the classes have numbers, no names"


def _facts(network: Network) -> list[tuple[str, str]]:
    """The description of the network, as terms and texts."""
    height, width = network.inputs.size
    colours = {1: "grey", 3: "RGB"}.get(network.inputs.channels, f"{network.inputs.channels} channels")
    inside = [layer for layer in network.layers if not layer.container]
    blocks = len(network.layers) - len(inside)
    within = f" in {blocks} block{'s' if blocks > 1 else ''}" if blocks else ""
    return [
        ("Model", f"{network.source.name}, called {network.name}" if network.source.file else network.source.name),
        ("Runs on", f"{network.framework}, {network.backend}"),
        ("Input", f"{height}×{width} pixels, {colours}{'; any size is possible' if network.inputs.free else ''}"),
        ("Size", f"{len(inside)} layers{within}, {network.parameters:,} parameters"),
        ("Output", network.head.text + ("" if network.class_names or network.head.linear else _NUMBERS)),
        ("Preprocessing", network.preprocessing.text),
        *((("Note", network.contradiction),) if network.contradiction else ()),
        *(("Opened", note) for note in network.source.notes),
    ]


# -- the network at a glance -------------------------------------------------------------------------------


def _stages(network: Network) -> list[dict[str, object]]:
    """The layers that make something, one by one, or in runs of one map size where they are many."""
    made = [layer for layer in network.layers if layer.makes_features]
    one_by_one = len(made) <= SLABS_NAMED
    height, width = network.inputs.size
    largest = max(height, width, *(max(layer.shape[:-1], default=1) for layer in made))
    runs = [[layer] for layer in made] if one_by_one else [list(run) for _, run in groupby(made, _extent)]
    image = {"name": "input", "size": f"{height}×{width}×{network.inputs.channels}", "note": "", "path": "input"}
    slab = {"kind": "input", **_slab((height, width, network.inputs.channels), largest, True)}
    return [{**image, "slabs": [slab]}, *(_stage_of(run, largest, one_by_one) for run in runs)]


def _extent(layer: Layer) -> tuple[int, ...]:
    """The size of the map; none for a layer without one."""
    return layer.shape[:-1] if has_map(layer) else ()


def _stage_of(run: Sequence[Layer], largest: int, one_by_one: bool) -> dict[str, object]:
    slabs = [{"kind": layer.kind, **_slab(layer.shape, largest, one_by_one)} for layer in run]
    first = run[0]
    if one_by_one:
        note = {"global_pool": "global pool"}.get(first.kind, first.kind)
        name = first.path.rpartition("/")[2]
        return {"name": name, "size": _size(first.shape), "note": note, "path": first.path, "slabs": slabs}
    channels = list(dict.fromkeys((run[0].channels, run[-1].channels)))
    words = {"conv": "convolution", "pool": "pooling", "global_pool": "global pooling", "dense": "dense layer"}
    counted = [(sum(layer.kind == kind for layer in run), word) for kind, word in words.items()]
    note = ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counted if count)
    where = " … ".join(dict.fromkeys((run[0].path, run[-1].path)))
    size = f"{' → '.join(map(str, channels))} channel{'s' if channels != [1] else ''}"
    return {"name": _size(_extent(first)) or "no map", "size": size, "note": note, "path": where, "slabs": slabs}


def _slab(shape: Sequence[int], largest: int, one_by_one: bool) -> dict[str, int]:
    """Height and width in pixels of the block that stands for a layer: its map's side, and its channels."""
    side = max(shape[:-1], default=1)
    height = 12 + round(84 * math.sqrt(side / largest)) if side > 1 else 12 + round(4 * math.log2(shape[-1] + 1))
    return {"height": height, "width": 5 + round(3 * math.log2(shape[-1] + 1)) if one_by_one else 4}


# -- an image -----------------------------------------------------------------------------------------------


def _photo(study: Study, index: int) -> dict[str, object]:
    """The content of the page on one image."""
    image = study.images[index]
    shown = fitted_to_page(image.pixels)
    height, width = shown.shape[:2]
    return {
        "name": image.name,
        "id": f"photo-{index + 1}",
        "uri": small_data_uri(shown),
        "thumbnail": small_data_uri(_thumbnail(shown)),
        "width": width,
        "height": height,
        "size": f"{image.pixels.shape[1]}×{image.pixels.shape[0]}",
        "notes": (*image.notes, *(one.text for one in study.resemblances[index : index + 1])),
        "predictions": _bars(study.predictions[index]),
        "maps": [
            {
                **_heat(row, raw, height, width),
                "methods": [_heat(*one, height, width) for one in study.by_method(index, place).values()],
            }
            for place, (_, row, raw) in enumerate(study.maps(index))
        ],
        "layer_rule": study.heatmaps[0].parameters.layer_rule if study.heatmaps else "",
        "sheets": [_sheet(study.activations, path, index) for path in study.sheets],
        "depth": _depth([row for row in study.activations.statistics if row.image == image.name]),
        "of": len(study.activations.layers),
    }


def fitted_to_page(image: np.ndarray) -> np.ndarray:
    """The image as the page shows it: made smaller, or enlarged by a whole number where it is tiny."""
    longest = max(image.shape[:2])
    if longest < SMALLEST_PHOTO:
        times = -(-SMALLEST_PHOTO // longest)
        return image.repeat(times, axis=0).repeat(times, axis=1)
    return scale_pixels(image, min(1.0, LARGEST_PHOTO / longest))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """The square in the middle, small."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return scale_pixels(image[top : top + side, left : left + side], 56 / side)


def _bars(predictions: Sequence[Prediction]) -> list[dict[str, object]]:
    """Name, text and length of a bar: the probability, or the value beside the largest where there is none."""
    largest = max((abs(row.logit) for row in predictions), default=0) or 1
    return [
        {
            "name": row.name,
            "text": _number(row.logit) if row.probability is None else _percent(row.probability),
            "length": 100 * (abs(row.logit) / largest if row.probability is None else row.probability),
            "negative": row.probability is None and row.logit < 0,
        }
        for row in predictions
    ]


def _heat(row: HeatmapRow, raw: np.ndarray, height: int, width: int) -> dict[str, object]:
    blank = row.status != "ok"
    return {
        "row": row,
        "text": _number(row.score) if row.probability is None else _percent(row.probability),
        "uri": None if blank else small_data_uri(tint(raw, height, width), 90),
        "cells": _size(raw.shape),
        "highest": float(raw.max()),
        "lowest": float(raw.min()),
    }


def _sheet(seen: Activations, path: str, index: int) -> dict[str, object]:
    row = seen.row(path, index)
    values = np.asarray(seen.arrays[path][index])
    sheet: dict[str, Json] = {"row": row, "uri": None}
    if values.ndim not in (1, 3) or not values.size:
        return sheet  # for example a sequence; the page has its shape
    count = values.shape[-1]
    side, columns, narrowest = _tiling(count)
    drawn = channel_grid(values, side, columns)
    return {
        **sheet,
        "uri": small_data_uri(drawn),
        "width": drawn.shape[1],
        "height": drawn.shape[0],
        "least": min(drawn.shape[1], min(columns, count) * narrowest),
        "columns": min(columns, count),
        "rows": list(range(0, count, columns)),
        "count": count,
    }


def _tiling(channels: int) -> tuple[int, int, int]:
    """Side of a tile in pixels, tiles in a row, and the side below which a screen scrolls instead of shrinking."""
    if channels <= 4:
        return 200, 4, 80
    if channels <= 16:
        return 120, 8, 40
    return (70, 16, 40) if channels <= 256 else (40, 32, 26)


def _depth(rows: Sequence[LayerStatistics]) -> dict[str, object] | None:
    """The plot of inactive channels, as positions in a drawing: 0 % is at 172, 100 % at 12, the axis at 76."""
    counted = [row for row in rows if row.zeros is not None]
    if len(counted) < 2:
        return None
    step = min(64.0, max(12.0, 760 / len(counted)))
    every = math.ceil(22 / step)
    marks = [
        {
            "x": round(76 + step * (place + 0.5), 1),
            "zeros": round(172 - 160 * (row.zeros or 0), 1),
            "empty": round(160 * (row.empty_channels or 0) / row.shape[-1], 1),
            "name": _ending(row.layer) if place % every == 0 else "",
            "text": f"{row.layer}: {_percent(row.zeros or 0)} zeros, {row.empty_channels} empty channels",
        }
        for place, row in enumerate(counted)
    ]
    line = " ".join(f"{mark['x']},{mark['zeros']}" for mark in marks)
    return {
        "marks": marks,
        "line": line,
        "width": round(88 + step * len(counted)),
        "bar": round(step * 0.5, 1),
        "rows": rows,
    }


def _ending(path: str) -> str:
    name = path.rpartition("/")[2]
    return name if len(name) <= 14 else "…" + name[-13:]


def _colour_scale() -> np.ndarray:
    return colour(np.arange(256, dtype=np.uint8)[None], "inferno")


# -- filters -----------------------------------------------------------------------------------------------


def _filter_section(result: Filters, looked_at: int, stuck: int) -> dict[str, object]:
    """The content of the page on one layer's filters."""
    tiles = []
    for index in result.order():
        row = result.rows[index]
        image = None if row.status == "dead" else filter_views.drawn(result, index)
        tiles.append({"row": row, "uri": None if image is None else small_data_uri(image)})
    counts = [(sum(row.status == status for row in result.rows), status) for status in ("alive", "weak", "dead")]
    return {
        "layer": result.layer,
        "looked_at": looked_at,
        "stuck": stuck,
        "tiles": tiles,
        "counts": ", ".join(f"{count} {status}" for count, status in counts if count),
        "parameters": result.parameters,
        "tiny": min(result.values.shape[1:3]) < 100,
    }
