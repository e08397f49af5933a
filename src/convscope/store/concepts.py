"""Concepts in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from convscope import schema
from convscope.render import concepts as views
from convscope.results import Concept, Concepts
from convscope.schema import Json
from convscope.store.folder import Folder, as_folder, save_images
from convscope.store.parameters import CONCEPT_PARAMETERS, PREDICTION, WITH_IMAGES, describe_made, read_made
from convscope.store.shelf import Shelf, check, check_shape


def write(result: Concepts, directory: str | PathLike | Folder) -> list[str]:
    """Write the panels, the concepts' strengths and vectors as `.npy`, the images and the numbers."""
    folder = as_folder(directory)
    report, since = result.to_json(), folder.begin(f"{result.kind}.json")
    for name, rendering in views.renderings(result):
        folder.image(f"{name}.png", rendering)
    report["values"] = folder.array("values.npy", result.values)
    report["vectors"] = folder.array("vectors.npy", result.vectors)
    report["photos"] = save_images(folder, result.images)
    return folder.json(f"{result.kind}.json", report | describe_made(result), since)


def read(report: Mapping[str, Json], shelf: Shelf) -> Concepts:
    """The result that `write` wrote as `report`, with the files beside it."""
    row = schema.record(Concept, number=schema.whole(0), predictions=schema.sequence(PREDICTION))
    known = schema.entries({
        "concepts": schema.sequence(row, 1),
        "values": schema.text,
        "vectors": schema.text,
        **WITH_IMAGES,
    })(report, "")  # fmt: skip
    values, vectors = (shelf.array(known[name], name) for name in ("values", "vectors"))
    count, images = len(known["concepts"]), known["photos"]
    expected = f"how much of {count} concepts is where in {len(images)} images (n, h, w, k)"
    check(values.ndim == 4 and values.size > 0, "values", expected, f"the shape {values.shape}")
    check_shape(values, (len(images), *values.shape[1:3], count), "values")
    check(vectors.ndim == 2 and len(vectors) == count, "vectors", f"{count} vectors", f"the shape {vectors.shape}")
    numbers = [row.number for row in known["concepts"]]
    check(numbers == list(range(count)), "concepts", f"the numbers from 0 to {count - 1}", numbers[:8])
    made = read_made(known, CONCEPT_PARAMETERS)
    return Concepts(*made, shelf.images(images), values, vectors, known["concepts"])
