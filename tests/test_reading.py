"""Small files of the user's: class names and arrays to feed. Each is read, or refused with one clear reason."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zipfile

import numpy as np
import pytest
from expecting import raises

from convscope import limits, reading
from convscope.errors import Unreadable, UsageError
from convscope.networks import read_class_names

pytestmark = pytest.mark.without_keras

pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")


# -- class names -----------------------------------------------------------------------------------------


def refused(path, code: str, what: str | bytes | None = None) -> str:
    if what is not None:
        path.write_bytes(what if isinstance(what, bytes) else what.encode("utf-8", "surrogatepass"))
    with raises(UsageError, code, path=str(path)) as error:
        read_class_names(path)
    message = str(error.value)
    assert str(path) in message
    assert "Expected" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [
        ("[" * 100_000, "input-too-large", "levels"),
        ('{"a":' * 100_000, "input-too-large", "levels"),
        ("[" * 100_000 + "]" * 100_000, "input-too-large", "levels"),
        ("[NaN]", "class-names-invalid", "NaN"),
        ("[Infinity, 1]", "class-names-invalid", "Infinity"),
        ("[1.5]", "class-names-invalid", "text"),
        ("[null]", "class-names-invalid", "text"),
        ("[true]", "class-names-invalid", "text"),
        ('["a", {}]', "class-names-invalid", "text"),
        ('["a", []]', "class-names-invalid", "text"),
        ('["a", ["n1", null]]', "class-names-invalid", "text"),
        ('{"0": {"name": "a"}}', "class-names-invalid", "text"),
        ('{"cat": true, "dog": false}', "class-names-invalid", "no number 0"),
        ('{"0": "a", "0": "b"}', "class-names-invalid", "'0' is there twice"),
        ('{"cat": 0, "dog": 0}', "class-names-invalid", "twice"),
        ('{"0": "a", "01": "b"}', "class-names-invalid", "no number 1"),
        ("[]", "class-names-invalid", "none"),
        ("{}", "class-names-invalid", "none"),
        ("", "class-names-invalid", "empty"),
        (" \n\n", "class-names-invalid", "empty"),
        ("[1, " + "9" * 5000 + "]", "class-names-invalid", "no JSON"),
        (b"cat\0dog", "not-text", "zero bytes"),
        (b"\x89PNG\r\n\x1a\n", "not-text", "not UTF-8"),
        ("cat\n".encode("utf-16"), "not-text", "UTF-16"),
        ("caf\xe9".encode("latin-1"), "not-text", "not UTF-8"),
        (b"\xed\xa0\x80", "not-text", "not UTF-8"),
        ("[" + "0," * 300_000 + "0]", "input-too-large", "CONVSCOPE_LIMITS=entries="),
        ("a\n" * 300_000, "input-too-large", "CONVSCOPE_LIMITS=entries="),
    ],
)
def test_class_names_that_are_none(tmp_path, content, code, reason):
    assert reason in refused(tmp_path / "names", code, content)


def test_class_names_from_large_and_from_endless_files(tmp_path):
    with limits.using(text=100):
        assert "CONVSCOPE_LIMITS=text=500" in refused(tmp_path / "names", "input-too-large", "cat\n" * 50)
        assert read_class_names(tmp_path / "names") if (tmp_path / "names").write_text("cat\n" * 25) else False
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    assert "1024GiB" in refused(tmp_path / "huge", "input-too-large")


@pipes
def test_class_names_from_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "a device or a pipe" in refused(tmp_path / "fifo", "no-regular-file")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    assert "a device or a pipe" in refused(tmp_path / "link", "no-regular-file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "a device or a pipe" in refused(tmp_path / "zero", "no-regular-file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "can't be read" in refused(tmp_path / "loop", "file-unreadable")


def test_class_names_as_people_have_them(tmp_path):
    path = tmp_path / "names"
    path.write_text(json.dumps({str(n): [f"n{n:08}", f"thing, {n}"] for n in range(21_843)}))
    assert len(read_class_names(path)) == 21_843
    path.write_text('["crane", "crane", "caf\\u00e9", 7]')  # ImageNet has two cranes
    assert read_class_names(path) == ("crane", "crane", "café", "7")
    path.write_bytes(b"cat\rdog\r\nsea lion\x0bof the sea\n")
    assert read_class_names(path) == ("cat", "dog", "sea lion\x0bof the sea")
    assert read_class_names({"cat": 1, "dog": 0}) == ("dog", "cat")
    assert read_class_names({0: "cat", 1: "dog"}) == ("cat", "dog")
    for wrong in (3, {"cat": 2}):
        with raises(UsageError, "class-names-invalid", match="class names are not understood"):
            read_class_names(wrong)


# -- arrays ----------------------------------------------------------------------------------------------


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def header(text: str, body: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + body


def declared(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name + ".npy", data)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["f4", ">f8", "f2", "u1", "i8", "?"])
@pytest.mark.parametrize("shape", [(), (1, 0, 3), (1, 5), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, dtype, shape, order):
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype, order=order)
    for content in (npy(array), npz(x=npy(array))):
        (tmp_path / "a").write_bytes(content)
        back = reading.array_of(str(tmp_path / "a"))
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)


WHOLE = npy(np.zeros((1, 40), np.float32))
RANDOM = npz(a=npy(np.random.default_rng(0).random(999)))
BAD_ARRAYS = {
    "empty": (b"", "not-an-array", "no .npy"),
    "text": (b"1 2 3", "not-an-array", "no .npy"),
    "objects": (npy(np.array([{}], object), allow_pickle=True), "not-numbers", "objects"),
    "pickle": (b"\x80\x04K\x01.", "not-an-array", "no .npy"),
    "table": (npy(np.zeros(3, [("a", "f4"), ("b", "i4")])), "not-numbers", "table"),
    "text in it": (npy(np.array(["cat"])), "not-numbers", "not real numbers"),
    "times": (npy(np.array(["2020"], "M8[Y]")), "not-numbers", "not real numbers"),
    "complex": (npy(np.zeros(3, complex)), "not-numbers", "not real numbers"),
    "32 GiB": (header(declared("'<f4'", "(1, 8589934592)")), "input-too-large", "CONVSCOPE_LIMITS=file="),
    "beyond 64 bits": (header(declared("'<f4'", f"({2**40}, {2**40})")), "input-too-large", "CONVSCOPE_LIMITS=file="),
    "more than there is": (header(declared("'<f4'", "(1, 100)"), bytes(399)), "file-damaged", "cut short"),
    "cut short": (WHOLE[:-1], "file-damaged", "cut short"),
    "cut in its header": (WHOLE[:50], "file-damaged", "damaged"),
    "cut before its header": (WHOLE[:7], "file-damaged", "damaged"),
    "negative": (header(declared("'<f4'", "(-1, 4)"), bytes(16)), "not-an-array", "shape"),
    "no shape": (header(declared("'<f4'", "'x'")), "not-an-array", "shape"),
    "true shape": (header(declared("'<f4'", "(True,)"), bytes(4)), "not-an-array", "shape"),
    "many axes": (header(declared("'<f4'", str((1,) * 65)), bytes(4)), "not-an-array", "shape"),
    "no type": (header(declared("'nonsense'", "(1,)"), bytes(4)), "file-damaged", "damaged"),
    "a type of many": (header(declared("'(1000000,)f4'", "(1,)"), bytes(4)), "not-numbers", "not real numbers"),
    "an expression": (
        header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,)}"),
        "file-damaged",
        "damaged",
    ),
    "a list": (header("[1, 2]"), "not-an-array", "header"),
    "another entry": (header("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,), 'x': 1}"), "not-an-array", "header"),
    "a long header": (header(declared("'<f4'", "(1,)") + " " * 20_000, version=2), "not-an-array", "header"),
    "a deep header": (header("(" * 5000), "file-damaged", "damaged"),
    "two arrays": (npz(a=WHOLE, b=WHOLE), "not-an-array", "2 arrays"),
    "no array": (npz(), "not-an-array", "no .npy"),
    "text in a zip": (npz(a=b"hello"), "not-an-array", "no .npy"),
    "half a zip": (RANDOM[:-300], "file-damaged", "damaged"),
    "a damaged zip": (RANDOM.replace(b"PK\x05\x06", b"PK\x05\x07"), "file-damaged", "damaged"),
    "a damaged member": (RANDOM[:4000] + bytes([RANDOM[4000] ^ 1]) + RANDOM[4001:], "file-damaged", "damaged"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_refused(tmp_path, name):
    content, code, reason = BAD_ARRAYS[name]
    (tmp_path / "a.npy").write_bytes(content)
    with raises(Unreadable, code) as error:
        reading.array_of(str(tmp_path / "a.npy"))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bomb_of_an_array_is_not_unpacked(tmp_path):
    bomb = header(declared("'<f4'", f"(1, {2**28})"))
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as member,
    ):
        member.write(bomb)
        for _ in range(64):
            member.write(bytes(2**20))
    with (
        limits.using(file=2**24),
        raises(Unreadable, "input-too-large", limit="file", match="CONVSCOPE_LIMITS=file=80MiB"),
    ):
        reading.array_of(str(tmp_path / "a.npz"))


def test_zips_that_can_not_be_unpacked(tmp_path):
    content = bytearray(npz(a=WHOLE))
    for place, value, reason in ((6, 1, "damaged"), (8, 99, "damaged")):  # encrypted; an unknown way of packing
        changed = bytearray(content)
        changed[place] = value
        changed[changed.rindex(b"PK\x01\x02") + place + 2] = value
        (tmp_path / "a.npz").write_bytes(changed)
        with raises(Unreadable, "file-damaged", match=reason):
            reading.array_of(str(tmp_path / "a.npz"))


@pipes
def test_arrays_from_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with raises(Unreadable, "no-regular-file"):
        reading.array_of(str(tmp_path / "a.npy"))
    with raises(Unreadable, "is-folder"):
        reading.array_of(str(tmp_path))
    for missing, code in (("nowhere.npy", "file-missing"), ("", "is-folder"), ("a\0b", "file-unreadable")):
        with raises(Unreadable, code):
            reading.array_of(str(tmp_path / missing))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_files_that_tell_no_size():
    assert reading.text_of("/proc/self/status").startswith("Name:")


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_depth_is_that_of_the_definition(levels):
    def deep(value):
        return 1 + max(map(deep, value.values() if isinstance(value, dict) else value), default=0) if value != 0 else 0

    for made in ([], {}, [0], {"a": 0}, {"a": [0, {"b": {}}]}, [[[[[[[]]]]]]], [0, {"a": [[0]]}]):
        assert reading.is_deeper(made, levels) == (deep(made) > levels)
    endless = []
    endless.append(endless)
    assert reading.is_deeper(endless, levels)
