"""Files that are no images, addresses, and folders whose images lie deeper: named, with advice that works."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscope.errors import ImageError, UsageError
from convscope.images.decode import read_image, read_images
from convscope.images.source import image_source

pytestmark = pytest.mark.without_keras

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)


def saved(path, pixels=PIXELS):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def image_bytes(kind):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


def zipped(name, content=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        about = tarfile.TarInfo("a.jpg")
        about.size = 3
        archive.addfile(about, io.BytesIO(b"abc"))
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=PIXELS)
    return buffer.getvalue()


def nifti():
    return (struct.pack("<i", 348) + bytes(340) + b"n+1\0").ljust(1000, b"\0")


def box(brand):
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(12)


def riff(kind):
    return b"RIFF" + struct.pack("<I", 100) + kind + bytes(100)


NAMED = {
    "dicom": ("scan.dcm", bytes(128) + b"DICM" + bytes(200), "DICOM", "window"),
    "dicom without preamble": ("scan.dcm", b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "DICOM", "window"),
    "nifti": ("brain.nii", nifti(), "NIfTI", "slice"),
    "nifti, packed": ("brain.nii.gz", gzip.compress(nifti()), "NIfTI", "slice"),
    "nrrd": ("a.nrrd", b"NRRD0004\ntype: short\n", "NRRD", "slice"),
    "fits": ("m31.fits", b"SIMPLE  =                    T".ljust(2880), "FITS", "array"),
    "hdf5": ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5", "first argument"),
    "matlab": ("a.mat", b"MATLAB 5.0 MAT-file", "MATLAB", ".npy"),
    "avi": ("film.avi", riff(b"AVI "), "video (AVI)", "frame"),
    "mp4": ("film.mp4", box(b"isom"), "video (MP4)", "frame"),
    "quicktime": ("film.mov", box(b"qt  "), "QuickTime", "frame"),
    "matroska": ("film.mkv", b"\x1a\x45\xdf\xa3" + bytes(50), "Matroska", "frame"),
    "wav": ("a.wav", riff(b"WAVE"), "sound", "explains images"),
    "psd": ("art.psd", b"8BPS\0\1" + bytes(100), "Photoshop", "export"),
    "xcf": ("art.xcf", b"gimp xcf v011\0", "GIMP", "export"),
    "svg": ("logo.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG", "export"),
    "svgz": ("logo.svgz", gzip.compress(b'<svg xmlns="x"/>'), "SVG", "export"),
    "exr": ("light.exr", b"\x76\x2f\x31\x01" + bytes(50), "OpenEXR", "0..1"),
    "hdr": ("light.hdr", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance", "0..1"),
    "jxl": ("a.jxl", b"\xff\x0a" + bytes(50), "JPEG XL", "convert"),
    "heic": ("a.heic", box(b"heic"), "HEIC", "pillow-heif"),
    "tga": ("a.tga", bytes(2) + b"\2" + bytes(range(1, 100)), "TGA", "convert"),
    "ico": ("a.ico", b"\0\0\1\0\1\0" + bytes(50), "icon", "convert"),
    "cr3": ("a.cr3", box(b"crx "), "RAW photo", "develop"),
    "raf": ("a.raf", b"FUJIFILMCCD-RAW 0201", "RAW photo", "develop"),
    "nef": ("a.nef", image_bytes("TIFF"), "RAW photo (Nikon NEF)", "develop"),
    "zip": ("a.zip", zipped("cat.jpg"), "ZIP archive", "unpack"),
    "tar": ("a.tar", tarred(), "tar archive", "unpack"),
    "tar.gz": ("a.tgz", gzip.compress(tarred()), "tar archive", "unpack"),
    "npz": ("a.npz", npz(), "archive of NumPy arrays", "alone"),
    "pt": ("m.pt", zipped("archive/data.pkl"), "PyTorch file", "first argument"),
    "keras": ("m.keras", zipped("metadata.json"), "Keras model", "first argument"),
    "onnx": ("m.onnx", b"\x08\x07\x12\x07pytorch", "ONNX model", "first argument"),
    "tflite": ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(50), "TensorFlow Lite", "first argument"),
    "safetensors": ("m.safetensors", struct.pack("<Q", 60) + b'{"a":{}}', "safetensors", "first argument"),
    "pickle": ("a.pkl", b"\x80\x04\x95", "pickle", ".npy"),
    "docx": ("a.docx", zipped("[Content_Types].xml"), "Office", "PNG"),
    "json": ("a.json", json.dumps({"a": 1}).encode(), "JSON", "image itself"),
    "csv": ("a.csv.jpg", b"path,label\n", "text", "image itself"),
    "base64": ("a.txt", b"iVBORw0KGgoAAAANSUhEUgAA" * 20, "base64", "b64decode"),
    "apple double": ("cat.jpg", b"\0\5\x16\7\0\2\0\0Mac OS X", "macOS", "other one"),
    "zeros": ("cat.jpg", bytes(5000), "zeros", "download it again"),
    "exe": ("a.exe", b"MZ" + bytes(50), "program", "image itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_a_file_is_named_with_what_to_do(tmp_path, case):
    name, data, what, remedy = NAMED[case]
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, *([] if name.endswith((".nef", ".dcm", ".tga", ".onnx")) else [data])):
        with pytest.raises(ImageError) as error:
            read_image(source)
        message = str(error.value)
        assert error.value.code == "not-an-image"
        assert error.value.data["kind"] != "unknown"
        assert what in message
        assert remedy in message
        assert len(message) < 500


def test_the_preview_of_a_raw_photo_is_not_taken_for_it(tmp_path):
    """A DNG is a TIFF whose first page is a small preview; its version says that it is one."""
    data = bytearray(image_bytes("TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = data[at + 2 : at + 2 + 12 * count] + struct.pack("<HHI4B", 50706, 1, 4, 1, 4, 0, 0)
    struct.pack_into("<I", data, 4, len(data))
    data += struct.pack("<H", count + 1) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(ImageError, match="RAW photo"):
        read_image(tmp_path / "a.tif")


def test_what_messages_advise_opens(tmp_path):
    """An array of a window, a .npy file of one, the bytes that base64 gives, an unpacked archive."""
    window = np.clip((np.arange(-1000, 1000).reshape(40, 50) + 100) / 400, 0, 1)
    np.save(tmp_path / "slice.npy", window)
    for source in (window, tmp_path / "slice.npy", image_bytes("PNG")):
        assert read_image(source).pixels.ndim == 3
    with zipfile.ZipFile(io.BytesIO(zipped("inside/cat.png", image_bytes("PNG")))) as archive:
        archive.extractall(tmp_path)
    assert [image.name for image in read_images(tmp_path / "inside")] == ["cat"]


# -- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/cat.jpg",
        "http://example.org/a.png?x=1",
        "s3://bucket/cat.jpg",
        "gs://b/c.png",
        "HTTPS://A.B/c",
    ],
)
def test_an_address_is_refused_with_the_reason(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (text, Path(text), [text]):
        with pytest.raises(ImageError) as error:
            read_images(source)
        assert error.value.code == "image-is-address"
        assert "does not download" in str(error.value)


def test_the_address_of_a_file_names_its_path(tmp_path):
    path = saved(tmp_path / "cat.png")
    with pytest.raises(ImageError) as error:
        read_image(path.as_uri())
    advised = re.search(r"give the path '([^']+)'", str(error.value))[1]
    assert read_image(advised).name == "cat"


def test_a_text_that_holds_an_image(tmp_path):
    with pytest.raises(ImageError, match="b64decode") as error:
        read_image("data:image/png;base64,iVBORw0KGgo=")
    assert error.value.code == "image-is-address"


def test_an_address_in_a_table_stays_one(tmp_path):
    (tmp_path / "list.csv").write_text("path\nhttps://example.org/cat.jpg\n")
    with pytest.raises(ImageError) as error:
        read_images(tmp_path / "list.csv")
    assert error.value.code == "image-is-address"


def test_a_file_whose_name_looks_like_an_address_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "http:" / "cat.png")
    assert read_image("http:/cat.png").name == "cat"


# -- folders ----------------------------------------------------------------------------------------------------


def test_images_that_lie_deeper_are_counted_and_placed(tmp_path):
    for name in ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/cat/1.png"):
        saved(tmp_path / name)
    for read in (read_images, image_source):
        with pytest.raises(ImageError) as error:
            read(tmp_path)
        message = str(error.value)
        assert error.value.code == "no-images"
        assert error.value.data["deeper"] == 4
        assert "4 images" in message
        for place in ("'test/cat' (1)", "'train/cat' (2)", "'train/dog' (1)"):
            assert place in message
        advised = re.search(r"name the folder '([^']+)'", message)[1]
        assert [image.label for image in read_images(advised)] == ["cat", "cat", "dog"]


def test_many_deep_folders_are_a_short_message(tmp_path):
    for number in range(30):
        saved(tmp_path / f"a/b/{number:02}/x.png")
    with pytest.raises(ImageError, match="27 more folders") as error:
        read_images(tmp_path)
    assert len(str(error.value)) < 600


def test_a_folder_without_any_images_says_so(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.txt").write_text("x")
    with pytest.raises(ImageError, match="neither do the folders inside it") as error:
        read_images(tmp_path)
    assert error.value.data["deeper"] == 0


def test_images_beside_subfolders_with_images_are_read_and_the_others_named(tmp_path):
    for name in ("a.png", "more/b.png", "more/c.png", ".hidden/d.png"):
        saved(tmp_path / name)
    for read in (read_images, image_source):
        with pytest.warns(UserWarning, match=r"2 images in 'more' \(2\) are not read"):
            assert len(list(read(tmp_path))) == 1 if read is read_images else len(read(tmp_path)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [image.name for image in read_images([tmp_path / "more"])] == ["b", "c"]


def test_folders_of_classes_and_tables_are_read_as_sources_are(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        saved(tmp_path / "set" / name)
    (tmp_path / "list.csv").write_text("path,label\nset/dog/1.png,hound\n")
    for given in (tmp_path / "set", str(tmp_path / "list.csv"), [tmp_path / "set", tmp_path / "list.csv"]):
        images, source = read_images(given), image_source(given)
        assert [(image.name, image.label) for image in images] == [
            (entry.name, entry.label) for entry in source.entries
        ]
    assert [image.label for image in images] == ["cat", "dog", "hound"]


def test_arrays_in_a_folder_are_read_where_there_are_no_images(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    assert [image.name for image in read_images(tmp_path)] == ["a"]
    saved(tmp_path / "b.png")
    assert [image.name for image in read_images(tmp_path)] == ["b"]


@pytest.mark.parametrize("given", [7, None, {"a": PIXELS}, [[1.0, 2.0]], object()])
def test_what_is_no_image_at_all_is_one_message_of_its_kind(given):
    with pytest.raises(UsageError) as error:
        read_images(given)
    assert error.value.code == "image-kind"
