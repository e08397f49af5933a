"""Differences of the runtimes from each other, and of convscope from other tools.

    python -m benchmarks.parity [--out docs/parity.md]

One small network with the same weights on Keras (TensorFlow, JAX, torch), PyTorch and ONNX, a process each; then
pytorch-grad-cam, captum and Keras' own sub-models beside convscope in one process (`pip install 'convscope[peers]'`).
A tool that is not installed is marked as not measured. A difference is the largest one, in units of the largest value.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import convscope
from convscope.render.heatmaps import scaled
from tests import agreement

CLASS = 2
GROUPS = {
    "activations of 12 layers": "activation ",
    "logits": "logits",
    "gradients at 3 layers": "gradient ",
    "Hessian-vector product with the map at 2 layers": "hessian ",
    "gradients at the pixels": "input gradients",
    "the same, guided": "guided ",
    "FullGrad": "full gradient",
    "Grad-CAM at 3 layers": "heatmap ",
    "start images": "start",
    "one `classic` step from there": "step: ",
    "one step of `fourier`": "fourier: ",
    "final activations after 30 steps": "final",
}
Row = tuple[str, ...]


def main() -> None:
    """Print the tables, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a Markdown file to write")
    out = parser.parse_args().out
    text = "\n".join(page())
    if out:
        Path(out).write_text(text, encoding="utf-8")
    else:
        print(text)


def page() -> Iterator[str]:
    """The page, line after line."""
    yield "# Parity\n"
    yield "Made by `python -m benchmarks.parity --out docs/parity.md`. A difference is the largest one, in units of the"
    yield "largest value on the other side; 0 means equal to the last bit.\n"
    yield _versions() + ".\n"
    yield "## One network on five runtimes\n"
    yield "The network of `tests/agreement.py` (convolutions, depthwise, batch norm, ReLU6, swish, ELU, sum, join,"
    yield "both poolings, softmax) with the same weights on each. `tests/test_runtimes_agree.py` holds every line"
    yield "to 1e-4, and the last to 5 %.\n"
    yield from _table(*runtimes())
    yield "\n## Beside other tools, on the same network in the same process\n"
    yield "Maps are compared raw: before the other tool's ReLU, scaling and resizing.\n"
    rows = [*cams(), *pixels(), *layer_activations()]
    yield from _table(("convscope", "the other tool", "network", "difference"), rows)
    yield "\n## Keras' own sub-models\n"
    yield "`keras.Model(model.inputs, [layer.output, ...]).predict(images)`, every layer of the network above.\n"
    yield from _table(("backend", "difference"), list(sub_models()))


def _versions() -> str:
    names = {"keras": "keras", "tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch", "onnx": "onnx"}
    names |= {"pytorch-grad-cam": "grad-cam", "captum": "captum"}
    found = [f"Python {platform.python_version()}"]
    for shown, package in names.items():
        try:
            found.append(f"{shown} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{shown} not installed")
    return ", ".join(found)


def _table(head: Row, rows: list[Row]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def _shown(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.1e}"


def runtimes() -> tuple[Row, list[Row]]:
    """For each kind of answer the largest difference of each runtime from the first one that is installed."""
    installed = agreement.installed()
    with tempfile.TemporaryDirectory() as folder:
        answers = {name: agreement.ask(name, Path(folder) / f"{name}.npz") for name in installed}
    reference, *others = answers.values()
    rows = []
    for label, start in GROUPS.items():
        names = [name for name in reference if name.startswith(start)]
        worst = [max(agreement.apart(found[name], reference[name]) for name in names) for found in others]
        rows.append((label, *map(_shown, worst)))
    absent = [(f"{name}: not measured, not installed",) for name in agreement.RUNTIMES if name not in installed]
    return ("against " + installed[0], *installed[1:]), rows + absent


# -- other tools -----------------------------------------------------------------------------------------


def _subjects() -> dict[str, tuple[Any, str, int]]:
    """Networks with logits at their end: the module, the path of a layer, and the side of its images."""
    import torch
    from torch import nn

    from benchmarks.torch_networks import ResNet50

    small = agreement.torch_module()
    small.softmax = nn.Identity()
    torch.manual_seed(0)
    return {"the small network": (small, "elu", 32), "ResNet-50, random weights": (ResNet50().eval(), "layer3", 128)}


def cams() -> Iterator[Row]:
    """Grad-CAM, HiResCAM and LayerCAM against pytorch-grad-cam; Grad-CAM against captum."""
    for name, (module, path, side) in _subjects().items():
        network = convscope.open_model(module, preprocess="-1..1", size=side)
        x = network.tensor(network.prepare(convscope.images.decode.read_images(agreement.photos())))
        x, layer = x.permute(0, 3, 1, 2), module.get_submodule(path)
        for method, theirs in _pytorch_grad_cam().items():
            ours = convscope.heatmap(network, agreement.photos(), CLASS, layer=path, method=method).maps
            yield method, *_compared("pytorch-grad-cam", theirs, ours, (module, layer, x), name)
        ours = convscope.heatmap(network, agreement.photos(), CLASS, layer=path).maps
        yield "grad-cam", *_compared("captum LayerGradCam", _captum_grad_cam(), ours, (module, layer, x), name)


def _compared(tool: str, theirs: Callable | None, ours: np.ndarray, given: tuple, network: str) -> Row:
    if theirs is None:
        return tool, network, "not measured: not installed"
    return tool, network, _shown(agreement.apart(ours, theirs(*given)))


def _pytorch_grad_cam() -> dict[str, Callable | None]:
    """Raw maps `(n, h, w)` of each method, before it scales them."""
    classes = {"grad-cam": "GradCAM", "hirescam": "HiResCAM", "layercam": "LayerCAM", "xgrad-cam": "XGradCAM"}
    try:
        _let_torchvision_import()
        tool = importlib.import_module("pytorch_grad_cam")
        targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    except ImportError:
        return dict.fromkeys(classes)

    def raw(name: str) -> Callable:
        def maps(module: Any, layer: Any, x: Any) -> np.ndarray:
            explained = [targets.ClassifierOutputTarget(CLASS)] * len(x)
            with getattr(tool, name)(model=module, target_layers=[layer]) as cam:
                cam(input_tensor=x, targets=explained)
                seen, gradients = (
                    values[0].cpu().numpy()
                    for values in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
                )
                return cam.get_cam_image(x, layer, explained, seen, gradients, False)

        return maps

    return {method: raw(name) for method, name in classes.items()}


def _let_torchvision_import() -> None:
    """pytorch-grad-cam imports torchvision for its examples; one built for another torch lacks its operators."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # what it defines goes when it goes


_KEPT: list[Any] = []


def _captum_grad_cam() -> Callable | None:
    try:
        attr = importlib.import_module("captum.attr")
    except ImportError:
        return None

    def maps(module: Any, layer: Any, x: Any) -> np.ndarray:
        found = attr.LayerGradCam(module, layer).attribute(x, target=CLASS, relu_attributions=False)
        return found[:, 0].detach().numpy()

    return maps


def pixels() -> Iterator[Row]:
    """Methods at the pixels against captum's, and the whole scaled map of pytorch-grad-cam."""
    for name, (module, path, side) in _subjects().items():
        network = convscope.open_model(module, preprocess="-1..1", size=side)
        x = network.tensor(network.prepare(convscope.images.decode.read_images(agreement.photos()))).permute(0, 3, 1, 2)
        for method, theirs in _captum_pixels().items():
            if method == "guided-backprop" and name == "the small network":
                continue  # its ReLUs are functions, which captum passes over
            ours = convscope.heatmap(network, agreement.photos(), CLASS, method=method).maps
            yield method, *_compared("captum", theirs, ours, (module, x), name)
        found = convscope.heatmap(network, agreement.photos(), CLASS, layer=path)
        ours = np.stack([scaled(found, index, "pytorch-grad-cam") for index in range(len(found.rows))])
        theirs = _pytorch_grad_cam_scaled()
        yield "grad-cam, scaled", *_compared("pytorch-grad-cam", theirs, ours, (module, path, x), name)


def _captum_pixels() -> dict[str, Callable | None]:
    """Maps `(n, h, w)` of each method, brought to one number a pixel as convscope does."""
    names = {
        "saliency": ("Saliency", {"abs": True}, lambda found: found.amax(dim=1)),
        "input-x-gradient": ("InputXGradient", {}, _summed),
        "integrated-gradients": ("IntegratedGradients", {"n_steps": 64, "method": "riemann_middle"}, _summed),
        "guided-backprop": ("GuidedBackprop", {}, lambda found: found.abs().amax(dim=1)),
    }
    try:
        attr = importlib.import_module("captum.attr")
    except ImportError:
        return dict.fromkeys(names)

    def maker(tool: str, options: dict[str, Any], one_number: Callable) -> Callable:
        def maps(module: Any, x: Any) -> np.ndarray:
            found = getattr(attr, tool)(module).attribute(x.clone().requires_grad_(True), target=CLASS, **options)
            return one_number(found.detach()).numpy()

        return maps

    return {method: maker(*parts) for method, parts in names.items()}


def _summed(found: Any) -> Any:
    return found.sum(dim=1)


def _pytorch_grad_cam_scaled() -> Callable | None:
    if _pytorch_grad_cam()["grad-cam"] is None:
        return None
    tool = importlib.import_module("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")

    def maps(module: Any, path: str, x: Any) -> np.ndarray:
        with tool.GradCAM(model=module, target_layers=[module.get_submodule(path)]) as cam:
            return cam(input_tensor=x, targets=[targets.ClassifierOutputTarget(CLASS)] * len(x))

    return maps


def layer_activations() -> Iterator[Row]:
    """Activations of every convolution and pooling against captum's, for the same tensor in the same memory format."""
    try:
        attr = importlib.import_module("captum.attr")
    except ImportError:
        yield "activations", "captum LayerActivation", "both", "not measured: not installed"
        return
    for name, (module, _, side) in _subjects().items():
        network = convscope.open_model(module, preprocess="-1..1", size=side)
        seen = convscope.activations(network, agreement.photos())
        x = network.tensor(network.prepare(seen.images)).permute(0, 3, 1, 2)
        apart = []
        for path, ours in seen.arrays.items():
            tool = attr.LayerActivation(module, module.get_submodule(path))
            theirs = tool.attribute(x).detach().permute(0, 2, 3, 1).numpy()
            apart.append(agreement.apart(ours, theirs))
        yield f"activations of {len(apart)} layers", "captum LayerActivation", name, _shown(max(apart))


# -- Keras' own ------------------------------------------------------------------------------------------


def sub_models() -> Iterator[Row]:
    """Every backend in a process of its own."""
    for runtime in agreement.KERAS:
        if runtime not in agreement.installed():
            yield runtime, "not measured: not installed"
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = agreement.ask(f"{runtime}:sub-models", Path(folder) / "apart.npz")
        yield runtime, _shown(float(found["apart"].max()))


if __name__ == "__main__":
    main()
