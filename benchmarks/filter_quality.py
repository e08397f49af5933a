"""Quality of filter images: convscope's recipes and other tools, at equal steps and at equal time.

    python -m benchmarks.filter_quality [--channels 32] [--steps 48] [--out docs/filters-quality.md]

Each tool makes images of the same channels in a process of its own; all are then measured in one way, in float32, by
convscope's own passes. "natural" is the best activation of natural images of many classes, so a ratio of 1 is an image
that shows as much as the best natural image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.ascents import NETWORKS, Job, Made, NotMeasured, run
from benchmarks.filters import PEERS, machine, write
from benchmarks.looks import DRAWS, Judge, natural_spectrum, photographs, spectrum
from convscope.techniques.filters.recipes import recipe_named

RECIPES = ("fast", "fourier", "maco", "classic")
SEED_CHANNELS = 8  # that are made from a second seed too


@dataclass(frozen=True)
class Measured:
    """One tool on one layer; medians over channels."""

    clean: float
    held: float
    roughness: float
    agreement: float
    seconds: float
    steps: int


def main() -> None:
    """Print the tables, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--only", default="", help="part of a layer's name: its tables alone")
    parser.add_argument("--out", help="a Markdown file to write")
    options = parser.parse_args()
    write(page(options.channels, options.steps, options.only), options.out)


def page(channels: int, steps: int, only: str = "") -> Iterator[str]:
    """The page, line after line."""
    yield "# Quality of filter images\n"
    yield f"Made by `python -m benchmarks.filter_quality --channels {channels} --steps {steps}`. {machine()}"
    yield f"{channels} channels of each layer, 224 pixels; {len(photographs())} natural images.\n"
    yield "Each tool passes the network as often for an image (`maco` sees four views in a step, so it makes fewer),"
    yield "and then the number of steps that takes as long as `fast` did.\n"
    yield "- clean: activation of the image as it is, over the best natural one; the median over channels"
    yield f"- held: the same under {DRAWS} shifts, scales and rotations that no tool optimised for"
    yield "- roughness: distance of the power spectrum from that of natural images, in decades (0 is equal)"
    few = min(channels, SEED_CHANNELS)
    yield f"- seeds: the cosine of the whole layer's activations on the images of two seeds; {few} channels"
    yield "- seconds: of the whole call, for each image\n"
    for name in ("MobileNet", "SqueezeNet"):
        for layer in (layer for layer in NETWORKS[name].layers if only in layer):
            yield f"## {name}, {layer}\n"
            yield from table(name, layer, tuple(range(channels)), steps)


def table(name: str, layer: str, channels: tuple[int, ...], steps: int) -> Iterator[str]:
    """Equal passes through the network first, then each tool with the steps that take as long as `fast` does."""
    judge = Judge(name, layer, channels)
    natural, rough = np.maximum(judge.natural(), 1e-12), natural_spectrum()
    tools = [*(f"convscope:{recipe}" for recipe in RECIPES), PEERS[NETWORKS[name].framework]]
    yield "| tool | steps | clean | held | roughness | seeds | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    found: dict[str, Measured] = {}
    for tool in tools:
        job = Job(tool, name, layer, channels, max(1, steps // views(tool)))
        try:
            found[tool] = measured(job, judge, natural, rough, seeds=True)
        except NotMeasured as reason:
            yield f"| {tool} | not measured: {reason} | | | | | |"
            continue
        yield _row(tool, found[tool])
    yield "| in the time of `fast`: | | | | | | |"
    for tool in (tool for tool in tools[1:] if tool in found):
        fewer = max(1, round(found[tool].steps * found[tools[0]].seconds / found[tool].seconds))
        yield _row(tool, measured(Job(tool, name, layer, channels, fewer), judge, natural, rough))
    yield ""


def views(tool: str) -> int:
    """The number of views of an image in each step."""
    name, _, recipe = tool.partition(":")
    return recipe_named(recipe).views if name == "convscope" else 1


def measured(job: Job, judge: Judge, natural: np.ndarray, rough: np.ndarray, seeds: bool = False) -> Measured:
    """Make images and measure them."""
    made = run(job)
    clean, held = (values / natural for values in judge.activations(made.images))
    apart = np.abs(spectrum(made.images) - rough).mean(axis=1)
    agreement = _agreement(job, judge, made) if seeds else np.nan
    each = made.first / len(job.channels)
    return Measured(
        float(np.median(clean)), float(np.median(held)), float(np.median(apart)), agreement, each, made.steps
    )


def _agreement(job: Job, judge: Judge, made: Made) -> float:
    few = replace(job, channels=job.channels[:SEED_CHANNELS], seed=job.seed + 1)
    one, other = judge.answers(made.images[:SEED_CHANNELS]), judge.answers(run(few).images)
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.median((one * other).sum(axis=1) / np.maximum(sizes, 1e-12)))


def _row(tool: str, found: Measured) -> str:
    seeds = "" if np.isnan(found.agreement) else f"{found.agreement:.2f}"
    return (
        f"| {tool} | {found.steps} | {found.clean:.2f} | {found.held:.2f} | {found.roughness:.2f} | {seeds} "
        f"| {found.seconds:.2f} |"
    )


if __name__ == "__main__":
    main()
