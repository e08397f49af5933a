"""Inputs beside the image on PyTorch and ONNX: which gets the image, what is fed, and whose a layer's call is."""

from __future__ import annotations

import numpy as np
import pytest
import siamese
from PIL import Image

from convscope import open_model
from convscope.errors import ModelError, UsageError
from convscope.images.decode import read_image

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

pytestmark = pytest.mark.without_keras


def kernel():
    return torch.from_numpy(siamese.KERNEL.transpose(3, 2, 0, 1).copy())


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, siamese.CHANNELS, 3)
        self.relu = nn.ReLU()
        self.conv.weight.data = kernel()
        self.conv.bias.data = torch.from_numpy(siamese.BIAS.copy())

    def branch(self, x):
        return self.relu(self.conv(x)).mean((2, 3))

    def forward(self, left, right):
        return (self.branch(left) * self.branch(right)).sum(1, keepdim=True)


class Pair(nn.Module):
    """Numbers, and an image."""

    def __init__(self):
        super().__init__()
        self.conv, self.numbers = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, numbers, image, flag=None):
        return self.conv(image).mean((2, 3)) + self.numbers(numbers)


def test_either_side_of_a_module_is_explained():
    siamese.check_sides(lambda **options: open_model(Siamese(), size=siamese.SIDE, **options))


def onnx_file(path, shape):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    for side in ("left", "right"):
        nodes += [
            helper.make_node("Conv", [side, "kernel", "bias"], [f"{side}.maps"], name=f"{side}_conv"),
            helper.make_node("Relu", [f"{side}.maps"], [f"{side}.relu"], name=f"{side}_relu"),
            helper.make_node("GlobalAveragePool", [f"{side}.relu"], [f"{side}.mean"], name=f"{side}_mean"),
            helper.make_node("Flatten", [f"{side}.mean"], [f"{side}.flat"], name=f"{side}_flat"),
        ]
    nodes += [
        helper.make_node("Mul", ["left.flat", "right.flat"], ["product"], name="product"),
        helper.make_node("ReduceSum", ["product", "axes"], ["score"], name="score", keepdims=1),
    ]
    weights = {"kernel": kernel().numpy(), "bias": siamese.BIAS, "axes": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "siamese",
        [helper.make_tensor_value_info(side, TensorProto.FLOAT, shape) for side in ("left", "right")],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_either_side_of_an_onnx_file_is_explained(tmp_path):
    path = onnx_file(tmp_path / "a.onnx", ["n", 3, siamese.SIDE, siamese.SIDE])
    siamese.check_sides(lambda **options: open_model(path, **options))


def test_a_path_of_an_image_or_an_array_is_fed(tmp_path):
    Image.fromarray(siamese.RIGHT).save(tmp_path / "right.png")
    np.save(tmp_path / "right.npy", siamese.RIGHT.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    scores = []
    for name in ("right.png", "right.npy"):
        network = open_model(Siamese(), size=siamese.SIDE, preprocess="0..1", feed={"right": tmp_path / name})
        scores.append(network.predict(network.prepare([read_image(siamese.LEFT)]))[0, 0])
        assert ("image" in network.inputs.others["right"]) == name.endswith("png")
    np.testing.assert_allclose(scores, siamese.score(siamese.LEFT, siamese.RIGHT), rtol=1e-4)
    for name in ("missing.png", "text.txt"):
        (tmp_path / "text.txt").write_text("hello")
        with pytest.raises(UsageError, match="'right'") as error:
            open_model(Siamese(), size=siamese.SIDE, feed={"right": tmp_path / name})
        assert error.value.code == "feed-invalid"


def test_a_spec_compares_images_by_their_pixels():
    network = open_model(Siamese(), size=siamese.SIDE, feed={"right": read_image(siamese.RIGHT)})
    (fed,) = network.spec.options.feed
    assert fed == type(fed)("right", read_image(siamese.RIGHT))
    assert fed != type(fed)("right", read_image(siamese.LEFT))
    assert fed.describe()["name"] == "right"


def test_the_image_goes_to_the_input_that_is_not_fed():
    numbers = np.arange(5, dtype=np.float32)
    for value in (numbers[None], numbers[None].tolist()):
        network = open_model(Pair(), size=16, feed={"numbers": value})
        assert network.inputs.name == "image"
        assert network.layer("conv").inputs == ("image",)
        assert network.layer("numbers").inputs == ("numbers",)


def test_what_can_not_be_fed_names_the_input(tmp_path):
    module = Pair()
    with pytest.raises(UsageError, match="no input 'number'") as error:
        open_model(module, feed={"number": np.zeros((1, 5))})
    assert error.value.code == "input-unknown"
    for feed in ({"image": siamese.LEFT}, {"numbers": np.zeros((1, 5)), "image": siamese.LEFT}):
        with pytest.raises(UsageError, match=r"'(image|numbers)'") as error:
            open_model(module, input="image" if len(feed) == 1 else None, feed=feed)
        assert error.value.code == "feed-is-image"
    path = onnx_file(tmp_path / "a.onnx", ["n", 3, siamese.SIDE, siamese.SIDE])
    with pytest.raises(UsageError, match="'right' takes an array of shape") as error:
        open_model(path, feed={"right": np.zeros((1, 3, 7, siamese.SIDE))})
    assert error.value.code == "feed-misfit"
    assert error.value.data == {
        "name": "right",
        "expected": [1, 3, siamese.SIDE, siamese.SIDE],
        "found": [1, 3, 7, siamese.SIDE],
    }
    whole = open_model(path, feed={"right": np.zeros((3, siamese.SIDE, siamese.SIDE), np.float32)})
    assert whole.inputs.name == "left"  # an array of one item may lack the batch


def test_an_array_that_a_module_refuses_names_what_was_fed():
    with pytest.raises(ModelError, match="'numbers'") as error:
        open_model(Pair(), size=16, feed={"numbers": np.zeros((1, 7), np.float32)})
    assert "(1, 7)" in str(error.value)


def test_the_calls_of_a_shared_layer_are_told_apart_by_their_inputs():
    network = open_model(Siamese(), size=siamese.SIDE, feed={"right": read_image(siamese.RIGHT)})
    with pytest.raises(UsageError) as error:
        network.layer("conv")
    assert error.value.code == "layer-ambiguous"
    assert "conv#0 (of input left), conv#1 (of input right)" in str(error.value)
