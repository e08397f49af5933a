"""Valid ONNX files: `python -m trials.onnx_bases FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def main() -> None:
    """Write them all."""
    folder = Path(sys.argv[1])
    onnx.save(_plain(), folder / "onnx-plain.onnx")
    onnx.save(_two_inputs(), folder / "onnx-two.onnx")
    onnx.save(_with_function(), folder / "onnx-function.onnx")


def _weights(**shapes: tuple[int, ...]) -> list[TensorProto]:
    rng = np.random.default_rng(0)
    return [
        numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name) for name, shape in shapes.items()
    ]


def _nodes() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Conv", ["x", "k", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"], "relu"),
        node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p"], ["g"], "mean"),
        node("Flatten", ["g"], ["f"], "flatten"),
        node("Gemm", ["f", "w", "v"], ["y"], "dense"),
        node("Softmax", ["y"], ["out"], "softmax", axis=-1),
    ]


def _model(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], functions: list[onnx.FunctionProto] | None = None
) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, 5])
    graph = helper.make_graph(nodes, "net", inputs, [output], _weights(k=(4, 3, 3, 3), b=(4,), w=(4, 5), v=(5,)))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions or [], ir_version=8)


def _image(name: str = "x") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 16, 16])


def _plain() -> onnx.ModelProto:
    return _model(_nodes(), [_image()])


def _two_inputs() -> onnx.ModelProto:
    nodes = [helper.make_node("Mul", ["x", "factor"], ["x2"], "mul"), *_nodes()]
    nodes[1].input[0] = "x2"
    return _model(nodes, [_image(), helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1, 1, 1, 1])])


def _with_function() -> onnx.ModelProto:
    inner = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Add", ["a", "b"], ["c"])]
    function = helper.make_function("own", "Twice", ["a"], ["c"], inner, [helper.make_opsetid("", 17)])
    nodes = _nodes()
    nodes[1] = helper.make_node("Twice", ["c"], ["r"], "twice", domain="own")
    return _model(nodes, [_image()], [function])


if __name__ == "__main__":
    main()
