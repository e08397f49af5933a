"""The user's model comes back as it was, wherever an interrupt falls, and whatever a layer raises."""

import importlib.util
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import convscope
from convscope import isolation
from convscope.errors import ModelError, OutOfMemoryError
from convscope.networks import Pass, restoring
from convscope.networks.restoring import Block, checkpoint, exclusively, restored

sys.path.insert(0, str(Path(__file__).parents[1]))
from trials import interrupts

RUNTIMES = ["torch", f"keras-{os.environ['KERAS_BACKEND']}"]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.slow(reason="a process that imports a framework, compiles, and gets some 200 signals")
def test_ctrl_c_at_any_moment(runtime):
    """Some 200 signals; slow: a process that imports a framework and compiles. `python -m trials` sends more."""
    for needed in {"torch": ["torch"]}.get(runtime, ["keras", os.environ["KERAS_BACKEND"]]):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    counts = interrupts.run(200, 7, runtime, timeout=500)
    assert counts.tried == 200
    assert counts.interrupted > 150
    assert (counts.changed, counts.changes) == (0, [])
    assert (counts.other, counts.others) == (0, [])
    assert counts.lost == 0


class Raised(BaseException):
    """What the user's own handler raises."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def number(request):
    """A signal whose handler, the user's own, raises."""

    def handler(*_):
        raise Raised

    before = signal.signal(request.param, handler)
    yield request.param
    assert signal.getsignal(request.param) is handler
    signal.signal(request.param, before)


class Thing:
    """Has two switches that are to come back."""

    def __init__(self):
        self.one = self.two = "as it was"

    def turn(self, undo):
        for name in ("one", "two"):
            undo.callback(setattr, self, name, getattr(self, name))
            setattr(self, name, "changed")

    @property
    def same(self):
        return self.one == self.two == "as it was"


def at_every_step(call, number):
    """Send a signal at the first line that is run within convscope, then at the second, and so on."""
    for step in range(10**4):
        send = interrupts.AtStep(step, number)
        try:
            try:
                send.begin()
                call()
            finally:
                send.end()
        except Raised:
            yield True
        else:
            if not send.sent:
                return
            yield False


def nested(thing, lock):
    def inside(_):
        checkpoint()
        return restored(thing.turn, lambda _: checkpoint())

    restored(thing.turn, inside, lock)


def blocks(thing, lock):
    with Block(thing.turn):
        restored(thing.turn, lambda _: None, lock)


@pytest.mark.parametrize("call", [nested, blocks])
def test_a_signal_at_every_step(call, number):
    thing, lock = Thing(), threading.RLock()
    steps = list(at_every_step(lambda: call(thing, lock), number))
    assert len(steps) > 100
    assert sum(steps) > 0.9 * len(steps)
    assert thing.same
    assert "owner=0" in repr(lock)
    assert (restoring._MAIN._users, restoring._MAIN._waiting) == (0, {})


@pytest.mark.parametrize("call", [nested, blocks])
def test_at_every_step_it_is_as_it_was(call, number):
    thing, lock = Thing(), threading.RLock()
    usual = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    before = [signal.getsignal(one) for one in usual]
    for _ in at_every_step(lambda: call(thing, lock), number):
        assert thing.same
        assert [signal.getsignal(one) for one in usual] == before


def test_a_lock_is_given_back_at_every_step(number):
    """Also on the line that leaves a `with`, where a lock taken by `with` would stay taken."""
    lock = threading.RLock()
    steps = [(left, "owner=0" in repr(lock)) for left in at_every_step(lambda: exclusively(lock, lambda: None), number)]
    assert len(steps) > 40
    assert all(given_back for _, given_back in steps)


def test_a_reader_that_is_interrupted_at_any_step_answers_the_next_call(number):
    reader = isolation.Reader()
    reader.start(["operator"])
    answered = 0
    for left in at_every_step(lambda: reader.call("operator:neg", 3), number):
        answered += 1
        if answered % 10 == 0 or not left:  # starting a reader takes a fifth of a second
            in_time = threading.Timer(60, reader.close)
            in_time.start()
            assert reader.call("operator:neg", 4) == -4
            in_time.cancel()
    assert answered > 60
    reader.close()


def test_programs_are_kept_after_an_interrupt_at_any_step(number):
    torch = pytest.importorskip("torch")
    network = convscope.open_model(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3)), size=8, preprocess="0..1")
    x = np.zeros((1, 8, 8, 3), np.float32)
    expected = network.predict(x)
    with ThreadPoolExecutor(1) as another:  # a lock that this thread left behind would make it wait
        for _ in at_every_step(lambda: network.program(_twice, Pass()), number):
            np.testing.assert_array_equal(another.submit(network.predict, x).result(60), expected)


def _twice(network, request):
    return lambda run, x: 2 * run(x, request).logits


def test_the_handler_is_called_once_and_after_the_change(number):
    thing, order = Thing(), []

    def turn(undo):
        undo.callback(order.append, "undone")
        signal.raise_signal(number)
        order.append("changed")

    with pytest.raises(Raised):
        restored(turn, lambda _: order.append("ran"))
    assert order == ["changed", "undone"]
    assert thing.same


def test_a_signal_waits_for_a_place_where_it_does_no_harm(number):
    order = []

    def body(_):
        signal.raise_signal(number)
        order.append("in the middle")
        checkpoint()
        order.append("never")

    with pytest.raises(Raised):
        restored(lambda undo: undo.callback(order.append, "undone"), body)
    assert order == ["in the middle", "undone"]


def test_a_handler_that_does_not_raise_is_called_and_all_goes_on():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame is not None)))
    try:
        found = restored(lambda _: signal.raise_signal(signal.SIGINT), lambda _: "result")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found, seen) == ("result", [(signal.SIGINT, True)])


def test_a_model_that_never_ends_can_be_left(number, monkeypatch):
    monkeypatch.setattr(restoring, "PATIENCE", 0.2)
    thing, began = Thing(), time.monotonic()

    def forever(_):
        signal.raise_signal(number)
        while time.monotonic() < began + 20:
            pass

    with pytest.raises(Raised):
        restored(thing.turn, forever)
    assert time.monotonic() - began < 10
    assert thing.same


def test_a_handler_that_the_model_sets_stays():
    def other(*_):
        """Another handler."""

    before = signal.getsignal(signal.SIGINT)
    try:
        restored(lambda _: None, lambda _: signal.signal(signal.SIGINT, other))
        assert signal.getsignal(signal.SIGINT) is other
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_threads_pass_is_waited_for_and_the_wait_can_be_left(number):
    lock, thing, held, done = threading.RLock(), Thing(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    later = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), number))
    later.start()
    with pytest.raises(Raised):
        restored(thing.turn, lambda _: None, lock)
    done.set()
    thread.join()
    assert thing.same


def test_what_fails_while_it_is_set_up_is_undone():
    order = []

    def turn(undo):
        undo.callback(order.append, "first")
        undo.callback(order.append, "second")
        raise MemoryError

    with pytest.raises(MemoryError):
        restored(turn, lambda _: order.append("ran"))
    assert order == ["second", "first"]


# -- blocks of a network ---------------------------------------------------------------------------------


def of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def train():
        with torch.no_grad():
            module[0].weight.mul_(-2)

    return convscope.open_model(module, size=10, preprocess="0..1"), train


def of_keras():
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [
            keras.layers.Input((10, 10, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )

    def train():
        model.layers[0].kernel.assign(-2 * model.layers[0].kernel)

    return convscope.open_model(model, preprocess="0..1"), train


@pytest.fixture(params=[of_torch, of_keras])
def trained(request):
    return request.param()


def answer(network):
    return network.predict(np.random.default_rng(0).random((1, 10, 10, 3)).astype(np.float32))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kinds", ["uu", "ru", "ur", "rr"])
def test_blocks_that_overlap_leave_nothing(trained, first, kinds):
    """They are as generators make them: the one that began first ends first, or last."""
    network, train = trained
    before = answer(network)
    zeros = [np.zeros_like(weight) for weight in network.weights()]
    made = [network.replaced(zeros) if kind == "r" else network.unchanging() for kind in kinds]
    for block in made:
        block.__enter__()
        answer(network)
    for block in (made[first], made[1 - first]):
        block.__exit__(None, None, None)
    assert np.array_equal(answer(network), before)
    train()
    assert not np.allclose(answer(network), before)


@pytest.mark.parametrize("first", [0, 1])
def test_blocks_of_threads_that_overlap_leave_nothing(trained, first):
    network, train = trained
    before = answer(network)
    turns, begun = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def work(which):
        with network.unchanging():
            answer(network)
            begun[which].set()
            turns[which].wait(20)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread, event in zip(threads, begun, strict=True):
        thread.start()
        event.wait(20)
    for which in (first, 1 - first):
        turns[which].set()
        threads[which].join()
    train()
    assert not np.allclose(answer(network), before)


def test_replaced_weights_are_those_of_one_thread(trained):
    network, _ = trained
    before, found = answer(network), []
    with network.replaced([np.zeros_like(weight) for weight in network.weights()]):
        thread = threading.Thread(target=lambda: found.append(answer(network)))
        thread.start()
        thread.join()
        assert not answer(network).any()
    assert np.array_equal(found[0], before)


def test_the_hash_is_of_the_weights_of_the_moment(trained):
    network, train = trained
    first = network.weights_sha256()
    assert network.weights_sha256() == first
    train()
    second = network.weights_sha256()
    assert second != first
    with network.unchanging():
        assert network.weights_sha256() == second
    assert network._hashed() == second


def test_the_hash_is_made_once_in_a_block(trained, monkeypatch):
    network, _ = trained
    made = []
    hashed = network._hashed
    monkeypatch.setattr(network, "_hashed", lambda: made.append(0) or hashed())
    with network.unchanging():
        assert len({network.weights_sha256() for _ in range(9)}) == 1
    assert len(made) == 1


def test_the_hash_sees_what_is_written_past_torchs_count():
    torch = pytest.importorskip("torch")
    network, _ = of_torch()
    first = network.weights_sha256()
    weight = network.module[0].weight
    weight.data.copy_(torch.flip(weight.data, (0,)))  # the same sum
    assert network.weights_sha256() != first


# -- layers that fail ------------------------------------------------------------------------------------


def test_a_failing_layer_of_torch_is_named():
    torch = pytest.importorskip("torch")

    class Picky(torch.nn.Module):
        fails = None

        def forward(self, x):
            if self.fails is not None:
                raise self.fails
            return x

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(Picky()), torch.nn.Flatten())
    module.train()
    network = convscope.open_model(module, size=8, preprocess="0..1")
    check_failures(network, module[1][0], "1.0", lambda: convscope.open_model(module, size=8, preprocess="0..1"))
    assert all(child.training and not child._forward_hooks for child in module.modules())


def test_a_failing_layer_of_keras_is_named():
    keras = pytest.importorskip("keras")

    class Picky(keras.layers.Layer):
        fails = None

        def call(self, x):
            if self.fails is not None:
                raise self.fails
            return x * 1.0

    picky = Picky(name="picky")
    inner = keras.Sequential([keras.layers.Input((6, 6, 4)), picky], name="inner")
    model = keras.Sequential(
        [keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), inner, keras.layers.GlobalAveragePooling2D()]
    )
    network = convscope.open_model(model, preprocess="0..1")
    check_failures(network, picky, "inner/picky", lambda: convscope.open_model(model, preprocess="0..1"))
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    assert keras.config.is_traceback_filtering_enabled()


def check_failures(network, layer, path, opened):
    """Of a pass, of a look, of an interrupt, and of a tap, whose failures are not the layer's."""
    x = network.tensor(np.zeros((1, 8, 8, 3), np.float32))
    passing = network.compile(lambda run, x: run(x).logits)
    for kind in (ValueError, TypeError, KeyError):
        layer.fails = kind("what the layer says")
        with pytest.raises(ModelError, match=f"its layer '{path}' raised {kind.__name__}") as caught:
            passing(x)
        assert caught.value.__cause__ is layer.fails
        with pytest.raises(ModelError, match=f"its layer '{path}' raised {kind.__name__}") as caught:
            opened()
        assert isinstance(caught.value.__cause__, kind)
    layer.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        network.compile(lambda run, x: run(x).logits)(x)
    layer.fails = MemoryError("for the technique, which takes less then")
    with pytest.raises(OutOfMemoryError, match="does not suffice") as caught:
        network.compile(lambda run, x: run(x).logits)(x)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert isinstance(caught.value, MemoryError)
    layer.fails = None
    tapped = network.compile(lambda run, x: run(x, Pass(replace=(path,)), {path: lambda _: 1 / 0}).logits)
    with pytest.raises(ZeroDivisionError):
        tapped(x)
    after = network.compile(lambda run, x: (run(x).logits, 1 / 0))
    with pytest.raises(ZeroDivisionError):
        after(x)
    network.compile(lambda run, x: run(x).logits)(x)


# -- inputs that are declared ----------------------------------------------------------------------------

HUGE = [(10**6, 10**6, 3), (1000, 1000, 10**6), (10**9, 4, 1)]


@pytest.mark.parametrize("shape", [*HUGE, (8, -8, 3)])
def test_a_declared_input_of_torch_is_checked_before_it_is_made(shape):
    torch = pytest.importorskip("torch")
    from convscope.networks.network import Source
    from convscope.networks.torch.modules import OpenedModule
    from convscope.networks.torch.network import network_of

    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    height, width, channels = shape
    with pytest.raises(ModelError, match=r"the input 'input' .*(limit|positive)"):
        network_of(OpenedModule(module, Source("declared"), input_shape=(1, channels, height, width)))


def test_an_input_that_is_fed_zeros_is_checked_before_they_are_made():
    torch = pytest.importorskip("torch")
    from convscope.networks.network import Source
    from convscope.networks.torch.modules import OpenedModule
    from convscope.networks.torch.network import network_of

    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    module.input_names, module.input_shapes = ["picture", "more"], {"more": (1, 10**15)}
    with pytest.raises(ModelError, match=r"the input 'more' .*limit"):
        network_of(OpenedModule(module, Source("declared"), input_shape=(1, 3, 8, 8)))


@pytest.mark.parametrize("shape", HUGE)
def test_a_declared_input_of_keras_is_checked_before_it_is_made(shape):
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.layers.Input(shape), keras.layers.GlobalAveragePooling2D()])
    with pytest.raises(ModelError, match=r"the input .*limit"):
        convscope.open_model(model)


def test_a_size_that_is_asked_for_is_checked_too():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(ModelError, match="limit pixels"):
        convscope.open_model(module, size=10**6)


def test_patches_are_undone():
    pytest.importorskip("keras")
    from convscope.networks.keras.graph import patch

    thing = Thing()
    with ExitStack() as undo:
        patch(undo, thing, "one", "patched")
        patch(undo, thing, "one", "patched again")
        patch(undo, thing, "three", "new")
        assert (thing.one, thing.three) == ("patched again", "new")
    assert thing.same
    assert "three" not in vars(thing)
