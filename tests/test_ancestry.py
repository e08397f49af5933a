"""The layer of a heatmap lies on the way to what is explained, whatever was executed last: closed forms in branches."""

import importlib.util

import numpy as np
import pytest
from expecting import raises
from spellings import opened, prepared, runtimes

import convscope
from convscope.errors import UsageError

SIDE, HALF = 16, 8
HAS = {name: importlib.util.find_spec(name) is not None for name in ("keras", "torch")}


def keras_model():
    """Two branches of a stem, one for each half of the image, whose layers are executed in turn.

    `left` and `right` see the left and the right half; `left_map` and `right_map` are linear in them. There are two
    outputs, of the left and of the right branch.
    """
    import models
    from keras import Model, layers

    image = layers.Input((SIDE, SIDE, 3))
    stem = layers.Conv2D(5, 1, activation="relu", name="stem")(image)
    halves = [layers.Cropping2D(((0, 0), one), name=name) for name, one in (("west", (0, HALF)), ("east", (HALF, 0)))]
    left, right = (half(stem) for half in halves)
    left = layers.Conv2D(6, 3, activation="relu", name="left")(left)
    right = layers.Conv2D(7, 3, activation="relu", name="right")(right)
    left = layers.Conv2D(4, 1, name="left_map")(left)
    right = layers.Conv2D(4, 1, name="right_map")(right)
    ends = [layers.GlobalAveragePooling2D(name=f"{side}_mean") for side in ("left", "right")]
    left, right = ends[0](left), ends[1](right)
    return models.seeded(Model(image, {"left_scores": left, "right_scores": right}))


def torch_model():
    """The same for PyTorch."""
    import torch
    from torch import nn

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 5, 1)
            self.left, self.right = nn.Conv2d(5, 6, 3), nn.Conv2d(5, 7, 3)
            self.left_map, self.right_map = nn.Conv2d(6, 4, 1), nn.Conv2d(7, 4, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            left, right = torch.relu(self.left(x[..., :HALF])), torch.relu(self.right(x[..., HALF:]))
            left, right = self.left_map(left), self.right_map(right)
            return {"left_scores": left.mean((2, 3)), "right_scores": right.mean((2, 3))}

    torch.manual_seed(3)
    return Halves().eval()


MODELS = {"keras": keras_model, "torch": torch_model}
# In PyTorch the ReLU is a layer of its own.
LAYERS = {"keras": {"left": "left", "right": "right"}, "torch": {"left": "relu#1", "right": "relu#2"}}


def network_of(runtime, **options):
    return opened(runtime, MODELS[runtime](), None, SIDE, **options)


def bias_of(network, side, channel):
    layer = f"{side}_map"
    if hasattr(network, "module"):
        return float(getattr(network.module, layer).bias[channel])
    return float(np.asarray(network.model.get_layer(layer).get_weights()[1])[channel])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_a_channel_in_a_branch_is_explained_in_its_own_branch(runtime, side, photo):
    network = network_of(runtime)
    found = convscope.heatmap(network, photo, f"{side}_map:2")
    assert found.rows[0].layer == LAYERS[runtime][side]
    x = prepared(network, [photo])
    values = network.forward(x, (f"{side}_map",))[1][f"{side}_map"][0, ..., 2]
    expected = (values - bias_of(network, side, 2)) / values.size
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_each_of_several_outputs_has_its_own_layer(runtime, side, photo):
    network = network_of(runtime, output=f"{side}_scores")
    found = convscope.heatmap(network, photo, 1)
    assert found.rows[0].layer == f"{side}_map"
    values = network.forward(prepared(network, [photo]), (f"{side}_map",))[1][f"{side}_map"][0, ..., 1]
    np.testing.assert_allclose(found.maps[0] * values.size, values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_what_joins_both_branches_is_explained_before_they_part(runtime, photo):
    found = convscope.heatmap(network_of(runtime), photo, "left_map:2 - 0.5*right_map:1")
    assert (found.rows[0].layer, found.rows[0].status) == ({"keras": "stem", "torch": "relu#0"}[runtime], "ok")


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_pixels_of_the_other_half_have_no_part(runtime, photo):
    found = convscope.heatmap(network_of(runtime), photo, "right_map:2", method=["saliency", "guided-backprop"])
    assert not found.maps[:, :, :HALF].any()
    assert found.maps[0, :, HALF:].max() > 0


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_a_layer_of_another_branch_is_refused(runtime, photo):
    network, other = network_of(runtime), LAYERS[runtime]["right"]
    after = {"keras": "left_mean", "torch": "mean#0"}[runtime]
    with raises(UsageError, "layer-beside-target", layer=other):
        convscope.heatmap(network, photo, "left_map:2", layer=other)
    with raises(UsageError, "layer-after-target", layer=after):
        convscope.heatmap(network, photo, "left_map:2", layer=after)


@pytest.mark.skipif(not HAS["torch"], reason="torch not installed")
def test_a_step_that_is_not_seen_in_another_branch_leaves_this_one_known(photo):
    import torch
    from torch import nn

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.near, self.far = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)

        def forward(self, x):
            x = self.stem(x)
            scores = self.near(x).mean((2, 3))
            far = self.far(torch.from_numpy(x.detach().numpy() * 2))
            return {"scores": scores, "far": far.mean((2, 3))}

    torch.manual_seed(0)
    network = opened("torch", Apart(), None, SIDE, output="scores")
    row = convscope.heatmap(network, photo, 1).rows[0]
    assert (row.layer, row.status) == ("near", "ok")


# -- recurrent convolutions --------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS["keras"], reason="keras not installed")
@pytest.mark.parametrize("norm", [False, True])
def test_a_recurrent_convolution_is_a_layer(norm, photo):
    import models
    from keras import Model, layers, ops

    image = layers.Input((SIDE, SIDE, 3))
    features = layers.Conv2D(3, 3, padding="same", name="conv")(image)
    frames = [layers.Reshape((1, SIDE, SIDE, 3))(one) for one in (image, features)]
    x = layers.ConvLSTM2D(5, 3, name="memory")(layers.Concatenate(axis=1)(frames))
    if norm:
        x = layers.BatchNormalization(name="norm")(x)
    scores = layers.Dense(4, name="scores")(layers.GlobalAveragePooling2D()(x))
    model = models.seeded(Model(image, scores))
    network = opened("keras", model, None, SIDE)
    layer = network.layer("memory")
    assert (layer.kind, layer.shape, layer.on_path) == ("recurrent", (SIDE - 2, SIDE - 2, 5), True)
    found = convscope.heatmap(network, photo, 1)
    assert found.rows[0].layer == ("norm" if norm else "memory")
    maps = np.asarray(ops.convert_to_numpy(Model(image, x)(prepared(network, [photo]))))[0]
    kernel = model.get_layer("scores").get_weights()[0][:, 1]
    np.testing.assert_allclose(found.maps[0], maps @ kernel / maps[..., 0].size, rtol=1e-3, atol=1e-6)
    seen = convscope.activations(network, photo, "memory").arrays["memory"]
    assert seen.shape == (1, SIDE - 2, SIDE - 2, 5)


@pytest.mark.skipif(not HAS["torch"], reason="torch not installed")
def test_a_recurrent_convolution_written_in_pytorch_is_a_layer(photo):
    import torch
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates, self.scores = nn.Conv2d(3 + 4, 16, 3, padding=1), nn.Linear(4, 3)

        def memory(self, x):
            hidden = cell = torch.zeros(len(x), 4, *x.shape[2:])
            for frame in (x, x.flip(3)):
                take, leave, show, new = self.gates(torch.cat([frame, hidden], 1)).chunk(4, 1)
                cell = torch.sigmoid(leave) * cell + torch.sigmoid(take) * torch.tanh(new)
                hidden = torch.sigmoid(show) * torch.tanh(cell)
            return hidden

        def forward(self, x):
            return self.scores(self.memory(x).mean((2, 3)))

    torch.manual_seed(0)
    module = Recurrent()
    network = opened("torch", module, None, SIDE)
    found = convscope.heatmap(network, photo, 1)
    x = torch.from_numpy(prepared(network, [photo]).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        maps, weights = module.memory(x)[0], module.scores.weight[1].detach()
    expected = torch.einsum("chw,c->hw", maps, weights).numpy() / maps[0].numel()
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_a_layer_of_a_branch_that_is_executed_later_is_beside_the_target_not_after_it(runtime, photo):
    network = network_of(runtime)
    names = [layer.path for layer in network.layers]
    for side, other in (("left", "right"), ("right", "left")):
        beside = LAYERS[runtime][other]
        with raises(UsageError, "layer-beside-target", layer=beside):
            convscope.heatmap(network, photo, f"{side}_map:2", layer=beside)
    assert names.index(LAYERS[runtime]["left"]) != names.index(LAYERS[runtime]["right"])


@pytest.mark.skipif(not HAS["torch"], reason="torch not installed")
def test_a_container_can_be_given_for_a_target_of_a_class_and_a_channel():
    import torch
    from torch import nn

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    module = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    network = convscope.open_model(module, size=12, preprocess="0..1", head="softmax")
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    whole, last = (convscope.heatmap(network, image, "class:0 + 3:1", layer=path) for path in ("0", "0.3"))
    np.testing.assert_array_equal(whole.maps, last.maps)
