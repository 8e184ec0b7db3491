"""Every odd image file is either read as it looks or refused in one line."""

import io
import struct

import numpy as np
import pytest
from dgsnet.data.images import FORMATS, ImageError, read_file, read_image
from dgsnet.data.items import find_items
from PIL import Image

from tests.support.pictures import chunk, encode, grey_tiff, png, png_with, raw_profile

HEIGHT, WIDTH = 40, 56


@pytest.fixture(scope="module")
def rgb():
    """Smooth, so that JPEG keeps it, and different in every corner and channel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([4 * x, 6 * y, 255 - 2 * (x + y)], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def grey():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (2 * (x + y)).astype(np.uint8)


def stacked(grey):
    return np.stack([grey] * 3, axis=-1)


@pytest.mark.parametrize("format", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_come_back_exactly(rgb, format):
    result = read_image(encode(rgb, format))
    assert result.dtype == np.uint8 and result.flags.writeable and result.flags.c_contiguous
    np.testing.assert_array_equal(result, rgb)


@pytest.mark.parametrize("format", ["jpeg", "webp", "jpeg2000"])
def test_lossy_formats_come_back_nearly(rgb, format):
    assert np.abs(read_image(encode(rgb, format)).astype(int) - rgb).mean() < 4


def test_every_kind_of_source_gives_the_same_pixels(rgb, tmp_path):
    path = tmp_path / "a.PNG"
    path.write_bytes(encode(rgb, "png"))
    for source in (path, str(path), path.read_bytes(), Image.open(path), rgb):
        np.testing.assert_array_equal(read_image(source), rgb)
    with pytest.raises(TypeError):
        read_image(3)


def test_given_pil_image_is_left_as_it_is(rgb):
    image = Image.fromarray(rgb)
    read_image(image)[:] = 0
    np.testing.assert_array_equal(np.asarray(image), rgb)


def test_greyscale(grey):
    np.testing.assert_array_equal(read_image(encode(grey, "png")), stacked(grey))
    bilevel = Image.fromarray(grey).convert("1")
    for format in ("png", "ppm"):
        np.testing.assert_array_equal(
            read_image(encode(bilevel, format)), stacked(np.asarray(bilevel).astype(np.uint8) * 255)
        )


def test_cmyk(rgb):
    cmyk = Image.fromarray(rgb).convert("CMYK")
    np.testing.assert_array_equal(read_image(encode(cmyk, "tiff")), rgb)
    # Adobe's programs, and Pillow after them, store CMYK JPEGs inverted and say so by an Adobe marker.
    jpeg = encode(cmyk, "jpeg", quality=100)
    assert b"Adobe" in jpeg
    assert np.abs(read_image(jpeg).astype(int) - rgb).mean() < 4


def test_palette(rgb):
    palette = Image.fromarray(rgb).quantize(16)
    seen = np.asarray(palette.convert("RGB"))
    for format in ("png", "gif", "bmp"):
        np.testing.assert_array_equal(read_image(encode(palette, format)), seen)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bit_greyscale_is_scaled_not_clipped(grey, format):
    wide = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_image(encode(wide, format)), stacked(grey))
    np.testing.assert_array_equal(read_image(wide.astype(np.int32)), stacked(grey))


def test_16_bit_colour(rgb):
    wide = (rgb.astype(">u2") * 257).astype(">u2")
    data = png(WIDTH, HEIGHT, 16, 2, [row.tobytes() for row in wide])
    np.testing.assert_array_equal(read_image(data), rgb)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_tiff(grey, white):
    values = (grey / grey.max() * white).astype(np.float32)
    expected = stacked(np.rint(grey / grey.max() * 255).astype(np.uint8))
    np.testing.assert_array_equal(read_image(encode(values, "tiff")), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1, 1e6])
def test_samples_without_a_scale_are_refused(grey, bad):
    values = grey.astype(np.float32)
    values[5, 5] = bad
    with pytest.raises(ImageError, match="not all finite and between 0 and 65535"):
        read_image(encode(values, "tiff"))


@pytest.mark.parametrize("format", ["gif", "png", "webp", "tiff"])
def test_animation_gives_its_first_frame(rgb, format):
    options = {"lossless": True} if format == "webp" else {}
    second, third = Image.fromarray(255 - rgb), Image.fromarray(rgb[::-1])
    first = Image.fromarray(rgb).quantize(64).convert("RGB")
    data = encode(first, format, save_all=True, append_images=[second, third], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(read_image(data), np.asarray(first))


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda x: np.rot90(x, 1)),
        (9, lambda x: x),
    ],
)
def test_exif_orientation_is_applied(rgb, grey, orientation, upright):
    exif = Image.Exif()
    exif[0x112] = orientation
    np.testing.assert_array_equal(read_image(encode(rgb, "png", exif=exif)), upright(rgb))
    profile = raw_profile(exif.tobytes(), encode(rgb, "png"))
    np.testing.assert_array_equal(read_image(profile), upright(rgb))
    wide = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_image(encode(wide, "tiff", exif=exif)), upright(stacked(grey)))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("format", ["png", "png later", "jpeg", "tiff", "webp", "avif", "heif"])
def test_orientation_is_not_taken_from_xmp(rgb, format):
    """Browsers and libvips do not either."""
    kind, later, _ = format.partition(" ")
    if kind == "avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    plain = encode(rgb, kind)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    match kind:
        case "png":
            # A text after the pixels is read with them.
            data = plain[:-12] + text + plain[-12:] if later else png_with(text, whole=plain)
        case "tiff":
            data = encode(rgb, kind, tiffinfo={700: XMP})
        case _:
            # What writes HEIF turns the pixels themselves.
            data = encode(rgb, kind, xmp=XMP.replace(b'"6"', b'"1"')).replace(b'n="1"', b'n="6"')
    assert XMP in data
    np.testing.assert_array_equal(read_image(data), read_image(plain))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(read_image(image), read_image(plain))
        assert kind == "heif" or XMP in image.info["xmp"]


def moved_gif(palette, left, top, width, height):
    data = bytearray(encode(palette, "gif"))
    struct.pack_into("<HH", data, 6, width, height)
    struct.pack_into("<HH", data, data.index(b",\0\0\0\0") + 1, left, top)
    return bytes(data)


def moved_webp(palette, left, top, width, height):
    def chunk(kind, data):
        return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    sizes = [left // 2, top // 2, palette.width - 1, palette.height - 1, 100, width - 1, height - 1]
    numbers = [number.to_bytes(3, "little") for number in sizes]
    pixels = encode(palette.convert("RGB"), "webp", lossless=True)[12:]
    frame = chunk(b"ANMF", b"".join(numbers[:5]) + bytes(1) + pixels)
    header = chunk(b"VP8X", b"\2\0\0\0" + b"".join(numbers[5:])) + chunk(b"ANIM", b"\0\xff\0\xff\0\0")
    return chunk(b"RIFF", b"WEBP" + header + frame)


@pytest.mark.parametrize("moved", [moved_gif, moved_webp])
def test_what_the_first_frame_of_an_animation_leaves_out_is_white(rgb, moved):
    palette = Image.fromarray(rgb).quantize(64)
    expected = np.full((HEIGHT + 7, WIDTH + 11, 3), 255)
    expected[4 : 4 + HEIGHT, 6 : 6 + WIDTH] = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(read_image(moved(palette, 6, 4, WIDTH + 11, HEIGHT + 7)), expected)


NEW_KIND, OLD_KIND, PHOTOMETRIC, SUB_DIRECTORIES, DNG = 254, 255, 262, 330, 50706


def sub_directory(photometric):
    """A directory of one entry, which says what its samples mean."""
    return struct.pack("<HHHLLL", 1, PHOTOMETRIC, 4, 1, photometric, 0)


@pytest.mark.parametrize(
    "tags, below, readable",
    [
        ({}, b"", True),
        # This is one page of several.
        ({NEW_KIND: 2}, b"", True),
        ({NEW_KIND: 1}, b"", False),
        ({NEW_KIND: 3}, b"", False),
        ({OLD_KIND: 2}, b"", False),
        ({OLD_KIND: 3}, b"", True),
        ({DNG: 0x0104}, b"", False),
        ({PHOTOMETRIC: 34892}, b"", False),
        # Viewers of large images have smaller copies like these.
        ({}, sub_directory(2), True),
        ({}, sub_directory(32803), False),
        ({}, sub_directory(34892), False),
    ],
)
def test_raw_files_and_reduced_images_are_refused_by_their_content(grey, tags, below, readable):
    place = 400 + grey.size
    tags = tags | {SUB_DIRECTORIES: place} if below else tags
    data = grey_tiff(grey, more=tags) + below
    if readable:
        np.testing.assert_array_equal(read_image(data), stacked(grey))
        canons = data[:4] + struct.pack("<L", len(data)) + b"CR" + data[10:] + data[8:400]
        with pytest.raises(ImageError, match="a camera's raw file"):
            read_image(canons)
    else:
        with pytest.raises(ImageError, match=r"a camera's raw file|begins with a reduced image"):
            read_image(data)


def test_broken_exif_does_not_cost_the_image(rgb):
    plain = read_image(encode(rgb, "jpeg"))
    data = encode(rgb, "jpeg", exif=b"Exif\0\0garbage!!!!")
    np.testing.assert_array_equal(read_image(data), plain)


def test_one_pixel():
    np.testing.assert_array_equal(read_image(encode(np.array([[[1, 2, 3]]], np.uint8), "png")), [[[1, 2, 3]]])


@pytest.mark.parametrize("format", ["jpeg", "png", "gif", "webp", "tiff", "bmp", "jpeg2000", "ppm"])
@pytest.mark.parametrize("kept", [0.02, 0.2, 0.6, 0.97])
def test_truncated_files_are_refused_in_one_line(rgb, tmp_path, format, kept):
    noisy = np.random.default_rng(0).integers(0, 256, rgb.shape, dtype=np.uint8)
    data = encode(noisy, format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"hello, I am a text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"BM and more text", "a BMP that is damaged, or of a kind that cannot be read: "),
        # Its mode is that of a TIFF of 64 bits.
        (
            grey_tiff(np.zeros((2, 3), np.uint8), more={258: 64}),
            "a TIFF that is damaged, .*: unknown pixel mode",
        ),
        (
            png_with(chunk(b"iCCP", b"a\0\1")),
            "a PNG that is damaged, .*: Unknown compression method 1 in iCCP",
        ),
    ],
)
def test_what_is_not_an_image(tmp_path, data, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=reason) as error:
            read_image(source)
        assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere.png: no such file$"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("error")
def test_sizes_that_pillow_finds_suspicious_are_read_without_warnings(rgb, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    np.testing.assert_array_equal(read_image(encode(rgb, "png")), rgb)


def test_parts_of_files(rgb, tmp_path):
    data = encode(rgb, "png")
    (tmp_path / "many.bin").write_bytes(b"before" + data + b"after")
    part = read_file(tmp_path / "many.bin", offset=6, size=len(data))
    np.testing.assert_array_equal(read_image(part, name="many.bin/a.png"), rgb)
    with pytest.raises(ImageError, match="cut off by the end of its file"):
        read_file(tmp_path / "many.bin", offset=12, size=len(data))
    with pytest.raises(ImageError, match=r"^many.bin/a.png: "):
        read_image(part[:100], name="many.bin/a.png")


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_phone_formats_are_images_like_others(rgb, format, tmp_path):
    if format == "AVIF" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    upright = Image.fromarray(rgb)
    exif = Image.Exif()
    # The image lies on its side. In HEIF the file's own rotation counts, which decoding applies.
    exif[0x0112] = 6
    turned = upright if format == "HEIF" else upright.transpose(Image.Transpose.ROTATE_90)
    for picture, options in ((upright, {}), (turned, {"exif": exif})):
        result = read_image(encode(picture, format, quality=95, **options))
        assert result.shape == rgb.shape and np.abs(result.astype(int) - rgb).mean() < 6
    (tmp_path / "a.HEIC").write_bytes(encode(rgb, "HEIF"))
    assert [item.path for item in find_items([tmp_path])] == [str(tmp_path / "a.HEIC")]


def test_an_image_that_nothing_here_decodes_is_a_row(tmp_path):
    for name in ("a.jxl", "b.cr2", "c.psd"):
        (tmp_path / name).write_bytes(b"8BPS and more")
    items = list(find_items([tmp_path]))
    assert len(items) == 3
    for item in items:
        with pytest.raises(ImageError, match="not an image of a kind that can be read"):
            item.read()
