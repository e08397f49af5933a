"""Native PyTorch modules: taps agree with hooks of the test's own, gradients with finite differences and autograd
written out, and the module comes back as it was."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch_models  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import convscope  # noqa: E402
from convscope.errors import BackendError, ConvscopeError, ModelError, UsageError  # noqa: E402
from convscope.networks import Pass  # noqa: E402
from convscope.networks.network import Source  # noqa: E402
from convscope.networks.torch.graph import function_name  # noqa: E402
from convscope.networks.torch.modules import OpenedModule  # noqa: E402
from convscope.networks.torch.network import TorchNetwork, network_of  # noqa: E402
from convscope.techniques.activations import iter_activations  # noqa: E402

pytestmark = pytest.mark.without_keras


def image(side=40, channels=3, seed=0):
    shape = (side, side, 3) if channels == 3 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def randomised(module, seed=0):
    """Weights that are not trivial, running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        low = 0.5 if name.endswith(("running_var", "bn.weight")) else -0.4
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (1.0 if low > 0 else 0.8) + low)
    return module


class Block(nn.Module):
    """A residual block: ReLU in place, a sum in place, a functional ReLU whose name a child has too."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)

    def forward(self, x):
        y = self.conv2(self.relu(self.bn(self.conv(x))))
        y += x
        return F.relu(y)


class Small(nn.Module):
    """Stem, two blocks, pooling, dense; logits."""

    def __init__(self, channels=3, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, stride=2, bias=False)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        x = self.pool(self.blocks(F.leaky_relu(self.stem(x), 0.1)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def small(**options):
    return randomised(Small(**options))


def opened(module, **options):
    return convscope.open_model(module, **{"size": (32, 32), **options})


def by_hooks(module, network, photos):
    """What every module returned, copied at once: hooks of the test's own. `(n, h, w, c)`."""
    seen = {}
    hooks = [
        child.register_forward_hook(lambda _, __, out, at=name: seen.setdefault(at, []).append(out.detach().clone()))
        for name, child in module.named_modules()
    ]
    x = torch.from_numpy(network.prepare(photos)).permute(0, 3, 1, 2)
    training = module.training
    with torch.no_grad():
        returned = module.eval()(x)
    module.train(training)
    for hook in hooks:
        hook.remove()
    last = {name: [np.moveaxis(one.numpy(), 1, -1) for one in found] for name, found in seen.items()}
    return last, returned


def test_every_module_and_function_is_a_layer_in_the_order_of_execution():
    paths = [layer.path for layer in opened(small()).layers if layer.kind != "model"]
    block = ["conv", "bn", "relu", "conv2", "add", "relu~2"]
    assert paths == [
        *("stem", "leaky_relu"),
        *(f"blocks.0.{name}" for name in block),
        *(f"blocks.1.{name}" for name in block),
        *("pool", "adaptive_avg_pool2d", "flatten", "fc"),
    ]


def test_kinds_shapes_and_parameters():
    layers = {layer.path: layer for layer in opened(small()).layers}
    assert {path: layers[path].kind for path in ("stem", "leaky_relu", "blocks.0.bn", "blocks.0.add", "pool")} == {
        "stem": "conv",
        "leaky_relu": "activation",
        "blocks.0.bn": "norm",
        "blocks.0.add": "merge",
        "pool": "pool",
    }
    assert layers["adaptive_avg_pool2d"].kind == "global_pool"
    assert layers["stem"].shape == (15, 15, 6)
    assert layers["pool"].shape == (7, 7, 6)
    assert layers["stem"].parameters == 6 * 3 * 3 * 3
    assert layers["blocks.1.conv2"].parameters == 6 * 3 * 3 * 3 + 6
    assert layers["stem"].rectified == "leaky_relu"
    assert layers["blocks.0.conv"].rectified == "blocks.0.relu"


def test_activations_are_what_hooks_see_also_before_what_works_in_place():
    module = small()
    network = opened(module)
    photos = [image(seed=seed) for seed in range(3)]
    found = convscope.activations(network, photos, "all")
    expected, returned = by_hooks(module, network, found.images)
    for name in ("stem", "blocks.0.conv", "blocks.0.bn", "blocks.0.relu", "blocks.1.conv2", "pool"):
        np.testing.assert_array_equal(found.arrays[name], expected[name][0], err_msg=name)
    np.testing.assert_array_equal(network.predict(network.prepare(found.images)), returned.numpy())
    # The functional ReLU: from the values of the modules around it.
    x = np.maximum(expected["blocks.0.conv2"][0] + F.leaky_relu(torch.tensor(expected["stem"][0]), 0.1).numpy(), 0)
    np.testing.assert_allclose(found.arrays["blocks.0.relu~2"], x, atol=1e-6)
    assert (expected["blocks.0.bn"][0] < 0).any()  # the ReLU in place would have left none


def test_zeros_are_counted_after_the_relu():
    network = opened(small())
    found = convscope.activations(network, [image()], "all")
    rows = {row.layer: row for row in found.statistics}
    rectified = found.arrays["blocks.0.relu"]
    assert rows["blocks.0.conv"].zeros == pytest.approx((rectified == 0).mean())
    assert rows["blocks.0.conv"].empty_channels == int((rectified == 0).all(axis=(0, 1, 2)).sum())


@pytest.mark.parametrize("path", ["stem", "leaky_relu", "blocks.0.bn", "blocks.1.add", "pool"])
def test_gradients_are_those_of_autograd_written_out(path):
    """The gradient of a logit with respect to an activation, against replaying the rest of the network by hand."""
    module = small().eval()
    network = opened(module)
    x = network.prepare(convscope.activations(network, [image()], "stem").images)
    delta = np.zeros((1, *network.layer(path).shape), np.float32)

    def score(run, x, delta):
        def inner(delta):
            seen = run(x, Pass(replace=(path,)), {path: lambda activation: activation + delta})
            return seen.logits[0, 2], ()

        return network.value_and_grad(inner)(delta)

    (value, _), gradient = network.compile(score)(network.tensor(x), network.tensor(delta))
    expected_value, expected = _by_hand(module, path, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert float(value) == pytest.approx(expected_value, abs=1e-5)
    np.testing.assert_allclose(network.numpy(gradient), np.moveaxis(expected.numpy(), 1, -1), atol=1e-6)
    assert np.abs(network.numpy(gradient)).max() > 1e-4


def _by_hand(module, path, x):
    """Logit 2 and its gradient at `path`, the network written out without anything in place."""
    cut = {}

    def at(name, value):
        if name == path:
            value = value.detach().requires_grad_()
            cut["value"] = value
        return value

    x = at("leaky_relu", F.leaky_relu(at("stem", module.stem(x)), 0.1))
    for number, block in enumerate(module.blocks):
        y = at(f"blocks.{number}.bn", block.bn(block.conv(x)))
        y = block.conv2(F.relu(y))
        x = F.relu(at(f"blocks.{number}.add", y + x))
    x = at("pool", module.pool(x))
    logit = module.fc(x.mean(dim=(2, 3)))[0, 2]
    (gradient,) = torch.autograd.grad(logit, cut["value"])
    return float(logit), gradient


class TestTheModuleComesBackAsItWas:
    @pytest.fixture
    def module(self):
        module = small().train()
        module.blocks[0].eval()  # a frozen part
        module.stem.weight.requires_grad_(False)
        module.fc.weight.grad = torch.ones_like(module.fc.weight)
        return module

    def state(self, module):
        return {
            "training": [child.training for child in module.modules()],
            "asking": [parameter.requires_grad for parameter in module.parameters()],
            "hooks": [(len(child._forward_hooks), len(child._forward_pre_hooks)) for child in module.modules()],
            "values": [value.clone() for value in module.state_dict().values()],
            "layout": [value.stride() for value in module.state_dict().values()],
            "types": [value.dtype for value in module.state_dict().values()],
            "gradients": [None if item.grad is None else item.grad.clone() for item in module.parameters()],
            "generator": torch.get_rng_state(),
            "attributes": [sorted(vars(child)) for child in module.modules()],
        }

    def same(self, before, after):
        for key in before:
            for one, other in zip(before[key], after[key], strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, key

    def test_after_every_technique(self, module):
        before = self.state(module)
        network = opened(module)
        convscope.activations(network, [image()], "all")
        convscope.heatmap(network, [image()], 1)
        convscope.filters(network, "blocks.1.relu~2", [0, 1], steps=2)
        self.same(before, self.state(module))

    def test_after_an_exception(self, module, monkeypatch):
        network = opened(module)
        before = self.state(module)

        def broken(_):
            raise RuntimeError("no")

        monkeypatch.setattr(module.blocks[1].conv2, "forward", broken)
        with pytest.raises(ModelError, match=r"its layer 'blocks\.1\.conv2' raised RuntimeError: no") as caught:
            convscope.heatmap(network, [image()], 1)
        assert str(caught.value.__cause__) == "no"
        monkeypatch.undo()
        self.same(before, self.state(module))

    def test_gradient_mode_and_generators(self, module):
        network = opened(module)
        with torch.no_grad():
            inside = convscope.heatmap(network, [image()], 1).maps
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            assert np.array_equal(convscope.heatmap(network, [image()], 1).maps, inside)
            assert torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert inside.any()

    def test_no_parameter_gets_a_gradient(self):
        module = small()
        network = opened(module)
        convscope.filters(network, "pool", [0], steps=3)
        convscope.heatmap(network, [image()], 0)
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_pass_stops_after_the_last_tap():
    module = small()
    network = opened(module)
    convscope.filters(network, "blocks.0.relu~2", [0], steps=1)  # the first look at a size goes through to the end
    ran = []
    module.fc.register_forward_hook(lambda *_: ran.append("fc"))
    module.blocks[1].register_forward_hook(lambda *_: ran.append("block 1"))
    convscope.activations(network, [image()], ["stem", "blocks.0.conv"])
    assert ran == []
    convscope.filters(network, "blocks.0.relu~2", [0], steps=2)
    assert ran == []
    network.predict(network.prepare(convscope.activations(network, [image()], "stem").images))
    assert ran == ["block 1", "fc"]


def test_weights_that_change_are_seen_at_the_next_call():
    module = small()
    network = opened(module)
    x = network.prepare(convscope.activations(network, [image()], "stem").images)
    before = network.predict(x)
    with torch.no_grad():
        module.fc.bias += 3
    np.testing.assert_allclose(network.predict(x), before + 3, atol=1e-5)


class Twice(nn.Module):
    """One convolution called twice, and its own output as a second one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        first = torch.relu(self.conv(x))
        return torch.relu(self.conv(first)).mean(dim=(2, 3))


def test_a_module_that_is_called_twice_has_two_layers():
    module = randomised(Twice())
    network = opened(module)
    assert [layer.path for layer in network.layers] == ["conv#0", "relu#0", "conv#1", "relu#1", "mean"]
    found = convscope.activations(network, [image()], "all")
    expected, _ = by_hooks(module, network, found.images)
    for nth in (0, 1):
        np.testing.assert_array_equal(found.arrays[f"conv#{nth}"], expected["conv"][nth])
    np.testing.assert_array_equal(found.arrays["relu#1"], np.maximum(expected["conv"][1], 0))


# -- heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "kind", "layer"),
    [
        (nn.Identity(), "softmax", None),
        (nn.Softmax(dim=1), "softmax", "1"),
        (nn.LogSoftmax(dim=1), "softmax", "1"),
        (nn.Sigmoid(), "sigmoid", "1"),
    ],
)
def test_a_softmax_at_the_end_is_undone(end, kind, layer):
    core = small()
    network = opened(nn.Sequential(core, end))
    assert (network.head.activation, network.head.undone) == (kind, layer)
    assert network.head.returns_logits == (layer is None)
    x = network.prepare(convscope.activations(network, [image()], "0.stem").images)
    plain = core.eval()(torch.from_numpy(x).permute(0, 3, 1, 2))
    np.testing.assert_allclose(network.predict(x), plain.detach().numpy(), atol=1e-5)
    if kind == "softmax":
        expected = torch.softmax(plain, 1).detach().numpy()
        np.testing.assert_allclose(network.head.probabilities(network.predict(x)), expected, atol=1e-6)


@pytest.mark.parametrize("function", [lambda x: F.log_softmax(x, 1), lambda x: x.softmax(dim=1)])
def test_a_functional_softmax_is_undone(function):
    class Ended(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = small()

        def forward(self, x):
            return function(self.core(x))

    module = Ended()
    network = opened(module)
    assert network.head.activation == "softmax"
    assert network.head.undone
    x = network.prepare(convscope.activations(network, [image()], "core.stem").images)
    plain = module.core.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(network.predict(x), plain, atol=1e-5)


def test_one_sigmoid_unit_has_two_classes():
    network = opened(nn.Sequential(small(classes=1), nn.Sigmoid()))
    assert network.head.binary
    logits = network.predict(network.prepare(convscope.activations(network, [image()], "0.stem").images))
    assert logits.shape == (1, 2)
    assert logits[0, 0] == -logits[0, 1]


def test_maps_have_no_classes():
    network = opened(nn.Conv2d(3, 4, 3))
    assert network.head.spatial
    with pytest.raises(UsageError, match="class scores"):
        convscope.heatmap(network, [image()])


# -- what modules return and take ------------------------------------------------------------------------


@dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor


class Returning(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.core, self.how = small(), how

    def forward(self, x):
        return self.how(self.core(x), self.core.stem(x))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        (lambda y, z: (y, z), ("output_0", "output_1")),
        (lambda y, z: {"logits": y, "features": z}, ("logits", "features")),
        (Answer, ("logits", "features")),
    ],
)
def test_modules_that_return_several_things(how, names):
    module = Returning(how)
    network = opened(module)
    assert network.outputs == names
    x = network.prepare(convscope.activations(network, [image()], "core.pool").images)
    plain = module.core.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_array_equal(network.predict(x), plain)
    assert convscope.heatmap(network, [image()], 1).maps.any()
    assert opened(module, output=names[1]).head.spatial
    with pytest.raises(UsageError, match="no output"):
        opened(module, output="nothing")


class Splitting(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), how

    def forward(self, x):
        return self.how(self.conv(x))


class Inner(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.split, self.fc = Splitting(how), nn.Linear(4, 3)

    def forward(self, x):
        found = self.split(x)
        first = found["a"] if isinstance(found, dict) else found.logits if isinstance(found, Answer) else found[0]
        return self.fc(first.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("how", "path"),
    [
        (lambda y: (torch.relu(y), torch.tanh(y)), "split[0]"),
        (lambda y: {"a": torch.relu(y), "b": torch.tanh(y)}, "split[a]"),
        (lambda y: Answer(torch.relu(y), torch.tanh(y)), "split[logits]"),
    ],
)
def test_a_rule_replaces_one_of_several_outputs_of_a_layer(how, path):
    network = opened(randomised(Inner(how)))
    x = network.tensor(network.prepare(convscope.activations(network, [image()], "split.conv").images))
    changed = network.compile(lambda run, x: run(x, Pass(replace=(path,)), {path: lambda a: a * 0}).logits)(x)
    np.testing.assert_allclose(network.numpy(changed)[0], network.module.fc.bias.detach().numpy(), atol=1e-6)


def test_grey_images_and_fixed_sizes_behind_a_view():
    class Digits(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 5)
            self.fc = nn.Linear(4 * 12 * 12, 10)

        def forward(self, x):
            return F.log_softmax(self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, 4 * 12 * 12)), dim=1)

    network = convscope.open_model(randomised(Digits()))
    assert (network.inputs.channels, network.inputs.size, network.inputs.free) == (1, (28, 28), False)
    assert "guess" in network.inputs.note
    assert network.preprocessing.name == "0..1"
    assert convscope.activations(network, [image(channels=1)]).arrays["conv"].shape == (1, 24, 24, 4)
    # The layers before the dense one take any size.
    assert convscope.filters(network, "conv", [0], size=40, steps=1).values.shape == (1, 40, 40, 1)
    with pytest.raises(ModelError, match="can't be run on an image of 40x40"):
        convscope.open_model(randomised(Digits()), size=40)


def test_a_size_that_is_not_square_has_to_be_given():
    class Road(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 5, stride=2)
            self.fc = nn.Linear(4 * 31 * 98, 1)

        def forward(self, x):
            return self.fc(torch.flatten(self.conv(x), 1))

    with pytest.raises(ModelError, match="66x200"):
        convscope.open_model(Road())
    network = convscope.open_model(Road(), size=(66, 200))
    assert network.inputs.size == (66, 200)
    assert not network.inputs.free
    assert network.head.linear


def test_the_size_of_networks_for_small_images_is_guessed():
    network = convscope.open_model(small())
    assert network.inputs.size == (32, 32)
    assert "guess" in network.inputs.note
    assert convscope.open_model(small(), size=96).inputs.size == (96, 96)


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.extra = small(), nn.Linear(3, 5)

        def forward(self, image, extra, flag=None):
            return self.core(image) + self.extra(extra)

    module = randomised(Two())
    with pytest.raises(UsageError, match="'extra' with feed="):
        opened(module)
    extra = np.array([[1.0, -2.0, 0.5]])
    network = opened(module, feed={"extra": extra})
    x = network.prepare(convscope.activations(network, [image(), image(seed=1)], "core.stem").images)
    plain = module.eval()(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(extra).float().expand(2, 3))
    np.testing.assert_array_equal(network.predict(x), plain.detach().numpy())
    with pytest.raises(UsageError, match="no input 'extr'"):
        opened(module, feed={"extr": extra})


# -- wrappers and precisions -----------------------------------------------------------------------------


def test_data_parallel_and_compiled_modules():
    module = small()
    expected = opened(module)
    x = expected.prepare(convscope.activations(expected, [image()], "stem").images)
    inner = small()
    inner.blocks = torch.compile(inner.blocks)
    for wrapped in (nn.DataParallel(small()), torch.compile(small()), inner):
        network = opened(wrapped)
        paths = [layer.path for layer in network.layers]
        assert paths == [layer.path for layer in expected.layers]
        np.testing.assert_array_equal(network.predict(x), expected.predict(x))
        assert convscope.heatmap(network, [image()], 1).maps.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_of_another_precision(dtype):
    module = small().to(dtype)
    network = opened(module)
    reference = opened(small())
    found = convscope.activations(network, [image()], "all")
    expected = convscope.activations(reference, [image()], "all")
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]
    assert found.arrays["pool"].dtype == np.float32
    np.testing.assert_allclose(found.arrays["pool"], expected.arrays["pool"], rtol=tolerance, atol=tolerance)
    assert convscope.heatmap(network, [image()], 1).maps.any()
    assert convscope.filters(network, "pool", [0], steps=2).rows[0].activation > 0
    assert all(parameter.dtype == dtype for parameter in module.parameters())
    assert len(network.weights_sha256()) == 64


def test_autocast():
    network, exact = opened(small(), precision="bfloat16"), opened(small())
    x = network.prepare(convscope.activations(network, [image()], "stem").images)
    assert "bfloat16" in network.backend
    rough, fine = network.predict(x), exact.predict(x)
    assert not np.array_equal(rough, fine)
    np.testing.assert_allclose(rough, fine, rtol=0.1, atol=0.1)
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        opened(small(), precision="int8")


def test_devices():
    module = small()
    assert opened(module, device="cpu").backend == "cpu"
    with pytest.raises(BackendError, match="expected cpu, cuda or mps"):
        opened(module, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="'cuda' can't be used"):
            opened(module, device="cuda")
    with pytest.raises(UsageError, match="move it yourself"):
        opened(module, device="meta")


# -- other traps -----------------------------------------------------------------------------------------


def test_lazily_created_layers_are_made_in_a_copy():
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
    generator = torch.get_rng_state()
    network = opened(module)
    assert isinstance(module[0].weight, nn.parameter.UninitializedParameter)
    assert any("random weights" in note for note in network.source.notes)
    assert network.layer("0").shape == (30, 30, 4)
    assert torch.equal(generator, torch.get_rng_state())
    assert np.array_equal(network.weights()[0], opened(module).weights()[0])


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm])
def test_spectral_norm(norm):
    module = small()
    norm(module.blocks[0].conv)
    network = opened(module)
    assert network.layer("blocks.0.conv").kind == "conv"
    weight = module.eval().blocks[0].conv.weight
    found = convscope.activations(network, [image()], "all")
    x = torch.tensor(found.arrays["leaky_relu"]).permute(0, 3, 1, 2)
    expected = F.conv2d(x, weight, module.blocks[0].conv.bias, padding=1).detach().numpy()
    np.testing.assert_allclose(found.arrays["blocks.0.conv"], np.moveaxis(expected, 1, -1), atol=1e-5)
    assert convscope.filters(network, "blocks.0.conv", [0], steps=2).rows[0].activation != 0


class NextBlock(nn.Module):
    """As in ConvNeXt: depthwise, then channels last for the norm and the dense layers, and back."""

    def __init__(self, channels=6):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, dilation=1)
        self.norm = nn.LayerNorm(channels)
        self.grow, self.shrink = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.shrink(F.gelu(self.grow(y))).permute(0, 3, 1, 2)


def test_maps_with_the_channels_last_inside_a_network():
    module = randomised(nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), NextBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network = opened(module, size=(32, 40))
    shapes = {layer.path: layer.shape for layer in network.layers}
    assert shapes["1.dwconv"] == shapes["1.norm"] == shapes["1.shrink"] == shapes["1.add"] == (8, 10, 6)
    assert shapes["1.grow"] == shapes["1.gelu"] == (8, 10, 24)
    seen = {}
    hook = module[1].grow.register_forward_hook(lambda _, __, out: seen.update(grow=out.detach().numpy()))
    found = convscope.activations(network, [image()], "all")
    hook.remove()
    np.testing.assert_array_equal(found.arrays["1.grow"], seen["grow"])
    assert convscope.heatmap(network, [image()], 1, layer="1.gelu").maps.shape == (1, 8, 10)


class Doubled(torch.autograd.Function):
    """An operation that no hook and no function mode sees."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_operations_of_the_users_own_don_t_hide_what_follows():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(torch.relu(Doubled.apply(self.conv(x))).mean(dim=(2, 3)))

    network = opened(randomised(Custom()))
    assert [layer.path for layer in network.layers] == ["conv", "mul", "relu", "mean", "fc"]
    assert all(layer.on_path for layer in network.layers)
    found = convscope.activations(network, [image()], "all")
    np.testing.assert_allclose(found.arrays["relu"], np.maximum(2 * found.arrays["conv"], 0))


def test_what_is_computed_from_weights_alone_is_no_layer():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(4, 2)

        def forward(self, x):
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return self.fc(F.relu(F.conv2d(x, weight)).mean(dim=(2, 3)))

    network = opened(Standardised())
    assert [(layer.path, layer.kind) for layer in network.layers] == [
        *(("conv2d", "conv"), ("relu", "activation"), ("mean", "global_pool"), ("fc", "dense"))
    ]


def test_a_path_that_depends_on_the_input_is_said():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return (self.conv(x) if x.max() <= 0 else self.other(x)).mean(dim=(2, 3))

    network = opened(Moody(), preprocess="0..1")
    with pytest.raises(ModelError, match="conv did not run"):
        convscope.activations(network, [image()], "conv")


def test_scaling_inside_the_module_is_found():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = small()

        def forward(self, x):
            return self.core(x / 255)

    network = opened(Scaled())
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")


def test_batch_norm_tells_of_the_pixels():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        module[0].weight[:4] = module[0].weight[:4].abs()
    y, x = np.mgrid[:32, :32]
    rng = np.random.default_rng(0)
    smooth = [115 + 60 * np.sin(rng.uniform(0, 6) + x / 9 + y / 7 * rng.uniform(-1, 1)) for _ in range(96)]
    pixels = torch.tensor(np.stack(smooth)[:, None].repeat(3, axis=1), dtype=torch.float32)
    module.train()
    for _ in range(60):
        module(pixels / 127.5 - 1)
    assert opened(module).preprocessing.name == "-1..1"


def test_modules_without_images():
    with pytest.raises(ModelError, match="can't be run on an image"):
        convscope.open_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))

    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ModelError, match="no tensor"):
        convscope.open_model(Silent(), size=(32, 32))


def test_keras_options_are_refused():
    with pytest.raises(UsageError, match="backend= 'jax' is for Keras"):
        opened(small(), backend="jax")
    with pytest.raises(UsageError, match="weights= goes with code"):
        opened(small(), weights="weights.pt")


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (torch.Tensor.relu_, "relu"),
        (torch.ops.aten.relu.default, "relu"),
        (torch.Tensor.__iadd__, "add"),
        (torch.Tensor.__radd__, "add"),
        (torch.Tensor.__truediv__, "div"),
        (torch.isfinite, "isfinite"),
    ],
)
def test_plain_names_of_functions(function, name):
    assert function_name(function) == name


def test_a_network_is_a_torch_network():
    network = opened(small())
    assert isinstance(network, TorchNetwork)
    assert convscope.open_model(network) is network
    assert network.framework == f"torch {torch.__version__}"
    assert network.parameters == sum(parameter.numel() for parameter in small().parameters())


def drawn(network):
    """Two prepared images of noise."""
    shape = (2, *network.inputs.size, network.inputs.channels)
    return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


class Gated(nn.Module):
    """The same operation on weights alone and on the image; a head that works in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.a, self.b = nn.Parameter(torch.rand(1, 4, 1, 1)), nn.Parameter(torch.rand(1, 4, 1, 1))

    def forward(self, x):
        gate = self.a * self.b
        y = self.conv(x) * gate
        return self.out(y.mean((2, 3))).sigmoid_()


def test_taps_count_calls_on_weights_alone_too():
    torch.manual_seed(0)
    module = Gated().eval()
    network = convscope.open_model(module, size=12, preprocess="0..1")
    x = drawn(network)
    _, seen = network.forward(x, ["mul"])
    with torch.no_grad():
        expected = module.conv(torch.from_numpy(x).permute(0, 3, 1, 2)) * module.a * module.b
    np.testing.assert_allclose(seen["mul"], expected.permute(0, 2, 3, 1).numpy(), rtol=1e-5)


def test_a_sigmoid_that_works_in_place_is_undone():
    torch.manual_seed(0)
    module = Gated().eval()
    network = convscope.open_model(module, size=12, preprocess="0..1")
    x = drawn(network)
    assert network.head.activation == "sigmoid"
    assert network.head.undone
    with torch.no_grad():
        outputs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(network.predict(x), np.log(outputs / (1 - outputs)), rtol=1e-4, atol=1e-5)


def test_parametrisations_are_no_layers():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    network = convscope.open_model(nn.Sequential(conv, nn.ReLU()).eval(), size=12)
    assert [layer.path for layer in network.layers] == ["0", "1"]
    photos = [np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8) for index in range(6)]
    assert convscope.activations(network, photos, "all").arrays["0"].shape == (6, 10, 10, 4)


class Counting(nn.Module):
    """Buffers that a pass changes: one in place, one that is put in another's place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("low", torch.tensor(float("inf")))

    def forward(self, x):
        self.seen += 1
        self.low = torch.minimum(self.low, x.min())
        return self.conv(x).mean((2, 3))


def test_buffers_that_a_pass_changes_are_as_before():
    module = Counting().eval()
    low = module.low
    network = convscope.open_model(module, size=12)
    photo = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    convscope.activations(network, photo)
    convscope.filters(network, "conv", [0], steps=2)
    assert (float(module.seen), float(module.low)) == (0, float("inf"))
    assert module.low is low
    module(torch.zeros(1, 3, 12, 12))
    assert float(module.seen) == 1
    convscope.heatmap(network, photo)
    assert (float(module.seen), float(module.low)) == (1, 0)


def test_threads_do_not_turn_each_others_modes():
    """One opens a module in training mode while another looks into it: no norm may learn from that."""
    import threading

    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 3)).train()
    network = convscope.open_model(module)
    x, failed = drawn(network), []

    def look():
        try:
            for _ in range(20):
                network.predict(x)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3):
        convscope.open_model(module, size=32)
    thread.join()
    assert not failed
    assert module[1].num_batches_tracked == 0
    assert all(child.training for child in module.modules())


def test_weights_made_for_inference_alone_are_refused():
    with torch.inference_mode():
        module = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ModelError, match="inference_mode"):
        convscope.open_model(module)


class Normalising(nn.Module):
    """Subtracts and divides by buffers, one number for each channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv((x - self.mean) / self.std).mean((2, 3))


@pytest.mark.parametrize(("unit", "name"), [(1.0, "0..1"), (255.0, "none")])
def test_scaling_by_buffers_is_found(unit, name):
    mean, std = ([unit * value for value in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    network = convscope.open_model(Normalising(mean, std).eval(), size=16)
    assert (network.preprocessing.name, network.preprocessing.certainty) == (name, "found")


class Remembering(nn.Module):
    """Keeps a grid for the size that it has seen, and takes one size only."""

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.grids = nn.Conv2d(3, 2, 3), nn.Linear(2 * 98 * 98, 3), {}

    def forward(self, x):
        y = self.conv(x)
        if y.shape[2:] not in self.grids:
            self.grids[y.shape[2:]] = torch.ones(y.shape[2:], device=y.device)
        return self.out((y * self.grids[y.shape[2:]]).flatten(1))


def test_what_a_module_remembers_of_a_pass_holds_no_empty_tensors():
    network = convscope.open_model(Remembering().eval())
    assert network.inputs.size == (100, 100)
    assert np.isfinite(network.predict(drawn(network))).all()


# -- passes of the ascent: another precision, without a non-linearity -------------------------------------


def passed(network, x, record, **options):
    program = network.compile(lambda run, x: dict(run(x, Pass(record=tuple(record), **options)).activations))
    return {path: network.numpy(found) for path, found in program(network.tensor(x)).items()}


@pytest.fixture
def residual():
    module = randomised(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    return convscope.open_model(module, size=(20, 20))


def test_a_pass_in_bfloat16_is_near_and_its_records_are_float32(residual):
    x = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    strides = [tensor.stride() for tensor in residual.module.parameters()]
    exact, near = (passed(residual, x, ("1.bn",), precision=kind)["1.bn"] for kind in ("float32", "bfloat16"))
    scale = np.abs(exact).max()
    assert near.dtype == np.float32
    assert 1e-5 * scale < np.abs(near - exact).max() < 0.05 * scale
    assert all(tensor.dtype == torch.float32 for tensor in residual.module.parameters())
    assert [tensor.stride() for tensor in residual.module.parameters()] == strides
    np.testing.assert_array_equal(passed(residual, x, ("1.bn",))["1.bn"], exact)


def test_a_pass_without_a_non_linearity_records_what_comes_before_it(residual):
    x = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    function = [layer.path for layer in residual.layers if layer.kind == "activation"][-1]
    assert function != "1.relu"
    before = passed(residual, x, ("1.bn", "1.conv2", "0"))
    lifted = passed(residual, x, ("1.relu",), preactivations=("1.relu",))["1.relu"]
    np.testing.assert_allclose(lifted, before["1.bn"], atol=1e-5)
    assert lifted.min() < 0
    assert residual.module[1].relu.inplace
    summed = passed(residual, x, (function,), preactivations=(function,))[function]
    np.testing.assert_allclose(summed, before["1.conv2"] + before["0"], atol=1e-4)
    assert summed.min() < 0
    assert residual.nonlinearities("1.relu") == ("1.relu",)
    assert residual.nonlinearities(function) == (function,)
    assert not residual.nonlinearities("1.bn")
    squeeze = torch_models.squeezenet()
    fire = convscope.open_model(squeeze, size=64)
    assert fire.nonlinearities("features.4") == tuple(f"features.4.expand{k}x{k}_activation" for k in (1, 3))
    assert passed(residual, x, ("1.relu",))["1.relu"].min() == 0


def test_an_exception_is_known_for_the_memory(residual):
    assert residual.out_of_memory(MemoryError())
    assert residual.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert residual.out_of_memory(
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
    )
    assert residual.out_of_memory(ValueError("RESOURCE_EXHAUSTED: out of memory while trying to allocate"))
    assert not residual.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_scrambling_takes_the_kernels_in_the_order_of_execution_and_gives_them_back():
    """Of the last one alone nothing before it changes, no norm's statistics either."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("std", torch.ones(1, 3, 1, 1))
            self.head = nn.Linear(5, 4)  # named before what comes before it
            self.norm, self.conv = nn.BatchNorm2d(5), nn.Conv2d(3, 5, 3)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.conv(x / self.std))).mean(dim=(2, 3)))

    torch.manual_seed(0)
    module = Net().eval()
    module.norm.running_mean.normal_()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = convscope.open_model(module, preprocess="0..1", size=12)
    x = np.random.default_rng(0).random((2, 12, 12, 3)).astype(np.float32)
    whole, maps = network.predict(x), network.forward(x, ("norm",))[1]["norm"]
    assert len(network.stages()) == 2
    with network.scrambled(network.stages()[-1:]):
        assert not np.allclose(network.predict(x), whole)
        np.testing.assert_array_equal(network.forward(x, ("norm",))[1]["norm"], maps)
    with network.scrambled(network.stages()):
        assert not np.allclose(network.forward(x, ("norm",))[1]["norm"], maps)
    np.testing.assert_array_equal(network.predict(x), whole)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_network_that_remembers_how_many_images_it_was_given_is_replayed_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x):
            count = x.shape[0]
            return self.head(torch.relu(self.conv(x)).sum(dim=(2, 3)).view(-1, 6).view(count, -1, 6).mean(dim=1))

    torch.manual_seed(0)
    network = convscope.open_model(Net().eval(), preprocess="0..1", size=12)
    photo = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    found = convscope.heatmap(network, photo, 1, "conv", method="ablation-cam")
    maps = network.forward(network.prepare(found.images), ("conv",))[1]["conv"][0]
    weight = network.module.head.weight[1].detach().numpy()
    drops = weight * np.maximum(maps, 0).sum(axis=(0, 1)) / abs(found.rows[0].score)
    np.testing.assert_allclose(found.maps[0], maps @ drops, rtol=1e-3, atol=1e-5)


# -- outputs that are not a row for each image -----------------------------------------------------------


class Rowless(nn.Module):
    """Beside its path, or on it, something that does not keep one row of values for each image."""

    def __init__(self, change, side):
        super().__init__()
        self.conv, self.two, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)
        self.change, self.side = change, side

    def forward(self, x):
        x = torch.relu(self.conv(x))
        changed = torch.sigmoid(self.change(x))
        return self.out(self.two(x if self.side else changed).mean((2, 3)))


def declared(module):
    """The network of a module, of a file that declares its size: it is not asked whether others would do."""
    source = Source("rowless", None, None, ())
    return network_of(OpenedModule(module.eval(), source, input_shape=(1, 3, 16, 16)))


SIDES = {
    "no image": lambda x: x[:0],
    "no channel": lambda x: x[:, :0],
    "no row of cells": lambda x: x[:, :, :0],
    "no value": lambda x: x[x > 1e9],
    "first image": lambda x: x[:1],
}


@pytest.mark.parametrize("side", SIDES)
def test_a_layer_without_a_row_of_values_for_each_image_is_refused_by_name(side):
    network = declared(Rowless(SIDES[side], side=True))
    images = [np.full((16, 16, 3), value, np.uint8) for value in (0, 90, 200)]
    assert network.predict(np.zeros((3, 16, 16, 3), np.float32)).shape == (3, 3)
    convscope.activations(network, images, "conv")
    convscope.heatmap(network, images, layer="two")
    for refused in (
        lambda: convscope.activations(network, images, ["sigmoid"]),
        lambda: convscope.filters(network, "sigmoid", [0], steps=1, size=16),
        lambda: convscope.heatmap(network, images, layer="sigmoid"),
        lambda: convscope.concepts(network, images, layer="sigmoid", count=1),
    ):
        with pytest.raises(ConvscopeError, match="sigmoid"):
            refused()


def test_a_layer_of_windows_is_recorded_and_not_added_to():
    network = declared(Rowless(lambda x: torch.cat([x, x * 2]), side=True))
    images = [np.full((16, 16, 3), value, np.uint8) for value in (90, 200)]
    assert convscope.activations(network, images, ["sigmoid"]).arrays["sigmoid"].shape == (2, 14, 14, 4)
    for refused in (
        lambda: convscope.heatmap(network, images, layer="sigmoid"),
        lambda: convscope.filters(network, "sigmoid", [0], steps=1, size=16),
    ):
        with pytest.raises(ModelError, match="sigmoid") as error:
            refused()
        assert error.value.code == "not-per-image"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "change", [lambda x: x[:0], lambda x: torch.cat([x, x]), lambda x: torch.cat([x[:1], x[:1]])], ids=["0", "2n", "2"]
)
def test_scores_that_are_no_row_for_each_image_are_refused(change, count):
    network = declared(Rowless(change, side=False))
    images = [np.zeros((16, 16, 3), np.uint8)] * count
    convscope.activations(network, images, ":1")
    for refused in (
        lambda: network.predict(np.zeros((count, 16, 16, 3), np.float32)),
        lambda: convscope.heatmap(network, images, layer="conv"),
    ):
        with pytest.raises(ModelError, match="output") as error:
            refused()
        assert error.value.code == "not-per-image"


def test_a_network_without_layers_has_no_activations():
    network = declared(nn.Identity())
    assert network.layers == ()
    image = np.zeros((16, 16, 3), np.uint8)
    for refused in (
        lambda: convscope.activations(network, image),
        lambda: list(iter_activations(network, [image])),
        lambda: convscope.report(network, image, "nowhere"),
    ):
        with pytest.raises(UsageError) as error:
            refused()
        assert error.value.code == "no-layers"
    assert convscope.doctor(network.module).layers["count"] == 0


@pytest.mark.parametrize("change", [lambda x: x.sum(), lambda x: x[:, :0], lambda x: x[:1]], ids=["()", "n, 0", "1"])
def test_scores_of_another_rank_or_of_no_class_are_refused(change):
    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return change(self.conv(x).mean((2, 3)))

    network = declared(Ending())
    with pytest.raises(ModelError) as error:
        network.predict(np.zeros((2, 16, 16, 3), np.float32))
    assert error.value.code == "not-per-image"
