"""Where other tools' heatmaps differ from the papers: the smallest example of each.

Each is computed by the tool's own code, or by the formula in it where that is stated.

    python -m benchmarks.disagreements [--out docs/heatmaps-disagreements.md]

A tool that is not installed (`pip install 'convscope[peers]'`) is marked as not measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
from collections.abc import Iterator

import numpy as np

from benchmarks.ascents import torchvision_without_operators
from benchmarks.filters import write
from convscope.techniques.heatmaps.methods import METHODS


def main() -> None:
    """Print the page, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a Markdown file to write")
    write(page(), parser.parse_args().out)


def page() -> Iterator[str]:
    """The page, line after line."""
    yield "# Where other tools differ from the papers\n"
    versions = ", ".join(_version(name) for name in ("grad-cam", "captum", "tf-keras-vis"))
    yield f"Made by `python -m benchmarks.disagreements` with {versions}. A is one image's maps, g its gradient.\n"
    for example in (
        grad_cam_plus_plus,
        ablation,
        eigen,
        eigen_grad,
        kpca,
        score,
        plus_plus_of_tf_keras_vis,
        relu_of_captum,
    ):
        title, text = (example.__doc__ or "").split("\n", 1)
        yield f"## {title}\n"
        yield " ".join(text.split()) + "\n"
        try:
            found = example()
        except ImportError as error:
            yield f"Not measured: {error}\n"
            continue
        yield "| | |\n| --- | --- |"
        yield from (f"| {name} | {_shown(value)} |" for name, value in found.items())
        yield ""


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} (not installed)"


def _shown(value: object) -> str:
    return np.array2string(np.asarray(value), precision=4, suppress_small=False).replace("\n", " ")


def _pytorch_grad_cam(name: str) -> type:
    torchvision_without_operators()
    return getattr(importlib.import_module("pytorch_grad_cam"), name)


def _weights(name: str, maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The tool's weights `(c,)` of maps `(h, w, c)`: its own function, on arrays."""
    tool = _pytorch_grad_cam(name)
    first = [np.moveaxis(array, -1, 0)[None] for array in (maps, gradients)]
    return np.asarray(tool.get_cam_weights(None, None, None, None, *first))[0]


def grad_cam_plus_plus() -> dict[str, object]:
    """Grad-CAM++: a number added to the denominator

    Equation 19 has alpha = g^2 / (2 g^2 + g^3 sum A). pytorch-grad-cam adds 1e-6 below, which outweighs g^2 for
    gradients under 1e-3. Two channels with the same map and gradients of 1e-4 and 2e-4: the paper's weights are
    nearly as 1 to 2.
    """
    maps = np.ones((2, 2, 2))
    gradients = np.full((2, 2, 2), 1e-4) * [1.0, 2.0]
    ours = _weights_of("grad-cam++", maps, gradients)
    theirs = _weights("GradCAMPlusPlus", maps, gradients)
    return {
        "the paper's weights, and convscope's": ours,
        "pytorch-grad-cam's weights": theirs,
        "ratio of the second to the first: paper, tool": [ours[1] / ours[0], theirs[1] / theirs[0]],
    }


def _weights_of(name: str, maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """A method's weights, read off maps that hold one channel at a time."""
    found = []
    for channel in range(maps.shape[-1]):
        one = maps[None, ..., channel : channel + 1], gradients[None, ..., channel : channel + 1]
        formula = METHODS[name].function
        assert formula is not None
        found.append(float(formula(*one).sum() / maps[..., channel].sum()))
    return np.array(found)


def ablation() -> dict[str, object]:
    """Ablation-CAM: the sign where the score is negative

    The weight is (y - y_k) / y. Where y is negative it turns round. A network whose score is the mean of the left half
    of the image less 3: taking the only channel that counts away lowers it, so its weight should be positive and the
    left half bright. convscope divides by the size of y.
    """
    import torch
    from torch import nn

    import convscope

    conv, head = nn.Conv2d(3, 2, 1, bias=False), nn.Linear(2, 2)
    with torch.no_grad():
        conv.weight[:] = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None]
        head.weight[:] = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        head.bias[:] = torch.tensor([0.0, -3.0])
    module = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2, 0], image[:, 2:, 1] = 255, 255
    ours = convscope.heatmap(
        convscope.open_model(module, preprocess="0..1", size=4, head="linear"), image, 1, "0", method="ablation-cam"
    )
    tool = _pytorch_grad_cam("AblationCAM")
    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(1)
    with tool(model=module, target_layers=[conv]) as cam:
        theirs = cam(input_tensor=torch.tensor(image / 255.0).permute(2, 0, 1)[None].float(), targets=[target])[0]
    return {"convscope's map, one row": ours.maps[0][0], "pytorch-grad-cam's map, one row": theirs[0]}


def _projected(maps: np.ndarray) -> np.ndarray:
    torchvision_without_operators()
    tool = importlib.import_module("pytorch_grad_cam.utils.svd_on_activations")
    return tool.get_2d_projection(np.moveaxis(maps, -1, 0)[None])[0]


def eigen() -> dict[str, object]:
    """Eigen-CAM: centred or not

    The paper projects A on its first right singular vector. pytorch-grad-cam takes each channel's mean away first.
    Two channels, one strong everywhere, one with a single place: the paper's map is strong everywhere, the centred one
    has a single place (and either sign).
    """
    maps = np.full((2, 2, 2), [5.0, 0.0])
    maps[0, 0, 1] = 1.0
    formula = METHODS["eigen-cam"].function
    assert formula is not None
    return {
        "the paper's, and convscope's eigen-cam": formula(maps[None], maps[None])[0].ravel(),
        "pytorch-grad-cam's": _projected(maps).ravel(),
    }


def eigen_grad() -> dict[str, object]:
    """Eigen-Grad-CAM: centred too

    The same of g A. No paper defines it; convscope does not centre it and gives it the sign of HiResCAM.
    """
    maps = np.full((2, 2, 2), [5.0, 1.0])
    maps[0, 0, 1] = 3.0
    gradients = np.ones_like(maps)
    formula = METHODS["eigen-grad-cam"].function
    assert formula is not None
    return {
        "convscope's": formula(maps[None], gradients[None])[0].ravel(),
        "pytorch-grad-cam's": _projected(maps * gradients).ravel(),
    }


def kpca() -> dict[str, object]:
    """KPCA-CAM: the sign of a component

    A component's sign means nothing, and pytorch-grad-cam leaves it as it comes. convscope takes the one that goes
    along with the mean of the channels. How each map of the same random activations is correlated with that mean:
    """
    maps = np.random.default_rng(2).random((3, 3, 4))
    torchvision_without_operators()
    tool = importlib.import_module("pytorch_grad_cam.utils.svd_on_activations")
    theirs = np.asarray(tool.get_2d_projection_kernel(np.moveaxis(maps, -1, 0)[None], "sigmoid", None))[0]
    formula = METHODS["kpca-cam"].function
    assert formula is not None
    ours, mean = formula(maps[None], maps[None])[0], maps.mean(-1).ravel()
    return {
        "convscope's": np.corrcoef(ours.ravel(), mean)[0, 1],
        "pytorch-grad-cam's": np.corrcoef(theirs.ravel(), mean)[0, 1],
    }


def score() -> dict[str, object]:
    """Score-CAM of tf-keras-vis: a softmax of probabilities

    Its weight of a channel is the class's part of a softmax over what the network returns (its formula). Where that has
    been through a softmax already the weights are nearly the same. A network of two classes that sees one class through
    three maps with a probability of .99, .73 and .05.
    """
    chances = np.array([0.99, 0.73, 0.05])
    again = np.exp(chances) / (np.exp(chances) + np.exp(1 - chances))
    return {
        "the probabilities": chances,
        "what tf-keras-vis weighs with": again,
        "of ten classes": _of_many(chances, 10),
    }


def _of_many(chances: np.ndarray, classes: int) -> np.ndarray:
    """The same where the other classes share the rest."""
    rest = np.exp((1 - chances) / (classes - 1)) * (classes - 1)
    return np.exp(chances) / (np.exp(chances) + rest)


def plus_plus_of_tf_keras_vis() -> dict[str, object]:
    """Grad-CAM++ of tf-keras-vis: an exponential that overflows

    It multiplies gradients with exp(y), as the paper does for an exponential output, in float32 (its formula): infinite
    from a logit of 89 on. The factor cancels in alpha; in the weights it only scales the map.
    """
    with np.errstate(over="ignore"):
        return {"exp(88), exp(89) in float32": np.exp(np.array([88, 89], np.float32))}


def relu_of_captum() -> dict[str, object]:
    """Grad-CAM of captum: no ReLU unless asked

    `LayerGradCam.attribute` has `relu_attributions=False`: like convscope's raw map, unlike the paper's figure. Nothing
    is wrong; a comparison has to know it.
    """
    captum = importlib.import_module("captum.attr")
    import inspect

    default = inspect.signature(captum.LayerGradCam.attribute).parameters["relu_attributions"].default
    return {"relu_attributions by default": str(default)}


if __name__ == "__main__":
    main()
