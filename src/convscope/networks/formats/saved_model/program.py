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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from convscope import isolation, limits
from convscope.errors import ModelError, option
from convscope.networks.foreign import Message, Tensor
from convscope.networks.formats.files import is_inside
from convscope.networks.formats.saved_model import operations
from convscope.networks.formats.saved_model.checkpoint import parts, size_of, values_of
from convscope.networks.formats.saved_model.nodes import calls, functions_of, node_of, shown
from convscope.schema import Json

GRAPH = "saved_model.pb"
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
    outside = [path for path in files if not trust and not is_inside(folder, path)]
    if outside:
        raise ModelError(
            f"the SavedModel's file {outside[0]} is a link out of its folder, and would be read from there. Copy the "
            f"folder with the files themselves (cp -rL), or, if you trust it, give {option('trust=True')}.",
            code="needs-trust",
            path=str(outside[0]),
        )
    size = sum(map(size_of, files))
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
    variables = values_of(Path(folder), meta, list(part.variables))
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


def _refuse(folder: Path, found: set[str]) -> None:
    if found:
        raise ModelError(
            f"the SavedModel {folder} holds operations that do more than compute, or that convscope does not know "
            f"({shown(sorted(found)[:4])}). If you trust it, give {option('trust=True')} to run it.",
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
    name = chosen_signature(folder, taking, [name for name in meta.signature_def if not name.startswith("__")])
    return name, taking[name]


def chosen_signature(folder: Path, taking: Collection[str], every: Sequence[str]) -> str:
    """The signature to run: "serving_default" where it takes one image, else the first that does.

    Args:
        folder: of the SavedModel.
        taking: the names of those that take one image.
        every: the names of all.

    Raises:
        ModelError: none does.
    """
    if not taking:
        found = shown(every) or "none"
        raise ModelError(
            f"the SavedModel {folder} has no signature that takes one image (n, h, w, c); its signatures: {found}.",
            code="no-signature",
            path=str(folder),
            found=found,
        )
    return "serving_default" if "serving_default" in taking else next(iter(taking))


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

        kept = self._needed(node_of(image), [node_of(tensor) for tensor in outputs])
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

    def _lacking(self, what: str, name: str) -> ModelError:
        return ModelError(
            f"{self.folder / GRAPH} is damaged: it lacks its {what} {name!r}. Copy it again.",
            code="file-damaged",
            path=str(self.folder),
            name=name,
        )

    def _needed(self, image: str, outputs: list[str]) -> list[Message]:
        found: dict[str, Message] = {}
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            node = self.nodes.get(name)
            if node is None:
                raise self._lacking("operation", name)
            found[name] = node
            if node.op in operations.VARIABLES:
                self.variables[name] = node
            elif name != image:
                self._check(node, operations.RUNNING)
                waiting += [node_of(tensor) for tensor in node.input]
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
        return sum(self._expanded(name, around) for name in functions_of(node))

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
                raise self._lacking("function", name)
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
    for called in calls(made):
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
