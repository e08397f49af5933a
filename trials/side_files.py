"""Files beside a model: lists of class names, and arrays for its other inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trials import mutations
from trials.folders import npy
from trials.models import case
from trials.outcomes import Case, Place


def classes(place: Place) -> Case:
    """A list of class names: lines or JSON."""
    rng = place.rng
    names = ["cat", "dog", "bird", "fish", "horse"]
    trees: Sequence[object] = (
        names,
        {str(i): name for i, name in enumerate(names)},
        {name: i for i, name in enumerate(names)},
        {str(i): [f"n{i}", name] for i, name in enumerate(names)},
    )
    chance, tree = rng.random(), rng.choice(trees)
    if chance < 0.2:
        data, what = ("\n".join(names) + "\n" + mutations.odd_text(place)).encode("utf-8", "surrogatepass"), "lines"
    elif chance < 0.4:
        data, what = mutations.damaged(json.dumps(tree).encode(), rng), "damaged bytes"
    elif chance < 0.5:
        data, what = (
            rng.choice(
                (
                    b"",
                    b"\xff\xfea\0",
                    b"[" * 10**5,
                    b"{" * 10**6,
                    b"\0" * 100,
                    b"[1" + b"0" * 10**5 + b"]",
                    rng.randbytes(200),
                    b"\xef\xbb\xbfcat",
                    b'{"a":' * 5000,
                )
            ),
            "odd bytes",
        )
    else:
        data, what = mutations.dumped(mutations.mutated(tree, place)), "tree changed"
    return case(place, rng.choice(("classes.json", "classes.txt", "classes")), data, f"classes, {what}", "classes")


def feed(place: Place) -> Case:
    """An array for another input, `.npy` or `.npz`."""
    import io

    import numpy as np

    rng, out = place.rng, io.BytesIO()
    np.save(out, np.ones((1, 1, 1, 1), np.float32))
    data = npy(out.getvalue(), rng.choice(("bytes", "shape", "type", "header", "pickle", "large", "nan")), place)
    name = "feed.npy"
    if rng.random() < 0.3:
        name = rng.choice(("feed.npz", "feed.npy"))
        data = mutations.damaged_zip({"a.npy": data, "b.npy": out.getvalue()}, place)[0]
    (place.folder / name).write_bytes(data)
    model = (place.bases / "onnx-two.onnx").read_bytes()
    return case(place, "net.onnx", model, f"{name}", "feed", options=("--feed", f"factor={place.folder / name}"))
