"""The variables of a SavedModel: which name each has in the checkpoint, and its value.

What saves and restores variables in a file is read to learn these names, and never run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np

from convscope import limits
from convscope.errors import ModelError
from convscope.networks.foreign import Message
from convscope.networks.formats.saved_model.nodes import functions_of, node_of, shown

CHECKPOINT = "variables/variables"
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"


def size_of(path: Path) -> int:
    """Bytes of a file that is one: reading from a pipe or a device could wait for ever."""
    try:
        about = path.stat()
    except OSError as error:
        raise ModelError(
            f"the SavedModel's file {path} can't be read ({error.strerror}). Copy it again.",
            code="file-damaged",
            path=str(path),
            reason=error.strerror,
        ) from error
    if not stat.S_ISREG(about.st_mode):
        raise ModelError(
            f"expected a file at {path}, found a device, a pipe or a folder. Copy the SavedModel again.",
            code="no-regular-file",
            path=str(path),
        )
    return about.st_size


def parts(folder: Path) -> list[Path]:
    """The files of the checkpoint; none where the graph has its numbers inside."""
    inside = (folder / CHECKPOINT).parent
    return sorted(path for path in inside.glob("variables*")) if os.path.isdir(inside) else []


def _keys(meta: Message, reader: Message) -> dict[str, str]:
    """Names in the checkpoint by variable node.

    From TensorFlow 2 on the objects of a file say it: they come first, as for TensorFlow's own loader.
    """
    keys = _restored(meta.graph_def)
    if reader.has_tensor(_OBJECTS) and meta.object_graph_def.nodes:
        keys.update(_of_objects(meta, reader.get_tensor(_OBJECTS)))
    return keys


def _of_objects(meta: Message, stored: bytes) -> dict[str, str]:
    """Find variables by the captured inputs of each function, which are object numbers."""
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    try:
        objects = trackable_object_graph_pb2.TrackableObjectGraph.FromString(stored)
    except Exception:  # of the protobuf library at hand; what restores the variables may still say it
        return {}
    keys = {
        number: item.checkpoint_key
        for number, node in _side_by_side(meta.object_graph_def.nodes, objects.nodes)
        for item in node.attributes
        if item.name == "VARIABLE_VALUE"
    }
    found: dict[str, str] = {}
    for node in meta.graph_def.node:
        for name in functions_of(node):
            known = meta.object_graph_def.concrete_functions
            bound = known[name].bound_inputs if name in known else ()
            inputs = [node_of(tensor) for tensor in node.input if not tensor.startswith("^")]
            pairs = zip(inputs[len(inputs) - len(bound) :], bound, strict=False)
            found.update({taken: keys[number] for taken, number in pairs if number in keys})
    return found


def _side_by_side(saved: Message, stored: Message) -> Iterator[tuple[int, Message]]:
    """Numbers of objects in the graph with their nodes in the checkpoint: both are reached by the same names."""
    waiting, seen = [(0, 0)], set()
    while waiting:
        here, there = waiting.pop()
        if here in seen or not (0 <= here < len(saved) and 0 <= there < len(stored)):
            continue
        seen.add(here)
        yield here, stored[there]
        names = {child.local_name: child.node_id for child in stored[there].children}
        waiting += [
            (child.node_id, names[child.local_name]) for child in saved[here].children if child.local_name in names
        ]


def _restored(graph: Message) -> dict[str, str]:
    """Find variables by the operations that restore them, which are read and not run."""
    functions = {function.signature.name: function for function in graph.library.function}
    found = dict(_assigned({node.name: node for node in graph.node}, {}))
    for node in graph.node:
        for name in functions_of(node):
            function = functions.get(name)
            if function is None or not any(inner.op == "RestoreV2" for inner in function.node_def):
                continue
            arguments = [argument.name for argument in function.signature.input_arg]
            outside = dict(zip(arguments, (node_of(tensor) for tensor in node.input), strict=False))
            found.update(_assigned({inner.name: inner for inner in function.node_def}, outside))
    return found


def _assigned(nodes: Mapping[str, Message], outside: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variable and checkpoint name, for each assignment of an output of RestoreV2."""
    for node in nodes.values():
        if node.op in ("Assign", "AssignVariableOp") and len(node.input) >= 2:
            variable = node_of(node.input[0])
            key = _read_from(node.input[1], nodes)
            if key is not None:
                yield outside.get(variable, variable), key


def _read_from(tensor: str, nodes: Mapping[str, Message]) -> str | None:
    """The name in the checkpoint from which a tensor comes, through copies alone."""
    for _ in range(8):
        node = nodes.get(node_of(tensor))
        if node is not None and node.op == "Identity" and node.input:
            tensor = node.input[0]
            continue
        if node is None or node.op != "RestoreV2" or len(node.input) < 3:
            return None
        names, slices = (_texts(nodes.get(node_of(name))) for name in node.input[1:3])
        last = tensor.rpartition(":")[2]
        index = int(last) if ":" in tensor and last.isdigit() else 0
        return names[index] if index < len(names) and not any(slices[index : index + 1]) else None
    return None


def _texts(node: Message) -> list[str]:
    """The texts of a constant; the last one stands for all that follow."""
    if node is None or node.op != "Const":
        return []
    tensor = node.attr["value"].tensor
    found = [text.decode("utf-8", "replace") for text in tensor.string_val]
    count = prod(dim.size for dim in tensor.tensor_shape.dim)
    missing = count - len(found)
    return found + found[-1:] * missing if 0 < missing <= limits.current().entries else found


def values_of(folder: Path, meta: Message, nodes: list[str]) -> dict[str, np.ndarray]:
    """Values from the checkpoint by variable node.

    Raises:
        ModelError: it lacks one, or holds less than it declares.
    """
    import tensorflow as tf

    if not nodes:
        return {}
    held = sum(size_of(path) for path in parts(folder))
    try:
        # Not `load_checkpoint`: where the name is a folder, it follows a file in it to a checkpoint anywhere.
        reader = tf.compat.v1.train.NewCheckpointReader(str(folder / CHECKPOINT))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        known = _keys(meta, reader)
    except Exception as error:  # TensorFlow raises what its reader raises
        raise ModelError(
            f"the variables of the SavedModel {folder} can't be read. Copy it again.",
            code="file-damaged",
            path=str(folder),
        ) from error
    keys = {node: known.get(node, node) for node in nodes}
    lacking = [key for key in keys.values() if key not in shapes]
    if lacking:
        raise ModelError(
            f"the SavedModel {folder} is not whole: its variables/ lack {shown(lacking[:3])}. Copy it again, or "
            "save it anew.",
            code="file-damaged",
            path=str(folder),
            names=lacking,
        )
    declared = sum(prod(shapes[key]) * max(1, dtypes[key].size) for key in set(keys.values()))
    if declared > held:
        raise ModelError(
            f"the SavedModel {folder} declares {declared:,} bytes of variables, found {held:,} bytes.",
            code="file-damaged",
            path=str(folder),
            found=held,
            expected=declared,
        )
    if any(not (dtypes[key].is_floating or dtypes[key].is_integer or dtypes[key].is_bool) for key in keys.values()):
        raise ModelError(
            f"the SavedModel {folder} has variables that are no numbers.", code="values-unsupported", path=str(folder)
        )
    return {node: np.asarray(reader.get_tensor(key)) for node, key in keys.items()}
