"""Networks whose graph is cut, so that no gradient comes back: what is said of them, and what works all the same.

Each has a twin with the same weights and no cut, whose maps are the truth.
"""

import importlib.util
import os

import numpy as np
import pytest
from expecting import raises
from spellings import opened, prepared, runtimes

import convscope
from convscope.errors import ModelError, UsageError
from convscope.techniques.heatmaps import Occlusion

SIDE = 16
HAS = {name: importlib.util.find_spec(name) is not None for name in ("keras", "tensorflow", "torch")}
TENSORFLOW = HAS["keras"] and HAS["tensorflow"] and os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
WITHOUT_GRADIENTS = ("eigen-cam", "kpca-cam", "ablation-cam", "score-cam", "occlusion")
needs_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow is not Keras' backend here")


def torch_model(how):
    """Two convolutions, with a cut of the kind `how` behind them, and a dense layer."""
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3, stride=2), nn.Linear(6, 4)

        def features(self, x):
            return torch.relu(self.two(torch.relu(self.one(x))))

        def cut(self, x):
            if how == "no_grad":
                with torch.no_grad():
                    return self.features(x)
            if how == "inference":
                with torch.inference_mode():
                    return self.features(x)
            if how == "in place":
                with torch.inference_mode():
                    return torch.relu_(self.two(torch.relu_(self.one(x))))
            if how == "detach":
                return self.features(x).detach()
            if how == "numpy":
                return torch.from_numpy(self.features(x).detach().numpy())
            if how in ("reentrant", "not reentrant"):
                return checkpoint(self.features, x, use_reentrant=how == "reentrant")
            if how == "rounded":
                return torch.round(8 * self.features(x)) / 8
            return self.features(x)

        def forward(self, x):
            if how == "whole":
                with torch.no_grad():
                    return self.fc(self.features(x).mean((2, 3)))
            if how == "whole inference":
                with torch.inference_mode():
                    return self.fc(self.features(x).mean((2, 3)))
            return self.fc(self.cut(x).mean((2, 3)))

    torch.manual_seed(5)
    module = Network().eval()
    return module.requires_grad_(False) if how == "frozen" else module


def keras_model(how):
    """The same for Keras, with an operation or a layer of one's own that stops the gradient."""
    import keras
    import models
    from keras import Model, layers, ops

    class Stop(layers.Layer):
        def call(self, x):
            return ops.stop_gradient(x)

    class Rounded(layers.Layer):
        def call(self, x):
            return ops.round(8 * x) / 8

    class Area(layers.Layer):
        def call(self, x):
            import tensorflow as tf

            return tf.image.resize(x, (3, 3), "area")  # TensorFlow has no gradient for it

    image = layers.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(5, 3, activation="relu", name="one")(image)
    if how in ("layer", "rounded", "area"):
        x = {"layer": Stop, "rounded": Rounded, "area": Area}[how](name="cut")(x)
    if how == "operation":
        x = ops.stop_gradient(x)
    x = layers.Conv2D(6, 3, activation="relu", strides=1 if how == "area" else 2, name="two")(x)
    x = layers.Dense(4, name="fc")(layers.GlobalAveragePooling2D(name="mean")(x))
    model = models.seeded(Model(image, x))
    model.trainable = how != "frozen"
    assert keras.backend.backend()
    return model


def torch_network(how):
    return opened("torch", torch_model(how), None, SIDE)


def keras_network(how, folder=None, runtime="keras"):
    return opened(runtime, keras_model(how), folder, SIDE)


CUT_IN_TORCH = ("no_grad", "inference", "in place", "detach", "numpy", "reentrant", "whole", "whole inference")
torch_only = pytest.mark.skipif(not HAS["torch"], reason="torch not installed")
keras_only = pytest.mark.skipif(not HAS["keras"], reason="keras not installed")


@torch_only
@pytest.mark.parametrize("how", ["frozen", "not reentrant"])
@pytest.mark.parametrize("method", ["grad-cam", "saliency", "integrated-gradients"])
def test_where_only_weights_are_frozen_there_is_a_gradient(how, method, photo):
    found, truth = (convscope.heatmap(torch_network(one), photo, 1, method=method) for one in (how, "plain"))
    np.testing.assert_allclose(found.maps, truth.maps, rtol=1e-4, atol=1e-7)
    assert truth.maps.any()


@keras_only
def test_where_only_keras_weights_are_frozen_there_is_a_gradient(photo):
    found, truth = (convscope.heatmap(keras_network(one), photo, 1) for one in ("frozen", "plain"))
    np.testing.assert_allclose(found.maps, truth.maps, rtol=1e-4, atol=1e-7)
    assert truth.maps.any()


@torch_only
@pytest.mark.parametrize("how", ["no_grad", "inference", "in place", "reentrant", "detach"])
def test_the_layer_right_before_a_cut_has_the_gradient_of_what_follows(how, photo):
    found, truth = (convscope.heatmap(torch_network(one), photo, 1) for one in (how, "plain"))
    np.testing.assert_allclose(found.maps, truth.maps, rtol=1e-4, atol=1e-7)
    assert truth.maps.any()


@torch_only
@pytest.mark.parametrize("how", CUT_IN_TORCH)
def test_methods_without_gradients_work_on_a_cut_module(how, photo):
    layer = {"detach": "detach"}.get(how)
    methods = list(WITHOUT_GRADIENTS)
    truth = convscope.heatmap(torch_network("plain"), photo, 1, method=methods)
    found = convscope.heatmap(torch_network(how), photo, 1, method=methods)
    assert layer is None or found.rows[0].layer == layer
    for one, other, row in zip(found.maps, truth.maps, found.rows, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5, err_msg=row.method)
        assert "gradient" not in row.reason


@torch_only
@pytest.mark.parametrize("how", CUT_IN_TORCH)
def test_pixels_before_a_cut_are_said_to_be_so(how, photo):
    row = convscope.heatmap(torch_network(how), photo, 1, method="saliency").rows[0]
    assert row.status == "blank"
    assert row.reason.startswith("the graph is cut")
    place = {"detach": "between 'relu#1' and 'detach'", "numpy": "reaches 'detach', and no layer that is seen"}
    place |= dict.fromkeys(("whole", "whole inference"), "between 'mean' and 'fc'")
    # The output of the last layer under no_grad has the gradient of what follows.
    assert place.get(how, "between 'two' and 'relu#1'") in row.reason
    assert "occlusion" in row.reason


@torch_only
@pytest.mark.parametrize("how", ["no_grad", "detach", "inference", "rounded"])
def test_a_layer_before_a_cut_is_said_to_be_so(how, photo):
    found = convscope.heatmap(torch_network(how), photo, 1, "one", method=["grad-cam", "eigen-cam", "layercam"])
    assert [row.reason[:16] for row in found.rows] == ["the graph is cut", "", "the graph is cut"]
    assert "torch" not in found.rows[1].reason


@torch_only
def test_a_quantised_layer_cuts_the_graph(photo):
    import torch

    module = torch.ao.quantization.quantize_dynamic(torch_model("plain"), {torch.nn.Linear}, dtype=torch.qint8)
    network = opened("torch", module, None, SIDE)
    found = convscope.heatmap(network, photo, 1, method=["grad-cam", "saliency", *WITHOUT_GRADIENTS])
    for row in found.rows[:2]:
        assert row.reason.startswith("the graph is cut")
        assert "between 'mean' and 'fc" in row.reason
    assert all("gradient" not in row.reason for row in found.rows[2:])
    assert all(one.any() for one in found.maps[2:])
    assert convscope.filters(network, "two", [0], steps=2).rows[0].status != "dead"
    with raises(ModelError, "gradient-cut"):
        convscope.filters(network, "fc", [0], steps=2)


@keras_only
@pytest.mark.parametrize(("how", "name"), [("layer", "cut"), ("operation", "stop_gradient"), ("rounded", "cut")])
def test_a_keras_layer_before_a_cut_is_said_to_be_so(how, name, photo):
    network = keras_network(how)
    found = convscope.heatmap(network, photo, 1, "one", method=["grad-cam", "eigen-cam"])
    assert found.rows[0].reason.startswith("the graph is cut")
    path = next(layer.path for layer in network.layers if name in layer.path)
    assert f"between 'one' and '{path}'" in found.rows[0].reason
    assert found.rows[1].status == "ok"
    truth = convscope.heatmap(keras_network("rounded" if how == "rounded" else "plain"), photo, 1)
    after = convscope.heatmap(network, photo, 1)
    assert after.rows[0].layer == "two"
    np.testing.assert_allclose(after.maps, truth.maps, rtol=1e-4, atol=1e-7)


@needs_tensorflow
@pytest.mark.parametrize("runtime", runtimes("keras", "saved_model"))
def test_an_operation_without_a_gradient_is_said_with_the_same_advice(runtime, photo, tmp_path):
    network = keras_network("area", tmp_path, runtime)
    row = convscope.heatmap(network, photo, 1, method="saliency").rows[0]
    assert row.reason.startswith("the graph is cut")
    assert {"keras": "ResizeArea", "saved_model": "SymbolicGradient"}[runtime] in row.reason
    assert "occlusion" in row.reason
    with raises(UsageError, "gradient-failed"):
        convscope.heatmap(network, photo, 1, method="smoothgrad")
    found = convscope.heatmap(network, photo, 1, method=Occlusion(patch=4))
    assert found.maps.any()


# -- what is no cut --------------------------------------------------------------------------------------


@torch_only
def test_a_layer_without_an_effect_is_no_cut(photo):
    import torch

    module = torch_model("plain")
    with torch.no_grad():
        module.fc.weight.zero_()
    row = convscope.heatmap(opened("torch", module, None, SIDE), photo, 1).rows[0]
    assert row.reason.startswith("zero gradient: changing this layer's output does not change the score")


@torch_only
def test_a_flat_place_is_no_cut(photo):
    import torch

    module = torch_model("plain")
    with torch.no_grad():
        module.two.bias.fill_(-3.0)  # every ReLU behind `one` is off, and a larger image would turn some on
    row = convscope.heatmap(opened("torch", module, None, SIDE), photo, 1, "one").rows[0]
    assert row.reason.startswith("zero gradient: small changes of this layer's output do not change the score")


# -- what is measured, for which class, weights and moment ----------------------------------------------


def probe(run, classes=1):
    """A network of three convolutions whose forward pass is `run(self, x)`; the last has a channel for each class."""
    import torch
    from torch import nn

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, classes, 3)

        def forward(self, x):
            return run(self, x)

    torch.manual_seed(2)
    return opened("torch", Probe().eval(), None, SIDE)


@torch_only
def test_each_class_has_its_own_cut(photo):
    """The first class is cut from the second convolution, the second from the third; the last one is not."""
    import torch

    def forward(self, x):
        two = self.two(self.one(x))
        far, three = two.detach().mean((2, 3)), self.three(two)
        return torch.cat([far[:, :1], three.detach().mean((2, 3))[:, :1], three.mean((2, 3))[:, 1:]], 1)

    network = probe(forward, 2)
    reasons = [convscope.heatmap(network, photo, number, "one").rows[0].reason for number in range(3)]
    assert "between 'two' and 'detach#0'" in reasons[0]
    assert "between 'three' and 'detach#1'" in reasons[1]
    assert reasons[2] == ""


@torch_only
@pytest.mark.parametrize("kind", ["values", "memory"])
def test_a_layer_that_could_not_be_changed_is_not_said_to_have_no_effect(kind, photo):
    """It takes the values that it has for the image, and refuses larger ones."""
    limits = [np.inf]

    def forward(self, x):
        two = self.two(self.one(x))
        if two.abs().max() > limits[0]:
            raise MemoryError if kind == "memory" else ValueError("too large")
        return 0 * two.mean((2, 3))

    network = probe(forward)
    limits[0] = 1.05 * np.abs(network.forward(prepared(network, [photo]), ["two"])[1]["two"]).max()
    row = convscope.heatmap(network, photo, 1, "two").rows[0]
    assert row.status == "blank"
    assert "does not change the score" not in row.reason
    assert {"values": "too large", "memory": "emory"}[kind] in row.reason


@torch_only
def test_a_layer_that_does_not_run_for_the_image_is_passed_over(photo):
    """The blank image of opening passes the second convolution, and a photograph does not."""
    import torch

    def forward(self, x):
        one = self.one(x)
        two = self.two(one) if x.mean() == 0 else one[..., 1:-1, 1:-1]
        return torch.relu(self.three(two.detach())).mean((2, 3))

    network = probe(forward, 2)
    row = convscope.heatmap(network, photo, 1, "one").rows[0]
    assert row.reason.startswith("the graph is cut")
    assert "between 'one' and 'detach'" in row.reason, row.reason


@torch_only
def test_what_was_measured_is_measured_again_after_the_weights_changed(photo):
    """Only where the last convolution has weights does the score depend on the second one, behind which it is cut."""
    import torch

    def forward(self, x):
        one = self.one(x)
        return self.three(self.two(one).detach()).mean((2, 3)) + one.detach().mean((2, 3))[:, :2]

    network = probe(forward, 2)
    reasons = []
    for factor in (1, 0, 1):
        with network.replaced([weight * (factor if len(weight) == 2 else 1) for weight in network.weights()]):
            reasons.append(convscope.heatmap(network, photo, 1, "one").rows[0].reason)
    reasons.append(convscope.heatmap(network, photo, 1, "one").rows[0].reason)
    with torch.no_grad():
        network.module.three.weight.zero_()
    reasons.append(convscope.heatmap(network, photo, 1, "one").rows[0].reason)
    places = [next((place for place in ("one", "two") if f"between '{place}'" in reason), reason) for reason in reasons]
    assert places == ["two", "one", "two", "two", "one"]


@torch_only
def test_a_gradient_that_failed_once_is_computed_all_the_same(photo):
    import torch

    failures = []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return 2 * x

        @staticmethod
        def backward(context, gradient):
            if not failures:
                failures.append(1)
                raise RuntimeError("busy, try again")
            return 2 * gradient

    def model(double):
        return probe(lambda self, x: double(self.two(torch.relu(self.one(x)))).mean((2, 3)))

    found, truth = model(Once.apply), model(lambda x: 2 * x)
    maps = [convscope.heatmap(network, photo, 1, "two", method="hirescam").maps for network in (found, found, truth)]
    assert failures
    np.testing.assert_allclose(maps[0], maps[2], rtol=1e-5)
    np.testing.assert_allclose(maps[1], maps[2], rtol=1e-5)
    assert maps[2].any()


# -- filters ---------------------------------------------------------------------------------------------


@torch_only
@pytest.mark.parametrize("how", ["no_grad", "inference", "reentrant", "whole"])
def test_filters_before_a_cut_are_refused_and_not_called_dead(how):
    with raises(ModelError, "gradient-cut", before="relu#0", after="two"):
        convscope.filters(torch_network(how), "two", [0, 1], steps=2)


@torch_only
def test_filters_of_a_dead_layer_are_dead():
    import torch

    module = torch_model("plain")
    with torch.no_grad():
        module.two.weight.zero_()
        module.two.bias.fill_(-1.0)
    rows = convscope.filters(opened("torch", module, None, SIDE), "relu#1", [0], steps=2).rows
    assert [row.status for row in rows] == ["dead"]


@keras_only
def test_filters_behind_a_keras_cut_are_refused():
    network = keras_network("layer")
    with raises(ModelError, "gradient-cut", before="one", after="cut"):
        convscope.filters(network, "two", [0], steps=2)
    assert convscope.filters(network, "one", [0], steps=2).rows[0].status != "dead"


@pytest.mark.skipif(not HAS["torch"], reason="torch not installed")
def test_a_product_with_black_pixels_is_no_gradient_of_zero():
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    network = convscope.open_model(module, size=12, preprocess="none")
    black = np.zeros((12, 12, 3), np.uint8)
    found = convscope.heatmap(network, black, 0, method=["grad-cam", "input-x-gradient"])
    (reason,) = (row.reason for row in found.rows if row.method == "input-x-gradient")
    assert "product of the gradient and the values" in reason
