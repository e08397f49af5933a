"""Heatmaps by other tools, called as in their documentation: scaled as the tool scales them, at the image's size.

Each maker takes an opened network and cases, and returns a map for each; a missing tool raises when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.ascents import torchvision_without_operators
from benchmarks.truth import Case, images_of

Maker = Callable[[Any, Sequence[Case]], list[np.ndarray]]
TOGETHER = 8  # images in a batch, as for convscope


def _prepared(network: Any, cases: Sequence[Case]) -> np.ndarray:
    return network.prepare(images_of([case.pixels for case in cases]))


def _in_batches(network: Any, cases: Sequence[Case], explain: Callable) -> list[np.ndarray]:
    """`explain(x (n, h, w, c), targets) -> maps (n, h', w')` on batches."""
    found: list[np.ndarray] = []
    for start in range(0, len(cases), TOGETHER):
        some = cases[start : start + TOGETHER]
        found += list(explain(_prepared(network, some), [case.target for case in some]))
    return found


# -- pytorch-grad-cam ------------------------------------------------------------------------------------


def pytorch_grad_cam(name: str, path: str | None = None) -> Maker:
    """A class of pytorch-grad-cam, at a layer; at the one that convscope would take where None."""

    def make(network: Any, cases: Sequence[Case]) -> list[np.ndarray]:
        import torch

        torchvision_without_operators()
        tool = importlib.import_module("pytorch_grad_cam")
        wanted = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
        layer = network.module.get_submodule(path or network.last_spatial_layer().path)

        def explain(x: np.ndarray, targets: list[int]) -> np.ndarray:
            tensor = torch.tensor(x).permute(0, 3, 1, 2)
            with getattr(tool, name)(model=network.module, target_layers=[layer]) as cam:
                if name == "FinerCAM":  # with `targets` it sets no class against others
                    maps = [cam(tensor[at : at + 1], target_idx=target) for at, target in enumerate(targets)]
                    return np.concatenate(maps)
                return cam(input_tensor=tensor, targets=[wanted(target) for target in targets])

        return _in_batches(network, cases, explain)

    return make


# -- captum ----------------------------------------------------------------------------------------------


def captum(attribute: Callable[[Any, Any, Any, Any, Any], Any]) -> Maker:
    """`attribute(attr, module, layer, tensor, targets) -> (n, c, h, w)` of captum; the channels are summed."""

    def make(network: Any, cases: Sequence[Case]) -> list[np.ndarray]:
        import torch

        attr = importlib.import_module("captum.attr")
        layer = network.module.get_submodule(network.last_spatial_layer().path)

        def explain(x: np.ndarray, targets: list[int]) -> np.ndarray:
            tensor = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_(True)
            found = attribute(attr, network.module, layer, tensor, torch.tensor(targets))
            return found.detach().sum(dim=1).numpy()

        return _in_batches(network, cases, explain)

    return make


CAPTUM: dict[str, Maker] = {
    "LayerGradCam": captum(lambda attr, module, layer, x, t: attr.LayerGradCam(module, layer).attribute(x, target=t)),
    "Saliency": captum(lambda attr, module, layer, x, t: attr.Saliency(module).attribute(x, target=t)),
    "InputXGradient": captum(lambda attr, module, layer, x, t: attr.InputXGradient(module).attribute(x, target=t)),
    "GuidedBackprop": captum(lambda attr, module, layer, x, t: attr.GuidedBackprop(module).attribute(x, target=t)),
    "IntegratedGradients": captum(
        lambda attr, module, layer, x, t: attr.IntegratedGradients(module).attribute(x, target=t, n_steps=64)
    ),
    "Occlusion": captum(
        lambda attr, module, layer, x, t: attr.Occlusion(module).attribute(
            x, sliding_window_shapes=(3, 28, 28), strides=(3, 14, 14), target=t
        )
    ),
}


# -- tf-keras-vis ----------------------------------------------------------------------------------------


def tf_keras_vis(module: str, name: str, told: bool = False) -> Maker:
    """A class of tf-keras-vis with its own choice of layer, or convscope's, and its replacement of softmax."""

    def make(network: Any, cases: Sequence[Case]) -> list[np.ndarray]:
        tool = getattr(importlib.import_module(f"tf_keras_vis.{module}"), name)
        scores = importlib.import_module("tf_keras_vis.utils.scores").CategoricalScore
        linear = importlib.import_module("tf_keras_vis.utils.model_modifiers").ReplaceToLinear()
        explainer = tool(network.model, model_modifier=linear, clone=True)
        path = network.last_spatial_layer().path  # else it takes the last convolution before it
        where = {"penultimate_layer": path, "seek_penultimate_conv_layer": False} if told else {}

        def explain(x: np.ndarray, targets: list[int]) -> np.ndarray:
            return np.asarray(explainer(scores(targets), x, **where))

        return _in_batches(network, cases, explain)

    return make


PEERS: dict[str, dict[str, dict[str, Maker]]] = {
    "SqueezeNet": {
        "pytorch-grad-cam": {
            name: pytorch_grad_cam(name)
            for name in (
                *("GradCAM", "HiResCAM", "LayerCAM", "XGradCAM", "GradCAMPlusPlus", "EigenCAM", "EigenGradCAM"),
                *("KPCA_CAM", "FinerCAM", "ScoreCAM", "AblationCAM"),
            )
        },
        "captum": CAPTUM,
    },
    "MobileNet": {
        "tf-keras-vis": {
            "Gradcam": tf_keras_vis("gradcam", "Gradcam"),
            "GradcamPlusPlus": tf_keras_vis("gradcam_plus_plus", "GradcamPlusPlus"),
            "Layercam": tf_keras_vis("layercam", "Layercam"),
            "Saliency": tf_keras_vis("saliency", "Saliency"),
            "Scorecam": tf_keras_vis("scorecam", "Scorecam"),
            "Gradcam, told the layer": tf_keras_vis("gradcam", "Gradcam", told=True),
            "GradcamPlusPlus, told the layer": tf_keras_vis("gradcam_plus_plus", "GradcamPlusPlus", told=True),
            "Layercam, told the layer": tf_keras_vis("layercam", "Layercam", told=True),
            "Scorecam, told the layer": tf_keras_vis("scorecam", "Scorecam", told=True),
        }
    },
}
