"""SavedModel folders: the one function that turns an image into scores, taken out of a program of TensorFlow's.

TensorFlow's own loader does much more than that function: it runs what restores the variables and what the file calls
its start, makes tables and other resources, and revives objects. Here none of this happens. `read` takes the graph of
one signature, checks each operation in it by the lists of `tensorflow_operations`, and writes it anew; variables get
their values from the checkpoint by convscope's own hand. What saves and restores them is read to learn which variable
has which name, and never run. All of this is done in the reader process, which also runs the result once, so that
neither a damaged graph nor an endless one gets into the user's process.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from convscope import isolation, limits
from convscope.errors import ModelError, option
from convscope.networks.foreign import Message, Tensor
from convscope.networks.formats.saved_model import operations
from convscope.schema import Json

GRAPH = "saved_model.pb"
_CHECKPOINT = "variables/variables"
_USUAL = (1, 224, 224, 3)  # what is tried where the size of the image is open
_MIB = 2**20


@dataclass(frozen=True)
class Program:
    """One signature of a SavedModel, as plain values.

    Attributes:
        signature: its name.
        graph: a GraphDef that convscope wrote, serialised.
        input: name of the tensor that takes the image.
        shape: of the image, (n, h, w, c), None where any will do.
        dtype: of the image.
        outputs: tensors by the names of the outputs.
        variables: values by the tensor that stands for the variable.
        handles: which of these are handles to a variable, and not its value.
    """

    signature: str
    graph: bytes
    input: str
    shape: tuple[int | None, ...]
    dtype: str
    outputs: Mapping[str, str]
    variables: Mapping[str, np.ndarray]
    handles: tuple[str, ...]


def read(folder: Path, trust: bool = False) -> Program:
    """The signature of a SavedModel that takes one image.

    Args:
        folder: with `saved_model.pb` and `variables/`.
        trust: take operations of any kind.

    Raises:
        ModelError: it is damaged or too large, has no such signature, or has operations that could do more than
            compute.
    """
    size = check_files(folder, trust)
    try:
        isolation.call(
            "convscope.networks.formats.saved_model.program:prepare", seconds=max(120, limits.current().seconds)
        )
        memory = 4096 * _MIB + 8 * size
        found = isolation.call(f"{__name__}:program", folder, trust, memory=memory)
    except isolation.ReaderError as error:
        raise _broken(folder, error) from error
    return Program(**{**found, "shape": tuple(found["shape"]), "handles": tuple(found["handles"])})


def check_files(folder: Path, trust: bool = False) -> int:
    """Bytes of a SavedModel's files, which are files inside of it.

    Args:
        folder: with `saved_model.pb` and `variables/`.
        trust: follow links that lead out of the folder.

    Raises:
        ModelError: one is missing, lies elsewhere, or is a pipe or a device; or they are larger than the limit.
    """
    files = [folder / GRAPH, *parts(folder)]
    home = folder.resolve()
    outside = [path for path in files if not trust and not path.resolve().is_relative_to(home)]
    if outside:
        raise ModelError(
            f"the SavedModel's file {outside[0]} is a link out of its folder, and would be read from there. Copy the "
            f"folder with the files themselves (cp -rL), or, if you trust it, give {option('trust=True')}.",
            code="needs-trust",
            path=str(outside[0]),
        )
    size = sum(map(_size, files))
    if size > limits.current().weights:
        raise ModelError(
            f"the SavedModel {folder} has {size / 2**30:.3g} GiB ({limits.how_to_raise('weights')}).",
            code="input-too-large",
            limit="weights",
        )
    return size


def _broken(folder: Path, error: isolation.ReaderError) -> ModelError:
    if error.kind in ("time", "memory"):
        message = f"the SavedModel {folder} can't be read: {error}."
        return ModelError(message, code="input-too-large", path=str(folder), reason=str(error))
    return _damaged(folder, "TensorFlow crashes on it" if error.kind == "crash" else " ".join(str(error).split())[:200])


def _damaged(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"the SavedModel {folder} is damaged or made for another TensorFlow ({what}). Copy it again, or save it anew.",
        code="file-damaged",
        path=str(folder),
        reason=what,
    )


def _size(path: Path) -> int:
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
    inside = (folder / _CHECKPOINT).parent
    return sorted(path for path in inside.glob("variables*")) if inside.is_dir() else []


def function(program: Program, variables: Mapping[str, Tensor]) -> Callable:
    """The program as a concrete function of TensorFlow's: from an image to a dict of outputs.

    Args:
        program: what `read` gave.
        variables: for each of its variables a `tf.Variable` with that value.
    """
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef.FromString(program.graph)
    _register(graph)

    def run(image: Tensor) -> dict[str, Tensor]:
        capture = tf.compat.v1.get_default_graph().capture
        standing = {
            name: capture(variable.handle) if name in program.handles else variable.read_value()
            for name, variable in variables.items()
        }
        tensors = tf.graph_util.import_graph_def(
            graph, {program.input: image, **standing}, list(program.outputs.values()), name="program"
        )
        return dict(zip(program.outputs, tensors, strict=True))

    return tf.function(run, autograph=False).get_concrete_function(tf.TensorSpec(program.shape, program.dtype))


def _register(graph: Message) -> None:
    """Make the functions of a graph known where functions of TensorFlow 2 look for them."""
    from tensorflow.python.eager import context

    for made in graph.library.function:
        if not context.context().has_function(made.signature.name):
            context.context().add_function_def(made)


# -- the reader's side -----------------------------------------------------------------------------------


def prepare() -> None:
    """Import TensorFlow, without the user's graphics card. Runs in the reader."""
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3")
    import tensorflow  # noqa: F401


def program(folder: str, trust: bool) -> dict[str, Json]:
    """Fields of a `Program`. Runs in the reader."""
    meta = _meta_graph(Path(folder), trust)
    name, taken = _signature(Path(folder), meta)
    (image,) = taken.inputs.values()
    outputs = {key: info.name for key, info in sorted(taken.outputs.items())}
    part = _Extraction(Path(folder), meta.graph_def, trust)
    graph = part.taken(image.name, list(outputs.values()))
    variables = _values(Path(folder), meta, list(part.variables))
    found = {
        "signature": name,
        "graph": graph.SerializeToString(),
        "input": image.name,
        "shape": [dim.size if dim.size >= 0 else None for dim in image.tensor_shape.dim],
        "dtype": _dtype(image.dtype),
        "outputs": outputs,
        "variables": {f"{node}:0": value for node, value in variables.items()},
        "handles": [f"{node.name}:0" for node in part.variables.values() if node.op == "VarHandleOp"],
    }
    _try(found, Path(folder))
    return found


def _dtype(number: int) -> str:
    import tensorflow as tf

    return str(tf.dtypes.as_dtype(number).name)


def _meta_graph(folder: Path, trust: bool) -> Message:
    """The graph for serving; every graph of the file is checked.

    Raises:
        ModelError: it can't be read, or has operations that no list has.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    try:
        model.ParseFromString((folder / GRAPH).read_bytes())
    except Exception as error:  # of the protobuf library at hand
        raise ModelError(
            f"{folder / GRAPH} is damaged ({' '.join(str(error).split())}). Copy it again.",
            code="file-damaged",
            path=str(folder),
            reason=" ".join(str(error).split()),
        ) from error
    if not trust:
        _refuse(folder, {node.op for meta in model.meta_graphs for node in _all_nodes(meta)} - _KNOWN)
    serving = [meta for meta in model.meta_graphs if "serve" in meta.meta_info_def.tags] or list(model.meta_graphs)
    if not serving:
        raise ModelError(f"{folder / GRAPH} holds no graph. Copy it again.", code="file-damaged", path=str(folder))
    return serving[0]


_KNOWN = operations.RUNNING | operations.VARIABLES | operations.IDLE


def _shown(names: list[str]) -> str:
    """Names from the file, for a message."""
    return ", ".join(name if re.fullmatch(r"[\w./>-]+", name, re.ASCII) else repr(name)[:80] for name in names)


def _refuse(folder: Path, found: set[str]) -> None:
    if found:
        raise ModelError(
            f"the SavedModel {folder} holds operations that do more than compute, or that convscope does not know "
            f"({_shown(sorted(found)[:4])}). If you trust it, give {option('trust=True')} to run it.",
            code="needs-trust",
            path=str(folder),
            names=sorted(found),
        )


def _all_nodes(meta: Message) -> Iterator[Message]:
    yield from meta.graph_def.node
    for function in meta.graph_def.library.function:
        yield from function.node_def


def _signature(folder: Path, meta: Message) -> tuple[str, Message]:
    taking = {name: found for name, found in meta.signature_def.items() if _takes_image(found)}
    if not taking:
        found = _shown([name for name in meta.signature_def if not name.startswith("__")]) or "none"
        raise ModelError(
            f"the SavedModel {folder} has no signature that takes one image (n, h, w, c); its signatures: {found}.",
            code="no-signature",
            path=str(folder),
            found=found,
        )
    name = "serving_default" if "serving_default" in taking else next(iter(taking))
    return name, taking[name]


def _takes_image(signature: Message) -> bool:
    inputs = list(signature.inputs.values())
    return len(inputs) == 1 and len(inputs[0].tensor_shape.dim) == 4 and bool(signature.outputs)


class _Extraction:
    """The part of a graph that the outputs of a signature need, written anew.

    Attributes:
        variables: the variables in it, by node.
    """

    def __init__(self, folder: Path, graph: Message, trust: bool) -> None:
        self.folder, self.trust = folder, trust
        self.nodes = {node.name: node for node in graph.node}
        self.functions = {function.signature.name: function for function in graph.library.function}
        self.variables: dict[str, Json] = {}
        self._producer = graph.versions.producer
        self._prefix = f"convscope_{hashlib.sha256(graph.SerializeToString()).hexdigest()[:16]}_"
        self._sizes: dict[str, int] = {}  # nodes of a function and of those that it calls

    def taken(self, image: str, outputs: list[str]) -> Message:
        """The GraphDef from the tensor `image` to `outputs`."""
        from tensorflow.core.framework import graph_pb2

        kept = self._needed(_node_of(image), [_node_of(tensor) for tensor in outputs])
        total = sum(1 + self._called(node, ()) for node in kept)
        if total > limits.current().nodes:
            raise ModelError(
                f"the SavedModel {self.folder} has too many operations, {total:,} with its functions in place "
                f"({limits.how_to_raise('nodes')}).",
                code="input-too-large",
                limit="nodes",
            )
        graph = graph_pb2.GraphDef()
        graph.versions.producer = self._producer
        for node in kept:
            graph.node.append(self._standing(node) if node.name in self.variables else _plain(node, self._prefix))
        for name in self._sizes:
            graph.library.function.append(_plain_function(self.functions[name], self._prefix))
        return graph

    def _needed(self, image: str, outputs: list[str]) -> list[Message]:
        found: dict[str, Message] = {}
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            node = self.nodes.get(name)
            if node is None:
                raise ModelError(
                    f"{self.folder / GRAPH} is damaged: it lacks its operation {name!r}. Copy it again.",
                    code="file-damaged",
                    path=str(self.folder),
                    name=name,
                )
            found[name] = node
            if node.op in operations.VARIABLES:
                self.variables[name] = node
            elif name != image:
                self._check(node, operations.RUNNING)
                waiting += [_node_of(tensor) for tensor in node.input]
        return [node for name, node in self.nodes.items() if name in found]

    def _check(self, node: Message, allowed: frozenset[str]) -> None:
        if not self.trust:
            _refuse(self.folder, {node.op} - allowed)
        if node.op in ("Placeholder", "PlaceholderV2"):
            raise ModelError(
                f"the SavedModel {self.folder} needs a value for {node.name!r}, which no signature names.",
                code="placeholder-unfed",
                path=str(self.folder),
                name=node.name,
            )
        if node.op == "Const":
            _check_constant(node, self.folder)

    def _called(self, node: Message, around: tuple[str, ...]) -> int:
        """How many nodes the functions that a node calls have, once each call is written out."""
        return sum(self._expanded(name, around) for name in _functions_of(node))

    def _expanded(self, name: str, around: tuple[str, ...]) -> int:
        if name in around or len(around) > limits.current().depth:
            raise ModelError(
                f"the SavedModel {self.folder} has functions that call themselves, so it may never end.",
                code="function-recursive",
                path=str(self.folder),
                name=name,
            )
        if name not in self._sizes:
            function = self.functions.get(name)
            if function is None:
                raise ModelError(
                    f"{self.folder / GRAPH} is damaged: it lacks its function {name!r}. Copy it again.",
                    code="file-damaged",
                    path=str(self.folder),
                    name=name,
                )
            for node in function.node_def:
                self._check(node, operations.RUNNING)
            self._sizes[name] = sum(1 + self._called(node, (*around, name)) for node in function.node_def)
        return self._sizes[name]

    @staticmethod
    def _standing(node: Message) -> Message:
        """A placeholder where a variable was."""
        from tensorflow.core.framework import node_def_pb2, types_pb2

        made = node_def_pb2.NodeDef(name=node.name, op="Placeholder")
        made.attr["dtype"].type = types_pb2.DT_RESOURCE if node.op == "VarHandleOp" else node.attr["dtype"].type
        return made


def _node_of(tensor: str) -> str:
    return tensor.removeprefix("^").split(":")[0]


def _functions_of(node: Message) -> list[str]:
    return [called.name for called in _calls(node)]


def _calls(node: Message) -> list[Message]:
    values = node.attr.values()
    named = [value.func for value in values if value.HasField("func")]
    return named + [item for value in values for item in value.list.func]


def _check_constant(node: Message, folder: Path) -> None:
    """One number can stand for a tensor of any size: that size is checked. Other things than values are refused."""
    tensor = node.attr["value"].tensor
    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    total, held = prod(sizes), tensor.ByteSize()
    if any(size < 0 for size in sizes) or total > 2**24 + 8 * held:
        raise ModelError(
            f"the SavedModel {folder} has a constant of the shape {tuple(sizes)} in {held} bytes.",
            code="file-invalid",
            path=str(folder),
            shape=list(sizes),
        )
    if tensor.resource_handle_val or tensor.variant_val:
        raise ModelError(
            f"the SavedModel {folder} has a constant that is no value ({node.name!r}).",
            code="file-invalid",
            path=str(folder),
            name=node.name,
        )


def _plain(node: Message, prefix: str) -> Message:
    """A node without its attributes for devices, compilers and gradients; functions get names that no other file has.

    What assigns to a variable does nothing: in convscope's passes the state of a network doesn't change.
    """
    if node.op in operations.ASSIGNING:
        return type(node)(name=node.name, op="NoOp", input=[name for name in node.input if name.startswith("^")])
    made = type(node)()
    made.CopyFrom(node)
    made.device = ""
    made.ClearField("experimental_debug_info")
    made.ClearField("experimental_type")
    for key in [key for key in made.attr if key.startswith("_")]:
        del made.attr[key]
    for called in _calls(made):
        called.name = prefix + called.name
        called.ClearField("attr")  # which could name others
    return made


def _plain_function(function: Message, prefix: str) -> Message:
    made = type(function)()
    made.signature.CopyFrom(function.signature)
    made.signature.name = prefix + function.signature.name
    for key, value in function.ret.items():
        made.ret[key] = value
    for key, value in function.control_ret.items():
        made.control_ret[key] = value
    made.node_def.extend(_plain(node, prefix) for node in function.node_def)
    return made


# -- which variable has which name in the checkpoint -------------------------------------------------------


def _keys(meta: Message, reader: Message) -> dict[str, str]:
    """Names in the checkpoint by variable node.

    From TensorFlow 2 on the objects of a file say it: they come first, as for TensorFlow's own loader.
    """
    keys = _restored(meta.graph_def)
    if reader.has_tensor(_OBJECTS) and meta.object_graph_def.nodes:
        keys.update(_of_objects(meta, reader.get_tensor(_OBJECTS)))
    return keys


_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"


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
        for name in _functions_of(node):
            known = meta.object_graph_def.concrete_functions
            bound = known[name].bound_inputs if name in known else ()
            inputs = [_node_of(tensor) for tensor in node.input if not tensor.startswith("^")]
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
        for name in _functions_of(node):
            function = functions.get(name)
            if function is None or not any(inner.op == "RestoreV2" for inner in function.node_def):
                continue
            arguments = [argument.name for argument in function.signature.input_arg]
            outside = dict(zip(arguments, (_node_of(tensor) for tensor in node.input), strict=False))
            found.update(_assigned({inner.name: inner for inner in function.node_def}, outside))
    return found


def _assigned(nodes: Mapping[str, Message], outside: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variable and checkpoint name, for each assignment of an output of RestoreV2."""
    for node in nodes.values():
        if node.op in ("Assign", "AssignVariableOp") and len(node.input) >= 2:
            variable = _node_of(node.input[0])
            key = _read_from(node.input[1], nodes)
            if key is not None:
                yield outside.get(variable, variable), key


def _read_from(tensor: str, nodes: Mapping[str, Message]) -> str | None:
    """The name in the checkpoint from which a tensor comes, through copies alone."""
    for _ in range(8):
        node = nodes.get(_node_of(tensor))
        if node is not None and node.op == "Identity" and node.input:
            tensor = node.input[0]
            continue
        if node is None or node.op != "RestoreV2" or len(node.input) < 3:
            return None
        names, slices = (_texts(nodes.get(_node_of(name))) for name in node.input[1:3])
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


def _values(folder: Path, meta: Message, nodes: list[str]) -> dict[str, np.ndarray]:
    """Values from the checkpoint by variable node.

    Raises:
        ModelError: it lacks one, or holds less than it declares.
    """
    import tensorflow as tf

    if not nodes:
        return {}
    held = sum(_size(path) for path in parts(folder))
    try:
        # Not `load_checkpoint`: where the name is a folder, it follows a file in it to a checkpoint anywhere.
        reader = tf.compat.v1.train.NewCheckpointReader(str(folder / _CHECKPOINT))
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
            f"the SavedModel {folder} is not whole: its variables/ lack {_shown(lacking[:3])}. Copy it again, or "
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


def _try(found: dict[str, Json], folder: Path) -> None:
    """Build the program and run it once on a blank image, so that a crash or an endless loop happens in the reader."""
    import tensorflow as tf

    trial = Program(**found)
    try:
        built = function(trial, {name: tf.Variable(value) for name, value in trial.variables.items()})
    except Exception as error:  # TensorFlow raises what its importer raises
        raise _damaged(folder, " ".join(str(error).split())[:200]) from error
    sizes = [size or usual for size, usual in zip(trial.shape, _USUAL, strict=True)]
    if prod(sizes) > limits.current().pixels:
        return
    try:
        built(tf.zeros(sizes, trial.dtype))
    except tf.errors.ResourceExhaustedError:
        raise MemoryError from None
    except Exception as error:  # TensorFlow raises what its operations raise
        if None in trial.shape[1:]:  # another size may fit
            return
        raise _damaged(folder, " ".join(str(error).split())[:200]) from error
