"""Activations: the numbers against slow loops, groups under a limit of memory against one pass."""

import json
import weakref

import numpy as np
import pytest

keras = pytest.importorskip("keras")
import models  # noqa: E402
from keras import layers  # noqa: E402
from PIL import Image  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.errors import ImageError, UsageError  # noqa: E402
from convscope.events import ItemFinished  # noqa: E402
from convscope.images.image import InputImage  # noqa: E402
from convscope.images.source import stream  # noqa: E402
from convscope.render import activations as views  # noqa: E402
from convscope.store import Folder  # noqa: E402
from convscope.techniques.activations import _plan, iter_activations, memory_bytes  # noqa: E402


def silent_network():
    """A linear convolution, its norm and its ReLU, with channels that never answer."""
    model = keras.Sequential(
        [
            layers.Input((14, 18, 3)),
            layers.Conv2D(7, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.MaxPooling2D(name="pool"),
            layers.Conv2D(3, 3, name="last"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax", name="out"),
        ]
    )
    models.seeded(model)
    kernel, bias = model.get_layer("conv").get_weights()
    bias[[1, 4]] = -1e3
    model.get_layer("conv").set_weights([kernel, bias])
    return model


def counted(maps):
    """Share of zeros and number of channels that are zero everywhere, cell by cell."""
    height, width, channels = maps.shape
    zeros, empty = 0, 0
    for k in range(channels):
        here = sum(maps[i, j, k] == 0 for i in range(height) for j in range(width))
        zeros += here
        empty += here == height * width
    return zeros / maps.size, empty


def test_zeros_are_counted_after_the_non_linearity(photo):
    network = open_model(silent_network(), preprocess="0..1")
    result = convscope.activations(network, [photo, photo[:, ::-1].copy()], "conv|pool|relu")
    for index in range(2):
        share, empty = counted(result["relu"][index])
        for path in ("conv", "relu"):
            row = result.row(path, index)
            assert row.zeros == pytest.approx(share)
            assert row.empty_channels == empty >= 2
            assert row.counted_at == "relu"
        pooled = result.row("pool", index)
        assert (pooled.zeros, pooled.empty_channels) == pytest.approx(counted(result["pool"][index]))
        last = result.row("last", index)
        assert (last.zeros, last.empty_channels, last.counted_at) == (None, None, None)
        assert (result["conv"][index] != 0).all()


def test_numbers_are_those_of_the_arrays(photo):
    result = convscope.activations(open_model(silent_network()), photo)
    for row in result.statistics:
        assert row.mean == pytest.approx(float(result[row.layer][0].mean()), rel=1e-5)
        assert row.max == float(result[row.layer][0].max())
        assert row.shape == result[row.layer].shape[1:]


def test_the_head_is_shown_as_it_is(photo):
    result = convscope.activations(open_model(silent_network()), photo, "out")
    assert result["out"].sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("memory", [1, 3000, 8000, 20000])
def test_groups_under_a_limit_give_what_one_pass_gives(photo, memory, tmp_path):
    network = open_model(silent_network())
    photos = [np.roll(photo, shift, axis=0) for shift in range(5)]
    whole = convscope.activations(network, photos, "all")
    parts = convscope.activations(network, photos, "all", memory=memory, scratch=tmp_path)
    for path in whole.arrays:
        assert isinstance(parts.arrays[path], np.memmap)
        np.testing.assert_allclose(parts.arrays[path], whole.arrays[path], rtol=1e-4, atol=1e-6)
    assert [row.layer for row in parts.statistics] == [row.layer for row in whole.statistics]
    for one, other in zip(parts.statistics, whole.statistics, strict=True):
        assert one.zeros == pytest.approx(other.zeros, abs=1e-6)
        assert one.empty_channels == other.empty_channels


def test_each_group_is_written_before_the_next(photo, tmp_path):
    network = open_model(silent_network())
    seen = []

    def progress(event):
        if isinstance(event, ItemFinished):
            return
        files = [path for path in tmp_path.rglob("*.npy") if np.load(path).any()]
        seen.append((event.done, len(files)))

    convscope.activations(network, photo, "conv|pool|relu|norm", memory=1, scratch=tmp_path, progress=progress)
    assert [files for _, files in seen] == list(range(6))


def test_no_group_exceeds_the_limit():
    network = open_model(silent_network())
    sizes = {layer.path: 4 * int(np.prod(layer.shape)) for layer in network.layers}
    for limit in (1, 5000, 9000, 30000):
        plan = _plan(network.layers, 40, limit)
        assert [layer for group in plan.groups for layer in group] == list(network.layers)
        for group in plan.groups:
            used = sum(sizes[layer.path] for layer in group) * plan.at_once
            assert used <= limit or (len(group) == 1 and plan.at_once == 1)


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 KiB", 1536), (77, 77), ("500m", 5 * 10**8)])
def test_memory_in_bytes(text, size):
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "3 parsec"])
def test_memory_that_is_not_understood(text):
    with pytest.raises(UsageError):
        memory_bytes(text)


@pytest.mark.parametrize("channels", [1, 3, 17, 300])
def test_every_channel_is_drawn(photo, channels):
    model = keras.Sequential(
        [
            layers.Input((12, 12, 3)),
            layers.Conv2D(channels, 3, name="conv"),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    result = convscope.activations(open_model(models.seeded(model)), photo)
    for shared in (False, True):
        whole = views.sheet(result, "conv", shared=shared)
        for channel in (0, channels - 1):
            changed = {**result.arrays, "conv": result["conv"].copy()}
            changed["conv"][..., channel] = changed["conv"][:, ::-1, ::-1, channel]
            other = views.sheet(type(result)(**{**vars(result), "arrays": changed}), "conv", shared=shared)
            assert other.shape == whole.shape
            assert (other != whole).any()


def test_one_channel(photo):
    result = convscope.activations(open_model(silent_network()), photo)
    np.testing.assert_array_equal(result.channel("conv", 5), result["conv"][0, :, :, 5])
    with pytest.raises(UsageError, match="0 to 6"):
        result.channel("conv", 7)


def test_selection_is_by_kind_glob_and_place(photo):
    network = open_model(silent_network())
    assert [layer.path for layer in network.select()] == ["conv", "pool", "last"]
    assert [layer.path for layer in network.select(":2")] == ["conv", "norm"]
    assert [layer.path for layer in network.select("conv:1:")] == ["last"]
    assert [layer.path for layer in network.select("?o*|dense")] == ["conv", "norm", "pool", "out"]
    with pytest.raises(UsageError, match="'relu'"):
        network.select("reluu")


def test_a_result_is_saved_and_loaded_whole(photo, tmp_path):
    result = convscope.activations(open_model(silent_network()), [photo, photo[::-1].copy()])
    files = convscope.save(result, tmp_path)
    again = convscope.load(tmp_path)
    assert all((tmp_path / file).exists() for file in files)
    assert (again.statistics, again.layers, again.provenance) == (
        result.statistics,
        result.layers,
        result.provenance,
    )
    for path, array in result.arrays.items():
        np.testing.assert_array_equal(again[path], array)
    np.testing.assert_array_equal(views.sheet(again, "conv", 1), views.sheet(result, "conv", 1))


def test_layers_without_maps_keep_their_numbers(photo, tmp_path):
    model = keras.Sequential(
        [
            layers.Input((14, 14, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.Reshape((48, 12), name="rows"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    result = convscope.activations(open_model(models.seeded(model)), photo, "all")
    convscope.save(result, tmp_path)
    entries = {
        entry["layer"]: entry
        for entry in json.loads((tmp_path / "activations.json").read_text(encoding="utf-8"))["activations"]
    }
    assert entries["rows"]["file"] is None
    assert entries["rows"]["shape"] == [48, 12]
    assert entries["conv"]["file"]
    with pytest.raises(UsageError, match="no maps to draw"):
        views.sheet(result, "rows")


def test_results_share_a_folder_without_mixing(photo, tmp_path):
    folder = Folder(tmp_path)
    network = open_model(silent_network())
    first = convscope.save(convscope.heatmap(network, photo), folder)
    second = convscope.save(convscope.heatmap(network, photo), folder)
    assert not set(first) & set(second)
    assert json.loads((tmp_path / "heatmaps-2.json").read_text(encoding="utf-8"))["files"] == second


# -- streams -------------------------------------------------------------------------------------------------


class Photos:
    """A source of a user's own."""

    def __init__(self, photo, count):
        self.photo, self.count = photo, count

    def images(self, shape=None):
        for shift in range(self.count):
            yield InputImage(f"shifted-{shift}", np.roll(self.photo, shift, axis=0))


@pytest.mark.parametrize("memory", ["2GB", 8000])
def test_items_are_what_the_collecting_function_collects(photo, memory):
    network = open_model(silent_network())
    source = Photos(photo, 7)
    whole = convscope.activations(network, [image.pixels for image in source.images()], "conv|pool|relu")
    items = list(iter_activations(network, source, "conv|pool|relu", memory=memory, batch=3))
    assert [(item.number, item.layer.path) for item in items if memory == "2GB"] in (
        [],
        [(number, layer.path) for number in range(7) for layer in whole.layers],
    )
    assert len(items) == 7 * len(whole.layers)
    for item in items:
        assert item.image.name == f"shifted-{item.number}"
        np.testing.assert_allclose(item.array, whole[item.layer.path][item.number], rtol=1e-4, atol=1e-6)
        row = whole.row(item.layer.path, item.number)
        assert (item.row.zeros, item.row.empty_channels) == (row.zeros, row.empty_channels)


def test_a_data_set_passes_through_without_being_held(photo):
    network = open_model(silent_network())
    alive, most = weakref.WeakSet(), 0
    for item in iter_activations(network, Photos(photo, 60), "conv", batch=4):
        alive.add(item.image)
        most = max(most, len(alive))
    assert most <= 2 * 4


def test_what_a_source_leaves_out_is_named(photo, tmp_path):
    for name in ("a", "b", "c"):
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    network, source = open_model(silent_network()), convscope.image_source(tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 3 images can't be read and are left out:\n  - b: "):
        assert [item.image.name for item in iter_activations(network, source, "last")] == ["a", "c"]
    for technique in (convscope.activations, convscope.heatmap):
        with pytest.warns(UserWarning, match=r"1 of 3 images"):
            assert [image.name for image in technique(network, source).images] == ["a", "c"]
    with stream(source, 2, network.image_shape) as batches:
        assert len(list(iter_activations(network, batches, "last"))) == 2
    assert [failure.name for failure in batches.failures] == ["b"]
    for name in ("a", "c"):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ImageError, match="none of 3 images"):
        list(iter_activations(network, source, "last"))


def test_a_source_at_the_networks_size_gives_what_its_files_give(photo, tmp_path):
    for shift in range(3):
        Image.fromarray(np.roll(photo, shift, axis=1)).save(tmp_path / f"{shift}.png")
    network = open_model(silent_network())
    whole = convscope.activations(network, tmp_path)
    streamed = convscope.activations(network, convscope.image_source(tmp_path))
    for path, array in whole.arrays.items():
        np.testing.assert_array_equal(streamed[path], array)
    assert streamed.images[0].pixels.shape == (14, 18, 3)
