"""Modules of PyTorch in int8, and scripted modules in memory: named as what they are, and computed as they compute."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.ao.quantization as quantization  # noqa: E402
from expecting import raises  # noqa: E402
from torch import nn  # noqa: E402

import convscope  # noqa: E402
from convscope.errors import ModelError, UsageError  # noqa: E402
from convscope.networks.passes import Pass  # noqa: E402

pytestmark = [
    pytest.mark.without_keras,
    pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="this torch has no fbgemm"),
    pytest.mark.filterwarnings("ignore"),  # torch calls its own quantization deprecated
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.relu, self.conv2 = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.conv(self.quant(x)))
        x = torch.flatten(self.pool(self.bn(self.conv2(x))), 1)
        return self.dequant(self.fc(x))


def static():
    torch.manual_seed(0)
    module = Net().eval()
    module.qconfig = quantization.get_default_qconfig("fbgemm")
    module = quantization.prepare(quantization.fuse_modules(module, [["conv", "relu"]]))
    module(torch.randn(8, 3, 16, 16))
    return quantization.convert(module)


def dynamic(dtype=torch.qint8):
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return quantization.quantize_dynamic(nn.Sequential(*parts).eval(), {nn.Linear}, dtype=dtype)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()


def images(count=2, side=16):
    return np.random.default_rng(0).normal(size=(count, side, side, 3)).astype("float32")


def given(x):
    return torch.as_tensor(x.transpose(0, 3, 1, 2))


def names(network):
    return {layer.path: (layer.kind, layer.class_name) for layer in network.layers}


# -- int8 --------------------------------------------------------------------------------------------------


def test_static_int8_modules_are_layers_by_their_names():
    network = convscope.open_model(static(), size=16)
    found = names(network)
    assert found["conv"] == ("conv", "ConvReLU2d (int8)")
    assert found["conv2"] == ("conv", "Conv2d (int8)")
    assert found["bn"] == ("norm", "BatchNorm2d (int8)")
    assert found["fc"] == ("dense", "Linear (int8)")
    assert found["pool"][0] == "global_pool"
    assert [layer.path for layer in network.select("conv")] == ["conv", "conv2"]
    assert any("4 layers in int8" in note for note in network.source.notes)


def test_static_int8_activations_are_the_numbers_that_they_stand_for():
    module, x = static(), images()
    network = convscope.open_model(module, size=16, preprocess="none")
    with torch.no_grad():
        inside = module.conv(module.quant(given(x)))
        np.testing.assert_allclose(network.predict(x), module(given(x)).numpy(), atol=1e-6)
    program = network.compile(lambda run, x: dict(run(x, Pass(record=("conv",))).activations))
    found = program(network.tensor(x))["conv"]
    np.testing.assert_array_equal(found, inside.dequantize().permute(0, 2, 3, 1).numpy())


def test_a_static_int8_activation_can_be_replaced():
    """As ablation does; the new values are rounded like the layer's own."""
    module, x = static(), images()
    network = convscope.open_model(module, size=16, preprocess="none")
    program = network.compile(lambda run, x: run(x, Pass(replace=("conv2",)), {"conv2": lambda y: y * 0}).logits)
    with torch.no_grad():
        scale = module.conv2.scale, module.conv2.zero_point
        zeros = torch.quantize_per_tensor(torch.zeros(2, 6, 12, 12), *scale, torch.quint8)
        wanted = module.dequant(module.fc(torch.flatten(module.pool(module.bn(zeros)), 1)))
    np.testing.assert_allclose(program(network.tensor(x)), wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.qint8, "int8"), (torch.float16, "float16")])
def test_dynamic_int8_modules_are_layers_by_their_names(dtype, kind):
    module, x = dynamic(dtype), images()
    network = convscope.open_model(module, size=16)
    assert names(network)["4"] == ("dense", f"Linear (dynamic {kind})")
    assert names(network)["0"] == ("conv", "Conv2d")
    np.testing.assert_allclose(network.predict(x), module(given(x)).detach().numpy(), atol=1e-6)
    assert any(f"1 layer in dynamic {kind}" in note for note in network.source.notes)


def test_the_doctor_names_them():
    found = convscope.doctor(convscope.open_model(static(), size=16))
    assert any("the graph is cut" in problem and "conv2" in problem for problem in found.problems)
    assert any("int8" in note for note in found.network["opened"])


def test_a_float_module_is_not_called_quantized():
    network = convscope.open_model(plain(), size=16)
    assert not any("quantized" in note for note in network.source.notes)
    assert not any("int8" in layer.class_name for layer in network.layers)


def test_int8_layers_are_computed_in_float32_scripted_or_not(monkeypatch):
    """Where a processor has bfloat16, ascents compute in it, and int8 layers take float32 alone."""
    monkeypatch.setattr("convscope.networks.backends.TorchBackend.bfloat16_pays", lambda *_: True)
    assert convscope.open_model(plain(), size=16).precision_for_ascent() == "bfloat16"
    assert convscope.open_model(torch.jit.script(plain()), size=16).precision_for_ascent() == "bfloat16"
    for module in (dynamic(), torch.jit.script(dynamic()), static(), torch.jit.script(static())):
        assert convscope.open_model(module, size=16, trust=True).precision_for_ascent() == "float32"


def test_a_package_of_the_user_s_with_quantized_in_its_name_is_none(monkeypatch):
    monkeypatch.setattr("convscope.networks.backends.TorchBackend.bfloat16_pays", lambda *_: True)
    own = type("Linear", (nn.Linear,), {"__module__": "mylab.quantized.layers"})
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), own(4, 2)).eval()
    assert convscope.open_model(module, size=16).precision_for_ascent() == "bfloat16"


class Linear(nn.Linear):
    """A class of the user's with the name of another."""


def test_a_module_of_the_user_s_is_not_taken_for_one_by_its_name():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(4, 2)).eval()
    assert names(convscope.open_model(module, size=16))["3"] == ("dense", "Linear")


# -- scripted modules in memory ----------------------------------------------------------------------------


def scripted():
    return torch.jit.script(plain())


def traced():
    return torch.jit.trace(plain(), torch.rand(1, 3, 16, 16))


def frozen():
    return torch.jit.freeze(scripted())


@pytest.mark.parametrize("make", [scripted, traced, frozen])
def test_a_scripted_module_in_memory_opens_as_its_file_does(tmp_path, make):
    module, x = make(), images()
    torch.jit.save(module, tmp_path / "module.pt")
    of_file = convscope.open_model(tmp_path / "module.pt", size=16)
    network = convscope.open_model(module, size=16)
    assert names(network) == names(of_file)
    assert network.weights_sha256() == of_file.weights_sha256()
    np.testing.assert_array_equal(network.predict(x), of_file.predict(x))
    np.testing.assert_allclose(network.predict(x), plain()(given(x)).detach().numpy(), atol=1e-5)
    maps = [convscope.heatmap(opened, [np.uint8(255 * x[0].clip(0, 1))]).maps for opened in (network, of_file)]
    np.testing.assert_array_equal(maps[0], maps[1])


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_scripted_module_that_is_trained_further_is_followed(make):
    module, x = make(), images()
    network = convscope.open_model(module, size=16)
    before, sha256 = network.predict(x), network.weights_sha256()
    step = torch.optim.SGD(module.parameters(), lr=0.5)
    module(given(x)).square().sum().backward()
    step.step()
    after = module(given(x)).detach().numpy()
    assert abs(after - before).max() > 1e-3
    np.testing.assert_allclose(network.predict(x), after, atol=1e-5)
    assert network.weights_sha256() != sha256
    module.load_state_dict({name: 0 * tensor for name, tensor in module.state_dict().items()})
    np.testing.assert_array_equal(network.predict(x), 0 * before)


def test_buffers_of_nested_scripted_modules_are_followed_and_shared_ones_once():
    norm = nn.BatchNorm2d(4)
    parts = nn.Sequential(nn.Conv2d(3, 4, 3), norm), nn.Sequential(nn.Conv2d(4, 4, 3), norm)
    module = torch.jit.script(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    network, x = convscope.open_model(module, size=16, head="linear"), images()
    with torch.no_grad():
        getattr(getattr(module, "0"), "1").running_mean.add_(3)
    np.testing.assert_allclose(network.predict(x), module(given(x)).detach().numpy(), atol=1e-5)


def test_the_scripted_module_stays_as_it_was():
    module = torch.jit.script(plain().train())
    before = [(tensor.data_ptr(), tensor.detach().clone()) for tensor in module.state_dict().values()]
    network = convscope.open_model(module, size=16)
    convscope.heatmap(network, [np.zeros((16, 16, 3), np.uint8)])
    after = [(tensor.data_ptr(), tensor) for tensor in module.state_dict().values()]
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in zip(before, after, strict=True))
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_code_may_make_a_scripted_module(tmp_path):
    (tmp_path / "made.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    parts = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)\n"
        "    return torch.jit.script(nn.Sequential(*parts).eval())\n"
    )
    torch.save({"a": plain().state_dict()}, tmp_path / "net.pth")
    network = convscope.open_model(f"{tmp_path / 'made.py'}:make", weights=tmp_path / "net.pth", size=16)
    x = images()
    np.testing.assert_allclose(network.predict(x), plain()(given(x)).detach().numpy(), atol=1e-5)
    assert names(network)["0"] == ("conv", "Conv2d")


def test_the_same_checks_as_of_the_file(tmp_path):
    """Quantized modules set their own state, which needs trust; the message names the module, and no file of ours."""
    module = torch.jit.script(static())
    torch.jit.save(module, tmp_path / "module.pt")
    for model in (module, tmp_path / "module.pt"):
        with raises(ModelError, "needs-trust") as caught:
            convscope.open_model(model, size=16)
        assert "int8" in str(caught.value)
        assert ("TorchScript Net in memory" in str(caught.value)) == (model is module)
        assert names(convscope.open_model(model, size=16, trust=True))["conv"] == ("conv", "ConvReLU2d (int8)")


def test_a_function_that_was_scripted_is_no_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = torch.jit.trace(torch.relu, torch.rand(1, 3, 4, 4))
    with raises(ModelError, "not-a-model"):
        convscope.open_model(function, size=16)


def test_a_spec_of_a_scripted_module_says_that_it_is_in_memory():
    with raises(UsageError, "spec-in-memory", name="TorchScript Sequential in memory"):
        convscope.open_model(scripted(), size=16).spec.open()
