"""Activations in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from os import PathLike

from convscope import schema
from convscope.errors import ConvscopeError, option
from convscope.events import Advanced, Progress, tell
from convscope.files import safe_name
from convscope.networks import Layer
from convscope.render import activations as views
from convscope.render.plots import png
from convscope.results import Activations, LayerStatistics
from convscope.schema import Json
from convscope.store.folder import Folder, as_folder, save_images
from convscope.store.parameters import ACTIVATION_PARAMETERS, WITH_IMAGES, describe_made, read_made
from convscope.store.shelf import Shelf, check, check_shape


def write(
    result: Activations,
    directory: str | PathLike | Folder,
    *,
    shared: bool = False,
    channel: int | None = None,
    raw: bool = True,
    progress: Progress = None,
) -> list[str]:
    """Write the sheets (or one channel of each layer), the plots over depth, the numbers and the raw arrays.

    Args:
        directory: where to.
        shared: draw each sheet on one scale.
        channel: draw this channel instead of the sheets.
        raw: write `arrays/LAYER.npy` and the images too, which `load` needs.
        progress: called with an event after each image.
    """
    folder = as_folder(directory)
    report, since = result.to_json(), folder.begin(f"{result.kind}.json")
    drawn = 0
    for index, image in enumerate(result.images):
        stem = safe_name(image.name)
        for layer in result.layers:
            entry = report["activations"][drawn]
            entry["file"] = _drawn(result, folder, layer, index, shared, channel)
            drawn += 1
            tell(progress, Advanced(drawn, len(report["activations"]), f"drawing {layer.path}"))
        folder.write(f"{stem}/depth.png", png(partial(views.plot, result, image=index), 7.5, 3.6))
    if raw:
        report["arrays"] = {
            la.path: folder.array(f"arrays/{safe_name(la.path)}.npy", result.arrays[la.path]) for la in result.layers
        }
        report["layers"] = [asdict(layer) for layer in result.layers]
        report["photos"] = save_images(folder, result.images)
    return folder.json(f"{result.kind}.json", report | describe_made(result), since)


def _drawn(
    result: Activations, folder: Folder, layer: Layer, index: int, shared: bool, channel: int | None
) -> str | None:
    name = f"{safe_name(result.images[index].name)}/{safe_name(layer.path)}"
    if not views.drawable(layer):
        return None  # its numbers are there
    if channel is None:
        return folder.image(f"{name}.png", views.sheet(result, layer.path, index, shared))
    if not layer.spatial or channel >= layer.channels:
        return None  # reported by the command
    return folder.image(f"{name}.channel-{channel}.png", views.channel_map(result, layer.path, channel, index))


def read(report: Mapping[str, Json], shelf: Shelf) -> Activations:
    """The result that `write` wrote as `report`, with the files beside it, and its arrays memory-mapped."""
    if "arrays" not in report:
        raise ConvscopeError(
            f"{str(shelf.root)!r} contains images and numbers but no raw arrays; save with {option('raw')}.",
            code="no-raw-arrays",
            path=str(shelf.root),
        )
    shape = schema.sequence(schema.whole(0), 1, 8)
    known = schema.entries({
        "activations": schema.sequence(
            schema.record(LayerStatistics, shape=shape, empty_channels=schema.optional(schema.whole(0)))
        ),
        "arrays": schema.mapping(schema.text),
        "layers": schema.sequence(schema.record(Layer, shape=shape, parameters=schema.whole(0, 2**62)), 1),
        **WITH_IMAGES,
    })(report, "")  # fmt: skip
    layers, images, rows = known["layers"], known["photos"], known["activations"]
    wanted = [(image["name"], layer.path) for image in images for layer in layers]
    check(
        [(row.image, row.layer) for row in rows] == wanted,
        "activations",
        f"a row for each of {len(images)} images and {len(layers)} layers, in their order",
        f"{len(rows)} others",
    )
    check(known["arrays"].keys() == {la.path for la in layers}, "arrays", "an array for each layer", "others")
    arrays = {}
    for layer in layers:
        where = f"arrays.{layer.path}"
        array = shelf.array(known["arrays"][layer.path], where, "arrays", mapped=True)
        check_shape(array, (len(images), *layer.shape), where)
        arrays[layer.path] = array
    return Activations(
        *read_made(known, ACTIVATION_PARAMETERS),
        images=shelf.images(images),
        layers=layers,
        arrays=arrays,
        statistics=rows,
    )
