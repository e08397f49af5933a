"""Threads: sessions, direct calls and openings side by side have the results that one thread alone has."""

import hashlib
import sys
import threading

import numpy as np
import pytest
from runtimes_at_hand import LAYERS, assert_same, images, opened, runtimes, two_that_share

import convscope
from convscope import Request, Session
from convscope.networks import backends
from convscope.networks.passes import Pass

ROUNDS = 2


@pytest.fixture(scope="module", params=runtimes())
def runtime(request):
    return request.param


@pytest.fixture(scope="module")
def two(runtime):
    """Two networks that share a layer."""
    return two_that_share(runtime)


@pytest.fixture(autouse=True)
def _often():
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*functions):
    """Call each on a thread of its own, all beginning at once; what one raises is raised here."""
    barrier, failed = threading.Barrier(len(functions)), []

    def work(function):
        try:
            barrier.wait(60)
            function()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def requests(runtime):
    """Of each technique, with all that a pass changes: precision, weights, non-linearities, rules."""
    first = LAYERS[runtime][0]
    one = images(1)
    return [
        Request.of("heatmap", one, target=1),
        Request.of("heatmap", one, target=2, layer=first, method=["layercam", "guided-backprop"]),
        Request.of("heatmap", one, target=1, layer=first, check=True),
        Request.of("activations", one, [first]),
        Request.of("concepts", one, count=2),
        Request.of("filters", first, [0, 1], steps=2, precision="bfloat16"),
        Request.of("filters", first, [2], steps=2, precision="float32"),
    ]


@pytest.mark.slow(reason="two sessions and direct calls of every technique")
def test_sessions_and_direct_calls_side_by_side(two, runtime):
    """On two networks that share a layer, whose weights one of the requests exchanges for others."""
    asked = requests(runtime)
    alone = [[request.run(network) for request in asked] for network in two]
    fresh = two_that_share(runtime)  # nothing is compiled yet: tracing is where layers are changed

    def through_a_session(number):
        with Session(fresh[number], cache_bytes=0) as session:
            for _ in range(ROUNDS):
                handles = [session.submit(request) for request in asked]
                for handle, expected in zip(handles, alone[number], strict=True):
                    assert_same(handle.result(), expected)

    def directly(number):
        order = np.random.default_rng(number)
        for _ in range(ROUNDS):
            for index in order.permutation(len(asked)):
                assert_same(asked[index].run(fresh[number]), alone[number][index])

    together(lambda: through_a_session(0), lambda: through_a_session(1), lambda: directly(0), lambda: directly(1))


def test_opening_beside_passes(two, runtime):
    network, other = two
    one = images(1)
    alone = convscope.heatmap(network, one, target=1)
    model = network.module if runtime == "torch" else network.model
    stop = threading.Event()

    def open_often():
        try:
            for _ in range(4):
                again = opened(runtime, model)
                assert again.layers == network.layers
                assert again.head == network.head
                assert_same(convscope.heatmap(again, one, target=1), alone)
        finally:
            stop.set()

    def use():
        while not stop.is_set():
            convscope.filters(other, LAYERS[runtime][0], [0], steps=1, precision="bfloat16")
            assert_same(convscope.heatmap(network, one, target=1), alone)

    together(open_often, use)


def test_weights_are_read_beside_passes_that_exchange_them(two):
    """The hash and the weights are the model's own, whatever another thread's passes compute with."""
    network, other = two
    sha256, weights = network.weights_sha256(), [weight.copy() for weight in network.weights()]
    zeros = [np.zeros_like(weight) for weight in other.weights()]
    x = np.zeros((1, *other.inputs.size, 3), np.float32)
    stop = threading.Event()

    def exchange():
        while not stop.is_set():
            with other.replaced(zeros):
                assert not other.predict(x).any()

    def read():
        try:
            for _ in range(200):
                assert network.weights_sha256() == sha256
                for own, before in zip(network.weights(), weights, strict=True):
                    np.testing.assert_array_equal(own, before)
        finally:
            stop.set()

    together(exchange, read)


def test_blocks_of_many_threads(two):
    """Each thread's passes compute with its own weights."""
    network, _ = two
    x = np.random.default_rng(0).random((1, *network.inputs.size, 3)).astype(np.float32)
    factors = (0.5, 1.0, 2.0, 4.0)
    scaled = [[factor * weight for weight in network.weights()] for factor in factors]
    expected = []
    for weights in scaled:
        with network.replaced(weights):
            expected.append(network.predict(x))
    assert len({answer.tobytes() for answer in expected}) == len(factors)

    def work(number):
        for _ in range(40):
            with network.replaced(scaled[number]):
                np.testing.assert_array_equal(network.predict(x), expected[number])

    together(*(lambda number=number: work(number) for number in range(len(factors))))


def test_what_a_model_is_told_beside_passes_that_change_it(two, runtime, monkeypatch):
    """Other precision and left-out non-linearities of one thread's pass are not seen by another."""
    network, other = two
    monkeypatch.setattr(backends, "processor_has_bfloat16", lambda: True)
    first = LAYERS[runtime][0]
    answers = network.precision_for_ascent(), network.nonlinearities(first), other.nonlinearities(first)
    asked_for = Pass(
        record=(first,), stop=True, preactivations=tuple(other.nonlinearities(first)), precision="bfloat16"
    )
    x = other.tensor(np.zeros((1, *other.inputs.size, 3), np.float32))
    stop = threading.Event()

    def change():
        while not stop.is_set():  # a new program each time, so that it is traced anew
            program = other.compile(lambda run, x: run(x, asked_for).activations[first])
            program(x)

    def ask():
        try:
            for _ in range(3000):
                asked = network.precision_for_ascent(), network.nonlinearities(first), other.nonlinearities(first)
                assert asked == answers
        finally:
            stop.set()

    together(change, ask)


def returning(network, number):
    return lambda: number


def test_programs_are_kept_by_many_threads(two, monkeypatch):
    """More keys than are kept, so that old ones go while others look."""
    network, _ = two
    monkeypatch.setattr(network, "compile", lambda function: function)

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 60, 3000):
            assert network.program(returning, int(number))() == number

    together(*(lambda seed=seed: work(seed) for seed in range(4)))


def test_a_cache_used_by_many_threads(two):
    """Results under a limit that holds some of them only."""
    network, _ = two
    asked = [Request.of("heatmap", images(1, seed), target=1) for seed in range(4)]
    alone = [request.run(network) for request in asked]
    with Session(network, cache_bytes=6000, unchanging=True) as session:

        def work(seed):
            for index in np.random.default_rng(seed).integers(0, len(asked), 25):
                assert_same(session.get(asked[index]), alone[index])

        together(*(lambda seed=seed: work(seed) for seed in range(4)))


def test_two_runtimes_side_by_side():
    for name in ("keras", "torch"):
        pytest.importorskip(name)
    networks = {name: opened(name) for name in ("keras", "torch")}
    one = images(1)
    alone = {
        name: (
            convscope.heatmap(network, one, target=1, layer=LAYERS[name][0], check=True),
            convscope.filters(network, LAYERS[name][0], [0], steps=2),
        )
        for name, network in networks.items()
    }

    def work(name):
        network, first = networks[name], LAYERS[name][0]
        for _ in range(ROUNDS):
            assert_same(convscope.heatmap(network, one, target=1, layer=first, check=True), alone[name][0])
            assert_same(convscope.filters(network, first, [0], steps=2), alone[name][1])

    together(*(lambda name=name: work(name) for name in networks for _ in range(2)))


def test_results_do_not_depend_on_who_else_asks(two, runtime):
    """Many short requests of four clients to one session: each handle has the answer to its own request."""
    network, _ = two
    asked = [Request.of("heatmap", images(1, seed), target=seed % 5) for seed in range(5)]
    alone = [request.run(network) for request in asked]
    digests = [hashlib.sha256(np.ascontiguousarray(one.maps).tobytes()).hexdigest() for one in alone]
    assert len(set(digests)) == len(digests)
    with Session(network, cache_bytes=0) as session:

        def work(seed):
            order = np.random.default_rng(seed).integers(0, len(asked), 12)
            handles = [(index, session.submit(asked[index])) for index in order]
            for index, handle in handles:
                assert_same(handle.result(), alone[index])

        together(*(lambda seed=seed: work(seed) for seed in range(4)))
