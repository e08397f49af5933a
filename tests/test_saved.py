"""Saved results: they come back as they were, and a folder from anybody gives a result or one clear error."""

import json
import os
import shutil

import numpy as np
import pytest
from expecting import raises
from saved_results import HEADERS, MAKERS, header, seeded, stranger

import convscope
from convscope import arrays, limits, render, results, store
from convscope.errors import ConvscopeError, UsageError
from convscope.files import dump

pytestmark = pytest.mark.without_keras

TRIES = 80  # of each kind; 5,000 in a longer run found nothing more


def same(one, two):
    """Two values of results that are equal, arrays by their bytes and NaN like NaN."""
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two, equal_nan=True) and one.dtype == two.dtype
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(same, one, two))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, name), getattr(two, name)) for name in one.__dataclass_fields__)
    return one == two or (one != one and two != two)


def drawn(result):
    """Everything that a result draws."""
    return dict(render.renderings(result)), result._repr_html_(), dump(result.to_json())


@pytest.fixture(scope="module", params=MAKERS)
def kept(request, tmp_path_factory):
    """A kind, and a folder with a result of it."""
    folder = tmp_path_factory.mktemp("kept") / request.param
    convscope.save(MAKERS[request.param](), folder)
    return request.param, folder


def test_a_result_comes_back_as_it_was(kept):
    kind, folder = kept
    again = convscope.load(folder)
    assert same(MAKERS[kind](), again)
    assert same(again, convscope.load(folder / f"{kind}.json"))
    assert same(again, convscope.load(folder, kind=again.kind))


def test_a_result_that_was_loaded_is_saved_with_the_same_bytes(kept, tmp_path):
    _, folder = kept
    names = convscope.save(convscope.load(folder), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == {
        name: (folder / name).read_bytes() for name in names
    }


def test_a_folder_from_a_stranger_gives_a_result_or_one_clear_error(kept, tmp_path):
    kind, folder = kept
    outside = tmp_path / "secret.npy"
    np.save(outside, np.zeros((3, 4), np.float32))
    said = []
    for number in range(TRIES):
        rng, place = seeded(kind, number), tmp_path / "folder"
        shutil.copytree(folder, place)
        stranger(place, f"{kind}.json", rng, outside)
        try:
            result = convscope.load(place)
        except ConvscopeError as error:
            said.append(str(error))
        else:
            drawn(result)
        shutil.rmtree(place)
    assert len(said) > TRIES / 3  # what draws nothing of its own may be changed
    assert all("\n" not in text and len(text) < 2000 for text in said)


NAMES = (
    "../cat.png", "/etc/passwd", "photos/../photos/cat.png", "photos//cat.png", "photos\\cat.png", "C:cat.png",
    "./cat.png", "photos/.hidden.png", "photos/a\0.png", "photos/a\n.png", "photos/nul.png", "photos/..png",
    "photos/cat.jpg", "cat.png", "photos/\u202ecat.png", "photos/" + "x" * 300 + ".png", "", "photos/", "~/cat.png",
    "arrays/cat.png", "photos/sub/cat.png",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_names_are_followed(tmp_path, name):
    convscope.save(MAKERS["heatmaps"](), tmp_path)
    file = tmp_path / "heatmaps.json"
    report = json.loads(file.read_text())
    report["photos"][0]["file"] = name
    file.write_text(json.dumps(report))
    with pytest.raises(ConvscopeError, match=r"expected .* at photos\[0\]\.file, found"):
        convscope.load(tmp_path)


@pytest.mark.parametrize("make", ["link", "link to a device", "pipe", "folder", "linked folder"])
@pytest.mark.parametrize("name", ["photos/cat.png", "cat.npy", "heatmaps.json"])
def test_only_regular_files_inside_of_the_folder_are_read(tmp_path, name, make):
    place, outside = tmp_path / "out", tmp_path / "outside"
    convscope.save(MAKERS["heatmaps"](), place)
    file = place / name
    outside.mkdir()
    shutil.copy(file, outside / file.name)
    file.unlink()
    match make:
        case "link":
            file.symlink_to(outside / file.name)
        case "link to a device":
            file.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "linked folder":
            if "/" not in name:
                pytest.skip("the file is in the folder itself")
            shutil.rmtree(file.parent)
            file.parent.symlink_to(outside)
    with pytest.raises(ConvscopeError, match=r"expected|can't be read"):
        convscope.load(place)


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", HEADERS)
def test_a_header_that_declares_what_is_not_there_is_refused(tmp_path, make):
    file = tmp_path / "a.npy"
    file.write_bytes(make() + bytes(48 if make is not HEADERS[14] else 0))
    with pytest.raises(arrays.NotAnArray):
        arrays.read_npy(file)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "i2", "i4", "i8", "u1", "u2", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("mapped", [False, True])
def test_arrays_that_numpy_writes_are_read(tmp_path, dtype, shape, mapped):
    wanted = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    for array in (wanted, np.asfortranarray(wanted)):
        np.save(tmp_path / "a.npy", array)
        found = arrays.read_npy(tmp_path / "a.npy", mapped=mapped)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_an_array_that_is_a_hole_is_held_against_the_limit(tmp_path):
    file = tmp_path / "a.npy"
    file.write_bytes(header(shape=f"({2**38},)"))
    try:
        os.truncate(file, 128 + 2**40)
    except OSError:
        pytest.skip("the file system has no files of that size")
    with raises(ConvscopeError, "input-too-large", limit="weights", match="weights=8GiB"):
        arrays.read_npy(file)


def test_what_a_folder_holds_is_counted_together(tmp_path):
    convscope.save(MAKERS["heatmaps"](), tmp_path)
    # 96 bytes of maps, 432 of photos.
    with limits.using(weights=500), raises(ConvscopeError, "input-too-large", limit="weights"):
        convscope.load(tmp_path)
    with limits.using(weights=600):
        convscope.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "levels|entries|JSON"),
        ('{"a":' * 150 + "1" + "}" * 150, "100 levels"),
        ('{"heatmaps": [' + "{}," * 300_000 + "{}]}", "entries=200000"),
        ("[" + "1," * 5_000_000 + "1]", "entries=200000"),
        ("", "JSON"),
        ("\xff\xfe", "JSON"),
        ("[]", "an object"),
        ("null", "an object"),
        ('{"schema": 2, "heatmaps": [], "filters": []}', "one entry"),
        ('{"heatmaps": NaN}', "NaN"),
    ],
)
def test_json_that_is_none_or_too_large_is_refused(tmp_path, text, says):
    (tmp_path / "heatmaps.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConvscopeError, match=says):
        convscope.load(tmp_path)


def test_the_limit_of_a_text_is_that_of_the_file(tmp_path):
    convscope.save(MAKERS["heatmaps"](), tmp_path)
    with limits.using(text=1000), raises(ConvscopeError, "input-too-large", limit="text"):
        convscope.load(tmp_path)


def test_a_photo_that_was_written_over_is_noticed(tmp_path):
    """Two commands with one folder, and two photos of one name."""
    convscope.save(MAKERS["heatmaps"](), tmp_path)
    shutil.copy(tmp_path / "photos" / "dog.png", tmp_path / "photos" / "cat.png")
    with raises(ConvscopeError, "result-invalid", found="another one"):
        convscope.load(tmp_path)


# -- several results in a folder -------------------------------------------------------------------------


def test_every_result_of_a_folder_is_found(tmp_path):
    folder = store.Folder(tmp_path)
    for _ in range(2):
        convscope.save(MAKERS["heatmaps"](), folder)
    convscope.save(MAKERS["filters"](), folder)
    names = [path.name for path in store.found(tmp_path)]
    assert names == ["filters.json", "heatmaps.json", "heatmaps-2.json"]
    assert [type(convscope.load(path)).__name__ for path in store.found(tmp_path)] == [
        "Filters",
        "Heatmap",
        "Heatmap",
    ]
    assert same(convscope.load(tmp_path / "heatmaps-2.json"), MAKERS["heatmaps"]())


def test_a_folder_with_several_results_asks_which(tmp_path):
    folder = store.Folder(tmp_path)
    convscope.save(MAKERS["heatmaps"](), folder)
    convscope.save(MAKERS["filters"](), folder)
    with raises(
        UsageError, "result-ambiguous", names=["filters.json", "heatmaps.json"], match=r'kind="filters".*load\('
    ):
        convscope.load(tmp_path)
    assert isinstance(convscope.load(tmp_path, kind="filters"), results.Filters)
    assert isinstance(convscope.load(tmp_path, kind="heatmaps"), results.Heatmap)
    convscope.save(MAKERS["heatmaps"](), folder)
    with raises(UsageError, "result-ambiguous", names=["heatmaps.json", "heatmaps-2.json"]):
        convscope.load(tmp_path, kind="heatmaps")
    with raises(UsageError, "result-kind-unknown", name="filter", match="did you mean 'filters'"):
        convscope.load(tmp_path, kind="filter")
    with raises(UsageError, "result-of-another-kind", found="filters", expected="heatmaps"):
        convscope.load(tmp_path / "filters.json", kind="heatmaps")
    with raises(ConvscopeError, "no-result", expected=["concepts"], match=r"concepts\.json, found filters\.json"):
        convscope.load(tmp_path, kind="concepts")


def test_a_folder_without_a_result_says_what_was_expected(tmp_path):
    with raises(ConvscopeError, "no-result", found=[], match=r"expected a folder with activations\.json or"):
        convscope.load(tmp_path)
    with raises(ConvscopeError, "folder-unreadable", match="No such file"):
        convscope.load(tmp_path / "none")
    with raises(ConvscopeError, "file-unreadable", match="No such file"):
        convscope.load(tmp_path / "none.json")


def test_a_link_that_the_user_names_is_followed(tmp_path):
    convscope.save(MAKERS["heatmaps"](), tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "one.json").symlink_to(tmp_path / "out" / "heatmaps.json")
    assert same(convscope.load(tmp_path / "link"), convscope.load(tmp_path / "one.json"))
