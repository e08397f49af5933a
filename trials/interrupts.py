"""Ctrl-C at any moment: does the user's model come back as it was?

    python -m trials.interrupts torch --tries 5000 --seed 1

A try opens a small model or uses an opened one, while a signal is on its way. Everything that can be told of the model
and of the frameworks' modes is compared before and after. The moment is random in two thirds of the tries: after a time
drawn between nothing and a little more than the call takes, a half of these near its beginning or its end. In the
others it is a step: the n-th line that Python runs within convscope, the frameworks' own context managers included,
so that also moments are met that last a microsecond.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import convscope

STUCK_SECONDS = 100  # in which one call, of a few milliseconds, has not ended
ROOT = Path(__file__).parents[1]
RUNTIMES = ("torch", "keras-tensorflow", "keras-torch", "keras-jax")


@dataclass
class Counts:
    """The outcomes of the tries.

    Attributes:
        tried: calls during which a signal was sent; interrupted: those that ended in KeyboardInterrupt.
        changed: those that left something changed, `changes` says what.
        other: those that ended in another exception than the user's, `others` says which.
        lost: signals that never reached the user's handler; slow: those that took longer than a second.
        seconds: in all.
    """

    tried: int = 0
    interrupted: int = 0
    changed: int = 0
    other: int = 0
    lost: int = 0
    slow: int = 0
    seconds: float = 0
    changes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class Stuck(Exception):
    """A call that was interrupted did not end; the text says where each thread stood."""


def run(tries: int, seed: int, runtime: str, timeout: float | None = None) -> Counts:
    """Interrupt `tries` calls on a runtime, one of `RUNTIMES`, in a process of its own.

    Raises:
        Stuck: one of them did not end; subprocess.TimeoutExpired: all together took longer than `timeout`.
    """
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1")
    environment["KERAS_BACKEND"] = runtime.removeprefix("keras-")
    command = [sys.executable, "-m", "trials.interrupts", runtime, "--tries", str(tries), "--seed", str(seed), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    if done.stderr.rpartition("Timeout (")[1]:
        raise Stuck(done.stderr[done.stderr.index("Timeout (") :][:2000])
    if done.returncode != 0:
        raise RuntimeError(f"the trial itself failed: {done.stderr[-2000:]}")
    return Counts(**json.loads(done.stdout.splitlines()[-1]))


# -- the models ------------------------------------------------------------------------------------------


def torch_case() -> tuple[Any, Callable[[], Any]]:
    """A module with all that a visitor could leave changed, and what tells its state."""
    import torch
    from torch import nn

    class Odd(nn.Module):
        """Counts its calls in a buffer, and works with functions too."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return self.relu(self.conv(x)) + torch.sigmoid(x)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Odd(), nn.Dropout(0.5), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Softmax(-1),
    ).train()  # fmt: skip
    module[1].eval()
    module[0].weight.requires_grad_(False)
    module[8].weight.grad = torch.ones_like(module[8].weight)
    module[3].register_forward_hook(lambda *_: None)
    module[3].conv.register_forward_pre_hook(lambda *_: None)

    def state() -> dict[str, Any]:
        seen: dict[str, Any] = {
            "grad mode": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_default_dtype(),
            "generator": _digest(torch.get_rng_state().numpy()),
            "mha": torch.backends.mha.get_fastpath_enabled(),
            "modes": torch._C._len_torch_function_stack(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        for name, child in module.named_modules():
            own = vars(child)
            seen[f"{name} attributes"] = sorted(own)
            seen[f"{name} values"] = [own.get(key) for key in ("training", "inplace")]
            seen[f"{name} class"] = type(child)
            seen[f"{name} hooks"] = {k: list(v) for k, v in own.items() if "hook" in k and isinstance(v, dict)}
            seen[f"{name} tensors"] = [
                (key, id(tensor), tensor.data_ptr(), _digest(tensor.detach().numpy()), tensor.requires_grad)
                for key, tensor in (*child._parameters.items(), *child._buffers.items())
                if tensor is not None
            ]
        seen["gradient"] = [None if p.grad is None else _digest(p.grad.numpy()) for p in module.parameters()]
        return seen

    return module, state


def keras_case() -> tuple[Any, Callable[[], Any]]:
    """The same of Keras: a nested model with dropout, batch norm, a frozen layer and a layer that a call wraps."""
    import keras
    from keras import layers

    from convscope.networks.keras.graph import named_operations

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [layers.Input((8, 8, 4)), layers.Conv2D(4, 3, activation="relu", name="deep"), layers.Dropout(0.5)],
        name="inner",
    )
    image = layers.Input((10, 10, 3))
    x = layers.Conv2D(4, 3, name="first")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = inner(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x + keras.ops.sigmoid(x))
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="out")(x), name="outer")
    model.get_layer("first").trainable = False
    operations = [model, *(operation for _, operation in named_operations(model))]
    tracker = keras.src.backend.common.global_state.GLOBAL_STATE_TRACKER

    def state() -> dict[str, Any]:
        seen: dict[str, Any] = {"modes": _modes_of(keras.backend.backend())}
        usual = ("object_name_uids", "global_seed_generator", "custom_objects_scope_dict")
        seen["keras"] = {
            key: list(value) if isinstance(value, list) else value
            for key, value in sorted(vars(tracker).items())
            if key not in usual and value not in (None, [])
        }
        for operation in operations:
            own, name = vars(operation), operation.name
            seen[f"{name} attributes"] = sorted(own)
            seen[f"{name} values"] = [
                own.get(key)
                for key in ("call", "activation", "_dtype_policy", "_assert_input_compatibility", "quantized_call")
            ]
            seen[f"{name} flags"] = [getattr(operation, key, None) for key in ("trainable", "built", "_called")]
            seen[f"{name} nodes"] = [len(operation._inbound_nodes), len(operation._outbound_nodes)]
            seen[f"{name} losses"] = len(getattr(operation, "_losses", ()))
        seen["weights"] = [(id(w), _digest(keras.ops.convert_to_numpy(w.value)), w.trainable) for w in model.variables]
        return seen

    return model, state


def _modes_of(backend: str) -> Any:
    if backend == "torch":
        import torch

        return torch.is_grad_enabled(), torch._C._len_torch_function_stack()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly(), tf.inside_function()
    import jax

    return jax.core.trace_ctx.is_top_level() if hasattr(jax.core, "trace_ctx") else jax.numpy.zeros(1).shape


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def _of_process() -> dict[str, Any]:
    """What belongs to the process."""
    gate = getattr(sys.modules.get("convscope.networks.restoring"), "_MAIN", None)
    seen = {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "recursion": sys.getrecursionlimit(),
        "gate": gate and (gate._users, bool(gate._waiting)),  # its mode is of no matter while nobody uses it
    }
    for name, lock in (("torch.runner", "ONE_AT_A_TIME"), ("keras.runner", "TRACING")):
        room = sys.modules.get(f"convscope.networks.{name}")
        if room is not None:
            seen[lock] = "owner=0" in repr(getattr(room, lock))
    return seen


# -- the calls -------------------------------------------------------------------------------------------


def calls_on(model: Any) -> dict[str, Callable[[], Any]]:
    """The interrupted calls: each technique on an opened network, and the opening."""
    import convscope

    size = None if hasattr(model, "get_layer") else 10
    network = convscope.open_model(model, size=size, preprocess="0..1")
    photo = np.random.default_rng(0).integers(0, 255, (10, 10, 3), np.uint8)
    conv = [layer.path for layer in network.layers if layer.kind == "conv"][-1]
    x = network.prepare(convscope.images.decode.read_images([photo]))
    stages = network.stages()

    def scrambled() -> None:
        with network.unchanging(), network.scrambled(stages[-1:]):
            network.predict(x)

    def opened() -> Any:
        return convscope.open_model(model, size=size, preprocess="0..1")

    return {
        "forward": lambda: network.forward(x, (conv,)),
        "activations": lambda: convscope.activations(network, [photo], "conv"),
        "heatmap": lambda: convscope.heatmap(network, [photo], 1, layer=conv),
        "filters": lambda: convscope.filters(network, conv, [0, 1], steps=2),
        "concepts": lambda: convscope.concepts(network, [photo], 2, conv),
        "scrambled": scrambled,
        "open": opened,
        "compile": lambda: opened().forward(x, (conv,)),
    }


# Calls that compile take a hundred times as long.
_OFTEN = {"forward": 60, "scrambled": 40, "heatmap": 20, "activations": 20}
_OFTEN |= {"filters": 10, "concepts": 10, "open": 15, "compile": 5}


class Interrupted(BaseException):
    """The exception of the handler of some tries, instead of KeyboardInterrupt."""


@dataclass
class _Try:
    """One call and one signal: its time and its outcome."""

    name: str
    call: Callable[[], Any]
    usual: float
    random: random.Random
    seen: int = 0
    sent: int = 0

    def handler(self, number: int, frame: Any) -> None:
        self.seen += 1
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted

    def run(self, by_step: bool, steps: int) -> tuple[str, BaseException | None]:
        """The outcome of the call: "done", "interrupted" or "other"."""
        number = self.random.choice([signal.SIGINT] * 4 + [signal.SIGTERM])
        when = self.random.randrange(steps) if by_step else self._moment()
        send = AtStep(when, number) if by_step else _Timer(when, number)
        try:
            try:
                send.begin()
                self.call()
            finally:
                send.end()
            send.join()
            _settle()
        except (KeyboardInterrupt, Interrupted):
            send.end()
            send.join()
            self.sent = send.sent
            return "interrupted", None
        except BaseException as error:
            self.sent = send.sent
            return "other", error
        self.sent = send.sent
        return "done", None

    def _moment(self) -> float:
        where = self.random.random()
        if where < 0.25:
            return self.usual * 0.15 * self.random.random()
        if where < 0.5:
            return self.usual * (0.85 + 0.2 * self.random.random())
        return self.usual * 1.1 * self.random.random()


def _settle() -> None:
    """Let Python handle what has arrived."""
    for _ in range(3):
        time.sleep(0)


class _Timer:
    """Another thread that sends the signal after a time."""

    def __init__(self, delay: float, number: int) -> None:
        # No Event: a signal inside of its methods would leave its lock held.
        self.delay, self.number, self.sent, self._over = delay, number, 0, False
        self._main, self._thread = threading.get_ident(), threading.Thread(target=self._send, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def _send(self) -> None:
        end = time.perf_counter() + self.delay
        while time.perf_counter() < end:
            if self._over:
                return
            time.sleep(0)  # a sleep of a length would wake up on the scheduler's beat
        self.sent = 1
        signal.pthread_kill(self._main, self.number)

    def end(self) -> None:
        self._over = True

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()


class AtStep:
    """A trace function that sends the signal as Python comes to a line for the n-th time."""

    WITHIN = (
        os.path.dirname(convscope.__file__),
        "contextlib",
        os.path.join("torch", "utils", "_contextlib"),
        "grad_mode",
        "threading",
    )

    def __init__(self, step: int, number: int) -> None:
        self.left, self.number, self.sent = step, number, 0
        self._known: dict[Any, bool] = {}

    def begin(self) -> None:
        sys.settrace(self._called)

    def end(self) -> None:
        sys.settrace(None)

    def join(self) -> None:
        """Nothing runs beside."""

    def _called(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in self._known:
            self._known[code] = any(part in code.co_filename for part in self.WITHIN)
        return self._line if self._known[code] and not self.sent else None

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event in ("line", "return"):
            self.left -= 1
            if self.left < 0 and not self.sent:
                self.sent = 1
                sys.settrace(None)
                signal.raise_signal(self.number)
        return self._line


# -- a whole trial ---------------------------------------------------------------------------------------


def trial(tries: int, seed: int, runtime: str) -> Counts:
    """Interrupt `tries` calls in this process, which has to be on the runtime; see `run`."""
    began, counts, chance = time.perf_counter(), Counts(), random.Random(seed)
    model, state = torch_case() if runtime == "torch" else keras_case()
    calls = calls_on(model)
    usual = {name: _usual(call) for name, call in calls.items()}
    steps = {name: _steps_of(call) for name, call in calls.items()}
    names = [name for name, often in _OFTEN.items() for _ in range(often)]
    answer = calls["forward"]()
    gc.disable()  # an exception in what the collector calls is dropped
    before = {**_of_process(), **state()}
    while counts.tried < tries:
        name = chance.choice(names)
        faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
        one = _Try(name, calls[name], usual[name], chance)
        kept = {number: signal.signal(number, one.handler) for number in (signal.SIGINT, signal.SIGTERM)}
        start = time.perf_counter()
        how, error = one.run(chance.random() < 1 / 3, steps[name])
        for number, handler in kept.items():
            if getattr(signal.getsignal(number), "__self__", None) is not one:
                _note(counts, f"{name}: the handler of {number} is {signal.getsignal(number)}")
            signal.signal(number, handler)
        if not one.sent:
            continue
        counts.tried += 1
        counts.interrupted += how == "interrupted"
        counts.slow += time.perf_counter() - start > 1
        counts.lost += not one.seen
        if how == "other":
            counts.other += 1
            counts.others.append(f"{name}: {error!r}"[:300])
        del error
        now = {**_of_process(), **state()}
        if now != before:
            _note(counts, f"{name}: " + "; ".join(_difference(before, now)))
            before = now
        if counts.tried % 500 == 0:
            gc.collect()
    faulthandler.cancel_dump_traceback_later()
    again = calls["forward"]()
    if not np.allclose(answer[0], again[0], atol=1e-6):
        _note(counts, "the network answers otherwise than before")
    counts.seconds = time.perf_counter() - began
    return counts


def _note(counts: Counts, what: str) -> None:
    counts.changed += 1
    if len(counts.changes) < 20:
        counts.changes.append(what[:600])


def _difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key)} became {now.get(key)}" for key in {*before, *now} if before.get(key) != now.get(key)
    ]


def _usual(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, once it is warm."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _steps_of(call: Callable[[], Any]) -> int:
    counter = AtStep(10**9, signal.SIGINT)
    counter.begin()
    call()
    counter.end()
    return 10**9 - counter.left


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, help="seconds that a signal waits while the model runs")
    parser.add_argument("--json", action="store_true", help="one line of JSON, in this process")
    given = parser.parse_args()
    if given.json and given.patience is not None:
        from convscope.networks import restoring

        restoring.PATIENCE = given.patience
    counts = (trial if given.json else run)(given.tries, given.seed, given.runtime)
    print(json.dumps(asdict(counts), default=str, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
