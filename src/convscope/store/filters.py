"""Filters in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from os import PathLike

from convscope import schema
from convscope.files import safe_name
from convscope.networks import Layer
from convscope.networks import preprocessing as pp
from convscope.render import filters as views
from convscope.render.plots import png
from convscope.results import STATUSES, FilterRow, Filters
from convscope.results.filters import JSON_NAMES
from convscope.schema import Json
from convscope.store.folder import Folder, as_folder
from convscope.store.parameters import FILTER_PARAMETERS, MADE, describe_made, read_made
from convscope.store.shelf import Shelf, check, check_shape

_FILTER_ROW = schema.record(
    FilterRow,
    JSON_NAMES,
    channel=schema.optional(schema.whole(0)),
    status=schema.one_of(*STATUSES),
    variant=schema.whole(0),
    tries=schema.whole(0),
    steps=schema.whole(0),
)


def write(
    result: Filters,
    directory: str | PathLike | Folder,
    *,
    labels: bool | None = None,
    sort: str | None = None,
    columns: int | None = None,
    gif: bool = False,
) -> list[str]:
    """Write the sheet, single images, the plot of activations, the animation, the raw arrays and the numbers.

    Args:
        directory: where to.
        labels, sort, columns: of the sheet.
        gif: write the animation as GIF too, for programs that show no WebP.
    """
    folder = as_folder(directory)
    report, since = result.to_json(), folder.begin(f"{result.kind}.json")
    report["sheet"] = folder.image("sheet.png", views.sheet(result, columns, labels, sort))
    for index, entry in enumerate(report["filters"]):
        stem = safe_name(result.name(index))
        entry["file"] = folder.image(f"{stem}.png", views.drawn(result, index))
        if result.alpha is not None and result.rows[index].status != "dead":
            entry["cutout"] = folder.image(f"{stem}.cutout.png", views.cutout(result, index))
    report["plot"] = folder.write("activations.png", png(partial(views.plot, result), 7, 4))
    if result.frames is not None and result.frames.shape[1]:
        kinds = ("webp", "gif") if gif else ("webp",)
        report["course"] = [folder.write(f"course.{kind}", views.animation_of(result, kind=kind)) for kind in kinds]
    for name, array in (("raw", result.values), ("alpha", result.alpha), ("frames", result.frames)):
        if array is not None:
            report[name] = folder.array("filters.npy" if name == "raw" else f"{name}.npy", array)
    report["layer"] = asdict(result.layer) if result.layer else None
    report["preprocessing"], report["crop"], report["look"] = asdict(result.preprocessing), result.crop, result.style
    return folder.json(f"{result.kind}.json", report | describe_made(result), since)


def read(report: Mapping[str, Json], shelf: Shelf) -> Filters:
    """The result that `write` wrote as `report`, with the files beside it."""
    shape = schema.sequence(schema.whole(1), 1, 8)
    known = schema.entries(
        {
            "filters": schema.sequence(_FILTER_ROW, 1),
            **MADE,
            "raw": schema.text,
            "layer": schema.optional(schema.record(Layer, shape=shape, parameters=schema.whole(0, 2**62))),
            "preprocessing": pp.RECORD,
            "crop": schema.whole(0),
        },
        {"look": schema.one_of(*views.STYLES), "alpha": schema.text, "frames": schema.text},
    )(report, "")
    found = Filters(
        *read_made(known, FILTER_PARAMETERS),
        layer=known["layer"],
        values=shelf.array(known["raw"], "raw"),
        rows=known["filters"],
        preprocessing=known["preprocessing"],
        crop=known["crop"],
        style=known.get("look", "classic"),
        alpha=shelf.array(known["alpha"], "alpha") if "alpha" in known else None,
        frames=shelf.array(known["frames"], "frames") if "frames" in known else None,
    )
    _check_shapes(found)
    return found


def _check_shapes(result: Filters) -> None:
    """Check that the loaded parts fit together."""
    values, affine = result.values, result.preprocessing
    expected = f"{len(result.rows)} images (n, h, w, c), of which a crop of {result.crop} leaves something"
    fits = values.ndim == 4 and len(values) == len(result.rows) and min(values.shape[1:3]) > 2 * result.crop
    check(fits and (values.shape[3] == 1 or values.shape[3] >= 3), "raw", expected, f"the shape {values.shape}")
    check(
        {len(affine.mean), len(affine.std)} <= {1, values.shape[3]},
        "preprocessing",
        f"a mean and a deviation, or one for each of {values.shape[3]} channels",
        f"{len(affine.mean)} and {len(affine.std)}",
    )
    if result.alpha is not None:
        check_shape(result.alpha, values.shape[:3], "alpha")
    if result.frames is not None:
        check(result.frames.ndim == 5, "frames", "an array (n, f, h, w, c)", f"the shape {result.frames.shape}")
        check_shape(result.frames, (len(values), result.frames.shape[1], *values.shape[1:]), "frames")
