"""The scaling that a module does on its own input: the network's outputs are those of the module on raw pixels."""

import numpy as np
import pytest

import convscope
from convscope.networks.preprocessing import PRESETS
from convscope.networks.scaling import RANGES, responses_at

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = pytest.mark.without_keras

SIDE = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE = (103.939, 116.779, 123.68)


def column(values, times=1.0):
    return times * torch.tensor(values).reshape(1, -1, 1, 1)


class Normalize(torch.nn.Module):
    """As torchvision writes it: a copy, changed in place."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x):
        x = x.clone()
        mean = torch.as_tensor(self.mean, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        std = torch.as_tensor(self.std, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        return x.sub_(mean).div_(std)


class Buffers(torch.nn.Module):
    """The usual module of one's own, with the statistics as buffers."""

    def __init__(self, times=255.0):
        super().__init__()
        self.register_buffer("mean", column(MEAN, times))
        self.register_buffer("std", column(STD, times))

    def forward(self, x):
        return (x - self.mean) / self.std


class Wrapped(torch.nn.Module):
    """A small convolutional network behind some first step."""

    def __init__(self, first, channels=3):
        super().__init__()
        torch.manual_seed(1)
        self.first = first
        self.conv = torch.nn.Conv2d(channels, 5, 3)
        self.dense = torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.dense(F.relu(self.conv(self.first(x))).mean((2, 3)))


def depthwise(factor, offset):
    made = torch.nn.Conv2d(3, 3, 1, groups=3)
    torch.nn.init.constant_(made.weight, factor)
    torch.nn.init.constant_(made.bias, offset)
    return made


def swapped(x):
    red, green, blue = x.unbind(1)
    return torch.stack([blue, green, red], 1)


# First steps, with the range of pixels that each is written for.
FIRST = {
    "divided": (lambda x: x / 255, "none"),
    "divided by almost all": (lambda x: x / 256, "none"),
    "multiplied, shifted": (lambda x: x * (1 / 127.5) - 1, "none"),
    "shifted, divided": (lambda x: (x - 127.5) / 127.5, "none"),
    "less 128": (lambda x: (x - 128) / 128, "none"),
    "in place": (lambda x: x.clone().div_(255).sub_(0.5), "none"),
    "added and multiplied": (lambda x: torch.add(torch.mul(x, 2 / 255), -1), "none"),
    "reversed difference": (lambda x: 1 - x / 127.5, "none"),
    "inverted": (lambda x: 255 - x, "none"),
    "buffers": (Buffers(), "none"),
    "buffers for 0..1": (Buffers(1.0), "0..1"),
    "Normalize": (Normalize(MEAN, STD), "0..1"),
    "divided, Normalize": (lambda x: Normalize(MEAN, STD)(x / 255), "none"),
    "Normalize to -1..1": (Normalize([0.5] * 3, [0.5] * 3), "0..1"),
    "mean alone": (lambda x: x - column(MEAN), "0..1"),
    "half alone": (lambda x: x - 0.5, "0..1"),
    "to 0..255": (lambda x: 255 * x, "0..1"),
    "to caffe": (lambda x: 255 * x[:, [2, 1, 0]] - column(CAFFE), "0..1"),
    "caffe, indexed": (lambda x: x[:, [2, 1, 0]] - column(CAFFE), "none"),
    "caffe, flipped": (lambda x: x.flip(1) - column(CAFFE), "none"),
    "caffe, stacked": (lambda x: swapped(x) - column(CAFFE), "none"),
    "caffe, concatenated": (lambda x: torch.cat([x[:, 2:], x[:, 1:2], x[:, :1]], 1) - column(CAFFE), "none"),
    "caffe, selected": (lambda x: x.index_select(1, torch.tensor([2, 1, 0])) - column(CAFFE), "none"),
    "each channel": (lambda x: torch.cat([(x[:, [i]] / 255 - MEAN[i]) / STD[i] for i in range(3)], 1), "none"),
    "flipped twice": (lambda x: x.flip(1).flip(1) / 255, "none"),
    "padded": (lambda x: F.pad(x, (2, 2, 2, 2)) / 255, "none"),
    "padded after": (lambda x: F.pad(x / 255, (1, 1, 1, 1), value=0.5), "none"),
    "resized": (lambda x: F.interpolate(x, size=(24, 24), mode="bilinear") / 127.5 - 1, "none"),
    "cropped": (lambda x: x[..., 2:-2, 2:-2].float() / 255, "none"),
    "cast": (lambda x: x.to(torch.float64).float().contiguous() / 255, "none"),
    "clamped": (lambda x: x.clamp(0, 255) / 127.5 - 1, "none"),
    "clamped after": (lambda x: (x / 255).clamp(0, 1), "none"),
    "clamped only": (lambda x: torch.clamp(x, 0, 255), "none"),
    "clamped to 0..1": (lambda x: torch.clip(x, 0.0, 1.0), "0..1"),
    "from -1..1": (lambda x: (x + 1) / 2, "-1..1"),
    "LPIPS": (Normalize([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]), "-1..1"),
    "mean of MNIST": (Normalize([0.1307] * 3, [0.3081] * 3), "0..1"),
    "permuted": (lambda x: (x.permute(0, 2, 3, 1) / 255).permute(0, 3, 1, 2), "none"),
    "depthwise": (depthwise(1 / 127.5, -1), "none"),
    "then gamma": (lambda x: (x / 255) ** 2.2, "none"),
    "twice used": (lambda x: x / 127.5 - torch.ones_like(x), "none"),
}


def pixels(channels=3):
    return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, channels)).astype(np.float32)


def own_outputs(module, taken):
    """The module's own outputs for pixels in the range that it is written for."""
    with torch.no_grad():
        return module(torch.tensor(PRESETS[taken].apply(pixels()).transpose(0, 3, 1, 2))).numpy()


def opened(first, channels=3):
    module = Wrapped(first, channels)
    return module, convscope.open_model(module, size=SIDE)


@pytest.mark.parametrize("case", FIRST)
def test_a_module_that_scales_gets_the_pixels_that_it_is_written_for(case):
    first, taken = FIRST[case]
    module, network = opened(first)
    assert (network.preprocessing.name, network.preprocessing.certainty) == (taken, "found")
    own = own_outputs(module, taken)
    np.testing.assert_allclose(network.predict(network.preprocessing.apply(pixels())), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in FIRST if name not in ("then gamma", "cropped")])
def test_the_measured_response_is_the_first_step_itself(case):
    first, taken = FIRST[case]
    module, network = opened(first)
    paths = [layer.path for layer in network.layers]
    (responses,) = responses_at(network, [paths[paths.index("conv") - 1]]).values()
    low, high = RANGES[taken]
    unit = np.array([0.2, 0.4, 0.8])
    image = torch.tensor((low + (high - low) * unit).astype(np.float32)).reshape(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        own = module.first(image)
    middle = own[0, :, own.shape[2] // 2, own.shape[3] // 2].numpy()
    np.testing.assert_allclose(unit @ responses[taken].matrix + responses[taken].offset, middle, rtol=1e-4, atol=1e-4)


# -- files ---------------------------------------------------------------------------------------------------

IN_FILES = (
    "divided",
    "buffers",
    "Normalize",
    "caffe, indexed",
    "caffe, stacked",
    "padded",
    "resized",
    "clamped",
    "depthwise",
)


def written(module, kind, path):
    example = torch.rand(1, 3, SIDE, SIDE)
    if kind == "exported":
        torch.export.save(torch.export.export(module, (example,)), path)
    else:
        torch.jit.trace(module, example).save(path)
    return str(path)


@pytest.mark.parametrize("kind", ["traced", "exported"])
@pytest.mark.parametrize("case", IN_FILES)
def test_the_scaling_inside_of_a_file_is_measured(case, kind, tmp_path):
    first, taken = FIRST[case]
    module = Wrapped(first).eval()
    network = convscope.open_model(
        written(module, kind, tmp_path / "model.pt2"), size=None if kind == "exported" else SIDE
    )
    assert (network.preprocessing.name, network.preprocessing.certainty) == (taken, "found")
    own = own_outputs(module, taken)
    for image, logits in zip(network.preprocessing.apply(pixels()), own, strict=True):
        np.testing.assert_allclose(network.predict(image[None])[0], logits, rtol=1e-4, atol=1e-5)


def onnx_model(path, nodes, constants):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    kernel = np.random.default_rng(2).normal(0, 0.1, (4, 3, 3, 3))
    nodes = [
        *(
            helper.make_node(operator, inputs, [output], name=output, **given)
            for operator, inputs, output, given in nodes
        ),
        helper.make_node("Conv", ["prepared", "kernel"], ["conv"], name="conv"),
        helper.make_node("GlobalAveragePool", ["conv"], ["pooled"], name="pooled"),
        helper.make_node("Flatten", ["pooled"], ["scores"], name="scores"),
    ]
    kind = onnx.TensorProto.FLOAT
    values = {name: np.asarray(value, getattr(value, "dtype", np.float32)) for name, value in constants.items()}
    values["kernel"] = kernel.astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info("image", kind, (1, 3, SIDE, SIDE))],
        [helper.make_tensor_value_info("scores", kind, (1, 4))],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def of_channels(values):
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


ONNX = {
    "Sub, Div": (
        [("Sub", ["image", "mean"], "less", {}), ("Div", ["less", "std"], "prepared", {})],
        {"mean": of_channels(MEAN), "std": of_channels(STD)},
        "0..1",
    ),
    "Mul, Add": (
        [("Mul", ["image", "factor"], "scaled", {}), ("Add", ["scaled", "shift"], "prepared", {})],
        {"factor": 1 / 127.5, "shift": -1.0},
        "none",
    ),
    "Gather, Sub": (
        [("Gather", ["image", "order"], "swapped", {"axis": 1}), ("Sub", ["swapped", "mean"], "prepared", {})],
        {"order": np.array([2, 1, 0], np.int64), "mean": of_channels(CAFFE)},
        "none",
    ),
}


@pytest.mark.parametrize("case", ONNX)
def test_the_scaling_inside_of_an_onnx_file_is_measured(case, tmp_path):
    nodes, constants, taken = ONNX[case]
    network = convscope.open_model(onnx_model(tmp_path / "model.onnx", nodes, constants))
    assert (network.preprocessing.name, network.preprocessing.certainty) == (taken, "found")


# -- what shows no range --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        lambda x: x,
        lambda x: x.float().contiguous(),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: x[:, [2, 1, 0]],
        lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-6),
        lambda x: torch.sign(x - x.amax((2, 3), keepdim=True)),
    ],
    ids=["nothing", "casts", "padding", "a flip", "standardised", "signs"],
)
def test_where_no_scaling_is_shown_the_usual_is_a_guess(first):
    _, network = opened(first)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("torch", "guess")


def test_arithmetic_that_tells_no_range_is_a_guess_and_said():
    _, network = opened(lambda x: x * 0.1 - 5)
    assert network.preprocessing.certainty == "guess"
    assert "arithmetic on its own input up to sub" in network.preprocessing.reason


def test_one_channel_and_other_numbers_of_channels():
    for channels in (1, 4, 6):
        _, network = opened(lambda x: x / 255 - 0.5, channels=channels)
        assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")


def test_pixels_given_by_the_user_win_over_the_models_scaling():
    _, network = opened(lambda x: x / 255)
    again = convscope.open_model(network.module, size=SIDE, preprocess="0..1")
    assert (again.preprocessing.name, again.preprocessing.certainty) == ("0..1", "set")
