"""Networks of signals and of volumes are named as such, and networks of images that also have such layers open."""

import numpy as np
import pytest
from expecting import raises

import convscope
from convscope.errors import ModelError
from convscope.networks.inputs import convolutions

MANY = [("Conv1D", 1, (64, 4)), ("SeparableConv1D", 1, (64, 4)), ("Conv1DTranspose", 1, (64, 4))]
MANY += [("Conv3D", 3, (8, 8, 8, 2)), ("Conv3DTranspose", 3, (8, 8, 8, 2))]


@pytest.mark.parametrize(("layer", "count", "shape"), MANY)
def test_keras_networks_of_other_dimensions(layer, count, shape):
    keras = pytest.importorskip("keras")
    given = keras.Input(shape)
    x = getattr(keras.layers, layer)(3, 3, name="first")(given)
    x = keras.layers.Flatten()(x)
    model = keras.Model(given, keras.layers.Dense(2)(x), name="net")
    with raises(ModelError, "dimensions-unsupported", dimensions=count, name="net", match=f"{layer}.*not supported"):
        convscope.open_model(model, preprocess="none")


def torch_network(count, scripted):
    torch = pytest.importorskip("torch")
    conv, pool = getattr(torch.nn, f"Conv{count}d"), getattr(torch.nn, f"AdaptiveAvgPool{count}d")
    module = torch.nn.Sequential(conv(2, 4, 3), torch.nn.ReLU(), pool(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    return torch.jit.script(module.eval()) if scripted else module.eval()


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_pytorch_networks_of_other_dimensions(count, scripted):
    with raises(ModelError, "dimensions-unsupported", dimensions=count, match=f"Conv{count}d"):
        convscope.open_model(torch_network(count, scripted), size=16, preprocess="none")


@pytest.mark.parametrize("count", [1, 3])
def test_onnx_networks_of_other_dimensions(count, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from onnx import helper, numpy_helper

    weights = numpy_helper.from_array(np.ones((2, 3, *[3] * count), np.float32), "w")
    sides = [1, 3, *[12] * count]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, *[10] * count])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx")
    with raises(ModelError, "dimensions-unsupported", dimensions=count, match="the input x"):
        convscope.open_model(tmp_path / "net.onnx")


def test_a_network_of_images_may_have_a_layer_of_signals():
    torch = pytest.importorskip("torch")

    class Attended(torch.nn.Module):  # channels weigh each other by a convolution along them (Wang et al. 2020, ECA)
        def __init__(self):
            super().__init__()
            self.conv, self.gate = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv1d(1, 1, 3, padding=1)
            self.head = torch.nn.Linear(6, 2)

        def forward(self, x):
            x = self.conv(x)
            weights = torch.sigmoid(self.gate(x.mean((2, 3))[:, None]))[:, 0]
            return self.head((x * weights[:, :, None, None]).mean((2, 3)))

    assert convscope.open_model(Attended().eval(), size=16, preprocess="none").head.units == 2


def test_a_grey_image_without_a_channel_axis_is_no_signal():
    keras = pytest.importorskip("keras")
    given = keras.Input((16, 16))
    x = keras.layers.Conv2D(3, 3)(keras.layers.Reshape((16, 16, 1))(given))
    model = keras.Model(given, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    assert convscope.open_model(model, preprocess="none").inputs.channels == 1


def test_dimensions_are_read_from_names_of_convolutions_alone():
    names = ["Conv2D", "DepthwiseConv2D", "LazyConv3d", "ConvTranspose1d", "ConvLSTM2D", "Dense", "BatchNorm1d"]
    assert [count for _, count in convolutions((name, name) for name in names)] == [2, 2, 3, 1, 2]
