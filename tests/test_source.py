"""Streams of images: order, batches, labels, failures, and what is alive at a time."""

import difflib
import gc
import itertools
import os
import signal
import threading
import time
import types
import weakref

import expecting
import numpy as np
import pytest
from PIL import Image

from convscope import isolation, limits
from convscope.errors import ImageError, UsageError
from convscope.images.decode import decode_file, read_image
from convscope.images.image import InputImage, fit
from convscope.images.listing import Entry, different
from convscope.images.source import AHEAD, CHUNK, Failure, ImageList, ImageSource, hold, image_source, stream

pytestmark = pytest.mark.without_keras


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def files(folder, count, side=12):
    return [saved(folder / f"{number:03d}.png", noise(side, side, number)) for number in range(count)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "images"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not threads()
    gc.collect()
    assert all(reader._child is None for reader in isolation._READERS if reader is not isolation.SHARED_READER)


# -- what a source is ----------------------------------------------------------------------------------------


class Gradients:
    """A source of a user's own."""

    def images(self, shape=None):
        for level in range(0, 250, 50):
            yield InputImage(f"grey-{level}", np.full((6, 5, 3), level, np.uint8), label="grey")


def test_a_source_of_ones_own():
    assert isinstance(Gradients(), ImageSource)
    own = Gradients()
    assert image_source(own) is own
    with stream(own, 2) as batches:
        found = [[image.name for image in batch.images] for batch in batches]
    assert found == [["grey-0", "grey-50"], ["grey-100", "grey-150"], ["grey-200"]]


def test_a_list_keeps_its_order_and_its_kinds(tmp_path):
    path = saved(tmp_path / "b.png", noise(4, 4))
    source = image_source(
        [path, noise(3, 3), Image.fromarray(noise(2, 2)), tmp_path, InputImage("x", noise(5, 5), label="y")]
    )
    with stream(source, 3) as batches:
        images = [image for batch in batches for image in batch.images]
    assert [image.name for image in images] == ["b", "image", "image-2", "b-2", "x"]
    assert [image.pixels.shape[0] for image in images] == [4, 3, 2, 4, 5]
    assert images[-1].label == "y"
    assert len(source) == 5


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.png", "A.png", "c.PNG", ".hidden.png"):
        saved(tmp_path / name, noise(4, 4), format="PNG")
    source = image_source(tmp_path)
    assert [entry.name for entry in source.entries] == ["A", "b", "c"]
    assert source.labels == ()


def test_folders_of_classes_give_labels(tmp_path):
    for name in ("dog/1.png", "cat/1.png", "cat/2.png", "empty/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("png"):
            saved(tmp_path / name, noise(4, 4))
    source = image_source(tmp_path)
    assert [(entry.name, entry.label) for entry in source.entries] == [
        ("cat/1", "cat"),
        ("cat/2", "cat"),
        ("dog/1", "dog"),
    ]
    assert source.labels == ("cat", "dog")
    with stream(source, 8) as batches:
        assert [image.label for batch in batches for image in batch.images] == ["cat", "cat", "dog"]


def test_a_table_of_paths_and_labels(tmp_path):
    files(tmp_path / "photos", 3)
    table = tmp_path / "list.csv"
    table.write_text('path,label\nphotos/002.png,"tabby, cat"\nphotos/000.png,\n', encoding="utf-8")
    with stream(image_source(table), 8) as batches:
        (batch,) = batches
    assert [(image.name, image.label) for image in batch.images] == [("photos/002", "tabby, cat"), ("photos/000", None)]
    np.testing.assert_array_equal(batch.images[0].pixels, noise(12, 12, 2))


@pytest.mark.parametrize("text", ["", "file\na.png\n", "path,label\n", "path\n\0\n"])
def test_tables_that_are_none(tmp_path, text):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ImageError, match="table"):
        image_source(tmp_path / "list.csv")


@pytest.mark.parametrize("text", ["path,path\na,b\n", "path,label,label\na,b,c\n", "label\nx\n", "path\n,\n"])
def test_a_table_has_its_columns_once(tmp_path, text):
    (tmp_path / "list.csv").write_text(text)
    with expecting.raises(ImageError, "table-invalid", path=str(tmp_path / "list.csv")):
        image_source(tmp_path / "list.csv")


def test_a_table_has_a_limit_of_lines(tmp_path):
    (tmp_path / "list.csv").write_text("label,path\n\ncat,a.png\n\n,b.png\ndog,c.png\nshort\n"[:-6])
    with limits.using(entries=3):
        assert [entry.label for entry in image_source(tmp_path / "list.csv").entries] == ["cat", None, "dog"]
    with limits.using(entries=2), expecting.raises(ImageError, "input-too-large", path=str(tmp_path / "list.csv")):
        image_source(tmp_path / "list.csv")


def test_lines_of_a_table_are_not_made_as_wide_as_its_first_one(tmp_path):
    """Of many columns and many lines the product would have to be filled."""
    columns = ",".join(map(str, range(100_000)))
    (tmp_path / "list.csv").write_text(f"path,{columns}\n" + "a.png\n" * 50_000)
    assert len(image_source(tmp_path / "list.csv").entries) == 50_000


def slowly_different(names):
    """By its definition: a name that was there before gets the first number from 2 on that no name has."""
    seen, found = [], []
    for name in names:
        numbers = [name, *(f"{name}-{number}" for number in range(2, 3 + 2 * len(names)))]
        others = {other.casefold() for other in names}
        free = next(
            one for one in numbers if one.casefold() not in seen and (one == name or one.casefold() not in others)
        )
        seen.append(free.casefold())
        found.append(free)
    return found


def test_names_are_numbered_as_by_their_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = list(rng.choice(["a", "A", "a-2", "A-3", "a-2-2", "ß", "SS", "ss-2", "b"], rng.integers(0, 12)))
        assert different(names) == slowly_different(names)


def test_many_names_of_different_case_take_linear_time():
    """Every spelling of 15 letters: each of them would count from 2 on again."""
    names = ["".join(letters) for letters in itertools.product(*zip("abcdefghijklmno", "ABCDEFGHIJKLMNO", strict=True))]
    found = different(names)
    assert found[:3] == ["abcdefghijklmno", "abcdefghijklmnO-2", "abcdefghijklmNo-3"]
    assert len({name.casefold() for name in found}) == len(names) == 2**15


def test_the_names_of_failures_are_escaped():
    entries = (Entry("nowhere/a.png", "a\x1b[2J\u202eb\r\x07c"), Entry(noise(3, 3), "good"))
    with pytest.warns(UserWarning, match="1 of 2 images") as warned:
        assert len(hold(ImageList(entries), (3, 3, 3))) == 1
    assert str(warned[0].message).replace("\n", "").isprintable()
    with expecting.raises(ImageError, "images-unreadable", count=1) as caught:
        hold(ImageList(entries[:1]), (3, 3, 3))
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_missing_file_is_compared_to_some_names_only(tmp_path, monkeypatch):
    """A table may name as many files that are missing as there are others: their product would take for ever."""
    for number in range(3000):
        (tmp_path / f"{number:05d}.png").touch()
    compared = []
    original = difflib.get_close_matches

    def counted(word, possibilities, *arguments, **options):
        compared.append(len(possibilities))
        return original(word, possibilities, *arguments, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    with expecting.raises(ImageError, "file-missing"):
        decode_file(str(tmp_path / "none.png"), "none.png")
    assert 0 < compared[0] <= 2000


def test_there_has_to_be_something(tmp_path):
    with pytest.raises(ImageError, match="holds none"):
        image_source(tmp_path)
    with pytest.raises(UsageError, match="at least one"):
        image_source([])
    with pytest.raises(UsageError, match="at least 1"):
        stream(Gradients(), 0)


# -- batches -------------------------------------------------------------------------------------------------


def test_batches_are_in_order_and_only_the_last_is_short(tmp_path):
    files(tmp_path, 23)
    source = image_source(tmp_path)
    for _ in range(2):  # as often as asked
        with stream(source, 5, (12, 12, 3)) as batches:
            found = list(batches)
        assert [batch.start for batch in found] == [0, 5, 10, 15, 20]
        assert [len(batch.images) for batch in found] == [5, 5, 5, 5, 3]
        for number, image in enumerate(image for batch in found for image in batch.images):
            np.testing.assert_array_equal(image.pixels, noise(12, 12, number))


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_resized_as_fit_does(tmp_path, channels):
    for side in (9, 40, 300):
        saved(tmp_path / f"{side}.png", noise(side, 2 * side))
    saved(tmp_path / "small.jpg", noise(79, 79), quality=90)  # less than twice DRAFT: decoded whole
    with stream(image_source(tmp_path), 4, (20, 24, channels)) as batches:
        (batch,) = batches
    for image in batch.images:
        assert image.pixels.shape == (20, 24, 3)
        whole = read_image(image.source)
        assert image.sha256 == whole.sha256
        height, width = whole.pixels.shape[:2]
        assert image.notes == (f"resized to 20 x 24 as it was decoded, from {height} x {width}",)
        np.testing.assert_array_equal(fit(image, 20, 24, channels), fit(whole, 20, 24, channels))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_close_to_what_fit_makes(tmp_path, photo, orientation):
    """Decoded at a part of its size: of 255 levels, 1 on the mean and 12 at most (measured: see the assertions)."""
    rng = np.random.default_rng(3)
    waves = sum(
        np.sin(np.linspace(0, f, 900))[:, None] * np.cos(np.linspace(0, g, 1300))[None]
        for f, g in rng.uniform(5, 90, (6, 2))
    )
    pixels = np.clip(128 + 25 * waves[..., None] + rng.normal(0, 12, (900, 1300, 3)), 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "large.jpg", pixels, quality=92, exif=exif)
    with stream(image_source(path), 1, (96, 128, 3)) as batches:
        (batch,) = batches
    exact = fit(read_image(path), 96, 128, 3)
    difference = np.abs(batch.images[0].pixels.astype(np.float32) - exact)
    assert 0 < difference.mean() < 1
    assert difference.max() <= 12


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_what_vanishes_or_is_damaged_is_named_and_the_rest_is_read(tmp_path):
    paths = files(tmp_path, 40)
    paths[1].write_bytes(b"no image")
    source = image_source(tmp_path)
    with stream(source, 4, (12, 12, 3)) as batches:
        first = next(batches)
        paths[37].unlink()
        rest = list(batches)
    assert [image.name for image in first.images] == ["000", "002", "003", "004"]
    assert sum(len(batch.images) for batch in rest) == 34
    assert [(failure.name, failure.source) for failure in batches.failures] == [
        ("001", str(paths[1])),
        ("037", str(paths[37])),
    ]
    assert all(isinstance(failure, Failure) and isinstance(failure.error, ImageError) for failure in batches.failures)


def test_an_error_of_a_source_is_raised_where_it_is_used():
    class Broken:
        def images(self, shape=None):
            yield InputImage("one", noise(3, 3))
            raise ZeroDivisionError("my own")

    with stream(Broken(), 1) as batches:
        assert next(batches).images[0].name == "one"
        with pytest.raises(ZeroDivisionError, match="my own"):
            next(batches)
        assert list(batches) == []


@pytest.mark.parametrize("images", [lambda shape=None: 1 / 0, lambda: iter(()), lambda shape=None: None])
def test_a_source_that_does_not_begin_ends_the_stream(images):
    found = []

    def take():
        with stream(types.SimpleNamespace(images=images), 2) as batches:
            try:
                next(batches)
            except (ZeroDivisionError, TypeError) as error:
                found.append(error)

    taking = threading.Thread(target=take, daemon=True)
    taking.start()
    taking.join(20)
    assert len(found) == 1


def test_the_callers_limits_hold_in_the_thread(tmp_path):
    saved(tmp_path / "a.png", noise(20, 20))
    with limits.using(pixels=100), stream(image_source(tmp_path), 1) as batches:
        assert list(batches) == []
    assert "too large" in str(batches.failures[0].error)


def test_a_stream_can_be_left_at_any_time(tmp_path):
    files(tmp_path, 30)
    with stream(image_source(tmp_path), 2) as batches:
        next(batches)
    assert list(batches) == []
    stream(image_source(tmp_path), 2).close()  # never begun


def test_a_source_that_waits_for_its_reader_is_ended(tmp_path):
    batches = stream(Sleeping(), 1)
    waiting = threading.Thread(target=lambda: list(batches))
    waiting.start()
    time.sleep(1.5)
    begun = time.monotonic()
    batches.close()
    waiting.join(10)
    assert time.monotonic() - begun < 10
    assert not waiting.is_alive()


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_only_a_few_batches_are_alive(kept):
    alive, most = weakref.WeakSet(), [0]

    class Counted:
        def images(self, shape=None):
            for number in range(200):
                image = InputImage(str(number), np.zeros((2, 2, 3), np.uint8))
                alive.add(image)
                most[0] = max(most[0], len(alive))
                yield image
                del image

    keep = []
    with stream(Counted(), 4) as batches:
        for batch in batches:
            keep += [batch] if kept else []
            time.sleep(0.001)
    if kept:  # the measure sees what is held
        assert most[0] == 200
    else:
        assert 4 < most[0] <= (AHEAD + 2) * 4 + CHUNK


# -- Ctrl-C --------------------------------------------------------------------------------------------------


class Sleeping:
    """A source whose reader process does not answer for long."""

    def images(self, shape=None):
        reader = isolation.Reader()
        try:
            reader.each("time:sleep", [(50,)])
        finally:
            reader.stop()
        yield InputImage("late", noise(2, 2))


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_an_interrupt_ends_a_stream_that_waits():
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    batches = stream(Sleeping(), 1)
    begun = time.monotonic()
    timer.start()
    with batches, pytest.raises(KeyboardInterrupt):
        next(batches)
    timer.join()
    assert time.monotonic() - begun < 20


def test_an_interrupt_in_the_loop_ends_the_thread(tmp_path):
    files(tmp_path, 20)

    def interrupted():
        with stream(image_source(tmp_path), 2) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
