"""The content of an ONNX file, as plain values: read, checked against `limits` and copied out of protobuf.

Nothing of onnx's compiled code sees the file but the parser of protobuf, which runs in the reader process first. What
leaves this module are texts that are text, arrays whose bytes are there, and functions that end.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from convscope import isolation, limits, reading
from convscope.errors import ModelError, Unreadable, one_line
from convscope.networks.foreign import Attribute, Message
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.files import beside
from convscope.networks.formats.onnx.content import Body, FileNode, Input, OnnxFile, Shape
from convscope.networks.formats.onnx.expansion import check_expansion


def read(path: Path) -> OnnxFile:
    """The content of a file.

    Raises:
        ModelError: it is damaged, lacks its external data, or goes beyond the limits.
    """
    return of_model(_parsed(path), path)


def of_model(model: Message, path: Path) -> OnnxFile:
    """The content of a `ModelProto` that was read from `path`.

    Raises:
        ModelError: it is damaged, lacks its external data, or goes beyond the limits.
    """
    file = _Reading(path).file(model)
    check_expansion(file)
    return file


# -- the bytes -------------------------------------------------------------------------------------------

LARGEST = 2**31 - 1  # protobuf's own limit
_ROOM, _TIMES = 256 * 2**20, 3  # memory that parsing may take: this much, and so often the file's size


def _parsed(path: Path) -> Message:
    size = path.stat().st_size
    if size > LARGEST:
        raise ModelError(
            f"{path} has {size} bytes, and an ONNX file can't have more than 2 GiB.",
            code="file-invalid",
            path=str(path),
            found=size,
        )
    if size > limits.current().weights:
        raise ModelError(
            f"{path} has {size} bytes, more than is read ({limits.how_to_raise('weights')}).",
            code="input-too-large",
            limit="weights",
        )
    try:
        isolation.call("convscope.networks.formats.onnx.files:parse", path, memory=_ROOM + _TIMES * size)
        model = onnx.ModelProto.FromString(path.read_bytes())
    except ModelError:
        raise
    except Exception as error:  # the reader and protobuf have their own errors
        raise damaged(path, error, " as ONNX") from error
    if not model.graph.node:
        raise ModelError(
            f"{path} holds no ONNX graph: it is damaged, or of another format. Copy or download it again.",
            code="file-damaged",
            path=str(path),
        )
    return model


def parse(path: str) -> None:
    """Parse a file and let go of it: run in the reader, where this may take too much, or crash.

    Raises:
        ModelError: it is no ONNX.
    """
    try:
        onnx.ModelProto.FromString(Path(path).read_bytes())
    except MemoryError:
        raise
    except Exception as error:
        raise damaged(Path(path), error, " as ONNX") from error


# -- from protobuf to plain values -----------------------------------------------------------------------


class _Reading:
    """One file being read. It counts what it has read, and knows where it is, for messages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limits = limits.current()
        self._nodes = self._tensors = self._held = 0
        self._widened = False
        self._others: set[str] = set()
        self._where = "its head"

    def file(self, model: Message) -> OnnxFile:
        """The whole file.

        Raises:
            ModelError: it is damaged, or goes beyond the limits.
        """
        with self._damage():
            opsets = self._opsets(model.opset_import)
            made_by = " ".join(filter(None, self._texts((model.producer_name, model.producer_version))))
            functions = {self._calls(item, "name"): self._function(item) for item in model.functions}
            if len(functions) < len(model.functions):
                raise self._damaged("two functions have the same name")
            graph = self._graph(model.graph, 0)
            inputs = self._inputs(model.graph, graph)
        return OnnxFile(
            self._path,
            graph,
            inputs,
            functions,
            opsets.get("", 1),
            model.ir_version,
            made_by[:80],
            self._held,
            self._widened,
            tuple(sorted(self._others)),
        )

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn protobuf's errors on unexpected content into one clear error."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise self._damaged("it has a name that is no UTF-8 text") from error
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise self._damaged(one_line(error)[:160]) from error

    def _damaged(self, what: str) -> ModelError:
        return ModelError(
            f"{self._path} is damaged at {self._where}: {what}. Copy or download it again.",
            code="file-damaged",
            path=str(self._path),
            name=self._where,
            reason=what,
        )

    def _beyond(self, what: str, name: str) -> ModelError:
        return ModelError(f"{self._path} {what} ({limits.how_to_raise(name)}).", code="input-too-large", limit=name)

    def _text(self, value: Message) -> str:
        """A text of the file; protobuf gives bytes, or raises, where it is none."""
        if not isinstance(value, str):
            raise self._damaged("it has a name that is no UTF-8 text")
        return value

    def _texts(self, values: Iterable[object]) -> tuple[str, ...]:
        return tuple(self._text(value) for value in values)

    def _opsets(self, imports: Iterable[Message]) -> dict[str, int]:
        found = {_domain(self._text(item.domain)): int(item.version) for item in imports}
        newest = onnx.defs.onnx_opset_version()
        version = found.get("", 1)
        if not 1 <= version <= newest:
            raise ModelError(
                f"{self._path} is of operator set {version}; the onnx that is installed knows 1 to {newest}. Export it "
                "with one of those, or run: pip install --upgrade onnx",
                code="version-unsupported",
                path=str(self._path),
                found=version,
                expected=newest,
            )
        return found

    def _function(self, item: Message) -> Body:
        self._where = f"the function {item.name!r}"
        defaults: dict[str, object] = dict.fromkeys(self._texts(item.attribute))
        attributes, _ = self._attributes(item.attribute_proto, 0)
        names = self._texts(item.input), self._texts(item.output)
        nodes = tuple(self._node(node, 0) for node in item.node)
        return Body(*names, {}, nodes, defaults | attributes, self._opsets(item.opset_import).get(""))

    def _calls(self, item: Message, name: str) -> tuple[str, str, str]:
        """The key of a node or a function: domain, name and, since IR version 10, overload."""
        domain, own, overload = self._texts((item.domain, getattr(item, name), getattr(item, "overload", "")))
        return _domain(domain), own, overload

    def _graph(self, graph: Message, depth: int) -> Body:
        if depth > self._limits.depth:
            raise self._beyond("nests graphs too deep", "depth")
        self._where = "its graph" if not depth else self._where
        if graph.sparse_initializer:
            raise ModelError(
                f"{self._path} holds sparse tensors, which convscope does not read. Save it with dense ones.",
                code="sparse-tensors",
                path=str(self._path),
            )
        constants: dict[str, np.ndarray] = {}
        for tensor in graph.initializer:
            name = self._text(tensor.name)
            if name in constants:
                raise self._damaged(f"two tensors are called {name!r}")
            constants[name] = self._tensor(tensor, name)
        nodes = tuple(self._node(node, depth) for node in graph.node)
        inputs, outputs = (self._texts(value.name for value in values) for values in (graph.input, graph.output))
        return Body(inputs, outputs, constants, nodes)

    def _node(self, node: Message, depth: int) -> FileNode:
        self._nodes += 1
        if self._nodes > self._limits.nodes:
            raise self._beyond(f"has more than {self._limits.nodes} nodes", "nodes")
        self._where = f"the node number {self._nodes}"
        inputs, outputs = self._texts(node.input), self._texts(node.output)
        name = self._text(node.name)
        read = FileNode(
            name, *self._calls(node, "op_type"), inputs, outputs, *self._attributes(node.attribute, depth, node)
        )
        if not any(outputs):
            self._where = read.where
            raise self._damaged("it makes nothing")
        return read

    def _attributes(
        self, items: Iterable[Message], depth: int, node: Message = None
    ) -> tuple[dict[str, Attribute], dict[str, str]]:
        values: dict[str, Attribute] = {}
        references: dict[str, str] = {}
        for item in items:
            name, reference = self._texts((item.name, item.ref_attr_name))
            if node is not None:
                self._where = f"the attribute {name!r} of {(node.name or node.op_type)!r}"
            if reference:
                references[name] = reference
            else:
                values[name] = self._value(item, depth)
        return values, references

    def _value(self, item: Message, depth: int) -> object:
        kind = item.type or _kind_of(item)
        if kind == _T.STRING:
            return item.s.decode(errors="replace")
        if kind == _T.TENSOR:
            return self._tensor(item.t, item.name)
        if kind == _T.GRAPH:
            return self._graph(item.g, depth + 1)
        if kind == _T.STRINGS:
            return [text.decode(errors="replace") for text in item.strings]
        plain = _NUMBERS.get(kind)
        if plain is None:
            return None  # several tensors or graphs, sparse ones, types: no operator here takes them
        value = getattr(item, plain)
        return value if isinstance(value, int | float) else list(value)

    # inputs ----------------------------------------------------------------------------------------

    def _inputs(self, graph: Message, read: Body) -> dict[str, Input]:
        found: dict[str, Input] = {}
        for value in graph.input:
            self._where = f"the input {value.name!r}"
            if not self._text(value.name):
                raise self._damaged("an input has no name")
            if value.name in found:
                raise self._damaged("two inputs have this name")
            if value.name not in read.constants:
                found[value.name] = self._input(value)
        return found

    def _input(self, value: Message) -> Input:
        what = value.type.WhichOneof("value") or "tensor_type"
        if what != "tensor_type" or value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            kind = "text" if what == "tensor_type" else what.removesuffix("_type")
            raise ModelError(
                f"{self._path} takes {kind} at its input {value.name!r}; convscope feeds tensors of numbers only.",
                code="input-not-numbers",
                path=str(self._path),
                name=value.name,
                found=kind,
            )
        return Input(_shape(value.type.tensor_type), value.type.tensor_type.elem_type)

    # tensors ---------------------------------------------------------------------------------------

    def _tensor(self, tensor: Message, name: str) -> np.ndarray:
        """An array of its own, once its bytes are known to be there."""
        self._where = f"the tensor {name!r}"
        self._tensors += 1
        if self._tensors > self._limits.entries:
            raise self._beyond(f"holds more than {self._limits.entries} tensors", "entries")
        if tensor.data_type == onnx.TensorProto.STRING:
            return np.zeros(0, np.float32)  # text: no operator here takes it
        if tensor.HasField("segment"):
            raise self._damaged("it comes in segments, which no ONNX library reads")
        bits = _BITS.get(tensor.data_type)
        if bits is None:
            raise self._damaged(f"its values are of the unknown type {tensor.data_type}")
        shape = [int(side) for side in tensor.dims]
        if any(side < 0 for side in shape):
            raise self._damaged(f"it has a negative side in its shape {shape}")
        self._take(shape, bits)
        return self._widened_or_same(self._array(tensor, shape, -(-math.prod(shape) * bits // 8)))

    def _take(self, shape: list[int], bits: int) -> None:
        """Count the bytes of a tensor; a side of 0 counts as 1, since NumPy bounds the other sides all the same."""
        size = math.prod(max(1, side) for side in shape) * bits // 8
        self._held += size
        if self._held > self._limits.weights:
            raise self._beyond(f"declares weights of over {self._held} bytes, up to {self._where}", "weights")

    def _array(self, tensor: Message, shape: list[int], size: int) -> np.ndarray:
        raw = tensor.raw_data if tensor.HasField("raw_data") else None
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raw = self._beside(tensor, size)
        if raw is None:
            return np.array(numpy_helper.to_array(tensor)).reshape(shape)
        if len(raw) != size:
            raise self._damaged(f"its shape {shape} takes {size} bytes, and there are {len(raw)}")
        if tensor.data_type in _PLAIN:
            return np.frombuffer(raw, _PLAIN[tensor.data_type]).reshape(shape).copy()
        plain = onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=raw)
        return np.array(numpy_helper.to_array(plain)).reshape(shape)

    def _widened_or_same(self, array: np.ndarray) -> np.ndarray:
        if array.dtype.name not in ("float16", "bfloat16"):
            return array
        self._widened = True
        return array.astype(np.float32)

    def _beside(self, tensor: Message, size: int) -> bytes:
        """The bytes of a tensor that lies in a file of its own, in the model's folder only."""
        said = {self._text(entry.key): self._text(entry.value) for entry in tensor.external_data}
        offset, length = (self._number(said, key, usual) for key, usual in (("offset", 0), ("length", size)))
        if length != size:
            raise self._damaged(f"its shape takes {size} bytes, and {length} are said to be in another file")
        try:
            place = self._place(said.get("location", ""))
            self._others.add(place.relative_to(self._path.parent).as_posix())
            with reading.opened(str(place)) as file:
                if offset + size > os.fstat(file.fileno()).st_size:
                    raise ModelError(
                        f"the weights beside {self._path} are cut off: {place.name!r} ends too early.",
                        code="file-damaged",
                        path=str(place),
                    )
                file.seek(offset)
                return file.read(size)
        except (OSError, Unreadable) as error:
            raise ModelError(
                f"the weights beside {self._path} can't be read ({one_line(error)[:160]}).",
                code="file-unreadable",
                path=str(self._path),
                reason=one_line(error)[:160],
            ) from error

    def _place(self, name: str) -> Path:
        """Where a file of weights lies; also through links it has to be inside of the model's folder."""
        place = beside(self._path.parent, name)
        if place is None:
            raise ModelError(
                f"{self._path} keeps its weights outside of its folder, in {name!r}, which is not read. "
                "Put them beside it, as a file and not as a link, and save the model anew.",
                code="weights-outside",
                path=str(self._path),
                name=name,
            )
        if not os.path.isfile(place):  # not there, or a pipe or a device
            raise ModelError(
                f"{self._path} keeps its weights in {name!r}, which is not beside it. Put it into the folder.",
                code="weights-missing",
                path=str(self._path),
                name=name,
            )
        return place

    def _number(self, said: Mapping[str, str], key: str, usual: int) -> int:
        text = said.get(key)
        if text is None:
            return usual
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise self._damaged(f"its {key} in another file is {text[:40]!r}, which is no number")
        return int(text)


_T = onnx.AttributeProto
_FIELDS = {"f": _T.FLOAT, "i": _T.INT, "s": _T.STRING, "t": _T.TENSOR, "g": _T.GRAPH}
_NUMBERS: dict[int, str] = {_T.FLOAT: "f", _T.INT: "i", _T.FLOATS: "floats", _T.INTS: "ints"}
_LISTS = {"floats": _T.FLOATS, "ints": _T.INTS, "strings": _T.STRINGS}


def _kind_of(item: Message) -> int:
    """The type of an attribute that declares none, as the first exporters wrote them."""
    single = next((kind for name, kind in _FIELDS.items() if item.HasField(name)), 0)
    return single or next((kind for name, kind in _LISTS.items() if len(getattr(item, name))), 0)


# Bits of a value, by the numbers that ONNX gives to types.
_BITS = {
    **{1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16},
    **{17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2},
}
_PLAIN = {
    **{1: "<f4", 2: "<u1", 3: "<i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"},
    **{12: "<u4", 13: "<u8", 14: "<c8", 15: "<c16"},
}


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _shape(kind: Message) -> Shape | None:
    if not kind.HasField("shape"):
        return None
    return tuple(
        side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in kind.shape.dim
    )
