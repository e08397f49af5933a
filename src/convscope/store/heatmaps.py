"""Heatmaps in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import numpy as np

from convscope import limits, schema
from convscope.files import safe_name
from convscope.render import heatmaps as views
from convscope.render.overlay import Paint
from convscope.results import Heatmap, HeatmapRow
from convscope.schema import Json
from convscope.store.folder import Folder, as_folder, save_images
from convscope.store.parameters import HEATMAP_PARAMETERS, PREDICTION, WITH_IMAGES, describe_made, read_made
from convscope.store.shelf import Shelf, check

_HEATMAP_ROW = schema.record(
    HeatmapRow,
    {"class_index": "class"},
    class_index=schema.optional(schema.whole(0)),
    status=schema.one_of("ok", "blank"),
    predictions=schema.sequence(PREDICTION),
)


def write(result: Heatmap, directory: str | PathLike | Folder, *, paint: Paint | float = 0.7) -> list[str]:
    """Write the panels, the raw maps as `.npy`, the images and the numbers.

    Where an image has several maps, a panel compares them: of methods each on its own scale, of classes on one.
    """
    folder = as_folder(directory)
    report, since = result.to_json(), folder.begin(f"{result.kind}.json")
    for image in dict.fromkeys(row.image for row in result.rows):
        rows = [row for row in result.rows if row.image == image]
        methods = len({row.method for row in rows}) > 1
        if len(rows) > 1 and (methods or len({row.explained for row in rows}) > 1):
            name = f"{safe_name(image)}.{'methods' if methods else 'classes'}.png"
            folder.image(name, views.comparison(result, image, paint, shared=not methods))
    for index, (entry, stem) in enumerate(zip(report["heatmaps"], views.stems(result), strict=True)):
        entry["file"] = folder.image(f"{stem}.png", views.panel(result, index, paint))
        entry["raw"] = folder.array(f"{stem}.npy", np.asarray(result.maps[index], np.float32))
    report["photos"] = save_images(folder, result.images)
    return folder.json(f"{result.kind}.json", report | describe_made(result), since)


def read(report: Mapping[str, Json], shelf: Shelf) -> Heatmap:
    """The result that `write` wrote as `report`, with the files beside it."""
    named = schema.sequence(schema.entries({"raw": schema.text}), 1)(report.get("heatmaps"), "heatmaps")
    known = schema.entries({"heatmaps": schema.sequence(_HEATMAP_ROW), **WITH_IMAGES})(report, "")
    rows, images = known["heatmaps"], known["photos"]
    check(
        [row.image for row in rows] == [image["name"] for image in images],
        "photos",
        f"the image of each of {len(rows)} maps",
        f"{len(images)} others",
    )
    maps = [shelf.array(row["raw"], f"heatmaps[{index}].raw") for index, row in enumerate(named)]
    most = limits.current().pixels
    for index, one in enumerate(maps):
        fits = one.ndim == 2 and 0 < one.size <= most
        check(fits, f"heatmaps[{index}].raw", "a map (h, w)", f"the shape {one.shape}")
    return Heatmap(
        *read_made(known, HEATMAP_PARAMETERS),
        images=shelf.images(images),
        maps=np.stack(maps) if len({one.shape for one in maps}) == 1 else tuple(maps),
        rows=rows,
    )
