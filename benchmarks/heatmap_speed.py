"""Speed of heatmaps, compared with other tools and with a plain forward pass: ratios, in one run.

    python -m benchmarks.heatmap_speed [--out docs/heatmaps-speed.md]

The network is ResNet-50 in PyTorch with random weights: the time does not depend on them. Tools take turns;
the median of each is compared. Methods that replay the network are measured on one image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import convscope
from benchmarks.ascents import ASSETS, NotMeasured, memory_of, opened
from benchmarks.filters import machine, write
from benchmarks.heatmap_tools import pytorch_grad_cam
from benchmarks.truth import Case
from convscope.techniques.heatmaps.ranks import rank_correlation

SIDE, IMAGES, REPEATS = 224, 8, 5
LAYER = "layer4"
BUDGET = 160  # of 2048 channels


def main() -> None:
    """Print the tables, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a Markdown file to write")
    parser.add_argument("--quick", action="store_true", help="without what takes minutes")
    options = parser.parse_args()
    write(page(options.quick), options.out)


def page(quick: bool = False) -> Iterator[str]:
    """The page, line after line."""
    yield "# Speed of heatmaps\n"
    yield f"Made by `python -m benchmarks.heatmap_speed`. {machine()}\n"
    network, cases = _subject()
    yield f"ResNet-50 in PyTorch, {SIDE} pixels. Seconds are medians of {REPEATS} turns after a first one.\n"
    yield f"## {PICTURES} images, at the last convolution\n"
    yield from one_pass(network, cases)
    if not quick:
        yield "## One image, replayed\n"
        yield from replayed(network, cases[:1])
        yield "## A tenth of Score-CAM's channels, on real images\n"
        yield from budgets()
    yield "## Memory\n"
    yield from memory(network, cases)


def _subject() -> tuple[Any, list[Case]]:
    import torch

    from benchmarks.torch_networks import ResNet50

    torch.manual_seed(0)
    network = convscope.open_model(ResNet50().eval(), preprocess="-1..1", size=SIDE)
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (IMAGES, 14, 14, 3), dtype=np.uint8)
    pixels = np.kron(small, np.ones((1, 16, 16, 1), np.uint8))
    return network, [Case(one, number, np.ones((SIDE, SIDE), bool)) for number, one in enumerate(pixels)]


Times = dict[str, list[float] | str]


def _turns(makers: dict[str, Callable[[], Any]], repeats: int) -> Times:
    """Seconds of each, taking turns, after one turn that is not counted; of a failure the reason."""
    times: Times = {name: [] for name in makers}
    for turn in range(repeats + 1):
        for name, make in makers.items():
            seconds, found = _timed(make), times[name]
            if isinstance(seconds, str):
                times[name] = seconds
            elif turn and isinstance(found, list):
                found.append(seconds)
    return times


def _timed(make: Callable[[], Any]) -> float | str:
    try:
        begun = time.perf_counter()
        make()
    except Exception as error:  # whatever another tool raises
        return (str(error).splitlines() or [type(error).__name__])[0]
    return time.perf_counter() - begun


def _ours(network: Any, cases: list[Case], method: Any, **options: Any) -> Callable[[], Any]:
    pixels, targets = [case.pixels for case in cases], [case.target for case in cases]
    return lambda: convscope.heatmap(network, pixels, targets, LAYER, method=method, **options)


def _rows(times: Times, beside: str) -> Iterator[str]:
    yield f"| what | s | spread | beside {beside} |"
    yield "| --- | --- | --- | --- |"
    base = times[beside]
    least = np.nan if isinstance(base, str) else statistics.median(base)
    for name, found in times.items():
        if isinstance(found, str):
            yield f"| {name} | not measured: {found} | | |"
            continue
        middle = statistics.median(found)
        yield f"| {name} | {middle:.3f} | {min(found):.3f} to {max(found):.3f} | {middle / least:.2f} |"
    yield ""


def one_pass(network: Any, cases: list[Case]) -> Iterator[str]:
    """Grad-CAM, all methods of one pass, pytorch-grad-cam's, and forward passes."""
    import torch

    x = torch.tensor(network.prepare(convscope.images.decode.read_images([case.pixels for case in cases])))
    plain = x.permute(0, 3, 1, 2).contiguous()
    last = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def forward(images: Any) -> Callable[[], Any]:
        def passed() -> None:
            with torch.no_grad():
                network.module(images)

        return passed

    theirs = pytorch_grad_cam("GradCAM", LAYER)
    yield from _rows(
        _turns(
            {
                "a plain forward pass": forward(plain),
                "the same, channels last": forward(last),
                "convscope grad-cam": _ours(network, cases, "grad-cam"),
                "convscope, all methods of one pass": _ours(network, cases, "all"),
                "pytorch-grad-cam GradCAM": lambda: theirs(network, cases),
            },
            REPEATS,
        ),
        "a plain forward pass",
    )


def replayed(network: Any, cases: list[Case]) -> Iterator[str]:
    """Ablation-CAM and Score-CAM, whole and with a budget, beside pytorch-grad-cam's: one turn each."""
    found: dict[str, Any] = {}

    def kept(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> None:
            found[name] = make()

        return made

    makers = {
        "convscope ablation-cam": kept("ablation", _ours(network, cases, "ablation-cam")),
        "pytorch-grad-cam AblationCAM": lambda: pytorch_grad_cam("AblationCAM", LAYER)(network, cases),
        f"convscope score-cam, {BUDGET} channels": kept("some", _ours(network, cases, "score-cam", budget=BUDGET)),
        "convscope score-cam, bfloat16": kept("rough", _ours(network, cases, "score-cam", precision="bfloat16")),
        "convscope score-cam": kept("all", _ours(network, cases, "score-cam")),
        "pytorch-grad-cam ScoreCAM": lambda: pytorch_grad_cam("ScoreCAM", LAYER)(network, cases),
    }
    times: Times = {}
    _ours(network, cases, "grad-cam")()
    for name, make in makers.items():
        seconds = _timed(make)
        times[name] = seconds if isinstance(seconds, str) else [seconds]
    yield from _rows(times, "convscope score-cam")
    if "some" in found and "all" in found:
        likeness = rank_correlation(found["some"].maps[0], found["all"].maps[0])
        yield f"With {BUDGET} of its channels Score-CAM's map keeps a rank correlation of {likeness:.3f} with the whole"
        yield f"one's. convscope says of it: {found['some'].rows[0].note}."
    if "rough" in found and "all" in found:
        likeness = rank_correlation(found["rough"].maps[0], found["all"].maps[0])
        yield f"In bfloat16 it keeps {likeness:.4f}.\n"


def budgets() -> Iterator[str]:
    """Similarity of the maps of a tenth of the channels to those of all, on trained networks and natural images."""
    yield "| network, layer | channels passed | rank correlation with the whole: median | least of 8 images |"
    yield "| --- | --- | --- | --- |"
    for name, layer in (
        ("MobileNet", "conv_pw_11_relu"),
        ("MobileNet", "conv_pw_13_relu"),
        ("SqueezeNet", "features.12"),
    ):
        try:
            network, files = opened(name), sorted((ASSETS / "photos" / "imagenet").glob("*"))[3::30][:8]
        except NotMeasured as reason:
            yield f"| {name}, {layer} | not measured: {reason} | | |"
            continue
        photos, count = [str(file) for file in files], network.layer(layer).channels
        whole = convscope.heatmap(network, photos, "top", layer, method="score-cam").maps
        some = convscope.heatmap(network, photos, "top", layer, method="score-cam", budget=count // 10).maps
        found = [rank_correlation(one, other) for one, other in zip(some, whole, strict=True)]
        yield f"| {name}, {layer} | {count // 10} of {count} | {np.median(found):.3f} | {min(found):.3f} |"
    yield ""


def memory(network: Any, cases: list[Case]) -> Iterator[str]:
    """The memory of a process after many calls, and at most during Score-CAM."""
    call = _ours(network, cases, "grad-cam")
    call()
    held = [memory_of("VmRSS")]
    for _ in range(4):
        for _ in range(8):
            call()
        held.append(memory_of("VmRSS"))
    shown = ", ".join(f"{value / 2**20:.0f}" for value in held)
    yield f"After 8, 72, 136, 200 and 264 images in a loop the process holds {shown} MiB.\n"


if __name__ == "__main__":
    main()
