"""Sessions: one network on one thread, a queue, cancellation and a cache."""

import asyncio
import doctest
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from runtimes_at_hand import LAYERS, assert_same, images, multiply, opened, runtimes

import convscope
from convscope import Request, Session, limits
from convscope import session as module
from convscope.errors import UsageError
from convscope.session import RequestCancelled, RequestReplaced
from convscope.techniques.heatmaps import Custom

PATIENCE = 60  # seconds after which a test that waits has failed


@pytest.fixture(scope="module", params=runtimes())
def runtime(request):
    return request.param


@pytest.fixture(scope="module")
def network(runtime):
    """One for all tests: who changes its weights changes them back."""
    return opened(runtime)


@pytest.fixture
def session(network):
    with Session(network) as made:
        yield made


class Held:
    """A `progress` that keeps the session's thread until it is let go."""

    def __init__(self):
        self.came, self.go = threading.Event(), threading.Event()
        self.events = []

    def __call__(self, *event):
        self.events.append(event)
        self.came.set()
        assert self.go.wait(PATIENCE)


def an_ascent(runtime, steps=10**6, **more):
    return Request.of("filters", LAYERS[runtime][0], channels=[0, 1], steps=steps, **more)


def maps(image, **more):
    return Request.of("heatmap", image, **more)


def held(session, runtime):
    """A request that runs until `Held.go` is set."""
    hold = Held()
    handle = session.submit(an_ascent(runtime, steps=2), progress=hold)
    assert hold.came.wait(PATIENCE)
    return hold, handle


# -- answers ---------------------------------------------------------------------------------------------


@pytest.mark.slow(reason="every technique runs twice, in a session and directly")
def test_answers_are_those_of_direct_calls(session, network, runtime):
    first, _ = LAYERS[runtime]
    two = images(2)
    for technique, positional, named in [
        ("activations", (two, [first]), {}),
        ("heatmap", (two,), {"target": 1, "method": ["grad-cam", "layercam"]}),
        ("heatmap", (two[0],), {"target": 1, "method": "rise", "budget": 8}),
        ("concepts", (two,), {"count": 2}),
        ("filters", (first, [0, 3]), {"steps": 3, "frames": 2, "natural_images": two}),
        ("filters", (), {"objectives": [f"{first}:1"], "steps": 2, "recipe": "deepdream", "image": two[0]}),
    ]:
        direct = getattr(convscope, technique)(network, *positional, **named)
        assert_same(session.get(Request.of(technique, *positional, **named)), direct)


def test_progress_reaches_the_client(session, runtime):
    events = []
    session.get(an_ascent(runtime, steps=4), progress=lambda *event: events.append((threading.current_thread(), event)))
    assert len(events) >= 4
    assert {thread for thread, _ in events} != {threading.current_thread()}
    assert len({thread for thread, _ in events}) == 1


def test_errors_are_the_requests_own(session, runtime, network):
    bad = session.submit(Request.of("heatmap", images(1), target=99))
    good = session.submit(maps(images(1)))
    with pytest.raises(UsageError, match="99"):
        bad.result(PATIENCE)
    assert_same(good.result(PATIENCE), convscope.heatmap(network, images(1)))

    def fails(*_):
        raise SystemExit("of the client's callback")

    with pytest.raises(SystemExit):
        session.get(an_ascent(runtime), progress=fails)
    session.get(maps(images(1)))


def test_the_callers_limits_and_numpys_error_state_hold(session):
    seen = []

    def score(ops, logits, activations):
        seen.append((limits.current().seconds, np.geterr()["over"]))
        return logits[:, 0]

    with limits.using(seconds=7), np.errstate(over="raise"):
        session.get(maps(images(1), target=Custom(score)))
    assert set(seen) == {(7, "raise")}


def test_a_handle_can_be_awaited(session, network):
    async def wait():
        return await asyncio.wrap_future(session.submit(maps(images(1))))

    assert_same(asyncio.run(wait()), convscope.heatmap(network, images(1)))


def test_a_callback_that_waits_for_its_own_thread_is_refused(session, runtime):
    def progress(*_):
        session.get(maps(images(1)))

    with pytest.raises(UsageError, match="callback"):
        session.get(an_ascent(runtime), progress=progress)


# -- the queue -------------------------------------------------------------------------------------------


def test_a_newer_request_of_a_kind_takes_the_waiting_ones_place(session, runtime):
    hold, first = held(session, runtime)
    order = []

    def submitted(name, seed, kind):
        handle = session.submit(maps(images(1, seed)), kind=kind)
        handle.add_done_callback(lambda _: order.append(name))
        return handle

    hovers = [submitted("hover 0", 0, "hover")]
    layer = submitted("layer", 1, "layer")
    none = [submitted(f"none {number}", number, None) for number in (2, 3)]
    hovers += [submitted(f"hover {number}", 3 + number, "hover") for number in (1, 2)]
    for replaced in hovers[:2]:
        assert replaced.cancelled()
        with pytest.raises(RequestReplaced):
            replaced.result(PATIENCE)
    assert not first.done()
    hold.go.set()
    for handle in (first, hovers[2], layer, *none):
        assert not handle.cancelled() or handle.result(PATIENCE)
        handle.result(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while len(order) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert order == ["hover 0", "hover 1", "hover 2", "layer", "none 2", "none 3"]


def test_a_running_request_is_not_replaced(session, runtime):
    hold = Held()
    first = session.submit(an_ascent(runtime, steps=2), kind="layer", progress=hold)
    assert hold.came.wait(PATIENCE)
    second = session.submit(an_ascent(runtime, steps=3), kind="layer")
    hold.go.set()
    assert first.result(PATIENCE).values.shape == second.result(PATIENCE).values.shape


def test_a_waiting_request_can_be_cancelled(session, runtime):
    hold, first = held(session, runtime)
    ran = []
    waiting = session.submit(maps(images(1)), kind="hover", progress=lambda *event: ran.append(event))
    assert waiting.cancel()
    assert not waiting.cancel()
    assert waiting.cancelled()
    with pytest.raises(RequestCancelled) as caught:
        waiting.result(PATIENCE)
    assert type(caught.value) is RequestCancelled
    hold.go.set()
    first.result(PATIENCE)
    assert not first.cancel()
    assert not first.cancelled()
    assert not ran


def the_models_state(network):
    model = getattr(network, "module", None)
    if model is not None:
        parts = [(one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
        return parts, [parameter.requires_grad for parameter in model.parameters()]
    return [sorted(vars(layer)) for layer in [network.model, *network.model._flatten_layers()]]


def test_a_running_ascent_stops_at_its_next_step(session, network, runtime):
    request = an_ascent(runtime, steps=4)
    sha256 = network.weights_sha256()
    before, state = session.get(request), the_models_state(network)
    for reached in (1, 2, 7):
        steps, handles = [], []

        def progress(*event, steps=steps, handles=handles, reached=reached):
            steps.append(event)
            if len(steps) == reached:
                while not handles:
                    time.sleep(0.001)
                handles[0].cancel()

        handles.append(session.submit(an_ascent(runtime), progress=progress))
        with pytest.raises(RequestCancelled):
            handles[0].result(PATIENCE)
        assert len(steps) == reached
        assert handles[0].cancelled()
    assert the_models_state(network) == state
    assert network.weights_sha256() == sha256
    # Not from the cache: another number of frames is another request.
    again = session.get(an_ascent(runtime, steps=4, frames=1))
    np.testing.assert_array_equal(again.values, before.values)


def test_a_request_without_steps_stops_at_its_next_pass(session, network):
    """The passes of a sampling method on one image are one step for its caller."""
    one = images(1)
    direct = convscope.heatmap(network, one)
    scored, ready = [], threading.Event()

    def score(ops, logits, activations):
        scored.append(1)
        ready.set()
        return logits[:, 0]

    handle = session.submit(maps(one, target=Custom(score), method="rise", budget=10**7))
    assert ready.wait(PATIENCE)
    began = time.monotonic()
    assert handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2
    assert_same(session.get(maps(one)), direct)


# -- the cache -------------------------------------------------------------------------------------------


def test_equal_requests_are_answered_from_the_cache(session, tmp_path):
    from PIL import Image

    one, two = images(2)
    first = session.get(maps(one))
    assert session.get(maps(one.copy(), target="top")) is first
    assert session.get(maps(two)) is not first
    assert session.get(maps(one, target=1)) is not first
    path = tmp_path / "one.png"
    Image.fromarray(one).save(path)
    named = session.get(maps(path))
    assert named is not first  # it names its file
    assert session.get(maps(str(path))) is named
    Image.fromarray(two).save(path)
    np.testing.assert_array_equal(session.get(maps(path)).maps, session.get(maps(two)).maps)


def test_what_was_given_out_can_not_be_written_to(session, runtime):
    result = session.get(an_ascent(runtime, steps=1))
    with pytest.raises(ValueError, match="read-only"):
        result.values[...] = 0


def test_a_request_that_holds_a_function_is_not_cached(session):
    number = [0]
    target = Custom(lambda ops, logits, activations: logits[:, number[0]])
    request = maps(images(1), target=target)
    assert not request.by_value
    assert request == maps(images(1), target=target)
    first = session.get(request)
    number[0] = 1
    assert session.get(request) is not first
    assert maps(images(1), target=("conv:1", 2)).by_value


def bytes_of(result):
    return result.maps.nbytes + sum(photo.pixels.nbytes for photo in result.images)


def test_the_cache_keeps_a_limit_and_forgets_the_least_recently_used(network):
    requests = [maps(images(1, seed)) for seed in range(4)]
    with Session(network, cache_bytes=0) as none:
        size = bytes_of(none.get(requests[0]))
        assert none.get(requests[0]) is not none.get(requests[0])
    with Session(network, cache_bytes=2 * size) as two:
        first, second = two.get(requests[0]), two.get(requests[1])
        assert two.get(requests[0]) is first
        two.get(requests[2])  # second goes
        assert two.get(requests[0]) is first
        assert two.get(requests[1]) is not second
    with Session(network, cache_bytes=3 * size - 1) as less:
        kept, large = less.get(requests[0]), less.get(maps(images(3)))
        assert less.get(maps(images(3))) is not large
        assert less.get(requests[0]) is kept  # nothing had to go for what is too large


def test_changed_weights_have_answers_of_their_own(session, network):
    request = maps(images(1), target=1)
    before = session.get(request)
    multiply(network, -2)
    after = session.get(request)
    assert_same(after, convscope.heatmap(network, images(1), target=1))
    assert not np.array_equal(after.maps, before.maps)
    multiply(network, -0.5)
    assert session.get(request) is before


@pytest.mark.slow(reason="a request has to run while its network changes")
def test_what_changed_while_it_was_computed_is_not_kept(session, network, runtime):
    if runtime == "keras":
        pytest.skip("of Keras the weights of a request are those of its beginning")
    request = an_ascent(runtime, steps=3)
    direct = request.run(network)
    changed = []

    def progress(*event):
        if not changed:
            changed.append(multiply(network, 4))

    mixed = session.get(request, progress=progress)
    multiply(network, 0.25)
    again = session.get(request)
    assert again is not mixed
    assert_same(again, direct)


def test_weights_that_are_promised_not_to_change_answer_at_once(network, runtime):
    with Session(network, unchanging=True) as session:
        first = session.get(maps(images(1)))
        hold, running = held(session, runtime)
        waiting = session.submit(maps(images(1, 1)), kind="hover")
        handle = session.submit(maps(images(1)), kind="hover")  # while another one runs
        assert handle.done()
        assert handle.result() is first
        assert isinstance(waiting.exception(), RequestReplaced)
        hold.go.set()
        running.result(PATIENCE)


def test_a_session_of_a_file_promises_it(tmp_path):
    pytest.importorskip("keras")
    from convscope.demo import CLASSES, MODEL, PHOTOS

    with Session(MODEL, classes=CLASSES) as session:
        first = session.get(maps(PHOTOS[0], target="cat"))
        handle = session.submit(maps(PHOTOS[0], target="cat"))
        assert handle.done()
        assert handle.result() is first


# -- requests --------------------------------------------------------------------------------------------


def test_requests_are_values():
    one = images(1)[0]
    assert maps(one) == maps([one]) == maps(one.copy())
    assert hash(maps(one)) == hash(maps([one]))
    assert maps(one) != maps(one, seed=1)
    assert Request.of("filters", "a", iter([1, 2])) == Request.of("filters", layer="a", channels=[1, 2])
    assert Request.of("filters", "a", range(2)).by_value


@pytest.mark.parametrize(
    ("technique", "arguments", "said"),
    [
        ("heatmaps", {}, "did you mean 'heatmap'"),
        ("filters", {"layers": "a"}, "layers"),
        ("heatmap", {}, "images"),
        ("filters", {"progress": print}, "progress"),
        ("filters", {"network": None}, "network"),
    ],
)
def test_what_no_technique_takes_is_refused(technique, arguments, said):
    with pytest.raises(UsageError, match=said):
        Request.of(technique, **arguments)


# -- the end ---------------------------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("session of")]


def ended():
    deadline = time.monotonic() + PATIENCE
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


def test_closing_cancels_all(network, runtime):
    hold = Held()
    hold.go.set()
    with Session(network) as session:
        running = session.submit(an_ascent(runtime), progress=hold)
        waiting = [session.submit(maps(images(1, seed))) for seed in range(3)]
        assert hold.came.wait(PATIENCE)
    assert session.closed
    for handle in (running, *waiting):
        with pytest.raises(RequestCancelled):
            handle.result(PATIENCE)
    assert ended()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.submit(maps(images(1)))
    with pytest.raises(UsageError, match="cache_bytes"):
        Session(network, cache_bytes=-1)


def test_a_session_that_nobody_uses_ends(network):
    session = Session(network)
    handle = session.submit(maps(images(1)))
    del session
    gc.collect()
    handle.result(PATIENCE)  # somebody waited for it
    del handle
    gc.collect()
    assert ended()


BODY = """
import sys, threading, convscope
sys.path.insert(0, {tests!r})
from runtimes_at_hand import *
session = convscope.Session(opened({runtime!r}))
request = convscope.Request.of("filters", LAYERS[{runtime!r}][0], channels=[0], steps=10**7)
began = threading.Event()
def progress(*event):
    began.set()
"""
NOT_CLOSED = "handle = session.submit(request, progress=progress)\nbegan.wait()\nprint('left')"
INTERRUPTED = """
import os, signal
threading.Thread(target=lambda: (began.wait(), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
try:
    session.get(request, progress=progress)
except KeyboardInterrupt:
    print('interrupted')
session.get(convscope.Request.of("heatmap", images(1)))
print('left')
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("ending", "said"), [(NOT_CLOSED, ["left"]), (INTERRUPTED, ["interrupted", "left"])])
@pytest.mark.slow(reason="a process that imports a framework")
def test_a_process_ends_though_a_session_is_not_closed(runtime, ending, said):
    code = BODY.format(tests=os.path.dirname(__file__), runtime=runtime) + ending
    before = signal.getsignal(signal.SIGINT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert (done.returncode, done.stdout.split()) == (0, said), done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="the demo's network needs Keras")
@pytest.mark.slow(reason="the examples of a session run every technique")
def test_the_examples():
    found = doctest.testmod(module)
    assert found.attempted > 30
    assert not found.failed
