"""Archives whose members are packed in unusual ways, and damaged: one clear error, whatever the unpacker raises."""

import zipfile

import pytest

import convscope
from convscope.errors import ModelError

pytest.importorskip("torch")

MEMBERS = {
    ".pth": ("archive/data.pkl", "archive/version"),
    ".pt2": ("net/models/model.json", "net/archive_format", "net/version"),
    ".keras": ("config.json", "metadata.json", "model.weights.h5"),
}


@pytest.mark.parametrize("ending", MEMBERS)
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_in_members_of_every_packing(method, ending, tmp_path):
    if ending == ".keras":
        pytest.importorskip("keras")
    path = tmp_path / f"net{ending}"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in MEMBERS[ending]:
            archive.writestr(name, b"{}" * 200)
        places = [(info.header_offset + 30 + len(info.filename.encode()), info) for info in archive.infolist()]
    data = bytearray(path.read_bytes())
    for start, info in places:
        # Of LZMA the five bytes of its options alone, after a header of four: other damage has other errors.
        first, last = (start + 4, start + 9) if method == zipfile.ZIP_LZMA else (start, start + info.compress_size)
        data[first:last] = bytes([255]) * (last - first)
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        convscope.open_model(path)
    assert caught.value.code in ("file-damaged", "file-unknown", "no-weights", "file-invalid")
