"""A short part of the trial, from one seed; `python -m trials --minutes N` is the long one."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
trials = pytest.importorskip("trials", reason="the trial lies beside the package")

from trials import bases, mutations  # noqa: E402
from trials.kinds import Kind, all_kinds, chosen  # noqa: E402
from trials.outcomes import FINDINGS, Place  # noqa: E402
from trials.supervisor import Ended, Process  # noqa: E402

# Seconds in all matter here: how many tries of each kind are made, from seed 7.
COUNTS = {"images": 15, "models": 8, "folders": 8}
KINDS = [kind for kind in all_kinds().values() if kind.group in COUNTS]


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A worker of each runtime, started when it is first asked for."""
    started = {}

    def worker(runtime):
        if runtime not in started:
            made = bases.made({kind.name for kind in KINDS if kind.runtime == runtime})
            started[runtime] = Process(runtime, tmp_path_factory.mktemp(runtime), made)
        return started[runtime]

    yield worker
    for process in started.values():
        process.end()


# slow: a worker imports its framework, and valid files are made with it once.
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.slow(reason="a worker imports its framework, and valid files are made with it once")
def test_no_file_is_answered_with_anything_but_a_network_or_a_clear_error(kind, workers):
    missing = kind.missing()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    for number in range(COUNTS[kind.group]):
        answer = workers(kind.runtime).ask(kind, 7, number)
        assert answer["tried"], answer["findings"]
        assert not any(answer["counts"].get(column) for column in FINDINGS), (
            f"python -m trials --repeat {kind.name}:7:{number}",
            answer["findings"],
        )


# -- the trial itself: what it is to notice, it notices ---------------------------------------------------


def test_a_hang_and_a_crash_are_noticed(tmp_path):
    culprit = Kind("image-png", "images", "plain", "images:generate_png", seconds=0.001)
    process = Process("plain", tmp_path / "a", tmp_path)
    with pytest.raises(Ended) as hung:
        [process.ask(culprit, 0, number) for number in range(1000)]
    assert hung.value.column == "hang"
    process = Process("plain", tmp_path / "b", tmp_path)
    process._child.kill()
    process._child.wait()
    with pytest.raises(Ended) as ended:
        process.ask(all_kinds()["image-png"], 0, 0)
    assert ended.value.column == "other"


def test_what_code_would_do_is_seen(tmp_path):
    """Python's audit hook can't be taken away, so this is looked at in a process of its own."""
    import subprocess

    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (tmp_path / "planted_module.py").touch()
    script = f"""
import json, os, subprocess, sys
from pathlib import Path
from trials.watch import Folder, Watch
sys.path.insert(0, {str(tmp_path)!r})
outside = Path({str(tmp_path / "outside")!r})
watch, folder = Watch((Path("/nonexistent"),)), Folder(outside)
def seen(action):
    with watch.watching():
        try:
            action()
        except Exception:
            pass
    return [len(watch.seen), len(folder.touched())]
print(json.dumps([
    seen(lambda: None),
    seen(lambda: open({str(tmp_path / "written")!r}, "w")),
    seen(lambda: os.system("true")),
    seen(lambda: subprocess.run(["true"])),
    seen(lambda: __import__("planted_module")),
    seen(lambda: open(outside / "secret.txt").read()),
]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    nothing, written, system, started, imported, read = json.loads(done.stdout)
    assert nothing == [0, 0]
    assert all(found[0] for found in (written, system, started, imported))
    if sys.platform == "linux":
        assert read[1] == 1


def test_a_try_is_the_same_every_time(tmp_path):
    from trials import images

    def made(folder):
        folder.mkdir()
        case = images.generate_tiff(Place("image-tiff", 1, 5, folder, tmp_path, tmp_path))
        return case.path.read_bytes(), case.what

    assert made(tmp_path / "a") == made(tmp_path / "b")


def test_archives_are_honest_where_they_are_meant_to_be(tmp_path):
    import io
    import zipfile

    data = mutations.zipped([mutations.stored("a", b"x" * 100, deflated=True), mutations.bomb_entry("b", 3)], align=64)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert [info.file_size for info in archive.infolist()] == [100, 3 << 20]
    assert len(data) < 30_000


@pytest.mark.parametrize("name", ["x" * 10**5, "a/" * 40_000])
def test_a_name_that_an_archive_has_no_room_for_is_cut(name):
    import io
    import zipfile

    data = mutations.zipped([mutations.stored(name, b"a"), mutations.stored("b", b"b")], align=64)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [info.file_size for info in archive.infolist()] == [1, 1]
        assert archive.read("b") == b"b"


def test_what_could_not_be_tried_is_counted_apart():
    from trials.__main__ import listed, table
    from trials.outcomes import NotTried
    from trials.supervisor import Finding, Row
    from trials.worker import failed

    known = all_kinds()
    file, loop = known["keras"], known["loops-open"]
    assert failed(file, ValueError("no room")).counts == {"untried": 1}
    assert failed(file, ValueError("no room")).tried == 0
    assert failed(loop, NotTried("too slow")).counts == {"untried": 1}
    assert failed(loop, ValueError("of convscope")).counts == {"other": 1}
    row = Row(file, tried=3)
    row.counts.update(accepted=3, untried=2)
    assert table([row]).splitlines()[-1].split() == ["keras", "3", "3", *"000000", "2"]
    assert listed([Finding("untried", "keras:0:1", "no room")]).startswith("no findings, 1 not tried")
    assert "untried" not in FINDINGS


@pytest.mark.slow(reason="a loop has to run long enough for its memory to tell")
def test_a_loop_that_keeps_something_grows_and_one_that_lets_go_does_not():
    from trials.loops import repeated
    from trials.outcomes import LOOP_GROWTH

    kept = []
    assert repeated(lambda: kept.append(b"x" * 20_000 + bytes(len(kept))), 600)[1] > 0.8 * 20_000 * 1000
    made, growth = repeated(lambda: [bytearray(size) for size in range(10_000, 400_000, 40_000)], 600)
    assert made == 1000
    assert abs(growth) < LOOP_GROWTH
    assert repeated(lambda: None, 0) == (0, None)


def test_kinds_are_chosen_by_group_and_by_name():
    known = all_kinds()
    assert {kind.group for kind in chosen("images", known)} == {"images"}
    assert [kind.name for kind in chosen("keras,onnx", known)] == ["onnx", "keras"]
    with pytest.raises(ValueError, match="there is no group or kind 'nothing'"):
        chosen("nothing", known)
