"""ONNX files with fields of their protocol buffer changed, or damaged in the ways that only ONNX files can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trials import mutations
from trials.models import case
from trials.outcomes import Case, Place


def generate(place: Place) -> Case:
    """An ONNX file, damaged at one of the levels."""
    import onnx

    rng, base = place.rng, place.base("onnx-*.onnx")
    data = base.read_bytes()
    chance = rng.random()
    if chance < 0.25:
        return case(place, "net.onnx", mutations.damaged(data, rng), f"{base.name}, damaged bytes")
    model = onnx.ModelProto.FromString(data)
    if chance < 0.6:
        what = "fields changed"
        mutations.mutated_message(model, place)
    else:
        what = rng.choice(list(_HOSTILE))
        _HOSTILE[what](model, place)
    return case(place, "net.onnx", model.SerializeToString(), f"{base.name}, {what}")


def _outside(model: Any, place: Place) -> None:
    """Weights that lie in another file."""
    tensor = place.rng.choice(list(model.graph.initializer))
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    where = place.rng.choice(
        (
            "../outside/weights.bin",
            str(place.outside / "weights.bin"),
            "../outside/pipe",
            "/dev/zero",
            ".",
            "",
            "a\0b",
            "net.onnx",
            "link",
        )
    )
    (place.folder / "link").symlink_to(place.outside / "weights.bin")
    for key, value in {
        "location": where,
        "offset": place.rng.choice(("0", "-1", "x", str(2**62))),
        "length": place.rng.choice(("16", str(2**40), "-1")),
    }.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _doubled(model: Any, place: Place) -> None:
    """26 functions, each of which calls the next twice."""
    from onnx import helper

    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    levels = place.rng.choice((26, 26, 200))
    for level in range(levels):
        calls = [
            helper.make_node(f"L{level + 1}", ["a" if half == 0 else "m"], ["m" if half == 0 else "c"], domain="own")
            for half in range(2)
        ]
        model.functions.append(helper.make_function("own", f"L{level}", ["a"], ["c"], calls, opset))
    last = (
        [helper.make_node("Relu", ["a"], ["c"])]
        if place.rng.random() < 0.7
        else [helper.make_node("L0", ["a"], ["c"], domain="own")]
    )
    model.functions.append(helper.make_function("own", f"L{levels}", ["a"], ["c"], last, opset))
    _instead(model, helper.make_node("L0", ["c"], ["r"], "doubled", domain="own"))


def _instead(model: Any, node: Any) -> None:
    """A node in place of the one that makes "r"."""
    for old in model.graph.node:
        if "r" in old.output:
            old.CopyFrom(node)


def _large(model: Any, place: Place) -> None:
    """A constant of many GiB, from a shape alone."""
    from onnx import TensorProto, helper

    rng = place.rng
    shape = rng.choice(([2**34], [2**20, 2**20], [2**62, 4], [-1], [65536, 65536, 4]))
    model.graph.initializer.append(helper.make_tensor("planted_shape", TensorProto.INT64, [len(shape)], shape))
    op = rng.choice(("ConstantOfShape", "Expand", "Tile", "Resize", "Pad", "Range", "OneHot"))
    inputs = {
        "ConstantOfShape": ["planted_shape"],
        "Resize": ["c", "", "", "planted_shape"],
        "Range": ["planted_shape"] * 3,
        "OneHot": ["planted_shape"] * 3,
    }.get(op, ["c", "planted_shape"])
    model.graph.node.insert(0, helper.make_node(op, inputs, ["planted"], "planted"))
    if rng.random() < 0.7:
        _instead(model, helper.make_node("Add", ["c", "planted"], ["r"], "add"))


def _input(model: Any, place: Place) -> None:
    """An input of a size that does not fit into memory, or of an odd type."""
    rng, kind = place.rng, model.graph.input[0].type.tensor_type
    if rng.random() < 0.2:
        kind.elem_type = rng.choice((0, 7, 8, 9, 10, 16, 99))
    for dim in list(kind.shape.dim)[rng.randrange(3) :]:
        dim.dim_value = rng.choice((2**31, 2**40, 65536, 0, -1, 3))


def _deep(model: Any, place: Place) -> None:
    """Branches inside of branches."""
    from onnx import TensorProto, helper

    levels = place.rng.choice((5, 20, 30))  # protocol buffers themselves end at 100 messages
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    node = helper.make_node("Relu", ["c"], ["r"])
    for level in range(levels):
        out = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], f"g{level}", [], [out])
        node = helper.make_node(
            "If",
            ["yes"],
            ["r"],
            then_branch=graph,
            else_branch=graph
            if level < 3
            else helper.make_graph([helper.make_node("Relu", ["c"], ["r"])], "e", [], [out]),
        )
    _instead(model, node)


def _loop(model: Any, place: Place) -> None:
    """A loop without an end."""
    from onnx import TensorProto, helper

    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.initializer.append(
        helper.make_tensor("many", TensorProto.INT64, [], [place.rng.choice((2**62, 10**9, 3))])
    )
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("a", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, None)],
    )
    _instead(model, helper.make_node("Loop", ["many", "yes", "c"], ["r"], "loop", body=body))


def _ring(model: Any, place: Place) -> None:
    """Nodes that wait for each other, twice the same output, or names of strange characters."""
    node = place.rng.choice(list(model.graph.node))
    what = place.rng.randrange(3)
    if what == 0:
        node.input[0] = "out"
    elif what == 1:
        node.output[0] = place.rng.choice(("x", "k", "out", ""))
    else:
        node.name = mutations.odd_text(place).encode("utf-8", "replace").decode()
        node.op_type = place.rng.choice((node.op_type, "\x1b[31mOp", "__class__", "", "\u202eConv", "a" * 5000))


def _many(model: Any, place: Place) -> None:
    """Very many nodes."""
    from onnx import helper

    nodes = [
        helper.make_node("Relu", ["c" if i == 0 else f"m{i - 1}"], [f"m{i}"])
        for i in range(place.rng.choice((2000, 300_000)))
    ]
    model.graph.node.extend(nodes)


_HOSTILE: dict[str, Callable[[Any, Place], None]] = {
    "outside": _outside,
    "outside ": _outside,
    "doubled": _doubled,
    "large": _large,
    "input": _input,
    "deep": _deep,
    "loop": _loop,
    "ring": _ring,
    "ring ": _ring,
    "many": _many,
}
