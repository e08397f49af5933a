"""Models that change tensors in place: their input, and outputs of their layers, against the arithmetic in NumPy."""

import numpy as np
import pytest

import convscope
from convscope.networks import Pass

SIDE, CHANNELS, CLASSES = 9, 4, 3
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(1, 1, 3, CHANNELS)).astype(np.float32)
DENSE = RNG.normal(size=(CHANNELS, CLASSES)).astype(np.float32)


def scaled(x):
    return x / 127.5 - 1


def reference(x):
    """The values of the three steps before the mean, and the logits."""
    prepared = scaled(x.astype(np.float64))
    conv = prepared @ KERNEL[0, 0]
    after = scaled(conv)
    return {"prepare": prepared, "conv": conv, "after": after}, after.mean((1, 2)) @ DENSE


def of_torch():
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Scaled(nn.Module):
        def forward(self, x):
            return x.div_(127.5).sub_(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.prepare, self.after = Scaled(), Scaled()
            self.conv, self.out = nn.Conv2d(3, CHANNELS, 1, bias=False), nn.Linear(CHANNELS, CLASSES, bias=False)

        def forward(self, x):
            return self.out(self.after(self.conv(self.prepare(x))).mean((2, 3)))

    module = Net().eval()
    module.conv.weight.data = torch.from_numpy(KERNEL.transpose(3, 2, 0, 1).copy())
    module.out.weight.data = torch.from_numpy(DENSE.T.copy())
    return convscope.open_model(module, size=(SIDE, SIDE), preprocess="none")


def of_keras():
    """In place on torch alone."""
    keras = pytest.importorskip("keras")
    layers, prepare = keras.layers, keras.applications.mobilenet.preprocess_input
    steps = [
        layers.Input((SIDE, SIDE, 3)),
        layers.Lambda(prepare, name="prepare"),
        layers.Conv2D(CHANNELS, 1, use_bias=False, name="conv"),
        layers.Lambda(prepare, name="after"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(CLASSES, use_bias=False, name="out"),
    ]
    model = keras.Sequential(steps)
    model.set_weights([KERNEL, DENSE])
    return convscope.open_model(model, preprocess="none")


FRAMEWORKS = {"torch": of_torch, "keras": of_keras}


@pytest.fixture(params=FRAMEWORKS)
def network(request):
    return FRAMEWORKS[request.param]()


def pixels(seed=1):
    return np.random.default_rng(seed).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.float32)


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_each_layer_is_recorded_before_the_next_changes_it(network):
    expected, logits = reference(pixels())
    found, seen = network.forward(pixels(), list(expected))
    near(found, logits)
    for path, values in expected.items():
        near(seen[path], values)


def test_a_part_of_a_map_is_kept_before_the_map_changes(network):
    request = Pass(record=("conv", "after"))
    parts = dict.fromkeys(request.record, lambda activation: activation[:, 2, 3])
    program = network.compile(lambda run, x: dict(run(x, request, None, parts).activations))
    found = program(network.tensor(pixels()))
    for path in request.record:
        near(network.numpy(found[path]), reference(pixels())[0][path][:, 2, 3])


def test_passes_on_one_tensor_are_the_same_and_leave_it_as_it_was(network):
    array = pixels()
    x = network.tensor(array)
    program = network.compile(lambda run, x: run(x).logits)
    for _ in range(3):
        near(network.numpy(program(x)), reference(pixels())[1])
    np.testing.assert_array_equal(network.numpy(x), pixels())
    np.testing.assert_array_equal(array, pixels())


def test_gradients_at_the_pixels(network):
    """The network is affine: a change of the image changes the score by its product with the gradient."""

    def gradient(run, x):
        def score(x):
            return network.ops.sum(run(x).logits[:, 1]), ()

        return network.value_and_grad(score)(x)[1]

    found = network.numpy(network.compile(gradient)(network.tensor(pixels())))
    for seed in range(2, 5):
        change = pixels(seed)
        difference = (reference(pixels() + change)[1] - reference(pixels())[1])[:, 1].sum()
        assert (found * change).sum() == pytest.approx(difference, rel=1e-3)
    assert np.abs(found).max() > 0


def test_what_a_rule_returns_is_left_as_it_was(network):
    values = np.random.default_rng(2).normal(size=(2, SIDE, SIDE, CHANNELS)).astype(np.float32)
    program = network.compile(lambda run, x, held: run(x, Pass(replace=("conv",)), {"conv": lambda _: held}).logits)
    x, held = network.tensor(pixels()), network.tensor(values.copy())
    for _ in range(2):
        near(network.numpy(program(x, held)), scaled(values).mean((1, 2)) @ DENSE)
    np.testing.assert_array_equal(network.numpy(held), values)


def test_a_fed_array_is_left_as_it_was():
    torch = pytest.importorskip("torch")

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, CLASSES, 1)

        def forward(self, image, other):
            return self.conv(image).mean((2, 3)) + other.mul_(2)

    module = Pair().eval()
    fed = np.array([[1.0, 2.0, 3.0]], np.float32)
    network = convscope.open_model(module, size=(SIDE, SIDE), preprocess="none", feed={"other": fed})
    with torch.no_grad():
        means = module.conv(torch.from_numpy(pixels()).permute(0, 3, 1, 2)).mean((2, 3)).numpy()
    for _ in range(2):
        near(network.forward(pixels(), ["conv"])[0], means + 2 * fed)
    np.testing.assert_array_equal(fed, [[1, 2, 3]])
