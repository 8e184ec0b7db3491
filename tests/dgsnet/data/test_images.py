"""Every odd image file is either read as it looks or refused in one line."""

import ast
import io
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from dgsnet.data.images import FORMATS, MAX_PIXELS, ImageError, read_file, read_image
from dgsnet.data.sources import find_items
from PIL import Image

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


def encode(image, format, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, rows):
    """A PNG that Pillow cannot write: any bit depth, colour type, size and (uncompressed) contents."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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
    np.testing.assert_array_equal(
        read_image(encode(bilevel, "png")), stacked(np.asarray(bilevel).astype(np.uint8) * 255)
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
    index = np.asarray(palette)[0, 0]
    clear = read_image(encode(palette, "png", transparency=int(index)))
    np.testing.assert_array_equal(clear, np.where((np.asarray(palette) == index)[..., None], 255, seen))


def test_transparency_is_composited_on_white(rgb, grey):
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    alpha[0, 0] = 128
    for colour, mode in ((rgb, "RGBA"), (stacked(grey), "LA")):
        pixels = np.concatenate([colour[..., : len(mode) - 1], alpha[..., None]], axis=-1)
        for format in ("png", "tiff"):
            result = read_image(encode(Image.fromarray(pixels, mode), format))
            np.testing.assert_array_equal(result[:, WIDTH // 2 :], colour[:, WIDTH // 2 :])
            assert (result[1:, : WIDTH // 2] == 255).all()
            assert np.abs(result[0, 0] - (128.0 * colour[0, 0] + 127 * 255) / 255).max() <= 1


def test_what_lies_below_full_transparency_does_not_matter(rgb):
    clear = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    first = encode(np.concatenate([rgb, clear], axis=-1), "png")
    second = encode(np.concatenate([255 - rgb, clear], axis=-1), "png")
    np.testing.assert_array_equal(read_image(first), read_image(second))


def test_transparent_colour_of_opaque_modes(rgb, grey):
    result = read_image(encode(rgb, "png", transparency=tuple(map(int, rgb[3, 4]))))
    match = (rgb == rgb[3, 4]).all(-1, keepdims=True)
    np.testing.assert_array_equal(result, np.where(match, 255, rgb))
    result = read_image(encode(grey, "png", transparency=int(grey[3, 4])))
    np.testing.assert_array_equal(result, stacked(np.where(grey == grey[3, 4], 255, grey)))


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


@pytest.mark.parametrize("side", [12_000, 100_000])
def test_decompression_bombs_are_refused_before_decoding(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=f"larger than {MAX_PIXELS:,} pixels"):
        read_image(png(side, side, 8, 2, [b"\0" * 100]))


@pytest.mark.filterwarnings("error")
def test_sizes_that_pillow_finds_suspicious_are_read_without_warnings(rgb, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    np.testing.assert_array_equal(read_image(encode(rgb, "png")), rgb)


def png_with(*chunks, whole=None):
    """A good PNG, of 32 x 32 pixels if none is given, with more chunks before its pixels."""
    whole = whole or png(32, 32, 8, 2, [bytes(96)] * 32)
    return whole[:33] + b"".join(chunks) + whole[33:]


def tiff(entries, rest=b""):
    """A TIFF of these directory entries (tag, type, count, value)."""
    packed = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + rest


def rle_bmp(width, height, data):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + data


def jpeg_of_scans(repetitions, side):
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(Image.new("RGB", (side, side)), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * repetitions + data[-2:]


def jpeg_with(segment, times):
    data = encode(Image.new("RGB", (32, 32)), "jpeg")
    return data[:2] + segment * times + data[2:]


def gif_larger_than_its_canvas():
    data = bytearray(encode(Image.new("P", (16, 16)), "gif"))
    place = data.rindex(b",") + 1
    data[place : place + 8] = struct.pack("<HHHH", 65535, 65535, 65535, 65535)
    return bytes(data)


def animation(format, frames):
    images = [Image.new("RGB", (16, 16), (i % 256, i // 256, 3)) for i in range(frames)]
    return encode(images[0], format, save_all=True, append_images=images[1:])


def overlapping_exif(kind=3, entries=60_000, numbers=2**19, rest=2**20):
    """Entries that all mean the same bytes: a megabyte 60 000 times over."""
    directory = b"".join(struct.pack("<HHLL", tag, kind, numbers, 8) for tag in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + directory + bytes(rest)


def segments(marker, name, data):
    """Data in as many JPEG segments as it takes."""
    parts = [name + data[at : at + 65_000] for at in range(0, len(data), 65_000)]
    return b"".join(b"\xff" + marker + struct.pack(">H", len(part) + 2) + part for part in parts)


def raw_profile(exif, whole=None):
    """EXIF data as ImageMagick writes it to PNGs, in hexadecimal digits."""
    text = f"\nexif\n{len(exif)}\n{exif.hex()}"
    return png_with(chunk(b"tEXt", b"Raw profile type exif\0" + text.encode()), whole=whole)


STRIPS = [(256, 3, 1, 32), (257, 3, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
EXIF = b"\xff\xe1" + struct.pack(">H", 65_000) + b"Exif\0\0II*\0\x08\0\0\0" + bytes(65_000 - 16)
ICC = b"\xff\xe2" + struct.pack(">H", 65_000) + b"ICC_PROFILE\0\1\1" + bytes(65_000 - 16)
MADE_TO_HURT = {
    "zTXt": (lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9))), "too large"),
    "many zTXt": (
        lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 100),
        "Too much memory",
    ),
    "iCCP": (lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27), 9))), "too large"),
    "eXIf": (lambda: png_with(chunk(b"eXIf", overlapping_exif())), None),
    "opaque eXIf": (lambda: png_with(chunk(b"eXIf", overlapping_exif(7, numbers=2**20))), None),
    "raw profile": (lambda: raw_profile(overlapping_exif()), None),
    "WebP EXIF": (lambda: encode(Image.new("RGB", (32, 32)), "webp", exif=overlapping_exif()), None),
    "JPEG EXIF directory": (
        lambda: jpeg_with(segments(b"\xe1", b"Exif\0\0", overlapping_exif()), 1),
        "an EXIF directory of more than",
    ),
    "JPEG pictures": (
        lambda: jpeg_with(segments(b"\xe2", b"MPF\0", overlapping_exif(7, 5_000, 60_000, 0)), 1),
        "an EXIF directory of more than",
    ),
    "TIFF opaque": (
        lambda: tiff([*STRIPS[:-1], *((tag, 7, 2**20, 8) for tag in range(300, 60_000))], bytes(2**20)),
        "a TIFF directory of more than 67,108,864 bytes",
    ),
    "large eXIf": (lambda: png_with(chunk(b"eXIf", bytes(2**25))), None),
    "PNG header": (lambda: png(2**31 - 1, 2**31 - 1, 8, 2, []), "larger than"),
    "one row": (lambda: png(2**26, 1, 8, 0, []), "a side longer than 131,072 pixels"),
    "JPEG scans": (lambda: jpeg_of_scans(2000, 64), "a JPEG of more scans"),
    "JPEG scanned pixels": (lambda: jpeg_of_scans(90, 6000), "a JPEG of more scans"),
    "JPEG EXIF": (lambda: jpeg_with(EXIF, 200), "its EXIF data is larger than"),
    "JPEG profile": (lambda: jpeg_with(ICC, 200), None),
    "GIF frame": (gif_larger_than_its_canvas, "larger than"),
    "GIF frames": (lambda: animation("gif", 2000), None),
    "PNG frames": (lambda: animation("png", 2000), None),
    "WebP frames": (lambda: animation("webp", 2000), None),
    "TIFF strips": (
        lambda: tiff([*STRIPS, (273, 3, 2**22, 200), (279, 3, 2**22, 200)], bytes(2**23 + 200)),
        "a TIFF directory of more than",
    ),
    "TIFF tile": (
        lambda: tiff([*STRIPS, (322, 4, 1, 45_000), (323, 4, 1, 45_000), (324, 4, 1, 8), (325, 4, 1, 60)]),
        "a TIFF with tiles of more than",
    ),
    "BMP row": (lambda: rle_bmp(2**27, 1, b"\0\2\xff\xff" * 30), "a side longer than"),
    "BMP jumps": (lambda: rle_bmp(2**17, 64, b"\0\2\xff\xff" * 3000), None),
    "PNM header": (lambda: b"P6\n" + b"#\n" * 2**22, "no PNM header in its first"),
    "PNM comments": (lambda: b"P3\n300 300\n255\n" + b"#\n" * 2**20, "a PNM text of more than 100 comments"),
    "PNM text": (lambda: b"P3\n3000 3000\n255\n" + b"1 " * 2**24, "a PNM text of more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("kind", MADE_TO_HURT)
def test_files_made_to_exhaust_their_reader(kind):
    """Each is read or refused in little time and memory, in a process of its own that can tell."""
    make, reason = MADE_TO_HURT[kind]
    data = make()
    seconds, mebibytes, answer = in_a_process(data)
    assert seconds < 10 and mebibytes < 200 + 2 * len(data) / 2**20
    if reason is None:
        assert answer.startswith("(")
    else:
        assert reason in answer and "\n" not in answer


@pytest.mark.parametrize("format", ["png", "jpeg", "gif"])
def test_the_largest_image_is_read_in_bounded_memory(format):
    side = int(MAX_PIXELS**0.5)
    _, mebibytes, answer = in_a_process(encode(Image.new("L", (side, side)), format))
    assert answer == f"({side}, {side}, 3)"
    assert mebibytes < 9 * MAX_PIXELS / 2**20


def in_a_process(data):
    """Seconds, peak memory in MiB beyond what was there, and the shape or error, of reading an image."""
    read, write = os.pipe()
    if not (child := os.fork()):
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        limit = 8 * 2**30  # of addresses: a bomb that goes off must not take the machine with it
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            answer = str(read_image(data).shape)
        except ImageError as error:
            answer = str(error)
        except BaseException as error:
            answer = f"not an ImageError: {error!r}"
        seconds = time.process_time() - begin
        mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(write, repr((seconds, mebibytes, answer)).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return ast.literal_eval(said.decode())


def test_files_of_no_reasonable_size_are_not_read(tmp_path):
    path = tmp_path / "sparse.webp"
    path.write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(100))
    os.truncate(path, 2**40)
    with pytest.raises(ImageError, match=r"sparse.webp: larger than 536,870,912 bytes$"):
        read_image(path)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", "/dev/tty"):
        with pytest.raises(ImageError, match="not a regular file"):
            read_image(path)


def test_parts_of_files(rgb, tmp_path):
    data = encode(rgb, "png")
    (tmp_path / "many.bin").write_bytes(b"before" + data + b"after")
    part = read_file(tmp_path / "many.bin", offset=6, size=len(data))
    np.testing.assert_array_equal(read_image(part, name="many.bin/a.png"), rgb)
    with pytest.raises(ImageError, match="cut off by the end of its file"):
        read_file(tmp_path / "many.bin", offset=12, size=len(data))
    with pytest.raises(ImageError, match=r"^many.bin/a.png: "):
        read_image(part[:100], name="many.bin/a.png")


def mutated(data, rng):
    """What a file becomes by some bytes changed, lost, doubled, or taken for the largest numbers."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 10)):
        # Half of the damage goes to the header, where it does most.
        place = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 200)))
        match rng.integers(4):
            case 0:
                data[place] = rng.integers(256)
            case 1:
                data[place : place + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")[
                    rng.integers(3)
                ]
            case 2:
                del data[place : place + int(rng.integers(1, 50))]
            case 3:
                data[place:place] = data[place : place + int(rng.integers(1, 200))]
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.parametrize(
    "format, options",
    [
        ("avif", {}),
        ("bmp", {}),
        ("gif", {"save_all": True}),
        ("jpeg", {"exif": True}),
        ("jpeg", {"progressive": True}),
        ("jpeg2000", {}),
        ("png", {"exif": True}),
        ("png", {"save_all": True}),
        ("ppm", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("tiff", {"compression": "jpeg"}),
        ("tiff", {"exif": True}),
        ("webp", {"save_all": True}),
        ("webp", {"exif": True, "lossless": True}),
    ],
)
def test_mutated_files_are_read_or_refused_in_one_line(rgb, format, options):
    if format.upper() not in FORMATS:
        pytest.skip(f"this Pillow has no {format}")
    rng = np.random.default_rng(0)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x112], exif[0x10F] = 6, "camera" * 9
        options = options | {"exif": exif}
    if "save_all" in options:
        options = options | {"append_images": [Image.fromarray(255 - rgb)]}
    data = encode(rgb, format, **options)
    refused = 0
    for _ in range(150):
        try:
            result = read_image(mutated(data, rng))
        except ImageError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert result.ndim == 3 and result.shape[2] == 3 and result.dtype == np.uint8
    assert refused > 20


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_phone_formats_are_images_like_others(rgb, format, tmp_path):
    if format == "AVIF" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    upright = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side; in HEIF the file's own rotation counts, and is applied in decoding
    turned = upright if format == "HEIF" else upright.transpose(Image.Transpose.ROTATE_90)
    for picture, options in ((upright, {}), (turned, {"exif": exif})):
        result = read_image(encode(picture, format, quality=95, **options))
        assert result.shape == rgb.shape and np.abs(result.astype(int) - rgb).mean() < 6
    (tmp_path / "a.HEIC").write_bytes(encode(rgb, "HEIF"))
    assert [item.name for item in find_items([tmp_path])] == [str(tmp_path / "a.HEIC")]


def test_heif_is_refused_by_its_size_before_it_is_decoded(rgb):
    data = bytearray(encode(rgb, "HEIF"))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", 60000, 60000)
    started = time.process_time()
    with pytest.raises(ImageError):
        read_image(bytes(data))
    assert time.process_time() - started < 1


def test_an_image_that_nothing_here_decodes_is_a_row(tmp_path):
    for name in ("a.jxl", "b.cr2", "c.psd"):
        (tmp_path / name).write_bytes(b"8BPS and more")
    items = list(find_items([tmp_path]))
    assert len(items) == 3
    for item in items:
        with pytest.raises(ImageError, match="not an image of a kind that can be read"):
            item.read()
