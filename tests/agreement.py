"""What one runtime says of one small network, written to a file: `python agreement.py RUNTIME[:sub-models] FILE`.

The runtimes are Keras on TensorFlow, JAX and torch, PyTorch itself, and ONNX; the architecture is written out once for
Keras and once for PyTorch (ONNX is PyTorch's export), with the same weights. `test_runtimes_agree.py` and
`benchmarks/parity.py` run a process for each and compare.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

KERAS = ("tensorflow", "jax", "keras-torch")
RUNTIMES = (*KERAS, "torch", "onnx")
NEEDS = {"tensorflow": ("keras", "tensorflow"), "jax": ("keras", "jax"), "keras-torch": ("keras", "torch")}
NEEDS |= {"torch": ("torch",), "onnx": ("torch", "onnx")}
CLASSES = 4
CHANNELS = [0, 1, 5]
# What each layer is called in the network that Keras and PyTorch share; in the ONNX file it is a node of that module.
LAYERS = ("conv", "norm", "relu", "depthwise", "swish", "add", "join", "max", "mean", "last", "elu", "gap", "out")


def weights():
    """By PyTorch's names and shapes: drawn by NumPy, none of them trivial."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "last": (6, 16, 3, 3), "out": (CLASSES, 6)}
    drawn = {}
    for name, shape in shapes.items():
        drawn[f"{name}.weight"] = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        drawn[f"{name}.bias"] = rng.normal(0, 0.3, shape[0])
    drawn |= {"norm.weight": rng.uniform(0.5, 1.5, 8), "norm.bias": rng.normal(0, 0.3, 8)}
    drawn |= {"norm.running_mean": rng.normal(0, 0.3, 8), "norm.running_var": rng.uniform(0.5, 1.5, 8)}
    return {name: array.astype(np.float32) for name, array in drawn.items()}


def keras_model():
    """Every common kind of layer: convolutions, depthwise, norms, activations, pooling, sums and joins."""
    import keras
    from keras import layers

    image = layers.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, strides=2, name="conv")(layers.ZeroPadding2D(1, name="pad")(image))
    x = layers.BatchNormalization(name="norm", epsilon=1e-3)(x)
    skip = layers.ReLU(6.0, name="relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(skip)
    x = layers.Activation("swish", name="swish")(x)
    x = layers.Add(name="add")([x, skip])
    x = layers.Concatenate(name="join")(
        [layers.MaxPooling2D(2, name="max")(x), layers.AveragePooling2D(2, name="mean")(x)]
    )
    x = layers.Activation("elu", name="elu")(layers.Conv2D(6, 3, name="last")(x))
    x = layers.Dense(CLASSES, activation="softmax", name="out")(layers.GlobalAveragePooling2D(name="gap")(x))
    model = keras.Model(image, x)
    drawn = weights()
    for name in ("conv", "last"):
        kernel = drawn[f"{name}.weight"].transpose(2, 3, 1, 0)
        model.get_layer(name).set_weights([kernel, drawn[f"{name}.bias"]])
    kernel = drawn["depthwise.weight"].transpose(2, 3, 0, 1)
    model.get_layer("depthwise").set_weights([kernel, drawn["depthwise.bias"]])
    model.get_layer("out").set_weights([drawn["out.weight"].T, drawn["out.bias"]])
    names = ("weight", "bias", "running_mean", "running_var")
    model.get_layer("norm").set_weights([drawn[f"norm.{name}"] for name in names])
    return model


def torch_module():
    """The same network for PyTorch, with a softmax at its end as Keras' has."""
    import torch
    from torch import nn

    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    class Join(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y], 1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6()
            self.depthwise, self.swish, self.add = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.SiLU(), Add()
            self.max, self.mean, self.join = nn.MaxPool2d(2), nn.AvgPool2d(2), Join()
            self.last, self.elu, self.gap = nn.Conv2d(16, 6, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1)
            self.out, self.softmax = nn.Linear(6, CLASSES), nn.Softmax(dim=1)

        def forward(self, x):
            skip = self.relu(self.norm(self.conv(x)))
            x = self.add(self.swish(self.depthwise(skip)), skip)
            x = self.elu(self.last(self.join(self.max(x), self.mean(x))))
            return self.softmax(self.out(torch.flatten(self.gap(x), 1)))

    module = Network().eval()
    state = {name: torch.from_numpy(array) for name, array in weights().items()}
    module.load_state_dict({**state, "norm.num_batches_tracked": torch.tensor(0)})
    return module


def network(runtime):
    """The network as convscope opens it, and the path of each of `LAYERS`."""
    import convscope

    if runtime in KERAS:
        opened = convscope.open_model(keras_model(), preprocess="-1..1")
        return opened, {name: name for name in LAYERS}
    if runtime == "torch":
        opened = convscope.open_model(torch_module(), preprocess="-1..1", size=32)
        return opened, {name: name for name in LAYERS}
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        # The training form keeps the batch norm apart from its convolution, as a layer of its own.
        torch.onnx.export(
            torch_module(),
            (torch.zeros(1, 3, 32, 32),),
            path,
            dynamo=False,
            opset_version=17,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
        opened = convscope.open_model(path, preprocess="-1..1")
    paths = [layer.path for layer in opened.layers]
    # A module of several nodes (SiLU is x * sigmoid(x)) gives what the last of them gives.
    return opened, {name: [path for path in paths if path.startswith(f"/{name}/")][-1] for name in LAYERS}


def photos():
    """Three images `(40, 40, 3)` uint8."""
    return [np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8) for index in range(3)]


def plan_of(net, path, recipe):
    from convscope.objectives import channel
    from convscope.techniques.filters.ascent import Plan

    plan = Plan(net, recipe, (32, 32))
    bounds = [plan.bind(channel(path, number)) for number in CHANNELS]
    return plan, bounds


def one_step(net, path, recipe):
    """Start, objective, gradient norm, canvas and the rule's memory after one step of each of `CHANNELS`."""
    from convscope.techniques.filters.ascent import step_of

    plan, bounds = plan_of(net, path, recipe)
    begun = np.stack([plan.start((number,)) for number in CHANNELS])
    arguments = tuple(
        (net.tensor(np.stack(m)), net.tensor(np.stack(v)))
        for m, v in zip(
            zip(*(b.arguments for b in bounds), strict=True),
            zip(*(b.vectors for b in bounds), strict=True),
            strict=True,
        )
    )
    memory = tuple(map(net.tensor, recipe.optimizer.init(begun)))
    heat = net.tensor(np.zeros((len(CHANNELS), 32, 32), np.float32))
    draws = net.tensor(np.stack([plan.draw((number,), 0) for number in CHANNELS]))
    value, norm, moved, memory, _ = net.compile(step_of(plan, bounds[0].key))(
        net.tensor(begun), memory, heat, arguments, draws
    )
    return begun, *map(net.numpy, (value, norm, moved)), [*map(net.numpy, memory)]


def fourier_images(net, path, parameters):
    from convscope.techniques.filters.recipes import FOURIER

    return plan_of(net, path, FOURIER)[0].images(parameters)


def answers(runtime):
    """Logits, every activation, gradients at three depths, heatmaps, and one step of the classic ascent."""
    import convscope
    from convscope.techniques.filters.recipes import CLASSIC, FOURIER
    from convscope.techniques.heatmaps.evidence import TraceSpec, input_gradients, trace
    from convscope.techniques.heatmaps.targets import goal_of

    net, paths = network(runtime)
    found = {}
    seen = convscope.activations(net, photos(), [path for name, path in paths.items() if name != "out"])
    for name, path in paths.items():
        if name != "out":
            values = np.asarray(seen.arrays[path])
            found[f"activation {name}"] = values.reshape(len(values), *[side for side in values.shape[1:] if side > 1])
    x = net.prepare(seen.images)
    found["logits"] = net.predict(x)
    for name in ("conv", "swish", "elu"):
        goal = goal_of(net, 2, None, len(x), lambda: None)
        seen_at = trace(TraceSpec(net, net.layer(paths[name]), goal.target, len(x)), x, goal.arguments)
        found[f"gradient {name}"] = seen_at.gradients
        if name != "elu":  # what follows it is piecewise linear
            found[f"hessian {name}"] = seen_at.hessian_vector_product()
        found[f"heatmap {name}"] = convscope.heatmap(net, photos(), 2, layer=paths[name]).maps
    found["input gradients"] = seen_at.input_gradients
    found["guided input gradients"] = input_gradients(seen_at.spec, x, seen_at.arguments, guided=True)[0]
    found["full gradient"] = convscope.heatmap(net, photos(), 2, method="full-grad").maps
    layer = net.layer(paths["elu"])
    begun, value, norm, moved, _ = one_step(net, layer.path, CLASSIC)
    found |= {"start": begun, "step: objective": value, "step: gradient norm": norm, "step: update": moved - begun}
    begun, value, norm, _, memory = one_step(net, layer.path, FOURIER)
    # Adam's first step is the sign of the gradient, which rounding may turn where it is next to nothing: its mean.
    found |= {"fourier: objective": value, "fourier: gradient norm": norm, "fourier: gradient": memory[0]}
    found["fourier: start"] = fourier_images(net, layer.path, begun)
    final = convscope.filters(net, layer.path, CHANNELS, recipe="classic", steps=30, precision="float32")
    return found | {"final": np.array([row.activation for row in final.rows])}


def sub_models():
    """For every layer how far its activation is from an output of Keras' own sub-model with all of them."""
    import keras

    import convscope

    net, _ = network("tensorflow")  # of whichever backend runs here
    seen = convscope.activations(net, photos(), "all")
    outputs = [net.model.get_layer(path).output for path in seen.arrays]
    theirs = keras.Model(net.model.inputs, outputs).predict(net.prepare(seen.images), verbose=0)
    return {"apart": np.array([apart(ours, found) for ours, found in zip(seen.arrays.values(), theirs, strict=True)])}


def installed():
    """The runtimes that can be asked here."""
    import importlib.util

    return [name for name in RUNTIMES if all(importlib.util.find_spec(needed) for needed in NEEDS[name])]


def ask(runtime, path):
    """Run a process that writes `answers(runtime)` to `path`, and read them."""
    import subprocess

    name = runtime.partition(":")[0]
    backend = name.removeprefix("keras-") if name in KERAS else "torch"
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, runtime, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{runtime}: {done.stderr[-2000:]}")
    return dict(np.load(path))


def apart(found, expected):
    """The largest difference, in units of the largest value expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    np.savez(sys.argv[2], **(sub_models() if sys.argv[1].endswith(":sub-models") else answers(sys.argv[1])))
