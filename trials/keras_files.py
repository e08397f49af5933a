"""Files of Keras': .keras archives, and HDF5 of Keras 1, 2 and 3."""

from __future__ import annotations

import base64
import json
import marshal
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from trials import mutations
from trials.models import archive, case, tried
from trials.outcomes import Case, Place

# -- configs ---------------------------------------------------------------------------------------------


def _dicts(value: Any) -> list[dict[str, Any]]:
    """Every object with a class name in a config."""
    return [holder for holder in mutations.holders_in(value) if isinstance(holder, dict) and "class_name" in holder]


def _bytecode(place: Place) -> str:
    code = compile(f"lambda x: open({str(place.marker)!r}, 'w') and x", "f", "eval").co_consts[0]
    return base64.b64encode(marshal.dumps(code)).decode()


def hostile_config(config: Any, place: Place) -> Any:
    """A config with an entry that names code."""
    rng = place.rng
    found = _dicts(config)
    item = rng.choice(found)
    named = rng.choice(
        (
            "planted_module",
            "antigravity",
            "os",
            "builtins",
            "subprocess",
            "keras.src.utils",
            "tensorflow.python.lib.io.file_io",
            "keras.utils",
        )
    )
    function = rng.choice(("thing", "system", "exec", "eval", "Popen", "get_file", "write_string_to_file"))
    whole = {
        "class_name": function,
        "config": {"args": [str(place.marker)]},
        "module": named,
        "registered_name": function,
    }
    lambda_ = {"class_name": "__lambda__", "config": {"value": [_bytecode(place), None, None]}}
    raw = {"class_name": "function", "config": function, "module": named, "registered_name": function}
    layers: tuple[dict[str, Any], ...] = (
        {
            "class_name": "Lambda",
            "config": {"name": "code", "function": lambda_},
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "Lambda",
            "config": {"name": "code", "function": [_bytecode(place), None, None], "function_type": "lambda"},
        },
        {
            "class_name": "Lambda",
            "config": {"name": "code", "function": function, "function_type": "function", "module": named},
        },
        {
            "class_name": "TFSMLayer",
            "config": {"name": "code", "filepath": str(place.outside), "call_endpoint": "serve"},
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "TorchModuleWrapper",
            "config": {
                "name": "code",
                "module": base64.b64encode(b"\x80\x02" + mutations.code_pickle(place) + b".").decode(),
            },
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "JaxLayer",
            "config": {"name": "code", "call_fn": lambda_},
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "FlaxLayer",
            "config": {"name": "code", "module": lambda_},
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "TensorFlowOpLayer",
            "config": {"name": "code", "node_def": "name: 'w' op: 'WriteFile'", "constants": {}},
        },
        {
            "class_name": "StringLookup",
            "config": {"name": "code", "vocabulary": str(place.outside / "secret.txt")},
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "TextVectorization",
            "config": {"name": "code", "vocabulary": str(place.outside / "secret.txt")},
            "module": "keras.layers",
            "registered_name": None,
        },
        {
            "class_name": "Pipeline",
            "config": {"name": "code", "layers": [whole]},
            "module": "keras.layers",
            "registered_name": None,
        },
        {"class_name": "thing", "config": {"name": "code"}, "module": named, "registered_name": f"planted>{function}"},
        {
            "class_name": "RandomFlip",
            "config": {"name": "code", "mode": lambda_},
            "module": "keras.layers",
            "registered_name": None,
        },
    )
    choice = rng.randrange(9)
    if choice < 3:
        new = rng.choice(layers)
        for key in ("name", "inbound_nodes"):
            if key in item:
                new[key] = item[key]
        if isinstance(item.get("config"), dict) and "name" in item["config"]:
            new["config"]["name"] = item["config"]["name"]
        item.clear()
        item.update(new)
    elif choice == 3:
        item["module"], item["class_name"] = named, function
    elif choice == 4:
        item["registered_name"] = f"{named}>{function}"
    elif choice == 5 and isinstance(item.get("config"), dict):
        key = rng.choice(list(item["config"]) or ["activation"])
        item["config"][key] = rng.choice((whole, lambda_, raw))
    elif choice == 6 and isinstance(item.get("config"), dict):
        item["config"][
            rng.choice(("activation", "kernel_initializer", "kernel_regularizer", "dtype", "kernel_constraint"))
        ] = rng.choice((whole, lambda_, raw, function, f"{named}.{function}"))
    elif choice == 7 and isinstance(config, dict):
        config[rng.choice(("compile_config", "build_config"))] = rng.choice(
            (whole, lambda_, {"optimizer": whole, "loss": lambda_}, {"input_shape": whole})
        )
    else:
        item["shared_object_id"] = rng.choice((whole, -1, "x"))
        item["class_name"] = rng.choice(
            (
                "__tensor__",
                "__numpy__",
                "__bytes__",
                "__ellipsis__",
                "__slice__",
                "__lambda__",
                "__keras_tensor__",
                "__typespec__",
                "__class__",
            )
        )
    return config


def _large_config(config: Any, place: Place) -> Any:
    """Numbers in it that would make arrays of many GiB."""
    rng = place.rng
    holders = [holder for holder in mutations.holders_in(config) if isinstance(holder, dict)]
    keys = (
        "filters",
        "units",
        "kernel_size",
        "batch_shape",
        "batch_input_shape",
        "pool_size",
        "strides",
        "nb_filter",
        "output_dim",
        "dilation_rate",
        "padding",
    )
    places = [(holder, key) for holder in holders for key in keys if key in holder]
    if places:
        holder, key = rng.choice(places)
        many = rng.choice((2**20, 2**31, 2**40, 65536))
        old = holder[key]
        holder[key] = (
            many
            if isinstance(old, int)
            else [many if isinstance(side, int) else side for side in old]
            if isinstance(old, list)
            else [[many, many]] * 2
        )
    return config


def _in_config(change: Callable[[Any, Place], Any]) -> Any:
    def changed(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
        return {**contents, "config.json": mutations.dumped(change(json.loads(contents["config.json"]), place))}

    return changed


def _metadata(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    return {
        **contents,
        "metadata.json": mutations.dumped(mutations.mutated(json.loads(contents["metadata.json"]), place)),
    }


def _in_weights(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """The archive's HDF5 changed in its structure."""
    path = place.folder / "inner.h5"
    path.write_bytes(contents["model.weights.h5"])
    _structure(path, place)
    data = path.read_bytes()
    path.unlink()
    return {**contents, "model.weights.h5": data}


def _long_text(contents: dict[str, bytes], place: Place) -> bytes:
    """A config that unpacks to much more than it is."""
    entries = [mutations.stored(name, data) for name, data in contents.items() if name != "config.json"]
    return mutations.zipped([mutations.bomb_entry("config.json", place.rng.choice((70, 3000))), *entries])


def _other_files(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    name = place.rng.choice(
        (
            "assets/layers/x/vocabulary.txt",
            "../written.txt",
            "assets/../../outside/written.txt",
            str(place.marker),
            "model.weights.npz",
            "model.weights.json",
            "config.json/x",
            "model.weights.h5/x",
        )
    )
    return {**contents, name: b"\x80\x02" + mutations.code_pickle(place) + b"."}


_KERAS = {
    "tree changed": _in_config(mutations.mutated),
    "tree changed ": _in_config(mutations.mutated),
    "names code": _in_config(hostile_config),
    "names code ": _in_config(hostile_config),
    "names code  ": _in_config(hostile_config),
    "large": _in_config(_large_config),
    "metadata": _metadata,
    "weights": _in_weights,
    "weights ": _in_weights,
    "long text": _long_text,
    "other files": _other_files,
}


def keras_archive(place: Place) -> Case:
    """A `.keras` archive."""
    data, what = archive(place, place.base("keras-*.keras"), "net.keras", _KERAS)
    return case(place, "net.keras", data, what)


# -- HDF5 ------------------------------------------------------------------------------------------------


def _structure(path: Path, place: Place) -> str:
    """A change of what an HDF5 file is made of: its data sets, groups, links and attributes."""
    rng = place.rng
    what = rng.choice(list(_CHANGES))
    with h5py.File(path, "r+") as file:
        objects: list[str] = []
        file.visit(objects.append)
        sets = [name for name in objects if isinstance(file[name], h5py.Dataset)]
        if sets:
            _CHANGES[what](file, rng.choice(sets), place)
    return what


def _external(file: Any, name: str, place: Place) -> None:
    """The data lie outside of the file."""
    shape, kind = file[name].shape, file[name].dtype
    target = place.rng.choice(
        (
            place.outside / "weights.bin",
            place.outside / "pipe",
            "../outside/weights.bin",
            "/dev/zero",
            place.outside / "secret.txt",
        )
    )
    if place.rng.random() < 0.6:
        del file[name]
    else:
        name = place.rng.choice(("unclaimed", "model_weights/unclaimed", "layers/unclaimed"))
    file.create_dataset(name, shape or (4,), kind, external=[(os.fspath(target), 0, h5py.h5f.UNLIMITED)])


def _link(file: Any, name: str, place: Place) -> None:
    """A link to another file, or in a ring."""
    rng = place.rng
    link = rng.choice(
        (
            h5py.ExternalLink(os.fspath(place.outside / "weights.bin"), "/x"),
            h5py.ExternalLink(os.fspath(place.outside / "pipe"), "/x"),
            h5py.ExternalLink("../outside/weights.bin", "/"),
            h5py.SoftLink("/"),
            h5py.SoftLink(f"/{name}"),
            h5py.SoftLink("/nowhere"),
        )
    )
    if rng.random() < 0.5:
        del file[name]
        file[name] = link
    else:
        file[rng.choice(("unclaimed", f"{name}_more"))] = link


def _virtual(file: Any, name: str, place: Place) -> None:
    """A virtual data set made of another file's."""
    shape = file[name].shape or (4,)
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource(os.fspath(place.outside / "weights.bin"), "x", shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def _large_set(file: Any, name: str, place: Place) -> None:
    """A data set of many GiB of which nothing is there."""
    del file[name]
    shape = place.rng.choice(((2**32,), (2**17, 2**17), (3, 3, 2**16, 2**15)))
    file.create_dataset(
        name, shape, place.rng.choice(("f4", "f8", "u1")), chunks=tuple(min(side, 64) for side in shape)
    )


def _packed(file: Any, name: str, place: Place) -> None:
    """A chunk of zeros, packed a thousandfold."""
    del file[name]
    file.create_dataset(
        name, data=np.zeros((4000, 4000), "f4"), chunks=(4000, 4000), compression="gzip", compression_opts=9
    )


def _kind(file: Any, name: str, place: Place) -> None:
    """Another type of values."""
    shape = file[name].shape
    del file[name]
    kind = place.rng.choice(
        (
            "i8",
            "c16",
            "S10",
            h5py.string_dtype(),
            h5py.special_dtype(ref=h5py.Reference),
            "f2",
            "?",
            np.dtype([("a", "f4"), ("b", "i4")]),
            h5py.vlen_dtype("f4"),
            h5py.opaque_dtype("V8") if hasattr(h5py, "opaque_dtype") else "f8",
            ">f4",
        )
    )
    file.create_dataset(name, shape, kind)


def _shape(file: Any, name: str, place: Place) -> None:
    """Another shape, or other numbers."""
    values = file[name][()]
    del file[name]
    file[name] = place.rng.choice(
        (
            values.T,
            np.ravel(values),
            np.zeros(()),
            np.zeros((0,)),
            np.full(np.shape(values), np.nan),
            np.zeros((*np.shape(values), 2)),
            np.full(np.shape(values), 1e38),
        )
    )


def _moved(file: Any, name: str, place: Place) -> None:
    """Another name, or none."""
    if place.rng.random() < 0.5:
        del file[name]
    else:
        file.move(name, place.rng.choice((f"{name}x", "weights/\x1b[31m", "x/" * 200 + "x", "\u202ename")))


def _attributes(file: Any, name: str, place: Place) -> None:
    """The attributes of a group changed, or of all."""
    rng = place.rng
    holders = [file, *(file[key] for key in _groups(file))]
    holder = rng.choice([holder for holder in holders if len(holder.attrs)] or [file])
    key = rng.choice([*holder.attrs, "keras_version", "layer_names", "weight_names", "model_config", "vars"])
    value = rng.choice(
        (
            b"\xff\xfe",
            "",
            "2.4.0",
            "0.0",
            "x" * 10000,
            5,
            np.zeros(3),
            np.array([b"\xff", b"a"]),
            np.array([b"../x", b"/"]),
            h5py.Empty("f"),
            "1.\x1b[31m2",
            np.array([b"a"] * 6000),
            float("nan"),
        )
    )
    if rng.random() < 0.2 and key in holder.attrs:
        del holder.attrs[key]
    else:
        holder.attrs[key] = value


def _many_groups(file: Any, name: str, place: Place) -> None:
    """Very many objects, or very deep ones."""
    if place.rng.random() < 0.5:
        for number in range(3000):
            file.create_group(f"many/{number}")
    else:
        file.create_group("/".join(["deep"] * place.rng.choice((150, 1000))))


def _ring(file: Any, name: str, place: Place) -> None:
    """A group that holds itself, by a hard link."""
    group = place.rng.choice(_groups(file) or ["/"])
    file[f"{group}/again"] = file[place.rng.choice(("/", group))]


def _groups(file: Any) -> list[str]:
    names: list[str] = []
    file.visit(names.append)
    return [name for name in names if isinstance(file.get(name), h5py.Group)]


_CHANGES: dict[str, Callable[[Any, str, Place], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _external,
        _external,
        _link,
        _virtual,
        _large_set,
        _packed,
        _kind,
        _shape,
        _moved,
        _attributes,
        _many_groups,
        _ring,
    )
}


def _config_of(path: Path, place: Place) -> str:
    """The config in an attribute of a whole model's file."""
    what, change = place.rng.choice(
        (
            ("tree changed", mutations.mutated),
            ("names code", hostile_config),
            ("names code", hostile_config),
            ("large", _large_config),
        )
    )
    with h5py.File(path, "r+") as file:
        if "model_config" in file.attrs:
            text = file.attrs["model_config"]
            new = mutations.dumped(change(json.loads(text), place))
            del file.attrs["model_config"]
            if len(new) < 60000:
                file.attrs["model_config"] = new.decode("utf-8", "replace")
            else:
                file.attrs.create("model_config", new.decode("utf-8", "replace"), dtype=h5py.string_dtype())
    return what


def _trees(data: bytes, place: Place) -> bytes:
    """Addresses in the B-trees, heaps and symbol tables: rings and places that are not there."""
    rng, out = place.rng, bytearray(data)
    starts = [i for name in (b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR") for i in _all(data, name)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not starts:
            break
        start = rng.choice(starts)
        at = start + 8 * rng.randrange(1, 12)
        value = rng.choice((rng.choice(starts), rng.choice(starts), 0, 96, 2**64 - 1, len(data), len(data) - 8, 2**40))
        if at + 8 <= len(out):
            out[at : at + 8] = value.to_bytes(8, "little")
    return bytes(out)


def _all(data: bytes, name: bytes) -> list[int]:
    found, at = [], data.find(name)
    while at >= 0:
        found.append(at)
        at = data.find(name, at + 1)
    return found


def _hdf5(place: Place, base: Path) -> Case:
    rng, path = place.rng, place.folder / "net.h5"
    chance = rng.random()
    if chance < 0.05:
        shutil.copyfile(base, path)
        return tried(place, path, f"{base.name} whole")
    if chance < 0.25:
        return case(place, "net.h5", mutations.damaged(base.read_bytes(), rng), f"{base.name}, damaged bytes")
    if chance < 0.45:
        return case(place, "net.h5", _trees(base.read_bytes(), place), f"{base.name}, trees")
    shutil.copyfile(base, path)
    try:
        what = (_config_of if chance < 0.7 else _structure)(path, place)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        what = f"as far as h5py went ({type(error).__name__})"
    if rng.random() < 0.1:
        path.write_bytes(bytes(rng.choice((512, 1024, 2**16, 2**20, 100))) + path.read_bytes())
    return tried(place, path, f"{base.name}, {what}")


def hdf5(place: Place) -> Case:
    """HDF5 as Keras 3 writes it, whole models and weights only."""
    return _hdf5(place, place.base(place.rng.choice(("whole-*.h5", "whole-*.h5", "weights-*.h5"))))


def hdf5_old(place: Place) -> Case:
    """HDF5 as Keras 1 and 2 wrote it."""
    return _hdf5(place, place.base("old-*.h5"))
