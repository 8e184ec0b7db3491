"""What a file gives away is read from its header, whatever wrote it, and a hostile file is refused."""

import numpy as np
import pytest
from dgsnet.data import nuisances
from dgsnet.data.images import FORMATS, ImageError
from dgsnet.data.nuisances import NUISANCES, file_nuisances
from PIL import Image

from tests.support.pictures import chunk, encode

# With these options a file has two pictures.
TWO = {"append_images": [Image.new("RGB", (9, 9))], "save_all": True}
NOISE = np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8)


def read(*arguments, **options):
    data = encode(*arguments, **options)
    return dict(zip(NUISANCES, file_nuisances(data).tolist(), strict=True)), len(data)


def test_the_quality_is_that_which_the_encoder_was_given():
    for quality in range(1, 101):
        assert read(NOISE, "jpeg", quality=quality)[0]["JPEG quality"] == np.float32(quality / 100)


@pytest.mark.parametrize(("subsampling", "name"), [(0, "4:4:4"), (1, "4:2:2"), (2, "4:2:0")])
def test_chroma_subsampling(subsampling, name):
    found, _ = read(NOISE, "jpeg", subsampling=subsampling)
    assert [kind for kind in NUISANCES if kind.startswith("chroma") and found[kind]] == [f"chroma {name}"]


def test_tables_of_another_encoder_have_the_nearest_quality():
    table = [min(255, 2 * int(value) + (i % 3)) for i, value in enumerate(nuisances._TABLES[79])]
    assert 0.5 <= read(NOISE, "jpeg", qtables=[table, table])[0]["JPEG quality"] <= 0.7


def test_sizes_are_logarithms_and_the_file_counts_whole():
    found, size = read(NOISE, "png")
    assert found["log2 width"] == pytest.approx(np.log2(48))
    assert found["log2 height"] == pytest.approx(np.log2(24))
    assert found["log2 bytes per pixel"] == pytest.approx(np.log2(size / (24 * 48)))
    upright, _ = read(NOISE.swapaxes(0, 1).copy(), "png")
    assert found["log2 aspect"] == upright["log2 aspect"] == 1


@pytest.mark.parametrize(
    ("mode", "format", "options", "expected"),
    [
        ("RGB", "png", {}, {"format PNG"}),
        ("RGBA", "webp", {}, {"format WEBP", "mode alpha"}),
        ("LA", "png", {}, {"format PNG", "mode grey", "mode alpha"}),
        ("P", "gif", {"transparency": 3}, {"format GIF", "mode palette", "mode alpha"}),
        ("I;16", "tiff", {}, {"format TIFF", "mode grey", "mode more than 8 bits"}),
        ("CMYK", "jpeg", {}, {"format JPEG", "mode CMYK"}),
        ("L", "jpeg", {}, {"format JPEG", "mode grey"}),
        ("RGB", "bmp", {}, {"format BMP"}),
        ("RGB", "mpo", TWO, {"format JPEG", "chroma 4:2:0"}),
    ],
)
def test_formats_and_modes(mode, format, options, expected):
    found, _ = read(Image.new(mode, (48, 24)), format, **options)
    measured = ("JPEG quality", *(name for name in NUISANCES if name.startswith("log2")))
    assert {name for name, value in found.items() if value and name not in measured} == expected
    assert set(found.values()) - {found[name] for name in measured} <= {0, 1}
    assert (found["JPEG quality"] > 0) == ("format JPEG" in expected)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "avif", "heif"])
def test_metadata_of_a_camera(format):
    if format.upper() not in FORMATS:
        pytest.skip(f"this Pillow reads no {format}")
    exif = Image.Exif()
    exif[0x010F] = "camera"
    assert not read(NOISE, format)[0]["EXIF"]
    assert read(NOISE, format, exif=exif)[0]["EXIF"] == 1


def test_every_format_that_is_read_has_its_place():
    assert {f"format {name}" for name in FORMATS} <= set(NUISANCES)


JPEG = encode(NOISE, "jpeg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"no image", "not an image"),
        (JPEG[:60], "cannot be decoded"),
        (JPEG[:2] + JPEG[JPEG.index(b"\xff\xc0") :], "lacks a quantization table"),
        (JPEG.replace(b"\xff\xda", b"\xff\xda\0\4\0\0" * 200 + b"\xff\xda", 1), "scans"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(4) + b"\0\0\0\1\x08\0\0\0\0") + chunk(b"IDAT", b""), ""),
    ],
    ids=["empty", "text", "cut off", "no tables", "many scans", "no pixels"],
)
def test_what_cannot_be_read_is_refused_in_one_line(data, reason):
    with pytest.raises(ImageError, match=rf"^a\.jpg: .*{reason}") as error:
        file_nuisances(data, name="a.jpg")
    assert "\n" not in str(error.value)


def test_any_change_of_a_byte_gives_numbers_or_one_line():
    rng = np.random.default_rng(0)
    for original in (JPEG, encode(NOISE, "png"), encode(NOISE, "webp"), encode(NOISE, "tiff")):
        for _ in range(100):
            data = bytearray(original)
            for place in rng.integers(0, min(len(data), 700), 3):
                data[place] = rng.integers(0, 256)
            try:
                assert np.isfinite(file_nuisances(bytes(data))).all()
            except ImageError as error:
                assert "\n" not in str(error)
