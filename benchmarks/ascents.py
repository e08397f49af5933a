"""Gradient ascent by convscope and by other tools, each in a process of its own: what `benchmarks.filters` and
`benchmarks.filter_quality` compare.

    python -m benchmarks.ascents JOB.json RESULT.npz

A job names a tool, a network, a layer, channels, steps and a seed; the result holds the final images `(n, h, w, c)`,
as shares of the network's range, and the seconds of the first and of a second call. Opening the network is not counted;
whatever is compiled or traced is, in the first call.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
SQUEEZENET = "tests/torch_models.py:squeezenet"


@dataclass(frozen=True)
class Job:
    """The job of one process.

    Attributes:
        tool: "plain", "tf-keras-vis", "lucent", or "convscope:RECIPE".
        network: a key of `NETWORKS`.
        layer: convscope's path; channels: numbers.
        steps: of the ascent; None for the tool's own.
        size: side of the images in pixels.
        seed: of the random numbers.
        again: make a second call in the same process.
    """

    tool: str
    network: str
    layer: str
    channels: tuple[int, ...]
    steps: int | None = None
    size: int = 224
    seed: int = 0
    again: bool = False


@dataclass(frozen=True)
class Made:
    """The result of a job.

    Attributes:
        images: `(n, h, w, c)`, as shares of the range from black to white.
        first, again: seconds of the first call and of a second one.
        peak: bytes of memory at the most, above what the process held with the network open.
        version: of the tool; steps: that were made; precision: that convscope computed in.
        ascent: seconds of the first call from its first step to its last, without the measurement of noise and results.
    """

    images: np.ndarray
    first: float
    again: float
    peak: int
    version: str
    steps: int
    precision: str = ""
    ascent: float = np.nan


@dataclass(frozen=True)
class Subject:
    """A network to optimize images for: the source that convscope opens, and the framework that runs it."""

    target: str
    framework: str
    options: dict[str, Any]
    layers: tuple[str, ...]


NETWORKS = {
    "ResNet50V2": Subject(
        "keras:ResNet50V2?weights=none&include_top=false",
        "tensorflow",
        {"preprocess": "-1..1"},
        ("conv3_block4_out",),
    ),
    "MobileNet": Subject(
        str(ASSETS / "keras" / "mobilenet_v1_0.25_224.keras"),
        "tensorflow",
        {},
        ("conv_pw_5_relu", "conv_pw_8_relu", "conv_pw_11_relu"),
    ),
    "SqueezeNet": Subject(
        SQUEEZENET,
        "torch",
        {"weights": str(ASSETS / "torch" / "squeezenet1_1.safetensors")},
        ("features.4", "features.7", "features.10"),
    ),
}


class NotMeasured(Exception):
    """Why a tool could not be run here."""


def opened(name: str) -> Any:
    """A network, opened by convscope.

    Raises:
        NotMeasured: its file is not here.
    """
    import convscope

    subject = NETWORKS[name]
    files = [value for value in (subject.target, subject.options.get("weights", "")) if str(ASSETS) in value]
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        raise NotMeasured(f"{Path(missing[0]).name} is not here")
    return convscope.open_model(subject.target, **subject.options)


def run(job: Job) -> Made:
    """Do a job in a process of its own.

    Raises:
        NotMeasured: it could not be done, and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "made.npz"
        request.write_text(json.dumps(asdict(job)))
        environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
        command = [sys.executable, "-m", "benchmarks.ascents", str(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NotMeasured((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        found = np.load(answer)
        names = ("first", "again", "peak", "version", "steps", "precision", "ascent")
        return Made(found["images"], **{name: found[name].item() for name in names})


# -- the tools -------------------------------------------------------------------------------------------


def by_convscope(job: Job) -> tuple[Callable[[], np.ndarray], str, int]:
    """A recipe of convscope, or a part of it as JSON after a second colon."""
    import convscope
    from convscope import events
    from convscope.techniques.filters.recipes import recipe_named

    network = opened(job.network)
    recipe = recipe_named(job.tool.split(":")[1])
    recipe = recipe if job.steps is None else replace(recipe, steps=job.steps)

    def climb() -> np.ndarray:
        ticks: list[float] = []

        def tick(event: events.Event) -> None:
            if isinstance(event, events.Advanced):
                ticks.append(time.perf_counter())

        result = convscope.filters(
            network, job.layer, job.channels, recipe=recipe, size=job.size, seed=job.seed, progress=tick
        )
        # The first step's own time, which its compile hides, is taken to be that of the others.
        climb.ascent = (ticks[-1] - ticks[0]) * len(ticks) / max(1, len(ticks) - 1)  # type: ignore[attr-defined]
        return _shares(network, result.values)

    climb.precision = network.precision_for_ascent()  # type: ignore[attr-defined]
    return climb, f"convscope {importlib.metadata.version('convscope')}", recipe.steps


def plainly(job: Job) -> tuple[Callable[[], np.ndarray], str, int]:
    """The classic procedure as people write it: one filter at a time."""
    network = opened(job.network)
    steps = job.steps or 30
    climb = _plain_tensorflow if NETWORKS[job.network].framework == "tensorflow" else _plain_torch
    version = importlib.metadata.version("tensorflow_cpu" if climb is _plain_tensorflow else "torch")
    return (lambda: _shares(network, climb(network, job, steps))), f"{NETWORKS[job.network].framework} {version}", steps


def _starts(network: Any, job: Job) -> np.ndarray:
    from convscope.techniques.filters.ascent import Plan
    from convscope.techniques.filters.recipes import CLASSIC

    plan = Plan(network, CLASSIC, (job.size, job.size), job.seed)
    return np.stack([plan.start((number,)) for number in job.channels])


def _plain_tensorflow(network: Any, job: Job, steps: int) -> np.ndarray:
    """A `tf.function` step that takes the filter's number as a Python integer, and so is traced for each filter."""
    import keras
    import tensorflow as tf

    extractor = keras.Model(inputs=network.model.inputs, outputs=network.model.get_layer(job.layer).output)

    @tf.function
    def step(image: tf.Tensor, channel: int, rate: float) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = tf.reduce_mean(extractor([image])[:, 2:-2, 2:-2, channel])
        return loss, image + rate * tf.math.l2_normalize(tape.gradient(loss, image))

    images = []
    for number, begin in zip(job.channels, _starts(network, job), strict=True):
        image = tf.constant(begin[None])
        for _ in range(steps):
            _, image = step(image, number, 10.0)
        images.append(image.numpy()[0])
    return np.stack(images)


def _plain_torch(network: Any, job: Job, steps: int) -> np.ndarray:
    """An eager loop through the whole network, with the gradients of its weights too."""
    import torch

    module = network.module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    seen: dict[str, Any] = {}
    hook = module.get_submodule(job.layer).register_forward_hook(lambda _, __, made: seen.update(made=made))
    half = torch.tensor((np.subtract(*_range(network)[::-1]) / 2).astype(np.float32)).reshape(1, -1, 1, 1)
    images = []
    for number, begin in zip(job.channels, _starts(network, job), strict=True):
        image = torch.tensor(begin[None]).permute(0, 3, 1, 2).contiguous().requires_grad_(True)
        for _ in range(steps):
            module.zero_grad()
            image.grad = None
            module(image)
            seen["made"][:, number, 2:-2, 2:-2].mean().backward()
            with torch.no_grad():
                image += 10.0 * half * image.grad / image.grad.norm().clamp_min(1e-6)
        images.append(image.detach().permute(0, 2, 3, 1).numpy()[0])
    hook.remove()
    return np.stack(images)


def by_tf_keras_vis(job: Job) -> tuple[Callable[[], np.ndarray], str, int]:
    """tf-keras-vis with its own modifiers, regularisers and rule, eight filters in a batch."""
    import tensorflow as tf
    from keras import Model
    from tf_keras_vis.activation_maximization import ActivationMaximization

    network = opened(job.network)
    model = Model(network.model.inputs, network.model.get_layer(job.layer).output)
    black, white = (float(end.min()) for end in _range(network))
    steps = job.steps or 200

    def climb() -> np.ndarray:
        tool = ActivationMaximization(model, clone=False)
        found = []
        for start in range(0, len(job.channels), 8):
            part = job.channels[start : start + 8]
            begin = tf.random.stateless_uniform((len(part), job.size, job.size, 3), (job.seed, start), black, white)

            def score(made: Any, part: Sequence[int] = part) -> Any:
                return [tf.reduce_mean(made[place, ..., number]) for place, number in enumerate(part)]

            found.append(np.asarray(tool(score, seed_input=begin, input_range=(black, white), steps=steps)))
        return _shares(network, np.concatenate(found))

    return climb, f"tf-keras-vis {importlib.metadata.version('tf_keras_vis')}", steps


def by_lucent(job: Job) -> tuple[Callable[[], np.ndarray], str, int]:
    """lucent with its own parameterization, transforms and optimizer; one filter in each run, as in its tutorials."""
    torchvision_without_operators()
    import torch
    from lucent.optvis import param, render

    network = opened(job.network)
    module = network.module.eval()
    steps = job.steps or 512

    def climb() -> np.ndarray:
        found = []
        for number in job.channels:
            torch.manual_seed(job.seed)
            np.random.seed(job.seed)
            made = render.render_vis(
                module,
                f"{job.layer.replace('.', '_')}:{number}",
                lambda: param.image(job.size),
                thresholds=(steps,),
                progress=False,
                show_image=False,
            )
            found.append(made[-1][0])
        return np.stack(found)

    return climb, f"torch-lucent {importlib.metadata.version('torch_lucent')}", steps


def torchvision_without_operators() -> None:
    """torchvision imports where torch is a build that lacks its operators; nothing here calls them."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_kept"] = library


TOOLS = {"plain": plainly, "tf-keras-vis": by_tf_keras_vis, "lucent": by_lucent, "convscope": by_convscope}


def _range(network: Any) -> tuple[np.ndarray, np.ndarray]:
    return network.preprocessing.range(network.inputs.channels)


def _shares(network: Any, images: np.ndarray) -> np.ndarray:
    """Images of the network's range as shares between its black and white."""
    black, white = _range(network)
    return (images - black) / (white - black)


def from_shares(network: Any, shares: np.ndarray) -> np.ndarray:
    """The inverse: images `(n, h, w, c)` float32 as the network takes them."""
    black, white = _range(network)
    return (black + shares * (white - black)).astype(np.float32)


def one_pass(job: Job) -> tuple[Callable[[], np.ndarray], str, int]:
    """A forward pass and the gradient of the input, of as many images as there are channels: what memory is held
    against.
    """
    network = opened(job.network)
    begin = _starts(network, job)
    if NETWORKS[job.network].framework == "tensorflow":
        return (lambda: _shares(network, _one_pass_tensorflow(network, job, begin))), "", 1
    return (lambda: _shares(network, _one_pass_torch(network, job, begin))), "", 1


def _one_pass_tensorflow(network: Any, job: Job, begin: np.ndarray) -> np.ndarray:
    import keras
    import tensorflow as tf

    extractor = keras.Model(inputs=network.model.inputs, outputs=network.model.get_layer(job.layer).output)

    @tf.function
    def gradient(images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            loss = tf.reduce_mean(extractor(images))
        return tape.gradient(loss, images)

    return gradient(tf.constant(begin)).numpy()


def _one_pass_torch(network: Any, job: Job, begin: np.ndarray) -> np.ndarray:
    import torch

    class Enough(Exception):
        pass

    seen: dict[str, Any] = {}

    def stop(_: Any, __: Any, made: Any) -> None:
        seen["made"] = made
        raise Enough

    hook = network.module.get_submodule(job.layer).register_forward_hook(stop)
    for parameter in network.module.parameters():
        parameter.requires_grad_(False)
    images = torch.tensor(begin).permute(0, 3, 1, 2).requires_grad_(True)
    try:
        network.module(images)
    except Enough:
        seen["made"].mean().backward()
    hook.remove()
    return images.grad.permute(0, 2, 3, 1).numpy()


TOOLS["one pass"] = one_pass


def memory_of(name: str) -> int:
    """Bytes that this process holds ("VmRSS") or held at the most ("VmHWM"); 0 where the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def main(request: str, answer: str) -> None:
    """Do the job of a file and write its result."""
    job = Job(**json.loads(Path(request).read_text()))
    climb, version, steps = TOOLS[job.tool.split(":")[0]](replace(job, channels=tuple(job.channels)))
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    held = memory_of("VmRSS")
    begun = time.perf_counter()
    images = climb()
    first = time.perf_counter() - begun
    peak, ascent = memory_of("VmHWM") - held, getattr(climb, "ascent", np.nan)
    begun = time.perf_counter()
    if job.again:
        climb()
    again = time.perf_counter() - begun if job.again else np.nan
    made = Made(images, first, again, peak, version, steps, str(getattr(climb, "precision", "")), ascent)
    np.savez(answer, **asdict(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
