"""Files are written whole or not at all: processes that are killed, interrupts, and disks that are full."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved_results import MAKERS

import convscope
from convscope import files, store
from convscope.errors import ConvscopeError
from convscope.store import folder as folder_module
from convscope.techniques import activations as recorded

pytestmark = pytest.mark.without_keras

KILLS = 12
KILLER = """
import os, random, signal, sys, time
import convscope
from pathlib import Path
from saved_results import MAKERS
from test_writing import check_whole

kills, root = int(sys.argv[1]), Path(sys.argv[2])
kinds = {kind: make() for kind, make in MAKERS.items()}
for kind, result in kinds.items():
    convscope.save(result, root / kind)
rng = random.Random(0)
for number in range(kills):
    kind = list(kinds)[number % len(kinds)]
    child = os.fork()
    if not child:
        while True:
            convscope.save(kinds[kind], root / kind)
    time.sleep(rng.uniform(0.01, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check_whole(root / kind)
"""


def start(*arguments, code, **options):
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for saved_results
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}, **options)


def left(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name.endswith(".part")]


def check_whole(folder):
    """Every file under its final name is whole; where there is a JSON, the result can be loaded."""
    for path in folder.rglob("*"):
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    for path in store.found(folder):
        convscope.load(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is of POSIX")
@pytest.mark.slow(reason="many processes are started and killed")
def test_writers_that_are_killed_leave_whole_files(tmp_path):
    with start(KILLS, tmp_path, code=KILLER) as process:
        pass
    assert process.returncode == 0
    for kind, make in MAKERS.items():
        files.remove_leftovers.cache_clear()
        convscope.save(make(), tmp_path / kind)
        assert not left(tmp_path / kind)
        assert [path.stem for path in store.found(tmp_path / kind)] == [kind]
        check_whole(tmp_path / kind)


SLOW = """
import sys
from convscope import files

def write(file):
    print("begun", flush=True)
    sys.stdin.read()
    file.write(b"mine")

files.write_file(sys.argv[1], write)
"""
QUICK = "import sys; from convscope import files; files.write_file(sys.argv[1], b'x')"


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    dead = tmp_path / f".convscope-{'0' * 16}.part"
    other = tmp_path / ".convscope-notes.part"  # not of that form: somebody else's
    for path in (dead, other):
        path.write_bytes(b"half")
    with start(tmp_path / "slow", code=SLOW, stdin=subprocess.PIPE) as slow:
        slow.stdout.readline()
        assert not dead.exists()
        dead.write_bytes(b"half")
        with start(tmp_path / "quick", code=QUICK):
            pass
        assert not dead.exists()
        assert len(left(tmp_path)) == 2  # the slow one's, and somebody else's
        slow.stdin.close()
    assert (tmp_path / "slow").read_bytes() == b"mine"
    assert left(tmp_path) == [other]


def test_an_interrupt_leaves_nothing_half_written(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        files.write_file(tmp_path / "a", interrupted)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


FULL = """
import resource, signal, sys
import convscope
from convscope.errors import ConvscopeError
from saved_results import MAKERS
kind, folder, size = sys.argv[1:]
result = MAKERS[kind]()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
try:
    convscope.save(result, folder)
except ConvscopeError as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "size"), [("heatmaps", 0), ("heatmaps", 170), ("activations", 400)])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(kind, size, tmp_path):
    folder = tmp_path / "out"
    convscope.save(MAKERS[kind](), folder)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with start(kind, folder, size, code=FULL) as process:
        said = process.stdout.read().decode()
    assert process.returncode == 0
    assert "can't be written (File too large): raise the limit" in said
    assert said.count("\n") == 1
    assert not left(folder)
    check_whole(folder)
    if size == 0:  # nothing was replaced, so the earlier result is as it was
        assert whole == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_an_array_says_why_the_disk_refuses_it():
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left") as found:
        folder_module.write_array(file, np.zeros(10**6, np.float32))
    assert found.value.errno == errno.ENOSPC


def test_an_earlier_result_does_not_name_files_of_a_later_one(tmp_path, monkeypatch):
    """The JSON of the earlier result goes before the first of its files is replaced."""
    convscope.save(MAKERS["heatmaps"](), tmp_path)
    convscope.save(MAKERS["filters"](), tmp_path)
    real, calls = folder_module.encode_png, []

    def failing(image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(folder_module, "encode_png", failing)
    with pytest.raises(KeyboardInterrupt):
        convscope.save(MAKERS["heatmaps"](), tmp_path)
    assert [path.name for path in store.found(tmp_path)] == ["filters.json"]


def test_results_of_one_run_keep_each_other(tmp_path):
    folder = store.Folder(tmp_path)
    for kind in ("heatmaps", "heatmaps", "concepts", "activations"):
        convscope.save(MAKERS[kind](), folder)
    names = ["activations.json", "heatmaps.json", "heatmaps-2.json", "concepts.json"]
    assert [path.name for path in store.found(tmp_path)] == names
    check_whole(tmp_path)


def test_the_room_of_mapped_arrays_is_taken_before_they_are_written(tmp_path, monkeypatch):
    """A process that writes to a mapped file when the disk is full is killed by SIGBUS."""
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1000, 1000))
    recorded._reserve(path)
    assert path.stat().st_blocks * 512 >= 4_000_000

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConvscopeError, match="No space left"):
        recorded._reserve(path)


def test_a_long_name_of_a_photo_a_class_and_a_method_can_be_written(tmp_path):
    from dataclasses import replace

    found = MAKERS["heatmaps"]()
    name = "x" * 140
    rows = tuple(replace(row, image=name, class_name=f"class {i} " + "y" * 140) for i, row in enumerate(found.rows))
    photos = tuple(replace(photo, name=name) for photo in found.images)
    origin = replace(found.origin, record={**found.origin.record, "pictures": []})
    found = replace(found, rows=rows, images=photos, origin=origin)
    convscope.save(found, tmp_path)
    assert convscope.load(tmp_path).rows == rows
