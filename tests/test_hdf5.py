"""HDF5 files that were made to hang, to fill the memory, or to read what lies elsewhere."""

import contextlib
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from expecting import raises

h5py = pytest.importorskip("h5py")
from h5py import h5d, h5p, h5s, h5t  # noqa: E402

from convscope import limits  # noqa: E402
from convscope.errors import ModelError  # noqa: E402
from convscope.networks.formats import hdf5  # noqa: E402
from convscope.networks.formats.files import kind_of_file  # noqa: E402
from convscope.networks.formats.hdf5 import is_hdf5  # noqa: E402

pytestmark = pytest.mark.without_keras


def test_what_is_written_is_read(tmp_path):
    values = {
        "a/b/kernel:0": np.arange(6, dtype="float32").reshape(2, 3),
        "a/half": np.ones(3, "float16"),
        "count": np.int64(7),
        "flag": np.array([True, False]),
        "none": np.zeros((0, 3)),
    }
    with h5py.File(tmp_path / "some.h5", "w") as file:
        for name, value in values.items():
            file[name] = value
        file["words"] = ["one", "two"]
        file["packed"] = np.zeros(3, [("x", "f4"), ("y", "i2")])
        file["big_endian"] = np.arange(4, dtype=">f4")
        file.create_dataset("zipped", data=np.arange(100.0), compression="gzip", shuffle=True)
        file.attrs["keras_version"] = b"2.1.6"
        file.attrs["own"] = "not Keras'"
        file["a"].attrs["weight_names"] = [b"kernel:0", b"b\xc3\xa9"]
    found = hdf5.read(tmp_path / "some.h5")
    for name, value in values.items():
        np.testing.assert_array_equal(found.datasets[name].array, value)
        assert found.datasets[name].array.dtype == np.asarray(value).dtype
    assert found.groups[""] == {"keras_version": "2.1.6"}
    assert found.groups["a"] == {"weight_names": ["kernel:0", "bé"]}
    assert not found.datasets["words"].numbers
    assert not found.datasets["packed"].numbers
    np.testing.assert_array_equal(found.datasets["big_endian"].array, np.arange(4))
    np.testing.assert_array_equal(found.datasets["zipped"].array, np.arange(100.0))
    assert found.children("a") == ["b", "half"]


def test_a_clean_copy_holds_the_same(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with h5py.File(tmp_path / "some.h5", "w") as file:
        file["layers/conv/vars/0"] = np.arange(6, dtype="float32")
        brain = file.create_dataset("layers/conv/vars/1", data=np.arange(3).astype(ml_dtypes.bfloat16))
        brain.attrs["dtype"] = "bfloat16"
        file["layers/conv"].attrs["name"] = "conv2d_7"
    found = hdf5.read(tmp_path / "some.h5")
    hdf5.write(tmp_path / "clean.h5", found)
    again = hdf5.read(tmp_path / "clean.h5")
    assert again.groups == found.groups
    for name, item in found.datasets.items():
        assert item.numbers
        assert again.datasets[name].bfloat16 == item.bfloat16
        assert again.datasets[name].array.tobytes() == item.array.tobytes()
    np.testing.assert_array_equal(found.datasets["layers/conv/vars/1"].array.astype("float32"), [0, 1, 2])


@pytest.mark.parametrize("size", [512, 2**16, 2**17, 2**20])
def test_one_limit_for_user_blocks(size, tmp_path):
    with h5py.File(tmp_path / "blocked.h5", "w", userblock_size=size) as file:
        file["a"] = np.ones(3)
    assert is_hdf5(tmp_path / "blocked.h5")
    assert kind_of_file(tmp_path / "blocked.h5") == "hdf5"
    assert "a" in hdf5.read(tmp_path / "blocked.h5").datasets


# -- what lies elsewhere ---------------------------------------------------------------------------------


def with_secret(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(np.full(16, 42, "float32").tobytes())
    return secret


def external(file, path, where, shape=(16,)):
    """A data set whose values lie in another file."""
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_external(str(where).encode(), 0, h5p.h5s.UNLIMITED if False else 4 * int(np.prod(shape)))
    h5d.create(file.require_group(path).id, b"values", h5t.IEEE_F32LE, h5s.create_simple(shape), plan)


@pytest.mark.parametrize("path", ["model_weights/conv", "unclaimed", "optimizer_weights", "a/b/c"])
def test_external_values_are_refused_wherever_they_are(path, tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["model_weights/conv/kernel"] = np.ones(3)
        external(file, path, with_secret(tmp_path))
    with pytest.raises(ModelError, match="lies in another file"):
        hdf5.read(tmp_path / "m.h5", but="optimizer_weights")


def test_a_pipe_behind_a_data_set_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        external(file, "unclaimed", tmp_path / "pipe")
    start = time.monotonic()
    with pytest.raises(ModelError, match="lies in another file"):
        hdf5.read(tmp_path / "m.h5")
    assert time.monotonic() - start < 10


def test_virtual_values_are_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.ones(4)
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "a", (4,))
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_virtual_dataset("unclaimed/a", layout)
    with pytest.raises(ModelError, match="lies in another file"):
        hdf5.read(tmp_path / "m.h5")


def test_links_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.ones(4)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["here"] = np.ones(4)
        file["soft"] = h5py.SoftLink("/here")
        file["lost"] = h5py.SoftLink("/nowhere")
        file["out"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "a")
    assert list(hdf5.read(tmp_path / "m.h5").datasets) == ["here"]


def test_references_and_types_are_no_numbers(tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["a"] = np.ones(4)
        file["type"] = np.dtype("f8")
        file.create_dataset("references", (1,), h5py.ref_dtype)[0] = file["a"].ref
        file.create_dataset("lists", (1,), h5py.vlen_dtype("f4"))
        file["nothing"] = h5py.Empty("f4")
    found = hdf5.read(tmp_path / "m.h5").datasets
    assert {name for name, item in found.items() if item.numbers} == {"a"}
    assert all(item.values is None for name, item in found.items() if name != "a")


# -- what never ends, and what is too large --------------------------------------------------------------


def looping(path):
    """A group whose v1 B-tree has itself for a sibling: libhdf5 walks it for ever."""
    with h5py.File(path, "w", libver="earliest") as file:
        for number in range(400):
            file.create_group(f"g{number:03d}")
    data = bytearray(path.read_bytes())
    places, start = [], 0
    while (start := data.find(b"TREE", start)) >= 0:
        places.append(start)
        start += 4
    for place in places:
        if data[place + 5] == 0:  # a leaf: its right sibling is itself
            data[place + 16 : place + 24] = place.to_bytes(8, "little")
    path.write_bytes(data)
    return path


def test_a_tree_that_leads_back_to_itself_ends_in_time(tmp_path):
    """What convscope asks for may or may not walk the damaged part; it never waits longer than the limit."""
    start = time.monotonic()
    with limits.using(seconds=3), contextlib.suppress(ModelError):
        hdf5.read(looping(tmp_path / "loop.h5"))
    assert time.monotonic() - start < 10
    with h5py.File(tmp_path / "fine.h5", "w") as file:
        file["a"] = np.ones(3)
    assert "a" in hdf5.read(tmp_path / "fine.h5").datasets


def test_libhdf5_itself_does_not_end_there(tmp_path):
    """The oracle of the test above: without the reader it hangs."""
    path = looping(tmp_path / "loop.h5")
    code = f"import h5py; h5py.File({str(path)!r}).visititems(lambda *item: None)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=4)
    except subprocess.TimeoutExpired:
        return
    pytest.fail(f"it ended with {done.returncode}")


@pytest.mark.parametrize("chunks", [None, (2**20,)])
def test_terabytes_are_declared_and_not_allocated(chunks, tmp_path):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("unclaimed", (2**40,), "f4", chunks=chunks, compression="gzip" if chunks else None)
    with raises(ModelError, "input-too-large", limit="weights", path=str(tmp_path / "bomb.h5"), match="bomb"):
        hdf5.read(tmp_path / "bomb.h5")


def test_gigabytes_that_the_file_can_not_hold(tmp_path):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        for number in range(8):
            file.create_dataset(f"part{number}", (2**27,), "f4", chunks=(2**20,), compression="gzip")
    with raises(ModelError, "file-invalid", found=2**32):
        hdf5.read(tmp_path / "bomb.h5")


def test_entries_and_depth_have_limits(tmp_path):
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for number in range(300):
            file.create_group(f"g{number}")
    with limits.using(entries=200), pytest.raises(ModelError, match="limit entries=200"):
        hdf5.read(tmp_path / "many.h5")
    with h5py.File(tmp_path / "deep.h5", "w") as file:
        file.create_group("/".join("x" * 150))
    with pytest.raises(ModelError, match="limit depth=100"):
        hdf5.read(tmp_path / "deep.h5")
    with h5py.File(tmp_path / "ring.h5", "w") as file:
        file["a/b"] = file["/"]
    with pytest.raises(ModelError, match="limit depth=100"):
        hdf5.read(tmp_path / "ring.h5")


def test_long_texts_have_a_limit(tmp_path):
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file.attrs["model_config"] = "x" * 5000
    with limits.using(text=1000), pytest.raises(ModelError, match="limit text"):
        hdf5.read(tmp_path / "long.h5")


def test_a_filter_that_needs_a_plugin_is_not_loaded(tmp_path):
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_chunk((4,))
    plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    with h5py.File(tmp_path / "m.h5", "w") as file:
        h5d.create(file.id, b"a", h5t.IEEE_F32LE, h5s.create_simple((4,)), plan)
    with pytest.raises(ModelError, match="plugin"):
        hdf5.read(tmp_path / "m.h5")


def test_a_damaged_chunk_is_one_error(tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("a", data=np.arange(1000.0), chunks=(1000,), compression="gzip")
        offset = file["a"].id.get_chunk_info(0).byte_offset
    data = bytearray((tmp_path / "m.h5").read_bytes())
    data[offset : offset + 40] = zlib.compress(b"other")[:5].ljust(40, b"\xff")
    (tmp_path / "m.h5").write_bytes(data)
    with pytest.raises(ModelError, match="truncated or damaged"):
        hdf5.read(tmp_path / "m.h5")
