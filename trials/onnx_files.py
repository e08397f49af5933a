"""Malformed ONNX files, each from a seed: valid models of several kinds, damaged in their bytes, fields or graph.

path = generate(random.Random(7), Path("somewhere"))
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from onnx import TensorProto, helper, numpy_helper

SIDE = 16
# Integers at the limits of the expected ranges.
EDGES = (0, 1, -1, 2, 3, 5, 7, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32, 2**35, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = (
    "",
    "x",
    "w",
    "out",
    "self",
    "forward",
    "training",
    "a.b",
    "../x",
    "\x1b[31m",
    "\u202e",
    "é",
    "NaN",
    "a" * 5000,
)


def generate(rng: random.Random, folder: Path) -> Path:
    """Write one model file, most likely a malformed one, with whatever lies beside it.

    Args:
        rng: decides everything.
        folder: an empty folder of its own.
    """
    model = rng.choice(MODELS)(rng)
    path = folder / "net.onnx"
    if rng.random() < 0.15:
        _beside(rng, model, path)
        return path
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        rng.choice((_change_field, _change_field, _change_graph))(rng, model)
    data = model.SerializeToString()
    path.write_bytes(_changed_bytes(rng, data) if rng.random() < 0.2 else data)
    return path


# -- valid models ----------------------------------------------------------------------------------------


def _node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, outputs, name=f"{operator.lower()}_{outputs[0]}", **attributes)


def _value(name: str, shape: Any = None, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _drawn(rng: random.Random, *shape: int) -> np.ndarray:
    return np.random.default_rng(rng.randrange(2**32)).normal(0, 0.3, shape).astype(np.float32)


def _model(nodes: list[Any], arrays: dict[str, Any], out: str = "out", **more: Any) -> Any:
    """A model of an image "x", and of `more["inputs"]`."""
    graph = helper.make_graph(
        nodes,
        "net",
        [_value("x", more.pop("shape", (1, 3, SIDE, SIDE))), *more.pop("inputs", [])],
        [_value(out)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    domains = {"": more.pop("opset", 17), **more.pop("domains", {})}
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], **more)
    model.ir_version = 8
    return model


def _plain(rng: random.Random) -> Any:
    """Convolution, norm, ReLU, pooling, a shape taken from a tensor, dense, softmax."""
    arrays = {
        **{"w": _drawn(rng, 4, 3, 3, 3), "b": _drawn(rng, 4), "d": _drawn(rng, 5, 4), "e": _drawn(rng, 5)},
        **{"scale": np.ones(4, np.float32), "shift": np.zeros(4, np.float32), "mean": np.zeros(4, np.float32)},
        **{"variance": np.ones(4, np.float32), "zero": np.array([0]), "minus": np.array([-1])},
    }
    nodes = [
        _node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        _node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"]),
        _node("Relu", ["n"], ["r"]),
        _node(rng.choice(("MaxPool", "AveragePool")), ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        _node("GlobalAveragePool", ["p"], ["g"]),
        _node("Shape", ["g"], ["s"]),
        _node("Gather", ["s", "zero"], ["first"], axis=0),
        _node("Concat", ["first", "minus"], ["target"], axis=0),
        _node("Reshape", ["g", "target"], ["f"]),
        _node("Gemm", ["f", "d", "e"], ["l"], transB=1),
        _node("Softmax", ["l"], ["out"], axis=1),
    ]
    return _model(nodes, arrays, opset=rng.choice((9, 11, 13, 17, 20)))


def _numbers(rng: random.Random) -> Any:
    """Operators that take shapes and amounts from tensors, known or computed; amounts may be huge."""

    def amount(usual: list[int]) -> np.ndarray:
        return np.array([rng.choice(EDGES) if rng.random() < 0.25 else value for value in usual], np.int64)

    arrays = {
        **{"w": _drawn(rng, 4, 3, 3, 3), "shape": amount([1, 3, SIDE, SIDE]), "repeats": amount([1, 1, 2, 2])},
        **{"pads": amount([0, 0, 1, 1, 0, 0, 1, 1]), "sizes": amount([1, 3, 32, 32]), "none": np.zeros(0, np.float32)},
        **{"start": amount([0])[0], "end": amount([SIDE])[0], "step": amount([1])[0], "depth": amount([4])[0]},
        **{"scales": np.array([1, 1, rng.choice((0, 0.5, 2, 1e9, float("nan"))), 2], np.float32)},
        **{"onoff": np.array([0, 1], np.float32), "places": np.array([0, 1, 2])},
    }
    choices = [
        _node("Expand", ["x", "shape"], ["y"]),
        _node("Tile", ["x", "repeats"], ["y"]),
        _node("Pad", ["x", "pads"], ["y"], mode=rng.choice(("constant", "reflect", "edge", "wrap"))),
        _node("Resize", ["x", "none", "none", "sizes"], ["y"], mode=rng.choice(("nearest", "linear", "cubic"))),
        _node("Resize", ["x", "none", "scales"], ["y"], mode="nearest"),
        _node("Reshape", ["x", "shape"], ["y"]),
    ]
    makers = [
        [_node("ConstantOfShape", ["shape"], ["made"]), _node("Add", ["x", "made"], ["y"])],
        [_node("Range", ["start", "end", "step"], ["i"]), _node("Cast", ["i"], ["made"], to=1), _mul("made")],
        [_node("OneHot", ["places", "depth", "onoff"], ["hot"]), _node("ReduceSum", ["hot"], ["made"]), _mul("made")],
        [_node("ReduceMax", ["x"], ["m"]), _node("Cast", ["m"], ["i"], to=7), *_computed()],
    ]
    first = [rng.choice(choices)] if rng.random() < 0.6 else rng.choice(makers)
    return _model([*first, _node("Conv", ["y", "w"], ["out"])], arrays, opset=rng.choice((13, 18)))


def _mul(name: str) -> Any:
    return _node("Mul", ["x", name], ["y"])


def _computed() -> list[Any]:
    """A size that depends on the pixels."""
    return [
        _node("Mul", ["i", "end"], ["big"]),
        _node("Concat", ["big", "places"], ["sides"], axis=0),
        _node("ConstantOfShape", ["sides"], ["made"]),
        _node("ReduceSum", ["made"], ["total"]),
        _mul("total"),
    ]


def _functions(rng: random.Random) -> Any:
    """Functions that call functions, some of them deep, wide or in a circle."""
    levels, width = rng.choice(((1, 1), (2, 2), (5, 2), (26, 2), (150, 1), (8, 9))), rng.random()
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    last = [_node("Conv", ["a", "w"], ["c"], pads=[1, 1, 1, 1]), _node("Relu", ["c"], ["b"])]
    functions = [helper.make_function("own", "F0", ["a", "w"], ["b"], last, imports)]
    for level in range(1, levels[0] + 1):
        names = ["a", *(f"t{i}" for i in range(levels[1] - 1)), "b"]
        body = [
            helper.make_node(f"F{level - 1}", [one, "w"], [two], f"call{level}", domain="own")
            for one, two in itertools.pairwise(names)
        ]
        functions.append(helper.make_function("own", f"F{level}", ["a", "w"], ["b"], body, imports))
    if width < 0.15:
        functions[0].node.append(helper.make_node(f"F{levels[0]}", ["b", "w"], ["again"], domain="own"))
    call = helper.make_node(f"F{levels[0]}", ["x", "w"], ["out"], "outer", domain="own")
    return _model([call], {"w": _drawn(rng, 3, 3, 3, 3)}, domains={"own": 1}, functions=functions)


def _branches(rng: random.Random) -> Any:
    """Branches in branches, and loops."""
    inner = helper.make_graph([_node("Relu", ["c"], ["deep"])], "deepest", [], [_value("deep")])
    for level in range(rng.choice((1, 2, 10, 30))):
        other = helper.make_graph([_node("Neg", ["c"], [f"n{level}"])], "other", [], [_value(f"n{level}")])
        node = _node("If", ["yes"], [f"i{level}"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([node], "branch", [], [_value(f"i{level}")])
    ends = [
        _node("If", [rng.choice(("yes", "no"))], ["out"], then_branch=inner, else_branch=inner),
        _node("Loop", ["many", "yes", "c"], ["out"], body=_loop_body()),
    ]
    arrays = {"w": _drawn(rng, 4, 3, 3, 3), "yes": np.array(True), "no": np.array(False), "many": np.array(2**62)}
    return _model([_node("Conv", ["x", "w"], ["c"]), rng.choice(ends)], arrays)


def _loop_body() -> Any:
    inputs = [_value("i", (), TensorProto.INT64), _value("on", (), TensorProto.BOOL), _value("v")]
    outputs = [_value("on", (), TensorProto.BOOL), _value("r")]
    return helper.make_graph([_node("Relu", ["v"], ["r"])], "body", inputs, outputs)


def _two_inputs(rng: random.Random) -> Any:
    """A second input, of some name, rank and type."""
    name, kind = rng.choice(("self", "forward", "size", "0", "")), rng.choice((1, 6, 7, 9, 10, 11))
    shape = rng.choice(((), (1,), (2,), (1, 4), (None, 4, 1, 1), (1, 4, 2**33, 2**33), (0,), None))
    nodes = [
        _node("Conv", ["x", "w"], ["c"]),
        _node("Cast", [name], ["f"], to=1),
        _node("ReduceSum", ["f"], ["s"]),
        _node("Add", ["c", "s"], ["out"]),
    ]
    return _model(nodes, {"w": _drawn(rng, 4, 3, 3, 3)}, inputs=[_value(name, shape, kind)])


def _declared(rng: random.Random) -> Any:
    """An input of another shape than usual."""
    shape: tuple[Any, ...] = tuple(
        rng.choice((None, 1, 3, SIDE, 0, "n", 2**20, 2**40)) for _ in range(rng.choice((4, 4, 3, 5)))
    )
    return _model([_node("Conv", ["x", "w"], ["out"])], {"w": _drawn(rng, 4, 3, 3, 3)}, shape=shape)


def _operators(rng: random.Random) -> Any:
    """A chain of operators with whatever inputs and attributes come."""
    schemas = [schema for schema in onnx.defs.get_all_schemas() if schema.domain == ""]
    names = ["x", "w", "i", "f", ""]
    nodes = []
    for number in range(rng.randint(1, 4)):
        schema = rng.choice(schemas)
        attributes = {
            key: value
            for key, item in schema.attributes.items()
            if rng.random() < 0.7 and (value := _some(rng, str(item.type))) is not None
        }
        inputs = [names[-1], *(rng.choice(names) for _ in range(min(4, schema.max_input) - 1))]
        nodes.append(_node(schema.name, inputs[: max(1, schema.max_input)], [f"t{number}"], **attributes))
        names.append(f"t{number}")
    arrays = {"w": _drawn(rng, 3, 3, 3, 3), "i": np.array([rng.choice(EDGES), 1, 2]), "f": _drawn(rng, 3)}
    return _model(nodes, arrays, out=names[-1], opset=onnx.defs.onnx_opset_version() - 1)


def _some(rng: random.Random, kind: str) -> Any:
    """A value for an attribute of some kind."""
    if kind.endswith("INTS"):
        return [rng.choice((1, 2, 3, *EDGES)) for _ in range(rng.choice((1, 2, 2, 2, 4, 4)))]
    if kind.endswith("INT"):
        return rng.choice((1, 2, 3, *EDGES))
    if kind.endswith("FLOAT"):
        return rng.choice((0.0, 1.0, -1.0, 1e-30, 1e30, float("nan"), float("inf")))
    if kind.endswith("STRING"):
        return rng.choice(("linear", "nearest", "SAME_UPPER", "VALID", "ij,jk->ik", *TEXTS))
    return numpy_helper.from_array(np.array([1.0], np.float32)) if kind.endswith("TENSOR") else None


MODELS: tuple[Callable[[random.Random], Any], ...] = (
    *(_plain, _numbers, _numbers, _functions, _branches, _two_inputs, _declared, _operators, _operators),
)


# -- damage ----------------------------------------------------------------------------------------------


def _messages(message: Any) -> Iterator[Any]:
    """A message and all inside of it."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if _is_repeated(field, value) else [value]:
                yield from _messages(inner)


def _is_repeated(field: Any, value: Any) -> bool:
    return hasattr(value, "append") or hasattr(value, "add")


def _change_field(rng: random.Random, model: Any) -> None:
    """Change, remove, repeat or exchange one field of one message."""
    message = rng.choice(list(_messages(model)))
    field = rng.choice(list(message.DESCRIPTOR.fields))
    value = getattr(message, field.name)
    try:
        if _is_repeated(field, value):
            _change_list(rng, field, value)
        elif rng.random() < 0.2:
            message.ClearField(field.name)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            value.SetInParent()
        else:
            setattr(message, field.name, _scalar(rng, field, model))
    except (ValueError, TypeError, UnicodeError):
        pass  # protobuf does not let this be written


def _change_list(rng: random.Random, field: Any, values: Any) -> None:
    action = rng.randrange(4)
    if action == 0 and len(values):
        del values[rng.randrange(len(values))]
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if action == 1 or not len(values):
            values.add()
        elif action == 2:
            values.add().CopyFrom(rng.choice(values))
        else:
            one, two = rng.choice(values), rng.choice(values)
            kept = type(one).FromString(one.SerializeToString())
            one.CopyFrom(type(two).FromString(two.SerializeToString()))
            two.CopyFrom(kept)
    elif action == 1 and len(values):
        values[rng.randrange(len(values))] = _scalar(rng, field, None)
    else:
        values.append(_scalar(rng, field, None))


def _scalar(rng: random.Random, field: Any, model: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        names = [] if model is None else [name for node in model.graph.node for name in (*node.input, *node.output)]
        return rng.choice((*TEXTS, *names))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 4, 100, 5000)))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.randrange(30)
    return rng.choice(EDGES)


def _change_graph(rng: random.Random, model: Any) -> None:
    """Damage that is well-formed: arcs, orders, operators and arities."""
    nodes = model.graph.node
    if not nodes:
        return
    node = rng.choice(nodes)
    names = [name for item in nodes for name in (*item.input, *item.output)] or ["x"]
    action = rng.randrange(7)
    if action == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif action == 1 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(names)
    elif action == 2:
        node.op_type = rng.choice(
            ("Relu", "Conv", "If", "Loop", "Scan", "Constant", "Split", "TopK", "Reshape", "Gemm", "LRN")
        )
    elif action == 3:
        del node.input[rng.randint(0, len(node.input)) :]
    elif action == 4:
        node.input.append(rng.choice(names))
    elif action == 5:
        node.output.append(f"more{rng.randrange(3)}")
    else:
        shuffled = list(range(len(nodes)))
        rng.shuffle(shuffled)
        kept = [type(nodes[i]).FromString(nodes[i].SerializeToString()) for i in shuffled]
        del nodes[:]
        nodes.extend(kept)


def _changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut, repeated or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place, action = rng.randrange(len(changed) or 1), rng.randrange(5)
        if action == 0 and changed:
            changed[place] = rng.randrange(256)
        elif action == 1:
            del changed[place : place + rng.choice((1, 2, 10, 1000))]
        elif action == 2:
            changed[place:place] = rng.randbytes(rng.choice((1, 3, 50)))
        elif action == 3:
            changed[place:place] = changed[place : place + rng.choice((2, 20, 500))]
        else:
            name = rng.choice((b"Conv", b"Relu", b"out", b"Gemm", b"net"))
            changed = bytearray(bytes(changed).replace(name, b"\xff" * len(name), 1))
    return bytes(changed)


def _beside(rng: random.Random, model: Any, path: Path) -> None:
    """Weights in a file of their own, with a wrong declaration."""
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    data = path.parent / "net.data"
    values = (
        "../net.data",
        "/etc/hostname",
        "/dev/zero",
        "net.data/x",
        ".",
        "",
        "C:\\x",
        "a\0b",
        "-1",
        "1e3",
        str(2**70),
    )
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if rng.random() < 0.1:
                entry.value = rng.choice((*values, *map(str, EDGES)))
        if rng.random() < 0.1 and tensor.dims:
            tensor.dims[0] = rng.choice(EDGES)
    path.write_bytes(model.SerializeToString())
    if data.exists() and rng.random() < 0.4:
        kept = data.read_bytes()
        data.unlink()
        rng.choice((_cut, _pipe, _link))(data, kept)


def _cut(data: Path, kept: bytes) -> None:
    data.write_bytes(kept[: len(kept) // 2])


def _pipe(data: Path, kept: bytes) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(data)


def _link(data: Path, kept: bytes) -> None:
    outside = data.parent.parent / "outside.data"
    outside.write_bytes(kept)
    data.symlink_to(outside)
