"""ONNX: each operator against the ONNX project's own cases, whole networks against onnxruntime."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
from assets import ASSETS, needs_assets  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import convscope  # noqa: E402
from convscope import limits  # noqa: E402
from convscope.errors import ModelError, UsageError  # noqa: E402
from convscope.images.decode import read_images  # noqa: E402
from convscope.networks import Pass  # noqa: E402
from convscope.networks.formats.files import sniff  # noqa: E402
from convscope.networks.formats.onnx import files as onnx_files  # noqa: E402
from convscope.networks.formats.onnx import module as onnx_module  # noqa: E402
from convscope.networks.formats.onnx.model import read  # noqa: E402
from convscope.networks.formats.onnx.operators import OPERATORS  # noqa: E402
from convscope.networks.spec import ModelSpec  # noqa: E402

pytestmark = pytest.mark.without_keras

# -- every operator, by the ONNX project's own cases -----------------------------------------------------

PLAIN = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"}
# What training does, and what nobody can pool: refused, or without a result.
TRAINING = {
    *("test_batchnorm_example_training_mode", "test_batchnorm_epsilon_training_mode", "test_training_dropout"),
    *("test_training_dropout_default", "test_training_dropout_default_mask", "test_training_dropout_mask"),
}
EMPTY = {"test_reduce_max_empty_set", "test_reduce_max_empty_set_bool", "test_reduce_min_empty_set"}
# Cases whose expected values are written with four digits.
FOUR_DIGITS = ("last_window_starts_on_pad", "test_gridsample_bicubic")


def _cases():
    import warnings

    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = node.collect_testcases(None)
    for case in cases:
        domains = {item.domain for item in case.model.graph.node}
        if domains <= {"", "ai.onnx"} and {item.op_type for item in case.model.graph.node} <= set(OPERATORS):
            yield from _with_plain_data(case)


def _with_plain_data(case):
    for given, expected in case.data_sets:
        values = [*given, *expected]
        plain = all(not isinstance(value, (list, tuple, dict, type(None))) for value in values)
        if plain and {np.asarray(value).dtype.name for value in values} <= PLAIN and case.name not in EMPTY:
            yield pytest.param(case.model, given, expected, id=case.name)


CASES = list(_cases())


def module_of(model):
    file = onnx_files.of_model(model, Path("model.onnx"))
    return onnx_module.module_of(file, next(iter(file.inputs), None))


@pytest.mark.parametrize(("model", "given", "expected"), CASES)
def test_operators(model, given, expected, request):
    tensors = [torch.from_numpy(np.array(value)) for value in given]
    if request.node.callspec.id in TRAINING:
        with pytest.raises(ModelError, match="eval mode"):
            module_of(model)(*tensors)
        return
    module = module_of(model)
    module._batch.declared = None
    made = module(*tensors)
    made = list(made.values()) if isinstance(made, dict) else [made]
    for found, value in zip(made, map(np.asarray, expected), strict=True):
        rough = value.dtype == np.float16 or request.node.callspec.id.endswith(FOUR_DIGITS)
        assert tuple(found.shape) == value.shape
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if rough else {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(found.numpy().astype(np.float64), value.astype(np.float64), **tolerance)


def test_most_operators_have_cases():
    covered = {item.op_type for param in CASES for item in param.values[0].graph.node}
    assert len(CASES) > 700
    assert set(OPERATORS) - covered == {"GlobalLpPool"}  # onnxruntime has it, below


@pytest.mark.parametrize(
    ("item", "opset"),
    [
        (("GlobalLpPool", ["picture"], {"p": 3}), 13),
        (("Upsample", ["picture", "scales"], {"mode": "nearest"}), 9),
        (("Upsample", ["picture", "scales"], {"mode": "linear"}), 9),
    ],
)
def test_operators_without_cases(item, opset):
    operator, inputs, attributes = item
    scales = {"scales": np.array([1, 1, 2, 3], np.float32)} if "scales" in inputs else {}
    model = graph_of([node(operator, inputs, ["out"], "it", **attributes)], scales, opset=opset)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(module_of(model)(torch.from_numpy(x)).numpy(), by_runtime(model, x)["out"], atol=1e-5)


# -- whole networks --------------------------------------------------------------------------------------


def node(operator, inputs, outputs, name="", **attributes):
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def graph_of(nodes, weights, shape=(1, 3, 16, 16), outputs=("out",), opset=17, output_shape=None):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, output_shape) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="the test")
    model.ir_version = 8
    return model


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def residual(shape=(1, 3, 16, 16), opset=17):
    """Convolution, norm, ReLU, depthwise convolution, sum, pooling, a shape taken from the tensor, dense, softmax."""
    weights = {
        **{"w1": drawn(4, 3, 3, 3), "b1": drawn(4), "w2": drawn(4, 1, 3, 3, seed=1), "w3": drawn(5, 4, seed=2)},
        **{"scale": np.abs(drawn(4, seed=3)) + 0.5, "shift": drawn(4, seed=4), "mean": drawn(4, seed=5)},
        **{"variance": np.abs(drawn(4, seed=6)) + 0.5, "b3": drawn(5, seed=7)},
        **{"zero": np.array([0], np.int64), "minus": np.array([-1], np.int64)},
    }
    nodes = [
        node("Conv", ["picture", "w1", "b1"], ["c1"], "/stem/Conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], ["n1"], "/stem/Norm"),
        node("Relu", ["n1"], ["r1"], "/stem/Relu"),
        node("Conv", ["r1", "w2"], ["c2"], "/block/Conv", pads=[1, 1, 1, 1], group=4),
        node("Add", ["c2", "r1"], ["a1"], "/block/Add"),
        node("Clip", ["a1", "", ""], ["k1"]),
        node("MaxPool", ["k1"], ["p1"], "/Pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p1"], ["g1"], "/Gap"),
        node("Shape", ["g1"], ["s1"], "/Shape"),
        node("Gather", ["s1", "zero"], ["s2"], "/Batch", axis=0),
        node("Concat", ["s2", "minus"], ["s3"], "/Target", axis=0),
        node("Reshape", ["g1", "s3"], ["f1"], "/Reshape"),
        node("Gemm", ["f1", "w3", "b3"], ["d1"], "/head/Gemm", transB=1),
        node("Softmax", ["d1"], ["out"], "/head/Softmax", axis=1),
    ]
    return graph_of(nodes, weights, shape, opset=opset)


def opened(model, tmp_path, name="net.onnx", **options):
    onnx.save(model, tmp_path / name)
    return convscope.open_model(tmp_path / name, **options)


def by_runtime(model, x):
    """Every tensor of the graph as onnxruntime computes it."""
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in model.graph.output}
    names = [output for item in model.graph.node for output in item.output if output and output not in known]
    model.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (given,) = [item.name for item in session.get_inputs()]
    wanted = [item.name for item in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, {given: x}), strict=True))


def agree(network, model, x, names):
    """The activations of every layer against onnxruntime's; `names` from layer to tensor."""
    expected = by_runtime(model, np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    paths = [layer.path for layer in network.layers]
    program = network.compile(lambda run, x: dict(run(x, Pass(record=tuple(paths), logits=False)).activations))
    seen = {path: network.numpy(value) for path, value in program(network.tensor(x)).items()}
    for path, found in seen.items():
        value = expected[names.get(path, path)]
        value = np.moveaxis(value, 1, -1) if value.ndim == 4 else value
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4 * max(1, np.abs(value).max()), err_msg=path)
    return seen


def test_every_node_as_onnxruntime_has_it(tmp_path):
    model = residual()
    network = opened(model, tmp_path)
    names = {item.name or item.output[0]: item.output[0] for item in model.graph.node}
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    seen = agree(network, model, x, names)
    assert list(seen) == [
        *("/stem/Conv", "/stem/Norm", "/stem/Relu", "/block/Conv", "/block/Add", "k1", "/Pool", "/Gap"),
        *("/Reshape", "/head/Gemm", "/head/Softmax"),
    ]
    assert (network.head.activation, network.head.undone) == ("softmax", "/head/Softmax")
    kinds = {layer.path: layer.kind for layer in network.layers}
    assert kinds["/stem/Conv"] == "conv"
    assert kinds["/Gap"] == "global_pool"
    assert network.layer("/stem/Conv").rectified == "/stem/Relu"


def test_a_declared_batch_of_one_takes_any(tmp_path):
    network = opened(residual(), tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)
    together = network.predict(x)
    np.testing.assert_allclose(together, np.concatenate([network.predict(x[i : i + 1]) for i in range(5)]), atol=1e-5)


def test_filters_and_heatmaps_work(tmp_path):
    network = opened(residual(("n", 3, "h", "w")), tmp_path, size=16)
    photo = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    found = convscope.heatmap(network, [photo], 1, layer="/block/Add")
    x = torch.from_numpy(network.prepare(found.images)).permute(0, 3, 1, 2)
    assert found.maps.shape == (1, 8, 8)
    # Grad-CAM from finite differences of the logits, a channel at a time: its weight is a mean gradient.
    weights = []
    for channel in range(4):
        values = []
        for step in (0.01, -0.01):
            with torch.no_grad():
                record = network.compile(
                    lambda run, x, c=channel, s=step: run(
                        x, Pass(replace=("/block/Add",)), {"/block/Add": lambda a: a + s * torch.eye(4)[c]}
                    ).logits[0, 1]
                )
                values.append(float(record(x.permute(0, 2, 3, 1))))
        weights.append((values[0] - values[1]) / 0.02 / 64)
    maps = network.forward(network.prepare(found.images), ["/block/Add"])[1]["/block/Add"]
    np.testing.assert_allclose(found.maps, (maps * np.array(weights)).sum(axis=-1), atol=2e-3)
    rows = convscope.filters(network, "/block/Conv", [0, 1], steps=5, size=16).rows
    assert all(row.activations[-1] > row.activations[0] for row in rows)


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_networks_that_torch_exports(tmp_path, opset):
    """Old exporters of torch leave chains of Shape, Gather and Concat behind, and names with slashes."""
    from test_torch_script import Residual, images

    torch.manual_seed(0)
    module = Residual().eval()
    torch.onnx.export(module, (images(16, 1),), tmp_path / "net.onnx", dynamo=False, opset_version=opset)
    network = convscope.open_model(tmp_path / "net.onnx")
    x = images(16, 3)
    with torch.no_grad():
        expected = module(x).numpy()
    found = network.head.probabilities(network.predict(x.permute(0, 2, 3, 1).numpy()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@needs_assets
def test_mnist_by_onnxruntime_and_by_its_digits():
    model = onnx.load(ASSETS / "onnx" / "mnist-8.onnx")
    network = convscope.open_model(ASSETS / "onnx" / "mnist-8.onnx", preprocess="none")
    names = {item.name or item.output[0]: item.output[0] for item in model.graph.node}
    x = np.random.default_rng(0).uniform(0, 255, (1, 28, 28, 1)).astype(np.float32)
    agree(network, model, x, names)
    files = sorted((ASSETS / "photos" / "digits").glob("*/*.png"))
    logits = network.predict(network.prepare(read_images(files)))
    assert (logits.argmax(axis=1) == [int(file.parent.name) for file in files]).mean() >= 0.96


@needs_assets
def test_each_weight_of_mnist_is_in_its_place(tmp_path):
    """Values of the file's initializers are those of the steps; swapping two of the same shape changes the network."""
    path = ASSETS / "onnx" / "mnist-8.onnx"
    model = onnx.load(path)
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    module = read(sniff(path)).module
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    used = [
        name
        for name, value in stored.items()
        if any(value.size == v.size and (value.ravel() == v.ravel()).all() for v in state.values())
    ]
    assert {name for name, value in stored.items() if value.dtype == np.float32} <= set(used)
    # Shapes are numbers for Python, not weights.
    assert len(state) == 6
    assert convscope.open_model(path).parameters == sum(v.size for v in stored.values() if v.dtype == np.float32)
    assert {value.dtype for value in state.values()} == {np.dtype(np.float32)}


def test_swapped_kernels_are_seen(tmp_path):
    model = graph_of(
        [
            node("Conv", ["picture", "w1"], ["c1"], "one", pads=[1, 1, 1, 1]),
            node("Conv", ["c1", "w2"], ["out"], "two", pads=[1, 1, 1, 1]),
        ],
        {"w1": drawn(3, 3, 3, 3), "w2": drawn(3, 3, 3, 3, seed=1)},
    )
    network = opened(model, tmp_path)
    weights = {step.described.path: step.weight.numpy() for step in network.module.children()}
    np.testing.assert_array_equal(weights["one"], drawn(3, 3, 3, 3))
    np.testing.assert_array_equal(weights["two"], drawn(3, 3, 3, 3, seed=1))


def test_channels_last_graphs(tmp_path):
    """As tf2onnx writes them: images (n, h, w, 3), turned inside."""
    model = graph_of(
        [
            node("Transpose", ["picture"], ["t"], "turn", perm=[0, 3, 1, 2]),
            node("Conv", ["t", "w"], ["out"], "conv"),
        ],
        {"w": drawn(4, 3, 3, 3)},
        shape=(1, 12, 10, 3),
    )
    network = opened(model, tmp_path)
    assert (network.inputs.size, network.inputs.channels) == ((12, 10), 3)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 12, 10, 3)).astype(np.float32)
    expected = by_runtime(model, x)["out"]
    np.testing.assert_allclose(network.forward(x, ["conv"])[1]["conv"], np.moveaxis(expected, 1, -1), atol=1e-5)


def test_dynamic_and_missing_shapes(tmp_path):
    network = opened(residual(("batch", 3, "height", "width")), tmp_path, size=(24, 40))
    assert (network.inputs.size, network.inputs.free) == ((24, 40), True)
    assert network.layer("/stem/Conv").shape == (12, 20, 4)
    model = residual()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert opened(model, tmp_path, size=24).layer("/stem/Conv").shape == (12, 12, 4)
    with pytest.raises(UsageError, match="16x16 pixels only"):
        opened(residual(), tmp_path, size=24)


def test_zeros_are_counted_after_a_bias_that_is_a_step_of_its_own(tmp_path):
    nodes = [
        node("Conv", ["picture", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        node("Add", ["c", "b"], ["a"], "bias"),
        node("Relu", ["a"], ["r"], "relu"),
        node("Conv", ["r", "w2"], ["c2"], "second", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r"], ["s"], "sum"),
        node("Relu", ["s"], ["out"], "last"),
    ]
    weights = {"w": drawn(4, 3, 3, 3), "b": drawn(1, 4, 1, 1, seed=1), "w2": drawn(4, 4, 3, 3, seed=2)}
    network = opened(graph_of(nodes, weights), tmp_path)
    assert network.layer("conv").rectified == "relu"
    assert network.layer("second").rectified is None  # a sum with another branch is not this convolution's answer
    photo = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    found = convscope.activations(network, photo, ["conv"]).statistics[0]
    values = network.forward(network.prepare(read_images(photo)), ["conv"])[1]["conv"] + weights["b"].ravel()
    assert found.zeros == pytest.approx((values <= 0).mean(), abs=1e-6)


def test_several_outputs(tmp_path):
    model = residual()
    model.graph.output.append(helper.make_tensor_value_info("p1", TensorProto.FLOAT, (1, 4, 4, 4)))
    assert opened(model, tmp_path).outputs == ("out", "p1")
    assert opened(model, tmp_path, output="p1").head.spatial


def test_half_precision_is_widened(tmp_path):
    model = graph_of([node("Conv", ["picture", "w"], ["out"], "conv")], {"w": drawn(4, 3, 3, 3).astype(np.float16)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    network = opened(model, tmp_path)
    assert any("half precision" in note for note in network.source.notes)
    assert network.module.get_submodule("0").weight.dtype == torch.float32


def quantized():
    """As quantizers write it for static int8: what goes into a convolution is rounded to whole numbers and back."""
    kernel = np.round(drawn(4, 3, 3, 3) * 60).astype(np.int8)
    nodes = [
        node("QuantizeLinear", ["picture", "s", "z"], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        node("DequantizeLinear", ["kernel", "ks", "kz"], ["w"], "kernel", axis=0),
        node("Conv", ["d", "w"], ["c"], "conv"),
        node("Relu", ["c"], ["out"], "relu"),
    ]
    scales = {"s": np.float32(1 / 127), "ks": np.array([0.01, 0.02, 0.03, 0.015], np.float32)}
    return graph_of(nodes, {**scales, "z": np.uint8(128), "kernel": kernel, "kz": np.zeros(4, np.int8)})


def test_quantised_in_float_as_onnxruntime_rounds_it(tmp_path):
    model = quantized()
    network = opened(model, tmp_path)
    assert any("quantized" in note for note in network.source.notes)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    expected = by_runtime(model, np.ascontiguousarray(x.transpose(0, 3, 1, 2)))["out"]
    found = network.forward(x, ["relu"])[1]["relu"]
    np.testing.assert_allclose(found, np.moveaxis(expected, 1, -1), rtol=1e-4, atol=1e-5)
    rows = convscope.filters(network, "relu", [0, 1], steps=5).rows  # there is a gradient to climb
    assert all(row.activations[-1] > row.activations[0] for row in rows)


def test_a_branch_whose_condition_is_known_is_taken(tmp_path):
    def branch(operator):
        made = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
        return helper.make_graph([node(operator, ["c"], ["b"], operator.lower())], operator, [], made)

    nodes = [
        node("Conv", ["picture", "w"], ["c"], "conv"),
        node("If", ["yes"], ["out"], "if", then_branch=branch("Relu"), else_branch=branch("Neg")),
    ]
    model = graph_of(nodes, {"w": drawn(4, 3, 3, 3), "yes": np.array(True)})
    network = opened(model, tmp_path)
    assert [layer.path for layer in network.layers] == ["conv", "relu"]
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    expected = by_runtime(model, np.ascontiguousarray(x.transpose(0, 3, 1, 2)))["out"]
    np.testing.assert_allclose(network.forward(x, ["relu"])[1]["relu"], np.moveaxis(expected, 1, -1), atol=1e-5)


def test_functions_of_the_file_are_unfolded(tmp_path):
    """torch's newer exporter writes functions of its own; Netron shows the nodes inside of them."""
    body = [node("Conv", ["x", "w"], ["c"], "conv"), node("Relu", ["c"], ["y"], "relu")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Block", ["x", "w"], ["y"], body, imports[:1])
    model = graph_of([node("Block", ["picture", "w"], ["out"], "block", domain="own")], {"w": drawn(4, 3, 3, 3)})
    model.functions.append(function)
    model.opset_import.append(imports[1])
    network = opened(model, tmp_path)
    assert [layer.kind for layer in network.layers] == ["conv", "activation"]
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    expected = by_runtime(model, np.ascontiguousarray(x.transpose(0, 3, 1, 2)))["out"]
    last = network.layers[-1].path
    np.testing.assert_allclose(network.forward(x, [last])[1][last], np.moveaxis(expected, 1, -1), atol=1e-5)


# -- what can't be opened --------------------------------------------------------------------------------


def simple(operator, domain="", **attributes):
    model = graph_of([node(operator, ["picture"], ["out"], "odd", domain=domain, **attributes)], {})
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: simple("NonMaxSuppression"), ["can't convert", "NonMaxSuppression (1)"]),
        (lambda: simple("FusedConv", "com.microsoft"), ["com.microsoft.FusedConv (1)"]),
        (lambda: simple("If", then_branch=residual().graph, else_branch=residual().graph), ["control flow", "If (1)"]),
        (lambda: simple("DynamicQuantizeLinear"), ["int8", "DynamicQuantizeLinear (1)", "float model"]),
        (lambda: simple("QLinearConv"), ["int8", "QLinearConv"]),
        (lambda: graph_of([node("Relu", ["picture"], ["out"])], {}, (1, 12)), ["no input for an image", "(1, 12)"]),
    ],
)
def test_what_can_not_be_converted_is_named(tmp_path, make, words):
    with pytest.raises(ModelError) as error:
        opened(make(), tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"\x08\x08\x12\x04rest", b"", b"no model at all"])
def test_files_that_are_no_onnx(tmp_path, data):
    (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(ModelError) as error:
        convscope.open_model(tmp_path / "net.onnx")
    assert "\n" not in str(error.value)


def test_a_cut_file(tmp_path):
    data = residual().SerializeToString()
    (tmp_path / "net.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="can't be read as ONNX"):
        convscope.open_model(tmp_path / "net.onnx")


def test_weights_beside_the_file(tmp_path):
    model = residual()
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    network = convscope.open_model(tmp_path / "net.onnx")
    np.testing.assert_array_equal(network.module.get_submodule("0").weight.numpy(), drawn(4, 3, 3, 3))
    (tmp_path / "net.data").rename(tmp_path / "other.data")
    with pytest.raises(ModelError, match=r"'net\.data', which is not beside it"):
        convscope.open_model(tmp_path / "net.onnx")


def test_a_spec_notices_that_weights_beside_the_file_have_changed(tmp_path):
    onnx.save(residual(), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    spec = convscope.open_model(tmp_path / "net.onnx").spec
    data = (tmp_path / "net.data").read_bytes()
    line = f"{hashlib.sha256(data).hexdigest()}  net.data\n"  # as sha256sum prints it
    assert spec.origin.beside_sha256 == hashlib.sha256(line.encode()).hexdigest()
    assert spec.describe()["beside_sha256"] == spec.origin.beside_sha256
    assert spec.open().weights_sha256() == convscope.open_model(tmp_path / "net.onnx").weights_sha256()
    (tmp_path / "net.data").write_bytes(bytes(4) + data[4:])
    for one in (spec, ModelSpec.from_json(spec.describe())):
        with pytest.raises(ModelError, match=r"a file beside .*net\.onnx has changed since") as caught:
            one.open()
        assert (caught.value.code, caught.value.data["expected"]) == ("file-changed", spec.origin.beside_sha256)
    (tmp_path / "net.data").write_bytes(data)
    assert spec.open().spec == spec


def test_a_file_that_holds_all_its_weights_has_none_beside_it(tmp_path):
    onnx.save(residual(), tmp_path / "net.onnx")
    assert convscope.open_model(tmp_path / "net.onnx").spec.origin.beside_sha256 is None


def test_weights_outside_of_the_folder_are_not_read(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    onnx.save(residual(), inside / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    (inside / "net.data").rename(tmp_path / "net.data")
    model = onnx.load(inside / "net.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../net.data"
    (inside / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside of its folder"):
        convscope.open_model(inside / "net.onnx")


# -- inputs beside the image ---------------------------------------------------------------------------


def with_input(name, shape, kind=TensorProto.FLOAT, default=None):
    """A convolution, plus the sum of another input."""
    nodes = [
        node("Conv", ["picture", "w"], ["c"], "conv"),
        node("Cast", [name], ["f"], "cast", to=TensorProto.FLOAT),
        node("ReduceSum", ["f"], ["s"], "sum", keepdims=0),
        node("Add", ["c", "s"], ["out"], "add"),
    ]
    weights = {"w": drawn(4, 3, 3, 3)}
    model = graph_of(nodes, weights if default is None else {**weights, name: default}, opset=11)
    model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    return model


NAMES = ["second", "1", "a.b", "class", "self", "forward", "training", "x y", "args"]


@pytest.mark.parametrize("name", NAMES)
def test_two_inputs_whatever_the_second_is_called(tmp_path, name):
    model = with_input(name, (1, 4))
    network = opened(model, tmp_path)
    assert network.inputs.name == "picture"
    assert network.inputs.others == {name: "zeros"}
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    plain = network.forward(x, ["add"])[1]["add"]
    fed = opened(model, tmp_path, feed={name: np.full((1, 4), 0.5, np.float32)})
    # One array goes with each of two images, so the sum over both is 4.
    np.testing.assert_allclose(fed.forward(x, ["add"])[1]["add"], plain + 4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((), TensorProto.FLOAT),
        ((2,), TensorProto.INT64),
        ((7, 4), TensorProto.DOUBLE),
        ((1, 3, 1, 1), TensorProto.FLOAT),
        ((1,), TensorProto.BOOL),
        (("n", 5), TensorProto.INT32),
    ],
)
def test_a_second_input_of_any_rank_and_type(tmp_path, shape, kind):
    network = opened(with_input("second", shape, kind), tmp_path)
    x = np.zeros((3, 16, 16, 3), np.float32)
    assert network.forward(x, ["add"])[1]["add"].shape == (3, 14, 14, 4)


def test_the_input_of_the_image_can_be_chosen(tmp_path):
    model = with_input("second", (1, 3, 12, 12))
    assert opened(model, tmp_path).inputs.name == "picture"
    chosen = opened(model, tmp_path, input="second")
    assert (chosen.inputs.name, chosen.inputs.size, chosen.inputs.others) == ("second", (12, 12), {"picture": "zeros"})
    with pytest.raises(UsageError, match="no input 'third'"):
        opened(model, tmp_path, input="third")
    with pytest.raises(UsageError, match=r"takes no image.*\(1, 4\)"):
        opened(with_input("second", (1, 4)), tmp_path, input="second")


def test_three_inputs(tmp_path):
    model = with_input("second", (1, 4))
    model.graph.input.append(helper.make_tensor_value_info("third", TensorProto.FLOAT, (1, 2)))
    assert opened(model, tmp_path).inputs.others == {"second": "zeros", "third": "zeros"}


def test_inputs_with_defaults_are_weights(tmp_path):
    """As IR version 3 lists them: a graph's input that is an initializer too."""
    model = with_input("second", (1, 4), default=np.full((1, 4), 0.5, np.float32))
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 3, 3, 3)))
    network = opened(model, tmp_path)
    assert network.inputs.others == {}
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    expected = by_runtime_of(model, {"picture": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})
    np.testing.assert_allclose(network.forward(x, ["add"])[1]["add"], np.moveaxis(expected, 1, -1), atol=1e-4)


def by_runtime_of(model, feeds):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["out"], feeds)[0]


# -- functions and branches ------------------------------------------------------------------------------


def nested(levels, width=2, own=True):
    """Functions that call the one below `width` times."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F0", ["a"], ["b"], [node("Relu", ["a"], ["b"])], imports)]
    for level in range(1, levels + 1):
        names = ["a", *(f"t{i}" for i in range(width - 1)), "b"]
        body = [
            node(f"F{level - 1}", [names[i]], [names[i + 1]], f"call{i}", domain="own") for i in range(len(names) - 1)
        ]
        functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], body, imports))
    model = graph_of([node(f"F{levels}", ["picture"], ["out"], "outer", domain="own")], {})
    model.functions.extend(functions)
    model.opset_import.append(imports[1])
    return model


@pytest.mark.parametrize(("levels", "width"), [(26, 2), (8, 12), (99, 3), (150, 1), (5000, 1)])
def test_functions_are_counted_before_they_are_unfolded(tmp_path, levels, width):
    with pytest.raises(ModelError, match=r"CONVSCOPE_LIMITS=(nodes|depth)"):
        opened(nested(levels, width), tmp_path)


@pytest.mark.parametrize("through", [0, 3])
def test_a_function_that_calls_itself(tmp_path, through):
    model = nested(through, 1)
    model.functions[0].node.append(node(f"F{through}", ["b"], ["again"], domain="own"))
    with pytest.raises(ModelError, match="calls itself"):
        opened(model, tmp_path)


def test_each_call_of_a_function_has_layers_of_its_own(tmp_path):
    """The names are those that onnx's own inliner gives."""
    from onnx import inliner

    model = nested(2, 2)
    for function in model.functions:
        for number, item in enumerate(function.node):
            item.name = f"n{number}"
    network = opened(model, tmp_path)
    expected = [item.name for item in inliner.inline_local_functions(model).graph.node]
    assert [layer.path for layer in network.layers] == expected


def test_attributes_of_functions(tmp_path):
    """A call gives a function's attribute its value, else there is a default."""
    leaky = node("LeakyRelu", ["a"], ["b"], "leaky")
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    function = helper.make_function(
        *("own", "Leaky", ["a"], ["b"], [leaky], [helper.make_opsetid("", 17)]),
        attribute_protos=[helper.make_attribute("slope", 0.25)],
    )
    nodes = [node("Leaky", ["picture"], ["m"], domain="own"), node("Leaky", ["m"], ["out"], domain="own", slope=0.5)]
    model = graph_of(nodes, {})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    x = -np.ones((1, 3, 16, 16), np.float32)
    np.testing.assert_allclose(module_of(model)(torch.from_numpy(x)).numpy(), -0.125 * np.ones_like(x))


def test_branches_may_use_one_name_twice(tmp_path):
    """Two branches that are taken, and that call what they make the same."""

    def branch(operator, given):
        made = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
        nodes = [node(operator, [given], ["t"]), node("Identity", ["t"], ["b"])]
        return helper.make_graph(nodes, operator, [], made)

    nodes = [
        node("If", ["yes"], ["one"], then_branch=branch("Neg", "picture"), else_branch=branch("Abs", "picture")),
        node("If", ["yes"], ["two"], then_branch=branch("Abs", "one"), else_branch=branch("Neg", "one")),
        node("Sub", ["one", "two"], ["out"]),
    ]
    model = graph_of(nodes, {"yes": np.array(True)})
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(module_of(model)(torch.from_numpy(x)).numpy(), by_runtime(model, x)["out"], atol=1e-6)


# -- sizes ------------------------------------------------------------------------------------------------

HUGE = 2**33


def sized(nodes, **numbers):
    """A graph whose operators take amounts from tensors that are known, or computed from the image."""
    known = graph_of(nodes, {name: np.array(value) for name, value in numbers.items()}, opset=18)
    computed = [
        node("ReduceMax", ["picture"], ["m"], keepdims=0),
        node("Cast", ["m"], ["zero"], to=TensorProto.INT64),
        *(node("Add", [f"{name}_", "zero"], [name]) for name in numbers),
    ]
    values = {f"{name}_": np.array(value) for name, value in numbers.items()}
    return [known, graph_of([*computed, *nodes], values, opset=18)]


SIZED = [
    *sized([node("ConstantOfShape", ["s"], ["big"]), node("Add", ["picture", "big"], ["out"])], s=[HUGE, 1, 1, 1]),
    *sized([node("Expand", ["picture", "s"], ["out"])], s=[HUGE, 3, 16, 16]),
    *sized([node("Tile", ["picture", "s"], ["out"])], s=[1, 1, 2**17, 2**17]),
    *sized([node("Pad", ["picture", "s"], ["out"])], s=[0, 0, 2**17, 2**17, 0, 0, 0, 0]),
    *sized([node("Pad", ["picture", "s"], ["out"], mode="edge")], s=[0, 0, 2**17, 2**17, 0, 0, 0, 0]),
    *sized([node("Resize", ["picture", "", "", "s"], ["out"], mode="nearest")], s=[1, 3, 2**17, 2**17]),
    *sized([node("Resize", ["picture", "", "", "s"], ["out"], mode="cubic")], s=[1, 3, 16, 2**36]),
    *sized(
        [
            node("Range", ["a", "s", "b"], ["r"]),
            node("Cast", ["r"], ["f"], to=1),
            node("ReduceSum", ["f"], ["t"], keepdims=0),
            node("Add", ["picture", "t"], ["out"]),
        ],
        a=0,
        b=1,
        s=HUGE,
    ),
    # Two long tensors, and a table of all their sums or products.
    *sized(
        [
            node("Reshape", ["picture", "s"], ["a"]),
            node("Tile", ["a", "t"], ["b"]),
            node("Reshape", ["b", "u"], ["c"]),
            node("Add", ["b", "c"], ["out"]),
        ],
        s=[1, -1],
        t=[1, 1000],
        u=[-1, 1],
    ),
    graph_of([node("ConvTranspose", ["picture", "w"], ["out"], strides=[2**15, 2**15])], {"w": drawn(3, 4, 3, 3)}),
    graph_of([node("Conv", ["picture", "w"], ["out"], pads=[2**17] * 4)], {"w": drawn(4, 3, 3, 3)}),
    graph_of([node("MaxPool", ["picture"], ["out"], kernel_shape=[3, 3], pads=[2**17] * 4)], {}),
]


@pytest.mark.parametrize("model", SIZED)
def test_what_a_node_would_make_is_known_before_it_is_allocated(tmp_path, model):
    torch.zeros(1)
    before = peak()
    with pytest.raises(ModelError, match=r"it would make .* of values \(limit values=512MiB"):
        opened(model, tmp_path)
    assert peak() - before < 600 * 2**20


def peak():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_work_that_would_take_days(tmp_path):
    """Nothing here is large: a pooling window of 4096 x 4096 at each of as many places."""
    nodes = [
        node("Pad", ["picture", "p"], ["b"]),
        node("MaxPool", ["b"], ["out"], kernel_shape=[2000, 2000]),
    ]
    model = graph_of(nodes, {"p": np.array([0, 0, 2000, 2000, 0, 0, 2000, 2000])}, opset=18)
    with pytest.raises(ModelError, match=r"would take about \d+ s \(limit seconds=60"):
        opened(model, tmp_path)


def test_a_size_that_the_pixels_decide(tmp_path):
    """Nothing is wrong with a black image, with which the model is opened."""
    nodes = [
        node("ReduceMax", ["picture"], ["m"], keepdims=0),
        node("Mul", ["m", "many"], ["size"]),
        node("Cast", ["size"], ["whole"], to=TensorProto.INT64),
        node("Range", ["zero", "whole", "one"], ["r"]),
        node("ReduceSum", ["r"], ["s"], keepdims=0),
        node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        node("Conv", ["picture", "w"], ["c"]),
        node("Add", ["c", "f"], ["out"], "add"),
    ]
    numbers = {"many": np.float32(2**34), "zero": np.array(0), "one": np.array(1), "w": drawn(4, 3, 3, 3)}
    network = opened(graph_of(nodes, numbers, opset=18), tmp_path)
    with pytest.raises(ModelError, match="it would make 128GiB"):
        network.forward(np.ones((1, 16, 16, 3), np.float32), ["add"])


def test_limits_can_be_raised(tmp_path):
    model = graph_of([node("Pad", ["picture", "p"], ["out"])], {"p": np.array([0, 0, 0, 0, 0, 0, 500, 500])}, opset=18)
    with limits.using(values=2**20), pytest.raises(ModelError, match="limit values=1MiB"):
        opened(model, tmp_path)
    assert opened(model, tmp_path).layers[-1].shape == (516, 516, 3)


def test_a_image_that_is_declared_too_large(tmp_path):
    with pytest.raises(ModelError, match="limit pixels"):
        opened(residual((1, 3, 2**20, 2**20)), tmp_path)
    with pytest.raises(ModelError, match="limit values"):
        opened(residual((1, 2**20, 2**13, 2**13)), tmp_path)
    with pytest.raises(ModelError, match="the input 'second'"):
        opened(with_input("second", (1, 2**31, 2**31)), tmp_path)


def tensor(**fields):
    return TensorProto(**{"name": "w", "dims": [4, 3, 3, 3], "data_type": 1, "raw_data": bytes(432), **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dims": [2**33]}, "limit weights"),
        ({"dims": [2**62, 2**62, 4]}, "limit weights"),
        ({"dims": [0, 2**62, 2**62]}, "limit weights"),
        ({"dims": [-1, 3, 3, 3]}, "negative side"),
        ({"dims": [4, 3, 3, 4]}, "takes 576 bytes, and there are 432"),
        ({"raw_data": bytes(433)}, "there are 433"),
        ({"data_type": 99}, "unknown type 99"),
        ({"data_type": 0}, "unknown type 0"),
        ({"data_type": 17, "raw_data": bytes(108)}, "PyTorch does not compute with"),
    ],
)
def test_tensors_whose_bytes_are_not_there(tmp_path, fields, words):
    model = graph_of([node("Conv", ["picture", "w"], ["out"], "conv")], {})
    model.graph.initializer.append(tensor(**fields))
    with pytest.raises(ModelError, match=words):
        opened(model, tmp_path)


def beside(tmp_path, **said):
    folder = tmp_path / "inside"
    folder.mkdir(exist_ok=True)
    (folder / "net.data").write_bytes(np.arange(108, dtype=np.float32).tobytes())
    model = graph_of([node("Conv", ["picture", "w"], ["out"], "conv")], {})
    model.graph.initializer.append(tensor(data_location=1))
    model.graph.initializer[0].ClearField("raw_data")
    for key, value in {"location": "net.data", **said}.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    return model, folder


def test_weights_beside_the_file_where_they_are_said_to_be(tmp_path):
    model, folder = beside(tmp_path, offset="0", length="432")
    weight = opened(model, folder).module.get_submodule("0").weight
    np.testing.assert_array_equal(weight.numpy().ravel(), np.arange(108))
    (folder / "sub").mkdir()
    (folder / "net.data").rename(folder / "sub" / "net.data")
    model.graph.initializer[0].external_data[0].value = "sub/net.data"
    opened(model, folder)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"location": "../inside/net.data"}, "outside of its folder"),
        ({"location": "/etc/hostname"}, "outside of its folder"),
        ({"location": "/dev/zero"}, "outside of its folder"),
        ({"location": "..\\inside\\net.data"}, "outside of its folder"),
        ({"location": "C:net.data"}, "outside of its folder"),
        ({"location": ""}, "outside of its folder"),
        ({"location": "."}, "outside of its folder"),
        ({"location": "net\0.data"}, "outside of its folder"),
        ({"location": "other"}, "not beside it"),
        ({"location": "x" * 5000}, "can't be read|not beside it"),
        ({"offset": "-1"}, "no number"),
        ({"offset": "1e2"}, "no number"),
        ({"offset": "٣"}, "no number"),
        ({"offset": str(2**62)}, "no number"),
        ({"offset": "4"}, "ends too early"),
        ({"length": "433"}, "432 bytes, and 433"),
        ({"length": str(2**40)}, "432 bytes"),
    ],
)
def test_weights_beside_the_file_where_they_are_not(tmp_path, said, words):
    with pytest.raises(ModelError, match=words):
        opened(*beside(tmp_path, **said))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("kind", ["pipe", "link", "linked folder", "device"])
def test_weights_beside_the_file_that_are_no_file_there(tmp_path, kind):
    model, folder = beside(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "net.data").rename(outside / "net.data")
    if kind == "pipe":
        os.mkfifo(folder / "net.data")
    elif kind == "link":
        (folder / "net.data").symlink_to(outside / "net.data")
    elif kind == "device":
        (folder / "net.data").symlink_to("/dev/zero")
    else:
        (folder / "sub").symlink_to(outside)
        model.graph.initializer[0].external_data[0].value = "sub/net.data"
    with pytest.raises(ModelError, match=r"outside of its folder|not beside it"):
        opened(model, folder)


# -- odd graphs -------------------------------------------------------------------------------------------


def changed(function):
    model = residual()
    function(model, model.graph)
    return model


def _twice(model, graph):
    graph.node[4].output[0] = "r1"


ODD = {
    "no outputs": (lambda m, g: g.ClearField("output"), "declares no output"),
    "an output that nothing makes": (lambda m, g: setattr(g.output[0], "name", "nothing"), "output 'nothing'"),
    "an input that nothing makes": (lambda m, g: g.node[4].input.__setitem__(1, "nothing"), "/block/Add.*'nothing'"),
    "a circle": (lambda m, g: g.node[1].input.__setitem__(0, "a1"), "/stem/Norm.*makes 'a1'"),
    "out of order": (lambda m, g: g.node.insert(0, g.node[5]), "makes 'a1'"),
    "one name twice": (_twice, "two of its tensors are called 'r1'"),
    "one tensor twice": (lambda m, g: g.initializer.append(g.initializer[0]), "two tensors are called 'w1'"),
    "one input twice": (lambda m, g: g.input.append(g.input[0]), "two inputs"),
    "no inputs": (lambda m, g: g.node[0].ClearField("input"), "/stem/Conv.*0 inputs"),
    "an input left out": (lambda m, g: g.node[0].input.__setitem__(1, ""), "/stem/Conv.*number 2 is left out"),
    "too many inputs": (lambda m, g: g.node[2].input.append("c1"), "/stem/Relu.*2 inputs"),
    "too many outputs": (lambda m, g: g.node[2].output.append("more"), "/stem/Relu.*2 outputs"),
    "nothing made": (lambda m, g: g.node[2].ClearField("output"), "/stem/Relu.*makes nothing"),
    "an unknown domain": (lambda m, g: setattr(g.node[2], "domain", "else.where"), r"else\.where\.Relu"),
    "an attribute of another type": (
        lambda m, g: g.node[0].attribute[0].CopyFrom(helper.make_attribute("pads", "text")),
        "/stem/Conv.*'pads'",
    ),
    "strides of nought": (
        lambda m, g: g.node[0].attribute[1].CopyFrom(helper.make_attribute("strides", [0, 0])),
        "/stem/Conv.*'strides'",
    ),
    "groups of nought": (
        lambda m, g: g.node[3].attribute[1].CopyFrom(helper.make_attribute("group", 0)),
        "/block/Conv.*'group'",
    ),
    "kernels of four axes": (
        lambda m, g: g.node[6].attribute[0].CopyFrom(helper.make_attribute("kernel_shape", [2, 2, 2, 2])),
        "kernel_shape|/Pool",
    ),
    "operator set 0": (lambda m, g: setattr(m.opset_import[0], "version", 0), "operator set 0"),
    "operator set 9999": (lambda m, g: setattr(m.opset_import[0], "version", 9999), "operator set 9999"),
    "an input without a name": (lambda m, g: g.input.append(onnx.ValueInfoProto()), "no name"),
    "a sparse tensor": (lambda m, g: g.sparse_initializer.add(), "sparse"),
    "a constant without a value": (
        lambda m, g: g.node.insert(0, node("Constant", [], ["k"], "const")),
        "'const'.*no value",
    ),
    "weights that don't fit": (
        lambda m, g: g.initializer[0].dims.__setitem__(slice(None), [4, 9, 3, 1]),
        "/stem/Conv|can't",
    ),
}


ODD["weights of one axis"] = (lambda m, g: g.initializer[0].dims.__setitem__(slice(None), [108]), "/stem/Conv")


@pytest.mark.parametrize("what", ODD)
def test_odd_graphs(tmp_path, what):
    change, words = ODD[what]
    with pytest.raises(ModelError, match=words) as error:
        opened(changed(change), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [b"/stem/Relu", b"Relu", b"picture", b"w1", b"pads", b"the test", b"mean"])
def test_names_that_are_no_text(tmp_path, name):
    data = residual().SerializeToString()
    assert name in data
    (tmp_path / "net.onnx").write_bytes(data.replace(name, b"\xff" * len(name)))
    with pytest.raises(ModelError) as error:
        convscope.open_model(tmp_path / "net.onnx")
    assert "text" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_fails_in_a_node_names_it(tmp_path):
    model = residual()
    model.graph.node[12].attribute[0].i = 0  # a product of matrices that don't fit
    with pytest.raises(ModelError, match=r"'/head/Gemm' \(Gemm\)") as error:
        opened(model, tmp_path)
    causes = []
    cause = error.value
    while cause is not None:
        causes.append(type(cause))
        cause = cause.__cause__
    assert causes[-1] is RuntimeError


def test_malformed_files_end_in_one_clear_error(tmp_path):
    """A few of the files of `trials/onnx_files.py`; a trial runs thousands."""
    generator = pytest.importorskip("trials.onnx_files")
    refused = 0
    for seed in range(40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = generator.generate(random.Random(seed), folder)
        try:
            network = convscope.open_model(path)
        except (ModelError, UsageError):
            refused += 1
        else:
            assert network.layers
    assert refused >= 20
