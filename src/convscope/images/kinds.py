"""What a file is that holds no image, by its first bytes, and what to do with it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

HEAD = 4096  # bytes of a file that are looked at


@dataclass(frozen=True)
class Kind:
    """A kind of file that is no image which can be read.

    Attributes:
        name: for programs, such as "dicom".
        what: for people, with an article.
        remedy: what to do.
    """

    name: str
    what: str
    remedy: str

    @property
    def text(self) -> str:
        """Kind and remedy, for a message."""
        return f"{self.what}: {self.remedy}"


_EXPORT = "export it as PNG"
_FRAME = "save the frame that you want as PNG"
_DEVELOP = "develop it, and save it as JPEG or PNG"
_WINDOW = "read it with its own library, and give an array, or save it as PNG or .npy"
_MODEL = "give the image here, and the model as the first argument"
_AS_ARRAY = "read it, and save the image in it as PNG or .npy"
_UNPACK = "unpack it, and give the images or their folder"
_CONVERT = "convert it to JPEG or PNG"
_AGAIN = "copy or download it again"

# (place, first bytes, kind): the first that matches.
_MAGIC: tuple[tuple[int, bytes, Kind], ...] = (
    # medical and scientific images
    (128, b"DICM", Kind("dicom", "a DICOM image", f"choose its window, {_WINDOW} (pydicom reads it)")),
    (344, b"n+1\0", Kind("nifti", "a NIfTI volume", f"choose a slice, {_WINDOW} (nibabel reads it)")),
    (344, b"ni1\0", Kind("nifti", "a NIfTI header without its volume", f"choose a slice, {_WINDOW} (nibabel)")),
    (4, b"n+2\0", Kind("nifti", "a NIfTI-2 volume", f"choose a slice, {_WINDOW} (nibabel reads it)")),
    (0, b"NRRD0", Kind("nrrd", "an NRRD volume", f"choose a slice, {_WINDOW} (pynrrd reads it)")),
    (0, b"ObjectType", Kind("metaimage", "a MetaImage volume", f"choose a slice, {_WINDOW} (SimpleITK reads it)")),
    (0, b"SIMPLE  =", Kind("fits", "a FITS image", f"{_WINDOW} (astropy reads it)")),
    (0, b"ZISRAWFILE", Kind("czi", "a Zeiss CZI image", f"{_WINDOW} (aicsimageio reads it)")),
    (0, b"\xda\xce\xbe\x0a", Kind("nd2", "a Nikon ND2 image", f"{_WINDOW} (nd2 reads it)")),
    (0, b"MATLAB 5.0", Kind("mat", "a MATLAB file", _AS_ARRAY)),
    (0, b"CDF\x01", Kind("netcdf", "a NetCDF file", _AS_ARRAY)),
    (0, b"CDF\x02", Kind("netcdf", "a NetCDF file", _AS_ARRAY)),
    (0, b"\x89HDF\r\n\x1a\n", Kind("hdf5", "an HDF5 file (a Keras model or a data set)", f"{_MODEL}; {_AS_ARRAY}")),
    (0, b"\x0e\x03\x13\x01", Kind("hdf4", "an HDF4 file", _AS_ARRAY)),
    (0, b"GRIB", Kind("grib", "a GRIB file", _AS_ARRAY)),
    # images of other programs
    (0, b"8BPS", Kind("psd", "a Photoshop document (PSD)", _EXPORT)),
    (0, b"gimp xcf", Kind("xcf", "a GIMP document (XCF)", _EXPORT)),
    (0, b"\x76\x2f\x31\x01", Kind("exr", "an OpenEXR image", f"map its values to 0..1, {_WINDOW}")),
    (0, b"#?RADIANCE", Kind("hdr", "a Radiance HDR image", f"map its values to 0..1, {_WINDOW}")),
    (0, b"#?RGBE", Kind("hdr", "a Radiance HDR image", f"map its values to 0..1, {_WINDOW}")),
    (0, b"PF\n", Kind("pfm", "a PFM image", f"map its values to 0..1, {_WINDOW}")),
    (0, b"\xff\x0a", Kind("jxl", "a JPEG XL image", _CONVERT)),
    (0, b"\0\0\0\x0cJXL \r\n", Kind("jxl", "a JPEG XL image", _CONVERT)),
    (0, b"II\xbc", Kind("jxr", "a JPEG XR image", _CONVERT)),
    (0, b"DDS ", Kind("dds", "a DDS texture", _CONVERT)),
    (0, b"\xabKTX ", Kind("ktx", "a KTX texture", _CONVERT)),
    (0, b"\0\0\x01\0", Kind("ico", "a Windows icon", _CONVERT)),
    (0, b"\0\0\x02\0", Kind("ico", "a Windows cursor", _CONVERT)),
    (0, b"icns", Kind("icns", "a macOS icon", _CONVERT)),
    (0, b"qoif", Kind("qoi", "a QOI image", _CONVERT)),
    (0, b"FLIF", Kind("flif", "a FLIF image", _CONVERT)),
    (0, b"BPG\xfb", Kind("bpg", "a BPG image", _CONVERT)),
    (0, b"\x01\xda", Kind("sgi", "an SGI image", _CONVERT)),
    (0, b"\xd7\xcd\xc6\x9a", Kind("wmf", "a Windows metafile", _EXPORT)),
    # RAW photos that are no TIFF
    (4, b"ftypcrx", Kind("raw", "a RAW photo (Canon CR3)", _DEVELOP)),
    (0, b"IIRO", Kind("raw", "a RAW photo (Olympus ORF)", _DEVELOP)),
    (0, b"IIRS", Kind("raw", "a RAW photo (Olympus ORF)", _DEVELOP)),
    (0, b"IIU\0", Kind("raw", "a RAW photo (Panasonic RW2)", _DEVELOP)),
    (0, b"FUJIFILMCCD-RAW", Kind("raw", "a RAW photo (Fujifilm RAF)", _DEVELOP)),
    (0, b"FOVb", Kind("raw", "a RAW photo (Sigma X3F)", _DEVELOP)),
    (0, b"\0MRM", Kind("raw", "a RAW photo (Minolta MRW)", _DEVELOP)),
    (6, b"HEAPCCDR", Kind("raw", "a RAW photo (Canon CRW)", _DEVELOP)),
    # videos and sound
    (8, b"AVI ", Kind("video", "a video (AVI)", _FRAME)),
    (8, b"WAVE", Kind("audio", "a sound (WAV)", "convscope explains images")),
    (0, b"\x1a\x45\xdf\xa3", Kind("video", "a video (Matroska or WebM)", _FRAME)),
    (0, b"\0\0\x01\xba", Kind("video", "a video (MPEG)", _FRAME)),
    (0, b"\0\0\x01\xb3", Kind("video", "a video (MPEG)", _FRAME)),
    (0, b"FLV", Kind("video", "a video (FLV)", _FRAME)),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Kind("video", "a video (WMV)", _FRAME)),
    (4, b"moov", Kind("video", "a video (QuickTime)", _FRAME)),
    (4, b"mdat", Kind("video", "a video (QuickTime)", _FRAME)),
    (0, b"OggS", Kind("video", "a video or a sound (Ogg)", _FRAME)),
    (0, b"ID3", Kind("audio", "a sound (MP3)", "convscope explains images")),
    (0, b"fLaC", Kind("audio", "a sound (FLAC)", "convscope explains images")),
    # models and data
    (4, b"TFL3", Kind("model", "a TensorFlow Lite model", _MODEL)),
    (0, b"GGUF", Kind("model", "a GGUF model", _MODEL)),
    (0, b"\x80\x02", Kind("pickle", "a Python pickle (a PyTorch checkpoint, or data)", f"{_MODEL}; {_AS_ARRAY}")),
    (0, b"\x80\x03", Kind("pickle", "a Python pickle", _AS_ARRAY)),
    (0, b"\x80\x04", Kind("pickle", "a Python pickle", _AS_ARRAY)),
    (0, b"\x80\x05", Kind("pickle", "a Python pickle", _AS_ARRAY)),
    (0, b"PAR1", Kind("data", "a Parquet table", _AS_ARRAY)),
    (0, b"ARROW1", Kind("data", "an Arrow table", _AS_ARRAY)),
    (0, b"SQLite format 3", Kind("data", "an SQLite database", _AS_ARRAY)),
    # archives
    (0, b"\x1f\x8b", Kind("archive", "a gzip archive", _UNPACK)),
    (0, b"BZh", Kind("archive", "a bzip2 archive", _UNPACK)),
    (0, b"\xfd7zXZ\0", Kind("archive", "an xz archive", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Kind("archive", "a Zstandard archive", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("archive", "a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", Kind("archive", "a RAR archive", _UNPACK)),
    (257, b"ustar", Kind("archive", "a tar archive", _UNPACK)),
    # documents and the rest
    (0, b"%PDF", Kind("document", "a PDF document", _EXPORT)),
    (0, b"%!PS", Kind("document", "a PostScript document", _EXPORT)),
    (0, b"\xc5\xd0\xd3\xc6", Kind("document", "a PostScript document", _EXPORT)),
    (0, b"AT&TFORM", Kind("document", "a DjVu document", _EXPORT)),
    (0, b"\xd0\xcf\x11\xe0", Kind("document", "a Microsoft Office document", _EXPORT)),
    (0, b"{\\rtf", Kind("document", "an RTF document", _EXPORT)),
    (0, b"\0\x05\x16\x07", Kind("finder", "a file that macOS keeps beside another one", "give the other one")),
    (0, b"L\0\0\0\x01\x14\x02\0", Kind("shortcut", "a Windows shortcut", "give the file that it names")),
    (0, b"MZ", Kind("program", "a Windows program", "give the image itself")),
    (0, b"\x7fELF", Kind("program", "a Linux program", "give the image itself")),
)
_RAW_SUFFIXES = {
    "nef": "Nikon NEF", "nrw": "Nikon NRW", "cr2": "Canon CR2", "arw": "Sony ARW", "sr2": "Sony SR2", "dng": "DNG",
    "pef": "Pentax PEF", "srw": "Samsung SRW", "3fr": "Hasselblad 3FR", "erf": "Epson ERF", "kdc": "Kodak KDC",
    "dcr": "Kodak DCR", "iiq": "Phase One IIQ", "mef": "Mamiya MEF", "mos": "Leaf MOS", "rwl": "Leica RWL",
}  # fmt: skip
_BY_SUFFIX = {
    "tga": Kind("tga", "a TGA image", _CONVERT),
    "pcx": Kind("pcx", "a PCX image", _CONVERT),
    "onnx": Kind("model", "an ONNX model", _MODEL),
    "pb": Kind("model", "a TensorFlow graph", _MODEL),
    "img": Kind("raw-values", "the values of a volume, without their header", _WINDOW),
    "raw": Kind("raw-values", "values without a header, or a RAW photo", _WINDOW),
    "bin": Kind("raw-values", "values without a header", _WINDOW),
    "dcm": Kind("dicom", "a DICOM image without its preamble", f"choose its window, {_WINDOW} (pydicom reads it)"),
    "mgh": Kind("mgh", "a FreeSurfer volume", f"choose a slice, {_WINDOW} (nibabel reads it)"),
}
_HEIC = ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")
_NOT_WHOLE = Kind(
    "unknown",
    "in another format, or damaged from its start on",
    "convert it to JPEG or PNG, or copy it again",
)


def kind_of(data: bytes, path: str) -> Kind:
    """The kind of a file that no decoder of images knows.

    Args:
        data: its bytes, of which the first are looked at.
        path: its name, whose suffix tells of kinds without a mark of their own.
    """
    head, suffix = data[:HEAD], path.rpartition(".")[2].lower()
    if not head:
        return Kind("empty", "empty (0 bytes)", _AGAIN)
    if not head.strip(b"\0"):
        return Kind("zeros", "nothing but zeros", f"its copy or download did not end: {_AGAIN}")
    if suffix in _RAW_SUFFIXES and head[:4] in (b"II*\0", b"MM\0*"):
        return raw_photo(suffix)
    if head[4:8] == b"ftyp" and head[8:11] != b"crx":
        return _of_brand(head[8:12].decode("latin-1"))
    if head.startswith(b"PK\x03\x04"):
        return _of_zip(head)
    if head.startswith(b"\x1f\x8b"):
        return _of_gzip(head)
    by_bytes = next((kind for at, mark, kind in _MAGIC if head[at : at + len(mark)] == mark), None)
    return by_bytes or _of_text(head, suffix) or _BY_SUFFIX.get(suffix) or _of_model(head) or _NOT_WHOLE


def raw_photo(suffix: str) -> Kind:
    """The kind of a RAW photo that is a TIFF file."""
    return Kind("raw", f"a RAW photo ({_RAW_SUFFIXES.get(suffix, 'unprocessed values of a sensor')})", _DEVELOP)


def is_raw_suffix(path: str) -> bool:
    """True if a name ends as those of RAW photos do."""
    return path.rpartition(".")[2].lower() in _RAW_SUFFIXES


def _of_brand(brand: str) -> Kind:
    """Files of ISO's base media format: their brand says what they hold."""
    if brand in _HEIC:
        return Kind("heic", "a HEIC image", "install pillow-heif, or convert it to JPEG or PNG")
    if brand in ("avif", "avis"):
        return Kind("avif", "an AVIF image that this Pillow can't decode", _CONVERT)
    return Kind("video", f"a video ({'QuickTime' if brand == 'qt  ' else 'MP4'})", _FRAME)


def _of_zip(head: bytes) -> Kind:
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")
    if name.endswith(".npy"):
        return Kind("npz", "an archive of NumPy arrays (.npz)", "save the array of the image alone, as .npy")
    if name.endswith("data.pkl") or name.endswith("/version"):
        return Kind("model", "a PyTorch file", _MODEL)
    if name in ("metadata.json", "config.json", "model.weights.h5"):
        return Kind("model", "a Keras model", _MODEL)
    if name in ("[Content_Types].xml", "_rels/.rels"):
        return Kind("document", "a Microsoft Office document", "save the image in it as PNG")
    if name == "mimetype":
        return Kind("document", "an OpenDocument or Krita document", _EXPORT)
    return Kind("archive", "a ZIP archive", _UNPACK)


def _of_gzip(head: bytes) -> Kind:
    try:
        inside = zlib.decompressobj(31).decompress(head, HEAD)
    except zlib.error:
        inside = b""
    if inside[344:347] in (b"n+1", b"ni1") or inside[4:7] == b"n+2":
        return Kind("nifti", "a NIfTI volume", f"choose a slice, {_WINDOW} (nibabel reads it)")
    if b"<svg" in inside.lower():
        return Kind("svg", "an SVG drawing", _EXPORT)
    if inside[257:262] == b"ustar":
        return Kind("archive", "a tar archive", _UNPACK)
    return Kind("archive", "a gzip archive", _UNPACK)


_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters that texts do not have


def _of_text(head: bytes, suffix: str) -> Kind | None:
    lowered = head.lower().lstrip()
    if lowered.startswith(b"version https://git-lfs"):
        return Kind("git-lfs", "a Git LFS pointer and not the file itself", "run `git lfs pull`")
    if lowered.startswith((b"<!doctype html", b"<html")):
        return Kind("web-page", "a web page, as a failed download leaves behind", "download it again")
    if b"<svg" in lowered:
        return Kind("svg", "an SVG drawing", _EXPORT)
    if lowered.startswith((b"%pdf", b"%!ps")):
        return Kind("document", "a PDF or PostScript document", _EXPORT)
    if lowered.startswith(b"data:image/"):
        return Kind("base64", "an image as base64 text", "decode it with base64.b64decode, and give the bytes")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Kind("text", "text", "give the image itself")
    if not head.isascii() or _CONTROL.search(head):
        return None
    if lowered.startswith((b"{", b"[")):
        return Kind("json", "JSON text", "give the image itself")
    if re.fullmatch(rb"[A-Za-z0-9+/=\s]{200,}", head):
        return Kind("base64", "base64 text", "decode it with base64.b64decode, and give the bytes")
    if suffix == "csv":
        return Kind("table", "a table", "a table of images needs the column path in its first line")
    return Kind("text", "text", "give the image itself")


def _of_model(head: bytes) -> Kind | None:
    """A file of safetensors begins with the length of its JSON header."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length < 2**27:
        return Kind("model", "a file of weights (safetensors)", _MODEL)
    return None


_ADDRESS = re.compile(r"(?i)([a-z][a-z0-9+.-]+):/{1,3}[^/]")


def address_of(text: str) -> Kind | None:
    """What a text is that is no path but an address, where it is one; a `Path` has lost one of its slashes."""
    if text[:5].lower() == "data:":
        return Kind("data-url", "an image inside of a text", "decode it with base64.b64decode, and give the bytes")
    found = _ADDRESS.match(text)
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme == "file":
        path = "/" + text[len("file:") :].lstrip("/")
        return Kind("address", "an address and not a path", f"give the path {path!r}")
    return Kind(
        "address",
        f"an address on the network ({scheme})",
        "convscope does not download, for it must not send or fetch anything unasked: download it, and give the file",
    )
