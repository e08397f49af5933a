"""What a model's own code keeps on itself while it runs is as before after every technique, also after an error."""

import numpy as np
import pytest
from expecting import raises

import convscope
from convscope.errors import ModelError

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)


def torch_network():
    torch = pytest.importorskip("torch")

    class Noting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)
            self.count, self.seen, self.notes, self.sizes, self.fails = 0, None, [], {"first": (1, 1)}, False
            self.same = self.notes

        def forward(self, x):
            self.count += 1
            self.seen = x.shape
            self.notes.append(x.shape)
            self.sizes[f"at {len(self.sizes)}"] = x.shape
            self.late = x
            if self.fails:
                raise ValueError("on purpose")
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    return Noting().eval()


def keras_network():
    keras = pytest.importorskip("keras")

    class Noting(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.count, self.seen, self.fails = 0, None, False

        def call(self, x):
            self.count += 1
            self.seen = x.shape
            self.late = x
            if self.fails:
                raise ValueError("on purpose")
            return 2 * x

    given = keras.Input((12, 12, 3))
    x = Noting(name="noting")(keras.layers.Conv2D(4, 3, name="conv")(given))
    return keras.Model(given, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


def part_of(model):
    return model.get_layer("noting") if hasattr(model, "get_layer") else model


def state(model):
    part = part_of(model)
    kept = {name: vars(part).get(name, "none") for name in ("count", "seen", "late", "notes", "sizes", "same")}
    return kept | {name: kept[name].copy() for name in ("notes", "sizes") if kept[name] != "none"}


@pytest.mark.parametrize("make", [torch_network, keras_network])
def test_every_technique_leaves_what_the_code_keeps(make):
    model = make()
    part = part_of(model)
    vars(part).pop("late", None)
    before, identities = state(model), {name: id(value) for name, value in vars(part).items()}
    network = convscope.open_model(model, size=12, preprocess="0..1", head="linear")
    convscope.activations(network, IMAGE)
    convscope.filters(network, "conv", [0], steps=2, recipe="classic", size=12)
    convscope.heatmap(network, IMAGE, layer="conv")
    assert state(model) == before
    assert {name: id(value) for name, value in vars(part).items() if name in identities} == identities


def test_an_error_in_the_code_leaves_it_too():
    module = torch_network()
    network = convscope.open_model(module, size=12, preprocess="0..1", head="linear")
    before = state(module)
    module.fails = True
    with raises(ModelError, "layer-failed"):
        convscope.activations(network, IMAGE)
    assert state(module) == before


def test_a_module_that_looks_at_its_own_cache_gives_the_same_again():
    """A cache that is made at the first call is made again at each pass, and the results are those of the module."""
    torch = pytest.importorskip("torch")

    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.grid = torch.nn.Conv2d(3, 4, 3), None

        def forward(self, x):
            x = self.conv(x)
            if self.grid is None:
                self.grid = torch.linspace(0, 1, x.shape[-1])
            return (x * self.grid).mean((2, 3))

    module = Cached().eval()
    network = convscope.open_model(module, size=12, preprocess="0..1", head="linear")
    first = network.predict(network.prepare(convscope.activations(network, IMAGE).images))
    assert module.grid is None
    x = torch.from_numpy(IMAGE.transpose(2, 0, 1)[None] / np.float32(255))
    np.testing.assert_allclose(first, module(x).detach().numpy(), atol=1e-6)
