"""One network in the form of each runtime.

A Keras model as it is or as a SavedModel; a PyTorch module as it is, or in a file of each format it is written to.
"""

import importlib.util
import os

import numpy as np
import pytest

import convscope

OF_TORCH = ("torch", "script", "pt2", "onnx")
OF_KERAS = ("keras", "saved_model")
_NEEDS = {"torch": ("torch",), "script": ("torch",), "pt2": ("torch",), "onnx": ("torch", "onnx")}
_NEEDS |= {"keras": ("keras",), "saved_model": ("keras", "tensorflow")}


def skipped(runtime):
    """Why a runtime can't be tried here, or ""."""
    missing = [name for name in _NEEDS[runtime] if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if runtime == "saved_model" and os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return "a SavedModel runs on TensorFlow"
    return ""


def runtimes(*names):
    """Parameters for the runtimes, skipped where they can't be tried."""
    return [pytest.param(name, marks=pytest.mark.skipif(bool(skipped(name)), reason=skipped(name))) for name in names]


def opened(runtime, made, folder, side, **options):
    """The network of a model `made` of Keras or PyTorch, which takes RGB images of `side`, in the form of `runtime`."""
    options = {"preprocess": "0..1", **options}
    if runtime == "keras":
        return convscope.open_model(made, **options)
    if runtime == "saved_model":
        made.export(folder / "saved", verbose=False)
        return convscope.open_model(folder / "saved", **options)
    if runtime == "torch":
        return convscope.open_model(made, size=side, **options)
    if runtime == "script":  # the file does not say for which size it was traced
        options["size"] = side
    return convscope.open_model(_written(runtime, made, folder, side), **options)


def _written(runtime, module, folder, side):
    import torch

    module, example = module.eval(), torch.zeros(1, 3, side, side)
    if runtime == "script":
        path = folder / "network.pt"
        torch.jit.trace(module, example).save(path)
    elif runtime == "pt2":
        path = folder / "network.pt2"
        torch.export.save(torch.export.export(module, (example,)), path)
    else:
        path = folder / "network.onnx"
        torch.onnx.export(module, (example,), path, dynamo=False, opset_version=17, do_constant_folding=False)
    return path


def prepared(network, images):
    """Images as the network takes them, `(n, h, w, c)`, for the model's own library."""
    return network.prepare(convscope.images.decode.read_images(images))


def returned(made, x):
    """What a model of Keras or PyTorch returns for prepared images `(n, h, w, c)`, as NumPy."""
    if hasattr(made, "forward") and not hasattr(made, "stateless_call"):
        import torch

        with torch.no_grad():
            return made(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))).numpy()
    import keras

    return keras.ops.convert_to_numpy(made(keras.ops.convert_to_tensor(x), training=False))
