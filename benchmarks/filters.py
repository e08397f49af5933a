"""Speed of gradient ascent: convscope, the classic procedure and other tools, a process each, alternating.

    python -m benchmarks.filters [--filters 64] [--repeats 2] [--out docs/filters-speed.md]

Ratios are of the whole calls: convscope's include its noise baseline, the measurements of its results and its
compile. Compare machines by the ratios, not by the seconds. What is not installed (`pip install 'convscope[peers]'`) or
not here is said to be not measured.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.ascents import NETWORKS, Job, Made, NotMeasured, opened, run
from benchmarks.looks import Judge

PEERS = {"tensorflow": "tf-keras-vis", "torch": "lucent"}
PEER_FILTERS = 8  # of tools that make one after another: enough for the time of each


def main() -> None:
    """Print the tables, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a layer's name: its tables alone")
    parser.add_argument("--out", help="a Markdown file to write")
    options = parser.parse_args()
    write(page(options.filters, options.repeats, options.only), options.out)


def write(page: Iterator[str], out: str | None) -> None:
    """Print lines as they come, and write them all to a file where there is one."""
    lines = []
    for line in page:
        print(line, flush=True)
        lines.append(line)
    if out:
        Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


def page(filters: int, repeats: int, only: str = "") -> Iterator[str]:
    """The page, line after line."""
    yield "# Speed of filters\n"
    yield f"Made by `python -m benchmarks.filters --filters {filters} --repeats {repeats}`. {machine()}\n"
    job = Job("plain", "ResNet50V2", "conv3_block4_out", tuple(range(filters)), 30, 180)
    if only in job.layer:
        yield "## The classic workload\n"
        yield from equal_steps(job, repeats, work=flops(job))
    yield "## Real networks, at equal steps\n"
    yield f"{filters} filters, 30 steps of the classic procedure, 224 pixels: the first that have a gradient at"
    yield "their start: the plain loop leaves the others as noise, convscope frees them with further steps.\n"
    plain: dict[tuple[str, str], Made] = {}
    for name in ("MobileNet", "SqueezeNet"):
        for layer in (layer for layer in NETWORKS[name].layers if only in layer):
            yield f"### {name}, {layer}\n"
            try:
                job = Job("plain", name, layer, climbing(name, layer, filters), 30)
            except NotMeasured as reason:
                yield f"Not measured: {reason}\n"
                continue
            yield from equal_steps(job, repeats, kept=plain)
    yield "## Time to an activation\n"
    yield "What the classic code reaches after its 30 steps, and when convscope's recipe `fast` is there. Clean: the"
    yield "mean of the channel on the image as it is. Held: on the image shifted, scaled and turned a little.\n"
    yield from to_activation(plain, filters)
    if not only:
        yield "## Memory\n"
        yield from memory()


def climbing(name: str, layer: str, count: int) -> tuple[int, ...]:
    """The first channels of a layer that have a gradient at the start of the classic procedure.

    Raises:
        NotMeasured: too few have.
    """
    from convscope.techniques.filters import first_with_gradient

    channels, looked_at, stuck = first_with_gradient(opened(name), layer, count, recipe="classic")
    if looked_at - stuck < count:
        raise NotMeasured(f"only {looked_at - stuck} of {looked_at} channels have a gradient at their start")
    return tuple(channels)


# -- equal steps -----------------------------------------------------------------------------------------


def equal_steps(
    job: Job, repeats: int, work: float | None = None, kept: dict[tuple[str, str], Made] | None = None
) -> Iterator[str]:
    """A table of the tools at the same number of steps, seconds for each filter."""
    peer = PEERS[NETWORKS[job.network].framework]
    jobs = {
        "plain": job,
        peer: replace(job, tool=peer, channels=job.channels[:PEER_FILTERS]),
        "convscope:classic": replace(job, tool="convscope:classic", again=True),
    }
    found: dict[str, list[Made]] = {tool: [] for tool in jobs}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for tool, each in jobs.items():
            try:
                found[tool].append(run(each))
            except NotMeasured as reason:
                reasons[tool] = str(reason)
    yield "| tool | s for a filter, first call | spread | second call | convscope is faster by | peak memory |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ours = _each(found["convscope:classic"], jobs["convscope:classic"])
    for tool, each in jobs.items():
        yield _row(tool, each, found[tool], reasons.get(tool, ""), ours)
    yield ""
    if found["plain"] and found["convscope:classic"]:
        alone = statistics.median(made.ascent for made in found["convscope:classic"])
        theirs = statistics.median(made.first for made in found["plain"])
        yield f"convscope's ascent itself, from its first step to its last, takes {alone:.1f} s: the classic code takes"
        yield f"{theirs / alone:.2f} times as long. The rest is noise images, tests of results and the compile.\n"
    if work and found["convscope:classic"]:
        least = min(made.ascent for made in found["convscope:classic"])
        rate = work * len(job.channels) * (job.steps or 1) / least / 1e9
        yield f"{work / 1e9:.2f} GFLOP an image and step: the ascent does {rate:.0f} GFLOP/s.\n"
    if kept is not None and found["plain"]:
        kept[job.network, job.layer] = found["plain"][-1]


def _each(found: Sequence[Made], job: Job) -> float:
    return statistics.median(made.first for made in found) / len(job.channels) if found else np.nan


def _row(tool: str, job: Job, found: Sequence[Made], reason: str, ours: float) -> str:
    if not found:
        return f"| {tool} | not measured: {reason} | | | | |"
    times = [made.first / len(job.channels) for made in found]
    again = [made.again / len(job.channels) for made in found]
    second = "" if np.isnan(again[0]) else f"{statistics.median(again):.3f}"
    precision = f" ({found[0].precision})" if found[0].precision else ""
    middle = statistics.median(times)
    return (
        f"| {tool}, {found[0].version}{precision}, {len(job.channels)} filters | {middle:.3f} "
        f"| {min(times):.3f} to {max(times):.3f} | {second} "
        f"| {middle / ours:.2f} | {max(made.peak for made in found) / 2**20:.0f} MiB |"
    )


# -- time to an activation -------------------------------------------------------------------------------


def to_activation(plain: dict[tuple[str, str], Made], filters: int) -> Iterator[str]:
    """For each layer when recipe `fast` is where the classic code ends."""
    yield "| layer | classic code | clean, held | `fast`, all steps | clean, held | steps to the held one | sooner |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (name, layer), theirs in plain.items():
        channels = climbing(name, layer, filters)
        judge = Judge(name, layer, channels)
        clean, held = (values.mean() for values in judge.activations(theirs.images))
        job = Job("convscope:fast", name, layer, channels)
        whole = run(job)
        reached = tuple(values.mean() for values in judge.activations(whole.images))
        steps, least = _fewest(job, judge, held, whole.steps)
        sooner = "not reached" if least is None else f"{theirs.first / least.first:.1f} times"
        yield (
            f"| {name} {layer} | {theirs.first:.1f} s | {clean:.2f}, {held:.2f} | {whole.first:.1f} s "
            f"| {reached[0]:.2f}, {reached[1]:.2f} | {steps} | {sooner} |"
        )
    yield ""


def _fewest(job: Job, judge: Judge, goal: float, most: int) -> tuple[int | str, Made | None]:
    """The smallest of several numbers of steps whose images reach the wanted activation."""
    for steps in (4, 6, 8, 12, 16, 24, 32, most):
        made = run(replace(job, steps=steps))
        if judge.activations(made.images)[1].mean() >= goal:
            return steps, made
    return f"more than {most}", None


# -- memory and the machine ------------------------------------------------------------------------------


def memory() -> Iterator[str]:
    """Peaks against one forward and backward pass of the same batch."""
    yield "Peak above what the process held with its network open; 16 filters side by side.\n"
    yield "| network | one pass forward and back | convscope | times |"
    yield "| --- | --- | --- | --- |"
    for name, layer, size in (
        ("ResNet50V2", "conv3_block4_out", 180),
        ("MobileNet", "conv_pw_8_relu", 224),
        ("SqueezeNet", "features.7", 224),
    ):
        job = Job("one pass", name, layer, tuple(range(16)), 10, size)
        try:
            least, ours = run(job), run(replace(job, tool="convscope:classic"))
        except NotMeasured as reason:
            yield f"| {name} | not measured: {reason} | | |"
            continue
        yield f"| {name} | {least.peak / 2**20:.0f} MiB | {ours.peak / 2**20:.0f} MiB | {ours.peak / least.peak:.2f} |"


def flops(job: Job) -> float:
    """Operations of an image's step: forward and the input's gradient, of the convolutions up to the layer."""
    from benchmarks.ascents import opened

    network, total = opened(job.network), 0.0
    layers = network.layers_at((job.size, job.size))
    names = [layer.path for layer in layers]
    for layer in layers[: names.index(job.layer) + 1]:
        kernel = getattr(network.model.get_layer(layer.path), "kernel", None)
        if kernel is not None and layer.spatial:
            total += 2 * 2 * float(np.prod(kernel.shape)) * layer.shape[0] * layer.shape[1]
    return total


def machine() -> str:
    """The processor, its matrix rates, and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    cores = sum(line.startswith("processor") for line in lines)
    return f"On {cores} cores of {model}, Python {platform.python_version()}; its matrix rates: {matrix_rates()}."


def matrix_rates() -> str:
    """Measured GFLOP/s of a matrix product."""
    import tensorflow as tf

    rates = []
    for kind in (tf.float32, tf.bfloat16):
        one = tf.cast(tf.random.stateless_normal((2048, 2048), (0, 0)), kind)
        product = tf.function(tf.matmul)
        product(one, one)
        times = []
        for _ in range(8):
            begun = time.perf_counter()
            product(one, one).numpy()
            times.append(time.perf_counter() - begun)
        rates.append(f"{2 * 2048**3 / min(times) / 1e9:.0f} GFLOP/s in {kind.name}")
    return ", ".join(rates)


if __name__ == "__main__":
    main()
