"""SavedModels, of both formats: a folder with a graph as a protocol buffer and variables beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials import mutations
from trials.models import tried
from trials.outcomes import Case, Place


def generate(place: Place) -> Case:
    """A SavedModel, damaged at one of the levels."""
    rng, base = place.rng, place.base("saved-*")
    folder = place.folder / "net"
    shutil.copytree(base, folder)
    chance = rng.random()
    if chance < 0.05:
        return tried(place, folder, f"{base.name} whole")
    if chance < 0.2:
        file = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        file.write_bytes(mutations.damaged(file.read_bytes(), rng))
        return tried(place, folder, f"{base.name}, damaged bytes of {file.name}")
    if chance < 0.3:
        what = damaged_files(folder, place)
        return tried(place, folder, f"{base.name}, {what}")
    message = _message(folder)
    if chance < 0.55:
        what = "fields changed"
        mutations.mutated_message(message, place)
    else:
        what = rng.choice(list(_HOSTILE))
        _HOSTILE[what](message, place)
    (folder / "saved_model.pb").write_bytes(message.SerializeToString())
    return tried(place, folder, f"{base.name}, {what}")


def _message(folder: Path) -> Any:
    from tensorflow.core.protobuf import saved_model_pb2

    return saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())


def damaged_files(folder: Path, place: Place, but: str = "") -> str:
    """Files missing, swapped, or of another sort; not the one with the name `but`."""
    rng = place.rng
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != but]
    file = rng.choice(files)
    what = rng.choice(("missing", "empty", "link", "folder", "pipe", "swapped", "text"))
    if what == "swapped":
        file.write_bytes(rng.choice(files).read_bytes())
        return f"{file.name} swapped"
    file.unlink()
    if what == "empty":
        file.touch()
    elif what == "link":
        file.symlink_to(place.outside / "weights.bin")
    elif what == "folder":
        file.mkdir()
    elif what == "pipe":
        __import__("os").mkfifo(file)
    elif what == "text":
        (folder / "saved_model.pbtxt").write_text("saved_model_schema_version: 1")
    return f"{file.name}: {what}"


# -- operations that touch files -------------------------------------------------------------------------


def _graphs(message: Any, rng: Any) -> Any:
    """The nodes of the graph, or of one of its functions."""
    graph = message.meta_graphs[0].graph_def
    functions = list(graph.library.function)
    if functions and rng.random() < 0.7:
        return rng.choice(functions).node_def
    return graph.node


def _text(nodes: Any, name: str, value: str) -> str:
    from tensorflow.core.framework import types_pb2

    node = nodes.add(name=name, op="Const")
    node.attr["dtype"].type = types_pb2.DT_STRING
    node.attr["value"].tensor.dtype = types_pb2.DT_STRING
    node.attr["value"].tensor.tensor_shape.SetInParent()
    node.attr["value"].tensor.string_val.append(value.encode())
    return name


def _planted(message: Any, place: Place) -> str:
    """A node that writes or reads; returns its name."""
    rng = place.rng
    nodes = _graphs(message, rng)
    inside = nodes is not message.meta_graphs[0].graph_def.node
    end = ":output:0" if inside else ":0"
    path, content = _text(nodes, "planted/path", str(place.marker)), _text(nodes, "planted/content", "x")
    secret = _text(nodes, "planted/secret", str(place.outside / "secret.txt"))
    op = rng.choice(
        (
            "WriteFile",
            "ReadFile",
            "PrintV2",
            "PyFunc",
            "EagerPyFunc",
            "PyFuncStateless",
            "MatchingFiles",
            "SaveV2",
            "Save",
            "MergeV2Checkpoints",
            "WholeFileReaderV2",
            "FixedLengthRecordDatasetV2",
            "TextLineDataset",
            "InitializeTableFromTextFileV2",
            "LoadAndRemapMatrix",
            "RestoreSlice",
            "ShardedFilename",
            "DebugIdentityV2",
            "LoopCond",
            "Abort",
            "WriteImageSummary",
        )
    )
    node = nodes.add(name="planted/node", op=op)
    if op == "WriteFile":
        node.input.extend([path + end, content + end])
    elif op in ("ReadFile", "MatchingFiles", "TextLineDataset"):
        node.input.append(secret + end)
    elif op in ("PyFunc", "EagerPyFunc", "PyFuncStateless"):
        node.attr["token"].s = b"pyfunc_0"
        node.attr["Tin"].list.SetInParent()
        node.attr["Tout"].list.SetInParent()
    elif op == "PrintV2":
        node.input.append(content + end)
        node.attr["output_stream"].s = f"file://{place.marker}".encode()
    elif op == "Abort":
        node.attr["error_msg"].s = b"aborted"
    else:
        node.input.append(path + end)
    for other in rng.sample(list(nodes), min(len(nodes), 3)):
        if other.name != node.name and not other.name.startswith("planted") and rng.random() < 0.7:
            other.input.append("^planted/node")
    return node.name


def _as_saver(message: Any, place: Place) -> None:
    name = _planted(message, place)
    saver = message.meta_graphs[0].saver_def
    field = place.rng.choice(("restore_op_name", "save_tensor_name", "filename_tensor_name"))
    setattr(saver, field, name if field == "restore_op_name" else f"{name}:0")


def _as_initializer(message: Any, place: Place) -> None:
    name = _planted(message, place)
    meta = message.meta_graphs[0]
    key = place.rng.choice(
        (
            "saved_model_init_op",
            "legacy_init_op",
            "saved_model_main_op",
            "saved_model_train_op",
            "local_init_op",
            "table_initializer",
        )
    )
    if place.rng.random() < 0.5:
        meta.signature_def["__" + key].outputs[key].name = name
    else:
        meta.collection_def[key].node_list.value.append(name)


def _as_output(message: Any, place: Place) -> None:
    name = _planted(message, place)
    for signature in message.meta_graphs[0].signature_def.values():
        for output in signature.outputs.values():
            if place.rng.random() < 0.5:
                output.name = f"{name}:0"


def _op_changed(message: Any, place: Place) -> None:
    """A node of another type under the same name."""
    nodes = [node for node in _graphs(message, place.rng) if node.op != "Const"]
    if nodes:
        place.rng.choice(nodes).op = place.rng.choice(
            (
                "WriteFile",
                "ReadFile",
                "PyFunc",
                "Identity",
                "NoOp",
                "Planted>Op",
                "",
                "PartitionedCall",
                "StatefulPartitionedCall",
                "While",
                "SymbolicGradient",
                "Conv2D",
                "RestoreV2",
                "SaveV2",
                "MergeV2Checkpoints",
                "\x1b[31m",
                "Placeholder",
                "Reshape",
                "Fill",
                "RandomUniform",
            )
        )


def _saver_functions(message: Any, place: Place) -> None:
    """Functions that only the saver calls write instead."""
    functions = [
        f
        for f in message.meta_graphs[0].graph_def.library.function
        if "save" in f.signature.name or "restore" in f.signature.name or "trace" in f.signature.name
    ]
    if not functions:
        return _as_saver(message, place)
    nodes = place.rng.choice(functions).node_def
    path, content = _text(nodes, "planted/path", str(place.marker)), _text(nodes, "planted/content", "x")
    node = nodes.add(name="planted/node", op="WriteFile")
    node.input.extend([f"{path}:output:0", f"{content}:output:0"])
    for other in nodes:
        if not other.name.startswith("planted"):
            other.input.append("^planted/node")


def _rings(message: Any, place: Place) -> None:
    """A function that calls itself, a node that is its own input, or doublings."""
    rng, functions = place.rng, message.meta_graphs[0].graph_def.library.function
    if functions and rng.random() < 0.6:
        function = rng.choice(list(functions))
        call = function.node_def.add(name="again", op="PartitionedCall")
        call.attr["f"].func.name = function.signature.name
        call.attr["Tin"].list.SetInParent()
        call.attr["Tout"].list.SetInParent()
    else:
        node = rng.choice(list(_graphs(message, rng)))
        node.input.insert(0, node.name)


def _doublings(message: Any, place: Place) -> None:
    library = message.meta_graphs[0].graph_def.library.function
    for level in range(26):
        function = library.add()
        function.signature.name = f"level{level}"
        for number in range(2):
            call = function.node_def.add(name=f"call{number}", op="PartitionedCall")
            call.attr["f"].func.name = f"level{level + 1}"
            call.attr["Tin"].list.SetInParent()
            call.attr["Tout"].list.SetInParent()
    library.add().signature.name = "level26"
    nodes = _graphs(message, place.rng)
    call = nodes.add(name="doubled", op="PartitionedCall")
    call.attr["f"].func.name = "level0"
    call.attr["Tin"].list.SetInParent()
    call.attr["Tout"].list.SetInParent()


def _large(message: Any, place: Place) -> None:
    """Declared shapes of many GiB."""
    rng = place.rng
    shapes = [
        holder
        for holder in mutations.messages_in(message)
        if holder.DESCRIPTOR.name == "TensorShapeProto" and len(holder.dim)
    ]
    for shape in rng.sample(shapes, min(len(shapes), rng.choice((1, 3, 20)))):
        rng.choice(list(shape.dim)).size = rng.choice((2**31, 2**40, 65536, -2, 0))


def _objects(message: Any, place: Place) -> None:
    """The object graph of TF2: other types, children in a ring, assets and resources outside."""
    rng, meta = place.rng, message.meta_graphs[0]
    nodes = meta.object_graph_def.nodes
    if not len(nodes):
        return _as_initializer(message, place)
    node = rng.choice(list(nodes))
    what = rng.randrange(5)
    if what == 0 and len(node.children):
        rng.choice(list(node.children)).node_id = rng.choice((0, len(nodes), 2**31 - 1, -1))
    elif what == 1:
        node.asset.asset_file_def_index = 0
        asset = meta.asset_file_def.add(
            filename=rng.choice(("../../outside/secret.txt", str(place.outside / "secret.txt")))
        )
        asset.tensor_info.name = "planted:0"
    elif what == 2:
        node.resource.device = "/device:GPU:9"
    elif what == 3:
        node.user_object.identifier = rng.choice(
            (
                "_tf_keras_model",
                "planted_module",
                "tensor_forest_tree_model",
                "_tf_keras_layer",
                "signature_map",
                "optimizer",
            )
        )
        node.user_object.metadata = '{"class_name": "Lambda", "config": {}}'
    else:
        node.bare_concrete_function.concrete_function_name = rng.choice(
            ("", "planted", *(f.signature.name for f in meta.graph_def.library.function))
        )


def _tables(message: Any, place: Place) -> None:
    """A lookup table that is filled from a file."""
    graph = message.meta_graphs[0].graph_def.node
    table = graph.add(name="planted/table", op="HashTableV2")
    path = _text(graph, "planted/file", str(place.outside / "secret.txt"))
    node = graph.add(name="planted/fill", op="InitializeTableFromTextFileV2", input=[table.name, path])
    node.attr["key_index"].i, node.attr["value_index"].i = -2, -1
    meta = message.meta_graphs[0]
    meta.collection_def["table_initializer"].node_list.value.append(node.name)
    meta.signature_def["__saved_model_init_op"].outputs["__saved_model_init_op"].name = node.name


_HOSTILE: dict[str, Callable[[Any, Place], None]] = {
    "as saver": _as_saver,
    "as initializer": _as_initializer,
    "as output": _as_output,
    "planted node": lambda message, place: (_planted(message, place), None)[1],
    "other operation": _op_changed,
    "saver's functions": _saver_functions,
    "rings": _rings,
    "doublings": _doublings,
    "large": _large,
    "objects": _objects,
    "tables": _tables,
}
