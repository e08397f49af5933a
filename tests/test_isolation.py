"""The reader process: what it returns, and that nothing it is asked can hang, crash or litter the caller.

The functions that it is asked for are those of Python's own library that sleep, abort and allocate.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from convscope import isolation, limits
from convscope.errors import ConvscopeError, UsageError
from convscope.isolation import ReaderError, call

pytestmark = pytest.mark.without_keras

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and processes as POSIX has them")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def failure(*asked: object, **limit: object) -> ReaderError:
    with pytest.raises(ReaderError) as error:
        call(*asked, **limit)
    assert "\n" not in str(error.value)
    return error.value


def child() -> int:
    """The number of the reader process."""
    call("os:getpid")
    return call("os:getpid")


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead; whoever adopted it has not looked yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


# -- what comes back -------------------------------------------------------------------------------------


def test_values_come_back_as_they_were():
    value = {"a": [1, 2.5, None, True, "\ud800ü\n"], "b": {"$": "array", "c": b"\0\xff"}, "": []}
    assert call("copy:copy", value) == value
    assert call("copy:copy", (1, (2,))) == [1, [2]]
    assert np.isnan(call("copy:copy", float("nan")))


@pytest.mark.parametrize("dtype", ["u1", ">u2", "f4", "f8", "?", "i8", "c8", [("a", "i4"), ("b", "f4")]])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 2), (700, 900)])
def test_arrays_come_back_as_they_were(dtype, shape):
    array = np.zeros(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = np.arange(array.nbytes) % 2
    back = call("copy:copy", {"x": [array]})["x"][0]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_an_array_in_another_order():
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)
    np.testing.assert_array_equal(call("copy:copy", array), array)


def test_each_answers_in_order_and_goes_on_after_failures():
    answers = isolation.each("math:sqrt", [[4.0], [-1.0], ["x"], [9.0]])
    assert [answers[0], answers[3]] == [2.0, 3.0]
    assert all(isinstance(answer, ReaderError) for answer in answers[1:3])
    ends = isolation.each("os:_exit", [[3], [4]])
    assert ["status 3" in str(ends[0]), "status 4" in str(ends[1])] == [True, True]
    assert isolation.each("math:sqrt", []) == []


@pytest.mark.parametrize("size", [3_000, 5_000, 70_000, 2**21])
def test_each_with_large_arguments_and_large_answers(size):
    """Both pipes are full: neither side may wait for the other one."""
    many = [[bytes([number]) * (size if number != 3 else 10)] for number in range(8)]
    with limits.using(seconds=20):
        assert isolation.each("copy:copy", many) == [one for (one,) in many]


def test_each_with_large_arguments_goes_on_after_a_crash():
    large = "x" * 100_000
    ends = isolation.each("os:_exit", [[large], [3]])
    assert (ends[0].found, ends[1].kind) == ("TypeError", "crash")
    answers = isolation.each("operator:getitem", [[large, 5], [large, 200_000], [large, 7]])
    assert (answers[0], answers[1].found, answers[2]) == ("x", "IndexError", "x")


def test_limits_are_those_of_the_caller():
    with limits.using(pixels=77):
        assert call("convscope.limits:how_to_raise", "pixels").startswith("limit pixels=77;")
    assert "pixels=178000000" in call("convscope.limits:how_to_raise", "pixels")


def test_modules_are_found_where_the_caller_finds_them(tmp_path, monkeypatch):
    (tmp_path / "of_the_caller.py").write_text("def answer(): return 42")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, Path("no text"), b"nor this"])
    isolation.SHARED_READER.stop()
    assert call("of_the_caller:answer") == 42
    isolation.SHARED_READER.stop()


# -- what goes wrong -------------------------------------------------------------------------------------


def test_a_call_that_takes_too_long():
    started = time.monotonic()
    error = failure("time:sleep", 60, seconds=0.3)
    assert time.monotonic() - started < 10
    assert (error.kind, "CONVSCOPE_LIMITS=seconds=" in str(error)) == ("time", True)
    assert call("math:sqrt", 4.0) == 2.0


@posix
def test_a_library_that_ignores_python(monkeypatch):
    """A loop in C, during which no Python code of the reader runs."""
    error = failure("hashlib:pbkdf2_hmac", "sha256", b"x", b"y", 10**9, seconds=0.3)
    assert error.kind == "time"


@posix
@pytest.mark.parametrize("end", [("os:abort",), ("os:_exit", 0), ("os:_exit", 9), ("signal:raise_signal", 11)])
def test_a_crash(end):
    assert failure(*end).kind == "crash"
    assert call("math:sqrt", 4.0) == 2.0


@posix
def test_a_reader_that_the_system_ends_ran_out_of_memory():
    """Linux ends a process with SIGKILL where the memory runs out, and the reader before others."""
    assert failure("signal:raise_signal", 9).kind == "memory"
    assert call("math:sqrt", 4.0) == 2.0


@linux
def test_memory():
    assert failure("numpy:ones", 10**9, memory=10**8).kind == "memory"
    np.testing.assert_array_equal(call("numpy:arange", 10**6, memory=10**8), np.arange(10**6))
    large = call("numpy:full", 10**8, 7, "u1")  # the limit was that of one call
    assert (large.shape, large.dtype, large.min(), large.max()) == ((10**8,), np.uint8, 7, 7)


def test_errors():
    error = failure("math:sqrt", -1.0)
    assert (error.kind, error.found, str(error)) == ("error", "ValueError", "math domain error")
    assert failure("nowhere:at_all").found == "ModuleNotFoundError"
    assert failure("sys:exit", 3).found == "SystemExit"
    assert failure("threading:Lock").found == "TypeError"  # what it returns can't be sent
    with pytest.raises(UsageError, match="there is no limit 'size'"):
        call("convscope.limits:parse", ["size=3"])


def test_what_it_prints_goes_nowhere(capfd):
    call("builtins:print", "on stdout")
    call("os:system", "echo on stdout; echo on stderr >&2")
    call("os:write", 2, b"on stderr")
    assert capfd.readouterr() == ("", "")


def test_it_reads_nothing_of_the_callers():
    assert call("os:read", 0, 10) == b""


def test_a_reader_that_died_between_two_calls_is_replaced():
    pid = child()
    isolation.SHARED_READER._child.kill()
    isolation.SHARED_READER._child.wait()
    assert child() != pid


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python", "/bin/false"])
def test_no_python_to_start(monkeypatch, executable):
    isolation.SHARED_READER.stop()
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(ConvscopeError, match="can't be started") as error:
        call("math:sqrt", 4.0)
    assert "sys.executable" in str(error.value)
    monkeypatch.undo()
    assert call("math:sqrt", 4.0) == 2.0


# -- living together -------------------------------------------------------------------------------------


def test_nothing_is_imported_for_nothing():
    isolation.SHARED_READER.stop()
    assert call("builtins:eval", "sorted({'numpy', 'PIL'} & set(__import__('sys').modules))") == []
    isolation.SHARED_READER.stop()
    isolation.start("convscope.images.decode")
    assert call("builtins:eval", "'PIL' in __import__('sys').modules")


def test_threads_take_turns():
    answers: dict[int, float] = {}

    def work(number: int) -> None:
        for _ in range(20):
            answers[number] = call("math:sqrt", float(number * number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {number: float(number) for number in range(8)}


@linux
def test_nothing_is_left_over():
    call("math:sqrt", 4.0)
    before = set(os.listdir("/proc/self/fd"))
    for number in range(1000):
        call("math:sqrt", float(number))
    for _ in range(15):
        isolation.each("os:_exit", [[1]])
        call("math:sqrt", 4.0)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    isolation.SHARED_READER.stop()
    mine = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in mine]
    assert "Z" not in states


def script(code: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)


@posix
def test_an_interrupt_ends_the_call_and_the_next_one_works():
    code = (
        "from convscope.isolation import call\n"
        "print(call('os:getpid'), flush=True)\n"
        "try: call('time:sleep', 60)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "print(call('math:sqrt', 4.0))\n"
    )
    process = script(code)
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out.split() == ["interrupted", "2.0"]
    assert gone(pid)


@linux
@pytest.mark.parametrize("doing", ["time.sleep(60)", "call('time:sleep', 60, seconds=0.5)"])
@pytest.mark.slow(reason="the kernel's alarm ends the reader five seconds after the limit")
def test_it_does_not_outlive_the_caller(doing):
    """Idle it sees the end of its input; at work the kernel's alarm ends it, five seconds after the limit (so slow)."""
    process = script(
        f"import time; from convscope.isolation import call; print(call('os:getpid'), flush=True); {doing}"
    )
    pid = int(process.stdout.readline())
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert gone(pid, 8)
    process.stdout.close()


@posix
def test_a_fork_has_a_reader_of_its_own():
    first = child()
    reading, writing = os.pipe()
    forked = os.fork()
    if not forked:
        try:
            os.write(writing, str(child()).encode())
            isolation.SHARED_READER.stop()
        finally:
            os._exit(0)
    os.waitpid(forked, 0)
    other = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    assert other != first == child()


@posix
def test_a_fork_while_another_thread_is_in_a_call():
    thread = threading.Thread(target=call, args=("time:sleep", 1.0))
    thread.start()
    time.sleep(0.2)
    forked = os.fork()
    if not forked:
        signal.alarm(20)  # it must not wait for a lock that nobody will open
        os._exit(0 if call("math:sqrt", 4.0) == 2.0 else 1)
    assert os.waitpid(forked, 0)[1] == 0
    thread.join(20)


def test_systems_without_poll(monkeypatch):
    monkeypatch.delattr(isolation.select, "poll", raising=False)
    assert call("math:sqrt", 4.0) == 2.0
    assert failure("time:sleep", 60, seconds=0.2).kind == "time"
    monkeypatch.delattr(os, "readv", raising=False)
    np.testing.assert_array_equal(call("numpy:arange", 10**6), np.arange(10**6))


def test_limits_inside_do_nothing_in_the_callers_process():
    with isolation.bounded(memory=1, seconds=0.001):
        time.sleep(0.01)
        assert np.ones(10**7).any()
